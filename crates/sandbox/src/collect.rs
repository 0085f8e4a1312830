//! Brings the guest's changes of a copy-on-write workspace to the host, as data.

use std::path::Path;

use agentkernel_protocol::frame;
use agentkernel_protocol::message::{Entry, Programs, Request};
use agentkernel_protocol::mux::{Opener, Stream};

use crate::exports::{Exports, workspace_export, workspace_mount};
use crate::problem::{Problem, io, plain, problem};
use crate::project::WorkspaceMode;
use crate::spec::Spec;
use crate::state::random_word;
use crate::workspace::{ChangeLimits, ChangeRecorder, ChangeSet, Origin, RecordError, UpperEntry};

/// Where a sandbox's change set lies in its directory.
pub(crate) const DIRECTORY: &str = "changes";
/// Begins the names of sets that are being recorded, or were just replaced.
const PASSING: &str = "changes.";

/// Longest silence of a guest that lists its changes.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// Records what the guest lists for its workspace; returns the number of changed paths.
pub(crate) async fn changes(
    opener: &Opener,
    programs: Programs,
    spec: &Spec,
    directory: &Path,
    exports: &Exports,
) -> Result<u64, Problem> {
    let workspace = spec.workspace.as_ref().filter(|workspace| workspace.mode == WorkspaceMode::Cow);
    let Some((workspace, mount)) = workspace.zip(workspace_mount(spec)) else {
        let hint = Some("changes of a workspace in mode rw are on the host already");
        return Err(plain("no-workspace", "this sandbox has no copy-on-write workspace", hint));
    };
    let wire = |error: &dyn std::error::Error| problem("changes", error, None);
    let bases = exports.bases.clone();
    let view = workspace_export(workspace, bases.clone())?;
    let root = workspace.root.clone();
    let origin = Origin {
        workspace: workspace.root.clone(),
        sandbox: spec.name.clone(),
        base: Box::new(move |path| bases.get(path)),
        visible: Box::new(move |path| view.visible(&root.join(path))),
    };
    let limits = ChangeLimits::for_disk(spec.disk_mib << 20);
    tidy(directory);
    let fresh = directory.join(format!("{PASSING}{}", random_word()));
    let recorder = ChangeRecorder::new(&fresh, origin, limits).map_err(|error| refused(&error))?;
    let mut stream = opener.open().await.map_err(|error| wire(&error))?;
    frame::write(&mut stream, &Request::Changes { mount, programs }).await.map_err(|error| wire(&error))?;
    let set = record(recorder, &mut stream).await?;
    let paths = set.entries().len() as u64;
    // Whoever still applies the former set has it open, and takes nothing from this one.
    let (current, former) =
        (directory.join(DIRECTORY), directory.join(format!("{PASSING}{}", random_word())));
    let replace = || {
        match std::fs::rename(&current, &former) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::rename(&fresh, &current)
    };
    replace().map_err(io(format!("keep the changes in {}", current.display())))?;
    tidy(directory);
    Ok(paths)
}

/// Removes sets that were replaced or never finished.
pub(crate) fn tidy(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(PASSING.as_bytes()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

async fn record(mut recorder: ChangeRecorder, stream: &mut Stream) -> Result<ChangeSet, Problem> {
    let mut open = false;
    loop {
        let change: Entry = tokio::time::timeout(PATIENCE, frame::read(stream))
            .await
            .map_err(|_| plain("changes", "the guest stopped listing its changes", None))?
            .map_err(|error| problem("changes", &error, None))?;
        if let Entry::Data(bytes) = &change {
            recorder.data(bytes).map_err(|error| refused(&error))?;
            continue;
        }
        if std::mem::take(&mut open) {
            recorder.end_entry().map_err(|error| refused(&error))?;
        }
        let (path, entry) = match change {
            Entry::Removed { path } => (path, UpperEntry::Removed),
            Entry::Directory { path, mode, opaque } => (path, UpperEntry::Directory { mode, opaque }),
            Entry::File { path, mode, size, modified_ns } => {
                (path, UpperEntry::File { mode, size, modified_ns })
            }
            Entry::Symlink { path, target } => (path, UpperEntry::Symlink { target: target.into_vec() }),
            Entry::Special { path } => (path, UpperEntry::Special),
            Entry::End => return recorder.finish().map_err(|error| refused(&error)),
            Entry::Failed { message } => {
                return Err(plain("changes", format!("the guest cannot list its changes: {message}"), None));
            }
            Entry::Data(_) => continue,
        };
        recorder.begin_entry(&path, entry).map_err(|error| refused(&error))?;
        open = true;
    }
}

fn refused(error: &RecordError) -> Problem {
    problem("changes", error, error.hint().map(str::to_owned))
}
