//! What a sandbox changed in its workspace, brought to the host and taken there.
//!
//! A sandbox that runs is asked; one that is stopped is started for as long as that takes, for only a guest may read a
//! guest's file system.

use std::path::{Path, PathBuf};

use agentkernel_protocol::control::{HostVersion, Rebase};
use serde_bytes::ByteBuf;

use crate::client::Sandbox;
use crate::launch::checked_set;
use crate::lifecycle;
use crate::problem::{Problem, plain, problem};
use crate::project::{Workspace, WorkspaceMode};
use crate::spec::Spec;
use crate::state::{Home, SandboxDirectory};
use crate::workspace::{self, ApplyOptions, ApplyReport, ChangeSet, LastChanges};

/// The change set of the sandbox in `directory`, as it is now. `progress` is told if the sandbox must be started first.
///
/// # Errors
/// If it has no copy-on-write workspace, cannot be started, or its changes cannot be listed.
pub async fn changes(
    directory: &SandboxDirectory,
    program: &Path,
    progress: &mut (dyn FnMut(&str) + Send),
) -> Result<ChangeSet, Problem> {
    let workspace = shared(directory)?;
    // A set whose apply died is about to be replaced; what that left in the workspace goes first.
    workspace::repair(&directory.path().join(crate::collect::DIRECTORY))
        .map_err(|error| problem("apply", &error, error.hint().map(str::to_owned)))?;
    if directory.is_dead() {
        progress("starting the sandbox to read its changes ...");
    }
    let path = match lifecycle::start(directory, program).await? {
        None => Sandbox::open(directory.clone())?.changes().await?,
        Some(lease) => {
            let result = lease.sandbox().changes().await;
            lease.release();
            result?
        }
    };
    checked_set(&path, &workspace.root)
}

fn shared(directory: &SandboxDirectory) -> Result<Workspace, Problem> {
    let spec = Spec::load(directory.path())?;
    match spec.workspace {
        Some(workspace) if workspace.mode == WorkspaceMode::Cow => Ok(workspace),
        Some(Workspace { mode: WorkspaceMode::Rw, .. }) => Err(plain(
            "no-changes",
            format!("{} writes to its workspace at once: there is nothing to review", spec.name),
            None,
        )),
        _ => Err(plain("no-changes", format!("{} has no workspace it could change", spec.name), None)),
    }
}

/// Makes the host's new versions the bases of the sandbox's next changes.
///
/// # Errors
/// If the supervisor cannot be reached or the table of bases not be written: the next review may then show conflicts
/// where there are none.
pub async fn rebase(directory: &SandboxDirectory, report: &ApplyReport) -> Result<(), Problem> {
    let rebased = report.rebased();
    if directory.is_dead() {
        let bases = crate::exports::open_bases(directory.path())?;
        for (path, base) in rebased {
            bases.replace(path.as_path(), base);
        }
        return Ok(());
    }
    let paths = rebased.into_iter().map(|(path, base)| Rebase {
        path: ByteBuf::from(path.as_bytes()),
        version: base.map(HostVersion::from),
    });
    Sandbox::open(directory.clone())?.rebase(paths.collect()).await
}

/// Paths as people give them, relative to the set's workspace.
pub fn relative(set: &ChangeSet, paths: &[PathBuf]) -> Vec<PathBuf> {
    let plain = |path: &PathBuf| -> PathBuf {
        let path = path.strip_prefix(set.workspace()).unwrap_or(path);
        path.components().filter(|part| !matches!(part, std::path::Component::CurDir)).collect()
    };
    paths.iter().map(plain).collect()
}

/// The last run's changes.
///
/// # Errors
/// Code `no-changes` if there are none.
pub fn last(home: &Home) -> Result<ChangeSet, Problem> {
    let set = LastChanges::new(home.path()).load();
    let set = set.map_err(|error| problem("changes", &error, error.hint().map(str::to_owned)))?;
    set.ok_or_else(|| {
        let hint = "agentkernel run keeps the changes that its command made in the workspace";
        plain("no-changes", "there are no kept changes", Some(hint))
    })
}

/// Applies a change set, or the selected part of it; one of which all was taken is removed.
///
/// # Errors
/// If the workspace cannot be written.
pub fn apply(mut set: ChangeSet, options: &ApplyOptions) -> Result<ApplyReport, Problem> {
    let report = workspace::apply(&mut set, options)
        .map_err(|error| problem("apply", &error, error.hint().map(str::to_owned)))?;
    if set.is_empty() && !options.dry_run {
        set.discard().map_err(|error| problem("changes", &error, None))?;
    }
    Ok(report)
}
