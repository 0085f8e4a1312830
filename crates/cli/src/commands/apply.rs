//! `agentkernel apply --last`: the last run's changes, taken.

use std::fmt::Write as _;
use std::path::PathBuf;

use agentkernel_sandbox::state::Home;
use agentkernel_sandbox::workspace::{ApplyAction, ApplyOptions, ApplyReport, ChangeSet, LastChanges};
use agentkernel_sandbox::{Problem, plain, problem, workspace};

use crate::arguments::ApplyArguments;
use crate::{environment, ui};

pub(super) fn apply(arguments: &ApplyArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    let report = apply_last(&home, &arguments.paths, arguments.dry_run)?;
    if arguments.json {
        ui::json(&report);
    } else {
        show(&report);
    }
    Ok(u8::from(has_leftovers(&report)))
}

/// Applies the last change set, or those of its paths that are named.
pub(super) fn apply_last(home: &Home, paths: &[PathBuf], dry_run: bool) -> Result<ApplyReport, Problem> {
    let last = LastChanges::new(home.path());
    let set = last.load().map_err(|error| problem("changes", &error, error.hint().map(str::to_owned)))?;
    let Some(set) = set else {
        let hint = "agentkernel run keeps the changes that its command made in the workspace";
        return Err(plain("no-changes", "there are no kept changes", Some(hint)));
    };
    apply_set(set, paths, dry_run)
}

/// Applies a change set, or those of its paths that are named; one of which all was taken is removed.
pub(super) fn apply_set(
    mut set: ChangeSet,
    paths: &[PathBuf],
    dry_run: bool,
) -> Result<ApplyReport, Problem> {
    let paths: Vec<PathBuf> =
        paths.iter().map(|path| path.strip_prefix(set.workspace()).unwrap_or(path).to_owned()).collect();
    let options = ApplyOptions { named: paths.clone(), paths, exclude: Vec::new(), dry_run };
    let report = workspace::apply(&mut set, &options)
        .map_err(|error| problem("apply", &error, error.hint().map(str::to_owned)))?;
    if set.is_empty() && !dry_run {
        set.discard().map_err(|error| problem("changes", &error, None))?;
    }
    Ok(report)
}

/// True if something that was asked for is not on the host.
pub(super) fn has_leftovers(report: &ApplyReport) -> bool {
    !report.is_complete() || !report.unmatched.is_empty()
}

/// Prints what became of each path.
pub(super) fn show(report: &ApplyReport) {
    let mut text = String::new();
    for applied in &report.applied {
        let letter = match applied.action {
            ApplyAction::Created => "A",
            ApplyAction::Modified => "M",
            ApplyAction::Removed => "D",
            ApplyAction::AlreadyDone => "=",
        };
        let _ = writeln!(text, "{letter} {}", ui::path(applied.path.as_path()));
    }
    for conflict in &report.conflicts {
        let _ = writeln!(text, "conflict {}: {}", ui::path(conflict.path.as_path()), conflict.reason);
    }
    for held in &report.held_back {
        let _ = writeln!(text, "held back {}: {}", ui::path(held.path.as_path()), held.reason);
    }
    for refused in &report.refused {
        let _ = writeln!(
            text,
            "refused {}: device nodes, FIFOs and sockets stay in the guest",
            ui::path(refused.as_path())
        );
    }
    for failed in &report.failed {
        let _ = writeln!(text, "failed {}: {}", ui::path(failed.path.as_path()), failed.error);
    }
    for left in &report.not_applied {
        let _ = writeln!(text, "not tried {}", ui::path(left.as_path()));
    }
    for unmatched in &report.unmatched {
        let _ = writeln!(text, "not among the changes {}", ui::path(unmatched));
    }
    if !report.held_back.is_empty() {
        text.push_str("hint: name what is held back to take it: agentkernel apply --last PATH\n");
    }
    for line in text.lines() {
        ui::note(line);
    }
}
