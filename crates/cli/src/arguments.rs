//! The words people type. A flag that stands here acts; what does not work yet does not stand here.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

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
  agentkernel run --apply -- cargo fmt         take them at once if the command succeeds
  agentkernel run --workspace none -- uname -a run something that needs no project
  agentkernel doctor                           what this machine can do, and what would help";

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    Run(RunArguments),
    Apply(ApplyArguments),
    Setup(SetupArguments),
    Doctor(DoctorArguments),
    Benchmark(BenchmarkArguments),
    Completions(CompletionsArguments),
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
    /// Set a variable in the command's environment; without a value, take this shell's.
    #[arg(short, long, value_name = "K[=V]")]
    pub env: Vec<OsString>,
    /// Start in this directory of the guest.
    #[arg(short, long, value_name = "DIRECTORY")]
    pub workdir: Option<PathBuf>,
    /// Run as this user: a name or id of the guest, with an optional group.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Kill the command and all it started after this time, such as 30, 90s, 5m, 1h.
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub timeout: Option<Duration>,
    /// Give the command a terminal even if this is not one.
    #[arg(short, long)]
    pub tty: bool,
    /// If the command succeeds, write its changes to the workspace.
    #[arg(long)]
    pub apply: bool,
    /// Print one JSON object with output, exit code and changes instead of streaming.
    #[arg(long, conflicts_with = "tty")]
    pub json: bool,
    /// Say nothing but errors on stderr.
    #[arg(short, long)]
    pub quiet: bool,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

const RUN_EXAMPLES: &str = "\
Examples:
  agentkernel run -- python3 -c 'print(1)'
  agentkernel run --memory 4G --vcpus 4 --timeout 10m -- make -j4
  git diff | agentkernel run -- wc -l
  agentkernel run --image ./python-image.tar -- python3 --version
  agentkernel run --json -- ls | jq .exit_code";

/// What the machine is made of.
#[derive(Debug, Args)]
pub(crate) struct SandboxArguments {
    /// Root file system: `host` (this machine's own toolchain, read-only), or an OCI layout directory or archive,
    /// with :TAG if it holds several images.
    #[arg(short, long, value_name = "IMAGE")]
    pub image: Option<String>,
    /// Name of the sandbox, also the guest's host name.
    #[arg(short, long)]
    pub name: Option<String>,
    /// What becomes of the project: a copy of which changes are kept apart, the real thing, read-only, or nothing.
    #[arg(long, value_name = "MODE", default_value = "cow")]
    pub workspace: WorkspaceMode,
    /// What the sandbox may reach.
    #[arg(long, value_name = "MODE", default_value = "none")]
    pub network: Network,
    /// The same as --network none.
    #[arg(long, conflicts_with = "network")]
    pub no_network: bool,
    /// Virtual processors [default: the host's, at most 4].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub vcpus: Option<u32>,
    /// Memory, such as 512M or 4G; the host backs only what is used.
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = values::size_mib)]
    pub memory: u64,
    /// Size of the writable layer, sparse on the host.
    #[arg(long, value_name = "SIZE", default_value = "10G", value_parser = values::size_mib)]
    pub disk: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WorkspaceMode {
    Cow,
    Rw,
    Ro,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Network {
    /// Nothing.
    None,
    /// The internet; refused until this version's successor brings it.
    Public,
}

/// Write the changes of the last `run` to its workspace.
///
/// A file that changed on the host meanwhile is a conflict: it is left as it is and listed. Paths that could run code on
/// the host by themselves, such as .git/hooks, are held back unless named one by one.
#[derive(Debug, Args)]
pub(crate) struct ApplyArguments {
    /// The changes of the last `run`.
    #[arg(long, required = true)]
    pub last: bool,
    /// Only these paths, relative to the workspace.
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Say what would be written, write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Find or fetch the guest's kernel and prepare everything sandboxes start from. Needs no root.
#[derive(Debug, Args)]
pub(crate) struct SetupArguments {
    /// Use this kernel (a bzImage or vmlinux, with its modules in lib/modules beside it or in /lib/modules).
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Prepare again even if everything is there.
    #[arg(long)]
    pub force: bool,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Say what this machine offers sandboxes, and what would help.
#[derive(Debug, Args)]
pub(crate) struct DoctorArguments {
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

/// Print a completion script for a shell.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArguments {
    pub shell: clap_complete::Shell,
}
