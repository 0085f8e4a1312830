//! Writes down what a guest says it changed.
//!
//! The engine feeds the entries of the guest's upper directory as they arrive, file contents in pieces; nothing is
//! held in memory but names. Everything in them is hostile: paths, sizes, order, number. [`ChangeRecorder::finish`]
//! then compares with the host, because an overlay's upper layer is not yet a change set:
//! - a file that was only opened for writing, or whose times were touched, is there in full and is no change;
//! - so is each directory above a changed file;
//! - a removed or replaced directory stands for everything in it, which `apply` must know path by path.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Stat};

use super::changes::{CONTENT, Change, ChangeKind, ChangeSet, ChangeSetError, ChangeStatus, Manifest};
use super::path::{PathError, TARGET_BYTES_MAX};
use super::tree::{self, PERMISSIONS, Tree};
use super::{Base, RelativePath};

/// Finds the base of a path relative to the workspace.
pub type BaseLookup = Box<dyn Fn(&Path) -> Option<Base> + Send>;
/// Tells whether the guest can see a path relative to the workspace.
pub type VisibleLookup = Box<dyn Fn(&Path) -> bool + Send>;

/// What the set is about and what the host knows of it.
pub struct Origin {
    /// The host directory the changes are relative to.
    pub workspace: PathBuf,
    /// The sandbox that makes them.
    pub sandbox: String,
    /// What a path was when it was first served ([`BaseTable::get`](super::BaseTable::get)).
    pub base: BaseLookup,
    /// Whether the guest can see a host path. What it cannot see it cannot have removed.
    pub visible: VisibleLookup,
}

/// How much a guest may send.
#[derive(Clone, Copy, Debug)]
pub struct ChangeLimits {
    /// Paths, those of removed directories' content included.
    pub entries: usize,
    /// Sum of all file sizes, bytes.
    pub bytes: u64,
}

impl ChangeLimits {
    /// A million paths, and as many bytes as the writable layer can hold.
    pub fn for_disk(disk_bytes: u64) -> Self {
        Self { entries: 1_000_000, bytes: disk_bytes }
    }
}

/// One entry of an upper layer, as a guest sends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpperEntry {
    /// Whatever was at the path is gone.
    Removed,
    /// A directory.
    Directory {
        /// Permission bits; others are ignored.
        mode: u32,
        /// Nothing of the host's directory shows through.
        opaque: bool,
    },
    /// A regular file; exactly `size` bytes of data follow.
    File {
        /// Permission bits; others are ignored.
        mode: u32,
        /// Bytes that follow.
        size: u64,
        /// Last modification, nanoseconds since the epoch.
        modified_ns: i64,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points.
        target: Vec<u8>,
    },
    /// A device node, FIFO or socket.
    Special,
}

/// Why a recording failed. The directory of a failed recording is removed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A path that cannot be below a workspace.
    #[error("the guest sent a bad path {path:?}")]
    Path {
        /// What it sent, shortened.
        path: String,
        /// What is wrong with it.
        source: PathError,
    },
    /// The same path twice.
    #[error("the guest sent {} twice", path.as_path().display())]
    Duplicate {
        /// The path.
        path: RelativePath,
    },
    /// Something below a path that is no directory.
    #[error("the guest sent {} below something that is no directory", path.as_path().display())]
    Misplaced {
        /// The path.
        path: RelativePath,
    },
    /// A link target that no file system could hold.
    #[error("the guest sent {} as a link with an impossible target", path.as_path().display())]
    Target {
        /// The path.
        path: RelativePath,
    },
    /// More paths than allowed.
    #[error("more than {limit} paths changed")]
    TooManyEntries {
        /// The limit.
        limit: usize,
    },
    /// More content than allowed.
    #[error("more than {limit} bytes changed")]
    TooManyBytes {
        /// The limit.
        limit: u64,
    },
    /// Data that is too much, too little or belongs to no file.
    #[error("the guest sent data out of order")]
    Sequence,
    /// The set cannot be kept.
    #[error(transparent)]
    Set(#[from] ChangeSetError),
    /// The workspace cannot be read.
    #[error("cannot compare with the workspace {}", path.display())]
    Workspace {
        /// The path that failed.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl RecordError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::TooManyEntries { .. } => {
                Some("keep build output outside the workspace, or list it in .agentkernelignore")
            }
            Self::Set(error) => error.hint(),
            _ => None,
        }
    }
}

/// An entry taken in.
enum Pending {
    Removed,
    Directory { mode: u32, opaque: bool },
    File { mode: u32, size: u64, modified_ns: i64, offset: u64, same_as_host: bool },
    Symlink { target: Vec<u8> },
    Special,
}

/// The file whose data is arriving.
struct OpenFile {
    path: RelativePath,
    mode: u32,
    size: u64,
    modified_ns: i64,
    offset: u64,
    left: u64,
    /// The host's file, as long as all bytes so far were the same.
    host: Option<File>,
}

/// Takes in the entries of one upper layer.
pub struct ChangeRecorder {
    origin: Origin,
    limits: ChangeLimits,
    tree: Tree,
    manifest: Manifest,
    directory: Unfinished,
    content: BufWriter<File>,
    end: u64,
    received: u64,
    entries: BTreeMap<RelativePath, Pending>,
    open: Option<OpenFile>,
    compare: Vec<u8>,
}

/// The set's directory, removed unless the recording is finished. The lock tells sweepers that it is in use.
struct Unfinished {
    path: PathBuf,
    _lock: File,
    finished: bool,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished {
            let _ = super::changes::remove_set(&self.path);
        }
    }
}

impl ChangeRecorder {
    /// Starts a set in `directory`, which must not exist yet and whose parent must.
    ///
    /// # Errors
    /// The directory cannot be made, or the workspace cannot be opened.
    pub fn new(directory: &Path, origin: Origin, limits: ChangeLimits) -> Result<Self, RecordError> {
        let tree = Tree::open(&origin.workspace)
            .map_err(|source| RecordError::Workspace { path: origin.workspace.clone(), source })?;
        let set = |error| RecordError::Set(ChangeSetError::io(directory)(error));
        let manifest = Manifest::new(&origin.workspace, &origin.sandbox).map_err(set)?;
        std::fs::DirBuilder::new().mode(0o700).create(directory).map_err(set)?;
        let lock = File::open(directory).map_err(set)?;
        let directory = Unfinished { path: directory.to_owned(), _lock: lock, finished: false };
        rustix::fs::flock(&directory._lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| set(error.into()))?;
        let content =
            File::options().read(true).write(true).create_new(true).open(directory.path.join(CONTENT));
        let content = BufWriter::with_capacity(128 * 1024, content.map_err(set)?);
        Ok(Self {
            origin,
            limits,
            tree,
            manifest,
            directory,
            content,
            end: 0,
            received: 0,
            entries: BTreeMap::new(),
            open: None,
            compare: Vec::new(),
        })
    }

    /// Takes in one entry. A file stays open until [`end_entry`](Self::end_entry).
    ///
    /// # Errors
    /// The entry breaks a rule or a limit; the recording cannot go on.
    pub fn begin_entry(&mut self, path: &[u8], entry: UpperEntry) -> Result<(), RecordError> {
        if self.open.is_some() {
            return Err(RecordError::Sequence);
        }
        let path =
            RelativePath::parse(path).map_err(|source| RecordError::Path { path: excerpt(path), source })?;
        if self.entries.contains_key(&path) {
            return Err(RecordError::Duplicate { path });
        }
        self.check_count()?;
        let pending = match entry {
            UpperEntry::File { mode, size, modified_ns } => {
                return self.begin_file(path, mode, size, modified_ns);
            }
            UpperEntry::Removed => Pending::Removed,
            UpperEntry::Directory { mode, opaque } => Pending::Directory { mode: mode & 0o7777, opaque },
            UpperEntry::Symlink { target } => {
                if target.is_empty() || target.len() > TARGET_BYTES_MAX || target.contains(&0) {
                    return Err(RecordError::Target { path });
                }
                Pending::Symlink { target }
            }
            UpperEntry::Special => Pending::Special,
        };
        self.entries.insert(path, pending);
        Ok(())
    }

    fn begin_file(
        &mut self,
        path: RelativePath,
        mode: u32,
        size: u64,
        modified_ns: i64,
    ) -> Result<(), RecordError> {
        // Before a byte arrives: a guest that announces too much is refused at once.
        let received = self.received.checked_add(size).filter(|&sum| sum <= self.limits.bytes);
        self.received = received.ok_or(RecordError::TooManyBytes { limit: self.limits.bytes })?;
        let mode = mode & 0o7777;
        let host = self.host_stat(&path)?.filter(|stat| {
            let plain = tree::is_file(stat) && tree::size_of(stat) == size;
            plain && same_permissions(stat, mode)
        });
        let host = host.and_then(|_| self.tree.open_file(&path));
        self.open = Some(OpenFile { path, mode, size, modified_ns, offset: self.end, left: size, host });
        Ok(())
    }

    /// The next bytes of the open file.
    ///
    /// # Errors
    /// There is no open file, it has all its bytes, or the disk is full.
    pub fn data(&mut self, bytes: &[u8]) -> Result<(), RecordError> {
        let file = self.open.as_mut().ok_or(RecordError::Sequence)?;
        file.left = file.left.checked_sub(bytes.len() as u64).ok_or(RecordError::Sequence)?;
        if let Some(host) = &mut file.host {
            self.compare.resize(bytes.len(), 0);
            let same =
                tree::read_full(host, &mut self.compare).is_ok_and(|count| self.compare[..count] == *bytes);
            if !same {
                file.host = None;
            }
        }
        self.content.write_all(bytes).map_err(ChangeSetError::io(self.directory.path.join(CONTENT)))?;
        Ok(())
    }

    /// Ends the open file; after other kinds it does nothing.
    ///
    /// # Errors
    /// Bytes are missing.
    pub fn end_entry(&mut self) -> Result<(), RecordError> {
        let Some(file) = self.open.take() else { return Ok(()) };
        if file.left != 0 {
            return Err(RecordError::Sequence);
        }
        // The host's file may have grown since its size was looked at.
        let same_as_host =
            file.host.is_some_and(|mut host| matches!(tree::read_full(&mut host, &mut [0]), Ok(0)));
        if same_as_host {
            // Its bytes are overwritten by the next file's.
            let sought = self.content.seek(SeekFrom::Start(file.offset));
            sought.map_err(ChangeSetError::io(self.directory.path.join(CONTENT)))?;
        } else {
            self.end += file.size;
        }
        let OpenFile { path, mode, size, modified_ns, offset, .. } = file;
        self.entries.insert(path, Pending::File { mode, size, modified_ns, offset, same_as_host });
        Ok(())
    }

    /// Compares with the host, and keeps the set on disk.
    ///
    /// # Errors
    /// A file is incomplete, entries contradict each other, or the disk is full.
    pub fn finish(mut self) -> Result<ChangeSet, RecordError> {
        if self.open.is_some() {
            return Err(RecordError::Sequence);
        }
        self.check_places()?;
        self.expand_removals()?;
        for (path, pending) in std::mem::take(&mut self.entries) {
            let host = self.host_stat(&path)?;
            let Some(change) = self.change(&path, pending, host.as_ref()) else { continue };
            let status = match (&change, &host) {
                (ChangeKind::Removed { .. }, _) => ChangeStatus::Removed,
                (_, Some(_)) => ChangeStatus::Modified,
                (_, None) => ChangeStatus::Added,
            };
            let base = (self.origin.base)(path.as_path());
            let id = u32::try_from(self.manifest.entries.len()).unwrap_or(u32::MAX);
            self.manifest.entries.push(Change { id, path, status, change, base });
        }
        let Self { mut directory, content, end, manifest, .. } = self;
        let io = |error| RecordError::Set(ChangeSetError::io(directory.path.join(CONTENT))(error));
        let content = content.into_inner().map_err(|error| io(error.into_error()))?;
        content.set_len(end).map_err(io)?;
        let handle = File::open(&directory.path).map_err(io)?;
        let set = ChangeSet::create(directory.path.clone(), handle, content, manifest)?;
        directory.finished = true;
        Ok(set)
    }

    /// What remains of an entry beside the host's present state; `None` if nothing.
    fn change(&self, path: &RelativePath, pending: Pending, host: Option<&Stat>) -> Option<ChangeKind> {
        let kind = match pending {
            Pending::File { same_as_host: true, .. } => return None,
            Pending::File { mode, size, modified_ns, offset, .. } => {
                ChangeKind::File { size, mode, modified_ns, offset }
            }
            Pending::Directory { mode, .. } => {
                if host.is_some_and(|stat| tree::is_directory(stat) && same_permissions(stat, mode)) {
                    return None;
                }
                ChangeKind::Directory { mode }
            }
            Pending::Symlink { target } => {
                let link = host.filter(|stat| tree::is_symlink(stat)).and_then(|_| self.tree.read_link(path));
                if link.as_ref() == Some(&target) {
                    return None;
                }
                ChangeKind::Symlink { target: std::ffi::OsString::from_vec(target).into() }
            }
            Pending::Removed => ChangeKind::Removed { directory: tree::is_directory(host?) },
            // A node of the host's own, touched: neither side can be compared or applied.
            Pending::Special if host.is_some_and(tree::is_special) => return None,
            Pending::Special => ChangeKind::Special,
        };
        Some(kind)
    }

    /// Below a path that was sent there can only be something if the path is a directory.
    fn check_places(&self) -> Result<(), RecordError> {
        let mut leaf: Option<&RelativePath> = None;
        for (path, pending) in &self.entries {
            if leaf.is_some_and(|leaf| path.as_path().starts_with(leaf.as_path())) {
                return Err(RecordError::Misplaced { path: path.clone() });
            }
            if !matches!(pending, Pending::Directory { .. }) {
                leaf = Some(path);
            }
        }
        Ok(())
    }

    /// Names every host path that a removed, replaced or opaque directory takes with it.
    fn expand_removals(&mut self) -> Result<(), RecordError> {
        let hides = |pending: &Pending| !matches!(pending, Pending::Directory { opaque: false, .. });
        let roots: Vec<RelativePath> =
            self.entries.iter().filter(|(_, pending)| hides(pending)).map(|(path, _)| path.clone()).collect();
        let mut done: Option<RelativePath> = None;
        for root in roots {
            // What is below an opaque directory was walked with it.
            if done.as_ref().is_some_and(|done| root.as_path().starts_with(done.as_path())) {
                continue;
            }
            if self.host_stat(&root)?.is_some_and(|stat| tree::is_directory(&stat)) {
                self.remove_below(&root)?;
                done = Some(root);
            }
        }
        Ok(())
    }

    fn remove_below(&mut self, root: &RelativePath) -> Result<(), RecordError> {
        let walked = self.tree.walk(root, self.limits.entries);
        let walked =
            walked.map_err(|source| RecordError::Workspace { path: root.as_path().to_owned(), source })?;
        let walked = walked.ok_or(RecordError::TooManyEntries { limit: self.limits.entries })?;
        for (path, _) in walked {
            if !(self.origin.visible)(path.as_path()) {
                continue;
            }
            self.check_count()?;
            if let Entry::Vacant(vacant) = self.entries.entry(path) {
                vacant.insert(Pending::Removed);
            }
        }
        Ok(())
    }

    fn check_count(&self) -> Result<(), RecordError> {
        if self.entries.len() >= self.limits.entries {
            return Err(RecordError::TooManyEntries { limit: self.limits.entries });
        }
        Ok(())
    }

    fn host_stat(&self, path: &RelativePath) -> Result<Option<Stat>, RecordError> {
        let stat = self.tree.stat(path);
        stat.map_err(|source| RecordError::Workspace { path: path.as_path().to_owned(), source })
    }
}

/// Equal in what `apply` would set; a set-id bit alone is no change, because it is never applied.
fn same_permissions(stat: &Stat, mode: u32) -> bool {
    stat.st_mode & PERMISSIONS == mode & PERMISSIONS
}

/// A hostile name, short enough for an error message.
fn excerpt(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(100)]).into_owned()
}
