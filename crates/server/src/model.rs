//! What clients ask and are told: the API's contract, in one place for both doors.
//!
//! One file, though a long one: it is read as a whole, and next to nothing in it is code.
//!
//! Requests refuse what they do not know. Names and meanings of fields that the published clients use are theirs.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::de::{Error as _, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

/// How much a sandbox is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// It writes to the project and may read the home directory; only where the server grants that.
    Permissive,
    /// The default: changes to the project are kept apart.
    Moderate,
    /// Neither the project nor a network.
    Restrictive,
}

/// What becomes of the project that the server was started in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Workspace {
    /// Copy-on-write: changes are kept apart until they are applied.
    Cow,
    /// Changes reach the project at once; only where the server grants that.
    Rw,
    /// Changes are refused.
    Ro,
    /// The sandbox does not see it.
    None,
}

/// What a sandbox may reach where no rule says anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// Nothing.
    None,
    /// The internet, without private networks.
    Public,
}

/// Makes a request of its own fields and those by which any sandbox is described.
macro_rules! sandbox_request {
    ($(#[$about:meta])* pub struct $name:ident { $($(#[$field_about:meta])* pub $field:ident: $type:ty,)* }) => {
        $(#[$about])*
        #[derive(Clone, Debug, Default, Deserialize, ToSchema, JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($(#[$field_about])* pub $field: $type,)*
            /// Root file system: `host` (the server's own toolchain, read-only) or the name of an image, which is pulled
            /// if it is not there. Without one, what suits the command or the project.
            #[serde(default)]
            pub image: Option<String>,
            /// How much the sandbox is trusted; moderate, unless the project or the server says otherwise.
            #[serde(default)]
            pub profile: Option<Profile>,
            /// What it runs on: `qemu`, or `automatic` for whatever there is.
            #[serde(default)]
            pub backend: Option<String>,
            /// Virtual processors.
            #[serde(default)]
            #[schemars(range(min = 1, max = 64))]
            #[schema(minimum = 1, maximum = 64)]
            pub vcpus: Option<u32>,
            /// Memory, MiB; backed only as it is used.
            #[serde(default)]
            #[schemars(range(min = 128))]
            #[schema(minimum = 128)]
            pub memory_mb: Option<u64>,
            /// Writable layer, MiB; sparse.
            #[serde(default)]
            #[schemars(range(min = 64))]
            #[schema(minimum = 64)]
            pub disk_mb: Option<u64>,
            /// What becomes of the project that the server was started in; the profile's if nothing is said.
            #[serde(default)]
            pub workspace: Option<Workspace>,
            /// What it may reach where no rule says anything; the profile's if nothing is said.
            #[serde(default)]
            pub network: Option<Network>,
            /// What it may reach: NAME, *.NAME, an address or a range, each with :PORT and /udp if wanted. With network
            /// none it reaches nothing else.
            #[serde(default, deserialize_with = "or_nothing")]
            pub allow: Vec<String>,
            /// What it may not reach, whatever is allowed.
            #[serde(default, deserialize_with = "or_nothing")]
            pub deny: Vec<String>,
            /// Named volumes, `NAME:/path` or `NAME:/path:ro`; directories of the host only where the server grants that.
            #[serde(default, deserialize_with = "or_nothing")]
            pub volumes: Vec<String>,
            /// Variables, `K=V`.
            #[serde(default, deserialize_with = "or_nothing")]
            pub env: Vec<String>,
            /// Where commands start.
            #[serde(default)]
            pub workdir: Option<String>,
            /// Who runs commands: a name or id of the guest, with an optional group.
            #[serde(default)]
            pub user: Option<String>,
            /// Go on from a machine that is booted already, if there is one; else boot one.
            #[serde(default = "yes")]
            pub fast: bool,
        }

        impl $name {
            /// The part by which any sandbox is described.
            pub(crate) fn machine(&self) -> MachineOptions<'_> {
                MachineOptions {
                    image: self.image.as_deref(),
                    profile: self.profile,
                    backend: self.backend.as_deref(),
                    vcpus: self.vcpus,
                    memory_mb: self.memory_mb,
                    disk_mb: self.disk_mb,
                    workspace: self.workspace,
                    network: self.network,
                    allow: &self.allow,
                    deny: &self.deny,
                    volumes: &self.volumes,
                    env: &self.env,
                    workdir: self.workdir.as_deref(),
                    user: self.user.as_deref(),
                }
            }
        }
    };
}

/// What is said; nothing, if a client writes null for what it leaves out.
fn or_nothing<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

fn no_source<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    match Option::<IgnoredAny>::deserialize(deserializer)? {
        None => Ok(()),
        Some(_) => Err(D::Error::custom("source_url and source_ref are not known: clone in the sandbox")),
    }
}

const fn yes() -> bool {
    true
}

/// What [`RunRequest`] and [`CreateRequest`] have in common.
pub(crate) struct MachineOptions<'a> {
    pub image: Option<&'a str>,
    pub profile: Option<Profile>,
    pub backend: Option<&'a str>,
    pub vcpus: Option<u32>,
    pub memory_mb: Option<u64>,
    pub disk_mb: Option<u64>,
    pub workspace: Option<Workspace>,
    pub network: Option<Network>,
    pub allow: &'a [String],
    pub deny: &'a [String],
    pub volumes: &'a [String],
    pub env: &'a [String],
    pub workdir: Option<&'a str>,
    pub user: Option<&'a str>,
}

sandbox_request! {
    /// A command in a temporary sandbox.
    pub struct RunRequest {
        /// The command and its arguments; `["sh", "-c", "..."]` for a shell's line.
        #[schemars(length(min = 1))]
        #[schema(min_items = 1)]
        pub command: Vec<String>,
        /// Kill the command and all it started after this time, such as `30`, `90s`, `5m`, `1h`.
        #[serde(default)]
        pub timeout: Option<String>,
        /// If the command succeeds, write its changes to the project.
        #[serde(default)]
        pub apply: bool,
    }
}

sandbox_request! {
    /// A sandbox that lives until it is removed.
    pub struct CreateRequest {
        /// Its name: ASCII letters, digits, `-` and `_`, 1 to 63 of them, alphanumeric at both ends.
        #[schemars(length(min = 1, max = 63))]
        #[schema(min_length = 1, max_length = 63)]
        pub name: String,
        /// Remove it with all that is in it after this time, such as `30m` or `1d`.
        #[serde(default)]
        pub ttl: Option<String>,
        /// Words of the client's own, to find it by.
        #[serde(default, deserialize_with = "or_nothing")]
        pub labels: BTreeMap<String, String>,
        /// Ports of the host that lead into it: `[BIND:]HOST:GUEST[/udp]`, on 127.0.0.1 unless the server grants another.
        #[serde(default, deserialize_with = "or_nothing")]
        pub ports: Vec<String>,
        /// What clients of 0.18 name even if they want none of it.
        #[serde(default, deserialize_with = "no_source")]
        #[schemars(skip)]
        #[schema(ignore)]
        pub source_url: (),
        /// The same.
        #[serde(default, deserialize_with = "no_source")]
        #[schemars(skip)]
        #[schema(ignore)]
        pub source_ref: (),
    }
}

/// A command in a sandbox that runs.
#[derive(Clone, Debug, Default, Deserialize, ToSchema, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// The command and its arguments; `["sh", "-c", "..."]` for a shell's line.
    #[schemars(length(min = 1))]
    #[schema(min_items = 1)]
    pub command: Vec<String>,
    /// Variables, `K=V`.
    #[serde(default)]
    pub env: Vec<String>,
    /// Where it starts: an absolute path of the sandbox's.
    #[serde(default)]
    pub workdir: Option<String>,
    /// Run it as root of the guest.
    #[serde(default)]
    pub sudo: Option<bool>,
    /// Run it as this user: a name or id of the guest, with an optional group.
    #[serde(default)]
    pub user: Option<String>,
    /// Kill it and all it started after this time, such as `30`, `90s`, `5m`, `1h`.
    #[serde(default)]
    pub timeout: Option<String>,
}

/// What a command said and how it ended.
#[derive(Clone, Debug, Default, Serialize, ToSchema, JsonSchema)]
pub struct RunOutput {
    /// Standard output and standard error as they came.
    pub output: String,
    /// Standard output. What is no UTF-8 is replaced.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// The command's own; 124 if its time was up, 126 if it is not executable, 127 if there is none, 128+N if signal N
    /// killed it.
    pub exit_code: u8,
    /// Bytes of the output that are left out, in its middle.
    pub omitted_bytes: u64,
    /// Its time was up.
    pub timed_out: bool,
    /// The guest ran out of memory while it ran.
    pub out_of_memory: bool,
    /// Why it did not begin.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What it changed in the project, if that is copy-on-write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub changes: Option<Changes>,
    /// What became of the changes, if they were to be applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Object)]
    pub applied: Option<Value>,
    /// What the network refused.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub refusals: Vec<Refusal>,
}

/// How much was changed in the project.
#[derive(Clone, Copy, Debug, Serialize, ToSchema, JsonSchema)]
pub struct Changes {
    /// Files and links that are new.
    pub added: usize,
    /// Files and links that differ.
    pub modified: usize,
    /// Files and links that are gone.
    pub removed: usize,
}

/// Something that the network policy refused.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct Refusal {
    /// What was asked for.
    pub target: String,
    /// Why it was refused.
    pub reason: String,
    /// The rule that would permit it.
    pub allow: Option<String>,
    /// How often.
    pub count: u64,
}

/// What is known of a sandbox.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct SandboxInfo {
    /// Name.
    pub name: String,
    /// UUID version 7.
    pub uuid: String,
    /// Whether programs can run in it.
    pub status: SandboxStatus,
    /// What it runs on.
    pub backend: String,
    /// Its image.
    pub image: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mb: u64,
    /// Writable layer, MiB.
    pub disk_mb: u64,
    /// When it was created, RFC 3339.
    pub created_at: String,
    /// Ports that lead into it, `BIND:HOST:GUEST[/udp]`.
    pub ports: Vec<String>,
    /// Words of the client's own.
    pub labels: BTreeMap<String, String>,
    /// Its profile.
    pub profile: Profile,
    /// Seconds it has left to live; none if it lives until it is removed.
    pub ttl: Option<u64>,
    /// When its time is up, RFC 3339.
    pub expires_at: Option<String>,
    /// What becomes of the project in it.
    pub workspace: Workspace,
    /// What it may reach where no rule says anything.
    pub network: Network,
}

/// Whether programs can run in a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, ToSchema, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SandboxStatus {
    /// They can, or can in a moment.
    Running,
    /// They stand still.
    Paused,
    /// There is no machine; everything else is there.
    Stopped,
}

/// What of a sandbox is changed. What is not named stays.
#[derive(Clone, Debug, Default, Deserialize, ToSchema, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateRequest {
    /// Labels in place of those it has.
    #[serde(default)]
    pub labels: Option<BTreeMap<String, String>>,
    /// Time to live from now on, such as `30m`, or `never`.
    #[serde(default)]
    pub ttl: Option<String>,
}

/// How a sandbox is stopped.
#[derive(Clone, Debug, Default, Deserialize, ToSchema, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// Time between asking its programs to end and killing them; 10s if nothing is said.
    #[serde(default)]
    pub grace: Option<String>,
    /// End it as if the power was cut.
    #[serde(default)]
    pub force: bool,
}

/// Copies of a sandbox that runs.
#[derive(Clone, Debug, Default, Deserialize, ToSchema, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// Name of the copy; with a count, what their names begin with: `NAME-1`, `NAME-2` and so on.
    #[serde(rename = "as")]
    pub new_name: String,
    /// How many copies.
    #[serde(default)]
    #[schemars(range(min = 1, max = 256))]
    #[schema(minimum = 1, maximum = 256)]
    pub count: Option<u16>,
}

/// More time for a sandbox.
#[derive(Clone, Debug, Default, Deserialize, ToSchema, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExtendRequest {
    /// How much more than it has left, such as `30m`; 1h if nothing is said.
    #[serde(default)]
    pub by: Option<String>,
}

/// When a sandbox's time is up.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct Extended {
    /// RFC 3339; none if it lives until it is removed.
    pub expires_at: Option<String>,
}

/// A detached command.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct DetachedCommand {
    /// Its id.
    pub id: String,
    /// Its sandbox.
    pub sandbox: String,
    /// The command and its arguments; `["sh", "-c", "..."]` for a shell's line.
    pub command: Vec<String>,
    /// Its process id in the guest; 0 if it did not begin.
    pub pid: u32,
    /// What became of it.
    pub status: DetachedStatus,
    /// Its exit code, once it has ended.
    pub exit_code: Option<u8>,
    /// When it was started, RFC 3339.
    pub started_at: String,
    /// When it ended, RFC 3339.
    pub ended_at: Option<String>,
    /// What else is to be said about its end.
    pub note: Option<String>,
}

/// What became of a detached command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DetachedStatus {
    /// It runs.
    Running,
    /// It ended by itself, with exit code 0.
    Completed,
    /// It ended otherwise, did not begin, or its sandbox ended under it.
    Failed,
}

/// A stream of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output, or the terminal's.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What a detached command said, as far as it is kept.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct DetachedLogs {
    /// Standard output, or the terminal's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdout: Option<String>,
    /// Standard error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stderr: Option<String>,
}

/// How the content of a file is written in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// As text.
    #[default]
    Utf8,
    /// In base64, with padding.
    Base64,
}

/// A file of a sandbox.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct FileContent {
    /// Its content.
    pub content: String,
    /// How that is written: base64 if it is no text.
    pub encoding: Encoding,
    /// Its size, bytes.
    pub size: usize,
}

/// A file for a sandbox.
#[derive(Clone, Debug, Default, Deserialize, ToSchema, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WriteRequest {
    /// Its content.
    pub content: String,
    /// How that is written.
    #[serde(default)]
    pub encoding: Option<Encoding>,
}

/// Text files for a sandbox.
#[derive(Clone, Debug, Default, Deserialize, ToSchema, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WriteManyRequest {
    /// Whole content by path: absolute, or relative to where commands start (the project).
    pub files: BTreeMap<String, String>,
}

/// How many files were written.
#[derive(Clone, Copy, Debug, Serialize, ToSchema, JsonSchema)]
pub struct Written {
    /// Files.
    pub written: usize,
}

/// Commands that run at once, each in a temporary sandbox of its own.
#[derive(Clone, Debug, Default, Deserialize, ToSchema, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchRequest {
    /// The commands.
    #[schemars(length(min = 1, max = 64))]
    #[schema(min_items = 1, max_items = 64)]
    pub commands: Vec<RunRequest>,
}

/// What became of the commands, in their order.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct BatchOutput {
    /// Of each.
    pub results: Vec<BatchResult>,
}

/// What became of one command of many.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct BatchResult {
    /// Standard output and standard error as they came; none if it could not be run.
    pub output: Option<String>,
    /// Why it could not be run.
    pub error: Option<String>,
    /// Standard output.
    pub stdout: Option<String>,
    /// Standard error.
    pub stderr: Option<String>,
    /// As for a single command.
    pub exit_code: Option<u8>,
}

/// A snapshot.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct SnapshotInfo {
    /// Its name.
    pub name: String,
    /// The sandbox it was taken of.
    pub sandbox: String,
    /// Its name, for clients that look for an image's.
    pub image_tag: String,
    /// What the sandbox ran on.
    pub backend: String,
    /// The sandbox's image.
    pub base_image: Option<String>,
    /// Virtual processors.
    pub vcpus: Option<u32>,
    /// Memory, MiB.
    pub memory_mb: Option<u64>,
    /// When it was taken, RFC 3339.
    pub created_at: String,
    /// Whether it holds memory and processes besides the disk.
    pub memory: bool,
    /// Bytes it takes on the disk.
    pub bytes: u64,
}

/// A snapshot to be taken.
#[derive(Clone, Debug, Default, Deserialize, ToSchema, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The sandbox.
    pub sandbox: String,
    /// Name of the snapshot; one is made up if there is none.
    #[serde(default)]
    pub name: Option<String>,
}

/// How a snapshot is restored.
#[derive(Clone, Debug, Default, Deserialize, ToSchema, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// Make another sandbox of this name; without one the sandbox is restored in place.
    #[serde(default, alias = "as")]
    pub as_name: Option<String>,
    /// Leave memory and processes out.
    #[serde(default)]
    pub disk_only: bool,
}

/// Changes of a project.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct Diff {
    /// Of each changed path.
    #[schema(value_type = Vec<Object>)]
    pub files: Vec<Value>,
    /// What all come to.
    #[schema(value_type = Object)]
    pub summary: Value,
    /// All of them as a unified diff, as far as there is room.
    pub unified: String,
    /// Bytes of the unified diff that are left out.
    pub omitted_bytes: u64,
}

/// Which changes are taken.
#[derive(Clone, Debug, Default, Deserialize, ToSchema, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ApplyRequest {
    /// Only these paths, relative to the project; none: all. What is held back is
    /// taken if it is named and host access is granted.
    #[serde(default)]
    pub paths: Vec<String>,
    /// Not these paths.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Write nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// What became of the changes.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct Applied {
    /// Everything that was asked for is in the project.
    pub complete: bool,
    /// Paths that are now as the sandbox had them.
    pub applied: Vec<String>,
    /// Everything that is to be said, path by path.
    #[schema(value_type = Object)]
    pub report: Value,
}

/// An entry of a sandbox's record.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct LogEntry {
    /// When, RFC 3339.
    pub timestamp: String,
    /// The sandbox.
    pub sandbox: String,
    /// What: created, started, stopped, console, refused and the like.
    pub event: String,
    /// What is to be said about it.
    pub text: String,
}

/// What the server is and does.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct ServerStatus {
    /// Version of agentkernel.
    pub version: String,
    /// Time since the start, seconds.
    pub uptime_seconds: u64,
    /// What sandboxes run on where nothing else is asked for.
    pub backend: String,
    /// How their processors are run.
    pub accelerator: String,
    /// Sandboxes that there are.
    pub sandboxes: usize,
    /// Those of them that run.
    pub running: usize,
    /// Commands in temporary sandboxes, and those that wait for their turn.
    pub runs: usize,
    /// Most of them that may wait.
    pub queue_limit: usize,
    /// Host access is granted to clients.
    pub host_access: bool,
    /// The most a client's sandbox may be trusted.
    pub profile: Profile,
}

/// What a sandbox takes from the host now.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct SandboxStats {
    /// Name.
    pub name: String,
    /// Resident memory of its machine, bytes.
    pub machine_memory_bytes: u64,
    /// The guest's memory, bytes.
    pub memory_limit_bytes: u64,
    /// Resident memory of its supervisor, bytes.
    pub supervisor_memory_bytes: u64,
    /// Processor time since its start, milliseconds.
    pub cpu_ms: u64,
    /// Bytes its writable layer takes.
    pub disk_bytes: u64,
    /// What that may grow to, bytes.
    pub disk_limit_bytes: u64,
    /// Detached commands that run.
    pub detached: usize,
    /// Time since its start, seconds.
    pub uptime_seconds: u64,
}

/// What sandboxes may run on.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct BackendDiscovery {
    /// What is taken where nothing is asked for; none if there is nothing usable.
    pub default_backend: Option<String>,
    /// All of them.
    pub backends: Vec<BackendDescriptor>,
}

/// Something that sandboxes may run on.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct BackendDescriptor {
    /// Its name.
    pub backend: String,
    /// It is part of this server.
    pub configured: bool,
    /// It can be used now.
    pub usable: bool,
    /// Why, or why not.
    pub readiness_reason: String,
    /// What it can do.
    pub capabilities: BackendCapabilities,
}

/// What a backend can do.
#[derive(Clone, Copy, Debug, Serialize, ToSchema, JsonSchema)]
pub struct BackendCapabilities {
    /// Share the project.
    pub mount_cwd: bool,
    /// Share the home directory.
    pub mount_home: bool,
    /// Attach to a terminal.
    pub attach: bool,
    /// Mount directories of the host.
    pub host_volumes: bool,
    /// SSH into a sandbox.
    pub ssh: bool,
    /// Put secrets into requests on the host.
    pub proxy_secret_bindings: bool,
    /// Put secrets into files.
    pub secret_files: bool,
    /// Take snapshots.
    pub snapshots: bool,
    /// Start what was stopped.
    pub resume: bool,
    /// Pause with memory and processes.
    pub full_state_pause_resume: bool,
    /// Fork with memory and processes.
    pub full_state_fork: bool,
    /// Publish ports.
    pub endpoints: bool,
}

/// An image of the local store.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct ImageInfo {
    /// Its name.
    pub name: String,
    /// Digest of its configuration.
    pub id: Option<String>,
    /// Digest of its manifest.
    pub digest: Option<String>,
    /// When its maker says that it was made, RFC 3339.
    pub created: Option<String>,
    /// Bytes of its layers as stored.
    pub size_bytes: u64,
    /// Sandboxes made from it.
    pub used_by: Vec<String>,
    /// Why it cannot be used, if so.
    pub problem: Option<String>,
}

/// What a collection found and put right.
#[derive(Clone, Debug, Serialize, ToSchema, JsonSchema)]
pub struct Garbage {
    /// Sandboxes whose time was up.
    pub expired: Vec<String>,
    /// Temporary sandboxes whose processes died.
    pub abandoned: Vec<String>,
    /// Sandboxes that had died and are stopped now.
    pub repaired: Vec<String>,
    /// Templates that were outdated or beyond the bounds.
    pub templates: usize,
    /// Leftovers of interrupted work.
    pub leftovers: usize,
}

/// An answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Envelope<T> {
    /// Always true.
    pub success: bool,
    /// What was asked for.
    pub data: T,
}

/// Why a request failed.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Failure {
    /// Always false.
    pub success: bool,
    /// What failed and why.
    pub error: String,
    /// A stable word for programs.
    pub code: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// By which the server's log knows the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}
