//! Takes changes out of a change set and into the host's workspace.
//!
//! For each path: held back? (`plan`) -> still what the guest saw? (`examine`) -> put in place (`place`). The
//! host's version is never lost: a new version is written under a temporary name beside the old one, the two are
//! *exchanged*, and what came out is looked at again before it is deleted. If it is not what the guest had seen,
//! they are exchanged back and the path is a conflict.
//!
//! Order: directories are made, files and links put in place, then what is gone is removed, so that a full disk in
//! the middle of a rename leaves the old name. Only a file that replaces a directory comes after the removals.
//!
//! A crash at any point leaves a set that can be applied again: finished paths are recognised by their content, and
//! temporary names, which are made of the set's random id and the change's number, are cleared first (`repair`).

mod examine;
mod place;
mod plan;
mod repair;

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use serde::Serialize;

use self::examine::Verdict;
use super::changes::{Change, ChangeKind, ChangeSet, ChangeSetError};
use super::rename::{self, Rename};
use super::tree::{PERMISSIONS, Tree};
use super::{Base, RelativePath};

/// What to take.
#[derive(Clone, Debug, Default)]
pub struct ApplyOptions {
    /// Only these paths and what is beneath them; empty: all. Relative to the workspace.
    pub paths: Vec<PathBuf>,
    /// Not these paths, nor what is beneath them.
    pub exclude: Vec<PathBuf>,
    /// Paths that would be held back and are wanted nevertheless, each by its exact name.
    pub named: Vec<PathBuf>,
    /// Change nothing; report what would happen.
    pub dry_run: bool,
}

/// What was done to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ApplyAction {
    /// Made where nothing was.
    Created,
    /// Put in place of the host's version.
    Modified,
    /// Removed.
    Removed,
    /// The host was like that already.
    AlreadyDone,
}

/// A path that is now as the guest had it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Applied {
    /// Relative to the workspace.
    pub path: RelativePath,
    /// What was done.
    pub action: ApplyAction,
    /// The guest had set set-id or sticky bits; they were left out.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub special_bits_dropped: bool,
    /// The host's version from now on; `None` if removed, or in a dry run.
    #[serde(skip)]
    pub base: Option<Base>,
}

/// Why a path was left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ConflictReason {
    /// The host's version is not the one the guest started from.
    ChangedOnHost,
    /// The guest changed what the host has removed.
    RemovedOnHost,
    /// Both made it, or the guest never saw the host's.
    ExistsOnHost,
    /// The directory it belongs in is gone.
    ParentMissing,
    /// A directory above it is a symbolic link on the host.
    ParentIsSymlink,
    /// A directory above it is a file on the host.
    ParentNotDirectory,
    /// The directory holds something that is not part of the change.
    DirectoryNotEmpty,
}

impl std::fmt::Display for ConflictReason {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::ChangedOnHost => "changed on the host since the sandbox saw it",
            Self::RemovedOnHost => "removed on the host since the sandbox saw it",
            Self::ExistsOnHost => "exists on the host and the sandbox never saw it",
            Self::ParentMissing => "its directory does not exist on the host",
            Self::ParentIsSymlink => "a directory above it is a symbolic link on the host",
            Self::ParentNotDirectory => "a directory above it is a file on the host",
            Self::DirectoryNotEmpty => "the directory holds files that are not part of the change",
        })
    }
}

/// A path left alone because host and guest disagree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Conflict {
    /// Relative to the workspace.
    pub path: RelativePath,
    /// Why.
    pub reason: ConflictReason,
}

/// A path left alone because it could act on the host by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HeldBack {
    /// Relative to the workspace.
    pub path: RelativePath,
    /// Why, in words.
    pub reason: &'static str,
}

/// A path that could not be written. It stays in the set, as do those not tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ApplyFailure {
    /// Relative to the workspace.
    pub path: RelativePath,
    /// The host's answer.
    pub error: String,
    /// The number of the host's error, if it has one.
    pub errno: Option<i32>,
}

/// What became of the chosen paths. Each is in exactly one list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ApplyReport {
    /// Done, and no longer in the set.
    pub applied: Vec<Applied>,
    /// Untouched: host and guest disagree.
    pub conflicts: Vec<Conflict>,
    /// Untouched unless named.
    pub held_back: Vec<HeldBack>,
    /// Device nodes, FIFOs and sockets: never applied.
    pub refused: Vec<RelativePath>,
    /// The host could not write these.
    pub failed: Vec<ApplyFailure>,
    /// Not tried after a failure.
    pub not_applied: Vec<RelativePath>,
    /// Asked for, but nothing in the set is at or beneath them.
    pub unmatched: Vec<PathBuf>,
    /// Applied removals and additions that are one file moved.
    pub renames: Vec<Rename>,
    /// Changes left in the set.
    pub remaining: usize,
}

impl ApplyReport {
    /// Everything that was chosen is on the host.
    pub fn is_complete(&self) -> bool {
        self.conflicts.is_empty()
            && self.held_back.is_empty()
            && self.refused.is_empty()
            && self.failed.is_empty()
            && self.not_applied.is_empty()
    }

    /// What the applied paths are on the host now: the bases of a sandbox that lives on.
    pub fn rebased(&self) -> Vec<(RelativePath, Option<Base>)> {
        self.applied.iter().map(|applied| (applied.path.clone(), applied.base)).collect()
    }
}

/// Nothing was applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The workspace is gone or cannot be entered.
    #[error("cannot open the workspace {}", path.display())]
    Workspace {
        /// The workspace.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process applies the same set.
    #[error("the changes are being applied by another process")]
    Busy,
    /// The set cannot be read or written.
    #[error(transparent)]
    Set(#[from] ChangeSetError),
}

impl ApplyError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Busy => Some("wait for it to end"),
            Self::Set(error) => error.hint(),
            Self::Workspace { .. } => None,
        }
    }
}

/// Applies the chosen changes to the host's workspace and takes them out of the set.
///
/// # Errors
/// The workspace or the set cannot be used; what happened to single paths is in the report.
pub fn apply(set: &mut ChangeSet, options: &ApplyOptions) -> Result<ApplyReport, ApplyError> {
    let lock = if options.dry_run { None } else { Some(begin(set)?) };
    let tree = Tree::open(set.workspace())
        .map_err(|source| ApplyError::Workspace { path: set.workspace().to_owned(), source })?;
    if lock.is_some() && set.is_applying() {
        repair::repair(&tree, set);
    }
    let plan = plan::plan(&tree, set.entries(), options);
    let mut run = Run {
        tree: &tree,
        set,
        dry_run: options.dry_run,
        report: ApplyReport {
            held_back: plan.held_back,
            refused: plan.refused,
            unmatched: plan.unmatched,
            ..ApplyReport::default()
        },
        decided: HashSet::new(),
        made: HashSet::new(),
        touched: BTreeSet::new(),
        stop: false,
    };
    if lock.is_some() && !plan.chosen.is_empty() {
        set.set_applying(true)?;
    }
    // While both versions are still there to be compared.
    let renames = rename::renames(&tree, run.set);
    run.all(&plan.chosen);
    run.finish(&plan.chosen);
    let mut report = run.report;
    let applied: HashSet<&Path> = report.applied.iter().map(|applied| applied.path.as_path()).collect();
    report.renames = rename::within(renames, &applied);
    if lock.is_some() {
        let done: HashSet<&RelativePath> = report.applied.iter().map(|applied| &applied.path).collect();
        match set.take_out(|change| done.contains(&change.path)) {
            // A newer set took its place meanwhile: there is nothing to take the changes out of.
            Err(error) if error.is_absent() => {}
            other => other?,
        }
        set.set_applying(false)?;
    }
    report.remaining = set.entries().len();
    report.sort();
    Ok(report)
}

/// Clears what an apply of the set in `directory` that died left in the workspace under temporary names. Does nothing,
/// quickly, if there is no set, or none whose apply died.
///
/// # Errors
/// The workspace cannot be entered, or the set cannot be used.
pub fn repair(directory: &Path) -> Result<(), ApplyError> {
    if !ChangeSet::is_applying_in(directory) {
        return Ok(());
    }
    let mut set = ChangeSet::load(directory)?;
    let _lock = begin(&mut set)?;
    let tree = Tree::open(set.workspace())
        .map_err(|source| ApplyError::Workspace { path: set.workspace().to_owned(), source })?;
    repair::repair(&tree, &set);
    set.set_applying(false)?;
    Ok(())
}

/// Takes the set for this process and reads what others left of it.
fn begin(set: &mut ChangeSet) -> Result<File, ApplyError> {
    let lock = set.lock()?.ok_or(ApplyError::Busy)?;
    set.reload()?;
    Ok(lock)
}

/// One pass over the chosen changes.
struct Run<'a> {
    tree: &'a Tree,
    set: &'a ChangeSet,
    dry_run: bool,
    report: ApplyReport,
    /// Numbers of the changes whose outcome is known.
    decided: HashSet<u32>,
    /// Dry run: directories that would be there, paths that would be gone.
    made: HashSet<RelativePath>,
    /// Directories whose names changed; empty path: the workspace.
    touched: BTreeSet<PathBuf>,
    /// A failure that the next path would meet too.
    stop: bool,
}

/// How one path ended.
enum Outcome {
    Applied(ApplyAction, Option<Base>),
    Conflict(ConflictReason),
    Failed(io::Error),
}

impl From<io::Error> for Outcome {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl<'a> Run<'a> {
    fn all(&mut self, chosen: &[&'a Change]) {
        let directory = |change: &Change| matches!(change.change, ChangeKind::Directory { .. });
        let removed = |change: &Change| matches!(change.change, ChangeKind::Removed { .. });
        chosen.iter().filter(|change| directory(change)).for_each(|change| self.one(change));
        let mut late = Vec::new();
        for change in chosen.iter().filter(|change| !directory(change) && !removed(change)) {
            // A directory makes way only after everything in it is gone.
            if self.is_directory(&change.path) { late.push(change) } else { self.one(change) }
        }
        // If something could not be written, what it was renamed from stays.
        if !self.report.failed.is_empty() {
            return;
        }
        chosen.iter().rev().filter(|change| removed(change)).for_each(|change| self.one(change));
        late.into_iter().for_each(|change| self.one(change));
    }

    fn one(&mut self, change: &Change) {
        if self.stop {
            return;
        }
        let outcome = match self.examine(change) {
            Ok(Verdict::AlreadyDone(base)) => Outcome::Applied(ApplyAction::AlreadyDone, base),
            Ok(Verdict::Conflict(reason)) => Outcome::Conflict(reason),
            Ok(Verdict::Go(_)) if self.dry_run => self.pretend(change),
            Ok(Verdict::Go(spot)) => place::place(self.tree, self.set, change, &spot),
            Err(error) => Outcome::Failed(error),
        };
        self.note(change, outcome);
    }

    fn pretend(&mut self, change: &Change) -> Outcome {
        self.made.insert(change.path.clone());
        let action = match (&change.change, change.base) {
            (ChangeKind::Removed { .. }, _) => ApplyAction::Removed,
            (_, Some(_)) => ApplyAction::Modified,
            (_, None) => ApplyAction::Created,
        };
        Outcome::Applied(action, None)
    }

    fn note(&mut self, change: &Change, outcome: Outcome) {
        self.decided.insert(change.id);
        let path = change.path.clone();
        match outcome {
            Outcome::Applied(action, base) => {
                self.touched.insert(path.parent().unwrap_or(Path::new("")).to_owned());
                let special_bits_dropped = matches!(change.change,
                    ChangeKind::File { mode, .. } | ChangeKind::Directory { mode } if mode & !PERMISSIONS != 0);
                self.report.applied.push(Applied { path, action, special_bits_dropped, base });
            }
            Outcome::Conflict(reason) => self.report.conflicts.push(Conflict { path, reason }),
            Outcome::Failed(error) => {
                self.stop |= will_repeat(&error);
                let errno = error.raw_os_error();
                self.report.failed.push(ApplyFailure { path, error: error.to_string(), errno });
            }
        }
    }

    /// Sets the directories' final permissions, makes all durable, and lists what was not tried.
    fn finish(&mut self, chosen: &[&Change]) {
        if !self.dry_run {
            self.finish_directories(chosen);
            self.sync();
        }
        for change in chosen.iter().filter(|change| !self.decided.contains(&change.id)) {
            self.report.not_applied.push(change.path.clone());
        }
    }

    fn finish_directories(&mut self, chosen: &[&Change]) {
        let modes: std::collections::HashMap<&RelativePath, u32> = chosen
            .iter()
            .filter_map(|change| match change.change {
                ChangeKind::Directory { mode } => Some((&change.path, mode)),
                _ => None,
            })
            .collect();
        let applied = std::mem::take(&mut self.report.applied);
        for mut applied in applied {
            match modes
                .get(&applied.path)
                .map(|&mode| place::finish_directory(self.tree, &applied.path, mode))
            {
                None => self.report.applied.push(applied),
                Some(Ok(base)) => {
                    applied.base = base;
                    self.report.applied.push(applied);
                }
                Some(Err(error)) => {
                    let errno = error.raw_os_error();
                    let path = applied.path;
                    self.report.failed.push(ApplyFailure { path, error: error.to_string(), errno });
                }
            }
        }
    }

    /// Changes leave the set only when the host's directories are on disk.
    fn sync(&mut self) {
        for directory in &self.touched {
            let Err(error) = self.tree.sync_directory(directory) else { continue };
            let (lost, kept) = std::mem::take(&mut self.report.applied)
                .into_iter()
                .partition(|applied| applied.path.parent().unwrap_or(Path::new("")) == directory);
            self.report.applied = kept;
            let lost: Vec<Applied> = lost;
            self.report.failed.extend(lost.into_iter().map(|applied| ApplyFailure {
                path: applied.path,
                error: error.to_string(),
                errno: error.raw_os_error(),
            }));
        }
    }
}

impl ApplyReport {
    fn sort(&mut self) {
        self.applied.sort_by(|left, right| left.path.cmp(&right.path));
        self.conflicts.sort_by(|left, right| left.path.cmp(&right.path));
        self.held_back.sort_by(|left, right| left.path.cmp(&right.path));
        self.failed.sort_by(|left, right| left.path.cmp(&right.path));
        self.not_applied.sort();
    }
}

/// Failures of the host rather than of one path.
fn will_repeat(error: &io::Error) -> bool {
    let repeating =
        [Errno::NOSPC, Errno::DQUOT, Errno::ROFS, Errno::IO, Errno::NFILE, Errno::MFILE, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| repeating.contains(&errno))
}
