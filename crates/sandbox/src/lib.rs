//! The agentkernel engine.
#![forbid(unsafe_code)]

pub mod files;
pub mod workspace;
