//! The change set: what a guest changed in a copy-on-write workspace, kept on the host until taken or dropped.
//!
//! On disk it is a directory of ours, 0700, where no name comes from a guest:
//!
//! ```text
//! <set>/changes.json   manifest, replaced by rename
//! <set>/content        the bytes of all changed files, one after the other; the manifest has offset and size
//! <set>/applying       there while an apply is under way; found later, that apply died
//! ```
//!
//! One file for all contents, because a set of 100 000 small files is then made durable by one `fsync`.
//! [`ChangeRecorder`](super::ChangeRecorder) writes a set, [`apply`](super::apply()) takes entries out of it.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::path::os_text;
use super::{Base, RelativePath};

const MANIFEST: &str = "changes.json";
const MANIFEST_NEW: &str = "changes.json.new";
pub(super) const CONTENT: &str = "content";
const APPLYING: &str = "applying";
const VERSION: u32 = 1;

/// What a path is to become.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ChangeKind {
    /// A regular file with new content, permissions, or both.
    File {
        /// Bytes.
        size: u64,
        /// Permission bits as the guest set them, set-id and sticky included; those are never applied.
        mode: u32,
        /// Last modification by the guest's clock, nanoseconds since the epoch.
        modified_ns: i64,
        /// Where the bytes begin in the set's content file.
        offset: u64,
    },
    /// A new directory, or new permissions of one.
    Directory {
        /// Permission bits as the guest set them.
        mode: u32,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points, as stored; not checked.
        #[serde(with = "os_text")]
        target: PathBuf,
    },
    /// Nothing.
    Removed {
        /// It was a directory on the host.
        directory: bool,
    },
    /// A device node, FIFO or socket: shown, never applied.
    Special,
}

/// What a change does to the host, when the set was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeStatus {
    /// The host has nothing at the path.
    Added,
    /// The host has something else at the path.
    Modified,
    /// The path is gone in the guest.
    Removed,
}

/// One changed path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Number in its set; stays when others are taken out.
    pub id: u32,
    /// Relative to the workspace.
    pub path: RelativePath,
    /// What it does to the host.
    pub status: ChangeStatus,
    /// What the path is to become.
    pub change: ChangeKind,
    /// What the path was when the guest first saw it; `None` if it never did.
    pub base: Option<Base>,
}

/// How much a set changes. Directories count apart: one more or less is not what people mean by a changed file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeSummary {
    /// Files and links new to the host.
    pub added: usize,
    /// Files and links that differ from the host's.
    pub modified: usize,
    /// Files and links that are gone.
    pub removed: usize,
    /// Directories made, removed or with new permissions.
    pub directories: usize,
}

impl ChangeSummary {
    /// All changed paths, directories included.
    pub fn total(&self) -> usize {
        self.added + self.modified + self.removed + self.directories
    }
}

impl std::fmt::Display for ChangeSummary {
    /// One line, such as `3 files changed`.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let files = self.added + self.modified + self.removed;
        match (files, self.directories) {
            (0, 0) => formatter.write_str("no files changed"),
            (0, 1) => formatter.write_str("1 directory changed"),
            (0, count) => write!(formatter, "{count} directories changed"),
            (1, _) => formatter.write_str("1 file changed"),
            (count, _) => write!(formatter, "{count} files changed"),
        }
    }
}

/// A set on disk could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ChangeSetError {
    /// The file system refused.
    #[error("cannot use the change set at {}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The manifest is not what this program writes.
    #[error("change set at {} is damaged", path.display())]
    Damaged {
        /// The manifest.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A later version of the program wrote it.
    #[error("change set at {} has format {found}, this program knows up to {VERSION}", path.display())]
    Newer {
        /// The manifest.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
}

impl ChangeSetError {
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// There is no set at the place, as opposed to one that cannot be read.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Io { .. } => None,
            Self::Damaged { .. } => {
                Some("the set cannot be applied; run the command again to make a new one")
            }
            Self::Newer { .. } => Some("upgrade agentkernel"),
        }
    }
}

/// The manifest, as stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) version: u32,
    /// Random; part of the names of temporary files in the workspace, which nobody else can guess.
    pub(super) id: String,
    #[serde(with = "os_text")]
    pub(super) workspace: PathBuf,
    pub(super) sandbox: String,
    pub(super) created_unix_ms: u64,
    pub(super) entries: Vec<Change>,
}

impl Manifest {
    pub(super) fn new(workspace: &Path, sandbox: &str) -> io::Result<Self> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            version: VERSION,
            id: random_hex()?,
            workspace: workspace.to_owned(),
            sandbox: sandbox.to_owned(),
            created_unix_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            entries: Vec::new(),
        })
    }
}

/// 128 random bits as text.
pub(super) fn random_hex() -> io::Result<String> {
    let mut bytes = [0_u8; 16];
    let count = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    if count != bytes.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
}

/// How often, and how far apart, a lock is tried before it counts as held.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: std::time::Duration = std::time::Duration::from_millis(20);

/// A recorded set of changes, sorted by path.
#[derive(Debug)]
pub struct ChangeSet {
    directory: PathBuf,
    /// The same, open: another set may take over the name at any time, and must not get this one's manifest.
    handle: File,
    content: File,
    pub(super) manifest: Manifest,
}

impl ChangeSet {
    /// Puts a freshly recorded set together and makes it durable.
    pub(super) fn create(
        directory: PathBuf,
        handle: File,
        content: File,
        manifest: Manifest,
    ) -> Result<Self, ChangeSetError> {
        content.sync_all().map_err(ChangeSetError::io(directory.join(CONTENT)))?;
        let set = Self { directory, handle, content, manifest };
        set.save()?;
        Ok(set)
    }

    /// Reads the set kept in `directory`.
    ///
    /// # Errors
    /// [`ChangeSetError::is_absent`] if there is none; otherwise it cannot be read or used.
    pub fn load(directory: &Path) -> Result<Self, ChangeSetError> {
        let handle = File::open(directory).map_err(ChangeSetError::io(directory))?;
        let manifest = read_manifest(&handle, directory)?;
        let content = open_in(&handle, CONTENT, OFlags::RDWR);
        let content = content.map_err(ChangeSetError::io(directory.join(CONTENT)))?;
        Ok(Self { directory: directory.to_owned(), handle, content, manifest })
    }

    /// Reads the entries again, which another process may have taken out.
    pub(super) fn reload(&mut self) -> Result<(), ChangeSetError> {
        self.manifest = read_manifest(&self.handle, &self.directory)?;
        Ok(())
    }

    /// Takes the set for one process until the file is closed; `None` if another has it.
    pub(super) fn lock(&self) -> Result<Option<File>, ChangeSetError> {
        let lock = || -> io::Result<Option<File>> {
            let file = open_in(&self.handle, CONTENT, OFlags::RDONLY)?;
            // A process that another one just started still has copies of that one's descriptors, until its exec: a lock
            // that was let go may look held for a moment.
            for _ in 0..LOCK_TRIES {
                match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                    Ok(()) => return Ok(Some(file)),
                    Err(Errno::WOULDBLOCK) => std::thread::sleep(LOCK_PAUSE),
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(None)
        };
        lock().map_err(ChangeSetError::io(self.directory.join(CONTENT)))
    }

    /// Whether an apply was begun and not ended.
    pub(super) fn is_applying(&self) -> bool {
        rustix::fs::statat(&self.handle, APPLYING, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// The same of the set in `directory`, without reading it.
    pub(super) fn is_applying_in(directory: &Path) -> bool {
        directory.join(APPLYING).symlink_metadata().is_ok()
    }

    /// Notes that an apply begins or ends.
    pub(super) fn set_applying(&self, applying: bool) -> Result<(), ChangeSetError> {
        let set = || match applying {
            true => open_in(&self.handle, APPLYING, OFlags::WRONLY | OFlags::CREATE)
                .and_then(|_| self.handle.sync_all()),
            false => match rustix::fs::unlinkat(&self.handle, APPLYING, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(error) => Err(error.into()),
            },
        };
        set().map_err(ChangeSetError::io(self.directory.join(APPLYING)))
    }

    /// Writes the manifest: the old one stays until the new one is complete.
    pub(super) fn save(&self) -> Result<(), ChangeSetError> {
        self.write_manifest().map_err(ChangeSetError::io(self.directory.join(MANIFEST_NEW)))
    }

    fn write_manifest(&self) -> io::Result<()> {
        let file = open_in(&self.handle, MANIFEST_NEW, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC)?;
        let mut writer = BufWriter::new(file);
        serde_json::to_writer(&mut writer, &self.manifest)?;
        writer.flush()?;
        writer.get_ref().sync_all()?;
        rustix::fs::renameat(&self.handle, MANIFEST_NEW, &self.handle, MANIFEST)?;
        self.handle.sync_all()
    }

    /// Takes entries out for good and frees what their contents occupied.
    pub(super) fn take_out(&mut self, gone: impl Fn(&Change) -> bool) -> Result<(), ChangeSetError> {
        let (taken, kept): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.manifest.entries).into_iter().partition(gone);
        self.manifest.entries = kept;
        if !taken.is_empty() {
            self.save()?;
        }
        taken.iter().for_each(|change| self.free(change));
        Ok(())
    }

    fn free(&self, change: &Change) {
        use rustix::fs::FallocateFlags;
        if let ChangeKind::File { size: size @ 1.., offset, .. } = change.change {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Only space: a file system without holes gives it back when the set goes.
            let _ = rustix::fs::fallocate(&self.content, flags, offset, size);
        }
    }

    /// Deletes the set. The manifest goes first: a set without one does not exist.
    ///
    /// # Errors
    /// The directory cannot be removed.
    pub fn discard(self) -> Result<(), ChangeSetError> {
        // By the descriptor: meanwhile the name may belong to a newer set, which must not be touched.
        for name in [MANIFEST, MANIFEST_NEW, APPLYING, CONTENT] {
            match rustix::fs::unlinkat(&self.handle, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(ChangeSetError::io(self.directory)(error.into())),
            }
        }
        let _ = std::fs::remove_dir(&self.directory);
        Ok(())
    }

    /// The changes, sorted by path: a directory before what is in it.
    pub fn entries(&self) -> &[Change] {
        &self.manifest.entries
    }

    /// Nothing changed, or everything was taken.
    pub fn is_empty(&self) -> bool {
        self.manifest.entries.is_empty()
    }

    /// The host directory the changes are relative to.
    pub fn workspace(&self) -> &Path {
        &self.manifest.workspace
    }

    /// The sandbox that made them.
    pub fn sandbox(&self) -> &str {
        &self.manifest.sandbox
    }

    /// When the set was recorded, milliseconds since the epoch.
    pub fn created_unix_ms(&self) -> u64 {
        self.manifest.created_unix_ms
    }

    /// Where the set is kept.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The set moved there, whole.
    pub(super) fn moved_to(&mut self, directory: PathBuf) {
        self.directory = directory;
    }

    /// Counts the changes.
    pub fn summary(&self) -> ChangeSummary {
        let mut summary = ChangeSummary::default();
        for change in &self.manifest.entries {
            let directory = ChangeKind::Removed { directory: true };
            let count = match change.status {
                _ if matches!(change.change, ChangeKind::Directory { .. }) || change.change == directory => {
                    &mut summary.directories
                }
                ChangeStatus::Added => &mut summary.added,
                ChangeStatus::Modified => &mut summary.modified,
                ChangeStatus::Removed => &mut summary.removed,
            };
            *count += 1;
        }
        summary
    }

    /// The content of a changed file, from its beginning; nothing for other kinds.
    pub fn content(&self, change: &Change) -> ContentReader<'_> {
        let (offset, size) = match change.change {
            ChangeKind::File { offset, size, .. } => (offset, size),
            _ => (0, 0),
        };
        ContentReader { file: &self.content, offset, end: offset.saturating_add(size) }
    }
}

fn read_manifest(handle: &File, directory: &Path) -> Result<Manifest, ChangeSetError> {
    #[derive(Deserialize)]
    struct Header {
        version: u32,
    }
    let path = directory.join(MANIFEST);
    let mut text = Vec::new();
    let opened = open_in(handle, MANIFEST, OFlags::RDONLY).and_then(|mut file| file.read_to_end(&mut text));
    opened.map_err(ChangeSetError::io(&path))?;
    let damaged = |source| ChangeSetError::Damaged { path: path.clone(), source };
    let header: Header = serde_json::from_slice(&text).map_err(damaged)?;
    if header.version > VERSION {
        return Err(ChangeSetError::Newer { path, found: header.version });
    }
    serde_json::from_slice(&text).map_err(damaged)
}

fn open_in(directory: &File, name: &str, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR)?))
}

/// Removes a set's directory; one that is gone already is no error.
pub(super) fn remove_set(directory: &Path) -> io::Result<()> {
    let absent_is_fine = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    absent_is_fine(std::fs::remove_file(directory.join(MANIFEST)))?;
    absent_is_fine(std::fs::remove_dir_all(directory))
}

/// Reads one file's bytes out of a set.
#[derive(Debug)]
pub struct ContentReader<'a> {
    file: &'a File,
    offset: u64,
    end: u64,
}

impl Read for ContentReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.offset).unwrap_or(usize::MAX);
        let wanted = left.min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let count = self.file.read_at(&mut buffer[..wanted], self.offset)?;
        if count == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the change set's content is cut off"));
        }
        self.offset += count as u64;
        Ok(count)
    }
}
