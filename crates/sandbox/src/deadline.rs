//! A sandbox's time to live.
//!
//! A deadline is kept in the host's wall clock and, for the present boot, in the clock that counts on through suspends
//! and is never set: as long as the host is not restarted a jump of the wall clock neither kills a sandbox nor keeps it.
//!
//! Whoever made a sandbox stop or rest leaves a process that waits for the deadline ([`reap`]), so it holds also if no
//! command is ever typed again. After a restart of the host the next command's sweep sees to it.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::problem::{Problem, io, plain};
use crate::state::{SandboxDirectory, private_file, write_atomically};

const FILE_NAME: &str = "deadline.json";
/// Held by the process that waits for the deadline of a resting sandbox.
const REAPER: &str = "reaper";
/// Longest sleep before the deadline is looked at again: it may have been moved.
const GLANCE: Duration = Duration::from_secs(2);

/// When a sandbox is to be removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deadline {
    /// By the wall clock, milliseconds since the epoch.
    pub unix_ms: u64,
    /// Boot of the host during which it was set (`/proc/sys/kernel/random/boot_id`).
    boot_id: String,
    /// Milliseconds since that boot.
    boot_ms: u64,
}

/// What the host's clocks say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clocks {
    /// The wall clock, milliseconds since the epoch.
    pub unix_ms: u64,
    /// Which boot this is.
    pub boot_id: String,
    /// Milliseconds since the boot, suspends included.
    pub boot_ms: u64,
}

impl Clocks {
    /// Reads the clocks.
    pub fn now() -> Self {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let (seconds, nanoseconds) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            unix_ms: unix_ms(),
            boot_id: boot_id.trim().to_owned(),
            boot_ms: seconds.saturating_mul(1000) + nanoseconds / 1_000_000,
        }
    }
}

/// The wall clock, milliseconds since the epoch.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The wall clock, nanoseconds since the epoch.
pub(crate) fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// A point of the wall clock as RFC 3339 has it, in UTC, to the millisecond.
pub fn rfc3339(unix_ms: u64) -> String {
    // The formatter knows years up to 9999.
    let time = UNIX_EPOCH + Duration::from_millis(unix_ms.min(253_402_300_799_000));
    humantime::format_rfc3339_millis(time).to_string()
}

impl Deadline {
    /// So long from `now`.
    pub fn after(time: Duration, now: &Clocks) -> Self {
        let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Self {
            unix_ms: now.unix_ms.saturating_add(ms),
            boot_id: now.boot_id.clone(),
            boot_ms: now.boot_ms.saturating_add(ms),
        }
    }

    /// Later by `time`, but never in the past.
    pub fn extended(&self, time: Duration, now: &Clocks) -> Self {
        Self::after(self.left(now).saturating_add(time), now)
    }

    /// Time left; zero once it is over.
    pub fn left(&self, now: &Clocks) -> Duration {
        let same_boot = !self.boot_id.is_empty() && self.boot_id == now.boot_id;
        let (end, now) = if same_boot { (self.boot_ms, now.boot_ms) } else { (self.unix_ms, now.unix_ms) };
        Duration::from_millis(end.saturating_sub(now))
    }

    /// Whether time is up.
    pub fn is_over(&self, now: &Clocks) -> bool {
        self.left(now).is_zero()
    }
}

/// The deadline of the sandbox in `directory`, if it has one.
pub fn read(directory: &Path) -> Option<Deadline> {
    serde_json::from_slice(&std::fs::read(directory.join(FILE_NAME)).ok()?).ok()
}

/// Sets the deadline of the sandbox in `directory`, or lifts it.
///
/// # Errors
/// If the disk is full or read-only.
pub fn write(directory: &Path, deadline: Option<&Deadline>) -> Result<(), Problem> {
    let path = directory.join(FILE_NAME);
    let what = || format!("write {}", path.display());
    let Some(deadline) = deadline else {
        return match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io(what())(error)),
            _ => Ok(()),
        };
    };
    let text = serde_json::to_vec(deadline).map_err(|error| plain("deadline", error.to_string(), None))?;
    write_atomically(&path, &text).map_err(io(what()))
}

/// Waits, while nobody holds the sandbox, until its time is up; then removes it. Ends early if it was started (its
/// supervisor sees to it), removed, or given more time than a year.
pub fn reap(directory: PathBuf) -> Result<(), Problem> {
    let sandbox = SandboxDirectory::open(directory)?;
    // One is enough, however often the deadline is moved.
    let path = sandbox.path().join(REAPER);
    let reaper =
        private_file().create(true).truncate(false).open(&path).map_err(io("wait for the deadline"))?;
    if rustix::fs::flock(&reaper, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(());
    }
    loop {
        let Some(deadline) = read(sandbox.path()) else { return Ok(()) };
        let left = deadline.left(&Clocks::now());
        if left.is_zero() {
            sandbox.repair();
            return Ok(());
        }
        std::thread::sleep(left.min(GLANCE));
        if !sandbox.path().exists() || !sandbox.is_dead() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn clocks(unix_ms: u64, boot_id: &str, boot_ms: u64) -> Clocks {
        Clocks { unix_ms, boot_id: boot_id.into(), boot_ms }
    }

    #[test]
    fn a_jump_of_the_wall_clock_changes_nothing_until_the_next_boot() {
        let deadline = Deadline::after(Duration::from_secs(60), &clocks(1_000_000, "one", 5_000));
        for wall in [0, 1_000_000, u64::MAX] {
            assert_eq!(deadline.left(&clocks(wall, "one", 35_000)), Duration::from_secs(30));
            assert!(deadline.is_over(&clocks(wall, "one", 65_000)));
        }
        assert_eq!(deadline.left(&clocks(1_030_000, "two", 10)), Duration::from_secs(30));
        assert!(deadline.is_over(&clocks(1_060_000, "two", 10)));
    }

    proptest! {
        #[test]
        fn more_time_is_added_to_what_is_left(first in 0u64..1 << 40, passed in 0u64..1 << 40, more in 0u64..1 << 40) {
            let begin = clocks(7, "one", 9);
            let later = clocks(7 + passed, "one", 9 + passed);
            let deadline = Deadline::after(Duration::from_millis(first), &begin);
            let extended = deadline.extended(Duration::from_millis(more), &later);
            prop_assert_eq!(
                extended.left(&later),
                Duration::from_millis(first.saturating_sub(passed) + more)
            );
        }
    }
}
