//! PID 1 and agent inside a machine.
//!
//! ```text
//! boot ─► port ─► greeting ─► streams ─┬─► file systems   FUSE requests relayed to the host
//!                                      ├─► configure      root file system, mounts, identity; once
//!                                      ├─► exec           programs, each in a cgroup of its own
//!                                      ├─► changes        upper layers listed
//!                                      ├─► copies         trees sent and received
//!                                      └─► shutdown
//! ```
//! One thread drives the port and all streams. INVARIANT: that thread never touches a path that may lie on a served file
//! system, for its own relay would have to answer. Whatever does, runs on other threads ([`tokio::task::spawn_blocking`]).
//!
//! If this process dies the kernel panics and the machine ends: nothing of the host or of guest programs may panic it.
#![deny(unsafe_code)]

mod agent;
mod boot;
mod configure;
mod copy;
mod exec;
mod file;
mod fuse;
mod layers;
mod network;
mod port;
mod shutdown;
mod system;
mod tree;
mod trust;
mod user;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        boot::log("this program is PID 1 of agentkernel's machines and does nothing elsewhere");
        return ExitCode::from(2);
    }
    let Err(error) = boot::boot().and_then(agent::run);
    boot::log(&format!("the agent cannot go on: {error}"));
    shutdown::end_machine();
    // Only if the kernel refuses to restart: then PID 1 must end, which panics it, which ends the machine.
    ExitCode::FAILURE
}
