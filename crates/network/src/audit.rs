//! The record of what a network decided: one line of JSON each, in two files of bounded size that take turns.
//!
//! The files are opened before the writer confines itself, so no more than these two is ever written. A reader sees the
//! lines of both in the order of their numbers.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::SystemTime;

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use crate::Protocol;

/// Names of the two files.
const FILES: [&str; 2] = ["network-0.jsonl", "network-1.jsonl"];
/// Most bytes of each.
const FILE_LIMIT: u64 = 2 << 20;
/// Longest line that a reader takes, bytes.
const LINE_LIMIT: u64 = 4096;
const NO_FOLLOW: i32 = OFlags::NOFOLLOW.bits().cast_signed();

/// What was decided, or became of what was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The policy permits it.
    Allowed,
    /// The policy refuses it.
    Refused,
    /// It was permitted and did not come about: nobody answers.
    Failed,
    /// A connection that was permitted has ended; its bytes are known.
    Ended,
    /// A connection was given up for another one: there are as many as there may be.
    Dropped,
}

/// How it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A TCP connection.
    Tcp,
    /// UDP between two ports.
    Udp,
    /// A question for a name.
    Dns,
    /// A connection to a published port.
    Published,
}

impl From<Protocol> for Kind {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp,
            Protocol::Udp => Self::Udp,
        }
    }
}

/// A line of the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its number; each is one higher than the one before.
    pub sequence: u64,
    /// When, milliseconds since 1970.
    pub unix_ms: u64,
    /// What was decided.
    pub verdict: Verdict,
    /// How it was asked for.
    pub kind: Kind,
    /// The name that was asked for, or that led to the address.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub name: Option<String>,
    /// The address; none for a question for a name that was refused.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub address: Option<IpAddr>,
    /// The port.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub port: Option<u16>,
    /// What it was decided by: a rule, `public`, an entry of the floor, `no rule`, `no network`.
    pub rule: String,
    /// The rule that would permit what was refused, for `--allow`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub allow: Option<String>,
    /// In words, what was refused and why, or why it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
    /// Bytes that the guest sent.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sent: Option<u64>,
    /// Bytes that the guest received.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub received: Option<u64>,
    /// How long it lasted, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub lasted_ms: Option<u64>,
}

impl Entry {
    /// An entry of which nothing else is known. The log gives it its number and time.
    pub fn new(verdict: Verdict, kind: Kind, rule: impl Into<String>) -> Self {
        Self {
            sequence: 0,
            unix_ms: 0,
            verdict,
            kind,
            name: None,
            address: None,
            port: None,
            rule: rule.into(),
            allow: None,
            reason: None,
            sent: None,
            received: None,
            lasted_ms: None,
        }
    }
}

/// Writes the record.
#[derive(Debug)]
pub struct AuditLog {
    files: [File; 2],
    /// The file that is written.
    current: usize,
    written: u64,
    next: u64,
}

impl AuditLog {
    /// Opens the record in a directory, and goes on with the one that is there.
    ///
    /// # Errors
    /// If the files cannot be opened.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let newest = read(directory)?.last().map_or(0, |entry| entry.sequence);
        let mut options = File::options();
        options.read(true).append(true).create(true).mode(0o600).custom_flags(NO_FOLLOW);
        let open = |name: &str| options.open(directory.join(name));
        let files = [open(FILES[0])?, open(FILES[1])?];
        let last = |index: usize| -> io::Result<u64> {
            Ok(read_file(&directory.join(FILES[index]))?.last().map_or(0, |entry| entry.sequence))
        };
        let current = usize::from(last(1)? > last(0)?);
        let mut log = Self { written: files[current].metadata()?.len(), files, current, next: newest + 1 };
        // What a crash left of a line must not spoil the next one.
        if log.written > 0 {
            log.append(b"\n");
        }
        Ok(log)
    }

    /// Writes an entry. A full disk loses it: what is decided does not depend on whether it can be written down.
    pub fn write(&mut self, mut entry: Entry) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        entry.unix_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        entry.sequence = self.next;
        self.next += 1;
        let Ok(mut line) = serde_json::to_vec(&entry) else { return };
        line.push(b'\n');
        if self.written + line.len() as u64 > FILE_LIMIT {
            self.current = 1 - self.current;
            self.written = 0;
            if self.files[self.current].set_len(0).is_err() {
                return;
            }
        }
        self.append(&line);
    }

    fn append(&mut self, bytes: &[u8]) {
        if self.files[self.current].write_all(bytes).is_ok() {
            self.written += bytes.len() as u64;
        }
    }
}

/// All entries of the record in a directory, oldest first; none if there is no record.
///
/// # Errors
/// If a file cannot be read. Lines that are damaged are left out.
pub fn read(directory: &Path) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for name in FILES {
        entries.extend(read_file(&directory.join(name))?);
    }
    entries.sort_by_key(|entry| entry.sequence);
    Ok(entries)
}

/// The number of the newest entry of the record in a directory, without reading the others; 0 if there is none.
///
/// # Errors
/// If a file cannot be read.
pub fn last_sequence(directory: &Path) -> io::Result<u64> {
    let mut last = 0;
    for name in FILES {
        let mut file = match File::options().read(true).custom_flags(NO_FOLLOW).open(directory.join(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        // Two lines, so that one of them is whole.
        let end = file.metadata()?.len();
        file.seek(SeekFrom::Start(end.saturating_sub(2 * LINE_LIMIT)))?;
        let mut tail = Vec::new();
        file.take(2 * LINE_LIMIT).read_to_end(&mut tail)?;
        let lines = tail.split(|byte| *byte == b'\n').rev();
        let newest = lines.filter_map(|line| serde_json::from_slice::<Entry>(line).ok()).next();
        last = last.max(newest.map_or(0, |entry| entry.sequence));
    }
    Ok(last)
}

fn read_file(path: &Path) -> io::Result<Vec<Entry>> {
    let file = match File::options().read(true).custom_flags(NO_FOLLOW).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut reader = BufReader::new(file.take(2 * FILE_LIMIT));
    let mut entries = Vec::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line)? == 0 {
            return Ok(entries);
        }
        if line.len() as u64 <= LINE_LIMIT {
            entries.extend(serde_json::from_slice::<Entry>(&line));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(port: u16) -> Entry {
        Entry { port: Some(port), ..Entry::new(Verdict::Allowed, Kind::Tcp, "public") }
    }

    #[test]
    fn the_record_goes_on_after_a_crash_within_a_line() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(read(directory.path()).unwrap(), []);
        assert_eq!(last_sequence(directory.path()).unwrap(), 0);
        AuditLog::open(directory.path()).unwrap().write(entry(1));
        let path = directory.path().join(FILES[0]);
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"{\"sequence\":2,\"unix").unwrap();
        AuditLog::open(directory.path()).unwrap().write(entry(2));
        let ports: Vec<_> = read(directory.path()).unwrap().iter().map(|entry| entry.port).collect();
        assert_eq!(ports, [Some(1), Some(2)]);
        assert_eq!(last_sequence(directory.path()).unwrap(), 2);
    }

    #[test]
    fn the_record_is_bounded_and_keeps_the_newest() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = AuditLog::open(directory.path()).unwrap();
        for _ in 0..60_000 {
            log.write(entry(7));
        }
        drop(log);
        let mut log = AuditLog::open(directory.path()).unwrap();
        log.write(entry(9));
        let bytes: u64 = FILES.iter().map(|name| directory.path().join(name).metadata().unwrap().len()).sum();
        assert!(bytes <= 2 * FILE_LIMIT, "{bytes}");
        let entries = read(directory.path()).unwrap();
        assert_eq!(entries.last().unwrap().sequence, 60_001);
        assert_eq!(last_sequence(directory.path()).unwrap(), 60_001);
        assert!(entries.windows(2).all(|pair| pair[0].sequence + 1 == pair[1].sequence));
        assert!(entries.len() > 10_000, "{}", entries.len());
    }

    #[test]
    fn a_symbolic_link_in_its_place_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("target");
        std::os::unix::fs::symlink(&target, directory.path().join(FILES[0])).unwrap();
        assert!(AuditLog::open(directory.path()).is_err());
        assert!(!target.exists());
    }
}
