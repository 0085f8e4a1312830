//! `agentkernel run`: a temporary sandbox, one command, and what became of the project.

use std::ffi::OsString;
use std::time::Instant;

use agentkernel_protocol::message::Exec;
use agentkernel_sandbox::client::{Finished, Lease, Life};
use agentkernel_sandbox::launch::{self, Launch};
use agentkernel_sandbox::network::{self, AuditReader};
use agentkernel_sandbox::project::WorkspaceMode;
use agentkernel_sandbox::spec::{Defaults, Spec};
use agentkernel_sandbox::state::Home;
use agentkernel_sandbox::workspace::{ApplyOptions, ApplyReport, ChangeSummary};
use agentkernel_sandbox::{Problem, io, lifecycle, plain};
use tokio::signal::unix::{SignalKind, signal};

use super::execute::{Captured, Ended, Failure, Sink, Source, execute};
use super::outcome::{Outcome, explain, tell};
use super::{block_on, launch as starting, review};
use crate::arguments::{HowArguments, RunArguments};
use crate::{environment, terminal, ui};

pub(super) fn run(arguments: &RunArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    let quiet = arguments.quiet || arguments.how.json;
    let launch = starting::settle(&home, &arguments.sandbox, &arguments.command, quiet)?;
    let shared = launch.spec.workspace.as_ref();
    if arguments.apply && shared.is_none_or(|workspace| workspace.mode != WorkspaceMode::Cow) {
        let hint = "leave --apply out, or give the sandbox a workspace with --workspace cow";
        return Err(plain(
            "usage",
            "only the changes of a copy-on-write workspace can be applied",
            Some(hint),
        ));
    }
    let defaults = &launch.spec.defaults;
    let mut words: Vec<OsString> = defaults.entrypoint.iter().map(|word| word.0.clone()).collect();
    if arguments.command.is_empty() {
        words.extend(defaults.arguments.iter().map(|word| word.0.clone()));
    }
    words.extend(arguments.command.iter().cloned());
    if words.is_empty() {
        let hint = "name one: agentkernel run --image IMAGE -- COMMAND";
        return Err(plain(
            "usage",
            "the image has neither ENTRYPOINT nor CMD, so it needs a command",
            Some(hint),
        ));
    }
    let mut exec = exec_of(&launch.spec.defaults, &words, Vec::new(), &arguments.how);
    exec.stop_signal = defaults.stop_signal;
    let code = block_on(in_sandbox(arguments, &home, &launch, exec))?;
    // What was still dying when this command began, is dead by now.
    home.sweep();
    code
}

/// Starts the sandbox, runs the command, takes the changes.
async fn in_sandbox(
    arguments: &RunArguments,
    home: &Home,
    launch: &Launch,
    exec: Exec,
) -> Result<u8, Problem> {
    let json = arguments.how.json;
    let quiet = arguments.quiet || json;
    let begun = Instant::now();
    let life = if arguments.keep { Life::Persistent } else { Life::Temporary };
    let held = starting::create(home, launch, life, &arguments.sandbox)?;
    let directory = held.directory.clone();
    let start = tokio::select! {
        lease = starting::start(held, quiet, arguments.sandbox.warmth()) => lease,
        code = interrupted() => {
            lifecycle::remove(&directory, true).await.or_else(gone_is_fine)?;
            return Ok(code);
        }
    };
    let mut lease = match start {
        Ok(lease) => lease,
        Err(problem) => {
            // What could not be started was not created.
            lifecycle::remove(&directory, true).await.or_else(gone_is_fine)?;
            return Err(problem);
        }
    };
    let started = begun.elapsed();
    tracing::debug!("the sandbox is up");
    let mut captured = Captured::default();
    let sink = if json { Sink::Capture(&mut captured) } else { Sink::Streams };
    let ended = match execute(lease.sandbox(), exec, Source::Stdin, sink).await {
        Ok(ended) => ended,
        Err(failure) => {
            let problem = match failure {
                Failure::Broken => lease.failure().await,
                Failure::Problem(problem) => problem,
            };
            lease.release();
            return Err(problem);
        }
    };
    tracing::debug!("the command has ended");
    // Before the directory goes.
    let decided = AuditReader::new(directory.path()).read().map_err(io("read the network's record"))?;
    let refusals = network::refusals(&decided);
    let spec = Spec::load(directory.path())?;
    let mut code = ended.code();
    let kept = if arguments.keep {
        let name = &launch.spec.name;
        lease.live_on().await?;
        if !quiet {
            ui::note(&format!(
                "{name} runs on: agentkernel exec {name} -- COMMAND, agentkernel rm --force {name}"
            ));
        }
        Ok(None)
    } else {
        let kept = tokio::select! {
            kept = keep_changes(&mut lease, home, launch, &ended, arguments.apply) => kept,
            code = interrupted() => {
                lease.release();
                return Ok(code);
            }
        };
        tracing::debug!("the changes are taken");
        lease.release();
        kept
    };
    tracing::debug!("the sandbox is gone");
    if !quiet || (!json && matches!(ended, Ended::NotStarted { .. })) {
        explain(&ended, launch.spec.memory_mib);
    }
    if !quiet {
        tell(&refusals, arguments.keep.then_some(spec.name.as_str()));
    }
    // Whatever became of the changes, what the command said is not lost.
    let ((summary, report), failure) = match kept {
        Ok(Some((summary, report))) => ((Some(summary), report), None),
        Ok(None) => ((None, None), None),
        Err(problem) => ((None, None), Some(problem)),
    };
    let changed = summary.filter(|summary| summary.total() > 0);
    match (&report, changed) {
        (Some(applied), Some(_)) => {
            if !quiet {
                review::show(applied, "--last");
            }
            if review::has_leftovers(applied) {
                code = ui::RUN_FAILED;
            }
        }
        (None, Some(summary)) if !quiet => {
            let why = if arguments.apply { " (not applied: the command failed)" } else { "" };
            ui::note(&format!("{summary}{why}, kept as last: agentkernel apply --last"));
        }
        _ => {}
    }
    if json {
        let mut outcome = Outcome::new(&ended, code, &captured, summary, report, started, begun.elapsed());
        outcome.ports = spec.network.ports.iter().map(ToString::to_string).collect();
        outcome.refusals = refusals.list;
        if let Some(problem) = &failure {
            outcome.error = Some(problem.message.clone());
        }
        ui::json(&outcome);
    }
    match failure {
        Some(problem) => Err(problem),
        None => Ok(code),
    }
}

/// A temporary sandbox that did not start has removed itself.
fn gone_is_fine(problem: Problem) -> Result<(), Problem> {
    if problem.code == "not-found" { Ok(()) } else { Err(problem) }
}

/// Moves the sandbox's change set to where `apply --last` finds it, or applies it if the command succeeded.
async fn keep_changes(
    lease: &mut Lease,
    home: &Home,
    launch: &Launch,
    ended: &Ended,
    apply: bool,
) -> Result<Option<(ChangeSummary, Option<ApplyReport>)>, Problem> {
    let shared = launch.spec.workspace.as_ref().filter(|workspace| workspace.mode == WorkspaceMode::Cow);
    let Some(workspace) = shared.filter(|_| !matches!(ended, Ended::Abandoned { .. })) else {
        return Ok(None);
    };
    let Finished { change_set, problem, .. } = lease.finish().await?;
    match (problem, change_set) {
        (Some(problem), _) => Err(problem),
        (None, Some(change_set)) if apply && ended.code() == 0 => {
            let options = ApplyOptions::default();
            let (summary, report) = launch::apply_or_keep(home, &change_set, &workspace.root, &options)?;
            Ok(Some((summary, Some(report))))
        }
        (None, Some(change_set)) => {
            let set = launch::keep_last(home, &change_set, &workspace.root)?;
            Ok(Some((set.summary(), None)))
        }
        (None, None) => Ok(None),
    }
}

/// The command as the guest is told to run it.
pub(super) fn exec_of(
    defaults: &Defaults,
    words: &[OsString],
    mut environment: Vec<(OsString, OsString)>,
    how: &HowArguments,
) -> Exec {
    let wants_terminal = !how.json && (how.tty || terminal::is_interactive());
    if wants_terminal {
        environment.insert(0, ("TERM".into(), std::env::var_os("TERM").unwrap_or_else(|| "xterm".into())));
    }
    Exec {
        terminal: wants_terminal.then(terminal::size),
        timeout_ms: how.timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
        ..defaults.exec(words, &environment)
    }
}

/// Waits for the first signal that ends a start.
pub(super) async fn interrupted() -> u8 {
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => 130,
        _ = terminate.recv() => 143,
    }
}
