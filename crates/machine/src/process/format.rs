//! What the file of a saved process holds: pages, then a description of them as JSON, then that one's length (8 bytes, little
//! endian).

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

/// Most bytes of a description; 100 KiB are usual.
const DESCRIPTION_LIMIT: u64 = 4 << 20;

/// A saved process.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    pub mappings: Vec<Mapping>,
    /// What the kernel maps into every process.
    pub kernel_mappings: Vec<KernelMapping>,
    /// The one it began with comes first.
    pub threads: Vec<Thread>,
    pub descriptors: Vec<Descriptor>,
    pub actions: Vec<Action>,
    /// How late the kernel may be with its timers, nanoseconds.
    pub timer_slack_ns: u64,
}

/// A part of its address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mapping {
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// `PROT_*`.
    pub protection: i32,
    pub content: Content,
}

/// What is in a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Content {
    /// Nothing that was ever written.
    Empty,
    /// What the file has from here on.
    Pages(u64),
    /// What the machine's memory has from here on.
    Memory(u64),
}

/// A part of it that is the kernel's: its code and data for programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct KernelMapping {
    /// As in `/proc/PID/maps`.
    pub name: String,
    pub start: u64,
    pub length: u64,
}

/// A thread.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Thread {
    pub name: String,
    pub registers: Registers,
    /// Floating point and vectors, as `NT_X86_XSTATE` has them.
    pub extended: Vec<u8>,
    /// The signals it has blocked.
    pub blocked: u64,
    /// Its list of robust mutexes.
    pub robust_list: u64,
    /// Where its id is, which the kernel clears at its end.
    pub id_address: u64,
    /// Where the kernel tells it on which processor it is.
    pub sequence_address: u64,
}

/// The general registers, and the base of the thread's own variables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    /// In the order of `struct sigcontext`: r8 to r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, flags.
    pub general: [u64; 18],
    pub thread_base: u64,
}

/// An open descriptor.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Descriptor {
    pub number: i32,
    /// `O_*`, with `O_CLOEXEC`.
    pub flags: i32,
    pub kind: Kind,
}

/// What it is of.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    /// What goes by this name.
    Passed(String),
    Event {
        count: u64,
    },
    Signals {
        mask: u64,
    },
    Poll {
        interests: Vec<Interest>,
    },
}

/// What is waited for in an `epoll`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Interest {
    pub descriptor: i32,
    pub events: u32,
    pub data: u64,
}

/// What it does on a signal: `struct sigaction` of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Action {
    pub signal: i32,
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

impl Process {
    /// Appends the description to a file whose pages end at `end`.
    pub(super) fn write(&self, file: &File, end: u64) -> io::Result<()> {
        let mut text = serde_json::to_vec(self)?;
        let length = text.len() as u64;
        text.extend_from_slice(&length.to_le_bytes());
        file.write_all_at(&text, end)
    }

    /// Reads the description.
    pub(super) fn read(file: &File) -> io::Result<Self> {
        let damaged = |what: &str| io::Error::new(ErrorKind::InvalidData, format!("a saved process: {what}"));
        let size = file.metadata()?.len();
        let end = size.checked_sub(8).ok_or_else(|| damaged("too short"))?;
        let mut length = [0; 8];
        file.read_exact_at(&mut length, end)?;
        let length = u64::from_le_bytes(length);
        if length > DESCRIPTION_LIMIT.min(end) {
            return Err(damaged("no description"));
        }
        let mut text = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        file.read_exact_at(&mut text, end - length)?;
        Ok(serde_json::from_slice(&text)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_what_is_none_is_refused() {
        let process = Process {
            mappings: vec![Mapping {
                start: 0x7f00_0000_0000,
                length: 4096,
                protection: libc::PROT_READ,
                content: Content::Pages(0),
            }],
            kernel_mappings: Vec::new(),
            threads: Vec::new(),
            descriptors: vec![Descriptor { number: 3, flags: 2, kind: Kind::Passed("qmp".into()) }],
            actions: Vec::new(),
            timer_slack_ns: 1,
        };
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 4096], 0).unwrap();
        process.write(&file, 4096).unwrap();
        assert_eq!(Process::read(&file).unwrap(), process);
        for content in [&b""[..], b"short", &[0xff; 64], &[0; 64]] {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(content, 0).unwrap();
            assert!(Process::read(&file).is_err(), "{content:?}");
        }
    }
}
