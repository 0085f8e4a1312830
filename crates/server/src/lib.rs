//! Two doors for programs: the HTTP API and the MCP server. A tool that HTTP lacks does not exist.
//!
//! ```text
//! HTTP request ─► http: guard, limits ─► route ─┐
//!                                               ├─► Engine ─► the same library as the command line's
//! MCP call ─────► mcp: tool ────────────────────┘      └─► Grants: what clients may ask for
//! ```
//! Clients are hostile: what they ask for is checked against what whoever started the server grants, they are told no
//! path of the host, and all that they send and are sent is bounded. The library never reads the environment.
#![forbid(unsafe_code)]
#![allow(unexpected_cfgs, reason = "cargo-fuzz sets cfg(fuzzing)")]

pub mod engine;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod http;
pub mod mcp;
pub mod model;
mod problem;
