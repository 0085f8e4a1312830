//! The file systems a sandbox is served, made from its spec.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use agentkernel_protocol::message::{Mount, MountMode};
use serde_bytes::ByteBuf;

use crate::files::{Access, Export, ExportError, FileServer, HostImageOptions};
use crate::problem::{Problem, io, plain, problem};
use crate::project::{Workspace, WorkspaceMode};
use crate::saved::From;
use crate::spec::{Image, MountSource, Spec};
use crate::state::SandboxDirectory;
use crate::workspace::{BaseTable, guarded};

/// The mounts of a sandbox, outer directories before what is mounted in them.
pub(crate) fn mounts(spec: &Spec) -> Vec<Mount> {
    let path = |path: &Path| ByteBuf::from(path.as_os_str().as_encoded_bytes());
    let workspace = spec.workspace.iter().map(|workspace| {
        let mode = match workspace.mode {
            WorkspaceMode::Cow => MountMode::CopyOnWrite,
            WorkspaceMode::Rw => MountMode::ReadWrite,
            WorkspaceMode::Ro | WorkspaceMode::None => MountMode::ReadOnly,
        };
        (&workspace.root, Exports::workspace_tag(workspace.mode).to_owned(), mode)
    });
    let others = spec.mounts.iter().enumerate().map(|(index, mount)| {
        let mode = if mount.read_only { MountMode::ReadOnly } else { MountMode::ReadWrite };
        (&mount.target, Exports::mount_tag(index), mode)
    });
    let mut mounts: Vec<_> = workspace.chain(others).collect();
    mounts.sort_by_key(|(target, _, _)| target.components().count());
    mounts.into_iter().map(|(target, tag, mode)| Mount { tag, target: path(target), mode }).collect()
}

/// Index of the workspace among [`mounts`].
pub(crate) fn workspace_mount(spec: &Spec) -> Option<u32> {
    let index = mounts(spec).iter().position(|mount| mount.tag == Exports::WORKSPACE)?;
    u32::try_from(index).ok()
}

/// One served file system.
pub(crate) struct Served {
    /// Name by which the guest mounts it.
    pub tag: String,
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
    /// Tag of a copy-on-write workspace, which templates prepare for.
    pub(crate) const WORKSPACE: &'static str = "workspace";

    /// Tag of the workspace in this mode.
    fn workspace_tag(mode: WorkspaceMode) -> &'static str {
        match mode {
            WorkspaceMode::Cow => Self::WORKSPACE,
            WorkspaceMode::Rw | WorkspaceMode::Ro | WorkspaceMode::None => "project",
        }
    }

    /// Tag of mount number `index` of the spec.
    pub(crate) fn mount_tag(index: usize) -> String {
        format!("mount-{index}")
    }

    /// Opens everything `spec` shares with the sandbox in `directory`.
    pub(crate) fn open(spec: &Spec, directory: &SandboxDirectory) -> Result<Self, Problem> {
        let bases = Arc::new(open_bases(directory.path())?);
        let mut exports = Self { served: Vec::new(), read: Vec::new(), write: Vec::new(), bases };
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
            exports.add(Self::workspace_tag(workspace.mode), !writable, export);
        }
        if directory.is_template() {
            // An empty one: whose machine is restored is served something else.
            let root = directory.path().join("empty");
            std::fs::create_dir_all(&root).map_err(io("make an empty directory"))?;
            let export = Export::directory(&root, Access::ReadOnly, Path::new(""));
            exports.add(Self::WORKSPACE, true, export.map_err(|error| refused(&error))?);
            exports.read.push(root);
        }
        let state = directory.home().path();
        for (index, mount) in spec.mounts.iter().enumerate() {
            let (root, export) = match &mount.source {
                MountSource::Host(root) => {
                    // What could run on the host by itself is guarded as in a workspace.
                    let access = access(mount.read_only, |path| guarded(path).is_some());
                    (root.clone(), Export::directory(root, access, state))
                }
                MountSource::Volume(name) => {
                    let root = directory.home().volume(name)?;
                    let access = access(mount.read_only, |_| false);
                    let export = Export::directory(&root, access, Path::new(""));
                    (root, export)
                }
                MountSource::Home(root) => {
                    let toolchains = match &spec.image {
                        Image::Host { toolchains, .. } => toolchains.as_slice(),
                        Image::Disk { .. } => &[],
                    };
                    (root.clone(), Export::home(root, toolchains))
                }
            };
            let export = export.map_err(|error| refused(&error))?;
            if mount.read_only { &mut exports.read } else { &mut exports.write }.push(root);
            exports.add(&Self::mount_tag(index), mount.read_only, export);
        }
        Ok(exports)
    }

    fn add(&mut self, tag: &str, read_only: bool, export: Export) {
        let tag = tag.to_owned();
        self.served.push(Served { tag, read_only, server: Arc::new(FileServer::new(export)) });
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Served> {
        self.served.iter()
    }

    /// What the guest knows of each file system, by tag.
    pub(crate) fn save(&self, with_versions: bool) -> Vec<(String, Vec<u8>)> {
        self.served.iter().map(|served| (served.tag.clone(), served.server.save(with_versions))).collect()
    }

    /// Goes on for the guest of servers that saved these.
    pub(crate) fn adopt(&self, saved: &[(String, Vec<u8>)], from: From) -> Result<(), Problem> {
        for (tag, table) in saved {
            let served = self.served.iter().find(|served| served.tag == *tag);
            if served.is_none() && from == From::Template {
                // It was prepared for, and this sandbox has none.
                continue;
            }
            if !served.is_some_and(|served| served.server.adopt(table)) {
                let message =
                    format!("the saved machine's file system {tag} is not what this sandbox is served");
                return Err(plain("restore", message, None));
            }
        }
        Ok(())
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

fn access(read_only: bool, guard: fn(&Path) -> bool) -> Access {
    if read_only { Access::ReadOnly } else { Access::ReadWrite { guard } }
}

/// What the workspace's paths were when the guest first saw them, kept over stop and start.
pub(crate) fn open_bases(directory: &Path) -> Result<BaseTable, Problem> {
    let path = directory.join("bases");
    BaseTable::open(&path).map_err(io(format!("read {}", path.display())))
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
