//! `agentkernel plugin`: coding agents are told of `agentkernel mcp`.
//!
//! Nothing is remembered besides: the agents' own files say what is installed. Each file is a step of its own; one that
//! cannot be changed is reported and left, and keeps no other from being changed.

mod document;
mod parts;
mod place;

use agentkernel_sandbox::{Problem, plain};
use serde::Serialize;
use similar::TextDiff;

use self::document::State;
use self::parts::{Outcome, Part, Scope, parts};
use crate::arguments::{Plugin, PluginArguments, PluginVerb};
use crate::ui;

pub(super) fn plugin(verb: &PluginVerb) -> Result<u8, Problem> {
    match verb {
        PluginVerb::Install(arguments) => change(arguments, Change::Install),
        PluginVerb::Remove(arguments) => change(arguments, Change::Remove),
        PluginVerb::List { json } => list(*json),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Install,
    Remove,
}

/// What became of a file, or with `--dry-run` would.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Action {
    Created,
    Changed,
    Removed,
    Unchanged,
    /// It is not as asked for: somebody else's words are in it, or it is needed.
    Kept,
    Failed,
}

/// One file's outcome.
#[derive(Debug, Serialize)]
struct Report {
    agent: &'static str,
    part: &'static str,
    path: String,
    action: Action,
    /// Why it was kept, or what failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// What was changed, or would be; with `kept`, what --force would change.
    #[serde(skip_serializing_if = "Option::is_none")]
    diff: Option<String>,
}

fn change(arguments: &PluginArguments, change: Change) -> Result<u8, Problem> {
    let scope = if arguments.global { Scope::Global } else { Scope::Project };
    let parts = parts(arguments.plugin, scope)?;
    if parts.is_empty() {
        let message = "no agent that is known here was found: Claude Code, Codex, Gemini CLI, Cursor";
        let hint = "start the agent once, or enter the server by hand: command `agentkernel`, argument `mcp`";
        return Err(plain("no-agent", message, Some(hint)));
    }
    let mut reports = Vec::new();
    for part in &parts {
        let report = change_part(part, arguments, scope, change).unwrap_or_else(|problem| {
            ui::error(&problem);
            report(part, Action::Failed, Some(problem.message))
        });
        if !arguments.json {
            show(&report, arguments.dry_run);
        }
        reports.push(report);
    }
    if arguments.json {
        ui::json(&reports);
    }
    Ok(u8::from(reports.iter().any(|report| matches!(report.action, Action::Kept | Action::Failed))))
}

fn report(part: &Part, action: Action, reason: Option<String>) -> Report {
    let path = part.place.whole().to_string_lossy().into_owned();
    Report { agent: part.agent, part: part.name(), path, action, reason, diff: None }
}

fn change_part(
    part: &Part,
    arguments: &PluginArguments,
    scope: Scope,
    change: Change,
) -> Result<Report, Problem> {
    let before = part.place.read()?;
    let state = part.state(&before.text)?;
    let (done, outcome, kept) = match change {
        Change::Install => {
            let foreign = matches!(state, State::Differs | State::Elsewhere);
            let kept = foreign.then(|| "there is another one already; --force replaces it".to_owned());
            (state == State::Installed, part.put(&before.text)?, kept.filter(|_| !arguments.force))
        }
        Change::Remove => {
            let foreign = state == State::Differs;
            let kept = foreign.then(|| "it is not as install writes it; --force removes it".to_owned());
            let kept = kept.or(needed_by_claude(part, arguments, scope)?).filter(|_| !arguments.force);
            (state == State::Missing, part.take(&before.text)?, kept)
        }
    };
    if done {
        return Ok(report(part, Action::Unchanged, None));
    }
    let after = match &outcome {
        Outcome::Text(text) => text.as_str(),
        Outcome::Gone => "",
    };
    let action = match (&outcome, &kept) {
        (_, Some(_)) => Action::Kept,
        (Outcome::Gone, None) => Action::Removed,
        (Outcome::Text(_), None) if before.text.is_empty() => Action::Created,
        (Outcome::Text(_), None) => Action::Changed,
    };
    let report = Report { diff: Some(difference(part, &before.text, after)), ..report(part, action, kept) };
    if action != Action::Kept && !arguments.dry_run {
        match &outcome {
            Outcome::Text(text) => part.place.write(&before, text)?,
            Outcome::Gone => part.place.remove(&before)?,
        }
    }
    Ok(report)
}

/// Both plugins have the server's entry. With Claude Code's skill there, it is that plugin's.
fn needed_by_claude(
    part: &Part,
    arguments: &PluginArguments,
    scope: Scope,
) -> Result<Option<String>, Problem> {
    if arguments.plugin == Plugin::Claude {
        return Ok(None);
    }
    let claude = parts(Plugin::Claude, scope)?;
    if !claude.iter().any(|other| other.place.whole() == part.place.whole()) {
        return Ok(None);
    }
    for skill in claude.iter().filter(|other| other.name() != part.name()) {
        if part.place.read()?.text.is_empty() || skill.state(&skill.place.read()?.text)? == State::Missing {
            continue;
        }
        let global = if scope == Scope::Global { " --global" } else { "" };
        let reason = "Claude Code's skill needs it; `agentkernel plugin remove claude";
        return Ok(Some(format!("{reason}{global}` takes both away")));
    }
    Ok(None)
}

/// The change as a unified diff.
fn difference(part: &Part, before: &str, after: &str) -> String {
    let path = ui::path(&part.place.whole());
    let side = |text: &str| if text.is_empty() { "/dev/null".to_owned() } else { path.clone() };
    let diff = TextDiff::from_lines(before, after);
    diff.unified_diff().header(&side(before), &side(after)).to_string()
}

/// Prints what became of a file: with `--dry-run`, and for one that was kept, what would.
fn show(report: &Report, dry_run: bool) {
    let path = ui::path(std::path::Path::new(&report.path));
    let what = format!("{} ({}, {})", path, report.agent, report.part);
    // Parts of it may be a stranger's.
    let diff = || -> String {
        let diff = report.diff.as_deref().unwrap_or_default();
        diff.chars().filter(|character| matches!(character, '\n' | '\t') || !character.is_control()).collect()
    };
    match report.action {
        // Said already.
        Action::Failed => {}
        Action::Unchanged => ui::note(&format!("nothing to change: {what}")),
        Action::Kept => {
            ui::note(&format!("kept: {what}: {}", report.reason.as_deref().unwrap_or_default()));
            ui::data(&diff());
        }
        _ if dry_run => ui::data(&diff()),
        action => ui::data(&format!("{} {what}\n", ui::word(&action))),
    }
}

/// A line of `plugin list`.
#[derive(Debug, Serialize)]
struct Listed {
    plugin: &'static str,
    scope: Scope,
    agent: &'static str,
    part: &'static str,
    path: String,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

fn list(json: bool) -> Result<u8, Problem> {
    let mut all = Vec::new();
    for (plugin, name) in [(Plugin::Claude, "claude"), (Plugin::Mcp, "mcp")] {
        for scope in [Scope::Project, Scope::Global] {
            let parts = match parts(plugin, scope) {
                // A place without a project has only what is global.
                Err(problem) if problem.code == "no-project" => continue,
                parts => parts?,
            };
            for part in parts {
                let state = part.place.read().and_then(|content| part.state(&content.text));
                let (state, reason) = match state {
                    Ok(State::Installed) => ("installed", None),
                    Ok(State::Missing) => ("not installed", None),
                    Ok(State::Elsewhere | State::Differs) => ("differs", None),
                    Err(problem) => ("unreadable", Some(problem.message)),
                };
                let path = part.place.whole().to_string_lossy().into_owned();
                let (agent, part) = (part.agent, part.name());
                all.push(Listed { plugin: name, scope, agent, part, path, state, reason });
            }
        }
    }
    if json {
        ui::json(&all);
        return Ok(0);
    }
    let rows = all.iter().map(|listed| {
        let path = ui::path(std::path::Path::new(&listed.path));
        let cells = [listed.plugin, &ui::word(&listed.scope), listed.part, listed.state, listed.agent, &path];
        cells.map(str::to_owned).to_vec()
    });
    ui::table(&["PLUGIN", "SCOPE", "PART", "STATE", "AGENT", "PATH"], rows);
    for reason in all.iter().filter_map(|listed| listed.reason.as_deref()) {
        ui::note(&ui::line(reason));
    }
    Ok(0)
}
