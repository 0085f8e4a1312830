//! Commands in temporary sandboxes.

use std::ffi::OsString;
use std::time::Duration;

use agentkernel_protocol::message::ExecInput;
use agentkernel_sandbox::client::{Finished, Life, Warmth};
use agentkernel_sandbox::launch::{self, Launch};
use agentkernel_sandbox::network::AuditReader;
use agentkernel_sandbox::options::Options;
use agentkernel_sandbox::project::WorkspaceMode;
use agentkernel_sandbox::state::random_word;
use agentkernel_sandbox::workspace::{ApplyOptions, ApplyReport, ChangeSummary};
use agentkernel_sandbox::{Problem, io, plain};
use serde_json::Value;

use super::capture::Said;
use super::exec::{Ended, Listener, Program, Step, outcome, permit, refusals};
use super::launching::{Held, command, completed, time};
use super::{Admitted, Engine, Place, blocking};
use crate::model::{BatchOutput, BatchRequest, BatchResult, Changes, RunOutput, RunRequest};

/// Most commands of a batch.
const BATCH: usize = 64;
/// Bytes that are kept of each stream of a command's output.
pub(crate) const OUTPUT: usize = 8 << 20;

/// A command in a temporary sandbox. Dropped, all of it is ended.
#[derive(Debug)]
pub struct Run {
    engine: Engine,
    // Fields are dropped in this order: the command, its sandbox, the place that it had.
    program: Program,
    held: Held,
    launch: Launch,
    apply: bool,
    _place: Place,
}

/// What a run does next.
#[derive(Debug)]
pub enum RunEvent {
    /// It says something; true for standard error.
    Said(Vec<u8>, bool),
    /// It has ended, and nothing of it is left.
    Done(Box<RunOutput>),
}

impl Engine {
    /// Checks a command for a temporary sandbox and queues it.
    ///
    /// # Errors
    /// Code `busy` if too many wait; `usage` if the request is none.
    pub fn prepare(&self, request: RunRequest) -> Result<Pending, Problem> {
        let command = command(&request.command)?;
        let timeout = request.timeout.as_deref().map(|text| time("timeout", text)).transpose()?;
        let mut options = self.options(&request.machine())?;
        let sandbox = format!("run-{}", &random_word()[..8]);
        options.name = Some(sandbox.clone());
        let admitted = self.admit()?;
        let (apply, fast) = (request.apply, request.fast);
        Ok(Pending { engine: self.clone(), admitted, command, timeout, options, sandbox, apply, fast })
    }

    /// Runs a command in a temporary sandbox to its end; `listener` hears what it says meanwhile. At most `limit` bytes of
    /// each stream are kept.
    ///
    /// # Errors
    /// As [`Engine::prepare`] and [`Pending::start`], and if the sandbox dies. A command that fails is none.
    pub async fn run(
        &self,
        request: &RunRequest,
        limit: usize,
        listener: Listener<'_>,
    ) -> Result<RunOutput, Problem> {
        let mut run = self.prepare(request.clone())?.start().await?;
        let mut said = Said::new(limit);
        let ended = loop {
            match run.step().await? {
                Step::Said(bytes, error) => {
                    listener(&bytes, error);
                    said.take(&bytes, error);
                }
                Step::Takes(_) => {}
                Step::Ended(ended) => break ended,
            }
        };
        run.finish(said, ended).await
    }

    /// Runs commands at once, each in a temporary sandbox of its own.
    ///
    /// # Errors
    /// If there are too many; what becomes of each is in its result.
    pub async fn batch(&self, request: BatchRequest) -> Result<BatchOutput, Problem> {
        if request.commands.is_empty() || request.commands.len() > BATCH {
            return Err(plain("usage", format!("a batch has 1 to {BATCH} commands"), None));
        }
        let runs =
            request.commands.iter().map(async |run| match self.run(run, OUTPUT, &mut |_, _| {}).await {
                Ok(output) => BatchResult {
                    error: output.error,
                    output: Some(output.output),
                    stdout: Some(output.stdout),
                    stderr: Some(output.stderr),
                    exit_code: Some(output.exit_code),
                },
                Err(problem) => BatchResult {
                    output: None,
                    error: Some(crate::problem::shown(self, &problem)),
                    stdout: None,
                    stderr: None,
                    exit_code: None,
                },
            });
        Ok(BatchOutput { results: futures::future::join_all(runs).await })
    }
}

/// A command that waits for its turn.
#[derive(Debug)]
pub struct Pending {
    engine: Engine,
    admitted: Admitted,
    command: Vec<OsString>,
    timeout: Option<Duration>,
    options: Options,
    sandbox: String,
    apply: bool,
    fast: bool,
}

impl Pending {
    /// Name that the sandbox will have.
    pub fn sandbox(&self) -> &str {
        &self.sandbox
    }

    /// Starts it, once there is a place for it.
    ///
    /// # Errors
    /// Whatever keeps it from starting.
    pub async fn start(self) -> Result<Run, Problem> {
        let Self { engine, admitted, command, timeout, options, apply, fast, .. } = self;
        let place = engine.place(admitted).await?;
        let launch = engine.settle(options, command.clone()).await?;
        let shared = launch.spec.workspace.as_ref();
        if apply && shared.is_none_or(|workspace| workspace.mode != WorkspaceMode::Cow) {
            let message = "only the changes of a copy-on-write workspace can be applied";
            return Err(plain("usage", message, Some("leave apply out, or ask for workspace cow")));
        }
        let defaults = &launch.spec.defaults;
        let entrypoint = defaults.entrypoint.iter().map(|word| word.0.clone());
        let words: Vec<OsString> = entrypoint.chain(command).collect();
        let mut exec = defaults.exec(&words, &[]);
        exec.stop_signal = defaults.stop_signal;
        permit(&launch.spec, &exec)?;
        exec.timeout_ms = timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
        let warmth = if fast { Warmth::Warm } else { Warmth::Cold };
        let held = engine.start_new(&launch, Life::Temporary, None, warmth).await?;
        let mut program = Program::start(held.sandbox()?, exec).await?;
        program.send(&ExecInput::StdinEnd).await;
        Ok(Run { engine, program, held, launch, apply, _place: place })
    }
}

impl Run {
    /// Name of the sandbox.
    pub fn sandbox(&self) -> &str {
        &self.launch.spec.name
    }

    async fn step(&mut self) -> Result<Step, Problem> {
        match self.program.next().await {
            Some(step) => Ok(step),
            None => Err(self.held.lease()?.failure().await),
        }
    }

    /// Runs on; `tell` is told what is said and done, and ends the run by returning false.
    ///
    /// # Errors
    /// If the sandbox dies.
    pub async fn stream(mut self, tell: &tokio::sync::mpsc::Sender<RunEvent>) -> Result<(), Problem> {
        let mut said = Said::new(0);
        let ended = loop {
            let step = tokio::select! {
                step = self.step() => step?,
                () = tell.closed() => return Ok(()),
            };
            match step {
                Step::Said(bytes, error) => {
                    said.take(&bytes, error);
                    // As slow as who reads: the guest waits meanwhile.
                    if tell.send(RunEvent::Said(bytes, error)).await.is_err() {
                        return Ok(());
                    }
                }
                Step::Takes(_) => {}
                Step::Ended(ended) => break ended,
            }
        };
        let output = self.finish(said, ended).await?;
        let _ = tell.send(RunEvent::Done(Box::new(output))).await;
        Ok(())
    }

    /// Takes the changes and ends the sandbox, whether or not somebody still waits for that.
    async fn finish(self, said: Said, ended: Ended) -> Result<RunOutput, Problem> {
        let engine = self.engine.clone();
        completed(&engine, self.finish_whole(said, ended), |_| Vec::new()).await
    }

    async fn finish_whole(mut self, said: Said, ended: Ended) -> Result<RunOutput, Problem> {
        let path = self.held.sandbox()?.directory().path().to_owned();
        let decided = AuditReader::new(&path).read().map_err(io("read the network's record"))?;
        let apply = self.apply && ended.code == 0;
        let mut output = outcome(&said, ended);
        output.refusals = refusals(&decided);
        let taken = self.take_changes(apply).await;
        self.held.release().await?;
        if let Some((summary, report)) = taken? {
            let (added, modified, removed) = (summary.added, summary.modified, summary.removed);
            output.changes = Some(Changes { added, modified, removed });
            output.applied = report.map(|report| serde_json::to_value(report).unwrap_or(Value::Null));
        }
        Ok(output)
    }

    async fn take_changes(
        &mut self,
        apply: bool,
    ) -> Result<Option<(ChangeSummary, Option<ApplyReport>)>, Problem> {
        let shared = self.launch.spec.workspace.as_ref();
        let Some(workspace) = shared.filter(|workspace| workspace.mode == WorkspaceMode::Cow).cloned() else {
            return Ok(None);
        };
        let Finished { change_set, problem, .. } = self.held.lease()?.finish().await?;
        if let Some(problem) = problem {
            return Err(problem);
        }
        let Some(change_set) = change_set else { return Ok(None) };
        let home = self.engine.home().clone();
        blocking(move || {
            if apply {
                let options = ApplyOptions::default();
                let (summary, report) = launch::apply_or_keep(&home, &change_set, &workspace.root, &options)?;
                Ok(Some((summary, Some(report))))
            } else {
                let set = launch::keep_last(&home, &change_set, &workspace.root)?;
                Ok(Some((set.summary(), None)))
            }
        })
        .await
    }
}
