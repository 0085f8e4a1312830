//! The agentkernel engine: what a sandbox is, how one lives, and what the guest may see of the host.
//!
//! ```text
//! client (CLI, later the server)                         supervisor, one process a sandbox
//! launch ─► spec ─► client::Lease ══ lease, control ═══► supervisor ─► machine, file server, change recorder
//!                        │                                    socket
//!                        └─► workspace::LastChanges ─► apply ─► the host's tree
//! ```
//! The library never reads the environment, the terminal or the home directory: callers pass them in.
#![forbid(unsafe_code)]

pub mod build;
pub mod client;
mod collect;
pub mod configuration;
pub mod copy;
pub mod deadline;
mod disk;
pub mod executions;
mod exports;
pub mod files;
pub mod fork;
mod fork_check;
pub mod guest_files;
pub mod images;
pub mod inspect;
pub mod launch;
pub mod lifecycle;
pub mod network;
pub mod options;
mod problem;
pub mod project;
pub mod record;
pub mod review;
mod saved;
pub mod setup;
pub mod snapshots;
pub mod spec;
pub mod state;
pub mod supervisor;
pub mod templates;
mod text;
pub mod trust;
pub mod values;
pub mod volumes;
pub mod workspace;

/// The hidden verb that becomes a machine's process.
pub mod jail {
    pub use agentkernel_machine::jail::{VERB, main};
}

pub use fork_check::{Check, fork_check};
pub use problem::{Problem, io, os, plain, printable, problem};
pub use text::Text;
