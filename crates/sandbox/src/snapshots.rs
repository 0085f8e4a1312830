//! Snapshots: what a sandbox was at a moment, kept until it is removed.
//!
//! ```text
//! HOME/snapshots/NAME/
//! ├── snapshot.json           of what, when, and whether with memory
//! ├── spec.json, bases ...    what the sandbox was made with
//! ├── disk.ext4               its writable layer
//! └── machine.json, memory, devices, files-TAG      a saved machine, if the sandbox ran
//! ```
//! Taken of a running sandbox it holds memory and processes; of a stopped one its disk only. Restored in place, the sandbox
//! is what it was then, and what it is now is given up; restored under another name it is another sandbox, with an identity
//! of its own. A snapshot with memory goes on only where everything under the machine is the same (`saved.rs`); its disk can
//! be restored anywhere.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::client::{self, Sandbox, Warmth};
use crate::deadline::{rfc3339, unix_ms};
use crate::disk;
use crate::fork::{self, Origin};
use crate::problem::{Problem, io, plain, printable};
use crate::record::Record;
use crate::saved::{self, Draft, Fingerprint, From, SavedMachine};
use crate::spec::{Spec, check_name, fresh_machine_id, new_uuid};
use crate::state::{HeldSandbox, Home, SandboxDirectory, replace};

const ABOUT: &str = "snapshot.json";
/// How long a holder that is letting go may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A snapshot, as it is listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// The sandbox it was taken of.
    pub sandbox: String,
    /// Whether it holds memory and processes.
    pub memory: bool,
    /// When it was taken, RFC 3339.
    pub created_at: String,
    /// Bytes it takes on the disk.
    #[serde(default)]
    pub bytes: u64,
}

/// Takes a snapshot of the sandbox in `directory`; also returns how long it stood still.
///
/// # Errors
/// If the name is taken or none, the disk is full, or the sandbox does not come to rest. It goes on in any case.
pub async fn take(directory: &SandboxDirectory, name: &str) -> Result<(Snapshot, Duration), Problem> {
    check_name(name)?;
    let home = directory.home();
    let target = home.snapshots().join(name);
    if target.exists() {
        let hint = format!("agentkernel snapshot rm {name}, or choose another name");
        return Err(plain("name-taken", format!("there is a snapshot called {name} already"), Some(&hint)));
    }
    let draft = Draft::new(&home.snapshots())?;
    let (memory, still) = if directory.is_dead() {
        // Nobody may start it meanwhile.
        let held = directory.hold_soon(PATIENCE)?;
        let busy = || plain("still-held", format!("{} is being started", directory.name()), None);
        let _held = held.ok_or_else(busy)?;
        let source = directory.path().join(disk::FILE_NAME);
        if !source.exists() {
            let message = format!("{} has never run: there is nothing to take", directory.name());
            return Err(plain("never-ran", message, Some("agentkernel start it first")));
        }
        let target = draft.path().join(disk::FILE_NAME);
        let copied = tokio::task::spawn_blocking(move || disk::copy(&source, &target)).await;
        copied.map_err(|error| plain("snapshot", error.to_string(), None))??;
        (false, Duration::ZERO)
    } else {
        let sandbox = Sandbox::open(directory.clone())?;
        (true, saved::save(&sandbox, draft.path()).await?.1)
    };
    let spec = Spec::load(directory.path())?;
    spec.save(draft.path())?;
    fork::take_along(directory.path(), draft.path())?;
    let snapshot = Snapshot {
        name: name.to_owned(),
        sandbox: spec.name,
        memory,
        created_at: rfc3339(unix_ms()),
        bytes: 0,
    };
    let text =
        serde_json::to_vec_pretty(&snapshot).map_err(|error| plain("snapshot", error.to_string(), None))?;
    replace(&draft.path().join(ABOUT), &text).map_err(io("write the snapshot"))?;
    saved::sync(draft.path())?;
    draft.keep(&target)?;
    Record::open(directory.path()).say("snapshot", name);
    Ok((Snapshot { bytes: saved::directory_bytes(&target), ..snapshot }, still))
}

/// All snapshots, by name.
///
/// # Errors
/// If the state directory cannot be read.
pub fn list(home: &Home) -> Result<Vec<Snapshot>, Problem> {
    let mut all = Vec::new();
    let what = || format!("list {}", home.snapshots().display());
    for entry in fs::read_dir(home.snapshots()).map_err(io(what()))? {
        let name = entry.map_err(io(what()))?.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        match find(home, &name) {
            Ok(snapshot) => all.push(snapshot),
            // Removed meanwhile.
            Err(problem) if problem.code == "not-found" => {}
            Err(problem) => return Err(problem),
        }
    }
    all.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(all)
}

/// The snapshot called `name`.
///
/// # Errors
/// Code `not-found`.
pub fn find(home: &Home, name: &str) -> Result<Snapshot, Problem> {
    locate(home, name).map(|(snapshot, _)| snapshot)
}

/// What the sandbox was created with that the snapshot called `name` was taken of.
///
/// # Errors
/// Code `not-found`; if it is damaged.
pub fn spec_of(home: &Home, name: &str) -> Result<Spec, Problem> {
    Spec::load(&locate(home, name)?.1)
}

/// The snapshot called `name` and its directory.
fn locate(home: &Home, name: &str) -> Result<(Snapshot, PathBuf), Problem> {
    let missing = || {
        let message = format!("there is no snapshot called {}", printable(name));
        plain("not-found", message, Some("agentkernel snapshot list shows those there are"))
    };
    check_name(name).map_err(|_| missing())?;
    let directory = home.snapshots().join(name);
    let text = fs::read(directory.join(ABOUT)).map_err(|_| missing())?;
    let snapshot: Snapshot = serde_json::from_slice(&text)
        .map_err(|error| plain("snapshot", format!("the snapshot {name} is damaged: {error}"), None))?;
    Ok((Snapshot { name: name.to_owned(), bytes: saved::directory_bytes(&directory), ..snapshot }, directory))
}

/// Removes a snapshot. Sandboxes restored from it are not concerned.
///
/// # Errors
/// Code `not-found` if there is none.
pub fn remove(home: &Home, name: &str) -> Result<(), Problem> {
    let (_, directory) = locate(home, name)?;
    // From sight at once; the sweep takes what is left if this is cut short.
    let hidden = Draft::new(&home.snapshots())?;
    fs::rename(&directory, hidden.path().join("removed")).map_err(io(format!("remove {name}")))
}

/// How a snapshot is restored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restoring {
    /// Name of the sandbox that is made of it; in place if there is none.
    pub new_name: Option<String>,
    /// Leave memory and processes out: the sandbox is stopped, with the snapshot's disk.
    pub disk_only: bool,
}

/// Restores a snapshot; the sandbox runs if the snapshot holds memory. In place, a sandbox that runs is ended first, as if
/// the power was cut.
///
/// # Errors
/// Code `restore-mismatch` if its memory cannot go on here; nothing was changed then.
pub async fn restore(
    home: &Home,
    name: &str,
    restoring: &Restoring,
    program: &Path,
) -> Result<SandboxDirectory, Problem> {
    let (snapshot, directory) = locate(home, name)?;
    let origin = Origin { spec: Spec::load(&directory)?, directory: directory.clone() };
    let saved =
        (snapshot.memory && !restoring.disk_only).then(|| SavedMachine::open(&directory)).transpose()?;
    if let Some(saved) = &saved
        && let Some(what) = Fingerprint::now(home, &origin.spec)?.difference(&saved.record.fingerprint)
    {
        let message = format!("the memory of {name} cannot go on here: it was taken with {what}");
        let hint = "its disk can be restored: agentkernel snapshot restore --disk-only";
        return Err(plain("restore-mismatch", message, Some(hint)));
    }
    let target = restoring.new_name.as_deref().unwrap_or(&origin.spec.name);
    check_name(target)?;
    let existing = home.find(target).ok().filter(|sandbox| sandbox.name() == target);
    let held = match (existing, &restoring.new_name) {
        (Some(_), Some(_)) => {
            let hint = Some("choose another with --as");
            return Err(plain("name-taken", format!("there is a sandbox called {target} already"), hint));
        }
        (Some(existing), None) => replace_in_place(&existing, &origin, saved.as_ref()).await?,
        (None, _) => match &saved {
            Some(saved) => fork::create(home, target, &origin, saved)?,
            None => create_stopped(home, target, &origin)?,
        },
    };
    let sandbox = held.directory.clone();
    Record::open(sandbox.path()).say("restored", name);
    if saved.is_some() {
        client::start(held, program, Warmth::Warm).await?.live_on().await?;
    }
    Ok(sandbox)
}

/// A sandbox with the snapshot's disk that rests.
fn create_stopped(home: &Home, name: &str, origin: &Origin) -> Result<HeldSandbox, Problem> {
    let created_unix_ms = unix_ms();
    let spec = Spec {
        name: name.to_owned(),
        uuid: new_uuid(created_unix_ms),
        created_unix_ms,
        machine_id: fresh_machine_id(),
        network: origin.network(name),
        ..origin.spec.clone()
    };
    home.create_sandbox(name, |directory| {
        spec.save(directory)?;
        fork::take_along(&origin.directory, directory)?;
        disk::copy(&origin.directory.join(disk::FILE_NAME), &directory.join(disk::FILE_NAME)).map(drop)
    })
}

/// Gives a sandbox the snapshot's disk, and has it go on from its machine.
async fn replace_in_place(
    sandbox: &SandboxDirectory,
    origin: &Origin,
    saved: Option<&SavedMachine>,
) -> Result<HeldSandbox, Problem> {
    let own = sandbox.path().join(saved::OWN);
    let _ = fs::remove_dir_all(&own);
    // All that takes room, before anything is given up.
    let draft = Draft::new(&sandbox.home().snapshots())?;
    let disk = draft.path().join(disk::FILE_NAME);
    match saved {
        Some(saved) => saved.duplicate(draft.path(), &disk)?,
        None => drop(disk::copy(&origin.directory.join(disk::FILE_NAME), &disk)?),
    }
    if !sandbox.is_dead() {
        Sandbox::kill(sandbox).await?;
    }
    let held = sandbox.hold_soon(PATIENCE)?.ok_or_else(|| {
        plain("still-held", format!("{} is being started", sandbox.name()), Some("try again"))
    })?;
    let current = Spec::load(sandbox.path())?;
    let spec = Spec {
        name: current.name,
        uuid: current.uuid,
        created_unix_ms: current.created_unix_ms,
        machine_id: current.machine_id,
        ..origin.spec.clone()
    };
    fs::rename(&disk, sandbox.path().join(disk::FILE_NAME)).map_err(io("restore the disk"))?;
    spec.save(sandbox.path())?;
    for name in fork::TAKEN_ALONG {
        let _ = fs::remove_file(sandbox.path().join(name));
    }
    fork::take_along(&origin.directory, sandbox.path())?;
    if saved.is_some() {
        draft.keep(&own)?;
        saved::order(sandbox.path(), &own, From::Sandbox)?;
    }
    Ok(held)
}
