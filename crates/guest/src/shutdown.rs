//! The end of the machine: programs first, then the disks, then the power.

use std::time::{Duration, Instant};

use crate::system;

/// Asks all programs to end, waits up to `grace`, kills the rest. The reaper collects them.
pub(crate) async fn end_programs(grace: Duration) {
    let deadline = Instant::now() + grace;
    crate::exec::cgroup::ask_all();
    while system::has_children() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let deadline = Instant::now() + Duration::from_secs(2);
    while system::has_children() && Instant::now() < deadline {
        system::kill(-1, libc::SIGKILL);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Writes everything to the disks and makes their file systems read-only, so that they are clean.
pub(crate) fn write_back() {
    rustix::fs::sync();
    // The emergency remount reaches every file system, also those hidden below the root.
    if std::fs::write("/proc/sysrq-trigger", "u").is_ok() {
        // It runs in the kernel's own time; a second sync waits for what it started.
        std::thread::sleep(Duration::from_millis(30));
    }
    rustix::fs::sync();
}

/// Ends the machine. A restart, which the machine's process takes for the end: without ACPI there is no power-off.
pub(crate) fn end_machine() {
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
}
