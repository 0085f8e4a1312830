//! `.dockerignore`, and the patterns of `COPY`: Go's `filepath.Match`, with `**` for any number of directories.
//!
//! Rules, as Docker has them: the last pattern that matches a path decides; `!` makes an exception; a pattern that matches
//! a directory matches all in it.

/// Largest ignore file, bytes.
const BYTES_LIMIT: usize = 1 << 20;
/// Most patterns.
const PATTERNS_LIMIT: usize = 10_000;

/// What is wrong with a pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct IgnoreError {
    /// Counted from 1; 0 if the pattern stands alone.
    pub line: usize,
    /// What is wrong.
    pub reason: String,
}

/// One pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    /// `**` as a whole component.
    AnyDirectories,
    Component(Vec<Piece>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Any,
    One,
    Byte(u8),
    Class { negated: bool, ranges: Vec<(u8, u8)> },
}

impl Pattern {
    /// Parses a pattern of path components.
    ///
    /// # Errors
    /// If it is malformed.
    pub fn parse(text: &str) -> Result<Self, IgnoreError> {
        let mut parts: Vec<Part> = Vec::new();
        for component in text.split('/') {
            match component {
                "" | "." => {}
                ".." => drop(parts.pop()),
                "**" => {
                    if parts.last() != Some(&Part::AnyDirectories) {
                        parts.push(Part::AnyDirectories);
                    }
                }
                component => {
                    let pieces = pieces(component.as_bytes());
                    let bad = || IgnoreError { line: 0, reason: format!("`{text}` is no pattern") };
                    parts.push(Part::Component(pieces.ok_or_else(bad)?));
                }
            }
        }
        Ok(Self { parts })
    }

    /// Whether the whole path matches.
    pub fn matches(&self, path: &[u8]) -> bool {
        let components = components(path);
        reached(&self.parts, &components).last().copied().unwrap_or(false)
    }

    /// Whether the path, or a directory it lies in, matches.
    pub fn matches_within(&self, path: &[u8]) -> bool {
        let components = components(path);
        // A pattern that matches the root itself means nothing.
        reached(&self.parts, &components).iter().skip(1).any(|reached| *reached)
    }

    /// Whether something below the directory `path` may match.
    pub fn may_match_below(&self, path: &[u8]) -> bool {
        let components = components(path);
        let mut state = vec![false; self.parts.len() + 1];
        state[0] = true;
        for component in &components {
            close(&self.parts, &mut state);
            let mut next = vec![false; state.len()];
            for (index, part) in self.parts.iter().enumerate().filter(|(index, _)| state[*index]) {
                match part {
                    Part::AnyDirectories => next[index] = true,
                    Part::Component(pieces) => next[index + 1] |= component_matches(pieces, component),
                }
            }
            state = next;
        }
        close(&self.parts, &mut state);
        state[..self.parts.len()].iter().any(|reached| *reached)
    }
}

/// `**` also stands for no directory at all.
fn close(parts: &[Part], state: &mut [bool]) {
    for (index, part) in parts.iter().enumerate() {
        if state[index] && *part == Part::AnyDirectories {
            state[index + 1] = true;
        }
    }
}

/// For each number of leading components: whether the pattern matches exactly them.
fn reached(parts: &[Part], components: &[&[u8]]) -> Vec<bool> {
    let mut state = vec![false; parts.len() + 1];
    state[0] = true;
    close(parts, &mut state);
    let mut ends = vec![state[parts.len()]];
    for component in components {
        let mut next = vec![false; state.len()];
        for (index, part) in parts.iter().enumerate().filter(|(index, _)| state[*index]) {
            match part {
                Part::AnyDirectories => {
                    next[index] = true;
                    next[index + 1] |= index + 1 == parts.len();
                }
                Part::Component(pieces) => next[index + 1] |= component_matches(pieces, component),
            }
        }
        close(parts, &mut next);
        state = next;
        ends.push(state[parts.len()]);
    }
    ends
}

fn components(path: &[u8]) -> Vec<&[u8]> {
    path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect()
}

fn pieces(component: &[u8]) -> Option<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut rest = component;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'*' => {
                if pieces.last() != Some(&Piece::Any) {
                    pieces.push(Piece::Any);
                }
            }
            b'?' => pieces.push(Piece::One),
            b'\\' => {
                let (escaped, after) = rest.split_first()?;
                pieces.push(Piece::Byte(*escaped));
                rest = after;
            }
            b'[' => {
                let negated = rest.first() == Some(&b'^');
                if negated {
                    rest = &rest[1..];
                }
                let mut ranges = Vec::new();
                loop {
                    let (first, after) = rest.split_first()?;
                    rest = after;
                    if *first == b']' && !ranges.is_empty() {
                        break;
                    }
                    let low = unescape(*first, &mut rest)?;
                    let high = match rest.strip_prefix(b"-") {
                        Some(after) => {
                            let (high, after) = after.split_first()?;
                            rest = after;
                            unescape(*high, &mut rest)?
                        }
                        None => low,
                    };
                    if low > high {
                        return None;
                    }
                    ranges.push((low, high));
                }
                pieces.push(Piece::Class { negated, ranges });
            }
            _ => pieces.push(Piece::Byte(*byte)),
        }
    }
    Some(pieces)
}

fn unescape(byte: u8, rest: &mut &[u8]) -> Option<u8> {
    match byte {
        b'-' | b']' => None,
        b'\\' => {
            let (escaped, after) = rest.split_first()?;
            *rest = after;
            Some(*escaped)
        }
        _ => Some(byte),
    }
}

fn component_matches(pieces: &[Piece], component: &[u8]) -> bool {
    // Linear: the last `*` is the only place to go back to.
    let (mut piece, mut byte) = (0, 0);
    let mut back: Option<(usize, usize)> = None;
    loop {
        let fits = match pieces.get(piece) {
            Some(Piece::Any) => {
                back = Some((piece, byte));
                piece += 1;
                continue;
            }
            None if byte == component.len() => return true,
            None => false,
            Some(_) if byte == component.len() => return false,
            Some(Piece::One) => true,
            Some(Piece::Byte(expected)) => component[byte] == *expected,
            Some(Piece::Class { negated, ranges }) => {
                ranges.iter().any(|(low, high)| (*low..=*high).contains(&component[byte])) != *negated
            }
        };
        if fits {
            (piece, byte) = (piece + 1, byte + 1);
            continue;
        }
        match back {
            Some((star, from)) if from < component.len() => {
                back = Some((star, from + 1));
                (piece, byte) = (star + 1, from + 1);
            }
            _ => return false,
        }
    }
}

/// A list of patterns.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IgnoreFile {
    patterns: Vec<(Pattern, bool)>,
}

impl IgnoreFile {
    /// Parses an ignore file.
    ///
    /// # Errors
    /// The first line that is no pattern.
    pub fn parse(bytes: &[u8]) -> Result<Self, IgnoreError> {
        let wrong = |line, reason: &str| IgnoreError { line, reason: reason.to_owned() };
        if bytes.len() > BYTES_LIMIT {
            return Err(wrong(1, "the file is larger than 1 MiB"));
        }
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let text = std::str::from_utf8(bytes).map_err(|_| wrong(1, "this is not UTF-8 text"))?;
        let mut patterns = Vec::new();
        for (index, line) in text.lines().enumerate() {
            if line.starts_with('#') {
                continue;
            }
            let line = line.trim();
            let (line, excluded) = match line.strip_prefix('!') {
                Some(rest) => (rest.trim(), false),
                None => (line, true),
            };
            if line.is_empty() && excluded {
                continue;
            }
            if line.is_empty() {
                return Err(wrong(index + 1, "`!` stands alone"));
            }
            if patterns.len() >= PATTERNS_LIMIT {
                return Err(wrong(index + 1, "there are too many patterns"));
            }
            let pattern = Pattern::parse(line).map_err(|error| IgnoreError { line: index + 1, ..error })?;
            patterns.push((pattern, excluded));
        }
        Ok(Self { patterns })
    }

    /// Adds a pattern that is ignored.
    pub fn push(&mut self, pattern: Pattern) {
        self.patterns.push((pattern, true));
    }

    /// Whether the path, relative to the context, is left out.
    pub fn is_ignored(&self, path: &[u8]) -> bool {
        let last = self.patterns.iter().rev().find(|(pattern, _)| pattern.matches_within(path));
        last.is_some_and(|(_, excluded)| *excluded)
    }

    /// Whether something below an ignored directory may be an exception.
    pub fn may_hold_exceptions(&self, directory: &[u8]) -> bool {
        self.patterns.iter().any(|(pattern, excluded)| !excluded && pattern.may_match_below(directory))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, path, expected) in [
            ("a", "a", true),
            ("/a/", "a", true),
            ("./a//b", "a/b", true),
            ("a", "b/a", false),
            ("*.txt", "x.txt", true),
            ("*.txt", "d/x.txt", false),
            ("**/*.txt", "x.txt", true),
            ("**/*.txt", "d/e/x.txt", true),
            ("a/**/b", "a/b", true),
            ("a/**/b", "a/x/y/b", true),
            ("a/**", "a/x/y", true),
            ("**", "x/y", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[^a-c]x", "dx", true),
            (r"\*", "*", true),
            (r"\*", "x", false),
            ("a*b*c", "aXXbYYc", true),
            ("a*b*c", "aXXbYY", false),
            ("x/../y", "y", true),
        ] {
            assert_eq!(
                Pattern::parse(pattern).unwrap().matches(path.as_bytes()),
                expected,
                "{pattern} {path}"
            );
        }
        for bad in ["[", "[a", "a[]", r"a\", "[b-a]", "[-]"] {
            assert!(Pattern::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_last_match_decides() {
        let file = IgnoreFile::parse(b"# comment\n*\n!src\n!README.md\nsrc/*.o\n  \n!src/keep.o\n").unwrap();
        for (path, expected) in [
            ("x", true),
            ("src", false),
            ("src/main.rs", false),
            ("src/a.o", true),
            ("src/keep.o", false),
            ("README.md", false),
            ("docs/README.md", true),
        ] {
            assert_eq!(file.is_ignored(path.as_bytes()), expected, "{path}");
        }
        assert!(file.may_hold_exceptions(b"src"));
        assert!(!file.may_hold_exceptions(b"node_modules"));
        let deep = IgnoreFile::parse(b"a\n!**/keep\n").unwrap();
        assert!(deep.may_hold_exceptions(b"a/b") && !deep.is_ignored(b"a/b/keep"));
        assert_eq!(IgnoreFile::parse(b"a\n!\n").unwrap_err().line, 2);
        assert!(!IgnoreFile::parse(b".\n/\n").unwrap().is_ignored(b"x"));
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics_and_plain_patterns_match_themselves(pattern in "[a-c*?\\[\\]^\\\\/!.-]{0,12}", path in "[a-c/.]{0,12}") {
            if let Ok(pattern) = Pattern::parse(&pattern) {
                let matched = pattern.matches(path.as_bytes());
                proptest::prop_assert!(!matched || components(path.as_bytes()).is_empty() || pattern.matches_within(path.as_bytes()));
                let _ = pattern.may_match_below(path.as_bytes());
            }
            if let Ok(own) = Pattern::parse(&path) {
                let plain = path.split('/').filter(|part| !matches!(*part, "" | ".")).all(|part| part != "..");
                proptest::prop_assert!(!plain || own.matches(path.as_bytes()));
            }
        }
    }
}
