//! The words agentkernel's processes exchange: types, codec, version; nothing else.
//!
//! Two conversations use them:
//! - host and guest, over one ordered byte stream (a virtio-serial port): [`record`] frames the bytes and resets
//!   both sides when a machine was restored, [`mux`] makes many streams of them, [`message`] says what travels on
//!   each stream, cut by [`frame`];
//! - client and supervisor, over a unix socket: [`control`], cut by the same [`frame`].
//!
//! `schema.txt` is the frozen shape of all messages; a test compares it with the types, so that a change of the
//! wire shows up as a diff. The peer is never trusted: every length is bounded before anything is allocated.
#![forbid(unsafe_code)]

pub mod control;
pub mod frame;
pub mod message;
pub mod mux;
pub mod record;

/// Version of the conversation; both sides must have the same.
pub const VERSION: u32 = 4;

/// Name of the agent's port, found by the guest in `/sys/class/virtio-ports/*/name`.
pub const PORT_NAME: &str = "org.agentkernel.agent";
