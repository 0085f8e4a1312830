//! How a command ended, for people and for programs.

use std::time::Duration;

use agentkernel_protocol::message::{ExecFailure, Exit, ExitStatus};
use agentkernel_sandbox::network::{Refusals, Refused};
use agentkernel_sandbox::plain;
use agentkernel_sandbox::workspace::{ApplyReport, ChangeSummary};
use serde::Serialize;
use std::fmt::Write as _;

use super::execute::{Captured, Ended};
use crate::ui;

/// Says what a bare exit code leaves open. `memory_mib` is the guest's.
pub(super) fn explain(ended: &Ended, memory_mib: u64) {
    match ended {
        Ended::Exited(Exit { timed_out: true, .. }) => ui::note("the command was killed: --timeout was up"),
        Ended::Exited(Exit { out_of_memory: true, .. }) => ui::note(&format!(
            "the guest ran out of memory and killed processes: give the sandbox more than --memory {memory_mib}M"
        )),
        Ended::NotStarted { kind, message } => {
            let hint = match kind {
                ExecFailure::NotFound => Some(
                    "the host image shows what every user of this machine may read; --image takes another",
                ),
                ExecFailure::Directory => Some("choose one of the guest's directories with --workdir"),
                ExecFailure::UnknownUser => Some("choose a user of the guest with --user"),
                ExecFailure::NotExecutable | ExecFailure::Other => None,
            };
            ui::error(&plain("not-started", message.clone(), hint));
        }
        Ended::Exited(_) | Ended::Abandoned { .. } | Ended::Detached => {}
    }
}

/// Refusals that are shown one by one.
const SHOWN: usize = 5;

/// Says what the network refused, and which flag lets each through. `kept` is the sandbox's name if it stays.
pub(super) fn tell(refusals: &Refusals, kept: Option<&str>) {
    if let Some(text) = refusal_lines(refusals, kept) {
        ui::note(&text);
    }
}

fn refusal_lines(refusals: &Refusals, kept: Option<&str>) -> Option<String> {
    if refusals.list.is_empty() {
        return None;
    }
    let mut text = "the network policy refused".to_owned();
    for refused in refusals.list.iter().take(SHOWN) {
        let reason = match refused.reason.strip_prefix("the network policy refuses ") {
            Some(reason) => reason.to_owned(),
            None => format!("{}: {}", refused.target, refused.reason),
        };
        let times = if refused.count > 1 { format!(" ({} times)", refused.count) } else { String::new() };
        let _ = write!(text, "\n  {}{times}; {}", ui::line(&reason), ui::line(&refused.hint));
    }
    let more = refusals.list.len().saturating_sub(SHOWN) as u64 + refusals.others;
    match kept {
        _ if more == 0 => {}
        Some(name) => {
            let _ = write!(text, "\n  {more} more: agentkernel audit {name} --refused");
        }
        None => {
            let _ = write!(text, "\n  {more} more");
        }
    }
    Some(text)
}

/// What `--json` prints.
#[derive(Serialize)]
pub(super) struct Outcome {
    exit_code: u8,
    signal: Option<u8>,
    timed_out: bool,
    out_of_memory: bool,
    pub(super) error: Option<String>,
    stdout: Text,
    stderr: Text,
    output: Text,
    omitted_bytes: u64,
    changes: Option<ChangeSummary>,
    applied: Option<ApplyReport>,
    /// Published ports.
    pub(super) ports: Vec<String>,
    /// What the network refused, each once.
    pub(super) refusals: Vec<Refused>,
    start_ms: f64,
    total_ms: f64,
}

/// Text as a string where it is UTF-8, else its bytes in hexadecimal.
#[derive(Serialize)]
#[serde(untagged)]
enum Text {
    Utf8(String),
    Hexadecimal { hex: String },
}

impl Text {
    fn of(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::Utf8(text.to_owned()),
            Err(_) => {
                let mut hex = String::with_capacity(bytes.len() * 2);
                for byte in bytes {
                    let _ = write!(hex, "{byte:02x}");
                }
                Self::Hexadecimal { hex }
            }
        }
    }
}

impl Outcome {
    pub(super) fn new(
        ended: &Ended,
        exit_code: u8,
        captured: &Captured,
        changes: Option<ChangeSummary>,
        applied: Option<ApplyReport>,
        started: Duration,
        total: Duration,
    ) -> Self {
        let exit = match ended {
            Ended::Exited(exit) => Some(*exit),
            _ => None,
        };
        Self {
            exit_code,
            signal: exit.and_then(|exit| match exit.status {
                ExitStatus::Signal(signal) => Some(signal),
                ExitStatus::Code(_) => None,
            }),
            timed_out: exit.is_some_and(|exit| exit.timed_out),
            out_of_memory: exit.is_some_and(|exit| exit.out_of_memory),
            error: match ended {
                Ended::NotStarted { message, .. } => Some(message.clone()),
                _ => None,
            },
            stdout: Text::of(&captured.stdout),
            stderr: Text::of(&captured.stderr),
            output: Text::of(&captured.output),
            omitted_bytes: captured.omitted,
            changes,
            applied,
            ports: Vec::new(),
            refusals: Vec::new(),
            start_ms: started.as_secs_f64() * 1e3,
            total_ms: total.as_secs_f64() * 1e3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(name: &str, count: u64) -> Refused {
        Refused {
            target: name.into(),
            reason: format!("the network policy refuses {name}: no rule allows it"),
            allow: Some(name.into()),
            hint: format!("--allow {name}"),
            count,
        }
    }

    #[test]
    fn refusals_are_few_lines() {
        assert_eq!(refusal_lines(&Refusals::default(), None), None);
        let mut list = vec![refused("a.example", 3), refused("b\u{1b}.example", 1)];
        let said = |list: &[Refused], kept| refusal_lines(&Refusals { list: list.to_vec(), others: 0 }, kept);
        assert_eq!(
            said(&list, None).unwrap(),
            "the network policy refused\n  a.example: no rule allows it (3 times); --allow a.example\n  \
             b\\u{1b}.example: no rule allows it; --allow b\\u{1b}.example"
        );
        list.extend((0..9).map(|number| refused(&format!("n{number}.example"), 1)));
        assert_eq!(said(&list, None).unwrap().lines().last(), Some("  6 more"));
        let last = said(&list, Some("dev")).unwrap();
        assert_eq!(last.lines().last(), Some("  6 more: agentkernel audit dev --refused"));
    }
}
