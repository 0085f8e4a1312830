//! How a command ended, for people and for programs.

use std::time::Duration;

use agentkernel_protocol::message::{ExecFailure, Exit, ExitStatus};
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
            start_ms: started.as_secs_f64() * 1e3,
            total_ms: total.as_secs_f64() * 1e3,
        }
    }
}
