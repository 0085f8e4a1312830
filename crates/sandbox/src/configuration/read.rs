//! Reading small files of a hostile project.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The system's reason.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The last part of its path is a symbolic link, which could lead anywhere.
    #[error("it is a symbolic link, which is not followed")]
    Link,
    /// It is a directory, a device, a pipe or a socket.
    #[error("it is not a regular file")]
    Kind,
    /// It has more than this many bytes.
    #[error("it is larger than {} KiB", .0 >> 10)]
    Size(u64),
    /// It is not UTF-8.
    #[error("line {line} is not UTF-8 text")]
    Text {
        /// The first bad line, from 1.
        line: usize,
    },
}

/// Reads a regular file of at most `largest` bytes as text. The path's last part must not be a symbolic link.
pub(super) fn read_text(path: &Path, largest: u64) -> Result<String, ReadError> {
    // A pipe would otherwise make the open wait for its other end.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path);
    let file = file.map_err(|error| match error.raw_os_error() {
        Some(code) if code == rustix::io::Errno::LOOP.raw_os_error() => ReadError::Link,
        // A socket.
        Some(code) if code == rustix::io::Errno::NXIO.raw_os_error() => ReadError::Kind,
        _ => ReadError::Io(error),
    })?;
    if !file.metadata()?.is_file() {
        return Err(ReadError::Kind);
    }
    let mut bytes = Vec::new();
    // Its size may change while it is read.
    file.take(largest + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > largest {
        return Err(ReadError::Size(largest));
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = error.as_bytes().get(..error.utf8_error().valid_up_to()).unwrap_or_default();
        ReadError::Text { line: 1 + good.iter().filter(|byte| **byte == b'\n').count() }
    })
}
