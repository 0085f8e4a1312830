//! Which changes are taken at all: the chosen ones, without those that could act on the host by themselves.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::super::RelativePath;
use super::super::changes::{Change, ChangeKind, ChangeStatus};
use super::super::guard::{guarded, guarded_leaf};
use super::super::tree::{self, Tree};
use super::{ApplyOptions, HeldBack};

const OUTSIDE: &str = "points outside the workspace";
const AT_GUARDED: &str = "points at something that is held back";
const GIT_LINK: &str = "a link among git's own files";
const REPOSITORY: &str = "belongs to a git repository inside the workspace";

/// The chosen changes, in the set's order, and what became of the others.
pub(super) struct Plan<'a> {
    pub(super) chosen: Vec<&'a Change>,
    pub(super) held_back: Vec<HeldBack>,
    pub(super) refused: Vec<RelativePath>,
    pub(super) unmatched: Vec<PathBuf>,
}

/// Sorts the entries out. Changes nothing.
pub(super) fn plan<'a>(tree: &Tree, entries: &'a [Change], options: &ApplyOptions) -> Plan<'a> {
    let mut repositories = Repositories { tree, known: HashMap::new() };
    let mut chosen: BTreeMap<&RelativePath, &Change> = BTreeMap::new();
    let mut held: BTreeMap<&RelativePath, &'static str> = BTreeMap::new();
    let mut refused = Vec::new();
    // A file, link or node that is not taken leaves the directory it would replace, with all that is in it.
    let mut kept: Option<(&RelativePath, &'static str)> = None;
    for change in entries.iter().filter(|change| options.chooses(&change.path)) {
        let above = kept.filter(|(path, _)| change.path.as_path().starts_with(path.as_path()));
        let named = options.named.iter().any(|path| path == change.path.as_path());
        let reason = above.map(|(_, reason)| reason);
        let reason = reason.or_else(|| if named { None } else { held_back(change, &mut repositories) });
        if change.change == ChangeKind::Special && above.is_none() {
            refused.push(change.path.clone());
            kept = Some((&change.path, "its directory is replaced by something that is refused"));
        } else if let Some(reason) = reason {
            held.insert(&change.path, reason);
            if above.is_none() && replaces(change) {
                kept = Some((&change.path, reason));
            }
        } else {
            chosen.insert(&change.path, change);
        }
    }
    add_directories(entries, &mut chosen, &mut held);
    let unmatched = |path: &&PathBuf| !entries.iter().any(|change| change.path.as_path().starts_with(path));
    Plan {
        chosen: chosen.into_values().collect(),
        held_back: held.into_iter().map(|(path, reason)| HeldBack { path: path.clone(), reason }).collect(),
        refused,
        unmatched: options.paths.iter().chain(&options.named).filter(unmatched).cloned().collect(),
    }
}

impl ApplyOptions {
    pub(in super::super) fn chooses(&self, path: &RelativePath) -> bool {
        let beneath = |above: &PathBuf| path.as_path().starts_with(above);
        (self.paths.is_empty() || self.paths.iter().chain(&self.named).any(beneath))
            && !self.exclude.iter().any(beneath)
    }
}

fn replaces(change: &Change) -> bool {
    matches!(change.change, ChangeKind::File { .. } | ChangeKind::Symlink { .. } | ChangeKind::Special)
}

/// A chosen path needs the new directories above it, chosen or not. Alone they are harmless.
fn add_directories<'a>(
    entries: &'a [Change],
    chosen: &mut BTreeMap<&'a RelativePath, &'a Change>,
    held: &mut BTreeMap<&'a RelativePath, &'static str>,
) {
    let new = |change: &&Change| {
        change.status == ChangeStatus::Added && matches!(change.change, ChangeKind::Directory { .. })
    };
    let directories: HashMap<&Path, &Change> =
        entries.iter().filter(new).map(|change| (change.path.as_path(), change)).collect();
    let mut missing: Vec<&Change> = Vec::new();
    for path in chosen.keys() {
        missing.extend(path.ancestors().filter_map(|above| directories.get(above)));
    }
    for change in missing {
        held.remove(&change.path);
        chosen.insert(&change.path, change);
    }
}

fn held_back(change: &Change, repositories: &mut Repositories<'_>) -> Option<&'static str> {
    let path = change.path.as_path();
    let directory =
        matches!(change.change, ChangeKind::Directory { .. } | ChangeKind::Removed { directory: true });
    let reason = if directory { guarded(path) } else { guarded_leaf(path) };
    let reason = reason.or_else(|| match &change.change {
        ChangeKind::Symlink { target } => held_back_link(&change.path, target.as_os_str()),
        _ => None,
    });
    reason.or_else(|| repositories.hold(&change.path).then_some(REPOSITORY))
}

fn held_back_link(path: &RelativePath, target: &OsStr) -> Option<&'static str> {
    if path.as_path().starts_with(".git") {
        return Some(GIT_LINK);
    }
    match tree::link_destination(path, target.as_bytes()) {
        None => Some(OUTSIDE),
        Some(destination) => guarded_leaf(&destination).map(|_| AT_GUARDED),
    }
}

/// Directories that the host's git would take for a bare repository, whatever they are called.
struct Repositories<'a> {
    tree: &'a Tree,
    known: HashMap<PathBuf, bool>,
}

impl Repositories<'_> {
    fn hold(&mut self, path: &RelativePath) -> bool {
        if path.as_path().starts_with(".git") {
            return false;
        }
        path.as_path().ancestors().skip(1).any(|directory| self.is_repository(directory))
    }

    fn is_repository(&mut self, directory: &Path) -> bool {
        if let Some(&known) = self.known.get(directory) {
            return known;
        }
        let has = |name: &str| {
            let path = RelativePath::try_from(directory.join(name).as_path()).ok();
            path.is_some_and(|path| self.tree.stat(&path).is_ok_and(|stat| stat.is_some()))
        };
        let repository = has("HEAD") && (has("commondir") || has("objects") && has("refs"));
        self.known.insert(directory.to_owned(), repository);
        repository
    }
}
