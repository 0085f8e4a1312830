//! `agentkernel exec`, `attach`, and what concerns detached commands.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use agentkernel_protocol::message::{Exec, ExecFailure};
use agentkernel_sandbox::client::Sandbox;
use agentkernel_sandbox::executions::{self, Chunk, Execution, OutputReader, State};
use agentkernel_sandbox::network::{self, AuditReader};
use agentkernel_sandbox::spec::Spec;
use agentkernel_sandbox::state::SandboxDirectory;
use agentkernel_sandbox::{Problem, io, plain};
use serde_bytes::ByteBuf;

use super::execute::{Captured, Ended, Failure, Sink, Source, Streams, converse, execute};
use super::outcome::{Outcome, explain, tell};
use super::{block_on, launch, run};
use crate::arguments::{
    AttachArguments, ExecArguments, ExecKillArguments, ExecListArguments, ExecLogsArguments, HowArguments,
};
use crate::{environment, terminal, ui};

/// How often the output of a command that runs elsewhere is looked at.
const GLANCE: Duration = Duration::from_millis(50);

pub(super) fn exec(arguments: &ExecArguments) -> Result<u8, Problem> {
    let sandbox = Sandbox::open(environment::home()?.find(&arguments.name)?)?;
    let spec = Spec::load(sandbox.directory().path())?;
    let variables = launch::variables(&arguments.env_file, &arguments.env, &environment::surroundings()?)?;
    let mut exec = run::exec_of(&spec.defaults, &arguments.command, variables, &arguments.how);
    if let Some(directory) = &arguments.workdir {
        exec.directory = ByteBuf::from(directory.as_os_str().as_bytes());
    }
    if let Some(user) = &arguments.user {
        exec.user.clone_from(user);
    }
    if arguments.detach {
        return block_on(detach(&sandbox, exec, arguments))?;
    }
    block_on(async {
        let begun = Instant::now();
        let json = arguments.how.json;
        let mut captured = Captured::default();
        let sink = if json { Sink::Capture(&mut captured) } else { Sink::Streams };
        let mut decided = AuditReader::from_now(sandbox.directory().path());
        let ended = match execute(&sandbox, exec, Source::Stdin, sink).await {
            Ok(ended) => ended,
            Err(Failure::Broken) => return Err(sandbox.failure().await),
            Err(Failure::Problem(problem)) => return Err(problem),
        };
        let code = ended.code();
        // A sandbox that is gone meanwhile has nothing to tell.
        let refusals = network::refusals(&decided.read().unwrap_or_default());
        if !arguments.quiet && !json {
            tell(&refusals, Some(&spec.name));
        }
        if json {
            let (start, total) = (Duration::ZERO, begun.elapsed());
            let mut outcome = Outcome::new(&ended, code, &captured, None, None, start, total);
            outcome.ports = spec.network.ports.iter().map(ToString::to_string).collect();
            outcome.refusals = refusals.list;
            ui::json(&outcome);
        } else if !arguments.quiet || matches!(ended, Ended::NotStarted { .. }) {
            explain(&ended, spec.memory_mib);
        }
        Ok(code)
    })?
}

async fn detach(sandbox: &Sandbox, mut exec: Exec, arguments: &ExecArguments) -> Result<u8, Problem> {
    // Nobody's terminal is there; one that was asked for is for those who attach.
    exec.terminal = arguments.how.tty.then(terminal::size);
    let id = sandbox.detach(exec, arguments.how.tty).await?;
    if arguments.how.json {
        ui::json(&serde_json::json!({ "id": id, "sandbox": sandbox.directory().name() }));
    } else {
        ui::data(&format!("{id}\n"));
    }
    Ok(0)
}

pub(super) fn attach(arguments: &AttachArguments) -> Result<u8, Problem> {
    let sandbox = Sandbox::open(environment::home()?.find(&arguments.name)?)?;
    block_on(async {
        let id = match (&arguments.id, latest(sandbox.directory())) {
            (Some(id), _) => id.clone(),
            (None, Some(id)) if !arguments.new => id,
            _ => open_shell(&sandbox).await?,
        };
        let interactive = terminal::is_interactive();
        let execution = sandbox.attach(&id, interactive.then(terminal::size)).await?;
        let streams = Streams {
            source: Source::Stdin,
            interactive,
            detach_keys: Some(arguments.detach_keys.0.clone()),
            limit: None,
        };
        let name = &arguments.name;
        match converse(execution, streams, Sink::Streams).await {
            Ok(Ended::Detached) => {
                ui::note(&format!("let go of {id}: agentkernel attach {name} returns to it"));
                Ok(0)
            }
            Ok(Ended::NotStarted { kind: ExecFailure::Other, message }) => {
                Err(plain("not-running", message, Some("agentkernel exec-list shows what runs")))
            }
            Ok(ended) => {
                explain(&ended, Spec::load(sandbox.directory().path()).map_or(0, |spec| spec.memory_mib));
                Ok(ended.code())
            }
            Err(Failure::Broken) if !sandbox.directory().is_dead() && runs(sandbox.directory(), &id) => {
                ui::note(&format!("another terminal took over {id}"));
                Ok(0)
            }
            Err(Failure::Broken) => Err(sandbox.failure().await),
            Err(Failure::Problem(problem)) => Err(problem),
        }
    })?
}

fn runs(sandbox: &SandboxDirectory, id: &str) -> bool {
    executions::list(sandbox).iter().any(|execution| execution.id == id && execution.state == State::Running)
}

/// The latest detached command with a terminal that still runs.
fn latest(sandbox: &SandboxDirectory) -> Option<String> {
    let open = |execution: &Execution| execution.terminal && execution.state == State::Running;
    executions::list(sandbox).into_iter().rfind(open).map(|execution| execution.id)
}

async fn open_shell(sandbox: &Sandbox) -> Result<String, Problem> {
    let spec = Spec::load(sandbox.directory().path())?;
    let script = "if [ -x /bin/bash ]; then exec /bin/bash; fi; exec /bin/sh";
    let words: [OsString; 3] = ["/bin/sh".into(), "-c".into(), script.into()];
    let how = HowArguments { timeout: None, tty: true, json: false };
    sandbox.detach(run::exec_of(&spec.defaults, &words, Vec::new(), &how), true).await
}

pub(super) fn list(arguments: &ExecListArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    let sandboxes = match &arguments.name {
        Some(name) => vec![home.find(name)?],
        None => home.list()?,
    };
    let all: Vec<Execution> = sandboxes.iter().flat_map(executions::list).collect();
    if arguments.json {
        ui::json(&all);
        return Ok(0);
    }
    let rows = all.iter().map(|execution| {
        let state = match execution.exit_code {
            Some(code) => format!("{} ({code})", execution.state),
            None => execution.state.to_string(),
        };
        let started = execution.started_at.clone();
        vec![
            execution.id.clone(),
            execution.sandbox.clone(),
            state,
            started,
            ui::line(&execution.command.join(" ")),
        ]
    });
    ui::table(&["ID", "SANDBOX", "STATE", "STARTED", "COMMAND"], rows);
    Ok(0)
}

pub(super) fn logs(arguments: &ExecLogsArguments) -> Result<u8, Problem> {
    let (sandbox, mut execution) = executions::find(&environment::home()?, &arguments.id)?;
    let mut output = OutputReader::new(&sandbox, &execution.id);
    loop {
        // Asked before its output is read: what an ended command said is complete.
        let ended = execution.state != State::Running;
        let chunks = output.read().map_err(io("read the command's output"))?;
        for Chunk { error, bytes } in chunks {
            let written = if error { ui::raw(&bytes) } else { ui::raw_data(&bytes) };
            if !written {
                return Ok(0);
            }
        }
        if !arguments.follow {
            return Ok(0);
        }
        if ended {
            if let Some(note) = &execution.note {
                ui::note(note);
            }
            return Ok(execution.exit_code.unwrap_or(ui::RUN_FAILED));
        }
        std::thread::sleep(GLANCE);
        let id = &execution.id;
        let now = executions::list(&sandbox).into_iter().find(|execution| execution.id == *id);
        execution = now.ok_or_else(|| plain("not-found", "the sandbox was removed meanwhile", None))?;
    }
}

pub(super) fn kill(arguments: &ExecKillArguments) -> Result<u8, Problem> {
    let (sandbox, execution) = executions::find(&environment::home()?, &arguments.id)?;
    if execution.state != State::Running {
        let message = format!("the command {} does not run: {}", execution.id, execution.state);
        return Err(plain("not-running", message, None));
    }
    let sandbox = Sandbox::open(sandbox)?;
    block_on(sandbox.signal(&execution.id, arguments.signal.unwrap_or(0)))??;
    Ok(0)
}
