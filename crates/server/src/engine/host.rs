//! The server itself, what it runs sandboxes on, its images, its garbage.

use std::path::PathBuf;

use agentkernel_sandbox::configuration;
use agentkernel_sandbox::images::Images;
use agentkernel_sandbox::project::{self, Choice, WorkspaceMode};
use agentkernel_sandbox::setup::{self, Status};
use agentkernel_sandbox::state::Phase;
use agentkernel_sandbox::{Problem, lifecycle};

use super::launching::word;
use super::{Engine, blocking};
use crate::model::{
    BackendCapabilities, BackendDescriptor, BackendDiscovery, Garbage, ImageInfo, ServerStatus,
};

/// What sandboxes run on.
pub(crate) const BACKEND: &str = "qemu";

impl Engine {
    /// The project that sandboxes share, if there is one that may be shared.
    pub fn project(&self) -> Option<PathBuf> {
        let surroundings = &self.settings().surroundings;
        let (current, home) = (&surroundings.current_directory, &surroundings.user.home);
        match project::choose(current, home, WorkspaceMode::Cow) {
            Choice::Workspace(workspace) => Some(workspace.root),
            Choice::NotWanted | Choice::Unsuitable(_) => None,
        }
    }

    /// What the server is and does.
    ///
    /// # Errors
    /// If the state directory cannot be read.
    pub async fn status(&self) -> Result<ServerStatus, Problem> {
        let engine = self.clone();
        blocking(move || {
            let sandboxes = engine.home().list()?;
            let running = sandboxes.iter().filter(|sandbox| sandbox.phase() != Phase::Stopped).count();
            let settings = engine.settings();
            Ok(ServerStatus {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                uptime_seconds: engine.uptime().as_secs(),
                backend: BACKEND.to_owned(),
                accelerator: setup::accelerator().to_owned(),
                sandboxes: sandboxes.len(),
                running,
                runs: engine.admitted(),
                queue_limit: settings.limits.queue,
                host_access: settings.grants.host_access,
                profile: settings.grants.profile.into(),
            })
        })
        .await
    }

    /// What sandboxes may run on.
    ///
    /// # Errors
    /// If the host cannot be looked at.
    pub async fn backends(&self) -> Result<BackendDiscovery, Problem> {
        let engine = self.clone();
        blocking(move || {
            let findings = setup::findings(engine.home(), &engine.settings().program);
            let failure = findings.iter().find(|finding| finding.status == Status::Failure);
            let usable = failure.is_none();
            let access = engine.grants().host_access;
            let permissive = engine.grants().profile == configuration::Profile::Permissive;
            let reason = match failure {
                Some(finding) => format!("{}: agentkernel doctor says more", finding.name),
                None => format!("ready, accelerator {}", setup::accelerator()),
            };
            let qemu = BackendDescriptor {
                backend: BACKEND.to_owned(),
                configured: true,
                usable,
                readiness_reason: reason,
                capabilities: BackendCapabilities {
                    mount_cwd: engine.project().is_some(),
                    mount_home: permissive,
                    attach: true,
                    host_volumes: access,
                    ssh: false,
                    proxy_secret_bindings: false,
                    secret_files: false,
                    snapshots: true,
                    resume: true,
                    full_state_pause_resume: true,
                    full_state_fork: true,
                    endpoints: true,
                },
            };
            let default_backend = usable.then(|| BACKEND.to_owned());
            Ok(BackendDiscovery { default_backend, backends: vec![qemu] })
        })
        .await
    }

    /// The images of the local store.
    ///
    /// # Errors
    /// If it cannot be read.
    pub async fn images(&self) -> Result<Vec<ImageInfo>, Problem> {
        let engine = self.clone();
        blocking(move || {
            let all = Images::open(engine.home())?.list()?.into_iter();
            Ok(all
                .map(|image| ImageInfo {
                    name: image.name,
                    id: image.image_id,
                    digest: image.digest,
                    created: image.created,
                    size_bytes: image.size_bytes,
                    used_by: image.used_by,
                    problem: image.problem,
                })
                .collect())
        })
        .await
    }

    /// Takes an image's name away, and frees what nothing needs any more.
    ///
    /// # Errors
    /// Code `image-not-found`, `image-in-use`.
    pub async fn remove_image(&self, name: &str) -> Result<(), Problem> {
        word("image", name)?;
        let (engine, name) = (self.clone(), name.to_owned());
        blocking(move || Images::open(engine.home())?.remove(&name, false)).await
    }

    /// Puts right what dead processes left behind, and removes what is past its time.
    ///
    /// # Errors
    /// If the state directory cannot be read.
    pub async fn gc(&self, dry_run: bool) -> Result<Garbage, Problem> {
        let home = self.home().clone();
        blocking(move || {
            let garbage = lifecycle::gc(&home, dry_run)?;
            Ok(Garbage {
                expired: garbage.expired,
                abandoned: garbage.abandoned,
                repaired: garbage.repaired,
                templates: garbage.templates,
                leftovers: garbage.leftovers,
            })
        })
        .await
    }
}
