//! Answers in words, for those who read rather than parse.

use std::fmt::Write;

use crate::model::{Diff, RunOutput};

/// Refusals that are named.
const REFUSALS: usize = 5;

/// What a command said, and then how it ended.
pub(super) fn of_run(output: &RunOutput) -> String {
    let mut text = output.output.clone();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    // Writing to a string does not fail.
    let _ = write!(text, "[exit code {}", output.exit_code);
    if output.timed_out {
        text.push_str(", its time was up");
    }
    if output.out_of_memory {
        text.push_str(", the sandbox ran out of memory: give it more memory_mb");
    }
    text.push(']');
    if let Some(error) = &output.error {
        let _ = write!(text, "\n[it did not start: {error}]");
    }
    if let Some(changes) = &output.changes {
        let (added, modified, removed) = (changes.added, changes.modified, changes.removed);
        if added + modified + removed > 0 {
            let _ = write!(
                text,
                "\n[files of the project: {added} added, {modified} modified, {removed} removed"
            );
            let kept = if output.applied.is_some() {
                ""
            } else {
                "; kept apart: sandbox_diff shows them, sandbox_apply takes them"
            };
            let _ = write!(text, "{kept}]");
        }
    }
    for refusal in output.refusals.iter().take(REFUSALS) {
        let _ = write!(text, "\n[the network policy refused {}: {}", refusal.target, refusal.reason);
        if let Some(rule) = &refusal.allow {
            let _ = write!(text, "; allow {rule:?} lets it through");
        }
        text.push(']');
    }
    let more = output.refusals.len().saturating_sub(REFUSALS);
    if more > 0 {
        let _ = write!(text, "\n[{more} more refusals]");
    }
    text
}

/// A unified diff, and what it leaves out.
pub(super) fn of_diff(diff: &Diff) -> String {
    let mut text = diff.unified.clone();
    if diff.omitted_bytes > 0 {
        let _ = write!(text, "\n[{} more bytes: name paths to see them]", diff.omitted_bytes);
    }
    for file in &diff.files {
        let field = |name: &str| file.get(name).and_then(|value| value.as_str());
        let path = field("path").unwrap_or_default();
        for (name, what) in [("conflict", "conflicts"), ("held_back", "is held back")] {
            if let Some(why) = field(name) {
                let _ = write!(text, "\n[{path} {what}: {why}]");
            }
        }
    }
    if text.is_empty() {
        text.push_str("nothing was changed");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Changes, Refusal};

    #[test]
    fn a_command_is_told_as_a_terminal_would() {
        let mut output = RunOutput { output: "hello".into(), exit_code: 3, ..RunOutput::default() };
        assert_eq!(of_run(&output), "hello\n[exit code 3]");
        output.changes = Some(Changes { added: 1, modified: 0, removed: 2 });
        output.refusals = vec![
            Refusal {
                target: "a.example".into(),
                reason: "no rule allows it".into(),
                allow: Some("a.example".into()),
                count: 1
            };
            7
        ];
        let text = of_run(&output);
        assert!(text.contains("1 added, 0 modified, 2 removed; kept apart"), "{text}");
        assert!(text.ends_with("[2 more refusals]"), "{text}");
    }
}
