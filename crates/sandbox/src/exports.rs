//! The file systems a sandbox is served, made from its spec.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::files::{Access, Export, ExportError, FileServer, HostImageOptions};
use crate::problem::{Problem, problem};
use crate::project::{Workspace, WorkspaceMode};
use crate::spec::{Image, Spec};
use crate::workspace::{BaseTable, guarded};

/// One served file system.
pub(crate) struct Served {
    /// Name by which the guest mounts it.
    pub tag: &'static str,
    /// No write may reach the host.
    pub read_only: bool,
    /// What answers the guest.
    pub server: Arc<FileServer>,
}

/// All file systems of a sandbox.
pub(crate) struct Exports {
    served: Vec<Served>,
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
    /// What each workspace path was when it was first served.
    pub bases: Arc<BaseTable>,
}

impl Exports {
    /// Tag of the host image.
    pub(crate) const HOST: &'static str = "host";
    /// Tag of the workspace.
    pub(crate) const WORKSPACE: &'static str = "workspace";

    /// Opens everything `spec` shares.
    pub(crate) fn open(spec: &Spec) -> Result<Self, Problem> {
        let mut exports =
            Self { served: Vec::new(), read: Vec::new(), write: Vec::new(), bases: Arc::default() };
        if let Image::Host { toolchains, .. } = &spec.image {
            let export = host_image(toolchains)?;
            exports
                .read
                .extend(crate::files::SYSTEM_DIRECTORIES.iter().map(|name| Path::new("/").join(name)));
            exports.read.extend(toolchains.iter().cloned());
            exports.add(Self::HOST, true, export);
        }
        if let Some(workspace) = &spec.workspace {
            let writable = workspace.mode == WorkspaceMode::Rw;
            let export = workspace_export(workspace, exports.bases.clone())?;
            if writable { &mut exports.write } else { &mut exports.read }.push(workspace.root.clone());
            exports.add(Self::WORKSPACE, !writable, export);
        }
        Ok(exports)
    }

    fn add(&mut self, tag: &'static str, read_only: bool, export: Export) {
        self.served.push(Served { tag, read_only, server: Arc::new(FileServer::new(export)) });
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Served> {
        self.served.iter()
    }

    /// Trees that are only read.
    pub(crate) fn read_roots(&self) -> Vec<PathBuf> {
        self.read.clone()
    }

    /// Trees that are written.
    pub(crate) fn write_roots(&self) -> Vec<PathBuf> {
        self.write.clone()
    }
}

/// The host's own toolchain.
pub(crate) fn host_image(toolchains: &[PathBuf]) -> Result<Export, Problem> {
    Export::host_image(HostImageOptions { toolchains: toolchains.to_vec() }).map_err(|error| refused(&error))
}

/// The project.
pub(crate) fn workspace_export(workspace: &Workspace, bases: Arc<BaseTable>) -> Result<Export, Problem> {
    let access = match workspace.mode {
        WorkspaceMode::Rw => Access::ReadWrite { guard: |path| guarded(path).is_some() },
        WorkspaceMode::Cow | WorkspaceMode::Ro | WorkspaceMode::None => Access::ReadOnly,
    };
    Export::workspace(&workspace.root, access, Some(bases)).map_err(|error| refused(&error))
}

fn refused(error: &ExportError) -> Problem {
    problem("share", error, error.hint().map(str::to_owned))
}
