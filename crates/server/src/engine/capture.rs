//! What a command says, kept within bounds: head and tail, and how much was left out between them.

use std::collections::VecDeque;

/// One stream's bytes: the first and the last of them.
#[derive(Clone, Debug)]
pub struct Capture {
    half: usize,
    head: Vec<u8>,
    tail: VecDeque<u8>,
    omitted: u64,
}

impl Capture {
    /// Keeps at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { half: limit / 2, head: Vec::new(), tail: VecDeque::new(), omitted: 0 }
    }

    /// Takes what was said.
    pub fn take(&mut self, bytes: &[u8]) {
        let room = (self.half - self.head.len()).min(bytes.len());
        self.head.extend_from_slice(&bytes[..room]);
        let rest = &bytes[room..];
        let drop = (self.tail.len() + rest.len()).saturating_sub(self.half);
        self.omitted += drop as u64;
        let old = drop.min(self.tail.len());
        self.tail.drain(..old);
        self.tail.extend(&rest[drop - old..]);
    }

    /// Bytes that were left out.
    pub fn omitted(&self) -> u64 {
        self.omitted
    }

    /// As text: cut on boundaries of characters, with a line that says how many bytes are missing between head and tail;
    /// what is no UTF-8 is replaced.
    pub fn text(&self) -> String {
        let tail: Vec<u8> = self.tail.iter().copied().collect();
        if self.omitted == 0 {
            return String::from_utf8_lossy(&[&self.head[..], &tail].concat()).into_owned();
        }
        let head = utf8_prefix(&self.head);
        // Bytes that go on with a character whose beginning is missing.
        let cut = tail.iter().take(3).take_while(|byte| **byte & 0b1100_0000 == 0b1000_0000).count();
        let left_out = self.omitted + (self.head.len() - head) as u64 + cut as u64;
        format!(
            "{}\n[... {left_out} bytes left out ...]\n{}",
            String::from_utf8_lossy(&self.head[..head]),
            String::from_utf8_lossy(&tail[cut..])
        )
    }
}

/// Length of the longest part of `bytes`, from their beginning, that does not end within a character, or with what is none.
pub fn utf8_prefix(bytes: &[u8]) -> usize {
    bytes.len() - bytes.utf8_chunks().last().map_or(0, |chunk| chunk.invalid().len())
}

/// Standard output, standard error, and both as they came.
#[derive(Clone, Debug)]
pub struct Said {
    /// Standard output.
    pub stdout: Capture,
    /// Standard error.
    pub stderr: Capture,
    /// Both.
    pub output: Capture,
}

impl Said {
    /// Keeps at most `limit` bytes of each.
    pub fn new(limit: usize) -> Self {
        Self { stdout: Capture::new(limit), stderr: Capture::new(limit), output: Capture::new(limit) }
    }

    /// Takes what was said.
    pub fn take(&mut self, bytes: &[u8], error: bool) {
        if error { &mut self.stderr } else { &mut self.stdout }.take(bytes);
        self.output.take(bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn head_and_tail_are_kept_and_the_rest_is_counted(
            text in "[aé€😀]{0,60}", limit in 0usize..80, chunk in 1usize..9
        ) {
            let mut capture = Capture::new(limit);
            text.as_bytes().chunks(chunk).for_each(|bytes| capture.take(bytes));
            let kept = capture.text();
            prop_assert!(!kept.contains('\u{fffd}'), "{kept}");
            if text.len() <= limit / 2 * 2 {
                prop_assert_eq!(kept, text);
            } else {
                let (head, rest) = kept.split_once("\n[... ").unwrap();
                let (count, tail) = rest.split_once(" bytes left out ...]\n").unwrap();
                prop_assert!(text.starts_with(head) && text.ends_with(tail));
                prop_assert_eq!(head.len() + tail.len() + count.parse::<usize>().unwrap(), text.len());
            }
        }

        #[test]
        fn a_prefix_never_ends_within_a_character(text in "[aé€😀]{0,9}", cut in 0usize..30) {
            let bytes = &text.as_bytes()[..cut.min(text.len())];
            let length = utf8_prefix(bytes);
            prop_assert!(std::str::from_utf8(&bytes[..length]).is_ok());
            prop_assert!(bytes.len() - length < 4);
        }
    }
}
