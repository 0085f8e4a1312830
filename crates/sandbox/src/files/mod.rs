//! The file server: the host's side of FUSE.
//!
//! The guest's kernel asks, the agent relays each raw request over a stream, and [`FileServer::handle`] turns it
//! into the reply's bytes. One server serves one [`Export`]: the `host` image or a workspace. The guest is
//! hostile, root included; what an export hides or guards is held here, on the host.
//!
//! ```text
//! request bytes -> abi (parse, bounded) -> server (one operation) -> nodes (id -> path)
//!                                             |                   -> view  (may the guest see it?)
//!                                             |                   -> host  (openat2 beneath the root)
//! reply bytes   <- abi (write)            <---+
//! ```
//!
//! Role: everything the guest reads of the host passes here. Owner: the supervisor, which calls `handle` from
//! several blocking threads. A server starts no threads and keeps nothing on disk.

mod abi;
mod descriptors;
mod export;
mod host;
mod nodes;
mod server;
pub(crate) mod table;
mod toolchains;
mod view;

#[cfg(test)]
mod tests;

pub(crate) use view::host_image::SYSTEM as SYSTEM_DIRECTORIES;

pub use export::{Access, Entry, Export, ExportError, HostImageOptions};
pub use server::FileServer;
pub use toolchains::toolchains_under;
