//! One file that the guarded program opens for reading and writing, and gets read-only.
//!
//! QEMU before version 8.2 opens the file behind a guest's memory for writing even where it is mapped privately. Templates
//! are such files, mapped by many machines: one that could write to it would reach all others. So the open call itself is
//! handed to the supervisor (seccomp's user notification, Linux 5.14), which answers it with a descriptor that can only
//! be read; the file has no path that the program could open again.
//!
//! ```text
//! jail:        filter: openat(..., O_RDWR) asks    ── listener ──>  supervisor: answers the first one, closes the listener
//! program:     openat("/memory", O_RDWR)  = a descriptor for reading; from then on such calls fail with ENOSYS
//! ```
//! Only calls with exactly these flags ask: QEMU opens devices with `O_CLOEXEC` besides.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long the program may take to open its file: it does so within the first milliseconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// `AUDIT_ARCH_X86_64` of `linux/audit.h`.
const ARCHITECTURE: u32 = 0xc000_003e;
/// Offsets in `struct seccomp_data`.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const FLAGS_AT: u32 = 16 + 2 * 8;

/// Puts the filter in place and returns where its questions arrive.
pub(super) fn listen() -> io::Result<OwnedFd> {
    let statement = |code: u32, value: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k: value };
    // On a match the next statement follows, else the one that allows.
    let unless = |value: u32, skip: u8| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: 0,
        jf: skip,
        k: value,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let program = [
        statement(load, ARCHITECTURE_AT),
        unless(ARCHITECTURE, 5),
        statement(load, NUMBER_AT),
        unless(libc::SYS_openat as u32, 3),
        statement(load, FLAGS_AT),
        unless(libc::O_RDWR as u32, 1),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the program and what it points to live through the call; no_new_privs is set, or the kernel refuses.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    match i32::try_from(listener) {
        // SAFETY: a new descriptor that nobody else owns.
        Ok(descriptor @ 0..) => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Answers the program's open call with `file`, once.
pub(super) fn answer(listener: &OwnedFd, file: &File) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut polled = [PollFd::new(listener, PollFlags::IN)];
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) if polled[0].revents().contains(PollFlags::IN) => {}
            // The program has ended.
            Ok(_) => return Err(io::ErrorKind::BrokenPipe.into()),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        // SAFETY: all-zero bytes are a valid `seccomp_notif`, which is what the kernel wants to be given.
        let mut question: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        if !request(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut question) {
            match io::Error::last_os_error() {
                // The one who asked is gone, or was interrupted and asks again.
                error if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => continue,
                error => return Err(error),
            }
        }
        let mut descriptor = libc::seccomp_notif_addfd {
            id: question.id,
            flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
            srcfd: file.as_raw_fd().unsigned_abs(),
            newfd: 0,
            newfd_flags: libc::O_CLOEXEC as u32,
        };
        if request(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD, &raw mut descriptor) {
            return Ok(());
        }
        match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => {}
            error => return Err(error),
        }
    }
}

fn request<T>(listener: i32, request: libc::Ioctl, argument: *mut T) -> bool {
    // SAFETY: each request is given the structure that it is defined with, which lives through the call.
    unsafe { libc::ioctl(listener, request, argument) >= 0 }
}
