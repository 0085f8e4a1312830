//! The workspace: the project directory a sandbox sees, and what becomes of its changes.

mod base;

pub use base::{Base, BaseTable};
