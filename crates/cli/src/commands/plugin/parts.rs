//! What a plugin is made of: for each agent and scope, which files, and what install writes into them.

use std::path::{Path, PathBuf};

use agentkernel_sandbox::project::{Choice, WorkspaceMode, choose};
use agentkernel_sandbox::{Problem, plain};
use serde::Serialize;

use super::document::{Entry, Format, Mistake, NAME, State};
use super::place::{Place, Trust};
use crate::arguments::Plugin;
use crate::{environment, ui};

/// When and how an agent uses the server.
const SKILL: &str = include_str!("skill.md");

/// What of a plugin a file has.
#[derive(Clone, Debug)]
enum Kind {
    /// An entry in a configuration.
    Server(Entry),
    /// The skill, which is the whole file.
    Skill,
}

/// One file of a plugin.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// The agent, as people call it.
    pub agent: &'static str,
    pub place: Place,
    kind: Kind,
}

/// Where a plugin is installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Scope {
    Project,
    Global,
}

/// What becomes of a file.
pub(super) enum Outcome {
    /// It has this text then.
    Text(String),
    /// It is gone then.
    Gone,
}

impl Part {
    pub(super) fn name(&self) -> &'static str {
        match self.kind {
            Kind::Server(_) => "server",
            Kind::Skill => "skill",
        }
    }

    pub(super) fn state(&self, text: &str) -> Result<State, Problem> {
        match &self.kind {
            Kind::Server(entry) => entry.state(text).map_err(|mistake| self.refused(&mistake)),
            Kind::Skill if text == SKILL => Ok(State::Installed),
            Kind::Skill if text.is_empty() => Ok(State::Missing),
            Kind::Skill => Ok(State::Differs),
        }
    }

    /// What install makes of the file.
    pub(super) fn put(&self, text: &str) -> Result<Outcome, Problem> {
        match &self.kind {
            Kind::Server(entry) => {
                entry.put(text).map(Outcome::Text).map_err(|mistake| self.refused(&mistake))
            }
            Kind::Skill => Ok(Outcome::Text(SKILL.to_owned())),
        }
    }

    /// What remove makes of the file.
    pub(super) fn take(&self, text: &str) -> Result<Outcome, Problem> {
        let left = match &self.kind {
            Kind::Server(entry) => entry.take(text).map_err(|mistake| self.refused(&mistake))?,
            Kind::Skill => None,
        };
        Ok(match (left, &self.kind) {
            (Some(text), _) => Outcome::Text(text),
            // The user's link and the file it leads to are not ours to remove.
            (None, Kind::Server(entry)) if self.place.is_link() => Outcome::Text(match entry.format {
                Format::Json => "{}\n".to_owned(),
                Format::Toml => String::new(),
            }),
            (None, _) => Outcome::Gone,
        })
    }

    fn refused(&self, mistake: &Mistake) -> Problem {
        let path = ui::path(&self.place.whole());
        let place = mistake.place.map(|(line, column)| format!(":{line}:{column}")).unwrap_or_default();
        let Kind::Server(entry) = &self.kind else {
            return plain("plugin-file", format!("{path}{place}: {}", mistake.message), None);
        };
        let line = match entry.format {
            Format::Json => {
                format!("\"{NAME}\": {}", serde_json::json!({"command": entry.command, "args": ["mcp"]}))
            }
            Format::Toml => {
                format!("[mcp_servers.{NAME}] with command = {:?} and args = [\"mcp\"]", entry.command)
            }
        };
        let hint = format!("the file was left as it is; mend it, or enter the server by hand: {line}");
        plain("plugin-file", format!("{path}{place}: {}", mistake.message), Some(&hint))
    }
}

/// The files of a plugin in a scope, and where it has to be looked at: a plugin of no agent has none.
pub(super) fn parts(plugin: Plugin, scope: Scope) -> Result<Vec<Part>, Problem> {
    let command = command()?;
    let server = |agent, place, format| Part {
        agent,
        place,
        kind: Kind::Server(Entry { format, command: command.clone() }),
    };
    let skill = |place| Part { agent: CLAUDE, place, kind: Kind::Skill };
    let skill_path = |directory: &str| Path::new(directory).join("skills").join(NAME).join("SKILL.md");
    if scope == Scope::Project {
        let root = project()?;
        let place = |path: PathBuf| Place { root: root.clone(), path, trust: Trust::Project, mode: 0o666 };
        let entry = place(".mcp.json".into());
        return Ok(match plugin {
            Plugin::Claude => {
                vec![server(CLAUDE, entry, Format::Json), skill(place(skill_path(".claude")))]
            }
            Plugin::Mcp => vec![server("any that reads .mcp.json", entry, Format::Json)],
        });
    }
    let home = environment::home_directory()?;
    // Configurations may have other servers' keys in them.
    let place =
        |root: &Path, path: PathBuf| Place { root: root.to_owned(), path, trust: Trust::Home, mode: 0o600 };
    let claude_directory = environment::directory("CLAUDE_CONFIG_DIR");
    let claude_root = claude_directory.as_deref().unwrap_or(&home);
    let claude = server(CLAUDE, place(claude_root, ".claude.json".into()), Format::Json);
    if plugin == Plugin::Claude {
        let path = skill_path(if claude_directory.is_some() { "" } else { ".claude" });
        return Ok(vec![claude, skill(Place { mode: 0o666, ..place(claude_root, path) })]);
    }
    let mut parts = Vec::new();
    if claude_directory.is_some_and(|directory| directory.is_dir())
        || home.join(".claude").is_dir()
        || claude.place.whole().exists()
    {
        parts.push(claude);
    }
    let codex = environment::directory("CODEX_HOME").unwrap_or_else(|| home.join(".codex"));
    for (agent, directory, file, format) in [
        ("Codex", codex, "config.toml", Format::Toml),
        ("Gemini CLI", home.join(".gemini"), "settings.json", Format::Json),
        ("Cursor", home.join(".cursor"), "mcp.json", Format::Json),
    ] {
        if directory.is_dir() {
            parts.push(server(agent, place(&directory, file.into()), format));
        }
    }
    Ok(parts)
}

const CLAUDE: &str = "Claude Code";

/// What starts this program: its name if that is enough, else its path.
fn command() -> Result<String, Problem> {
    let program = environment::program()?;
    let program = program.canonicalize().unwrap_or(program);
    // A relative directory on the PATH means another one wherever the agent is started.
    let found = environment::find(NAME).filter(|found| found.is_absolute());
    if found.and_then(|found| found.canonicalize().ok()).is_some_and(|found| found == program) {
        return Ok(NAME.to_owned());
    }
    program.into_os_string().into_string().map_err(|program| {
        let message = format!("the path of this program is not UTF-8: {}", ui::path(Path::new(&program)));
        plain("program", message, Some("put it on the PATH as agentkernel"))
    })
}

/// The project's root.
fn project() -> Result<PathBuf, Problem> {
    let current = environment::current_directory()?;
    match choose(&current, &environment::home_directory()?, WorkspaceMode::Cow) {
        Choice::Workspace(workspace) => Ok(workspace.root),
        Choice::Unsuitable(reason) => {
            let message = format!("{} is no project: {reason}", ui::path(&current));
            Err(plain("no-project", message, Some("change to a project, or use --global for all of them")))
        }
        Choice::NotWanted => Err(plain("no-project", "there is no project here", None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_skill_is_one_that_claude_code_takes() {
        let (head, body) = SKILL.strip_prefix("---\n").and_then(|text| text.split_once("\n---\n")).unwrap();
        let [name, description] = head.lines().collect::<Vec<_>>()[..] else { panic!("{head}") };
        // The name is that of its directory; a value with `: ` in it would need quotes.
        assert_eq!(name, format!("name: {NAME}"));
        let description = description.strip_prefix("description: ").unwrap();
        assert!(description.len() <= 1024 && !description.contains(": ") && !description.contains(" #"));
        assert!(body.lines().count() < 500 && body.contains("`sandbox_run`"));
    }
}
