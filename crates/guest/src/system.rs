//! Calls to the kernel that no safe wrapper offers.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Error;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use tokio::io::unix::AsyncFd;

/// `RNDADDENTROPY` of `linux/random.h`.
const ADD_ENTROPY: libc::c_ulong = 0x4008_5203;
/// `RNDRESEEDCRNG` of `linux/random.h`.
const RESEED: libc::c_ulong = 0x5207;
/// Bytes of randomness taken in one go.
const ENTROPY: usize = 64;

#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; ENTROPY],
}

/// Mixes `entropy` into the kernel's pool, credits it, and makes the generator take it up at once.
pub(crate) fn reseed(entropy: &[u8]) -> Result<(), Error> {
    let random = File::options().write(true).open("/dev/urandom")?;
    let size = entropy.len().min(ENTROPY);
    let mut info =
        PoolInfo { entropy_bits: (size * 8) as libc::c_int, size: size as libc::c_int, bytes: [0; ENTROPY] };
    info.bytes[..size].copy_from_slice(&entropy[..size]);
    // SAFETY: `info` has the layout of `struct rand_pool_info` with its buffer behind it, and lives through the call.
    if unsafe { libc::ioctl(random.as_raw_fd(), ADD_ENTROPY, &raw const info) } != 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: this request takes no argument.
    if unsafe { libc::ioctl(random.as_raw_fd(), RESEED) } != 0 {
        return Err(Error::last_os_error());
    }
    Ok(())
}

/// Enters a descriptor into the event loop.
pub(crate) fn register<T: Into<OwnedFd> + AsRawFd>(owner: T) -> Result<AsyncFd<T>, Error> {
    // SAFETY: `owner` owns its descriptor (it converts into an `OwnedFd`), so that stays open and the same for as long
    // as the `AsyncFd` has the owner.
    unsafe { AsyncFd::register(owner) }.map_err(Into::into)
}

/// Foreground process group of the terminal whose master is `terminal`.
pub(crate) fn foreground_group(terminal: BorrowedFd<'_>) -> Option<i32> {
    let mut group: libc::pid_t = 0;
    // SAFETY: the request writes one `pid_t` to the address it is given.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGPGRP, &raw mut group) };
    (result == 0 && group > 0).then_some(group)
}

/// Bytes that can be read from `descriptor` now.
pub(crate) fn readable_bytes(descriptor: BorrowedFd<'_>) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: the request writes one `int` to the address it is given.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if result == 0 { usize::try_from(count).unwrap_or(0) } else { 0 }
}

/// Sends `signal` to a process, or to a group if `process` is negative, or to all but this one if it is -1.
pub(crate) fn kill(process: i32, signal: i32) -> bool {
    // SAFETY: takes plain numbers.
    unsafe { libc::kill(process, signal) == 0 }
}

/// Collects one ended child, whoever it was; `None` if there is none now.
pub(crate) fn reap() -> Option<(i32, i32)> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    (pid > 0).then_some((pid, status))
}

/// True while any process but the kernel's own is there: all of them descend from this one.
pub(crate) fn has_children() -> bool {
    // SAFETY: all-zero bytes are a valid `siginfo_t`, and `information` lives through the call.
    unsafe {
        let mut information: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        libc::waitid(libc::P_ALL, 0, &raw mut information, flags) == 0
    }
}
