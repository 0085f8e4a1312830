//! The cgroup of one program: whatever it starts stays inside, daemons included, so that all of it can be killed.

use std::fs::File;
use std::io::Error;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, openat, unlinkat};

static NEXT: AtomicU64 = AtomicU64::new(1);
/// Cgroups whose programs have ended but whose background processes live on; tried again with each new one.
static OCCUPIED: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// A directory of the cgroup hierarchy, removed when it is empty.
pub(super) struct Cgroup {
    hierarchy: OwnedFd,
    name: String,
    directory: OwnedFd,
}

impl Cgroup {
    pub(super) fn create(hierarchy: &OwnedFd) -> Result<Self, Error> {
        sweep(hierarchy);
        let hierarchy = hierarchy.try_clone()?;
        let name = format!("exec-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        mkdirat(&hierarchy, &name, Mode::from_raw_mode(0o755))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(&hierarchy, &name, flags, Mode::empty())?;
        Ok(Self { hierarchy, name, directory })
    }

    /// Its directory, into which a process is started.
    pub(super) fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    /// Kills every process inside.
    pub(super) fn kill(&self) {
        let file = openat(&self.directory, "cgroup.kill", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        if let Ok(file) = file {
            let _ = std::io::Write::write_all(&mut File::from(file), b"1");
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if !remove(&self.hierarchy, &self.name) {
            occupied().push(std::mem::take(&mut self.name));
        }
    }
}

fn occupied() -> std::sync::MutexGuard<'static, Vec<String>> {
    OCCUPIED.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn remove(hierarchy: &OwnedFd, name: &str) -> bool {
    unlinkat(hierarchy, name, AtFlags::REMOVEDIR).is_ok()
}

/// Removes what became empty meanwhile.
fn sweep(hierarchy: &OwnedFd) {
    occupied().retain(|name| !remove(hierarchy, name));
}
