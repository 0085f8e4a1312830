//! Commands that run on without a client.

use std::time::Duration;

use agentkernel_sandbox::executions::{self, Execution, OutputReader, State};
use agentkernel_sandbox::state::SandboxDirectory;
use agentkernel_sandbox::{Problem, io, plain, printable};

use super::capture::Capture;
use super::exec::exec_of;
use super::{Engine, blocking};
use crate::model::{DetachedCommand, DetachedLogs, DetachedStatus, ExecRequest, Stream};

/// How long the guest may take to say which process it is.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often that is looked at.
const GLANCE: Duration = Duration::from_millis(2);

impl Engine {
    /// Starts a command that runs on.
    ///
    /// # Errors
    /// If the sandbox does not run, or too many run in it.
    pub async fn detach(&self, name: &str, request: &ExecRequest) -> Result<DetachedCommand, Problem> {
        let (sandbox, spec) = self.live(name).await?;
        let id = sandbox.detach(exec_of(&spec, request)?, false).await?;
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let execution = find(sandbox.directory(), &id)?;
            let known = execution.pid.is_some() || execution.state != State::Running;
            if known || tokio::time::Instant::now() > deadline {
                return Ok(told(execution));
            }
            tokio::time::sleep(GLANCE).await;
        }
    }

    /// The detached commands of a sandbox, oldest first.
    ///
    /// # Errors
    /// Code `not-found`.
    pub async fn detached(&self, name: &str) -> Result<Vec<DetachedCommand>, Problem> {
        let (engine, name) = (self.clone(), name.to_owned());
        blocking(move || Ok(executions::list(&engine.find(&name)?.0).into_iter().map(told).collect())).await
    }

    /// What became of a detached command.
    ///
    /// # Errors
    /// Code `not-found`, `command-not-found`.
    pub async fn detached_status(&self, name: &str, id: &str) -> Result<DetachedCommand, Problem> {
        let (engine, name, id) = (self.clone(), name.to_owned(), id.to_owned());
        blocking(move || find(&engine.find(&name)?.0, &id).map(told)).await
    }

    /// What a detached command said: one stream, or both. At most `limit` bytes of each are given.
    ///
    /// # Errors
    /// Code `not-found`, `command-not-found`; if it cannot be read.
    pub async fn detached_logs(
        &self,
        name: &str,
        id: &str,
        stream: Option<Stream>,
        limit: usize,
    ) -> Result<DetachedLogs, Problem> {
        let (engine, name, id) = (self.clone(), name.to_owned(), id.to_owned());
        blocking(move || {
            let (directory, _) = engine.find(&name)?;
            let execution = find(&directory, &id)?;
            let mut reader = OutputReader::new(&directory, &execution.id);
            let (mut stdout, mut stderr) = (Capture::new(limit), Capture::new(limit));
            for chunk in reader.read().map_err(io("read the command's output"))? {
                if chunk.error { &mut stderr } else { &mut stdout }.take(&chunk.bytes);
            }
            Ok(DetachedLogs {
                stdout: (stream != Some(Stream::Stderr)).then(|| stdout.text()),
                stderr: (stream != Some(Stream::Stdout)).then(|| stderr.text()),
            })
        })
        .await
    }

    /// Kills a detached command with all it started. One that has ended is left alone.
    ///
    /// # Errors
    /// Code `not-found`, `command-not-found`.
    pub async fn detached_kill(&self, name: &str, id: &str) -> Result<DetachedCommand, Problem> {
        let execution = self.detached_status(name, id).await?;
        if execution.status != DetachedStatus::Running {
            return Ok(execution);
        }
        let (sandbox, _) = self.live(name).await?;
        match sandbox.signal(&execution.id, 0).await {
            Err(problem) if problem.code != "not-running" => return Err(problem),
            _ => {}
        }
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let execution = find(sandbox.directory(), &execution.id)?;
            if execution.state != State::Running || tokio::time::Instant::now() > deadline {
                return Ok(told(execution));
            }
            tokio::time::sleep(GLANCE).await;
        }
    }
}

/// The command of that id, or of an unambiguous beginning of it.
fn find(directory: &SandboxDirectory, id: &str) -> Result<Execution, Problem> {
    let missing = || {
        let message = format!("there is no detached command {} in {}", printable(id), directory.name());
        plain("command-not-found", message, None)
    };
    if id.is_empty() {
        return Err(missing());
    }
    let mut found = executions::list(directory);
    found.retain(|execution| execution.id.starts_with(id));
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(missing()),
        _ => Err(plain("ambiguous", format!("several commands begin with {}", printable(id)), None)),
    }
}

fn told(execution: Execution) -> DetachedCommand {
    DetachedCommand {
        status: match (execution.state, execution.exit_code) {
            (State::Running, _) => DetachedStatus::Running,
            (State::Exited, Some(0)) => DetachedStatus::Completed,
            _ => DetachedStatus::Failed,
        },
        id: execution.id,
        sandbox: execution.sandbox,
        command: execution.command,
        pid: execution.pid.unwrap_or(0),
        exit_code: execution.exit_code,
        started_at: execution.started_at,
        ended_at: execution.ended_at,
        note: execution.note,
    }
}
