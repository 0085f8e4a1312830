//! The last change set: what `apply --last` takes.
//!
//! ```text
//! <state>/last/            the last set
//! <state>/last.new-XXXX/   one being recorded, or the former one about to go
//! <state>/last.old-XXXX/   only where the file system cannot exchange two names
//! ```
//!
//! A new set is complete and durable before it takes the place of the last one, in one step. Several processes may
//! do so at once: each removes only what it got in exchange.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;

use super::changes::{ChangeSet, ChangeSetError, random_hex, remove_set};

const LAST: &str = "last";
const NEW: &str = "last.new-";
const OLD: &str = "last.old-";
/// How often a set that vanishes while it is read is tried again.
const RELOADS: usize = 100;
/// A set this young may belong to a process that is between two steps.
const ABANDONED_AFTER: Duration = Duration::from_secs(60);

/// The place for the last set in a state directory.
#[derive(Clone, Debug)]
pub struct LastChanges {
    state: PathBuf,
}

impl LastChanges {
    /// The place in `state`, which must exist.
    pub fn new(state: &Path) -> Self {
        Self { state: state.to_owned() }
    }

    /// A name for the next [`ChangeRecorder`](super::ChangeRecorder), not in use.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn fresh(&self) -> io::Result<PathBuf> {
        Ok(self.state.join(format!("{NEW}{}", random_hex()?)))
    }

    /// Makes `set`, recorded at a [`fresh`](Self::fresh) name, the last one, and removes the former.
    ///
    /// # Errors
    /// The set could not be moved; the former one is untouched.
    pub fn keep(&self, mut set: ChangeSet) -> Result<ChangeSet, ChangeSetError> {
        let last = self.state.join(LAST);
        let former = self.exchange(set.directory(), &last).map_err(ChangeSetError::io(&last))?;
        set.moved_to(last);
        if let Some(former) = former {
            // What cannot be removed now is swept later.
            let _ = remove_set(&former);
        }
        Ok(set)
    }

    /// Puts `new` at `last`; the former one's new place.
    fn exchange(&self, new: &Path, last: &Path) -> io::Result<Option<PathBuf>> {
        let former = loop {
            match rustix::fs::renameat_with(CWD, new, CWD, last, RenameFlags::EXCHANGE) {
                Ok(()) => break Some(new.to_owned()),
                Err(Errno::NOENT) => {}
                Err(Errno::INVAL | Errno::NOSYS) => break self.exchange_in_steps(new, last)?,
                Err(error) => return Err(error.into()),
            }
            match rustix::fs::renameat_with(CWD, new, CWD, last, RenameFlags::NOREPLACE) {
                Ok(()) => break None,
                // Another process was first: exchange with its set.
                Err(Errno::EXIST) => {}
                Err(Errno::INVAL | Errno::NOSYS) => break self.exchange_in_steps(new, last)?,
                Err(error) => return Err(error.into()),
            }
        };
        File::open(&self.state)?.sync_all()?;
        Ok(former)
    }

    fn exchange_in_steps(&self, new: &Path, last: &Path) -> io::Result<Option<PathBuf>> {
        let old = self.state.join(format!("{OLD}{}", random_hex()?));
        let former = match std::fs::rename(last, &old) {
            Ok(()) => Some(old),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        std::fs::rename(new, last)?;
        Ok(former)
    }

    /// The last set; `None` if there is none.
    ///
    /// # Errors
    /// There is one that cannot be read.
    pub fn load(&self) -> Result<Option<ChangeSet>, ChangeSetError> {
        let last = self.state.join(LAST);
        for _ in 0..RELOADS {
            match ChangeSet::load(&last) {
                Ok(set) => return Ok(Some(set)),
                // It was exchanged for another and removed between two steps of reading it.
                Err(error) if error.is_absent() && last.exists() => {}
                Err(error) if error.is_absent() => return self.load_former(&last),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// A process that died between two renames left no last set but the former one.
    fn load_former(&self, last: &Path) -> Result<Option<ChangeSet>, ChangeSetError> {
        let names = self.names(OLD).map_err(ChangeSetError::io(&self.state))?;
        for name in names {
            if std::fs::rename(self.state.join(name), last).is_ok() {
                return ChangeSet::load(last).map(Some);
            }
        }
        Ok(None)
    }

    /// Removes what processes that died left: unfinished recordings and sets that were replaced.
    ///
    /// # Errors
    /// The state directory cannot be read. A set that cannot be removed is tried again the next time.
    pub fn sweep(&self) -> io::Result<()> {
        let has_last = self.state.join(LAST).exists();
        let old = if has_last { self.names(OLD)? } else { Vec::new() };
        for name in self.names(NEW)?.into_iter().chain(old) {
            let path = self.state.join(name);
            if is_abandoned(&path) {
                let _ = remove_set(&path);
            }
        }
        Ok(())
    }

    fn names(&self, prefix: &str) -> io::Result<Vec<std::ffi::OsString>> {
        let names: io::Result<Vec<_>> =
            std::fs::read_dir(&self.state)?.map(|entry| Ok(entry?.file_name())).collect();
        let matches = |name: &OsStr| name.as_bytes().starts_with(prefix.as_bytes());
        Ok(names?.into_iter().filter(|name| matches(name)).collect())
    }
}

/// No recorder holds it, and nobody wrote into it lately.
fn is_abandoned(path: &Path) -> bool {
    let Ok(directory) = File::open(path) else { return false };
    let age = directory.metadata().and_then(|metadata| metadata.modified()).map(|time| time.elapsed());
    // A time in the future: the clock was set back; the lock alone decides.
    let old = age.is_ok_and(|age| age.map_or(true, |age| age >= ABANDONED_AFTER));
    old && rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive).is_ok()
}
