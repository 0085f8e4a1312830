//! What tools take. Every field acts; what is not known is refused.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::{
    ApplyRequest, DetachedCommand, Encoding, ExecRequest, ForkRequest, RestoreRequest, SandboxInfo,
    SnapshotInfo, StopRequest,
};

/// A sandbox.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Named {
    /// Name or UUID of the sandbox.
    pub name: String,
}

/// A command in a sandbox that runs.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Exec {
    /// Name or UUID of the sandbox.
    pub name: String,
    /// The command and its arguments; ["sh", "-c", "..."] for a shell's line.
    #[schemars(length(min = 1))]
    pub command: Vec<String>,
    /// Variables, K=V.
    #[serde(default)]
    pub env: Vec<String>,
    /// Where it starts: an absolute path of the sandbox's.
    #[serde(default)]
    pub workdir: Option<String>,
    /// Run it as root of the sandbox.
    #[serde(default)]
    pub sudo: Option<bool>,
    /// Run it as this user: a name or id of the sandbox's.
    #[serde(default)]
    pub user: Option<String>,
    /// Kill it and all it started after this time, such as 30s or 5m.
    #[serde(default)]
    pub timeout: Option<String>,
}

impl Exec {
    /// The sandbox, and the request.
    pub(super) fn split(self) -> (String, ExecRequest) {
        let Self { name, command, env, workdir, sudo, user, timeout } = self;
        (name, ExecRequest { command, env, workdir, sudo, user, timeout })
    }
}

/// A sandbox to be stopped.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Stop {
    /// Name or UUID of the sandbox.
    pub name: String,
    /// Time between asking its programs to end and killing them, such as 5s; 10s if nothing is said.
    #[serde(default)]
    pub grace: Option<String>,
    /// End it as if the power was cut.
    #[serde(default)]
    pub force: bool,
}

impl Stop {
    pub(super) fn split(self) -> (String, StopRequest) {
        (self.name, StopRequest { grace: self.grace, force: self.force })
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

/// Text files for a sandbox.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct FilesWrite {
    /// Name or UUID of the sandbox.
    pub name: String,
    /// Whole content by path; paths as for sandbox_file_write.
    pub files: BTreeMap<String, String>,
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
    pub stream: Option<StreamName>,
}

/// A stream of a command.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum StreamName {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
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

/// Copies of a sandbox that runs.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Fork {
    /// Name or UUID of the sandbox.
    pub name: String,
    /// Name of the copy; with a count, what their names begin with: NAME-1, NAME-2 and so on.
    #[serde(rename = "as")]
    pub new_name: String,
    /// How many copies.
    #[serde(default)]
    #[schemars(range(min = 1, max = 256))]
    pub count: Option<u16>,
}

impl Fork {
    pub(super) fn split(self) -> (String, ForkRequest) {
        (self.name, ForkRequest { new_name: self.new_name, count: self.count })
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
