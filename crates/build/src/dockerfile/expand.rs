//! Replaces variables in words, by the rules of the Dockerfile reference: those of a shell, less commands and arithmetic.

use std::ops::Range;

/// Deepest `${a:-${b:-...}}`.
const DEPTH: usize = 32;
/// Longest result, bytes.
const OUTPUT: usize = 1 << 20;

/// Most comparisons for one pattern.
const WORK: usize = 1 << 24;

/// Why a word cannot be expanded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpandError {
    /// A quote or brace that is not closed.
    #[error("`{0}` is not closed")]
    Unclosed(char),
    /// `${NAME!...}`.
    #[error("`{0}` is no modifier of a variable")]
    Modifier(String),
    /// `${}` or `${9x}`.
    #[error("`${{{0}}}` names no variable")]
    Name(String),
    /// `${NAME:?message}`.
    #[error("{name}: {message}")]
    Required {
        /// The variable.
        name: String,
        /// What its author says.
        message: String,
    },
    /// Nested or grown beyond all use.
    #[error("the word grows too large")]
    TooLarge,
}

impl ExpandError {
    /// What the user can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Unclosed(open) => format!("close it, or put a backslash before the {open}"),
            Self::Modifier(_) => "there are :- :+ :? - + ? # ## % %% / and //".to_owned(),
            Self::Name(_) => "a name has letters, digits and _: ${NAME}".to_owned(),
            Self::Required { name, .. } => format!("ARG {name}, and --build-arg {name}=VALUE"),
            Self::TooLarge => "write it with fewer or shorter variables".to_owned(),
        }
    }
}

/// Splits and expands words.
#[derive(Debug, Clone, Copy)]
pub struct Lexer {
    escape: char,
    /// Quotes stand for themselves: documents.
    raw_quotes: bool,
}

/// What a variable is; `None` if it is not set.
pub type Lookup<'a> = &'a mut dyn FnMut(&str) -> Option<String>;

impl Lexer {
    /// For files whose escape character is `escape`.
    pub fn new(escape: char) -> Self {
        Self { escape, raw_quotes: false }
    }

    /// Expands one word; quotes are taken away.
    ///
    /// # Errors
    /// If it is malformed or grows too large.
    pub fn word(&self, text: &str, lookup: Lookup<'_>) -> Result<String, ExpandError> {
        let mut expansion = Expansion::new(text, *self, lookup);
        expansion.until(None, 0)?;
        Ok(expansion.joined())
    }

    /// Expands text that may become several words: unquoted white space separates them, also that of a variable.
    ///
    /// # Errors
    /// As [`Lexer::word`].
    pub fn words(&self, text: &str, lookup: Lookup<'_>) -> Result<Vec<String>, ExpandError> {
        let mut expansion = Expansion::new(text, *self, lookup);
        expansion.until(None, 0)?;
        Ok(expansion.split())
    }

    /// Expands a document: variables only, quotes are part of it.
    ///
    /// # Errors
    /// As [`Lexer::word`].
    pub fn document(&self, text: &str, lookup: Lookup<'_>) -> Result<String, ExpandError> {
        Self { raw_quotes: true, ..*self }.word(text, lookup)
    }

    /// Splits at unquoted white space and expands nothing: places and words as written.
    pub fn raw_words(&self, text: &str) -> Vec<(Range<usize>, String)> {
        let mut words = Vec::new();
        let mut start = None;
        let mut quote = None;
        let mut escaped = false;
        for (offset, character) in text.char_indices() {
            if start.is_none() && character.is_whitespace() {
                continue;
            }
            if escaped {
                escaped = false;
                continue;
            }
            match quote {
                Some(open) => {
                    if character == open {
                        quote = None;
                    } else if open == '"' && character == self.escape {
                        escaped = true;
                    }
                }
                None if character.is_whitespace() => {
                    let begun = start.take().unwrap_or(offset);
                    words.push((begun..offset, text[begun..offset].to_owned()));
                    continue;
                }
                None if character == self.escape => escaped = true,
                None if matches!(character, '"' | '\'') => quote = Some(character),
                None => {}
            }
            start.get_or_insert(offset);
        }
        if let Some(begun) = start {
            words.push((begun..text.len(), text[begun..].to_owned()));
        }
        words
    }
}

/// A character of the result, and whether it may separate words.
struct Expansion<'t, 'l> {
    rest: std::iter::Peekable<std::str::Chars<'t>>,
    lexer: Lexer,
    lookup: Lookup<'l>,
    output: Vec<(char, bool)>,
    /// A quoted empty word is a word.
    quoted: Vec<usize>,
    size: usize,
}

impl<'t, 'l> Expansion<'t, 'l> {
    fn new(text: &'t str, lexer: Lexer, lookup: Lookup<'l>) -> Self {
        Self { rest: text.chars().peekable(), lexer, lookup, output: Vec::new(), quoted: Vec::new(), size: 0 }
    }

    fn joined(self) -> String {
        self.output.into_iter().map(|(character, _)| character).collect()
    }

    fn split(self) -> Vec<String> {
        let mut words = Vec::new();
        let mut word: Option<String> = None;
        for (index, (character, separates)) in self.output.iter().enumerate() {
            if self.quoted.contains(&index) {
                word.get_or_insert_default();
            }
            if *separates && character.is_whitespace() {
                words.extend(word.take());
            } else {
                word.get_or_insert_default().push(*character);
            }
        }
        if self.quoted.contains(&self.output.len()) {
            word.get_or_insert_default();
        }
        words.extend(word);
        words
    }

    fn push(&mut self, character: char, separates: bool) -> Result<(), ExpandError> {
        self.size += character.len_utf8();
        if self.size > OUTPUT {
            return Err(ExpandError::TooLarge);
        }
        self.output.push((character, separates));
        Ok(())
    }

    fn push_all(&mut self, text: &str, separates: bool) -> Result<(), ExpandError> {
        text.chars().try_for_each(|character| self.push(character, separates))
    }

    /// Up to an unquoted `end`, which is taken, or to the end of the text.
    fn until(&mut self, end: Option<char>, depth: usize) -> Result<(), ExpandError> {
        if depth > DEPTH {
            return Err(ExpandError::TooLarge);
        }
        while let Some(character) = self.rest.next() {
            match character {
                _ if Some(character) == end => return Ok(()),
                '\'' if !self.lexer.raw_quotes => {
                    self.quoted.push(self.output.len());
                    loop {
                        match self.rest.next() {
                            Some('\'') => break,
                            Some(character) => self.push(character, false)?,
                            None => return Err(ExpandError::Unclosed('\'')),
                        }
                    }
                }
                '"' if !self.lexer.raw_quotes => self.double_quoted(depth)?,
                '$' => {
                    let value = self.variable(depth)?;
                    self.push_all(&value, true)?;
                }
                _ if character == self.lexer.escape => match self.rest.next() {
                    // In a document only what would be replaced can be escaped.
                    Some(next) if self.lexer.raw_quotes && next != '$' && next != self.lexer.escape => {
                        self.push(character, true)?;
                        self.push(next, true)?;
                    }
                    Some(next) => self.push(next, false)?,
                    None => self.push(character, false)?,
                },
                _ => self.push(character, true)?,
            }
        }
        match end {
            Some(end) => Err(ExpandError::Unclosed(if end == '}' { '{' } else { end })),
            None => Ok(()),
        }
    }

    fn double_quoted(&mut self, depth: usize) -> Result<(), ExpandError> {
        self.quoted.push(self.output.len());
        while let Some(character) = self.rest.next() {
            match character {
                '"' => return Ok(()),
                '$' => {
                    let value = self.variable(depth)?;
                    self.push_all(&value, false)?;
                }
                _ if character == self.lexer.escape => match self.rest.next() {
                    Some(next) if matches!(next, '"' | '$') || next == self.lexer.escape => {
                        self.push(next, false)?
                    }
                    Some(next) => {
                        self.push(character, false)?;
                        self.push(next, false)?;
                    }
                    None => return Err(ExpandError::Unclosed('"')),
                },
                _ => self.push(character, false)?,
            }
        }
        Err(ExpandError::Unclosed('"'))
    }

    /// What follows a `$`.
    fn variable(&mut self, depth: usize) -> Result<String, ExpandError> {
        if self.rest.next_if_eq(&'{').is_some() {
            return self.braced(depth);
        }
        let name = self.name();
        if name.is_empty() {
            return Ok("$".to_owned());
        }
        Ok((self.lookup)(&name).unwrap_or_default())
    }

    /// A variable's name; a single digit or one of a shell's own is one, too.
    fn name(&mut self) -> String {
        let mut name = String::new();
        if let Some(special) = self.rest.next_if(|character| "@*#?-$!0123456789".contains(*character)) {
            name.push(special);
            return name;
        }
        while let Some(character) =
            self.rest.next_if(|character| character.is_ascii_alphanumeric() || *character == '_')
        {
            name.push(character);
        }
        name
    }

    fn braced(&mut self, depth: usize) -> Result<String, ExpandError> {
        let name = self.name();
        let after = self.rest.next().ok_or(ExpandError::Unclosed('{'))?;
        if name.is_empty() {
            let mut shown = String::from(after);
            shown.extend(self.rest.by_ref().take(20).take_while(|character| *character != '}'));
            return Err(ExpandError::Name(shown.trim_end_matches('}').to_owned()));
        }
        let value = (self.lookup)(&name);
        let is_set = value.is_some();
        let text = value.unwrap_or_default();
        let (kind, present) = match after {
            '}' => return Ok(text),
            ':' => (self.rest.next().ok_or(ExpandError::Unclosed('{'))?, !text.is_empty()),
            kind => (kind, is_set),
        };
        match kind {
            '-' => {
                let word = self.nested('}', depth)?;
                Ok(if present { text } else { word })
            }
            '+' => {
                let word = self.nested('}', depth)?;
                Ok(if present { word } else { String::new() })
            }
            '?' => {
                let message = self.nested('}', depth)?;
                if present {
                    return Ok(text);
                }
                let message = if message.is_empty() { "is not set".to_owned() } else { message };
                Err(ExpandError::Required { name, message })
            }
            '#' | '%' if after != ':' => {
                let longest = self.rest.next_if_eq(&kind).is_some();
                let pattern = Glob::parse(&self.raw_nested('}', depth)?, self.lexer.escape);
                pattern.check_work(text.chars().count())?;
                Ok(if kind == '#' {
                    without_prefix(&text, &pattern, longest)
                } else {
                    without_suffix(&text, &pattern, longest)
                })
            }
            '/' if after != ':' => {
                let all = self.rest.next_if_eq(&'/').is_some();
                let pattern = Glob::parse(&self.raw_nested('/', depth)?, self.lexer.escape);
                let replacement = self.nested('}', depth)?;
                replace(&text, &pattern, &replacement, all)
            }
            _ => {
                let colon = if after == ':' { ":" } else { "" };
                Err(ExpandError::Modifier(format!("{colon}{kind}")))
            }
        }
    }

    /// A word within braces, expanded.
    fn nested(&mut self, end: char, depth: usize) -> Result<String, ExpandError> {
        let begin = self.output.len();
        let quoted = self.quoted.len();
        self.until(Some(end), depth + 1)?;
        self.quoted.truncate(quoted);
        Ok(self.output.drain(begin..).map(|(character, _)| character).collect())
    }

    /// A pattern: variables are replaced, escapes are left for the pattern.
    fn raw_nested(&mut self, end: char, depth: usize) -> Result<String, ExpandError> {
        let mut pattern = String::new();
        loop {
            match self.rest.next() {
                Some(character) if character == end => return Ok(pattern),
                Some('$') => pattern.push_str(&self.variable(depth + 1)?),
                Some(character) if character == self.lexer.escape => {
                    pattern.push(character);
                    pattern.extend(self.rest.next());
                }
                Some(character) => pattern.push(character),
                None => return Err(ExpandError::Unclosed('{')),
            }
            if pattern.len() > OUTPUT || depth > DEPTH {
                return Err(ExpandError::TooLarge);
            }
        }
    }
}

/// A pattern of `*`, `?` and plain characters.
struct Glob(Vec<Part>);

#[derive(PartialEq)]
enum Part {
    Any,
    One,
    Character(char),
}

impl Glob {
    fn parse(text: &str, escape: char) -> Self {
        let mut parts = Vec::new();
        let mut characters = text.chars();
        while let Some(character) = characters.next() {
            parts.push(match character {
                '*' => Part::Any,
                '?' => Part::One,
                _ if character == escape => match characters.next() {
                    Some(next) => Part::Character(next),
                    None => Part::Character(character),
                },
                _ => Part::Character(character),
            });
        }
        parts.dedup_by(|next, last| *next == Part::Any && *last == Part::Any);
        Self(parts)
    }

    /// Refuses what would take all day: matching so many characters.
    fn check_work(&self, characters: usize) -> Result<(), ExpandError> {
        let work = characters.saturating_mul(self.0.len() + 1);
        if work > WORK { Err(ExpandError::TooLarge) } else { Ok(()) }
    }

    /// Lengths of the beginnings of `text` that match, shortest first.
    fn prefixes(&self, text: &[char]) -> Vec<usize> {
        // reached[i]: the parts so far match the first i characters.
        let mut reached = vec![false; text.len() + 1];
        reached[0] = true;
        for part in &self.0 {
            match part {
                Part::Any => {
                    for index in 1..reached.len() {
                        reached[index] |= reached[index - 1];
                    }
                }
                Part::One | Part::Character(_) => {
                    for index in (1..reached.len()).rev() {
                        let fits = match part {
                            Part::Character(character) => text[index - 1] == *character,
                            _ => true,
                        };
                        reached[index] = reached[index - 1] && fits;
                    }
                    reached[0] = false;
                }
            }
        }
        reached.iter().enumerate().filter(|(_, reached)| **reached).map(|(index, _)| index).collect()
    }

    fn reversed(&self) -> Self {
        Self(
            self.0
                .iter()
                .rev()
                .map(|part| match part {
                    Part::Any => Part::Any,
                    Part::One => Part::One,
                    Part::Character(character) => Part::Character(*character),
                })
                .collect(),
        )
    }
}

fn without_prefix(text: &str, pattern: &Glob, longest: bool) -> String {
    let characters: Vec<char> = text.chars().collect();
    let lengths = pattern.prefixes(&characters);
    let length = if longest { lengths.last() } else { lengths.first() };
    characters[length.copied().unwrap_or(0)..].iter().collect()
}

fn without_suffix(text: &str, pattern: &Glob, longest: bool) -> String {
    let reversed: String = text.chars().rev().collect();
    without_prefix(&reversed, &pattern.reversed(), longest).chars().rev().collect()
}

fn replace(text: &str, pattern: &Glob, replacement: &str, all: bool) -> Result<String, ExpandError> {
    let characters: Vec<char> = text.chars().collect();
    let mut result = String::new();
    let mut index = 0;
    let mut done = false;
    // Each character may be looked at by each part from each beginning on.
    pattern.check_work(characters.len().saturating_mul(characters.len()))?;
    let limit = OUTPUT;
    while index < characters.len() {
        let longest =
            if done && !all { None } else { pattern.prefixes(&characters[index..]).last().copied() };
        match longest.filter(|length| *length > 0) {
            Some(length) => {
                result.push_str(replacement);
                index += length;
                done = true;
            }
            None => {
                result.push(characters[index]);
                index += 1;
            }
        }
        if result.len() > limit {
            return Err(ExpandError::TooLarge);
        }
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(name: &str) -> Option<String> {
        let value = match name {
            "A" => "one",
            "EMPTY" => "",
            "TWO" => "x y",
            "PATHS" => "/usr/local/bin",
            "FILE" => "archive.tar.gz",
            _ => return None,
        };
        Some(value.to_owned())
    }

    #[test]
    fn words() {
        let lexer = Lexer::new('\\');
        for (text, expected) in [
            ("plain", "plain"),
            ("$A", "one"),
            ("${A}b", "oneb"),
            ("$Ab", ""),
            ("a$", "a$"),
            ("$1x", "x"),
            (r"\$A", "$A"),
            (r"\\", r"\"),
            ("'$A'", "$A"),
            ("\"$A b\"", "one b"),
            (r#""\$A \x""#, r"$A \x"),
            ("${A:-no}", "one"),
            ("${NONE:-no}", "no"),
            ("${EMPTY:-no}", "no"),
            ("${EMPTY-no}", ""),
            ("${NONE-no}", "no"),
            ("${A:+yes}", "yes"),
            ("${EMPTY:+yes}", ""),
            ("${EMPTY+yes}", "yes"),
            ("${NONE+yes}", ""),
            ("${NONE:-${A}-${EMPTY:-e}}", "one-e"),
            ("${NONE:-\"a } b\"}", "a } b"),
            ("${PATHS#/*/}", "local/bin"),
            ("${PATHS##*/}", "bin"),
            ("${FILE%.*}", "archive.tar"),
            ("${FILE%%.*}", "archive"),
            ("${FILE/a/A}", "Archive.tar.gz"),
            ("${FILE//a/}", "rchive.tr.gz"),
            ("${FILE//[/x}", "archive.tar.gz"),
            (r"${FILE/\./-}", "archive-tar.gz"),
            ("${A:?must}", "one"),
        ] {
            assert_eq!(lexer.word(text, &mut lookup).as_deref(), Ok(expected), "{text}");
        }
        assert_eq!(Lexer::new('`').word(r"C:\dir`$A", &mut lookup).unwrap(), r"C:\dir$A");
        assert_eq!(
            lexer.words("a $TWO \"$TWO\" '' b\\ c", &mut lookup).unwrap(),
            ["a", "x", "y", "x y", "", "b c"]
        );
        assert_eq!(lexer.document("\"$A\" 'b' \\$A \\n", &mut lookup).unwrap(), "\"one\" 'b' $A \\n");
        for (text, message) in [
            ("'a", "`'` is not closed"),
            ("\"a", "`\"` is not closed"),
            ("${A", "`{` is not closed"),
            ("${A:-x", "`{` is not closed"),
            ("${A!x}", "`!` is no modifier of a variable"),
            ("${A:#x}", "`:#` is no modifier of a variable"),
            ("${}", "`${}` names no variable"),
            ("${NONE:?give it}", "NONE: give it"),
            ("${EMPTY:?}", "EMPTY: is not set"),
        ] {
            assert_eq!(lexer.word(text, &mut lookup).unwrap_err().to_string(), message, "{text}");
        }
        let deep = "${A:-".repeat(1000);
        assert_eq!(lexer.word(&deep, &mut lookup), Err(ExpandError::TooLarge));
        let bomb = "${NONE:-$BIG$BIG}".repeat(64);
        let mut big = |name: &str| (name == "BIG").then(|| "x".repeat(64 << 10));
        assert_eq!(lexer.word(&bomb, &mut big), Err(ExpandError::TooLarge));
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics_and_plain_text_stays(text in "[ -~é]{0,60}") {
            let lexer = Lexer::new('\\');
            let plain = text.chars().all(|character| !"$\\'\"".contains(character));
            let result = lexer.word(&text, &mut lookup);
            if plain {
                proptest::prop_assert_eq!(result.as_deref(), Ok(text.as_str()));
            }
            let _ = lexer.words(&text, &mut lookup);
            let _ = lexer.document(&text, &mut lookup);
            let raw: String = lexer.raw_words(&text).into_iter().map(|(_, word)| word).collect();
            proptest::prop_assert!(raw.len() <= text.len());
        }
    }
}
