//! The served tree on the host, reached from one descriptor and never left.
//!
//! Every path is resolved by `openat2` with `RESOLVE_BENEATH` and no symlink followed, the last component
//! included, so that neither a guest nor a host process that swaps directories for symlinks meanwhile can
//! lead outside. Files are first opened with `O_PATH`, which touches nothing, and opened for good only when
//! they proved to be regular: a FIFO cannot hang the server and a device is never woken.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::nodes::Identity;

/// A tree and the means to reach into it.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
    root_stat: Stat,
    /// `/proc/self/fd`, through which an `O_PATH` descriptor is opened for good.
    descriptors: OwnedFd,
}

impl Tree {
    /// Opens the directory `root`. Its path had no symlinks when it was chosen; one that is there now may be a guest's,
    /// which could write above it, and is not followed.
    pub(super) fn open(root: &Path) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let root = rustix::fs::openat2(rustix::fs::CWD, root, flags, Mode::empty(), resolve)?;
        let root_stat = rustix::fs::fstat(&root)?;
        let descriptors = rustix::fs::open("/proc/self/fd", flags, Mode::empty())?;
        Ok(Self { root, root_stat, descriptors })
    }

    pub(super) fn root_identity(&self) -> Identity {
        Identity::of(&self.root_stat)
    }

    /// An `O_PATH` descriptor of `path`, which is relative to the root; empty is the root itself.
    pub(super) fn at(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let path = if path.is_empty() { b"." } else { path };
        rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve).map_err(|errno| match errno {
            // An ancestor is no directory any more: the guest shall look again.
            Errno::LOOP | Errno::XDEV | Errno::NOTDIR | Errno::AGAIN => Errno::STALE,
            other => other,
        })
    }

    /// `lstat` of a path, for judging alone: what lies above its last name is not checked for symlinks.
    pub(super) fn stat(&self, path: &[u8]) -> Result<Stat, Errno> {
        stat_entry(&self.root, path)
    }

    /// Opens for good what `descriptor` (`O_PATH`, regular) stands for.
    pub(super) fn reopen(&self, descriptor: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let name = number(descriptor.as_fd());
        let safe = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        rustix::fs::openat(&self.descriptors, name, flags | safe, Mode::empty())
    }

    /// Opens the directory that `descriptor` stands for, to list it.
    pub(super) fn reopen_directory(&self, descriptor: impl AsFd) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(descriptor, c".", flags, Mode::empty())
    }

    /// Changes the permission bits of what `descriptor` (which may be `O_PATH`, never of a symlink) stands for.
    pub(super) fn change_mode(&self, descriptor: impl AsFd, mode: Mode) -> Result<(), Errno> {
        rustix::fs::chmodat(&self.descriptors, number(descriptor.as_fd()), mode, AtFlags::empty())
    }

    /// Gives what `descriptor` stands for (never a directory) one more name. A symlink is linked itself.
    pub(super) fn link(&self, descriptor: impl AsFd, directory: impl AsFd, name: &[u8]) -> Result<(), Errno> {
        let source = number(descriptor.as_fd());
        rustix::fs::linkat(&self.descriptors, source, directory, name, AtFlags::SYMLINK_FOLLOW)
    }

    /// A number for `stat`'s inode that is unique in the whole tree, whichever file systems it spans.
    pub(super) fn inode(&self, stat: &Stat) -> u64 {
        if stat.st_dev == self.root_stat.st_dev {
            return stat.st_ino;
        }
        // The upper bits of inode numbers are hardly ever used: the device, well mixed, goes there.
        stat.st_ino ^ (stat.st_dev.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) & !0xffff_ffff)
    }
}

/// `lstat` of the entry `name` of an open directory. `name` contains no slash and is not `..`.
pub(super) fn stat_entry(directory: impl AsFd, name: &[u8]) -> Result<Stat, Errno> {
    rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT)
}

/// The type bits of a mode.
pub(super) fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn number(descriptor: BorrowedFd<'_>) -> String {
    descriptor.as_raw_fd().to_string()
}
