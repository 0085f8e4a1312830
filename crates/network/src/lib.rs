//! What a sandbox or a build may reach.
//!
//! [`policy`] decides and does nothing else: it opens no socket, resolves no name and reads no file, so that whoever
//! connects (the fetcher of `ADD`, which lies in `sandbox`, and the network here) asks it before every step.
//! [`Network`] is the network of one machine: Ethernet frames on one side, the host's ordinary sockets on the other.
//! [`audit`] is the record of what it decided.
#![forbid(unsafe_code)]
#![allow(unexpected_cfgs, reason = "cargo-fuzz sets cfg(fuzzing)")]

pub mod audit;
#[cfg(fuzzing)]
pub mod fuzzing;
mod network;
pub mod policy;

pub use network::{
    Confinement, Flow, GUEST, GUEST_HARDWARE_ADDRESS, HOST, HOST_NAME, MTU, Network, PREFIX, Proxy,
    Published, Settings, Upstream,
};
pub use policy::floor::Floor;
pub use policy::rule::{InvalidRule, Protocol, Rule};
pub use policy::{Cause, Grounds, Mode, Policy, Refusal};
