//! The local store: one OCI image layout, shared by all processes of a user.
//!
//! ```text
//! STORE/oci-layout, index.json    names and the manifests they mean
//! STORE/blobs/sha256/HEX          documents and layers, named by content, read-only
//! STORE/ingest/                   blobs being written
//! STORE/lock                      held while index.json is changed
//! STORE/in-use                    held shared by whoever adds blobs that no name leads to yet, alone by `prune`
//! ```
//! A blob becomes visible whole, synced and verified, or not at all; so does a change of a name. Whoever is killed
//! leaves a scratch file, which the next one removes, and blobs that no name leads to, which `prune` removes. Since all
//! locks are `flock`s, the dead hold none.

mod blobs;
mod error;
mod export;
mod import;
mod names;
mod prune;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::cache::Cache;
use crate::digest::Digest;

pub use blobs::BlobWriter;
pub use error::StoreError;
pub(crate) use import::MANIFEST;
pub use names::{ListedImage, StoredImage};
pub use prune::Pruned;

/// The file that makes a directory an OCI image layout.
const OCI_LAYOUT: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;
/// How long a change of a name waits for others' changes, which take milliseconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(20);
/// How long `prune` waits for builds and pulls to end.
const PRUNE_PATIENCE: Duration = Duration::from_secs(2);

/// The store in a directory.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// The right to add blobs: what is added stays until this is dropped, whether a name leads to it or not.
#[derive(Debug)]
pub struct Writing {
    store: Store,
    ingest: Cache,
    _lock: File,
}

impl Store {
    /// Opens the store in `root`, and makes it if it is not there.
    ///
    /// # Errors
    /// If the directory cannot be made or written.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let blobs = root.join("blobs/sha256");
        if !blobs.is_dir() {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&blobs);
            made.map_err(StoreError::at("make", &blobs))?;
        }
        let layout = root.join("oci-layout");
        if !layout.exists() {
            replace(&layout, OCI_LAYOUT.as_bytes())?;
        }
        Ok(Self { root: root.to_owned() })
    }

    /// Its directory, an OCI image layout.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Starts adding blobs.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub fn writing(&self) -> Result<Writing, StoreError> {
        let lock = self.lock("in-use", FlockOperation::NonBlockingLockShared, LOCK_PATIENCE)?;
        let ingest = Cache::open(&self.root.join("ingest"))?;
        Ok(Writing { store: self.clone(), ingest, _lock: lock })
    }

    /// Where a blob lies.
    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// A lock file, locked; given up when dropped.
    fn lock(&self, name: &str, how: FlockOperation, patience: Duration) -> Result<File, StoreError> {
        let path = self.root.join(name);
        let opened =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = opened.map_err(StoreError::at("open", &path))?;
        let deadline = Instant::now() + patience;
        loop {
            match flock(&file, how) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(StoreError::Busy { path }),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(StoreError::at("lock", &path)(error.into())),
            }
        }
    }
}

impl Writing {
    /// The store that is written to.
    pub fn store(&self) -> &Store {
        &self.store
    }
}

/// Replaces a small file whole: written beside it, synced, renamed.
fn replace(path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let draft = path.with_extension(format!("new-{}", std::process::id()));
    let written = write_synced(&draft, content).and_then(|()| fs::rename(&draft, path));
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written.map_err(StoreError::at("write", path))?;
    let directory = path.parent().unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(StoreError::at("write", path))
}

fn write_synced(path: &Path, content: &[u8]) -> io::Result<()> {
    use std::io::Write as _;
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}
