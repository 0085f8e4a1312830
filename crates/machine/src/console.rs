//! The guest's console: always drained, so that a guest that shouts never stalls its machine, and kept in bounds.
//!
//! The first 64 KiB tell how the start went, the last 192 KiB how it ended; what lies between is dropped. A log file, if
//! there is one, is held to the same size.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

/// What is kept of the beginning, in bytes.
const HEAD: usize = 64 << 10;
/// What is kept of the end, in bytes.
const TAIL: usize = 192 << 10;
/// How much of the end is searched for an explanation.
const EXPLAIN_LINES: usize = 200;
const LINE_SHOWN: usize = 240;

/// What the guest wrote so far.
#[derive(Debug, Default)]
pub(crate) struct Console {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    dropped: u64,
    log: Option<Log>,
}

#[derive(Debug)]
struct Log {
    file: File,
    /// Bytes in the file.
    length: usize,
}

impl Console {
    pub(crate) fn new(log: Option<File>) -> Self {
        Self { log: log.map(|file| Log { file, length: 0 }), ..Self::default() }
    }

    /// Takes in what the guest wrote.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let (first, rest) = bytes.split_at(bytes.len().min(HEAD - self.head.len()));
        self.head.extend_from_slice(first);
        let excess = (self.tail.len() + rest.len()).saturating_sub(TAIL);
        self.dropped += excess as u64;
        self.tail.drain(..excess.min(self.tail.len()));
        self.tail.extend(&rest[rest.len().saturating_sub(TAIL)..]);
        if let Some(log) = &mut self.log {
            log.append(bytes, &self.tail);
        }
    }

    /// What is kept, with a line where something was dropped.
    pub(crate) fn text(&self) -> Vec<u8> {
        let mut text = self.head.clone();
        if self.dropped > 0 {
            text.extend_from_slice(format!("\n[{} bytes left out]\n", self.dropped).as_bytes());
        }
        text.extend(&self.tail);
        text
    }

    /// The line that says what went wrong, if one does.
    pub(crate) fn explain(&self) -> Option<String> {
        explain(&String::from_utf8_lossy(&self.text()))
    }

    /// Whether the guest's kernel has panicked.
    pub(crate) fn has_panicked(&self) -> bool {
        String::from_utf8_lossy(&self.text()).lines().any(|line| line.contains(PANIC))
    }
}

impl Log {
    /// A log that cannot be written (a full disk) is no reason to disturb the machine.
    fn append(&mut self, bytes: &[u8], tail: &VecDeque<u8>) {
        if self.length + bytes.len() <= HEAD + TAIL {
            if self.file.write_all_at(bytes, self.length as u64).is_ok() {
                self.length += bytes.len();
            }
            return;
        }
        // Keep half of the tail, so that the file is rewritten once in 96 KiB and not at every line.
        let kept: Vec<u8> = tail.iter().skip(tail.len().saturating_sub(TAIL / 2)).copied().collect();
        let note = b"\n[output left out]\n";
        let rewritten = [note.as_slice(), &kept].concat();
        self.length = HEAD;
        if self.file.set_len(HEAD as u64).is_ok() && self.file.write_all_at(&rewritten, HEAD as u64).is_ok() {
            self.length += rewritten.len();
        }
    }
}

const PANIC: &str = "Kernel panic - not syncing";

/// Signs of trouble, the most telling first.
const SIGNS: &[&str] = &[
    PANIC,
    "agentkernel:",
    "Out of memory: Killed process",
    "Unable to mount",
    "No working init found",
    "Initramfs unpacking failed",
    "invalid magic",
    "BUG: ",
    "Oops: ",
];

/// The last line of the most telling kind, without what a terminal would act upon.
pub(crate) fn explain(text: &str) -> Option<String> {
    let lines: Vec<&str> =
        text.lines().rev().take(EXPLAIN_LINES).filter(|line| !line.trim().is_empty()).collect();
    let line = SIGNS.iter().find_map(|sign| lines.iter().find(|line| line.contains(sign)))?;
    Some(printable(line))
}

/// At most a line's worth of `text`, control characters dropped.
pub(crate) fn printable(text: &str) -> String {
    text.trim().chars().filter(|character| !character.is_control()).take(LINE_SHOWN).collect()
}

/// Reads the console to its end.
pub(crate) async fn drain(mut stream: UnixStream, console: std::sync::Arc<std::sync::Mutex<Console>>) {
    let mut chunk = vec![0; 16 << 10];
    while let Ok(count @ 1..) = stream.read(&mut chunk).await {
        console.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(&chunk[..count]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_panic_is_told_without_its_escape_codes() {
        let text = "[1.0] fine\n[2.0] Kernel panic - not syncing: \x1b[31msysrq\x07\n[2.1] ---[ end\n\n";
        assert_eq!(explain(text).as_deref(), Some("[2.0] Kernel panic - not syncing: [31msysrq"));
        assert_eq!(explain("all is well\n"), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn it_stays_in_bounds_and_keeps_both_ends(pushes in prop::collection::vec((any::<u8>(), 1..70_000_usize), 1..20)) {
            let file = tempfile::tempfile().expect("a file");
            let mut console = Console::new(Some(file.try_clone().expect("a handle")));
            let mut whole = Vec::new();
            for (byte, count) in pushes {
                console.push(&vec![byte; count]);
                whole.extend(vec![byte; count]);
            }
            let kept = console.text();
            prop_assert!(kept.len() <= HEAD + TAIL + 64);
            prop_assert!(kept.starts_with(&whole[..whole.len().min(HEAD)]));
            prop_assert!(kept.ends_with(&whole[whole.len().saturating_sub(TAIL)..]) || whole.len() < HEAD + TAIL);
            if whole.len() <= HEAD + TAIL {
                prop_assert_eq!(&kept, &whole);
            }
            prop_assert!(file.metadata().expect("metadata").len() as usize <= HEAD + TAIL);
        }
    }
}
