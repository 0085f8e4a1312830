//! Logical lines: continued lines joined, comments dropped, heredocs taken along.

use super::expand::Lexer;
use super::{BYTES_LIMIT, DockerfileError, Heredoc, INSTRUCTIONS_LIMIT, Place, Word};

/// Most heredocs of one instruction.
const HEREDOCS_LIMIT: usize = 100;

/// An instruction as it was written, on one line.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) text: String,
    /// Where parts of the text come from: byte offset, place.
    pieces: Vec<(usize, Place)>,
    pub(super) heredocs: Vec<Heredoc>,
}

impl Line {
    /// Where the byte at `offset` of the text stood.
    pub(super) fn place(&self, offset: usize) -> Place {
        let index = self.pieces.partition_point(|(start, _)| *start <= offset).saturating_sub(1);
        let Some((start, place)) = self.pieces.get(index) else { return Place { line: 1, column: 1 } };
        let before = self.text.get(*start..offset).unwrap_or_default().chars().count();
        Place { line: place.line, column: place.column + before as u32 }
    }

    /// Part of the text, with its place.
    pub(super) fn word(&self, range: std::ops::Range<usize>) -> Word {
        Word { place: self.place(range.start), text: self.text[range].to_owned() }
    }
}

/// A file's lines and directives.
pub(super) struct Lines {
    pub(super) escape: char,
    pub(super) syntax: Option<Word>,
    pub(super) lines: Vec<Line>,
}

/// Text from `bytes`, without its byte order mark.
pub(super) fn decode(bytes: &[u8]) -> Result<String, DockerfileError> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let start = Place { line: 1, column: 1 };
    if bytes.len() > BYTES_LIMIT {
        let message = format!("a Dockerfile may have {} bytes, this one has {}", BYTES_LIMIT, bytes.len());
        let hint = Some("what is large belongs into files that COPY takes".to_owned());
        return Err(DockerfileError::new("", start, message, hint));
    }
    String::from_utf8(bytes.to_vec()).map_err(|error| {
        let whole = String::from_utf8_lossy(bytes).into_owned();
        let before = String::from_utf8_lossy(&bytes[..error.utf8_error().valid_up_to()]).into_owned();
        let line = before.matches('\n').count() as u32 + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() as u32 + 1;
        let hint = Some("save it as UTF-8".to_owned());
        DockerfileError::new(&whole, Place { line, column }, "this is not UTF-8 text".into(), hint)
    })
}

pub(super) fn read(source: &str) -> Result<Lines, DockerfileError> {
    let all: Vec<&str> = source.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line)).collect();
    let mut lines = Lines { escape: '\\', syntax: None, lines: Vec::new() };
    let mut next = directives(source, &all, &mut lines)?;
    while next < all.len() {
        let first = all[next].trim_start();
        if first.is_empty() || first.starts_with('#') {
            next += 1;
            continue;
        }
        if lines.lines.len() >= INSTRUCTIONS_LIMIT {
            let place = Place { line: next as u32 + 1, column: 1 };
            let message = format!("more than {INSTRUCTIONS_LIMIT} instructions");
            let hint = Some(
                "put several commands into one RUN, or build on an image of the first of them".to_owned(),
            );
            return Err(DockerfileError::new(source, place, message, hint));
        }
        let mut line = join(&all, &mut next, lines.escape);
        heredocs(source, &all, &mut next, &mut line, lines.escape)?;
        lines.lines.push(line);
    }
    Ok(lines)
}

/// Reads `# key=value` lines at the very top; the number of lines they take.
fn directives(source: &str, all: &[&str], lines: &mut Lines) -> Result<usize, DockerfileError> {
    let mut seen: Vec<String> = Vec::new();
    for (index, line) in all.iter().enumerate() {
        let Some((key, value)) = line.trim_start().strip_prefix('#').and_then(|text| text.split_once('='))
        else {
            return Ok(index);
        };
        let (key, text) = (key.trim().to_ascii_lowercase(), value.trim());
        let column = line.chars().count() - value.trim_start().chars().count() + 1;
        let place = Place { line: index as u32 + 1, column: column as u32 };
        let error = |message: String, hint: &str| {
            Err(DockerfileError::new(source, place, message, Some(hint.to_owned())))
        };
        if !matches!(key.as_str(), "syntax" | "escape" | "check") {
            return Ok(index);
        }
        if seen.contains(&key) {
            return error(format!("the directive `{key}` is given twice"), "leave one of them out");
        }
        match key.as_str() {
            "syntax" => lines.syntax = Some(Word { text: text.to_owned(), place }),
            "escape" if matches!(text, "\\" | "`") => lines.escape = text.chars().next().unwrap_or('\\'),
            "escape" => {
                return error(format!("the escape character cannot be `{text}`"), "it is \\ or `");
            }
            // Which of Docker's lints run says nothing about the image.
            _ => {}
        }
        seen.push(key);
    }
    Ok(all.len())
}

/// Joins a line with those it is continued on.
fn join(all: &[&str], next: &mut usize, escape: char) -> Line {
    let mut line = Line { text: String::new(), pieces: Vec::new(), heredocs: Vec::new() };
    let mut first = true;
    while *next < all.len() {
        let raw = all[*next];
        let trimmed = raw.trim_start();
        let number = *next as u32 + 1;
        *next += 1;
        // Within a continued instruction, comments and empty lines count for nothing.
        if !first && (trimmed.is_empty() || trimmed.starts_with('#')) {
            continue;
        }
        let part = if first { trimmed } else { raw };
        let column = (raw.chars().count() - part.chars().count()) as u32 + 1;
        first = false;
        line.pieces.push((line.text.len(), Place { line: number, column }));
        let end = part.trim_end();
        match end.strip_suffix(escape) {
            // An escaped escape character continues nothing, but Docker looks at the last one only.
            Some(continued) => line.text.push_str(continued),
            None => {
                line.text.push_str(end);
                break;
            }
        }
    }
    let end = line.text.trim_end().len();
    line.text.truncate(end);
    line
}

/// Takes the documents that an instruction refers to off the following lines.
fn heredocs(
    source: &str,
    all: &[&str],
    next: &mut usize,
    line: &mut Line,
    escape: char,
) -> Result<(), DockerfileError> {
    let mut words = line.text.split_ascii_whitespace().map(str::to_ascii_uppercase);
    let keyword = words.next().unwrap_or_default();
    let keyword = if keyword == "ONBUILD" { words.next().unwrap_or_default() } else { keyword };
    if !matches!(keyword.as_str(), "RUN" | "COPY" | "ADD") || !line.text.contains("<<") {
        return Ok(());
    }
    for (range, word) in Lexer::new(escape).raw_words(&line.text) {
        let Some((strip, name)) = opening(&word) else { continue };
        let bare: String = name
            .chars()
            .filter(|character| !matches!(character, '"' | '\'') && *character != escape)
            .collect();
        if bare.is_empty() {
            continue;
        }
        let place = line.place(range.start);
        if line.heredocs.len() >= HEREDOCS_LIMIT {
            let message = format!("more than {HEREDOCS_LIMIT} documents in one instruction");
            let hint = Some("spread them over several instructions".to_owned());
            return Err(DockerfileError::new(source, place, message, hint));
        }
        let mut content = String::new();
        loop {
            let Some(body) = all.get(*next) else {
                let message = format!("the document `{bare}` does not end");
                let hint = Some(format!("end it with a line that is `{bare}` and nothing else"));
                return Err(DockerfileError::new(source, place, message, hint));
            };
            *next += 1;
            let ending = if strip { body.trim_start_matches('\t') } else { body };
            if ending == bare {
                break;
            }
            content.push_str(body);
            content.push('\n');
        }
        let expand = bare == name;
        line.heredocs.push(Heredoc { name: bare, opening: word, expand, strip, content, place });
    }
    Ok(())
}

/// A word that opens a document: whether tabs are stripped, and the delimiter as written.
fn opening(word: &str) -> Option<(bool, &str)> {
    let rest = word.trim_start_matches(|character: char| character.is_ascii_digit()).strip_prefix("<<")?;
    let (strip, name) = match rest.strip_prefix('-') {
        Some(name) => (true, name),
        None => (false, rest),
    };
    (!name.contains('<')).then_some((strip, name))
}
