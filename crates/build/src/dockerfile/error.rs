//! What is wrong with a Dockerfile, and where.

use std::fmt;

use super::Place;

/// Longest line that is shown, characters.
const SHOWN: usize = 160;

/// An error at a place of a Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DockerfileError {
    /// Where.
    pub place: Place,
    /// What is wrong, lower case, no final period.
    pub message: String,
    /// What the user can do about it.
    pub hint: Option<String>,
    /// The line.
    line: String,
}

impl DockerfileError {
    pub(super) fn new(source: &str, place: Place, message: String, hint: Option<String>) -> Self {
        let line = source.lines().nth(place.line.saturating_sub(1) as usize).unwrap_or_default();
        let line = line.chars().map(|character| if character.is_control() { ' ' } else { character });
        // The words are a stranger's: they must not write to a terminal.
        let clean = |text: String| -> String {
            text.chars()
                .map(|character| if character.is_control() { '\u{fffd}' } else { character })
                .collect()
        };
        Self { place, message: clean(message), hint: hint.map(clean), line: line.collect() }
    }

    /// The error as people read it, with the line and a caret below the place.
    pub fn render(&self, file: &str) -> String {
        let column = (self.place.column as usize).saturating_sub(1);
        let skipped = column.saturating_sub(SHOWN / 2);
        let shown: String = self.line.chars().skip(skipped).take(SHOWN).collect();
        let shown = shown.trim_end();
        let mut text = format!("{file}:{}:{}: {}", self.place.line, self.place.column, self.message);
        if !shown.is_empty() {
            text.push_str(&format!("\n    {shown}\n    {}^", " ".repeat(column - skipped)));
        }
        text
    }
}

impl fmt::Display for DockerfileError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.render("Dockerfile"))
    }
}

impl std::error::Error for DockerfileError {}
