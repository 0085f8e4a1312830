//! `agentkernel run`: a temporary sandbox, one command, and what became of the project.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use agentkernel_protocol::message::{Exec, ExecFailure, Exit};
use agentkernel_sandbox::client::{Finished, Lease};
use agentkernel_sandbox::launch::{self, Launch};
use agentkernel_sandbox::project::WorkspaceMode;
use agentkernel_sandbox::state::Home;
use agentkernel_sandbox::workspace::{ApplyReport, ChangeSet, ChangeSummary};
use agentkernel_sandbox::{Problem, plain};
use serde::Serialize;
use serde_bytes::ByteBuf;
use tokio::signal::unix::{SignalKind, signal};

use super::execute::{Captured, Ended, Sink, Source, execute};
use super::{apply, block_on, launch as starting};
use crate::arguments::RunArguments;
use crate::{environment, terminal, ui};

pub(super) fn run(arguments: &RunArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    let quiet = arguments.quiet || arguments.json;
    if arguments.apply && arguments.sandbox.workspace != crate::arguments::WorkspaceMode::Cow {
        let hint = "leave one of --apply and --workspace out";
        return Err(plain(
            "usage",
            "only the changes of a copy-on-write workspace can be applied",
            Some(hint),
        ));
    }
    let launch = starting::settle(&home, &arguments.sandbox, quiet)?;
    let exec = exec_of(arguments, &launch);
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
    let quiet = arguments.quiet || arguments.json;
    let begun = Instant::now();
    let mut lease = tokio::select! {
        lease = starting::start(home, launch, quiet) => lease?,
        code = interrupted() => return Ok(code),
    };
    let started = begun.elapsed();
    let mut captured = Captured::default();
    let sink = if arguments.json { Sink::Capture(&mut captured) } else { Sink::Streams };
    let ended = match execute(&mut lease, exec, Source::Stdin, sink).await {
        Ok(ended) => ended,
        Err(problem) => {
            lease.release();
            return Err(problem);
        }
    };
    let mut code = ended.code();
    let kept = tokio::select! {
        kept = keep_changes(&mut lease, home, launch, &ended) => kept,
        code = interrupted() => {
            lease.release();
            return Ok(code);
        }
    };
    lease.release();
    if !quiet || (!arguments.json && matches!(ended, Ended::NotStarted { .. })) {
        explain(&ended, arguments);
    }
    // Whatever became of the changes, what the command said is not lost.
    let (kept, mut failure) = match kept {
        Ok(kept) => (kept, None),
        Err(problem) => (None, Some(problem)),
    };
    let summary = kept.as_ref().map(ChangeSet::summary);
    let mut report = None;
    if let Some((set, summary)) = kept.zip(summary).filter(|(_, summary)| summary.total() > 0) {
        if arguments.apply && code == 0 {
            match apply::apply_set(set, &[], false) {
                Ok(applied) => {
                    if !quiet {
                        apply::show(&applied);
                    }
                    if apply::has_leftovers(&applied) {
                        code = ui::RUN_FAILED;
                    }
                    report = Some(applied);
                }
                Err(problem) => failure = Some(problem),
            }
        } else if !quiet {
            let why = if arguments.apply { " (not applied: the command failed)" } else { "" };
            ui::note(&format!("{summary}{why}, kept as last: agentkernel apply --last"));
        }
    }
    if arguments.json {
        let mut outcome = Outcome::new(&ended, code, &captured, summary, report, started, begun.elapsed());
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

/// Moves the sandbox's change set to where `apply --last` finds it.
async fn keep_changes(
    lease: &mut Lease,
    home: &Home,
    launch: &Launch,
    ended: &Ended,
) -> Result<Option<ChangeSet>, Problem> {
    let shared = launch.spec.workspace.as_ref().filter(|workspace| workspace.mode == WorkspaceMode::Cow);
    let Some(workspace) = shared.filter(|_| !matches!(ended, Ended::Abandoned { .. })) else {
        return Ok(None);
    };
    let Finished { change_set, problem, .. } = lease.finish().await?;
    match (problem, change_set) {
        (Some(problem), _) => Err(problem),
        (None, Some(change_set)) => launch::keep_last(home, &change_set, &workspace.root).map(Some),
        (None, None) => Ok(None),
    }
}

/// The command as the guest is told to run it.
fn exec_of(arguments: &RunArguments, launch: &Launch) -> Exec {
    let wants_terminal = !arguments.json && (arguments.tty || terminal::is_interactive());
    let mut environment = launch.environment.clone();
    if wants_terminal {
        set(&mut environment, "TERM".into(), std::env::var_os("TERM").unwrap_or_else(|| "xterm".into()));
    }
    for assignment in &arguments.env {
        let bytes = assignment.as_bytes();
        match bytes.iter().position(|byte| *byte == b'=') {
            Some(position) => {
                let (name, value) = (&bytes[..position], &bytes[position + 1..]);
                set(&mut environment, OsStr::from_bytes(name).into(), OsStr::from_bytes(value).into());
            }
            None => {
                if let Some(value) = std::env::var_os(assignment) {
                    set(&mut environment, assignment.clone(), value);
                }
            }
        }
    }
    let arguments_of =
        |words: &[OsString]| words.iter().map(|word| ByteBuf::from(word.as_bytes())).collect::<Vec<_>>();
    let mut words: Vec<ByteBuf> =
        launch.entrypoint.iter().map(|word| ByteBuf::from(word.as_bytes())).collect();
    words.extend(arguments_of(&arguments.command));
    let directory =
        arguments.workdir.as_ref().map_or(launch.directory.as_os_str(), |workdir| workdir.as_os_str());
    Exec {
        arguments: words,
        environment: environment
            .into_iter()
            .map(|(name, value)| (ByteBuf::from(name.as_bytes()), ByteBuf::from(value.as_bytes())))
            .collect(),
        directory: ByteBuf::from(directory.as_bytes()),
        user: arguments.user.clone().unwrap_or_else(|| launch.user.clone()),
        terminal: wants_terminal.then(terminal::size),
        timeout_ms: arguments.timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
    }
}

fn set(environment: &mut Vec<(OsString, OsString)>, name: OsString, value: OsString) {
    environment.retain(|(existing, _)| *existing != name);
    environment.push((name, value));
}

/// Says what a bare exit code leaves open.
fn explain(ended: &Ended, arguments: &RunArguments) {
    match ended {
        Ended::Exited(Exit { timed_out: true, .. }) => ui::note("the command was killed: --timeout was up"),
        Ended::Exited(Exit { out_of_memory: true, .. }) => ui::note(&format!(
            "the guest ran out of memory and killed processes: give it more than --memory {}M",
            arguments.sandbox.memory
        )),
        Ended::NotStarted { kind, message } => {
            let hint = match kind {
                ExecFailure::NotFound => Some(
                    "the host image shows what every user of this machine may read; --image takes another",
                ),
                ExecFailure::Directory => Some("choose one of the guest's directories with --workdir"),
                ExecFailure::UnknownUser => Some("choose a user of the guest with --user"),
                ExecFailure::NotExecutable | ExecFailure::Other => None,
            };
            ui::error(&plain("not-started", message.clone(), hint));
        }
        Ended::Exited(_) | Ended::Abandoned { .. } => {}
    }
}

/// Waits for the first signal that ends a start.
async fn interrupted() -> u8 {
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

/// What `--json` prints.
#[derive(Serialize)]
struct Outcome {
    exit_code: u8,
    signal: Option<u8>,
    timed_out: bool,
    out_of_memory: bool,
    error: Option<String>,
    stdout: Text,
    stderr: Text,
    output: Text,
    omitted_bytes: u64,
    changes: Option<ChangeSummary>,
    applied: Option<ApplyReport>,
    start_ms: f64,
    total_ms: f64,
}

/// Text as a string where it is UTF-8, else its bytes in hexadecimal.
#[derive(Serialize)]
#[serde(untagged)]
enum Text {
    Utf8(String),
    Hexadecimal { hex: String },
}

impl Text {
    fn of(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::Utf8(text.to_owned()),
            Err(_) => {
                let mut hex = String::with_capacity(bytes.len() * 2);
                for byte in bytes {
                    let _ = write!(hex, "{byte:02x}");
                }
                Self::Hexadecimal { hex }
            }
        }
    }
}

impl Outcome {
    fn new(
        ended: &Ended,
        exit_code: u8,
        captured: &Captured,
        changes: Option<ChangeSummary>,
        applied: Option<ApplyReport>,
        started: Duration,
        total: Duration,
    ) -> Self {
        use agentkernel_protocol::message::ExitStatus;
        let exit = match ended {
            Ended::Exited(exit) => Some(*exit),
            _ => None,
        };
        Self {
            exit_code,
            signal: exit.and_then(|exit| match exit.status {
                ExitStatus::Signal(signal) => Some(signal),
                ExitStatus::Code(_) => None,
            }),
            timed_out: exit.is_some_and(|exit| exit.timed_out),
            out_of_memory: exit.is_some_and(|exit| exit.out_of_memory),
            error: match ended {
                Ended::NotStarted { message, .. } => Some(message.clone()),
                _ => None,
            },
            stdout: Text::of(&captured.stdout),
            stderr: Text::of(&captured.stderr),
            output: Text::of(&captured.output),
            omitted_bytes: captured.omitted,
            changes,
            applied,
            start_ms: started.as_secs_f64() * 1e3,
            total_ms: total.as_secs_f64() * 1e3,
        }
    }
}
