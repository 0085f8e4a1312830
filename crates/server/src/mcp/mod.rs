//! The MCP server: tools for agents, over stdio and over HTTP (`/mcp`). Each tool is a call of the engine's, and each has a
//! route of the HTTP API that does the same.

mod parameters;
mod service;
#[cfg(test)]
mod tests;
mod tools;
mod words;

pub use self::service::serve_stdio;
pub(crate) use self::service::{attend, service};
