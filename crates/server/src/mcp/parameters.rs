//! What tools take. Every field acts; what is not known is refused.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

use crate::model::{
    ApplyRequest, DetachedCommand, Encoding, RestoreRequest, SandboxInfo, SnapshotInfo, Stream,
};

/// A sandbox.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Named {
    /// Name or UUID of the sandbox.
    pub name: String,
}

/// A request of the HTTP API's about a sandbox: what there is in the path is a field here.
#[derive(Debug)]
pub(super) struct Of<T> {
    pub name: String,
    pub request: T,
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Of<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut fields = Map::deserialize(deserializer)?;
        let name = fields.remove("name").ok_or_else(|| D::Error::missing_field("name"))?;
        let name = String::deserialize(name).map_err(D::Error::custom)?;
        let request = T::deserialize(Value::Object(fields)).map_err(D::Error::custom)?;
        Ok(Self { name, request })
    }
}

impl<T: JsonSchema> JsonSchema for Of<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("{}Of", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = T::json_schema(generator);
        let fields = schema.ensure_object();
        let name = json!({ "type": "string", "description": "Name or UUID of the sandbox." });
        let empty = || json!({});
        if let Some(properties) = fields.entry("properties").or_insert_with(empty).as_object_mut() {
            properties.insert("name".to_owned(), name);
        }
        if let Some(required) = fields.entry("required").or_insert_with(|| json!([])).as_array_mut() {
            required.push(json!("name"));
        }
        schema
    }
}

/// A file of a sandbox.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct FilePath {
    /// Name or UUID of the sandbox.
    pub name: String,
    /// Path in the sandbox: absolute, or relative to where commands start (the project).
    pub path: String,
}

/// A file for a sandbox.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct FileWrite {
    /// Name or UUID of the sandbox.
    pub name: String,
    /// Path in the sandbox: absolute, or relative to where commands start (the project). Missing directories are made.
    pub path: String,
    /// Its whole content.
    pub content: String,
    /// How the content is written here: utf8 (the default) or base64.
    #[serde(default)]
    pub encoding: Option<Encoding>,
}

/// A detached command.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Detached {
    /// Name or UUID of the sandbox.
    pub name: String,
    /// Id of the command, as sandbox_exec_detach gave it.
    pub id: String,
}

/// What a detached command said.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DetachedLogs {
    /// Name or UUID of the sandbox.
    pub name: String,
    /// Id of the command, as sandbox_exec_detach gave it.
    pub id: String,
    /// stdout or stderr; both if nothing is said.
    #[serde(default)]
    pub stream: Option<Stream>,
}

/// Whose changes, and which.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Changes {
    /// Name or UUID of the sandbox; without one, the last sandbox_run's changes.
    #[serde(default)]
    pub name: Option<String>,
    /// Only these paths, relative to the project; all if there are none.
    #[serde(default)]
    pub paths: Vec<String>,
}

/// Whose changes are taken, and which.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Apply {
    /// Name or UUID of the sandbox; without one, the last sandbox_run's changes.
    #[serde(default)]
    pub name: Option<String>,
    /// Only these paths, relative to the project; all if there are none. What is held back is
    /// taken if it is named and the server was started with --allow-host-access.
    #[serde(default)]
    pub paths: Vec<String>,
    /// Not these paths.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Write nothing; say what would happen.
    #[serde(default)]
    pub dry_run: bool,
}

impl Apply {
    pub(super) fn split(self) -> (Option<String>, ApplyRequest) {
        (self.name, ApplyRequest { paths: self.paths, exclude: self.exclude, dry_run: self.dry_run })
    }
}

/// A snapshot to be restored.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Restore {
    /// Name of the snapshot.
    pub name: String,
    /// Make another sandbox of this name; without one the sandbox is restored in place, and what it is now is given up.
    #[serde(default, rename = "as")]
    pub as_name: Option<String>,
    /// Leave memory and processes out: the sandbox is stopped then, with the snapshot's disk.
    #[serde(default)]
    pub disk_only: bool,
}

impl Restore {
    pub(super) fn split(self) -> (String, RestoreRequest) {
        (self.name, RestoreRequest { as_name: self.as_name, disk_only: self.disk_only })
    }
}

/// A snapshot.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SnapshotName {
    /// Name of the snapshot.
    pub name: String,
}

/// Nothing.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

/// Sandboxes.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Sandboxes {
    /// All of them.
    pub sandboxes: Vec<SandboxInfo>,
}

/// Snapshots.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Snapshots {
    /// All of them.
    pub snapshots: Vec<SnapshotInfo>,
}

/// Detached commands.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Commands {
    /// All of them, oldest first.
    pub commands: Vec<DetachedCommand>,
}

/// Something that was done.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Done {
    /// What.
    pub done: String,
}
