//! The agentkernel engine.
#![forbid(unsafe_code)]

pub mod workspace;
