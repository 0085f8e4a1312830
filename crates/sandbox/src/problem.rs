//! The engine's error as users meet it: a stable code, what failed and why, and what to do.
//!
//! Libraries below have typed errors of their own; here they become one shape that crosses process boundaries.

use std::fmt::Write as _;

pub use agentkernel_protocol::control::Problem;

/// Makes a [`Problem`] of an error and its sources.
pub fn problem(code: &str, error: &dyn std::error::Error, hint: Option<String>) -> Problem {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        // Some libraries repeat their source in their own text.
        let text = error.to_string();
        if !message.contains(&text) {
            let _ = write!(message, ": {text}");
        }
        source = error.source();
    }
    Problem { code: code.to_owned(), message, hint }
}

/// Makes a [`Problem`] of plain words.
pub fn plain(code: &str, message: impl Into<String>, hint: Option<&str>) -> Problem {
    Problem { code: code.to_owned(), message: message.into(), hint: hint.map(str::to_owned) }
}

/// Says what was being done when an I/O error came.
pub fn io(what: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> Problem {
    move |error| {
        let hint = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Some("free some disk space and try again")
            }
            std::io::ErrorKind::ReadOnlyFilesystem => Some("set AGENTKERNEL_HOME to a writable directory"),
            _ => None,
        };
        let code = if hint.is_some() { "disk" } else { "io" };
        plain(code, format!("cannot {what}: {error}"), hint)
    }
}

/// As [`io`], for errors of `rustix`.
pub fn os(what: impl std::fmt::Display) -> impl FnOnce(rustix::io::Errno) -> Problem {
    move |error| io(what)(error.into())
}

/// Words of strangers, short and without what a terminal would act upon.
pub fn printable(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(200).collect()
}
