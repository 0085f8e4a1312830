//! What is served: a tree, the filter over it, and how it may be used.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, Stat};
use rustix::io::Errno;

use super::abi::{MAX_NAME, MAX_PATH};
use super::host::{self, Tree};
use super::view::directory::DirectoryView;
use super::view::host_image::{HostImageView, Toolchain};
use super::view::workspace::{IGNORE_FILE, WorkspaceView};
use super::view::{Facts, View};
use crate::workspace::{Base, BaseTable};

/// Most bytes of an ignore file.
const IGNORE_FILE_LIMIT: u64 = 1 << 20;
/// Most symlinks followed in one path, as Linux has it.
const SYMLINK_LIMIT: usize = 40;

/// What a guest may do with a workspace.
#[derive(Clone, Copy, Debug)]
pub enum Access {
    /// Nothing is changed on the host; also the lower layer of a copy-on-write workspace.
    ReadOnly,
    /// Changes reach the host at once.
    ReadWrite {
        /// Tells which paths (relative to the workspace) stay read-only; what lies below one does, too.
        guard: fn(&Path) -> bool,
    },
}

/// What goes into a `host` image.
#[derive(Clone, Debug, Default)]
pub struct HostImageOptions {
    /// Directories under `$HOME` that the commands on `PATH` need, as [`super::toolchains_under`] finds them.
    /// They must be absolute; one that does not exist is left out, and where one is a symlink only the link is
    /// shown. What the owner may read in them is shared, so never name a home directory.
    pub toolchains: Vec<PathBuf>,
}

/// Why a tree cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The root, or what the server needs to reach into it, cannot be opened.
    #[error("cannot open {path} to serve it")]
    Open {
        /// What was opened.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A toolchain directory is not absolute or is `/`.
    #[error("{path} cannot be shared as a toolchain directory")]
    Toolchain {
        /// The directory as given.
        path: PathBuf,
    },
    /// The ignore file is there but cannot be read.
    #[error("cannot read {path}")]
    ReadIgnoreFile {
        /// The ignore file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The ignore file has a line that is no pattern. Nothing is served, because the line was meant to hide
    /// something.
    #[error("cannot understand {path}")]
    ParseIgnoreFile {
        /// The ignore file.
        path: PathBuf,
        /// The line and what is wrong with it.
        source: ignore::Error,
    },
}

impl ExportError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Open { .. } => None,
            Self::Toolchain { .. } => Some("name an absolute directory below the home directory"),
            Self::ReadIgnoreFile { .. } => Some("make it a regular file of at most 1 MiB of UTF-8 text"),
            Self::ParseIgnoreFile { .. } => Some("each line is a pattern as in .gitignore"),
        }
    }
}

/// What a guest would find at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Whether it is a directory.
    pub directory: bool,
    /// Type and permission bits as the guest sees them (`st_mode`).
    pub mode: u32,
}

/// One tree to serve.
#[derive(Debug)]
pub struct Export {
    pub(super) tree: Tree,
    pub(super) view: View,
    pub(super) access: Access,
    pub(super) bases: Option<Arc<BaseTable>>,
    /// The root's absolute path: the prefix of paths given to [`Export::entry`].
    root: PathBuf,
}

impl Export {
    /// The host's own programs, read-only, as nobody would see them; see DESIGN §5.
    ///
    /// # Errors
    /// `/` or `/proc/self/fd` cannot be opened, or a toolchain directory is not absolute.
    pub fn host_image(options: HostImageOptions) -> Result<Self, ExportError> {
        Self::host_image_at(Path::new("/"), options)
    }

    /// A host image of another root; toolchain paths are absolute *in* it.
    pub(super) fn host_image_at(root: &Path, options: HostImageOptions) -> Result<Self, ExportError> {
        let mut toolchains = Vec::new();
        for path in &options.toolchains {
            let relative = relative(path).ok_or_else(|| ExportError::Toolchain { path: path.clone() })?;
            let Ok(metadata) = std::fs::symlink_metadata(root.join(OsStr::from_bytes(&relative))) else {
                continue;
            };
            toolchains.push(Toolchain { path: relative, owner: metadata.uid() });
        }
        Ok(Self {
            tree: open_tree(root)?,
            view: View::HostImage(HostImageView::new(toolchains)),
            access: Access::ReadOnly,
            bases: None,
            root: root.to_owned(),
        })
    }

    /// The workspace `root`. With `bases`, what each path was when it was first served is recorded there.
    ///
    /// # Errors
    /// The directory or `/proc/self/fd` cannot be opened, or its ignore file cannot be understood.
    pub fn workspace(
        root: &Path,
        access: Access,
        bases: Option<Arc<BaseTable>>,
    ) -> Result<Self, ExportError> {
        let tree = open_tree(root)?;
        let path = root.join(IGNORE_FILE);
        let lines = read_ignore_file(&tree)
            .map_err(|source| ExportError::ReadIgnoreFile { path: path.clone(), source })?;
        let view =
            WorkspaceView::new(&lines).map_err(|source| ExportError::ParseIgnoreFile { path, source })?;
        Ok(Self { tree, view: View::Workspace(view), access, bases, root: root.to_owned() })
    }

    /// The directory `root`, without what lies in `hidden` (absolute; an empty path hides nothing).
    ///
    /// # Errors
    /// The directory or `/proc/self/fd` cannot be opened.
    pub fn directory(root: &Path, access: Access, hidden: &Path) -> Result<Self, ExportError> {
        let hidden = hidden.strip_prefix(root).ok().map(|path| path.as_os_str().as_bytes().to_vec());
        let view = View::Directory(DirectoryView::new(hidden.filter(|path| !path.is_empty())));
        Ok(Self { tree: open_tree(root)?, view, access, bases: None, root: root.to_owned() })
    }

    /// The home directory `root`, read-only, without what looks like a setting or a credential.
    ///
    /// # Errors
    /// The directory or `/proc/self/fd` cannot be opened.
    pub fn home(root: &Path, toolchains: &[PathBuf]) -> Result<Self, ExportError> {
        let below = |path: &PathBuf| Some(path.strip_prefix(root).ok()?.as_os_str().as_bytes().to_vec());
        let view = DirectoryView::home(toolchains.iter().filter_map(below).collect())
            .map_err(|source| ExportError::ParseIgnoreFile { path: root.to_owned(), source })?;
        let view = View::Directory(view);
        Ok(Self {
            tree: open_tree(root)?,
            view,
            access: Access::ReadOnly,
            bases: None,
            root: root.to_owned(),
        })
    }

    /// Whether the guest finds something at `path`: an absolute path of the host, symlinks in it followed.
    pub fn visible(&self, path: &Path) -> bool {
        self.entry(path).is_some()
    }

    /// What the guest finds at `path`: an absolute path of the host, symlinks in it followed. `None` where it
    /// finds nothing, and for what lies outside this export.
    pub fn entry(&self, path: &Path) -> Option<Entry> {
        let mut pending = components(path.strip_prefix(&self.root).ok()?);
        let mut at = Vec::new();
        let mut stat = self.stat_shown(&at).ok()?;
        let mut symlinks = 0;
        while let Some(name) = pending.pop() {
            if name == b".." {
                at.truncate(at.iter().rposition(|&byte| byte == b'/').unwrap_or(0));
                stat = self.stat_shown(&at).ok()?;
                continue;
            }
            let child = join(&at, &name);
            stat = self.stat_shown(&child).ok()?;
            if host::kind(&stat) != FileType::Symlink {
                at = child;
                continue;
            }
            symlinks += 1;
            let target = self.read_link(&child).ok().filter(|_| symlinks <= SYMLINK_LIMIT)?;
            let target = Path::new(OsStr::from_bytes(&target));
            if target.is_absolute() {
                at.clear();
                pending.extend(components(target.strip_prefix(&self.root).ok()?));
            } else {
                pending.extend(components(target));
            }
            stat = self.stat_shown(&at).ok()?;
        }
        let mode = self.view.mode(&at, stat.st_mode & 0o7777) | (stat.st_mode & !0o7777);
        Some(Entry { directory: host::kind(&stat) == FileType::Directory, mode })
    }

    fn stat_shown(&self, path: &[u8]) -> Result<Stat, Errno> {
        let stat = rustix::fs::fstat(self.tree.at(path)?)?;
        if self.view.shows(path, Facts::of(&stat)) { Ok(stat) } else { Err(Errno::NOENT) }
    }

    fn read_link(&self, path: &[u8]) -> Result<Vec<u8>, Errno> {
        let target = rustix::fs::readlinkat(self.tree.at(path)?, c"", Vec::new())?;
        Ok(target.into_bytes())
    }

    /// Whether `path` or anything above it must not be changed.
    pub(super) fn guards(&self, path: &[u8]) -> bool {
        let Access::ReadWrite { guard } = self.access else { return true };
        let ends = path.iter().enumerate().filter(|&(_, &byte)| byte == b'/').map(|(at, _)| at);
        ends.chain([path.len()]).any(|end| guard(Path::new(OsStr::from_bytes(&path[..end]))))
    }

    pub(super) fn is_writable(&self) -> bool {
        matches!(self.access, Access::ReadWrite { .. })
    }

    /// Records what `path` was, if bases are kept and this is the first time it is served.
    pub(super) fn record(&self, path: &[u8], stat: &Stat) {
        let Some(bases) = self.bases.as_ref().filter(|_| !path.is_empty()) else { return };
        bases.record_first(Path::new(OsStr::from_bytes(path)), base(stat));
    }
}

/// `parent/name`, or `name` at the root.
pub(super) fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, name].join(&b'/') }
}

fn base(stat: &Stat) -> Base {
    let file = host::kind(stat) != FileType::Directory;
    let time = |seconds: i64, nanoseconds: u64| {
        if file { i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds) } else { 0 }
    };
    Base {
        inode: stat.st_ino,
        mode: stat.st_mode,
        size: if file { stat.st_size.cast_unsigned() } else { 0 },
        modified_ns: time(stat.st_mtime, stat.st_mtime_nsec),
        changed_ns: time(stat.st_ctime, stat.st_ctime_nsec),
    }
}

fn open_tree(root: &Path) -> Result<Tree, ExportError> {
    Tree::open(root).map_err(|errno| ExportError::Open { path: root.to_owned(), source: errno.into() })
}

/// The ignore file's lines, none if there is no such file. A symlink is not followed.
fn read_ignore_file(tree: &Tree) -> std::io::Result<String> {
    let descriptor = match tree.at(IGNORE_FILE.as_bytes()) {
        Err(Errno::NOENT) => return Ok(String::new()),
        opened => opened?,
    };
    let stat = rustix::fs::fstat(&descriptor)?;
    if host::kind(&stat) != FileType::RegularFile || stat.st_size.cast_unsigned() > IGNORE_FILE_LIMIT {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    let file = File::from(tree.reopen(&descriptor, rustix::fs::OFlags::RDONLY)?);
    let mut lines = String::new();
    file.take(IGNORE_FILE_LIMIT).read_to_string(&mut lines)?;
    Ok(lines)
}

/// An absolute path without its leading slash, if it is plain and not `/`.
fn relative(path: &Path) -> Option<Vec<u8>> {
    let names = path.strip_prefix("/").ok()?;
    let plain = names.components().all(|component| matches!(component, Component::Normal(_)));
    let bytes = names.components().collect::<PathBuf>().into_os_string().into_vec();
    (plain && !bytes.is_empty() && bytes.len() <= MAX_PATH).then_some(bytes)
}

/// The names of a path, the first one last; `.` is left out.
fn components(path: &Path) -> Vec<Vec<u8>> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.as_bytes().to_vec()),
        Component::ParentDir => Some(b"..".to_vec()),
        _ => None,
    });
    let mut names: Vec<_> = names.filter(|name| name.len() <= MAX_NAME).collect();
    names.reverse();
    names
}
