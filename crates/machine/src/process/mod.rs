//! A machine's process itself, saved while it stands still, and others that go on as that process.
//!
//! An emulator translates the guest's code as it runs, and that is most of the time an emulated machine takes to start: a
//! QEMU that loads a saved machine has translated nothing, and there is no way to hand it a translation. A process that
//! goes on where another stood has everything the other had, translations included.
//!
//! ```text
//! client, while the machine stands still          <program> __jail, every wall around it
//!   ptrace: registers, signals                      maps the saved memory where it was
//!   /proc: memory, mappings, descriptors            makes the descriptors anew, or takes those it is passed
//!        │                                          starts the threads, each with its registers
//!        └────────────> a file ───────────────────> and is that process
//! ```
//! What is saved is the state of one ordinary Linux process that waits: its private memory, its threads, and of its
//! descriptors the kinds an event loop has (`eventfd`, `epoll`, `signalfd`); everything else must be named by whoever saves
//! it and passed by whoever goes on. Memory that is shared, other descriptors, threads that do not rest are errors: the machine
//! then starts the longer way. What QEMU does not use is not looked for: timers, alternate stacks, locked memory. Its heap does
//! not grow at its old end; files that it only reads and nobody names are closed.
//!
//! The file is ours and belongs to one boot of the host (the kernel's code that every process sees must be the same): its
//! owner vouches for it, as for the machine's memory.

mod capture;
mod format;
mod resume;

pub(crate) use capture::capture;
pub(crate) use resume::{Room, resume};

/// The name of what is behind the guest's memory.
pub(crate) const MEMORY: &str = "memory";
