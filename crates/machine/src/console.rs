//! The guest's console: always drained, so that a guest that shouts never stalls its machine, and kept in bounds.
//!
//! The first 64 KiB tell how the start went, the last 192 KiB how it ended; what lies between is dropped. Whoever wants
//! all of it is handed every byte.

use std::collections::VecDeque;

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
#[derive(Default)]
pub(crate) struct Console {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    dropped: u64,
    log: Option<ConsoleLog>,
}

/// Takes every byte the guest writes to its console. Called on the runtime's thread: it must not wait for long.
pub type ConsoleLog = Box<dyn FnMut(&[u8]) + Send>;

impl std::fmt::Debug for Console {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Console").field("dropped", &self.dropped).finish_non_exhaustive()
    }
}

impl Console {
    pub(crate) fn new(log: Option<ConsoleLog>) -> Self {
        Self { log, ..Self::default() }
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
            log(bytes);
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
            let logged = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
            let log = logged.clone();
            let mut console = Console::new(Some(Box::new(move |bytes: &[u8]| {
                log.lock().expect("the log").extend_from_slice(bytes);
            })));
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
            prop_assert_eq!(&*logged.lock().expect("the log"), &whole);
        }
    }
}
