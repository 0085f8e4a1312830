//! The program end to end, in real machines, as whoever runs the tests: root or an unprivileged user.
//!
//! Needs QEMU, `mke2fs`, `python3`, `busybox` and a kernel to fetch or find; what is missing fails. Each test has a home
//! of its own, and ends by asserting that no process, socket or directory of it is left.
#![allow(clippy::unwrap_used, missing_docs)]

mod add;
mod api;
mod bad_input;
mod build;
mod clients;
mod executions;
mod faults;
mod forks;
mod host;
mod image;
mod isolation;
mod living;
mod living_faults;
mod mcp;
mod network;
mod plugin;
mod ports;
mod running;
mod snapshots;
mod streams;
mod templates;
mod terminal;
mod trust;
mod workspace;
