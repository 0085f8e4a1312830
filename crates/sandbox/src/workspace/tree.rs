//! The host's workspace, reached from its directory descriptor only.
//!
//! Nothing here follows a symbolic link or leaves the workspace: parents are opened with `openat2`, last names are
//! used with the parent's descriptor. A directory that is swapped for a link meanwhile is noticed by the kernel.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::{Base, RelativePath};

/// Permission bits that a change set may set: no set-id, no sticky.
pub(super) const PERMISSIONS: u32 = 0o777;
const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// An open workspace.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
}

/// Why a path's directory cannot be used.
#[derive(Debug)]
pub(super) enum ParentError {
    /// It does not exist.
    Missing,
    /// It, or a directory above it, is a symbolic link.
    Symlink,
    /// It, or a directory above it, is a file.
    NotDirectory,
    /// The host refused.
    Io(io::Error),
}

impl Tree {
    /// Opens the workspace at `root`, whose path had no symlinks when it was chosen; none is followed now.
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        Ok(Self { root: rustix::fs::openat2(rustix::fs::CWD, root, flags, Mode::empty(), resolve)? })
    }

    fn open_beneath(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        for _ in 0..16 {
            match rustix::fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                // Somebody renamed a directory while the kernel walked.
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
        Err(Errno::AGAIN)
    }

    /// The directory that `path` is in.
    pub(super) fn parent(&self, path: &RelativePath) -> Result<OwnedFd, ParentError> {
        let parent = path.parent().unwrap_or(Path::new(""));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        self.open_beneath(parent, flags).map_err(|error| match error {
            Errno::NOENT => ParentError::Missing,
            // With O_NOFOLLOW a link as the last name is "not a directory" to the kernel.
            Errno::NOTDIR if self.has_symlink(parent) => ParentError::Symlink,
            Errno::NOTDIR => ParentError::NotDirectory,
            Errno::LOOP | Errno::XDEV => ParentError::Symlink,
            other => ParentError::Io(other.into()),
        })
    }

    fn has_symlink(&self, path: &Path) -> bool {
        match self.open_beneath(path, OFlags::PATH | OFlags::NOFOLLOW) {
            Ok(file) => rustix::fs::fstat(&file).is_ok_and(|stat| is_symlink(&stat)),
            Err(error) => error == Errno::LOOP,
        }
    }

    /// What is at `path`; a path behind a link, a file or nothing is absent.
    pub(super) fn stat(&self, path: &RelativePath) -> io::Result<Option<Stat>> {
        match self.parent(path) {
            Ok(parent) => stat_in(&parent, path.name()),
            Err(ParentError::Io(error)) => Err(error),
            Err(_) => Ok(None),
        }
    }

    /// Opens a regular file for reading; `None` if there is none that can be read.
    pub(super) fn open_file(&self, path: &RelativePath) -> Option<File> {
        // O_NONBLOCK: the path may have become a FIFO since it was looked at.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = self.open_beneath(path.as_path(), flags).ok()?;
        rustix::fs::fstat(&file).is_ok_and(|stat| is_file(&stat)).then(|| File::from(file))
    }

    /// The target of a symbolic link; `None` if there is no link.
    pub(super) fn read_link(&self, path: &RelativePath) -> Option<Vec<u8>> {
        let parent = self.parent(path).ok()?;
        let target = rustix::fs::readlinkat(&parent, path.name(), Vec::new()).ok()?;
        Some(target.into_bytes())
    }

    /// The names in directory `path` (empty: the workspace), sorted.
    pub(super) fn list(&self, path: &Path) -> io::Result<Vec<std::ffi::OsString>> {
        let directory = self.open_beneath(path, OFlags::RDONLY | DIRECTORY)?;
        let mut names = Vec::new();
        for entry in Dir::new(directory)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(std::ffi::OsString::from_vec(name));
            }
        }
        names.sort();
        Ok(names)
    }

    /// Opens directory `path` so that its permissions can be set.
    pub(super) fn open_directory(&self, path: &RelativePath) -> io::Result<OwnedFd> {
        Ok(self.open_beneath(path.as_path(), OFlags::RDONLY | DIRECTORY)?)
    }

    /// Everything below directory `path`, without following links, parents first, at most `limit` paths.
    pub(super) fn walk(
        &self,
        path: &RelativePath,
        limit: usize,
    ) -> io::Result<Option<Vec<(RelativePath, Stat)>>> {
        let mut found = Vec::new();
        let mut pending = vec![path.clone()];
        while let Some(directory) = pending.pop() {
            for name in self.list(directory.as_path())? {
                // Longer than PATH_MAX: the guest cannot have named it either.
                let Ok(child) = directory.join(&name) else { continue };
                let Some(stat) = self.stat(&child)? else { continue };
                if found.len() == limit {
                    return Ok(None);
                }
                if is_directory(&stat) {
                    pending.push(child.clone());
                }
                found.push((child, stat));
            }
        }
        Ok(Some(found))
    }

    /// Makes the names in directory `path` durable; a directory that is gone needs nothing.
    pub(super) fn sync_directory(&self, path: &Path) -> io::Result<()> {
        match self.open_beneath(path, OFlags::RDONLY | DIRECTORY) {
            Ok(directory) => Ok(rustix::fs::fsync(directory)?),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// What is called `name` in `parent`.
pub(super) fn stat_in(parent: impl AsFd, name: &OsStr) -> io::Result<Option<Stat>> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

pub(super) fn is_file(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
}

pub(super) fn is_symlink(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Symlink
}

/// A device node, FIFO or socket.
pub(super) fn is_special(stat: &Stat) -> bool {
    !is_file(stat) && !is_directory(stat) && !is_symlink(stat)
}

/// The size as an unsigned number; the kernel never reports a negative one.
pub(super) fn size_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

impl Base {
    /// Takes the base from a `stat` result.
    pub(super) fn of_stat(stat: &Stat) -> Self {
        let directory = is_directory(stat);
        let time = |seconds: i64, nanoseconds: i128| {
            if directory { 0 } else { i128::from(seconds) * 1_000_000_000 + nanoseconds }
        };
        Self {
            inode: stat.st_ino,
            mode: stat.st_mode,
            size: if directory { 0 } else { size_of(stat) },
            modified_ns: time(stat.st_mtime, i128::from(stat.st_mtime_nsec)),
            changed_ns: time(stat.st_ctime, i128::from(stat.st_ctime_nsec)),
        }
    }

    /// The same version of the same file, apart from its last status change, which a rename moves.
    pub(super) fn same_object(&self, stat: &Stat) -> bool {
        Self { changed_ns: 0, ..*self } == Self { changed_ns: 0, ..Self::of_stat(stat) }
    }
}

/// Whether both readers give the same bytes to their ends.
pub(super) fn same_content(mut left: impl Read, mut right: impl Read) -> io::Result<bool> {
    let mut left_buffer = vec![0; 64 * 1024];
    let mut right_buffer = vec![0; 64 * 1024];
    loop {
        let count = read_full(&mut left, &mut left_buffer)?;
        if read_full(&mut right, &mut right_buffer)? != count || left_buffer[..count] != right_buffer[..count]
        {
            return Ok(false);
        }
        if count < left_buffer.len() {
            return Ok(true);
        }
    }
}

/// Reads until the buffer is full or the source ends.
pub(super) fn read_full(mut source: impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Where a link at `path` with this target leads, as far as names tell; `None` if that is, or may be, outside.
///
/// The link's own directory holds no links, so leading `..` are exact. A `..` behind a name may step out of another
/// link's target, and is not trusted.
pub(super) fn link_destination(path: &RelativePath, target: &[u8]) -> Option<PathBuf> {
    if target.starts_with(b"/") {
        return None;
    }
    let mut destination = path.parent().unwrap_or(Path::new("")).to_owned();
    let mut named = false;
    for component in target.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." if named || !destination.pop() => return None,
            b".." => {}
            name => {
                named = true;
                destination.push(OsStr::from_bytes(name));
            }
        }
    }
    Some(destination)
}
