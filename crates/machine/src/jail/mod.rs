//! The second wall: what the machine's process may not do, whatever runs in it.
//!
//! QEMU's own policy does not count emulation as a security boundary, so its process is confined as if it were hostile.
//! The confinement is a verb of our own program ([`VERB`]): it is started by `posix_spawn` with nothing but a socket,
//! receives its orders and descriptors there, gives up everything else, reports which layers hold, and becomes the
//! program it guards.
//!
//! ```text
//! supervisor, thread of the machine            <program> __jail
//!   posix_spawn ─────────────────────────────>   close every descriptor but 0, 1, 2
//!   orders + descriptors ────────────────────>   namespaces, new root, limits, uid, capabilities, landlock, seccomp
//!   layers, or why not  <────────────────────    report
//!   end of file         <────────────────────    exec
//! ```
//! Or it becomes a process that was saved (the crate's module `process`), without executing anything: then no program, no library and
//! no data is to be found in its root, and it can neither execute nor start a process.
//!
//! A layer that a host does not offer is left out and reported; `doctor` shows it. INVARIANT: the thread that starts the
//! process lives as long as it, because a parent-death signal fires when the parent's *thread* ends.

mod enter;
mod filter;
mod message;
mod opening;
mod restrict;
mod root;
mod spawn;

use std::path::Path;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use enter::main;
pub use spawn::{Confinement, Ended, JailConfig, JailError, Jailed, spawn};

/// The name of a saved process among [`JailConfig::resumed`].
pub const IMAGE: &str = "image";

/// The hidden verb under which the program calls [`main`], before it starts any thread.
pub const VERB: &str = "__jail";

/// The first descriptor number the guarded program finds its own at; those in [`JailConfig::descriptors`] follow in order.
pub const FIRST_DESCRIPTOR: i32 = 3;

/// One of the walls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wall {
    /// A user namespace, which is what lets an unprivileged user have the others.
    UserNamespace,
    /// No network interface, not even loopback.
    NetworkNamespace,
    /// No System V or POSIX queues of others.
    IpcNamespace,
    /// A root file system with nothing in it but what the program reads.
    MountNamespace,
    /// A user id that no other process has.
    OwnUid,
    /// No capability, now or later.
    NoCapabilities,
    /// No set-uid program gains anything.
    NoNewPrivileges,
    /// Files, TCP, signals and abstract sockets, as the kernel's landlock can deny them.
    Landlock,
    /// No system call that reaches other processes, makes sockets, or that machines have no use for.
    SystemCalls,
    /// Core files, file sizes, descriptors, processes, address space.
    ResourceLimits,
    /// The process dies with its supervisor.
    ParentDeath,
}

impl Wall {
    /// Its name for users.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::UserNamespace => "user namespace",
            Self::NetworkNamespace => "network namespace",
            Self::IpcNamespace => "ipc namespace",
            Self::MountNamespace => "mount namespace",
            Self::OwnUid => "own uid",
            Self::NoCapabilities => "no capabilities",
            Self::NoNewPrivileges => "no new privileges",
            Self::Landlock => "landlock",
            Self::SystemCalls => "system calls",
            Self::ResourceLimits => "resource limits",
            Self::ParentDeath => "parent death",
        }
    }
}

/// Whether a wall stands on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Which.
    pub wall: Wall,
    /// Whether it stands.
    pub holds: bool,
    /// How far, or why not.
    pub detail: String,
}

/// What the guarded process may use up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The largest file it may make or extend a file to, in bytes.
    pub file_size_bytes: u64,
    /// Its address space, in bytes; `None`: not limited.
    pub address_space_bytes: Option<u64>,
    /// Open descriptors.
    pub open_files: u64,
    /// Processes and threads of its uid; applied only where the uid is its own.
    pub processes: u64,
}

/// An argument of the guarded program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Argument {
    /// As it is.
    Text(String),
    /// A path under which the program can open, for reading, the file that is passed as this entry of
    /// [`JailConfig::descriptors`].
    Reopen(usize),
}

/// What the guarded process is told; the descriptors go beside it.
#[derive(Debug, Serialize, Deserialize)]
struct Orders {
    parent: i32,
    /// `None`: set everything up, report, and end ([`probe`]).
    program: Option<PathBuf>,
    arguments: Vec<Argument>,
    readable: Vec<PathBuf>,
    devices: Vec<PathBuf>,
    /// Paths of the descriptors that are opened again, by descriptor.
    reopened: Vec<(usize, PathBuf)>,
    identity: Option<u32>,
    limits: Limits,
    without: Vec<Wall>,
    /// The first file it opens for reading and writing is answered from outside ([`JailConfig::opened`]).
    asks: bool,
    /// As [`JailConfig::resumed`].
    resumed: Option<Vec<String>>,
}

/// What the guarded process answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Report {
    Layers(Vec<Layer>),
    /// Beside it goes where its open call is to be answered.
    Asks,
    Failed(String),
}

/// Which walls stand on this host: sets a jail up with `launcher` (the program whose verb is [`VERB`]) and ends it.
///
/// # Errors
/// [`JailError`] if not even that can be done.
pub async fn probe(launcher: &Path) -> Result<Vec<Layer>, JailError> {
    let config = JailConfig {
        launcher: launcher.to_owned(),
        program: None,
        arguments: Vec::new(),
        descriptors: Vec::new(),
        readable: Vec::new(),
        devices: vec![PathBuf::from("/dev/null")],
        identity: None,
        limits: Limits { file_size_bytes: 0, address_space_bytes: None, open_files: 64, processes: 16 },
        without: Vec::new(),
        opened: None,
        resumed: None,
        watchers: None,
    };
    Ok(spawn(config).await?.layers().to_vec())
}
