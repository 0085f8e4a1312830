//! What a sandbox or a build may reach.
//!
//! [`policy`] decides and does nothing else: it opens no socket, resolves no name and reads no file, so that whoever
//! connects (today the fetcher of `ADD`, which lies in `sandbox`) asks it before every step.
#![forbid(unsafe_code)]

pub mod policy;

pub use policy::floor::Floor;
pub use policy::rule::{InvalidRule, Protocol, Rule};
pub use policy::{Cause, Grounds, Mode, Policy, Refusal};
