//! The directory of prepared root file systems, and scratch files in it.
//!
//! ```text
//! CACHE/KEY.erofs        a whole root file system, named by its content; read-only
//! CACHE/tmp-PID-N        being written; its writer holds an flock on it
//! ```
//! A scratch file that nobody locks was left by a killed process: the next call removes it. A finished one is synced
//! and renamed, so that two processes at work on one image merely do it twice, and nobody ever sees half a file.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, flock};

use crate::error::ImageError;

/// What file names of whole root file systems end with.
pub(crate) const ENDING: &str = "erofs";
const SCRATCH_PREFIX: &str = "tmp-";
const ATTEMPTS: usize = 100;

/// The directory, made private if it is not there, and swept of what killed processes left.
#[derive(Debug)]
pub(crate) struct Cache {
    directory: PathBuf,
}

impl Cache {
    pub(crate) fn open(directory: &Path) -> Result<Self, ImageError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|source| ImageError::cache("create", directory, source))?;
        let cache = Self { directory: directory.to_owned() };
        cache.sweep().map_err(|source| ImageError::cache("clean up", directory, source))?;
        Ok(cache)
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn path(&self, key: &str) -> PathBuf {
        self.directory.join(format!("{key}.{ENDING}"))
    }

    /// A new scratch file, locked, removed when dropped.
    pub(crate) fn scratch(&self) -> Result<Scratch, ImageError> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        for _ in 0..ATTEMPTS {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = self.directory.join(format!("{SCRATCH_PREFIX}{}-{number}", std::process::id()));
            match self.try_scratch(&path) {
                Ok(Some(scratch)) => return Ok(scratch),
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(ImageError::cache("create", path, source)),
            }
        }
        let source = io::ErrorKind::AlreadyExists.into();
        Err(ImageError::cache("create a scratch file in", &self.directory, source))
    }

    /// A scratch file without a name: gone with its last descriptor.
    pub(crate) fn unnamed(&self) -> Result<File, ImageError> {
        let scratch = self.scratch()?;
        scratch.file.try_clone().map_err(|source| ImageError::cache("open", &scratch.path, source))
    }

    /// `None` if a sweeper took the file between its creation and its lock.
    fn try_scratch(&self, path: &Path) -> io::Result<Option<Scratch>> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        flock(&file, FlockOperation::LockExclusive)?;
        let scratch = Scratch { file, path: path.to_owned(), named: true };
        if scratch.file.metadata()?.nlink() == 0 {
            return Ok(None);
        }
        Ok(Some(scratch))
    }

    fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(SCRATCH_PREFIX) && entry.file_type()?.is_file()
            {
                // Gone meanwhile, or not ours to open: not worth failing for.
                let _ = remove_if_abandoned(&entry.path());
            }
        }
        Ok(())
    }
}

fn remove_if_abandoned(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => fs::remove_file(path),
        Err(_) => Ok(()),
    }
}

/// A file being written.
#[derive(Debug)]
pub(crate) struct Scratch {
    pub(crate) file: File,
    path: PathBuf,
    named: bool,
}

impl Scratch {
    /// Makes the finished file visible under `target`, whole and on disk.
    pub(crate) fn publish(mut self, target: &Path) -> Result<(), ImageError> {
        let failed = |action| move |source: io::Error| ImageError::cache(action, target, source);
        self.file
            .set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o444))
            .map_err(failed("write"))?;
        self.file.sync_all().map_err(failed("write"))?;
        fs::rename(&self.path, target).map_err(failed("create"))?;
        self.named = false;
        let directory = target.parent().unwrap_or(Path::new("."));
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed("write"))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.named {
            // Nothing to be done about a failure here; the next sweep tries again.
            let _ = fs::remove_file(&self.path);
        }
    }
}
