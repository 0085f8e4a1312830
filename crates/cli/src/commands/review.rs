//! `agentkernel diff` and `apply`: what was changed, seen and taken.

use std::fmt::Write as _;
use std::io::{BufWriter, IsTerminal, Write as _};
use std::path::PathBuf;

use agentkernel_sandbox::state::{Home, SandboxDirectory};
use agentkernel_sandbox::workspace::{
    ApplyAction, ApplyOptions, ApplyReport, ChangeSet, DiffError, DiffOptions, FileDiff, Palette,
};
use agentkernel_sandbox::{Problem, problem, review, workspace};

use super::block_on;
use crate::arguments::{ApplyArguments, DiffArguments};
use crate::{environment, ui};

/// Which changes.
#[derive(Debug)]
struct Selection {
    /// Only these paths; empty: all.
    paths: Vec<PathBuf>,
    /// Not these paths.
    exclude: Vec<PathBuf>,
    /// Write nothing.
    dry_run: bool,
}

/// Whose changes: a sandbox's, or the last run's if there is none.
struct Source {
    home: Home,
    sandbox: Option<SandboxDirectory>,
}

impl Source {
    fn open(name: Option<&str>) -> Result<Self, Problem> {
        let home = environment::home()?;
        let sandbox = name.map(|name| home.find(name)).transpose()?;
        Ok(Self { home, sandbox })
    }

    fn changes(&self, quiet: bool) -> Result<ChangeSet, Problem> {
        if let Some(sandbox) = &self.sandbox {
            let mut status = ui::Status::new(!quiet);
            let program = environment::program()?;
            return block_on(review::changes(sandbox, &program, &mut |text| status.say(text)))?;
        }
        review::last(&self.home)
    }
}

/// With `--last` there is no sandbox: what clap took for its name is the first path.
fn names(last: bool, name: Option<&String>, paths: &[PathBuf]) -> (Option<String>, Vec<PathBuf>) {
    match (last, name) {
        (true, Some(name)) => {
            (None, std::iter::once(PathBuf::from(name)).chain(paths.iter().cloned()).collect())
        }
        (_, name) => (name.cloned(), paths.to_vec()),
    }
}

pub(super) fn apply(arguments: &ApplyArguments) -> Result<u8, Problem> {
    let (name, paths) = names(arguments.last, arguments.name.as_ref(), &arguments.paths);
    let source = Source::open(name.as_deref())?;
    let selection = Selection { paths, exclude: arguments.exclude.clone(), dry_run: arguments.dry_run };
    let set = source.changes(arguments.json)?;
    let report = apply_set(set, &selection)?;
    if let Some(sandbox) = source.sandbox.as_ref().filter(|_| !arguments.dry_run) {
        block_on(review::rebase(sandbox, &report))??;
    }
    if arguments.json {
        ui::json(&report);
    } else {
        show(&report, name.as_deref().unwrap_or("--last"));
        if report.applied.is_empty() && !has_leftovers(&report) {
            ui::note("nothing was changed");
        }
    }
    Ok(u8::from(has_leftovers(&report)))
}

/// Applies a change set, or the selected part of it; one of which all was taken is removed.
fn apply_set(set: ChangeSet, selection: &Selection) -> Result<ApplyReport, Problem> {
    let paths = review::relative(&set, &selection.paths);
    let options = ApplyOptions {
        named: paths.clone(),
        paths,
        exclude: review::relative(&set, &selection.exclude),
        dry_run: selection.dry_run,
    };
    review::apply(set, &options)
}

/// True if something that was asked for is not on the host.
pub(super) fn has_leftovers(report: &ApplyReport) -> bool {
    !report.is_complete() || !report.unmatched.is_empty()
}

/// Prints what became of each path. `whose` is what `apply` was told.
pub(super) fn show(report: &ApplyReport, whose: &str) {
    let mut text = String::new();
    for rename in &report.renames {
        let (from, to) = (ui::path(rename.from.as_path()), ui::path(rename.to.as_path()));
        let _ = writeln!(text, "R {from} -> {to} ({}%)", rename.similarity);
    }
    let renamed: std::collections::HashSet<_> =
        report.renames.iter().flat_map(|rename| [&rename.from, &rename.to]).collect();
    for applied in report.applied.iter().filter(|applied| !renamed.contains(&applied.path)) {
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
        let _ = writeln!(text, "hint: name what is held back to take it: agentkernel apply {whose} PATH");
    }
    for line in text.lines() {
        ui::note(line);
    }
}

pub(super) fn diff(arguments: &DiffArguments) -> Result<u8, Problem> {
    let (name, paths) = names(arguments.last, arguments.name.as_ref(), &arguments.paths);
    let source = Source::open(name.as_deref())?;
    let mut set = source.changes(arguments.json)?;
    let options = DiffOptions {
        paths: review::relative(&set, &paths),
        exclude: review::relative(&set, &arguments.exclude),
    };
    let colours = ui::paints_stdout();
    let palette =
        Palette { escape: std::io::stdout().is_terminal(), ..if colours { COLOURS } else { PLAIN } };
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut files = Vec::new();
    let mut directories = 0usize;
    let mut show = |file: &FileDiff| {
        directories += usize::from(file.is_directory());
        if arguments.json {
            files.push(serde_json::to_value(file).map_err(std::io::Error::other)?);
        } else if file.is_directory() {
            return Ok(());
        } else if arguments.name_only {
            writeln!(out, "{}", ui::path(file.path.as_path()))?;
        } else if arguments.stat {
            writeln!(out, "{}", file.stat_line(GRAPH_WIDTH))?;
        } else {
            file.write_unified(&mut out, &palette)?;
        }
        Ok(())
    };
    let result = workspace::diff(&mut set, &options, &mut show);
    let flushed = out.flush();
    drop(out);
    let summary = match (result, flushed) {
        (Err(DiffError::Io(error)), _) | (Ok(_), Err(error))
            if error.kind() == std::io::ErrorKind::BrokenPipe =>
        {
            return Ok(0);
        }
        (Err(error), _) => return Err(problem("diff", &error, None)),
        (Ok(_), Err(error)) => return Err(problem("output", &error, None)),
        (Ok(summary), Ok(())) => summary,
    };
    if arguments.json {
        ui::json(&serde_json::json!({ "files": files, "summary": summary }));
    } else if arguments.stat {
        ui::data(&format!(" {summary}\n"));
    }
    for path in &summary.unmatched {
        ui::note(&format!("not among the changes {}", ui::path(path)));
    }
    if !arguments.json && !arguments.name_only && directories > 0 && summary.files == 0 {
        ui::note(&format!("only directories were changed ({directories}): --json shows them"));
    }
    Ok(u8::from(!summary.unmatched.is_empty()))
}

/// Width of the graph that `--stat` draws.
const GRAPH_WIDTH: usize = 40;
const PLAIN: Palette = Palette { header: "", hunk: "", added: "", removed: "", reset: "", escape: false };
const COLOURS: Palette = Palette {
    header: "\x1b[1m",
    hunk: "\x1b[36m",
    added: "\x1b[32m",
    removed: "\x1b[31m",
    reset: "\x1b[0m",
    escape: false,
};
