//! What people read: notes and errors on stderr, data on stdout, and nothing anywhere else.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use agentkernel_sandbox::Problem;
use serde::Serialize;

/// Exit code of agentkernel's own failures in `run`.
pub(crate) const RUN_FAILED: u8 = 125;

/// Prints an error and its remedy.
pub(crate) fn error(problem: &Problem) {
    // Some of the words may be a guest's: they must not write to the terminal, nor fill it.
    let shown = |character: &char| *character == '\n' || !character.is_control();
    let message: String = problem.message.chars().filter(shown).take(4096).collect();
    let mut text = format!("{} {message}\n", paint("error:", "1;31"));
    if let Some(hint) = &problem.hint {
        text.push_str(&format!("{} {hint}\n", paint("hint:", "1;36")));
    }
    stderr(&text);
}

/// Prints a line about what is going on.
pub(crate) fn note(text: &str) {
    stderr(&format!("{} {text}\n", paint("agentkernel:", "2")));
}

/// Writes data to stdout. A reader that went away is no error of ours.
pub(crate) fn data(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// Writes bytes to stdout; false if its reader went away.
pub(crate) fn raw_data(bytes: &[u8]) -> bool {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).is_ok()
}

/// Writes bytes to stderr; false if its reader went away.
pub(crate) fn raw(bytes: &[u8]) -> bool {
    std::io::stderr().lock().write_all(bytes).is_ok()
}

/// Prints rows under their headings, each column as wide as it must be.
pub(crate) fn table(headings: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let rows: Vec<Vec<String>> =
        std::iter::once(headings.iter().map(|heading| (*heading).to_owned()).collect()).chain(rows).collect();
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    data(&text);
}

/// A number of bytes, as people say it.
pub(crate) fn size(bytes: u64) -> String {
    let units = ["B", "K", "M", "G", "T"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(value < 10.0 && value.fract() > 0.05);
    format!("{value:.digits$}{}", units[unit])
}

/// A time, as people say it: the two largest units.
pub(crate) fn time(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, _, _) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

/// The word by which `value` is known in JSON.
pub(crate) fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

/// Words of strangers on one line, control characters escaped, not longer than a line may be.
pub(crate) fn line(text: &str) -> String {
    let short: String = text.chars().take(500).collect();
    path(std::path::Path::new(&short))
}

/// Writes `value` to stdout as indented JSON.
pub(crate) fn json<T: Serialize>(value: &T) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => data(&format!("{text}\n")),
        Err(problem) => stderr(&format!("error: {problem}\n")),
    }
}

/// Prints what clap has to say about the command line: help on stdout, mistakes on stderr with exit code 2, or 125
/// when `run` was meant, whose codes below that belong to the command.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    match error.exit_code() {
        0 => ExitCode::SUCCESS,
        _ if runs_a_command() => ExitCode::from(RUN_FAILED),
        _ => ExitCode::from(2),
    }
}

/// Whether the command line means a verb whose low exit codes are those of a command.
fn runs_a_command() -> bool {
    let mut words = std::env::args_os().skip(1).filter(|word| word != "--verbose" && word != "sandbox");
    words.next().is_some_and(|verb| verb == "run" || verb == "exec" || verb == "attach")
}

/// Sends the libraries' log to stderr: warnings, or everything with `--verbose`.
pub(crate) fn start_logging(verbose: bool) {
    let level = if verbose { tracing::Level::DEBUG } else { tracing::Level::WARN };
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_timer(tracing_subscriber::fmt::time::uptime())
        .with_target(false)
        .try_init();
}

/// A line that shows that long work goes on and vanishes when it is over; only on a terminal, only after a moment.
pub(crate) struct Status {
    shown: bool,
    enabled: bool,
    since: Instant,
}

impl Status {
    const PATIENCE: Duration = Duration::from_millis(400);

    pub(crate) fn new(enabled: bool) -> Self {
        Self { shown: false, enabled: enabled && std::io::stderr().is_terminal(), since: Instant::now() }
    }

    pub(crate) fn say(&mut self, text: &str) {
        if self.enabled && (self.shown || self.since.elapsed() >= Self::PATIENCE) {
            let text: String = text.chars().filter(|character| !character.is_control()).take(76).collect();
            stderr(&format!("\r\x1b[2K{}", paint(&text, "2")));
            self.shown = true;
        }
    }

    pub(crate) fn clear(&mut self) {
        if self.shown {
            stderr("\r\x1b[2K");
            self.shown = false;
        }
    }
}

impl Drop for Status {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Whether stdout is a terminal that wants colours.
pub(crate) fn paints_stdout() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Colours `text` if stderr is a terminal that wants colours.
pub(crate) fn paint(text: &str, code: &str) -> String {
    let wanted =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    if wanted { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

/// Shows a path of a hostile guest so that it cannot write to the terminal: control characters escaped.
pub(crate) fn path(path: &std::path::Path) -> String {
    path.to_string_lossy()
        .chars()
        .flat_map(|character| {
            let escaped = character.is_control();
            let plain = (!escaped).then_some(character);
            plain.into_iter().chain(character.escape_default().filter(move |_| escaped))
        })
        .collect()
}

fn stderr(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}
