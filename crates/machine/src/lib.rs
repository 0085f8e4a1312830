//! What a sandbox runs on.
//!
//! A driver starts something that runs our guest agent and hands back one ordered byte stream to it ([`Machine`]);
//! whatever is said on that stream is no business of this crate. There is one driver, [`qemu`]. It needs an
//! [`accelerator`], a guest [`kernel`] with an [`initramfs`], and it runs inside a [`jail`]: a hidden verb of our own
//! program that gives up everything the machine does not need and then becomes QEMU. [`findings`] tells a user which of
//! these are in order on a host.
//!
//! ```text
//! supervisor ── qemu::start ──> thread of the machine ── posix_spawn ──> <program> __jail ── exec ──> qemu-system-x86_64
//!      └──── agent stream, QMP, console: socket pairs, handed over as descriptors, so nothing is left in a file system
//! ```
#![deny(unsafe_code)]

pub mod accelerator;
mod atomic;
mod console;
pub mod findings;
pub mod initramfs;
pub mod jail;
pub mod kernel;
mod machine;
pub mod memory;
mod process;
pub mod qemu;

pub use accelerator::Accelerator;
pub use machine::{Capabilities, Exit, ExitReason, Machine, MachineError, Metrics, Work, process_metrics};
