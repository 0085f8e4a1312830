//! Puts one change in place, atomically, and never loses what was there.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;

use super::super::changes::{Change, ChangeKind, ChangeSet};
use super::super::tree::{self, PERMISSIONS, Tree};
use super::super::{Base, RelativePath};
use super::examine::Spot;
use super::{ApplyAction, ConflictReason, Outcome};

/// The name a change is prepared under, in the directory it goes to.
pub(super) fn temporary_name(set: &ChangeSet, change: &Change) -> String {
    format!(".agentkernel-{}-{}", set.manifest.id, change.id)
}

/// Makes the change where `examine` found that it may be made.
pub(super) fn place(tree: &Tree, set: &ChangeSet, change: &Change, spot: &Spot) -> Outcome {
    let Some(parent) = &spot.parent else {
        return io::Error::from(io::ErrorKind::NotFound).into();
    };
    let temporary = temporary_name(set, change);
    let site = Site { parent, name: change.path.name(), temporary: OsStr::new(&temporary) };
    match (&change.change, &spot.present) {
        (ChangeKind::Removed { .. }, Some(stat)) => site.remove(change, stat),
        (ChangeKind::Directory { mode }, Some(stat)) if tree::is_directory(stat) => {
            match set_directory_mode(tree, &change.path, mode | 0o700) {
                Ok(base) => Outcome::Applied(ApplyAction::Modified, base),
                Err(error) => error.into(),
            }
        }
        (_, present) => match Staged::new(&site, set, change) {
            Ok(staged) => staged.publish(change, present.as_ref()),
            Err(error) => error.into(),
        },
    }
}

/// A directory's permissions, after all that goes into it is there. Set-id bits of the host's own are kept.
pub(super) fn finish_directory(tree: &Tree, path: &RelativePath, mode: u32) -> io::Result<Option<Base>> {
    set_directory_mode(tree, path, mode)
}

fn set_directory_mode(tree: &Tree, path: &RelativePath, mode: u32) -> io::Result<Option<Base>> {
    let Some(stat) = tree.stat(path)?.filter(tree::is_directory) else { return Ok(None) };
    let wanted = stat.st_mode & 0o7000 | mode & PERMISSIONS;
    if stat.st_mode & 0o7777 == wanted {
        return Ok(Some(Base::of_stat(&stat)));
    }
    let directory = tree.open_directory(path)?;
    rustix::fs::fchmod(&directory, Mode::from_raw_mode(wanted))?;
    Ok(Some(Base::of_stat(&rustix::fs::fstat(&directory)?)))
}

/// A name in an open directory, and the temporary one beside it.
#[derive(Clone, Copy)]
pub(super) struct Site<'a> {
    pub(super) parent: &'a OwnedFd,
    pub(super) name: &'a OsStr,
    pub(super) temporary: &'a OsStr,
}

impl Site<'_> {
    pub(super) fn stat_name(&self) -> io::Result<Option<Stat>> {
        tree::stat_in(self.parent, self.name)
    }

    pub(super) fn stat_temporary(&self) -> io::Result<Option<Stat>> {
        tree::stat_in(self.parent, self.temporary)
    }

    fn rename(&self, from: &OsStr, to: &OsStr, flags: RenameFlags) -> Result<(), Errno> {
        rustix::fs::renameat_with(self.parent, from, self.parent, to, flags)
    }

    /// Swaps the two names.
    pub(super) fn exchange(&self) -> Result<(), Errno> {
        self.rename(self.temporary, self.name, RenameFlags::EXCHANGE)
    }

    /// Gives what has the temporary name its own, if that is free.
    pub(super) fn settle(&self) -> Result<(), Errno> {
        match self.rename(self.temporary, self.name, RenameFlags::NOREPLACE) {
            // A file system without the flag: the check and the rename are two steps there.
            Err(Errno::INVAL | Errno::NOSYS) => match self.stat_name() {
                Ok(None) => self.rename(self.temporary, self.name, RenameFlags::empty()),
                _ => Err(Errno::EXIST),
            },
            other => other,
        }
    }

    /// Deletes what has the temporary name: a file, a link or an empty directory.
    pub(super) fn delete_temporary(&self) -> Result<(), Errno> {
        match rustix::fs::unlinkat(self.parent, self.temporary, AtFlags::empty()) {
            Err(Errno::ISDIR | Errno::PERM) => {
                rustix::fs::unlinkat(self.parent, self.temporary, AtFlags::REMOVEDIR)
            }
            other => other,
        }
    }

    /// Removes what the host has, which is what the guest saw.
    fn remove(&self, change: &Change, present: &Stat) -> Outcome {
        if tree::is_directory(present) {
            // The kernel refuses unless it is empty: nothing can be lost.
            return match rustix::fs::unlinkat(self.parent, self.name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => Outcome::Applied(ApplyAction::Removed, None),
                Err(Errno::NOTEMPTY | Errno::EXIST) => Outcome::Conflict(ConflictReason::DirectoryNotEmpty),
                Err(Errno::NOTDIR) => Outcome::Conflict(ConflictReason::ChangedOnHost),
                Err(error) => io::Error::from(error).into(),
            };
        }
        // Out of the way first, and looked at again where nobody else reaches it.
        match self.rename(self.name, self.temporary, RenameFlags::NOREPLACE) {
            Ok(()) => self.delete_moved(change),
            Err(Errno::NOENT) => Outcome::Applied(ApplyAction::Removed, None),
            Err(Errno::INVAL | Errno::NOSYS) => {
                match rustix::fs::unlinkat(self.parent, self.name, AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => Outcome::Applied(ApplyAction::Removed, None),
                    Err(error) => io::Error::from(error).into(),
                }
            }
            Err(error) => io::Error::from(error).into(),
        }
    }

    fn delete_moved(&self, change: &Change) -> Outcome {
        let moved = match self.stat_temporary() {
            Ok(Some(stat)) => stat,
            Ok(None) => return Outcome::Applied(ApplyAction::Removed, None),
            Err(error) => return error.into(),
        };
        let known = change.base.is_some_and(|base| base.same_object(&moved));
        let deleted = if known { self.delete_temporary() } else { Err(Errno::EXIST) };
        match deleted {
            Ok(()) => Outcome::Applied(ApplyAction::Removed, None),
            Err(error) => match self.settle() {
                Ok(()) if known => io::Error::from(error).into(),
                Ok(()) => Outcome::Conflict(ConflictReason::ChangedOnHost),
                Err(error) => self.left_over(error),
            },
        }
    }

    /// The host wrote the name again while we held its former version: both are kept.
    fn left_over(&self, error: Errno) -> Outcome {
        let place = self.temporary.to_string_lossy();
        io::Error::new(io::Error::from(error).kind(), format!("the host's version was kept as {place}"))
            .into()
    }
}

/// A new version under its temporary name; deleted again unless published.
struct Staged<'a> {
    site: Site<'a>,
    /// What the name stood for when it was made.
    handle: OwnedFd,
    finished: bool,
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        if !self.finished && self.is_ours() {
            let _ = self.site.delete_temporary();
        }
    }
}

impl<'a> Staged<'a> {
    fn new(site: &Site<'a>, set: &ChangeSet, change: &Change) -> io::Result<Self> {
        match &change.change {
            ChangeKind::File { mode, .. } => Self::file(site, set, change, *mode),
            ChangeKind::Directory { mode } => {
                rustix::fs::mkdirat(site.parent, site.temporary, Mode::RWXU)?;
                let staged = Self::opened(site)?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let directory = rustix::fs::openat(site.parent, site.temporary, flags, Mode::empty())?;
                let inherited = rustix::fs::fstat(&directory)?.st_mode & 0o7000;
                // Open to us until its content is there; `finish_directory` sets the rest.
                let mode = inherited | mode & PERMISSIONS | 0o700;
                rustix::fs::fchmod(&directory, Mode::from_raw_mode(mode))?;
                Ok(staged)
            }
            ChangeKind::Symlink { target } => {
                rustix::fs::symlinkat(target, site.parent, site.temporary)?;
                Self::opened(site)
            }
            ChangeKind::Removed { .. } | ChangeKind::Special => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn file(site: &Site<'a>, set: &ChangeSet, change: &Change, mode: u32) -> io::Result<Self> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(site.parent, site.temporary, flags, Mode::RUSR | Mode::WUSR)?;
        let staged = Self { site: *site, handle: file, finished: false };
        let mut file = File::from(staged.handle.try_clone()?);
        copy(set, change, &mut file)?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & PERMISSIONS))?;
        file.sync_all()?;
        Ok(staged)
    }

    fn opened(site: &Site<'a>) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let handle = rustix::fs::openat(site.parent, site.temporary, flags, Mode::empty())?;
        Ok(Self { site: *site, handle, finished: false })
    }

    /// The temporary name still stands for what we made.
    fn is_ours(&self) -> bool {
        let ours = rustix::fs::fstat(&self.handle);
        let there = self.site.stat_temporary();
        matches!((ours, there), (Ok(ours), Ok(Some(there))) if (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino))
    }

    fn publish(mut self, change: &Change, present: Option<&Stat>) -> Outcome {
        if present.is_none() {
            return match self.site.settle() {
                Ok(()) => self.done(ApplyAction::Created),
                Err(Errno::EXIST) => Outcome::Conflict(ConflictReason::ExistsOnHost),
                Err(error) => io::Error::from(error).into(),
            };
        }
        match self.unchanged(change) {
            Ok(true) => {}
            Ok(false) => return Outcome::Conflict(ConflictReason::ChangedOnHost),
            Err(error) => return error.into(),
        }
        match self.site.exchange() {
            Ok(()) => self.delete_displaced(change),
            Err(Errno::NOENT) => Outcome::Conflict(ConflictReason::RemovedOnHost),
            Err(Errno::INVAL | Errno::NOSYS) => self.replace(change),
            Err(error) => io::Error::from(error).into(),
        }
    }

    fn unchanged(&self, change: &Change) -> io::Result<bool> {
        let present = self.site.stat_name()?;
        Ok(present.is_some_and(|stat| change.base == Some(Base::of_stat(&stat))))
    }

    /// The host's version has the temporary name now.
    fn delete_displaced(&mut self, change: &Change) -> Outcome {
        let displaced = match self.site.stat_temporary() {
            Ok(displaced) => displaced,
            Err(error) => return error.into(),
        };
        let Some(displaced) = displaced else { return self.done(ApplyAction::Modified) };
        let reason = if change.base.is_some_and(|base| base.same_object(&displaced)) {
            match self.site.delete_temporary() {
                Ok(()) => return self.done(ApplyAction::Modified),
                Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(ConflictReason::DirectoryNotEmpty),
                Err(error) => Err(error),
            }
        } else {
            Ok(ConflictReason::ChangedOnHost)
        };
        match (self.site.exchange(), reason) {
            (Err(error), _) => self.site.left_over(error),
            // The drop deletes our version, unless the host wrote yet another one in between.
            (Ok(()), _) if !self.is_ours() => self.site.left_over(Errno::BUSY),
            (Ok(()), Ok(reason)) => Outcome::Conflict(reason),
            (Ok(()), Err(error)) => io::Error::from(error).into(),
        }
    }

    /// Without exchange: the last look and the rename are two steps, and a change of type needs three.
    fn replace(&mut self, change: &Change) -> Outcome {
        let Site { parent, name, temporary } = self.site;
        let rename = || rustix::fs::renameat(parent, temporary, parent, name);
        let renamed = match rename() {
            Err(Errno::ISDIR | Errno::NOTDIR) => {
                let directory = if matches!(change.change, ChangeKind::Directory { .. }) {
                    AtFlags::empty()
                } else {
                    AtFlags::REMOVEDIR
                };
                rustix::fs::unlinkat(parent, name, directory).and_then(|()| rename())
            }
            other => other,
        };
        match renamed {
            Ok(()) => self.done(ApplyAction::Modified),
            Err(Errno::NOTEMPTY | Errno::EXIST) => Outcome::Conflict(ConflictReason::DirectoryNotEmpty),
            Err(error) => io::Error::from(error).into(),
        }
    }

    fn done(&mut self, action: ApplyAction) -> Outcome {
        self.finished = true;
        // Of the handle, not of the name: a version the host puts there next must not become the base.
        match rustix::fs::fstat(self.handle.as_fd()) {
            Ok(stat) => Outcome::Applied(action, Some(Base::of_stat(&stat))),
            Err(error) => io::Error::from(error).into(),
        }
    }
}

/// Writes the change's content, in pieces.
fn copy(set: &ChangeSet, change: &Change, file: &mut File) -> io::Result<()> {
    use std::io::Write;
    let mut content = set.content(change);
    let mut buffer = vec![0; 128 * 1024];
    loop {
        let count = tree::read_full(&mut content, &mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        file.write_all(&buffer[..count])?;
    }
}
