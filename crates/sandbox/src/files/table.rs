//! What a file server knows that the guest knows: its nodes and open handles, as bytes that outlive the server.
//!
//! A restored guest goes on asking by the same node ids, so the next server begins with the former one's table. With each
//! node goes the version that its file had: what a template's guest has cached of the host is good only as long as every
//! one of them is still the same ([`is_current`]).

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::Stat;
use serde::{Deserialize, Serialize};

use super::nodes::Identity;

/// Most bytes of a table that is read back.
pub(crate) const BYTES_LIMIT: u64 = 512 << 20;

/// All of it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Table {
    pub nodes: Vec<SavedNode>,
    /// The next node's id.
    pub next: u64,
    pub handles: Vec<SavedHandle>,
    /// The id given last.
    pub last_handle: u64,
}

/// A node.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedNode {
    pub id: u64,
    pub parent: Option<u64>,
    pub name: serde_bytes::ByteBuf,
    pub lookups: u64,
    pub identity: Identity,
    /// Path from the root and version, where that was looked for.
    pub version: Option<(serde_bytes::ByteBuf, Version)>,
}

/// A handle of the guest.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedHandle {
    pub id: u64,
    pub node: u64,
    pub readable: bool,
    pub writable: bool,
}

/// What tells that a file or directory is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Version {
    device: u64,
    inode: u64,
    mode: u32,
    size: u64,
    modified: (i64, u64),
    changed: (i64, u64),
}

impl Version {
    pub(super) fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            mode: stat.st_mode,
            size: stat.st_size.cast_unsigned(),
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

/// Whether everything that the table's guest saw below `root` is as it was, and was so before `unix_seconds`.
pub(crate) fn is_current(table: &[u8], root: &Path, unix_seconds: i64) -> bool {
    let Ok(table) = postcard::from_bytes::<Table>(table) else { return false };
    table.nodes.iter().filter_map(|node| node.version.as_ref()).all(|(path, version)| {
        let path = root.join(std::ffi::OsStr::from_bytes(path));
        let now = rustix::fs::lstat(&path).map(|stat| Version::of(&stat));
        now == Ok(*version) && version.changed.0 < unix_seconds
    })
}
