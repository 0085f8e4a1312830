//! The cgroup of one program: whatever it starts stays inside, daemons included, so that all of it can be killed, and
//! its number bounded. All of them lie in one group, so that all programs can be made to stand still.

use std::collections::HashSet;
use std::fs::File;
use std::io::Error;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, openat, unlinkat};

use crate::configure::read_below;
use crate::system;

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
    /// Makes one below `hierarchy` for at most `limit` processes and threads.
    pub(super) fn create(hierarchy: &OwnedFd, limit: u32) -> Result<Self, Error> {
        sweep(hierarchy);
        let hierarchy = hierarchy.try_clone()?;
        let name = format!("exec-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        mkdirat(&hierarchy, &name, Mode::from_raw_mode(0o755))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(&hierarchy, &name, flags, Mode::empty())?;
        let cgroup = Self { hierarchy, name, directory };
        write(&cgroup.directory, "pids.max", &limit.to_string())?;
        Ok(cgroup)
    }

    /// Its directory, into which a process is started.
    pub(super) fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    /// Kills every process inside.
    pub(super) fn kill(&self) {
        let _ = write(&self.directory, "cgroup.kill", "1");
    }
}

impl Cgroup {
    /// Whether no process is left inside.
    pub(super) fn is_empty(&self) -> bool {
        let events = read_below(&self.directory, "cgroup.events", 4096).unwrap_or_default();
        String::from_utf8_lossy(&events).lines().any(|line| line == "populated 0")
    }
}

/// Programs that are asked to end with a signal of their own.
static STOP_SIGNALS: Mutex<Vec<StopSignal>> = Mutex::new(Vec::new());

/// How one of them is asked.
struct StopSignal {
    pid: i32,
    signal: u8,
    directory: OwnedFd,
}

/// While this lives, its program is asked to end with a signal of its own.
pub(super) struct Asked(i32);

impl Cgroup {
    /// Has the program `pid` of this group asked with `signal`, it alone: what it started is its own affair.
    pub(super) fn ask_with(&self, pid: i32, signal: u8) -> Result<Asked, Error> {
        let directory = self.directory.try_clone()?;
        stop_signals().push(StopSignal { pid, signal, directory });
        Ok(Asked(pid))
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        stop_signals().retain(|program| program.pid != self.0);
    }
}

fn stop_signals() -> std::sync::MutexGuard<'static, Vec<StopSignal>> {
    STOP_SIGNALS.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Asks all programs to end: those that have a signal of their own with that, all others with SIGTERM.
pub(crate) fn ask_all() {
    let programs = stop_signals();
    if programs.is_empty() {
        system::kill(-1, libc::SIGTERM);
        return;
    }
    let members = |program: &StopSignal| {
        let listed = read_below(&program.directory, "cgroup.procs", PROCESS_LIST).unwrap_or_default();
        let listed = String::from_utf8_lossy(&listed).into_owned();
        listed.lines().filter_map(|line| line.parse().ok()).collect::<Vec<i32>>()
    };
    let spared: HashSet<i32> = programs.iter().flat_map(members).collect();
    let running = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let running = running.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    for pid in running.filter(|pid| *pid != 1 && !spared.contains(pid)) {
        system::kill(pid, libc::SIGTERM);
    }
    for program in programs.iter() {
        system::kill(program.pid, i32::from(program.signal));
    }
}

/// Most bytes of a list of processes: those of the largest `pids.max`.
const PROCESS_LIST: usize = 1 << 20;

/// Writes to one of a group's control files.
pub(crate) fn write(directory: &OwnedFd, name: &str, text: &str) -> Result<(), Error> {
    let file = openat(directory, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    std::io::Write::write_all(&mut File::from(file), text.as_bytes())
}

/// Longest wait until all programs stand still: one that is inside a system call first leaves it.
const FREEZE_PATIENCE: Duration = Duration::from_secs(2);

/// While this lives, the programs stand still.
pub(crate) struct Frozen(OwnedFd);

impl Frozen {
    /// Stops all programs of `hierarchy`. Waits; not for the runtime's thread.
    pub(crate) fn freeze(hierarchy: &OwnedFd) -> Result<Self, Error> {
        let frozen = Self(hierarchy.try_clone()?);
        write(&frozen.0, "cgroup.freeze", "1")?;
        let deadline = Instant::now() + FREEZE_PATIENCE;
        while Instant::now() < deadline {
            let events = read_below(&frozen.0, "cgroup.events", 4096)?;
            if String::from_utf8_lossy(&events).lines().any(|line| line == "frozen 1") {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = write(&self.0, "cgroup.freeze", "0");
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
