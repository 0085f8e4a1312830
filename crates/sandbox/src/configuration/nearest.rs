//! Words from hostile files in messages: the known word that was probably meant, and a form fit for a terminal.

/// Words longer than this are not typing errors.
const LONGEST_WORD: usize = 64;

/// The candidate with the fewest edits from `word`, if they are few for its length.
pub(super) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.is_empty() || word.len() > LONGEST_WORD {
        return None;
    }
    let word = word.to_lowercase();
    let distances = candidates.into_iter().filter_map(|candidate| {
        let distance = strsim::osa_distance(&word, candidate);
        // `memory` for `memory_mb`, `mem_limit` not.
        let begins = candidate.starts_with(&format!("{word}_"));
        let near = begins || distance <= word.len().max(candidate.len()).div_ceil(3).min(word.len() / 2 + 1);
        near.then_some((!begins, distance, candidate))
    });
    distances.min().map(|(_, _, candidate)| candidate)
}

/// ` (did you mean …?)` where something is near, for messages that have no hint beside them.
pub(super) fn suggestion<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    nearest(word, candidates).map_or_else(String::new, |near| format!(" (did you mean `{near}`?)"))
}

/// Text of a hostile file as a message may show it: without control characters, and short.
pub(super) fn shown(text: &str) -> String {
    shown_up_to(text, LONGEST_WORD)
}

/// As [`shown`], with so many characters at most.
pub(super) fn shown_up_to(text: &str, limit: usize) -> String {
    let mut shown = String::new();
    for (index, character) in text.chars().enumerate() {
        if index == limit {
            shown.push('…');
            break;
        }
        match character {
            '"' | '\'' => shown.push(character),
            other => shown.extend(other.escape_debug()),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_errors_are_told_from_other_words() {
        let known = ["name", "image", "base_image", "vcpus", "memory_mb", "disk_mb"];
        for (word, meant) in [
            ("vcpu", "vcpus"),
            ("VCPUS", "vcpus"),
            ("cpus", "vcpus"),
            ("memory", "memory_mb"),
            ("disk", "disk_mb"),
            ("iamge", "image"),
            ("baseimage", "base_image"),
        ] {
            assert_eq!(nearest(word, known), Some(meant), "{word}");
        }
        for word in ["", "x", "zq", "ports", "timeout", &"vcpus".repeat(20)] {
            assert_eq!(nearest(word, known), None, "{word}");
        }
    }

    #[test]
    fn nothing_shown_writes_to_the_terminal() {
        assert_eq!(shown("a\u{1b}[2J\u{202e}é\n"), "a\\u{1b}[2J\\u{202e}é\\n");
        assert_eq!(shown(&"x".repeat(1000)).chars().count(), LONGEST_WORD + 1);
    }
}
