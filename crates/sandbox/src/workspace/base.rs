//! What a workspace file was when the guest first saw it.
//!
//! The file server records a [`Base`] for each path the first time it serves the path's attributes. `apply`
//! compares the host's file with its base: a difference means that both sides changed it, a conflict.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use agentkernel_protocol::control::HostVersion;
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

impl From<HostVersion> for Base {
    fn from(version: HostVersion) -> Self {
        let HostVersion { inode, mode, size, modified_ns, changed_ns } = version;
        Self { inode, mode, size, modified_ns, changed_ns }
    }
}

impl From<Base> for HostVersion {
    fn from(base: Base) -> Self {
        let Base { inode, mode, size, modified_ns, changed_ns } = base;
        Self { inode, mode, size, modified_ns, changed_ns }
    }
}

/// Most paths of a table: more than any project has that a guest could make us remember.
const ENTRIES_LIMIT: usize = 4 << 20;
/// Bytes of a record besides its path: length, presence, and the five fields of a [`Base`].
const RECORD_HEAD: usize = 4 + 1 + 8 + 4 + 8 + 16 + 16;

/// Bases of all paths served so far; paths are relative to the workspace.
///
/// A table with a journal outlives its process: each change is written through, in one piece, so that a process killed
/// at any instant leaves at most one torn record at the end. Nothing is synced: after a crash of the host itself the
/// guest's own writes are torn, too.
#[derive(Debug, Default)]
pub struct BaseTable {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<PathBuf, Base>,
    journal: Option<File>,
}

impl BaseTable {
    /// The table kept in the journal at `path`, which is made if it is missing. A torn end is cut off; a journal in which
    /// most records are outdated is written anew.
    ///
    /// # Errors
    /// The journal cannot be read or written.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut journal = File::options()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
            .open(path)?;
        let mut bytes = Vec::new();
        journal.read_to_end(&mut bytes)?;
        let mut entries = HashMap::new();
        let (mut rest, mut records) = (bytes.as_slice(), 0usize);
        while let Some((name, base, after)) = decode(rest) {
            match base {
                Some(base) => drop(entries.insert(name, base)),
                None => drop(entries.remove(&name)),
            }
            records += 1;
            rest = after;
        }
        if records > 1024 && records > entries.len().saturating_mul(2) {
            let draft = path.with_extension("new");
            let kept: Vec<u8> = entries.iter().flat_map(|(name, base)| encode(name, Some(base))).collect();
            std::fs::write(&draft, kept)?;
            std::fs::rename(&draft, path)?;
            journal = File::options().append(true).open(path)?;
        } else if !rest.is_empty() {
            journal.set_len((bytes.len() - rest.len()) as u64)?;
        }
        Ok(Self { inner: Mutex::new(Inner { entries, journal: Some(journal) }) })
    }

    /// Records `base` for `path` unless the path already has one.
    pub fn record_first(&self, path: &Path, base: Base) {
        let mut inner = self.inner();
        if !inner.entries.contains_key(path) && inner.entries.len() < ENTRIES_LIMIT {
            inner.write(path, Some(&base));
            inner.entries.insert(path.to_owned(), base);
        }
    }

    /// Sets the base of `path` after the host's version was replaced on the guest's behalf; `None`: it is gone.
    pub fn replace(&self, path: &Path, base: Option<Base>) {
        let mut inner = self.inner();
        inner.write(path, base.as_ref());
        match base {
            Some(base) => drop(inner.entries.insert(path.to_owned(), base)),
            None => drop(inner.entries.remove(path)),
        }
    }

    /// The base of `path`, if the path was ever served.
    pub fn get(&self, path: &Path) -> Option<Base> {
        self.inner().entries.get(path).copied()
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Inner {
    /// A full disk must not keep the guest from reading: the journal ends there, and memory stays right.
    fn write(&mut self, path: &Path, base: Option<&Base>) {
        let Some(journal) = &mut self.journal else { return };
        let before = journal.metadata().map(|metadata| metadata.len());
        if let Err(error) = journal.write_all(&encode(path, base)) {
            tracing::warn!("what the guest sees of the workspace is not kept any more: {error}");
            if let Ok(before) = before {
                let _ = journal.set_len(before);
            }
            self.journal = None;
        }
    }
}

/// A record: its length behind this field, presence, the fields of the base, the path; integers little-endian.
fn encode(path: &Path, base: Option<&Base>) -> Vec<u8> {
    let name = path.as_os_str().as_bytes();
    let mut record = Vec::with_capacity(RECORD_HEAD + name.len());
    record.extend(u32::try_from(RECORD_HEAD - 4 + name.len()).unwrap_or(u32::MAX).to_le_bytes());
    record.push(u8::from(base.is_some()));
    let base = base.copied().unwrap_or(Base { inode: 0, mode: 0, size: 0, modified_ns: 0, changed_ns: 0 });
    record.extend(base.inode.to_le_bytes());
    record.extend(base.mode.to_le_bytes());
    record.extend(base.size.to_le_bytes());
    record.extend(base.modified_ns.to_le_bytes());
    record.extend(base.changed_ns.to_le_bytes());
    record.extend(name);
    record
}

/// The first record and what follows it; `None` at the end, or where a record is torn.
fn decode(bytes: &[u8]) -> Option<(PathBuf, Option<Base>, &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (record, after) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    let (present, record) = record.split_first()?;
    let (inode, record) = record.split_first_chunk()?;
    let (mode, record) = record.split_first_chunk()?;
    let (size, record) = record.split_first_chunk()?;
    let (modified_ns, record) = record.split_first_chunk()?;
    let (changed_ns, name) = record.split_first_chunk()?;
    let base = Base {
        inode: u64::from_le_bytes(*inode),
        mode: u32::from_le_bytes(*mode),
        size: u64::from_le_bytes(*size),
        modified_ns: i128::from_le_bytes(*modified_ns),
        changed_ns: i128::from_le_bytes(*changed_ns),
    };
    Some((PathBuf::from(OsStr::from_bytes(name)), (*present == 1).then_some(base), after))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn base(number: u64) -> Base {
        Base { inode: number, mode: 0o100_644, size: number * 3, modified_ns: -5, changed_ns: i128::MAX }
    }

    proptest! {
        #[test]
        fn a_table_is_what_it_was_after_any_history(history in prop::collection::vec(
            ("[a-c/]{1,4}", prop::option::of(0u64..100), any::<bool>()), 0..60), torn in 0usize..80) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("bases");
            let table = BaseTable::open(&path).unwrap();
            for (name, number, first) in &history {
                match (number, first) {
                    (Some(number), true) => table.record_first(Path::new(name), base(*number)),
                    (number, _) => table.replace(Path::new(name), number.map(base)),
                }
            }
            let expected = table.inner().entries.clone();
            drop(table);
            // A record that was being written when the process was killed.
            let whole = std::fs::metadata(&path).unwrap().len();
            let record = encode(Path::new("torn/name"), Some(&base(7)));
            let torn = torn.min(record.len() - 1);
            File::options().append(true).open(&path).unwrap().write_all(&record[..torn]).unwrap();
            let table = BaseTable::open(&path).unwrap();
            prop_assert_eq!(&table.inner().entries, &expected);
            prop_assert_eq!(std::fs::metadata(&path).unwrap().len(), whole);
        }
    }

    #[test]
    fn an_outdated_journal_is_written_anew_and_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bases");
        let table = BaseTable::open(&path).unwrap();
        for number in 0..2000 {
            table.replace(Path::new("same"), Some(base(number)));
        }
        let long = std::fs::metadata(&path).unwrap().len();
        let table = BaseTable::open(&path).unwrap();
        assert!(std::fs::metadata(&path).unwrap().len() * 100 < long);
        table.record_first(Path::new("other"), base(1));
        let table = BaseTable::open(&path).unwrap();
        assert_eq!(
            (table.get(Path::new("same")), table.get(Path::new("other"))),
            (Some(base(1999)), Some(base(1)))
        );
    }
}
