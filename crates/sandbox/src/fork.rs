//! Forks: sandboxes that go on from where a running one is, memory, processes and disk.
//!
//! ```text
//! parent    ───────────────┤ still ├──────────────────────────►      only while what it wrote is copied
//!                              │ HOME/snapshots/.new-N: a saved machine
//!                              ├──► child 1: directory, identity, disk of its own; memory shared copy-on-write
//!                              └──► child 2 ...
//! ```
//! A child is a sandbox like any other, with everything the parent was created with: settings, mounts, labels, deadline,
//! and what its workspace was when it was first seen. It has a name, a machine-id, randomness and a clock of its own before
//! any of its programs goes on. Programs of the parent's clients run on in the child too; nobody there hears what they
//! say. The memory file has one name for each child that was not started yet and none once all are: it goes with the last
//! of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agentkernel_protocol::message::{Exec, ExecInput, ExecOutput};
use tokio::task::JoinSet;

use crate::client::{self, Sandbox, Warmth};
use crate::deadline::unix_ms;
use crate::disk;
use crate::executions::exit_code;
use crate::network::NetworkSpec;
use crate::problem::{Problem, io, plain};
use crate::record::Record;
use crate::review;
use crate::saved::{self, Draft, From, SavedMachine};
use crate::spec::{Spec, check_name, fresh_machine_id, new_uuid};
use crate::state::{HeldSandbox, Home, SandboxDirectory};
use crate::workspace::ChangeSet;

/// Most children of one fork.
pub const COUNT_LIMIT: usize = 256;
/// How many children start at a time.
const STARTING: usize = 4;
/// Files of the parent's that its children begin with. Whoever restores a snapshot begins with them, too.
pub(crate) const TAKEN_ALONG: [&str; 2] = ["bases", "initialised"];
/// Most bytes of a child's output that are kept, of each stream.
const OUTPUT_LIMIT: usize = 16 << 20;

/// What a fork took.
#[derive(Clone, Debug)]
pub struct Forked {
    /// The children, running.
    pub children: Vec<SandboxDirectory>,
    /// How long the parent stood still.
    pub still: Duration,
}

/// Forks the live sandbox in `parent` into sandboxes of these names. `program` is the one with the hidden verbs: ours.
///
/// # Errors
/// If a name is taken, the parent does not run, the disk is full, or a child does not come up: no child is left then.
pub async fn fork(parent: &SandboxDirectory, names: &[String], program: &Path) -> Result<Forked, Problem> {
    if names.is_empty() || names.len() > COUNT_LIMIT {
        return Err(plain("usage", format!("a fork has 1 to {COUNT_LIMIT} children"), None));
    }
    for (index, name) in names.iter().enumerate() {
        check_name(name)?;
        let taken = parent.home().path().join("sandboxes").join(name).exists();
        if taken || names[..index].contains(name) {
            let hint = Some("choose another with --as");
            return Err(plain("name-taken", format!("there is a sandbox called {name} already"), hint));
        }
    }
    let sandbox = Sandbox::open(parent.clone())?;
    let draft = Draft::new(&parent.home().snapshots())?;
    let (saved, still) = saved::save(&sandbox, draft.path()).await?;
    Record::open(parent.path()).say("forked", &names.join(" "));
    let mut made = Vec::new();
    let children = async {
        for name in names {
            let held = create(parent.home(), name, &Origin::of(parent)?, &saved)?;
            let deadline = crate::deadline::read(parent.path());
            crate::deadline::write(held.directory.path(), deadline.as_ref())?;
            Record::open(held.directory.path()).say("created", &format!("fork of {}", parent.name()));
            made.push(held);
        }
        start_all(std::mem::take(&mut made), program).await
    };
    match children.await {
        Ok(children) => Ok(Forked { children, still }),
        Err(problem) => {
            made.into_iter().for_each(HeldSandbox::remove);
            Err(problem)
        }
    }
}

/// What a sandbox that goes on from a saved machine takes along of the one that was saved.
pub(crate) struct Origin {
    pub spec: Spec,
    /// Where its files are.
    pub directory: PathBuf,
}

impl Origin {
    fn of(parent: &SandboxDirectory) -> Result<Self, Problem> {
        Ok(Self { spec: Spec::load(parent.path())?, directory: parent.path().to_owned() })
    }

    /// The network of the sandbox called `name`; another one cannot have the same ports of the host.
    pub(crate) fn network(&self, name: &str) -> NetworkSpec {
        let network = self.spec.network.clone();
        if name == self.spec.name { network } else { network.for_copy() }
    }
}

/// Makes a sandbox called `name` that goes on from `saved` when it is started.
pub(crate) fn create(
    home: &Home,
    name: &str,
    origin: &Origin,
    saved: &SavedMachine,
) -> Result<HeldSandbox, Problem> {
    let created_unix_ms = unix_ms();
    let spec = Spec {
        name: name.to_owned(),
        uuid: new_uuid(created_unix_ms),
        created_unix_ms,
        machine_id: fresh_machine_id(),
        network: origin.network(name),
        ..origin.spec.clone()
    };
    let held = home.create_sandbox(name, |directory| {
        spec.save(directory)?;
        take_along(&origin.directory, directory)?;
        saved.duplicate(&directory.join(saved::OWN), &directory.join(disk::FILE_NAME))
    })?;
    // By its lasting name.
    match saved::order(held.directory.path(), &held.directory.path().join(saved::OWN), From::Sandbox) {
        Ok(()) => Ok(held),
        Err(problem) => {
            held.remove();
            Err(problem)
        }
    }
}

/// Copies what goes on in another sandbox.
pub(crate) fn take_along(from: &Path, to: &Path) -> Result<(), Problem> {
    for name in TAKEN_ALONG {
        match fs::copy(from.join(name), to.join(name)) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(io(format!("copy {name}"))(error)),
        }
    }
    Ok(())
}

/// Starts all of them, a few at a time; all are removed if one does not come up.
async fn start_all(held: Vec<HeldSandbox>, program: &Path) -> Result<Vec<SandboxDirectory>, Problem> {
    let directories: Vec<SandboxDirectory> = held.iter().map(|held| held.directory.clone()).collect();
    let places = Arc::new(tokio::sync::Semaphore::new(STARTING));
    let mut starting = JoinSet::new();
    for held in held {
        let (places, program) = (places.clone(), program.to_owned());
        starting.spawn(async move {
            // Never closed.
            let _place = places.acquire_owned().await;
            client::start(held, &program, Warmth::Warm).await?.live_on().await
        });
    }
    let mut failed = None;
    while let Some(result) = starting.join_next().await {
        match result {
            Ok(Ok(_)) => {}
            Ok(Err(problem)) => failed = failed.or(Some(problem)),
            Err(error) => failed = failed.or_else(|| Some(plain("fork", error.to_string(), None))),
        }
    }
    let Some(problem) = failed else { return Ok(directories) };
    for directory in directories {
        let _ = crate::lifecycle::remove(&directory, true).await;
    }
    Err(problem)
}

/// What became of one child of a [`trial`].
#[derive(Debug)]
pub struct Trial {
    /// The child; it runs on until it is removed.
    pub sandbox: SandboxDirectory,
    /// The program's exit code as a shell has it; why it could not be run otherwise.
    pub code: Result<u8, String>,
    /// What it wrote.
    pub stdout: Vec<u8>,
    /// What it complained of.
    pub stderr: Vec<u8>,
    /// What it changed in the workspace, if that is copy-on-write.
    pub changes: Option<ChangeSet>,
}

/// Forks `parent` once for each of `programs`, runs one in each child, and takes what they said and changed. Whoever calls
/// judges, applies the changes of whom it likes, and removes the children.
///
/// # Errors
/// As [`fork`]. What becomes of a single program is in its [`Trial`].
pub async fn trial(
    parent: &SandboxDirectory,
    programs: Vec<(String, Exec)>,
    program: &Path,
) -> Result<Vec<Trial>, Problem> {
    let (names, programs): (Vec<String>, Vec<Exec>) = programs.into_iter().unzip();
    let forked = fork(parent, &names, program).await?;
    let mut running = JoinSet::new();
    for (index, (sandbox, exec)) in forked.children.into_iter().zip(programs).enumerate() {
        let program = program.to_owned();
        running.spawn(async move { (index, try_one(sandbox, exec, &program).await) });
    }
    let mut trials = Vec::new();
    while let Some(done) = running.join_next().await {
        trials.push(done.map_err(|error| plain("fork", error.to_string(), None))?);
    }
    trials.sort_by_key(|(index, _)| *index);
    Ok(trials.into_iter().map(|(_, trial)| trial).collect())
}

async fn try_one(directory: SandboxDirectory, exec: Exec, program: &Path) -> Trial {
    let mut trial = Trial {
        sandbox: directory,
        code: Err(String::new()),
        stdout: Vec::new(),
        stderr: Vec::new(),
        changes: None,
    };
    trial.code = match Sandbox::open(trial.sandbox.clone()) {
        Ok(sandbox) => run(&sandbox, exec, &mut trial.stdout, &mut trial.stderr).await,
        Err(problem) => Err(problem.message),
    };
    match review::changes(&trial.sandbox, program, &mut |_| {}).await {
        Ok(changes) => trial.changes = Some(changes),
        Err(problem) if problem.code == "no-changes" => {}
        Err(problem) => tracing::warn!("{}", problem.message),
    }
    trial
}

async fn run(
    sandbox: &Sandbox,
    exec: Exec,
    stdout: &mut Vec<u8>,
    stderr: &mut Vec<u8>,
) -> Result<u8, String> {
    let mut execution = sandbox.exec(exec).await.map_err(|problem| problem.message)?;
    let _ = execution.input.send(&ExecInput::StdinEnd).await;
    loop {
        let (kept, bytes) = match execution.output.next().await.map_err(|error| error.to_string())? {
            ExecOutput::Stdout(bytes) => (&mut *stdout, bytes),
            ExecOutput::Stderr(bytes) => (&mut *stderr, bytes),
            ExecOutput::Exited(exit) => return Ok(exit_code(&exit)),
            ExecOutput::Failed { message, .. } => return Err(message),
            _ => continue,
        };
        let room = OUTPUT_LIMIT.saturating_sub(kept.len());
        kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
}
