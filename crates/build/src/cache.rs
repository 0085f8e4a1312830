//! What was built before: a record for each step, named by everything that the step's outcome depends on.
//!
//! ```text
//! CACHE/KEY    JSON: the layer that the step made, or that it made none; written whole, replaced, never changed
//! ```
//! A record is a hint: its layer must still be in the store. Its last use is the file's time.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use agentkernel_image::{Descriptor, Digest, Store};
use serde::{Deserialize, Serialize};

/// Records of steps.
#[derive(Debug, Clone)]
pub struct Cache {
    directory: PathBuf,
}

/// What a step made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The layer and its digest once uncompressed; `None` if nothing changed.
    pub layer: Option<(Descriptor, Digest)>,
}

/// Everything that a step's outcome depends on, in one digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key(Digest);

impl Key {
    /// The key of nothing.
    pub fn begin() -> Self {
        Self(Digest::of(b"agentkernel build cache 1\n"))
    }

    /// This key and one more thing, whose parts cannot be confused with each other.
    pub fn with<'a>(&self, what: &str, parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut text = Vec::new();
        let mut push = |part: &[u8]| {
            text.extend_from_slice(&(part.len() as u64).to_le_bytes());
            text.extend_from_slice(part);
        };
        push(&self.0.bytes());
        push(what.as_bytes());
        parts.into_iter().for_each(push);
        Self(Digest::of(&text))
    }
}

impl Cache {
    /// The cache in `directory`, made if it is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(directory: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// What the step of `key` made, if its layer is still there.
    pub fn find(&self, key: &Key, store: &Store) -> Option<Record> {
        let path = self.directory.join(key.0.hex());
        let record: Record = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
        let there = record.layer.as_ref().is_none_or(|(layer, _)| store.contains(&layer.digest, layer.size));
        if there && let Ok(file) = fs::File::open(&path) {
            let _ = file.set_modified(SystemTime::now());
        }
        there.then_some(record)
    }

    /// Remembers what a step made.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn keep(&self, key: &Key, record: &Record) -> io::Result<()> {
        let path = self.directory.join(key.0.hex());
        let draft = self.directory.join(format!(".{}-{}", key.0.hex(), std::process::id()));
        fs::write(&draft, serde_json::to_vec(record)?)?;
        fs::rename(&draft, &path)
    }

    /// Waits until nobody else uses what the record of `key` is about.
    ///
    /// # Errors
    /// If it cannot be locked.
    pub fn lock(&self, key: &Key) -> io::Result<fs::File> {
        let path = self.directory.join(format!("{}.lock", key.0.hex()));
        let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        file.lock()?;
        Ok(file)
    }

    /// Layers that records lead to.
    ///
    /// # Errors
    /// If the cache cannot be read.
    pub fn layers(&self) -> io::Result<HashSet<Digest>> {
        let mut layers = HashSet::new();
        for entry in fs::read_dir(&self.directory)? {
            let record =
                fs::read(entry?.path()).ok().and_then(|text| serde_json::from_slice::<Record>(&text).ok());
            layers.extend(record.and_then(|record| record.layer).map(|(layer, _)| layer.digest));
        }
        Ok(layers)
    }

    /// Forgets everything.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn clear(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            fs::remove_file(entry?.path())?;
        }
        Ok(())
    }
}
