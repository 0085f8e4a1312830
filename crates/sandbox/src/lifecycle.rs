//! What is done to sandboxes as wholes: started, stopped, removed, given time, cleaned up.

use std::path::Path;
use std::time::Duration;

use agentkernel_protocol::message::ExecOutput;
use serde::Serialize;

use crate::client::{self, Lease, Sandbox, Warmth};
use crate::deadline::{self, Clocks, Deadline};
use crate::executions::exit_code;
use crate::problem::{Problem, io, plain};
use crate::record::Record;
use crate::spec::Spec;
use crate::state::{HeldSandbox, Home, Phase, SandboxDirectory};

/// Name of the file that says that a sandbox's files and init script were dealt with.
const INITIALISED: &str = "initialised";
/// How long a holder that is letting go may take: processes between fork and exec have copies of each other's locks.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long another's start or stop is waited for: longer than a slow machine boots.
const START_PATIENCE: Duration = Duration::from_secs(120);

/// Whether the sandbox's files were written and its init script run.
pub(crate) fn is_initialised(directory: &Path) -> bool {
    directory.join(INITIALISED).exists()
}

/// Takes the sandbox in `directory` to start it; `None` if it runs already. One that is stopping is waited for, and so is
/// one that somebody else is starting.
///
/// # Errors
/// Code `still-held` if whoever has it neither starts nor stops it in time.
pub async fn hold_to_start(directory: &SandboxDirectory) -> Result<Option<HeldSandbox>, Problem> {
    let deadline = tokio::time::Instant::now() + START_PATIENCE;
    loop {
        if let Some(held) = directory.hold()? {
            return Ok(Some(held));
        }
        if matches!(directory.phase(), Phase::Running | Phase::Paused) {
            match Sandbox::open(directory.clone()) {
                Ok(sandbox) if sandbox.is_alive().await => return Ok(None),
                Err(problem) if problem.code != "not-running" => return Ok(None),
                _ => {}
            }
        }
        if tokio::time::Instant::now() > deadline {
            let name = directory.name();
            return Err(Problem {
                code: "still-held".to_owned(),
                message: format!("{name} is {} for too long", directory.phase()),
                hint: Some(format!("agentkernel stop --force {name}")),
            });
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Starts the sandbox in `directory`; `None` if it runs already.
///
/// # Errors
/// Whatever kept it from starting; it is stopped then.
pub async fn start(directory: &SandboxDirectory, program: &Path) -> Result<Option<Lease>, Problem> {
    match hold_to_start(directory).await? {
        Some(held) => client::start(held, program, Warmth::Warm).await.map(Some),
        None => Ok(None),
    }
}

/// Runs the sandbox's init script if it has one that did not run yet. `say` is given what the script says.
///
/// # Errors
/// Code `init-script` if it fails.
pub async fn initialise(sandbox: &Sandbox, say: &mut (dyn FnMut(&[u8]) + Send)) -> Result<(), Problem> {
    let directory = sandbox.directory().path();
    if is_initialised(directory) {
        return Ok(());
    }
    let spec = Spec::load(directory)?;
    if let Some(script) = &spec.init_script {
        let words = ["/bin/sh".into(), "-e".into(), "-c".into(), script.into()];
        let mut execution = sandbox.exec(spec.defaults.exec(&words, &[])).await?;
        let closed = execution.input.send(&agentkernel_protocol::message::ExecInput::StdinEnd).await;
        let end = loop {
            match execution.output.next().await {
                Ok(ExecOutput::Stdout(bytes) | ExecOutput::Stderr(bytes)) => say(&bytes),
                Ok(ExecOutput::Exited(exit)) => break Ok(exit_code(&exit)),
                Ok(ExecOutput::Failed { message, .. }) => break Err(message),
                Ok(_) => {}
                Err(_) => return Err(sandbox.failure().await),
            }
        };
        drop(closed);
        let failed = match end {
            Ok(0) => None,
            Ok(code) => Some(format!("exit code {code}")),
            Err(message) => Some(message),
        };
        if let Some(why) = failed {
            let message = format!("the init script failed: {why}");
            return Err(plain("init-script", message, Some("mend init_script in agentkernel.toml")));
        }
    }
    std::fs::write(directory.join(INITIALISED), b"").map_err(io("note that the sandbox is initialised"))
}

/// Stops the sandbox in `directory`; false if it was stopped already.
///
/// # Errors
/// If it does not let go.
pub async fn stop(
    directory: &SandboxDirectory,
    grace: Duration,
    force: bool,
    program: &Path,
) -> Result<bool, Problem> {
    if directory.is_dead() {
        directory.repair();
        return Ok(false);
    }
    if force {
        Sandbox::kill(directory).await?;
        Record::open(directory.path()).say("stopped", "by force");
        client::watch_deadline(directory, program)?;
    } else {
        Sandbox::open(directory.clone())?.stop(grace).await?;
    }
    Ok(true)
}

/// Removes the sandbox in `directory`.
///
/// # Errors
/// Code `running` if it lives and `force` is not set.
pub async fn remove(directory: &SandboxDirectory, force: bool) -> Result<(), Problem> {
    for _ in 0..3 {
        // Only who must not end it waits for a lock that is held for a moment.
        let held = if force { directory.hold()? } else { directory.hold_soon(PATIENCE)? };
        if let Some(held) = held {
            held.remove();
            return Ok(());
        }
        if !force {
            let name = directory.name();
            return Err(Problem {
                code: "running".to_owned(),
                message: format!("{name} is running"),
                hint: Some(format!("agentkernel stop {name} first, or agentkernel rm --force {name}")),
            });
        }
        Sandbox::kill(directory).await?;
    }
    Err(plain("still-held", format!("{} is started again and again", directory.name()), None))
}

/// Gives the sandbox `by` more time than it has left, or all the time; returns its new deadline.
///
/// # Errors
/// Code `no-deadline` if it has none that could be moved; if the disk is full or read-only.
pub fn extend(
    directory: &SandboxDirectory,
    by: Option<Duration>,
    program: &Path,
) -> Result<Option<Deadline>, Problem> {
    let now = Clocks::now();
    let moved = match (by, deadline::read(directory.path())) {
        (None, _) => None,
        (Some(by), Some(deadline)) => Some(deadline.extended(by, &now)),
        (Some(_), None) => {
            let message = format!("{} lives until it is removed: it has no deadline", directory.name());
            return Err(plain(
                "no-deadline",
                message,
                Some("only sandboxes created with --ttl can be extended"),
            ));
        }
    };
    deadline::write(directory.path(), moved.as_ref())?;
    if directory.is_dead() {
        client::watch_deadline(directory, program)?;
    }
    Ok(moved)
}

/// What [`gc`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Garbage {
    /// Sandboxes whose time is up.
    pub expired: Vec<String>,
    /// Sandboxes of `run` whose processes died.
    pub abandoned: Vec<String>,
    /// Sandboxes that had died and are stopped now.
    pub repaired: Vec<String>,
    /// Templates that are outdated or beyond the bounds, by their number.
    pub templates: usize,
    /// Leftovers of interrupted work, by their number.
    pub leftovers: usize,
}

/// Puts right what dead processes left behind, and removes what is past its time.
///
/// # Errors
/// If the state directory cannot be read.
pub fn gc(home: &Home, dry_run: bool) -> Result<Garbage, Problem> {
    let mut garbage = Garbage::default();
    let now = Clocks::now();
    for sandbox in home.list()?.into_iter().filter(SandboxDirectory::is_dead) {
        let expired = deadline::read(sandbox.path()).is_some_and(|deadline| deadline.is_over(&now));
        if expired {
            garbage.expired.push(sandbox.name());
        } else if sandbox.is_temporary() {
            garbage.abandoned.push(sandbox.name());
        } else if sandbox.died() {
            garbage.repaired.push(sandbox.name());
        }
    }
    garbage.leftovers = home.leftovers();
    garbage.templates = crate::templates::prune(home, dry_run);
    if !dry_run {
        home.sweep();
    }
    Ok(garbage)
}
