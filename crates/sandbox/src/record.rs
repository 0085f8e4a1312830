//! What happened in a sandbox, kept in bounds: its lifecycle, its console, its programs' output.
//!
//! A [`RotatingLog`] is two files: the one being written, and the one before. When the first is full it takes the place
//! of the second, so at least half of the bound is always kept, and the newest.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::deadline::{rfc3339, unix_ms};

/// Bytes of each of the two files of lifecycle events and of console lines.
const RECORD_HALF: u64 = 256 << 10;
/// Longest console line, bytes; the rest of a longer one is dropped.
const LINE_LIMIT: usize = 4096;

/// A log that never takes more than twice `half` bytes on disk.
#[derive(Debug)]
pub struct RotatingLog {
    path: PathBuf,
    half: u64,
    file: Option<File>,
    length: u64,
}

/// The file that was written before `path`.
fn former(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

impl RotatingLog {
    /// A log at `path`, continued if it is there. Files are opened when something is written.
    pub fn new(path: PathBuf, half: u64) -> Self {
        Self { path, half, file: None, length: 0 }
    }

    fn open(&mut self) {
        if self.file.is_none()
            && let Ok(file) = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path)
        {
            self.length = file.metadata().map(|metadata| metadata.len()).unwrap_or(0);
            self.file = Some(file);
        }
    }

    /// Writes a whole entry. A log that cannot be written (a full disk) disturbs nobody: the entry is lost.
    pub fn append(&mut self, entry: &[u8]) {
        self.open();
        if self.length > 0 && self.length + entry.len() as u64 > self.half {
            self.file = None;
            let _ = fs::rename(&self.path, former(&self.path));
            self.open();
        }
        if let Some(file) = &mut self.file {
            match file.write_all(entry) {
                Ok(()) => self.length += entry.len() as u64,
                Err(_) => {
                    // Half an entry would spoil those after it.
                    let _ = file.set_len(self.length);
                }
            }
        }
    }
}

/// Reads a [`RotatingLog`] that another process may be writing: all there is, then what is added.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    limit: u64,
    /// The file being read, its inode, and how far it was read.
    at: Option<(File, u64, u64)>,
}

impl LogReader {
    /// A reader from the beginning. `half` is the log's.
    pub fn new(path: PathBuf, half: u64) -> Self {
        Self { path, limit: half.saturating_mul(2), at: None }
    }

    /// What came since the last call; whole entries are whatever the writer appended in one go.
    ///
    /// # Errors
    /// If the files cannot be read; a log that does not exist yet is empty.
    pub fn read(&mut self) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        match &mut self.at {
            None => {
                if let Some(mut file) = open(&former(&self.path))? {
                    (&mut file).take(self.limit).read_to_end(&mut bytes)?;
                }
            }
            // What was added to the file before another took its place.
            Some((file, _, offset)) => {
                file.seek(SeekFrom::Start(*offset))?;
                *offset += file.take(self.limit).read_to_end(&mut bytes)? as u64;
            }
        }
        let Some(mut file) = open(&self.path)? else { return Ok(bytes) };
        let inode = file.metadata()?.ino();
        if self.at.as_ref().is_none_or(|(_, known, _)| *known != inode) {
            let read = (&mut file).take(self.limit).read_to_end(&mut bytes)? as u64;
            self.at = Some((file, inode, read));
        }
        Ok(bytes)
    }
}

fn open(path: &Path) -> std::io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// One line of a sandbox's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// RFC 3339, UTC.
    pub time: String,
    /// `console` for what the guest's kernel printed, else what happened.
    pub event: String,
    /// In words.
    pub text: String,
}

/// A sandbox's own record.
#[derive(Clone, Debug)]
pub struct Record {
    events: Arc<Mutex<RotatingLog>>,
    console: Arc<Mutex<RotatingLog>>,
}

impl Record {
    /// The record of the sandbox in `directory`.
    pub fn open(directory: &Path) -> Self {
        let log = |name| Arc::new(Mutex::new(RotatingLog::new(directory.join(name), RECORD_HALF)));
        Self { events: log("record"), console: log("console") }
    }

    /// Adds an event.
    pub fn say(&self, event: &str, text: &str) {
        add(&self.events, event, text);
    }

    /// What turns the console's bytes into lines of the record.
    pub fn console(&self) -> impl FnMut(&[u8]) + Send + use<> {
        let log = self.console.clone();
        let mut line = Vec::new();
        move |bytes: &[u8]| {
            for &byte in bytes {
                if byte == b'\n' {
                    let text = String::from_utf8_lossy(&line);
                    let text: String = text.chars().filter(|character| !character.is_control()).collect();
                    if !text.is_empty() {
                        add(&log, "console", &text);
                    }
                    line.clear();
                } else if line.len() < LINE_LIMIT {
                    line.push(byte);
                }
            }
        }
    }
}

fn add(log: &Mutex<RotatingLog>, event: &str, text: &str) {
    let entry = Entry { time: rfc3339(unix_ms()), event: event.to_owned(), text: text.to_owned() };
    if let Ok(mut line) = serde_json::to_vec(&entry) {
        line.push(b'\n');
        log.lock().unwrap_or_else(PoisonError::into_inner).append(&line);
    }
}

/// Follows a sandbox's record.
#[derive(Debug)]
pub struct RecordReader {
    logs: [(LogReader, Vec<u8>); 2],
}

impl RecordReader {
    /// From the oldest entry that is kept.
    pub fn new(directory: &Path) -> Self {
        let log = |name| (LogReader::new(directory.join(name), RECORD_HALF), Vec::new());
        Self { logs: [log("record"), log("console")] }
    }

    /// What came since the last call, oldest first.
    ///
    /// # Errors
    /// If the files cannot be read.
    pub fn read(&mut self) -> std::io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for (reader, rest) in &mut self.logs {
            rest.extend(reader.read()?);
            while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                // A line torn by a crash of the host is passed over.
                entries.extend(serde_json::from_slice::<Entry>(&line));
            }
        }
        entries.sort_by(|one, other| one.time.cmp(&other.time));
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_bounded_keeps_the_newest_and_is_followed_across_its_turns() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = RotatingLog::new(path.clone(), 100);
        let mut reader = LogReader::new(path.clone(), 100);
        let mut followed = Vec::new();
        for number in 0..200 {
            log.append(format!("{number:09}\n").as_bytes());
            followed.extend(reader.read().unwrap());
            let sizes = [&path, &former(&path)].map(|path| fs::metadata(path).map_or(0, |data| data.len()));
            assert!(sizes.iter().all(|size| *size <= 100), "{sizes:?}");
        }
        let numbers = |text: &[u8]| -> Vec<u32> {
            String::from_utf8_lossy(text).lines().map(|line| line.parse().unwrap()).collect()
        };
        assert_eq!(numbers(&followed), (0..200).collect::<Vec<_>>());
        let kept = numbers(&LogReader::new(path.clone(), 100).read().unwrap());
        assert!(kept.len() >= 10 && kept.ends_with(&[198, 199]), "{kept:?}");
        drop(log);
        RotatingLog::new(path.clone(), 100).append(b"000000200\n");
        assert_eq!(numbers(&reader.read().unwrap()), [200], "a log is continued");
    }

    #[test]
    fn a_record_has_events_and_console_lines_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let record = Record::open(directory.path());
        record.say("created", "from a test");
        let mut console = record.console();
        console(b"half a ");
        console(b"line\x1b[2J\r\n\n");
        console(&[b'x'; 3 * LINE_LIMIT]);
        console(b"\n");
        let entries = RecordReader::new(directory.path()).read().unwrap();
        let seen: Vec<_> = entries.iter().map(|entry| (entry.event.as_str(), entry.text.len())).collect();
        assert_eq!(seen, [("created", 11), ("console", 14), ("console", LINE_LIMIT)]);
        assert_eq!(entries[1].text, "half a line[2J");
    }
}
