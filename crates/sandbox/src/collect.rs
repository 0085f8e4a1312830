//! Brings the guest's changes of a copy-on-write workspace to the host, as data.

use std::path::Path;

use agentkernel_protocol::frame;
use agentkernel_protocol::message::{Change, Request};
use agentkernel_protocol::mux::{Opener, Stream};

use crate::exports::{Exports, workspace_export};
use crate::problem::{Problem, plain, problem};
use crate::project::Workspace;
use crate::spec::Spec;
use crate::workspace::{ChangeLimits, ChangeRecorder, ChangeSet, Origin, RecordError, UpperEntry};

/// Where a sandbox's change set lies in its directory.
pub(crate) const DIRECTORY: &str = "changes";

/// Longest silence of a guest that lists its changes.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// Records what the guest lists for mount number `mount`; returns the number of changed paths.
pub(crate) async fn changes(
    opener: &Opener,
    mount: u32,
    spec: &Spec,
    workspace: &Workspace,
    directory: &Path,
    exports: &Exports,
) -> Result<u64, Problem> {
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
    let recorder =
        ChangeRecorder::new(&directory.join(DIRECTORY), origin, limits).map_err(|error| refused(&error))?;
    let mut stream = opener.open().await.map_err(|error| wire(&error))?;
    frame::write(&mut stream, &Request::Changes { mount }).await.map_err(|error| wire(&error))?;
    let set = record(recorder, &mut stream).await?;
    Ok(set.entries().len() as u64)
}

async fn record(mut recorder: ChangeRecorder, stream: &mut Stream) -> Result<ChangeSet, Problem> {
    let mut open = false;
    loop {
        let change: Change = tokio::time::timeout(PATIENCE, frame::read(stream))
            .await
            .map_err(|_| plain("changes", "the guest stopped listing its changes", None))?
            .map_err(|error| problem("changes", &error, None))?;
        if let Change::Data(bytes) = &change {
            recorder.data(bytes).map_err(|error| refused(&error))?;
            continue;
        }
        if std::mem::take(&mut open) {
            recorder.end_entry().map_err(|error| refused(&error))?;
        }
        let (path, entry) = match change {
            Change::Removed { path } => (path, UpperEntry::Removed),
            Change::Directory { path, mode, opaque } => (path, UpperEntry::Directory { mode, opaque }),
            Change::File { path, mode, size, modified_ns } => {
                (path, UpperEntry::File { mode, size, modified_ns })
            }
            Change::Symlink { path, target } => (path, UpperEntry::Symlink { target: target.into_vec() }),
            Change::Special { path } => (path, UpperEntry::Special),
            Change::End => return recorder.finish().map_err(|error| refused(&error)),
            Change::Failed { message } => {
                return Err(plain("changes", format!("the guest cannot list its changes: {message}"), None));
            }
            Change::Data(_) => continue,
        };
        recorder.begin_entry(&path, entry).map_err(|error| refused(&error))?;
        open = true;
    }
}

fn refused(error: &RecordError) -> Problem {
    problem("changes", error, error.hint().map(str::to_owned))
}
