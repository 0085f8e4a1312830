//! Clears the temporary names that an apply left when it died.
//!
//! Under such a name is either a new version that was not put in place yet, or the host's version that was just
//! taken out of its place. The first is deleted; so is the second if it is the one the guest saw, else it goes back.

use std::ffi::OsStr;
use std::io;

use super::super::changes::{Change, ChangeKind, ChangeSet};
use super::super::tree::Tree;
use super::examine::is_as_wanted;
use super::place::{Site, temporary_name};

/// Looks at each change that is still in the set. What cannot be repaired stays, under its temporary name.
pub(super) fn repair(tree: &Tree, set: &ChangeSet) {
    for change in set.entries() {
        let Ok(parent) = tree.parent(&change.path) else { continue };
        let temporary = temporary_name(set, change);
        let site = Site { parent: &parent, name: change.path.name(), temporary: OsStr::new(&temporary) };
        // A later change must not be kept from its repair by this one.
        let _ = repair_one(tree, set, change, &site);
    }
}

fn repair_one(tree: &Tree, set: &ChangeSet, change: &Change, site: &Site<'_>) -> io::Result<()> {
    let Some(temporary) = site.stat_temporary()? else { return Ok(()) };
    let name = site.stat_name()?;
    let removed = matches!(change.change, ChangeKind::Removed { .. });
    let is_base = change.base.is_some_and(|base| base.same_object(&temporary));
    let ours_is_in_place = match &name {
        Some(stat) => is_as_wanted(tree, set, change, stat)? || directory_in_place(change, stat),
        None => false,
    };
    match (name, change.base) {
        // Taken out in order to be deleted, and is what the guest saw.
        (None, _) if removed && is_base => site.delete_temporary()?,
        // Taken out, and is not, or its successor is gone as well: the host's version goes back.
        (None, _) if removed || is_base => site.settle()?,
        (Some(_), Some(_)) if is_base => {
            // A directory that is not empty after all gets its place back.
            if site.delete_temporary().is_err() {
                site.exchange()?;
                site.delete_temporary()?;
            }
        }
        // Only where there was a base do the two change places.
        (Some(_), Some(_)) if ours_is_in_place && !removed => {
            site.exchange()?;
            site.delete_temporary()?;
        }
        // Both are the host's: it wrote the name again. Neither is ours to delete.
        (Some(_), _) if removed => {}
        _ => site.delete_temporary()?,
    }
    Ok(())
}

/// A new directory counts as in place before its permissions are final.
fn directory_in_place(change: &Change, stat: &rustix::fs::Stat) -> bool {
    matches!(change.change, ChangeKind::Directory { .. }) && super::super::tree::is_directory(stat)
}
