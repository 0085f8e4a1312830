//! What a workspace file was when the guest first saw it.
//!
//! The file server records a [`Base`] for each path the first time it serves the path's attributes. `apply`
//! compares the host's file with its base: a difference means that both sides changed it, a conflict.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

/// Identity and version of a host file, as far as `lstat` tells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Inode number.
    pub inode: u64,
    /// Type and permission bits (`st_mode`).
    pub mode: u32,
    /// Size in bytes; 0 for directories, whose size says nothing about their content.
    pub size: u64,
    /// Last modification, nanoseconds since the epoch; 0 for directories.
    pub modified_ns: i128,
    /// Last status change, nanoseconds since the epoch; 0 for directories.
    pub changed_ns: i128,
}

impl Base {
    /// Takes the base from an `lstat` result.
    pub fn of(metadata: &std::fs::Metadata) -> Self {
        let file = !metadata.is_dir();
        let time = |seconds: i64, nanoseconds: i64| {
            if file { i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds) } else { 0 }
        };
        Self {
            inode: metadata.ino(),
            mode: metadata.mode(),
            size: if file { metadata.len() } else { 0 },
            modified_ns: time(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: time(metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// Bases of all paths served so far; paths are relative to the workspace.
#[derive(Debug, Default)]
pub struct BaseTable {
    entries: Mutex<HashMap<PathBuf, Base>>,
}

impl BaseTable {
    /// Records `base` for `path` unless the path already has one.
    pub fn record_first(&self, path: &Path, base: Base) {
        let mut entries = self.entries.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !entries.contains_key(path) {
            entries.insert(path.to_owned(), base);
        }
    }

    /// Sets the base of `path` after the host's version was replaced on the guest's behalf; `None`: it is gone.
    pub fn replace(&self, path: &Path, base: Option<Base>) {
        let mut entries = self.entries.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match base {
            Some(base) => drop(entries.insert(path.to_owned(), base)),
            None => drop(entries.remove(path)),
        }
    }

    /// The base of `path`, if the path was ever served.
    pub fn get(&self, path: &Path) -> Option<Base> {
        let entries = self.entries.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        entries.get(path).copied()
    }
}
