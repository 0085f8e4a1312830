//! The words people type. A flag that stands here acts; what does not work yet does not stand here.
//!
//! One file, though a long one: it is the contract, read from top to bottom, and next to nothing in it is code.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use agentkernel_sandbox::build::NetworkRule;
use agentkernel_sandbox::client::Warmth;
use agentkernel_sandbox::configuration::Profile;
use agentkernel_sandbox::network::PublishedPort;
use agentkernel_sandbox::values::{Mount, duration, label};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::values;

/// Run AI agents' commands in secure, isolated microVMs.
///
/// Every command gets a virtual machine with its own kernel. It sees this machine's toolchain read-only and the current
/// project copy-on-write: look at what it changed, then apply it or leave it.
#[derive(Debug, Parser)]
#[command(name = "agentkernel", version, max_term_width = 100, arg_required_else_help = true, after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Say more about what happens inside, on stderr.
    #[arg(long, global = true)]
    pub verbose: bool,
    #[command(subcommand)]
    pub command: Verb,
}

const EXAMPLES: &str = "\
Examples:
  agentkernel run -- python3 script.py         run the project's script in a microVM
  agentkernel run -- make test                 its changes are kept apart ...
  agentkernel apply --last                     ... until you take them
  agentkernel create dev                       a sandbox that lives: exec, stop and start as often as you like
  agentkernel exec dev -- npm test             run a command in it
  agentkernel diff dev                         see what was changed in it, and agentkernel apply dev to take it
  agentkernel doctor                           what this machine can do, and what would help";

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    #[command(flatten)]
    Sandbox(SandboxVerb),
    /// The verbs of a sandbox, by the name of the group: `sandbox create` is `create`.
    #[command(name = "sandbox", subcommand)]
    Group(SandboxVerb),
    Build(Box<BuildArguments>),
    #[command(subcommand, visible_alias = "image")]
    Images(ImagesVerb),
    #[command(subcommand)]
    Volume(VolumeVerb),
    Init(InitArguments),
    #[command(subcommand)]
    Plugin(PluginVerb),
    Setup(SetupArguments),
    Doctor(DoctorArguments),
    Benchmark(Box<BenchmarkArguments>),
    Serve(ServeArguments),
    Mcp(McpArguments),
    Completions(CompletionsArguments),
}

#[derive(Debug, Subcommand)]
pub(crate) enum SandboxVerb {
    Run(Box<RunArguments>),
    Create(Box<CreateArguments>),
    Start(StartArguments),
    Stop(StopArguments),
    #[command(visible_alias = "remove")]
    Rm(RemoveArguments),
    #[command(visible_aliases = ["ls", "ps"])]
    List(ListArguments),
    #[command(visible_alias = "inspect")]
    Info(InfoArguments),
    Stats(StatsArguments),
    Exec(Box<ExecArguments>),
    Attach(AttachArguments),
    ExecList(ExecListArguments),
    ExecLogs(ExecLogsArguments),
    ExecKill(ExecKillArguments),
    Logs(LogsArguments),
    Audit(AuditArguments),
    Cp(CopyArguments),
    Diff(DiffArguments),
    Apply(ApplyArguments),
    Extend(ExtendArguments),
    Pause(PauseArguments),
    Resume(PauseArguments),
    Fork(ForkArguments),
    #[command(subcommand)]
    Snapshot(SnapshotVerb),
    Gc(GcArguments),
}

/// Stop a sandbox's processors, or let them go on: nothing is lost, and nothing of it runs meanwhile.
#[derive(Debug, Args)]
pub(crate) struct PauseArguments {
    /// Name or UUID.
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// Make copies of a running sandbox that go on from where it is: memory, processes and disk.
///
/// Each has an identity, randomness and a clock of its own, and shares with the others what none of them changes. What ran
/// in it runs on. The sandbox itself stands still only for a moment.
#[derive(Debug, Args)]
#[command(after_help = FORK_EXAMPLES)]
pub(crate) struct ForkArguments {
    /// Name or UUID of the running sandbox.
    pub name: String,
    /// Name of the copy; with --count, what their names begin with: PREFIX-1, PREFIX-2, ...
    #[arg(long = "as", value_name = "NEW", required = true)]
    pub new: String,
    /// How many copies.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub count: Option<u16>,
    /// Print the copies as JSON.
    #[arg(long)]
    pub json: bool,
    /// Print nothing but the names and errors.
    #[arg(short, long)]
    pub quiet: bool,
}

const FORK_EXAMPLES: &str = "\
Examples:
  agentkernel fork dev --as experiment
  agentkernel fork dev --count 4 --as try        # try-1 ... try-4
  agentkernel exec try-2 -- make test && agentkernel apply try-2";

/// Keep what a sandbox is now, and bring it back.
#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotVerb {
    /// Keep a sandbox as it is: memory, processes and disk if it runs, its disk if it is stopped.
    Take {
        /// Name or UUID of the sandbox.
        sandbox: String,
        /// Name of the snapshot.
        name: String,
        /// Print the snapshot as JSON.
        #[arg(long)]
        json: bool,
    },
    /// List snapshots.
    #[command(visible_alias = "ls")]
    List {
        /// Print as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Bring a snapshot back: in place, giving up what the sandbox is now, or as another sandbox.
    #[command(after_help = "\
Examples:
  agentkernel snapshot take dev before
  agentkernel snapshot restore before            # dev is as it was
  agentkernel snapshot restore before --as other # and another one like it")]
    Restore {
        /// Name of the snapshot.
        name: String,
        /// Make a sandbox of this name instead.
        #[arg(long = "as", value_name = "NEW")]
        new: Option<String>,
        /// Leave memory and processes out: the sandbox is stopped, with the snapshot's disk.
        #[arg(long)]
        disk_only: bool,
        /// Print the sandbox as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Remove snapshots.
    #[command(visible_alias = "remove")]
    Rm {
        /// Names of the snapshots.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

/// Run a command in a temporary sandbox and remove it.
///
/// Exits with the command's own code; 124 if --timeout ended it, 125 if agentkernel itself failed, 126 if the command
/// cannot be executed, 127 if it does not exist, 128+N if signal N killed it.
#[derive(Debug, Args)]
#[command(after_help = RUN_EXAMPLES)]
pub(crate) struct RunArguments {
    #[command(flatten)]
    pub sandbox: SandboxArguments,
    #[command(flatten)]
    pub how: HowArguments,
    /// If the command succeeds, write its changes to the workspace.
    #[arg(long, conflicts_with = "keep")]
    pub apply: bool,
    /// Leave the sandbox running under its name.
    #[arg(short, long)]
    pub keep: bool,
    /// Say nothing but errors on stderr.
    #[arg(short, long)]
    pub quiet: bool,
    /// The command and its arguments; without one, what the image runs by itself.
    #[arg(required_unless_present = "image", trailing_var_arg = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// How one command runs.
#[derive(Debug, Args)]
pub(crate) struct HowArguments {
    /// Kill the command and all it started after this time, such as 30, 90s, 5m, 1h.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// Give the command a terminal even if this is not one.
    #[arg(short, long)]
    pub tty: bool,
    /// Print one JSON object with output and exit code instead of streaming.
    #[arg(long, conflicts_with = "tty")]
    pub json: bool,
}

const RUN_EXAMPLES: &str = "\
Examples:
  agentkernel run -- python3 -c 'print(1)'
  agentkernel run --memory 4G --vcpus 4 --timeout 10m -- make -j4
  git diff | agentkernel run -- wc -l
  agentkernel run --image ./python-image.tar -- python3 --version
  agentkernel run --no-network --allow '*.example.com:443' -- make fetch
  agentkernel run --json -- ls | jq .exit_code";

/// What the machine is made of, and what its commands find in it.
///
/// A flag beats agentkernel.toml, which beats the profile.
#[derive(Debug, Default, Args)]
pub(crate) struct SandboxArguments {
    /// Root file system: `host` (this machine's own toolchain, read-only), the name of an image (pulled
    /// if it is not here), or an OCI layout directory or archive, with :TAG if it holds several images.
    #[arg(short, long, value_name = "IMAGE", allow_hyphen_values = true)]
    pub image: Option<String>,
    /// How much the sandbox is trusted: permissive, moderate or restrictive [default: moderate].
    #[arg(short, long, value_name = "PROFILE", value_parser = values::profile)]
    pub profile: Option<Profile>,
    /// What becomes of the project: a copy of which changes are kept apart (cow), the real thing (rw), read-only (ro),
    /// or nothing (none) [default: cow].
    #[arg(long, value_name = "MODE")]
    pub workspace: Option<WorkspaceMode>,
    /// What the sandbox may reach [default: public].
    #[arg(long, value_name = "MODE")]
    pub network: Option<Network>,
    /// The same as --network none.
    #[arg(long, conflicts_with = "network")]
    pub no_network: bool,
    /// Let the sandbox reach this: NAME, *.NAME, an address or a range, each with :PORT and /udp if wanted. With --network
    /// none nothing else is reached. What is private is reached only if its address is allowed, never by its name.
    #[arg(long, value_name = "RULE")]
    pub allow: Vec<NetworkRule>,
    /// Keep the sandbox from reaching this, whatever is allowed.
    #[arg(long, value_name = "RULE")]
    pub deny: Vec<NetworkRule>,
    /// Open a port of this machine that leads to one of the sandbox's; on 127.0.0.1 unless another address is given, and 0
    /// picks a free one.
    #[arg(short = 'P', long, value_name = "[BIND:]HOST:GUEST[/udp]")]
    pub publish: Vec<PublishedPort>,
    /// Set a variable for every command; without a value, take this shell's.
    #[arg(short, long, value_name = "K[=V]")]
    pub env: Vec<OsString>,
    /// Set the variables of a file: K=V lines, # for comments.
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Start commands in this directory of the guest.
    #[arg(short, long, value_name = "DIRECTORY")]
    pub workdir: Option<PathBuf>,
    /// Run commands as this user: a name or id of the guest, with an optional group.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Mount a directory of this machine, or a named volume, at a path of the guest.
    #[arg(short, long, value_name = "SOURCE:TARGET[:ro]")]
    pub volume: Vec<Mount>,
    /// Virtual processors [default: the host's, at most 4].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub vcpus: Option<u32>,
    /// Memory, such as 512M or 4G; the host backs only what is used [default: 2G].
    #[arg(long, value_name = "SIZE", value_parser = values::size_mib)]
    pub memory: Option<u64>,
    /// Size of the writable layer, sparse on the host [default: 10G].
    #[arg(long, value_name = "SIZE", value_parser = values::size_mib)]
    pub disk: Option<u64>,
    /// Remove the sandbox with all that is in it after this time, such as 30m or 1d.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub ttl: Option<Duration>,
    /// A word of your own, to find the sandbox by.
    #[arg(short, long, value_name = "K=V", value_parser = label)]
    pub label: Vec<(String, String)>,
    /// Configuration to use instead of the project's agentkernel.toml.
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name of the sandbox, also the guest's host name.
    #[arg(short, long)]
    pub name: Option<String>,
    /// Boot the machine instead of going on from a template of one.
    #[arg(long)]
    pub cold: bool,
}

impl SandboxArguments {
    /// How the sandbox is started.
    pub(crate) fn warmth(&self) -> Warmth {
        if self.cold { Warmth::Cold } else { Warmth::Warm }
    }
}

/// Make a sandbox that lives until it is removed, and start it.
///
/// It keeps its writable layer and every setting over stop and start.
#[derive(Debug, Args)]
#[command(after_help = CREATE_EXAMPLES)]
pub(crate) struct CreateArguments {
    /// Name of the sandbox.
    #[arg(value_name = "NAME")]
    pub sandbox_name: Option<String>,
    #[command(flatten)]
    pub sandbox: SandboxArguments,
    /// Only make it: agentkernel start does the rest.
    #[arg(long)]
    pub no_start: bool,
    /// Print what was made as JSON.
    #[arg(long)]
    pub json: bool,
    /// Print nothing but the name and errors.
    #[arg(short, long)]
    pub quiet: bool,
}

const CREATE_EXAMPLES: &str = "\
Examples:
  agentkernel create dev
  agentkernel create ci --profile restrictive --memory 1G --ttl 2h --label job=42
  agentkernel create web -P 8080:80
  agentkernel create data -v ~/datasets:/data:ro -v cache:/var/cache/app
  agentkernel create tools --image ./tools.tar --no-start";

/// Start a stopped sandbox, with the settings it was created with.
#[derive(Debug, Args)]
pub(crate) struct StartArguments {
    /// Name or UUID.
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// Stop a sandbox. What is in it stays.
#[derive(Debug, Args)]
pub(crate) struct StopArguments {
    /// Name or UUID.
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Time between asking the programs to end and killing them.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub grace: Duration,
    /// End it as if the power was cut; what was not written back is lost.
    #[arg(long)]
    pub force: bool,
}

/// Remove sandboxes with all that is in them.
#[derive(Debug, Args)]
pub(crate) struct RemoveArguments {
    /// Name or UUID.
    #[arg(required_unless_present = "all", value_name = "NAME")]
    pub names: Vec<String>,
    /// Also if it runs.
    #[arg(short, long)]
    pub force: bool,
    /// All sandboxes.
    #[arg(long, conflicts_with = "names")]
    pub all: bool,
}

/// List sandboxes.
#[derive(Debug, Args)]
pub(crate) struct ListArguments {
    /// Only those with this label.
    #[arg(short, long, value_name = "K[=V]")]
    pub label: Vec<String>,
    /// Print names only.
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Show everything about a sandbox.
#[derive(Debug, Args)]
pub(crate) struct InfoArguments {
    /// Name or UUID.
    pub name: String,
    /// Print as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Show what sandboxes take from this machine now.
#[derive(Debug, Args)]
pub(crate) struct StatsArguments {
    /// Name or UUID [default: all that run].
    pub name: Option<String>,
    /// Print as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Run a command in a running sandbox.
///
/// Exits as `run` does. With --detach it runs on without this terminal: exec-list, exec-logs and exec-kill see to it.
#[derive(Debug, Args)]
#[command(after_help = EXEC_EXAMPLES)]
pub(crate) struct ExecArguments {
    /// Set a variable for the command; without a value, take this shell's.
    #[arg(short, long, value_name = "K[=V]")]
    pub env: Vec<OsString>,
    /// Set the variables of a file: K=V lines, # for comments.
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Start in this directory of the guest.
    #[arg(short, long, value_name = "DIRECTORY")]
    pub workdir: Option<PathBuf>,
    /// Run as this user: a name or id of the guest, with an optional group.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Let the command run on by itself and print its id.
    #[arg(short, long)]
    pub detach: bool,
    #[command(flatten)]
    pub how: HowArguments,
    /// Say nothing but errors on stderr.
    #[arg(short, long)]
    pub quiet: bool,
    /// Name or UUID.
    pub name: String,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

const EXEC_EXAMPLES: &str = "\
Examples:
  agentkernel exec dev -- npm test
  agentkernel exec dev -w /tmp -e DEBUG=1 -- ./script.sh
  id=$(agentkernel exec -d dev -- npm start); agentkernel exec-logs --follow $id";

/// Open a shell in a running sandbox, or return to the one that was left.
///
/// The detach keys leave it running; end it with exit.
#[derive(Debug, Args)]
pub(crate) struct AttachArguments {
    /// Name or UUID.
    pub name: String,
    /// The detached command to attach to, one with a terminal [default: the latest, else a new shell].
    #[arg(long, value_name = "ID", conflicts_with = "new")]
    pub id: Option<String>,
    /// Open a new shell in any case.
    #[arg(long)]
    pub new: bool,
    /// Keys that let go of the command without ending it.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", value_parser = values::keys)]
    pub detach_keys: values::Keys,
}

/// List detached commands.
#[derive(Debug, Args)]
pub(crate) struct ExecListArguments {
    /// Name or UUID of a sandbox [default: all].
    pub name: Option<String>,
    /// Print as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Print what a detached command said; the newest 8 MiB at least are kept.
#[derive(Debug, Args)]
pub(crate) struct ExecLogsArguments {
    /// The command's id, or its beginning.
    pub id: String,
    /// Go on until the command ends; exit with its code.
    #[arg(short, long)]
    pub follow: bool,
}

/// End a detached command with all it started.
#[derive(Debug, Args)]
pub(crate) struct ExecKillArguments {
    /// The command's id, or its beginning.
    pub id: String,
    /// Send this signal to it instead, by name or number.
    #[arg(short, long, value_parser = values::signal)]
    pub signal: Option<i32>,
}

/// Show what a sandbox's network decided: what was reached, what was refused and why, by which rule.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  agentkernel audit dev
  agentkernel audit dev --refused
  agentkernel audit dev --json | jq -r 'select(.verdict == \"refused\") | .allow'")]
pub(crate) struct AuditArguments {
    /// Name or UUID.
    pub name: String,
    /// Only what was refused.
    #[arg(long)]
    pub refused: bool,
    /// Go on until interrupted.
    #[arg(short, long)]
    pub follow: bool,
    /// Print one JSON object a line.
    #[arg(long)]
    pub json: bool,
}

/// Show a sandbox's own record: its lifecycle, its console, and what its network refused.
#[derive(Debug, Args)]
pub(crate) struct LogsArguments {
    /// Name or UUID.
    pub name: String,
    /// Go on until interrupted.
    #[arg(short, long)]
    pub follow: bool,
    /// Print one JSON object a line.
    #[arg(long)]
    pub json: bool,
}

/// Copy files and directories between this machine and a running sandbox.
///
/// One of the two is NAME:PATH. `-` stands for a tar archive on the standard streams. Links are copied, not followed.
#[derive(Debug, Args)]
#[command(after_help = COPY_EXAMPLES)]
pub(crate) struct CopyArguments {
    /// PATH, NAME:PATH, or - for a tar archive on stdin.
    pub source: OsString,
    /// PATH, NAME:PATH, or - for a tar archive on stdout.
    pub target: OsString,
    /// Say nothing but errors.
    #[arg(short, long)]
    pub quiet: bool,
}

const COPY_EXAMPLES: &str = "\
Examples:
  agentkernel cp model.bin dev:/opt/model.bin
  agentkernel cp dev:/var/log ./logs
  tar c src | agentkernel cp - dev:/srv
  agentkernel cp dev:/srv - | tar t";

/// Show what a sandbox's commands changed in its workspace, as a unified diff.
#[derive(Debug, Args)]
#[command(
    override_usage = "agentkernel diff [OPTIONS] NAME [PATH]...\n       agentkernel diff [OPTIONS] --last [PATH]..."
)]
pub(crate) struct DiffArguments {
    /// Name or UUID of a sandbox.
    #[arg(required_unless_present = "last")]
    pub name: Option<String>,
    /// Only these paths, relative to the workspace.
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// The changes of the last `run` instead of a sandbox's.
    #[arg(long)]
    pub last: bool,
    /// Not these paths.
    #[arg(long, value_name = "PATH")]
    pub exclude: Vec<PathBuf>,
    /// Print how much was changed in each file.
    #[arg(long, conflicts_with_all = ["name_only", "json"])]
    pub stat: bool,
    /// Print only the names of changed paths.
    #[arg(long, conflicts_with = "json")]
    pub name_only: bool,
    /// Print as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Give a sandbox more time to live.
#[derive(Debug, Args)]
pub(crate) struct ExtendArguments {
    /// Name or UUID.
    pub name: String,
    /// So much more, from what is left.
    #[arg(long, value_name = "TIME", value_parser = duration, required_unless_present = "forever")]
    pub by: Option<Duration>,
    /// Let it live until it is removed.
    #[arg(long, conflicts_with = "by")]
    pub forever: bool,
    /// Print the new deadline as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Remove sandboxes whose time is up and what dead processes left behind.
#[derive(Debug, Args)]
pub(crate) struct GcArguments {
    /// Only say what would be removed.
    #[arg(long)]
    pub dry_run: bool,
    /// Print as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Build an image from a Dockerfile. No Docker is needed: each RUN runs in a microVM.
#[derive(Debug, Args)]
#[command(after_help = BUILD_EXAMPLES)]
pub(crate) struct BuildArguments {
    /// Name of the image: lower-case letters, digits, - _ and dots.
    #[arg(short, long, value_name = "NAME", allow_hyphen_values = true)]
    pub tag: String,
    /// The directory that COPY and ADD take from [default: agentkernel.toml's, else the current one].
    pub context: Option<PathBuf>,
    /// The Dockerfile [default: agentkernel.toml's, else Dockerfile in the context].
    #[arg(short = 'f', long = "dockerfile", visible_alias = "file", value_name = "FILE")]
    pub dockerfile: Option<PathBuf>,
    /// Build this stage instead of the last one.
    #[arg(long, value_name = "STAGE")]
    pub target: Option<String>,
    /// Value of an ARG; without one, that of the variable here.
    #[arg(long, value_name = "NAME[=VALUE]")]
    pub build_arg: Vec<String>,
    /// A secret for RUN --mount=type=secret: id=NAME,src=FILE or id=NAME,env=VARIABLE.
    #[arg(long, value_name = "SECRET")]
    pub secret: Vec<String>,
    /// A label of the image.
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = label)]
    pub label: Vec<(String, String)>,
    /// Take nothing from earlier builds.
    #[arg(long)]
    pub no_cache: bool,
    /// What ADD reaches of the network; RUN steps have none [default: public].
    #[arg(long, value_name = "MODE")]
    pub network: Option<Network>,
    /// Let ADD reach this: NAME, *.NAME, an address or a range, each with :PORT and /udp if wanted. With --network none
    /// nothing else is reached. What is private is reached only if its address is allowed, never by its name.
    #[arg(long, value_name = "RULE")]
    pub allow: Vec<NetworkRule>,
    /// Keep ADD from reaching this, whatever is allowed.
    #[arg(long, value_name = "RULE")]
    pub deny: Vec<NetworkRule>,
    /// What builds: agentkernel itself, or Docker if it is installed.
    #[arg(long, value_name = "ENGINE", default_value = "native")]
    pub engine: BuildEngine,
    /// How progress is shown: with every line of every step (plain), or on a terminal briefly (auto).
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub progress: BuildProgress,
    /// Memory of the machine that runs the steps.
    #[arg(long, value_name = "SIZE", value_parser = values::size_mib)]
    pub memory: Option<u64>,
    /// Its virtual processors.
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u32>,
    /// Print the image's record as JSON.
    #[arg(long)]
    pub json: bool,
    /// Say nothing but errors on stderr.
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Network {
    /// Nothing but what --allow names.
    None,
    /// What is public: nothing of this machine, nor of the networks around it.
    Public,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BuildEngine {
    Native,
    Docker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BuildProgress {
    Auto,
    Plain,
}

const BUILD_EXAMPLES: &str = "\
Examples:
  agentkernel build -t my-tools .
  agentkernel run --image my-tools -- make test
  agentkernel build -t my-tools --target test --build-arg VERSION=3 --secret id=token,env=TOKEN .
  agentkernel build -t my-tools --network none --allow '*.example.com:443' .
  agentkernel build -t my-tools --allow 10.0.0.5:8080 .";

/// Keep images: the root file systems that sandboxes are made from.
#[derive(Debug, Subcommand)]
#[command(after_help = IMAGES_EXAMPLES)]
pub(crate) enum ImagesVerb {
    /// List images.
    #[command(visible_alias = "ls")]
    List {
        /// Print the list as JSON.
        #[arg(long)]
        json: bool,
        /// Print names only.
        #[arg(short, long, conflicts_with = "json")]
        quiet: bool,
    },
    /// Bring in the images of an OCI layout directory, an OCI archive, or an archive of `docker save`.
    Load {
        /// The directory or archive, with :TAG to choose one of several images; - reads an archive from stdin.
        #[arg(value_name = "SOURCE")]
        source: String,
        /// Call it so, whatever it calls itself.
        #[arg(short, long, value_name = "NAME", allow_hyphen_values = true)]
        tag: Option<String>,
        /// Print the names as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Fetch images from their registries. A name without a registry is Docker Hub's.
    Pull {
        /// Names of images, such as alpine:3.20 or ghcr.io/me/tools@sha256:...
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        #[command(flatten)]
        registry: RegistryArguments,
    },
    /// Send an image to a registry.
    Push {
        /// Name or id of an image.
        image: String,
        /// Send it under this name instead of its own.
        #[arg(value_name = "NAME")]
        to: Option<String>,
        #[command(flatten)]
        registry: RegistryArguments,
    },
    /// Write images to an OCI archive, which `docker load` reads as well.
    Save {
        /// Names or ids of images.
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
        /// Where to; - is stdout.
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Give an image another name.
    Tag {
        /// Name or id of an image.
        image: String,
        /// The other name.
        name: String,
    },
    /// Show an image, its configuration and who uses it.
    Inspect {
        /// Name or id of an image.
        image: String,
        /// Print all of it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Take names away, and free what nothing needs any more.
    #[command(visible_alias = "remove")]
    Rm {
        /// Names or ids of images.
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
        /// Also one that sandboxes were made from; they keep what they have.
        #[arg(short, long)]
        force: bool,
    },
    /// Forget built images that are gone.
    Sync {
        /// Print the names as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Free what neither a name nor a sandbox needs.
    Prune {
        /// Say what would be freed, free nothing.
        #[arg(long)]
        dry_run: bool,
        /// Print the report as JSON.
        #[arg(long)]
        json: bool,
    },
}

/// How to talk to registries. Credentials are Docker's: ~/.docker/config.json and its helpers.
#[derive(Debug, Args)]
pub(crate) struct RegistryArguments {
    /// Allow a registry without TLS, or with a certificate that cannot be verified. One on this machine may anyway.
    #[arg(long)]
    pub insecure: bool,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
    /// Show no progress.
    #[arg(short, long)]
    pub quiet: bool,
}

const IMAGES_EXAMPLES: &str = "\
Examples:
  docker save my-tools | agentkernel images load -
  agentkernel images load ./layout:3.12 --tag python:3.12
  agentkernel images pull alpine:3.20
  agentkernel run --image my-tools -- make test
  agentkernel images save my-tools -o my-tools.tar";

/// Directories that outlive the sandboxes they are mounted in.
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeVerb {
    /// Make a volume.
    Create {
        /// Its name.
        name: String,
    },
    /// List volumes.
    #[command(visible_alias = "ls")]
    List {
        /// Print as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show a volume, its size and who mounts it.
    #[command(visible_alias = "inspect")]
    Info {
        /// Its name.
        name: String,
        /// Print as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Remove volumes and all that is in them.
    #[command(visible_alias = "remove")]
    Rm {
        /// Their names.
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// Write an agentkernel.toml for this project.
#[derive(Debug, Args)]
pub(crate) struct InitArguments {
    /// Replace one that is there.
    #[arg(long)]
    pub force: bool,
}

/// Make coding agents use sandboxes: enter `agentkernel mcp` into their configurations.
///
/// In the current project, or with --global in your own settings. What else stands in them stays as it is.
#[derive(Debug, Subcommand)]
#[command(after_help = PLUGIN_EXAMPLES)]
pub(crate) enum PluginVerb {
    /// Enter the MCP server, and for Claude Code a skill that says when and how to use it.
    Install(PluginArguments),
    /// List what is installed, here and in your own settings.
    #[command(visible_alias = "ls")]
    List {
        /// Print as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Take away what install has added, and nothing else.
    #[command(visible_alias = "rm")]
    Remove(PluginArguments),
}

#[derive(Debug, Args)]
pub(crate) struct PluginArguments {
    /// For whom.
    pub plugin: Plugin,
    /// In your own settings, for all projects.
    #[arg(long)]
    pub global: bool,
    /// Also replace, or remove, what differs from what install writes.
    #[arg(long)]
    pub force: bool,
    /// Print as a unified diff what would change, write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Print what became of each file as JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Plugin {
    /// Claude Code: the server in .mcp.json (~/.claude.json) and a skill in .claude/skills.
    Claude,
    /// Every client that reads a project's .mcp.json; with --global Claude Code, Codex, Gemini CLI and Cursor, those of
    /// them that are set up here.
    Mcp,
}

const PLUGIN_EXAMPLES: &str = "\
Examples:
  agentkernel plugin install claude              # in this project
  agentkernel plugin install mcp --global        # for every agent set up here
  agentkernel plugin install claude --dry-run    # what would be written
  agentkernel plugin remove claude";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WorkspaceMode {
    Cow,
    Rw,
    Ro,
    None,
}

/// Write a sandbox's changes, or those of the last `run`, to the workspace.
///
/// A file that changed on the host meanwhile is a conflict: it is left as it is and listed. Paths that could run code on
/// the host by themselves, such as .git/hooks, are held back unless named one by one.
#[derive(Debug, Args)]
#[command(
    override_usage = "agentkernel apply [OPTIONS] NAME [PATH]...\n       agentkernel apply [OPTIONS] --last [PATH]..."
)]
pub(crate) struct ApplyArguments {
    /// Name or UUID of a sandbox; with --last, the first path.
    #[arg(required_unless_present = "last")]
    pub name: Option<String>,
    /// The changes of the last `run` instead of a sandbox's.
    #[arg(long)]
    pub last: bool,
    /// Only these paths, relative to the workspace.
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Not these paths.
    #[arg(long, value_name = "PATH")]
    pub exclude: Vec<PathBuf>,
    /// Say what would be written, write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Find or fetch the guest's kernel and prepare everything sandboxes start from. Needs no root.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  agentkernel setup
  agentkernel setup --warm host python:3.12")]
pub(crate) struct SetupArguments {
    /// Use this kernel (a bzImage or vmlinux, with its modules in lib/modules beside it or in /lib/modules).
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Prepare again even if everything is there.
    #[arg(long)]
    pub force: bool,
    /// Make templates of these images as well, so that the first sandbox of each starts as fast as all others: `host`, names
    /// of images (pulled if they are not here), or OCI layouts and archives.
    #[arg(long, value_name = "IMAGE", num_args = 1..)]
    pub warm: Vec<String>,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Say what this machine offers sandboxes, and what would help.
#[derive(Debug, Args)]
pub(crate) struct DoctorArguments {
    /// Start and fork sandboxes, and see that they differ where they must: randomness, identity, clock.
    #[arg(long)]
    pub fork_check: bool,
    /// Print the findings as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Measure this installation: start of a machine, and a command run many times in it.
#[derive(Debug, Args)]
pub(crate) struct BenchmarkArguments {
    #[command(flatten)]
    pub sandbox: SandboxArguments,
    /// How often the command runs in the one machine.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: u32,
    /// Print every figure as JSON.
    #[arg(long)]
    pub json: bool,
    /// The command to run.
    #[arg(trailing_var_arg = true, value_name = "COMMAND", default_value = "true")]
    pub command: Vec<OsString>,
}

/// Commands in temporary sandboxes that may wait for their turn, where nothing is said.
pub(crate) const QUEUE: u16 = 64;
/// Other sandboxes that run before a server's clients can start no more, where nothing is said.
pub(crate) const SANDBOXES: u16 = 256;

/// Serve programs over HTTP: the same sandboxes, for clients of the API.
///
/// Without an API key only this user is served, on loopback and a unix socket, and no page of the web. Ends in order with
/// SIGTERM or SIGINT; sandboxes live on.
#[derive(Debug, Args)]
#[command(after_help = SERVE_EXAMPLES)]
pub(crate) struct ServeArguments {
    /// Address to listen on; one that others reach needs an API key.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: std::net::IpAddr,
    /// Port to listen on; 0 takes a free one, which is printed.
    #[arg(long, value_name = "PORT", default_value_t = 18888)]
    pub port: u16,
    /// Unix socket to listen on, for this user alone [default: serve.sock in the state directory].
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Listen on the unix socket only.
    #[arg(long)]
    pub no_tcp: bool,
    /// Serve whoever sends this key. Others on this machine can read it here: a file keeps it better.
    #[arg(long, value_name = "KEY")]
    pub api_key: Vec<String>,
    /// Serve whoever sends one of the keys in this file, a line each. Without a flag, AGENTKERNEL_API_KEY is taken, then
    /// `[api]` of agentkernel.toml.
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Commands in temporary sandboxes at once [default: four for each processor, at least 8].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub runs: Option<u16>,
    /// Such commands that may wait; the next is answered with 429.
    #[arg(long, value_name = "N", default_value_t = QUEUE)]
    pub queue: u16,
    /// Other sandboxes that run, whoever made them, before clients can start no more.
    #[arg(long, value_name = "N", default_value_t = SANDBOXES)]
    pub sandboxes: u16,
    #[command(flatten)]
    pub grants: GrantArguments,
    /// Say nothing but errors on stderr.
    #[arg(short, long)]
    pub quiet: bool,
}

const SERVE_EXAMPLES: &str = "\
Examples:
  agentkernel serve                                   # http://127.0.0.1:18888, this user only
  curl localhost:18888/run -H content-type:application/json -d '{\"command\": [\"uname\", \"-a\"]}'
  openssl rand -hex 32 > key && agentkernel serve --host 0.0.0.0 --api-key-file key
  curl localhost:18888/openapi.json                   # all routes; docs/api.md shows each";

/// Serve one coding agent over MCP, on standard input and output.
///
/// Agents start it themselves: see `agentkernel plugin install`. Their sandboxes share the project of the directory it is
/// started in.
#[derive(Debug, Args)]
#[command(after_help = MCP_EXAMPLES)]
pub(crate) struct McpArguments {
    #[command(flatten)]
    pub grants: GrantArguments,
}

const MCP_EXAMPLES: &str = "\
Examples:
  claude mcp add agentkernel -- agentkernel mcp
  agentkernel mcp --profile restrictive               # no network and no project for any of its sandboxes";

/// What clients may ask for.
#[derive(Debug, Args)]
pub(crate) struct GrantArguments {
    /// The most a client's sandbox may be trusted: restrictive, moderate or permissive [default: moderate].
    #[arg(short, long, value_name = "PROFILE", value_parser = values::profile)]
    pub profile: Option<Profile>,
    /// Let clients mount directories of this machine, write to the project at once, take images of files, reach private
    /// networks, open ports to others, and ask for profile permissive.
    #[arg(long)]
    pub allow_host_access: bool,
    /// Configuration to use instead of the project's agentkernel.toml.
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Print a completion script for a shell.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArguments {
    pub shell: clap_complete::Shell,
}
