//! Snapshots.

use agentkernel_sandbox::snapshots::{self, Restoring, Snapshot};
use agentkernel_sandbox::spec::{Image, check_name};
use agentkernel_sandbox::state::random_word;
use agentkernel_sandbox::{Problem, snapshots::spec_of};

use super::launching::completed;
use super::sandboxes::info;
use super::{Engine, blocking};
use crate::model::{RestoreRequest, SandboxInfo, SnapshotInfo, SnapshotRequest};

impl Engine {
    /// Takes a snapshot.
    ///
    /// # Errors
    /// Code `name-taken`, `not-found`, `never-ran`; if the disk is full.
    pub async fn take_snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotInfo, Problem> {
        let (directory, spec) = self.find(&request.sandbox)?;
        let made_up = || {
            let short: String = spec.name.chars().take(40).collect();
            format!("{short}-{}", &random_word()[..8])
        };
        let name = request.name.clone().unwrap_or_else(made_up);
        let (snapshot, _) = snapshots::take(&directory, &name).await?;
        self.snapshot_info(snapshot)
    }

    /// All snapshots, by name.
    ///
    /// # Errors
    /// If the state directory cannot be read.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotInfo>, Problem> {
        let engine = self.clone();
        blocking(move || {
            let all = snapshots::list(engine.home())?.into_iter();
            Ok(all.filter_map(|snapshot| engine.snapshot_info(snapshot).ok()).collect())
        })
        .await
    }

    /// A snapshot.
    ///
    /// # Errors
    /// Code `not-found`.
    pub async fn snapshot(&self, name: &str) -> Result<SnapshotInfo, Problem> {
        let (engine, name) = (self.clone(), name.to_owned());
        blocking(move || engine.snapshot_info(snapshots::find(engine.home(), &name)?)).await
    }

    /// Restores a snapshot: in place, or as another sandbox.
    ///
    /// # Errors
    /// Code `not-found`, `name-taken`, `restore-mismatch`: nothing was changed then.
    pub async fn restore(&self, name: &str, request: &RestoreRequest) -> Result<SandboxInfo, Problem> {
        if let Some(new) = &request.as_name {
            check_name(new)?;
        }
        self.grants().check_spec(&spec_of(self.home(), name)?)?;
        // In place, one that runs takes no more than it does.
        let snapshot = snapshots::find(self.home(), name)?;
        let runs = |sandbox: &str| self.look_up(sandbox).is_ok_and(|found| !found.is_dead());
        let starts = snapshot.memory && !request.disk_only;
        if starts && (request.as_name.is_some() || !runs(&snapshot.sandbox)) {
            self.room(1).await?;
        }
        let restoring = Restoring { new_name: request.as_name.clone(), disk_only: request.disk_only };
        let (home, name) = (self.home().clone(), name.to_owned());
        let (program, another) = (self.settings().program.clone(), request.as_name.is_some());
        let work = async move { snapshots::restore(&home, &name, &restoring, &program).await };
        // In place, the sandbox is the snapshot's then, whether or not somebody waits.
        let made = move |restored| if another { vec![restored] } else { Vec::new() };
        let restored = completed(self, work, made).await?;
        info(&restored)
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// Code `not-found`.
    pub async fn remove_snapshot(&self, name: &str) -> Result<(), Problem> {
        let (engine, name) = (self.clone(), name.to_owned());
        blocking(move || snapshots::remove(engine.home(), &name)).await
    }

    fn snapshot_info(&self, snapshot: Snapshot) -> Result<SnapshotInfo, Problem> {
        let spec = spec_of(self.home(), &snapshot.name)?;
        Ok(SnapshotInfo {
            image_tag: snapshot.name.clone(),
            name: snapshot.name,
            sandbox: snapshot.sandbox,
            backend: super::host::BACKEND.to_owned(),
            base_image: Some(match spec.image {
                Image::Host { .. } => "host".to_owned(),
                Image::Disk { name, .. } => name,
            }),
            vcpus: Some(spec.vcpus),
            memory_mb: Some(spec.memory_mib),
            created_at: snapshot.created_at,
            memory: snapshot.memory,
            bytes: snapshot.bytes,
        })
    }
}
