//! Is a path on the host still what the guest started from? Changes nothing.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::Stat;

use super::super::changes::{Change, ChangeKind, ChangeSet};
use super::super::tree::{self, PERMISSIONS, ParentError, Tree};
use super::super::{Base, RelativePath};
use super::{ConflictReason, Run};

/// What is to be done about a path.
pub(super) enum Verdict {
    /// The host is as wanted.
    AlreadyDone(Option<Base>),
    /// The host has something that must not be lost.
    Conflict(ConflictReason),
    /// The change may be made there.
    Go(Spot),
}

/// Where a change goes and what is there now.
pub(super) struct Spot {
    /// The directory; `None` only in a dry run that would make it.
    pub(super) parent: Option<OwnedFd>,
    /// What the host has there.
    pub(super) present: Option<Stat>,
}

impl Run<'_> {
    pub(super) fn is_directory(&self, path: &RelativePath) -> bool {
        self.tree.stat(path).is_ok_and(|stat| stat.is_some_and(|stat| tree::is_directory(&stat)))
    }

    pub(super) fn examine(&self, change: &Change) -> io::Result<Verdict> {
        let removed = matches!(change.change, ChangeKind::Removed { .. });
        let would_make = change.path.parent().is_some_and(|parent| self.made.contains(parent));
        let parent = match self.tree.parent(&change.path) {
            _ if would_make && !removed => None,
            Ok(parent) => Some(parent),
            Err(ParentError::Io(error)) => return Err(error),
            // Nothing can be there, so it is gone.
            Err(ParentError::Missing | ParentError::NotDirectory) if removed => {
                return Ok(Verdict::AlreadyDone(None));
            }
            Err(ParentError::Missing) => return Ok(Verdict::Conflict(ConflictReason::ParentMissing)),
            Err(ParentError::NotDirectory) => {
                return Ok(Verdict::Conflict(ConflictReason::ParentNotDirectory));
            }
            Err(ParentError::Symlink) => return Ok(Verdict::Conflict(ConflictReason::ParentIsSymlink)),
        };
        let present = match &parent {
            Some(parent) => tree::stat_in(parent, change.path.name())?,
            None => None,
        };
        let done = match &present {
            Some(stat) => is_as_wanted(self.tree, self.set, change, stat)?,
            None => removed,
        };
        if done || is_shared_directory(change, present.as_ref()) {
            return Ok(Verdict::AlreadyDone(present.as_ref().map(Base::of_stat)));
        }
        if let Some(reason) = self.conflict(change, present.as_ref())? {
            return Ok(Verdict::Conflict(reason));
        }
        Ok(Verdict::Go(Spot { parent, present }))
    }

    fn conflict(&self, change: &Change, present: Option<&Stat>) -> io::Result<Option<ConflictReason>> {
        let Some(stat) = present else {
            let gone = change.base.is_some() && !matches!(change.change, ChangeKind::Removed { .. });
            return Ok(gone.then_some(ConflictReason::RemovedOnHost));
        };
        if matches!(change.change, ChangeKind::Directory { mode } if is_half_made(stat, mode)) {
            return Ok(None);
        }
        match change.base {
            None => return Ok(Some(ConflictReason::ExistsOnHost)),
            Some(base) if base != Base::of_stat(stat) => return Ok(Some(ConflictReason::ChangedOnHost)),
            Some(_) => {}
        }
        let makes_way = tree::is_directory(stat) && !matches!(change.change, ChangeKind::Directory { .. });
        Ok((makes_way && self.keeps_something(&change.path)?).then_some(ConflictReason::DirectoryNotEmpty))
    }

    /// Whether a directory would not be empty when its own turn comes.
    fn keeps_something(&self, path: &RelativePath) -> io::Result<bool> {
        let gone: &HashSet<RelativePath> = &self.made;
        let names = self.tree.list(path.as_path())?;
        Ok(names.iter().any(|name| path.join(name).map_or(true, |child| !gone.contains(&child))))
    }
}

/// A directory that an apply had opened for its content when it died.
fn is_half_made(stat: &Stat, mode: u32) -> bool {
    tree::is_directory(stat) && stat.st_mode & PERMISSIONS == mode & PERMISSIONS | 0o700
}

/// Whether the host has exactly what the change asks for.
pub(super) fn is_as_wanted(tree: &Tree, set: &ChangeSet, change: &Change, stat: &Stat) -> io::Result<bool> {
    let same_mode = |mode: u32| stat.st_mode & PERMISSIONS == mode & PERMISSIONS;
    Ok(match &change.change {
        ChangeKind::Directory { mode } => tree::is_directory(stat) && same_mode(*mode),
        ChangeKind::Symlink { target } => {
            let link = || tree.read_link(&change.path);
            tree::is_symlink(stat) && link().is_some_and(|link| link == target.as_os_str().as_bytes())
        }
        ChangeKind::File { size, mode, .. } => {
            let plain = tree::is_file(stat) && tree::size_of(stat) == *size && same_mode(*mode);
            match plain.then(|| tree.open_file(&change.path)).flatten() {
                Some(file) => tree::same_content(file, set.content(change))?,
                None => false,
            }
        }
        ChangeKind::Removed { .. } | ChangeKind::Special => false,
    })
}

/// Both sides made the same directory: it is there, its permissions are the host's, and what is in it is examined
/// path by path.
fn is_shared_directory(change: &Change, present: Option<&Stat>) -> bool {
    let ChangeKind::Directory { mode } = change.change else { return false };
    change.base.is_none() && present.is_some_and(|stat| tree::is_directory(stat) && !is_half_made(stat, mode))
}
