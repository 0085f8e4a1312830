//! Commands in sandboxes that run.

use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use agentkernel_protocol::message::{Exec, ExecInput, ExecOutput, Exit, WindowSize};
use agentkernel_sandbox::client::{Execution, ExecutionInput, ExecutionOutput, Sandbox};
use agentkernel_sandbox::executions::{exit_code, failure_code};
use agentkernel_sandbox::network::{self, AuditReader};
use agentkernel_sandbox::spec::Spec;
use agentkernel_sandbox::state::Phase;
use agentkernel_sandbox::{Problem, plain, printable};
use serde_bytes::ByteBuf;
use tokio::time::Instant;

use super::Engine;
use super::capture::Said;
use super::launching::{command, directory, time, user, variables};
use crate::model::{ExecRequest, Refusal, RunOutput};

/// How much later than the guest the host ends a command whose time is up.
const TIMEOUT_GRACE: Duration = Duration::from_secs(10);

/// Who hears what a command says, piece by piece; the second word is true for standard error.
pub(crate) type Listener<'a> = &'a mut (dyn FnMut(&[u8], bool) + Send);

/// A command that runs.
#[derive(Debug)]
pub(crate) struct Program {
    output: ExecutionOutput,
    /// Dropped, it kills the command with all it started.
    input: ExecutionInput,
    /// When it is given up, whatever the guest says.
    overdue: Option<Instant>,
}

/// How a command ended, or why it did not begin.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub code: u8,
    pub timed_out: bool,
    pub out_of_memory: bool,
    pub error: Option<String>,
}

/// What a command does next.
#[derive(Debug)]
pub(crate) enum Step {
    /// It says something; true for standard error.
    Said(Vec<u8>, bool),
    /// It takes so much more input.
    Takes(u32),
    /// It has ended.
    Ended(Ended),
}

impl Program {
    /// Starts it.
    pub(super) async fn start(sandbox: &Sandbox, exec: Exec) -> Result<Self, Problem> {
        let limit = exec.timeout_ms.map(|timeout| Duration::from_millis(timeout) + TIMEOUT_GRACE);
        let Execution { output, input } = sandbox.exec(exec).await?;
        let overdue = limit.and_then(|limit| Instant::now().checked_add(limit));
        Ok(Self { output, input, overdue })
    }

    /// Sends input, a signal, a window size.
    pub(crate) async fn send(&mut self, input: &ExecInput) -> bool {
        self.input.send(input).await.is_ok()
    }

    /// Both halves: what it says, and what it is told.
    pub(crate) fn split(self) -> (ProgramOutput, ExecutionInput) {
        (ProgramOutput { output: self.output, overdue: self.overdue }, self.input)
    }

    /// What it does next; `None` if the stream to it broke.
    pub(crate) async fn next(&mut self) -> Option<Step> {
        next(&mut self.output, self.overdue).await
    }
}

/// What a command says.
#[derive(Debug)]
pub(crate) struct ProgramOutput {
    output: ExecutionOutput,
    overdue: Option<Instant>,
}

impl ProgramOutput {
    /// What it does next; `None` if the stream to it broke.
    pub(crate) async fn next(&mut self) -> Option<Step> {
        next(&mut self.output, self.overdue).await
    }
}

async fn next(output: &mut ExecutionOutput, overdue: Option<Instant>) -> Option<Step> {
    loop {
        let message = match overdue {
            None => output.next().await,
            Some(at) => match tokio::time::timeout_at(at, output.next()).await {
                Ok(message) => message,
                Err(_) => {
                    let ended = Ended { code: 124, timed_out: true, out_of_memory: false, error: None };
                    return Some(Step::Ended(ended));
                }
            },
        };
        return Some(match message.ok()? {
            ExecOutput::Started { .. } => continue,
            ExecOutput::Stdout(bytes) => Step::Said(bytes.into_vec(), false),
            ExecOutput::Stderr(bytes) => Step::Said(bytes.into_vec(), true),
            ExecOutput::StdinTaken(count) => Step::Takes(count),
            ExecOutput::Exited(exit) => Step::Ended(Ended::of(&exit)),
            ExecOutput::Failed { kind, message } => Step::Ended(Ended {
                code: failure_code(kind),
                timed_out: false,
                out_of_memory: false,
                error: Some(printable(&message)),
            }),
        });
    }
}

impl Ended {
    fn of(exit: &Exit) -> Self {
        Self {
            code: exit_code(exit),
            timed_out: exit.timed_out,
            out_of_memory: exit.out_of_memory,
            error: None,
        }
    }
}

/// What was said and how it ended, as clients are told.
pub(super) fn outcome(said: &Said, ended: Ended) -> RunOutput {
    RunOutput {
        output: said.output.text(),
        stdout: said.stdout.text(),
        stderr: said.stderr.text(),
        exit_code: ended.code,
        omitted_bytes: said.output.omitted(),
        timed_out: ended.timed_out,
        out_of_memory: ended.out_of_memory,
        error: ended.error,
        ..RunOutput::default()
    }
}

/// What the network refused, as clients are told.
pub(super) fn refusals(entries: &[network::Entry]) -> Vec<Refusal> {
    let refused = network::refusals(entries).list.into_iter();
    refused
        .map(|refused| Refusal {
            target: refused.target,
            reason: refused.reason,
            allow: refused.allow,
            count: refused.count,
        })
        .collect()
}

/// A command with a terminal, for somebody who types.
#[derive(Debug)]
pub struct Interaction {
    pub(crate) program: Program,
    pub(crate) sandbox: Sandbox,
}

impl Engine {
    /// Runs a command in a sandbox to its end; `listener` hears what it says meanwhile. At most `limit` bytes of each
    /// stream are kept.
    ///
    /// # Errors
    /// Code `busy` if too many run; if the sandbox does not run or dies. A command that fails is none.
    pub async fn exec(
        &self,
        name: &str,
        request: &ExecRequest,
        limit: usize,
        listener: Listener<'_>,
    ) -> Result<RunOutput, Problem> {
        let _place = self.shared.commands.try_acquire().map_err(|_| {
            plain("busy", "too many commands run in sandboxes already", Some("detach those that run long"))
        })?;
        let (sandbox, spec) = self.live(name).await?;
        let mut decided = AuditReader::from_now(sandbox.directory().path());
        let mut program = Program::start(&sandbox, exec_of(&spec, request)?).await?;
        program.send(&ExecInput::StdinEnd).await;
        let mut said = Said::new(limit);
        let ended = loop {
            match program.next().await {
                Some(Step::Said(bytes, error)) => {
                    listener(&bytes, error);
                    said.take(&bytes, error);
                }
                Some(Step::Takes(_)) => {}
                Some(Step::Ended(ended)) => break ended,
                None => return Err(sandbox.failure().await),
            }
        };
        let mut output = outcome(&said, ended);
        output.refusals = refusals(&decided.read().unwrap_or_default());
        Ok(output)
    }

    /// Starts a command with a terminal of this size.
    ///
    /// # Errors
    /// If the sandbox does not run, or the request is none.
    pub async fn interact(
        &self,
        name: &str,
        request: &ExecRequest,
        size: WindowSize,
    ) -> Result<Interaction, Problem> {
        let (sandbox, spec) = self.live(name).await?;
        let mut exec = exec_of(&spec, request)?;
        if !exec.environment.iter().any(|(name, _)| name.as_slice() == b"TERM") {
            exec.environment.push((ByteBuf::from(*b"TERM"), ByteBuf::from(*b"xterm-256color")));
        }
        exec.terminal = Some(size);
        Ok(Interaction { program: Program::start(&sandbox, exec).await?, sandbox })
    }

    /// Whether a sandbox runs, and clients may use what it may do.
    ///
    /// # Errors
    /// Code `not-found`, `not-running`, `not-granted`.
    pub async fn check_live(&self, name: &str) -> Result<(), Problem> {
        self.live(name).await.map(drop)
    }

    /// A sandbox that runs, if clients may use what it may do.
    pub(super) async fn live(&self, name: &str) -> Result<(Sandbox, Spec), Problem> {
        // Some small files are read, in less time than another thread would take to begin.
        let (directory, spec) = self.find(name)?;
        let sandbox = Sandbox::open(directory)?;
        if sandbox.directory().live().is_some_and(|live| live.phase == Phase::Paused) {
            let message = format!("{} is paused", spec.name);
            return Err(plain("paused", message, Some("resume it first")));
        }
        Ok((sandbox, spec))
    }
}

/// The command as the guest is told to run it.
pub(super) fn exec_of(spec: &Spec, request: &ExecRequest) -> Result<Exec, Problem> {
    let words = command(&request.command)?;
    let mut exec = spec.defaults.exec(&words, &variables(&request.env)?);
    permit(spec, &exec)?;
    if let Some(text) = &request.workdir {
        exec.directory = ByteBuf::from(directory(text)?.as_os_str().as_bytes());
    }
    match (&request.user, request.sudo) {
        (Some(_), Some(true)) => {
            return Err(plain("usage", "sudo and user are asked for at once", None));
        }
        (Some(text), _) => exec.user = user(text)?,
        (None, Some(true)) => exec.user = "0:0".to_owned(),
        (None, _) => {}
    }
    exec.timeout_ms = match &request.timeout {
        Some(text) => Some(u64::try_from(time("timeout", text)?.as_millis()).unwrap_or(u64::MAX)),
        None => None,
    };
    Ok(exec)
}

/// The command policy: a guard rail, for a permitted shell runs what it likes.
pub(super) fn permit(spec: &Spec, exec: &Exec) -> Result<(), Problem> {
    let checked = spec.commands.check(&exec.arguments);
    checked.map_err(|refusal| plain("command-policy", refusal.to_string(), None))
}
