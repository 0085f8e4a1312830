//! The entry of our MCP server in an agent's configuration: put in and taken out, with everything else left as it is
//! written, white space and order included. No files here, only their texts.

use jsonc_parser::ParseOptions;
use jsonc_parser::cst::{CstInputValue, CstRootNode};
use serde_json::{Map, Value};
use toml_edit::{Array, DocumentMut, Item, Table, TableLike};

/// What the server is called in every configuration.
pub(super) const NAME: &str = "agentkernel";
/// What the program is told to be the server.
const ARGUMENTS: [&str; 1] = ["mcp"];

/// How a configuration is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// JSON with an object `mcpServers`: Claude Code's, which others have taken over.
    Json,
    /// TOML with tables `[mcp_servers.NAME]`: Codex's.
    Toml,
}

/// What a configuration has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// No entry of our name.
    Missing,
    /// Our entry.
    Installed,
    /// Our entry, but for where this program is.
    Elsewhere,
    /// Something else under our name.
    Differs,
}

/// Why a configuration is left alone.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mistake {
    /// Line, from 1, and column, where they can be told.
    pub place: Option<(usize, usize)>,
    pub message: String,
}

impl Mistake {
    fn new(place: Option<(usize, usize)>, message: impl Into<String>) -> Self {
        Self { place, message: message.into() }
    }
}

/// Our entry, started by `command`, in configurations of a format.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub format: Format,
    pub command: String,
}

impl Entry {
    /// What `text` has; an empty one has nothing.
    pub(super) fn state(&self, text: &str) -> Result<State, Mistake> {
        let found = match self.format {
            Format::Json => json_entry(&parse_json(text)?)?.map(read_json),
            Format::Toml => toml_entry(&parse_toml(text)?)?.map(read_toml),
        };
        Ok(match found {
            None => State::Missing,
            Some(Some(command)) if command == self.command => State::Installed,
            Some(Some(command)) if is_ours(&command) => State::Elsewhere,
            Some(_) => State::Differs,
        })
    }

    /// The text with our entry, whatever was there under its name.
    pub(super) fn put(&self, text: &str) -> Result<String, Mistake> {
        match self.format {
            Format::Json => self.put_json(text),
            Format::Toml => self.put_toml(text),
        }
    }

    /// The text without the entry, and without the table of servers if nothing else is in it. None if nothing is left.
    pub(super) fn take(&self, text: &str) -> Result<Option<String>, Mistake> {
        match self.format {
            Format::Json => take_json(text),
            Format::Toml => take_toml(text),
        }
    }

    fn put_json(&self, text: &str) -> Result<String, Mistake> {
        let text = if is_blank(text) { "{}\n" } else { text };
        let mut wanted = parse_json(text)?;
        json_entry(&wanted)?;
        let servers = wanted.entry(JSON_TABLE).or_insert_with(|| Value::Object(Map::new()));
        let entry = serde_json::json!({ "command": self.command, "args": ARGUMENTS });
        if let Value::Object(servers) = servers {
            servers.insert(NAME.to_owned(), entry);
        }
        let input = CstInputValue::Object(vec![
            ("command".to_owned(), self.command.as_str().into()),
            ("args".to_owned(), CstInputValue::Array(ARGUMENTS.iter().map(|word| (*word).into()).collect())),
        ]);
        edit_json(text, &wanted, |root| {
            let servers = root.object_value()?.object_value_or_create(JSON_TABLE)?;
            match servers.get(NAME) {
                Some(entry) => entry.set_value(input),
                None => drop(servers.append(NAME, input)),
            }
            Some(())
        })
    }

    fn put_toml(&self, text: &str) -> Result<String, Mistake> {
        let mut document = parse_toml(text)?;
        toml_entry(&document)?;
        let arguments = Item::Value(ARGUMENTS.into_iter().collect::<Array>().into());
        let servers = document.entry(TOML_TABLE).or_insert_with(|| {
            let mut table = Table::new();
            table.set_implicit(true);
            Item::Table(table)
        });
        let within_a_line = servers.is_inline_table();
        let Some(servers) = servers.as_table_like_mut() else {
            return Err(Mistake::new(None, format!("`{TOML_TABLE}` is no table")));
        };
        let mut entry = Table::new();
        entry.insert("command", Item::Value(self.command.as_str().into()));
        entry.insert("args", arguments);
        let entry =
            if within_a_line { Item::Value(entry.into_inline_table().into()) } else { Item::Table(entry) };
        // What was written around one that is replaced goes with it, so that the new one stands where new ones do.
        servers.remove(NAME);
        servers.insert(NAME, entry);
        Ok(document.to_string())
    }
}

/// Whether a command is this program, wherever it is.
fn is_ours(command: &str) -> bool {
    let path = std::path::Path::new(command);
    command == NAME || (path.is_absolute() && path.file_name().is_some_and(|name| name == NAME))
}

fn is_blank(text: &str) -> bool {
    text.chars().all(char::is_whitespace)
}

const JSON_TABLE: &str = "mcpServers";

/// Parses strictly, and no deeper than `serde_json` goes: what follows walks the tree.
fn parse_json(text: &str) -> Result<Map<String, Value>, Mistake> {
    if is_blank(text) {
        return Ok(Map::new());
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Mistake::new(Some((1, 1)), "it is no JSON object")),
        Err(error) => {
            let message = error.to_string();
            // The place is said apart.
            let message = message.split(" at line ").next().unwrap_or_default();
            Err(Mistake::new(Some((error.line(), error.column())), format!("it is no plain JSON: {message}")))
        }
    }
}

fn json_entry(root: &Map<String, Value>) -> Result<Option<&Value>, Mistake> {
    match root.get(JSON_TABLE) {
        None => Ok(None),
        Some(Value::Object(servers)) => Ok(servers.get(NAME)),
        Some(_) => Err(Mistake::new(None, format!("`{JSON_TABLE}` is no object"))),
    }
}

/// The command of an entry that has what ours has and nothing besides.
fn read_json(entry: &Value) -> Option<String> {
    let entry = entry.as_object().filter(|entry| entry.len() == 2)?;
    let arguments = entry.get("args")?.as_array()?;
    let ours = arguments.iter().map(Value::as_str).eq(ARGUMENTS.map(Some));
    entry.get("command")?.as_str().filter(|_| ours).map(str::to_owned)
}

/// Edits the text, and makes sure that it then says what was wanted: a key given twice would have it say something else.
fn edit_json(
    text: &str,
    wanted: &Map<String, Value>,
    edit: impl FnOnce(&CstRootNode) -> Option<()>,
) -> Result<String, Mistake> {
    let strict = ParseOptions {
        allow_comments: false,
        allow_trailing_commas: false,
        allow_loose_object_property_names: false,
        ..ParseOptions::default()
    };
    let root = CstRootNode::parse(text, &strict)
        .map_err(|error| Mistake::new(None, format!("it is no plain JSON: {}", error.kind())))?;
    let edited = edit(&root).map(|()| root.to_string());
    edited
        .filter(|edited| parse_json(edited).is_ok_and(|found| found == *wanted))
        .ok_or_else(|| Mistake::new(None, format!("a key of it, or of its `{JSON_TABLE}`, is given twice")))
}

fn take_json(text: &str) -> Result<Option<String>, Mistake> {
    let mut wanted = parse_json(text)?;
    if json_entry(&wanted)?.is_none() {
        return Ok(Some(text.to_owned()));
    }
    if let Some(Value::Object(servers)) = wanted.get_mut(JSON_TABLE) {
        servers.remove(NAME);
        if servers.is_empty() {
            wanted.remove(JSON_TABLE);
        }
    }
    if wanted.is_empty() {
        return Ok(None);
    }
    let edited = edit_json(text, &wanted, |root| {
        let root = root.object_value()?;
        let servers = root.object_value(JSON_TABLE)?;
        servers.get(NAME)?.remove();
        if servers.properties().is_empty() {
            root.get(JSON_TABLE)?.remove();
        }
        Some(())
    })?;
    Ok(Some(edited))
}

const TOML_TABLE: &str = "mcp_servers";

fn parse_toml(text: &str) -> Result<DocumentMut, Mistake> {
    text.parse().map_err(|error: toml_edit::TomlError| {
        let before = error.span().and_then(|span| text.get(..span.start));
        let place = before.map(|before| {
            let line = 1 + before.matches('\n').count();
            (line, 1 + before.chars().rev().take_while(|character| *character != '\n').count())
        });
        Mistake::new(place, format!("it is no TOML: {}", error.message().replace('\n', " ")))
    })
}

fn toml_entry(document: &DocumentMut) -> Result<Option<&Item>, Mistake> {
    match document.get(TOML_TABLE) {
        None => Ok(None),
        Some(servers) => match servers.as_table_like() {
            Some(servers) => Ok(servers.get(NAME)),
            None => Err(Mistake::new(None, format!("`{TOML_TABLE}` is no table"))),
        },
    }
}

fn read_toml(entry: &Item) -> Option<String> {
    let entry = entry.as_table_like().filter(|entry| entry.iter().count() == 2)?;
    let arguments = entry.get("args")?.as_array()?;
    let ours = arguments.iter().map(toml_edit::Value::as_str).eq(ARGUMENTS.map(Some));
    entry.get("command")?.as_str().filter(|_| ours).map(str::to_owned)
}

fn take_toml(text: &str) -> Result<Option<String>, Mistake> {
    let mut document = parse_toml(text)?;
    if toml_entry(&document)?.is_none() {
        return Ok(Some(text.to_owned()));
    }
    if let Some(servers) = document.get_mut(TOML_TABLE).and_then(Item::as_table_like_mut) {
        servers.remove(NAME);
        if TableLike::is_empty(servers) {
            document.remove(TOML_TABLE);
        }
    }
    let edited = document.to_string();
    Ok(Some(edited).filter(|edited| !is_blank(edited)))
}

#[cfg(test)]
mod tests;
