//! Removes a sandbox's directory from inside: its files, then itself.
//!
//! The confined supervisor may remove files of its own directory and empty directories beside it, nothing else, so
//! there is no rename into the trash. A teardown cut short leaves a directory whose lock nobody holds, which the next
//! sweep removes.

use std::fs;
use std::path::Path;

/// Removes `directory`; whatever fails is left to the sweep.
pub(super) fn remove(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        // The lock goes last: as long as there is one, and held, nobody else touches the directory.
        if entry.file_name() == "lock" {
            continue;
        }
        let path = entry.path();
        let removed = match entry.file_type() {
            Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
            _ => fs::remove_file(&path),
        };
        if let Err(error) = removed {
            tracing::warn!("cannot remove {}: {error}", path.display());
        }
    }
    let _ = fs::remove_file(directory.join("lock"));
    if let Err(error) = fs::remove_dir(directory) {
        tracing::warn!("cannot remove {}: {error}", directory.display());
    }
}
