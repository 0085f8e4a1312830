//! Renames: a set knows removals and additions only; which of them belong together is found out by content.
//!
//! A removed file and an added one with the same bytes are one that moved. Of what is left, text files that share most
//! of their lines are, as git has it. Both searches are bounded: where there are too many candidates none are paired.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;
use std::path::Path;

use serde::Serialize;

use super::RelativePath;
use super::changes::{Change, ChangeKind, ChangeSet, ChangeStatus};
use super::tree::{self, Tree};

/// Most comparisons of whole contents, and of lines.
const PAIRS_LIMIT: usize = 2000;
/// Largest file that is looked at line by line, bytes.
const LINES_LIMIT: u64 = 256 << 10;
/// Largest file whose bytes are compared, bytes.
const BYTES_LIMIT: u64 = 64 << 20;
/// Lines that two files must share to be one that was renamed, percent.
const SIMILAR_ENOUGH: u8 = 50;

/// A file that was moved, and maybe changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rename {
    /// Where the host has it.
    pub from: RelativePath,
    /// Where the guest has it.
    pub to: RelativePath,
    /// What both have in common, percent.
    pub similarity: u8,
}

/// The renames among a set's changes, sorted by their new paths. Each path is in one at most.
pub(super) fn renames(tree: &Tree, set: &ChangeSet) -> Vec<Rename> {
    let mut removed: Vec<(&Change, u64)> = Vec::new();
    let mut added: Vec<(&Change, u64)> = Vec::new();
    for change in set.entries() {
        match change.change {
            ChangeKind::Removed { directory: false } => {
                let stat = tree.stat(&change.path).ok().flatten().filter(tree::is_file);
                removed.extend(stat.map(|stat| (change, tree::size_of(&stat))));
            }
            ChangeKind::File { size, .. } if change.status == ChangeStatus::Added => {
                added.push((change, size))
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    let mut used: HashSet<u32> = HashSet::new();
    identical(tree, set, &removed, &added, &mut used, &mut found);
    removed.retain(|(change, _)| !used.contains(&change.id));
    added.retain(|(change, _)| !used.contains(&change.id));
    similar(tree, set, &removed, &added, &mut used, &mut found);
    found.sort_by(|one, other| one.to.cmp(&other.to));
    found
}

/// Pairs files with the same bytes; of several the one that kept its name goes first.
fn identical(
    tree: &Tree,
    set: &ChangeSet,
    removed: &[(&Change, u64)],
    added: &[(&Change, u64)],
    used: &mut HashSet<u32>,
    found: &mut Vec<Rename>,
) {
    let mut by_size: HashMap<u64, Vec<&Change>> = HashMap::new();
    for (change, size) in removed.iter().filter(|(_, size)| (1..=BYTES_LIMIT).contains(size)) {
        by_size.entry(*size).or_default().push(change);
    }
    let mut left = PAIRS_LIMIT;
    for (new, size) in added {
        let Some(candidates) = by_size.get_mut(size) else { continue };
        candidates.sort_by_key(|old| (old.path.name() != new.path.name(), &old.path));
        for old in candidates.iter().filter(|old| !used.contains(&old.id)).copied().collect::<Vec<_>>() {
            if left == 0 {
                return;
            }
            left -= 1;
            let same = tree
                .open_file(&old.path)
                .is_some_and(|host| tree::same_content(host, set.content(new)).unwrap_or(false));
            if same {
                used.extend([old.id, new.id]);
                found.push(Rename { from: old.path.clone(), to: new.path.clone(), similarity: 100 });
                break;
            }
        }
    }
}

/// Pairs text files that share most of their lines, the most similar first.
fn similar(
    tree: &Tree,
    set: &ChangeSet,
    removed: &[(&Change, u64)],
    added: &[(&Change, u64)],
    used: &mut HashSet<u32>,
    found: &mut Vec<Rename>,
) {
    let small = |(_, size): &&(&Change, u64)| (1..=LINES_LIMIT).contains(size);
    if removed.iter().filter(small).count() * added.iter().filter(small).count() > PAIRS_LIMIT {
        return;
    }
    let lines_of = |content: Box<dyn Read + '_>| Lines::of(content);
    let old: Vec<_> = removed
        .iter()
        .filter(small)
        .filter_map(|(change, _)| Some((*change, lines_of(Box::new(tree.open_file(&change.path)?))?)))
        .collect();
    let new: Vec<_> = added
        .iter()
        .filter(small)
        .filter_map(|(change, _)| Some((*change, lines_of(Box::new(set.content(change)))?)))
        .collect();
    let mut pairs = Vec::new();
    for (from, old) in &old {
        for (to, new) in &new {
            let similarity = old.similarity(new);
            if similarity >= SIMILAR_ENOUGH {
                let same_name = from.path.name() == to.path.name();
                pairs.push((similarity, same_name, *from, *to));
            }
        }
    }
    pairs.sort_by(|one, other| {
        (other.0, other.1, &one.2.path, &one.3.path).cmp(&(one.0, one.1, &other.2.path, &other.3.path))
    });
    for (similarity, _, from, to) in pairs {
        if !used.contains(&from.id) && !used.contains(&to.id) {
            used.extend([from.id, to.id]);
            let (from, to) = (from.path.clone(), to.path.clone());
            // Not the same bytes, or they were paired already.
            found.push(Rename { from, to, similarity: similarity.min(99) });
        }
    }
}

/// How often each line of a text occurs, by hash, weighted by its length.
struct Lines {
    counts: HashMap<u64, (u64, u64)>,
    bytes: u64,
}

impl Lines {
    /// `None` for what is no text.
    fn of(content: impl Read) -> Option<Self> {
        let mut text = Vec::new();
        content.take(LINES_LIMIT + 1).read_to_end(&mut text).ok()?;
        if text.len() as u64 > LINES_LIMIT || text.contains(&0) {
            return None;
        }
        let mut counts = HashMap::new();
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            let mut hasher = DefaultHasher::new();
            line.hash(&mut hasher);
            let entry = counts.entry(hasher.finish()).or_insert((0, line.len() as u64));
            entry.0 += 1;
        }
        Some(Self { counts, bytes: text.len() as u64 })
    }

    /// Shared bytes, percent of the larger text.
    fn similarity(&self, other: &Self) -> u8 {
        let shared: u64 = self
            .counts
            .iter()
            .filter_map(|(line, (count, length))| Some((*count).min(other.counts.get(line)?.0) * length))
            .sum();
        let larger = self.bytes.max(other.bytes).max(1);
        u8::try_from(shared.saturating_mul(100) / larger).unwrap_or(100).min(100)
    }
}

/// The pairs of which both sides are among `paths`.
pub(super) fn within(renames: Vec<Rename>, paths: &HashSet<&Path>) -> Vec<Rename> {
    let both = |rename: &Rename| paths.contains(rename.from.as_path()) && paths.contains(rename.to.as_path());
    renames.into_iter().filter(both).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn similarity_is_symmetric_bounded_and_full_for_equals(
            one in "[ab\n]{0,40}", other in "[ab\n]{0,40}") {
            let lines = |text: &str| Lines::of(text.as_bytes()).unwrap();
            let (left, right) = (lines(&one), lines(&other));
            prop_assert_eq!(left.similarity(&right), right.similarity(&left));
            prop_assert!(left.similarity(&right) <= 100);
            if !one.is_empty() {
                prop_assert_eq!(left.similarity(&left), 100);
            }
        }
    }
}
