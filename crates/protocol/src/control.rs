//! What a client says to a sandbox's supervisor over its control socket, and what comes back.
//!
//! Whoever starts a supervisor holds its lease, a socket: [`Event`]s come over it, [`LeaseInput`] may be sent. Its end,
//! however it comes, ends the sandbox, unless [`LeaseInput::LiveOn`] was sent before.
//!
//! On the control socket a client sends one [`ControlRequest`] per connection:
//!
//! | request | then the client sends | and the supervisor answers |
//! |---|---|---|
//! | [`ControlRequest::Guest`] | what the guest's request wants | what the guest answers: the supervisor relays |
//! | [`ControlRequest::Attach`] | [`ExecInput`](crate::message::ExecInput) | [`ExecOutput`](crate::message::ExecOutput), what was said lately first |
//! | [`ControlRequest::Save`] | nothing; it closes when it has copied what it needs | [`ControlReply::Saved`], then bytes |
//! | any other | nothing | one [`ControlReply`] |
//!
//! A supervisor serves clients of its own [`VERSION`](crate::VERSION) only; it leaves that where they look first.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::message::{Exec, Request, WindowSize};

/// First message of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlRequest {
    /// Relay to the guest: an execution or a copy; others are refused.
    Guest(Box<Request>),
    /// Run a program that lives on without this client; answered by [`ControlReply::Detached`].
    Detach {
        /// The program.
        exec: Box<Exec>,
        /// Keep its standard input open for clients that attach; else it has none.
        interactive: bool,
    },
    /// Take over the standard streams of a detached program. Who had them before is told to let go.
    Attach {
        /// Its id.
        id: String,
        /// Size of the client's terminal, if it has one.
        size: Option<WindowSize>,
    },
    /// Say that it lives.
    Ping,
    /// Send a signal to a detached program.
    Signal {
        /// Its id.
        id: String,
        /// Number of the signal; 0 kills the whole process tree.
        signal: i32,
    },
    /// Stop the machine's processors until [`ControlRequest::Resume`].
    Pause,
    /// Let a paused machine go on.
    Resume,
    /// Save the machine but for its memory and disks, which the client copies while the machine stands still; answered by
    /// [`ControlReply::Saved`]. The machine goes on (unless it was paused) when the client closes the connection.
    Save,
    /// Record the workspace's changes; answered by [`ControlReply::Changes`].
    Changes,
    /// The workspace's paths have these versions on the host now, put there for the guest.
    Rebase(Vec<Rebase>),
    /// Measure one program `count` times on the agent's own stream; answered by [`ControlReply::Measured`].
    Measure {
        /// The program.
        exec: Box<Exec>,
        /// How often.
        count: u32,
    },
    /// End the programs, write back, end the machine. Answered when all that is done.
    Stop {
        /// Time between SIGTERM and SIGKILL, milliseconds.
        grace_ms: u32,
    },
}

/// A path's new version on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rebase {
    /// Relative to the workspace.
    pub path: ByteBuf,
    /// The version; `None`: there is nothing at the path now.
    pub version: Option<HostVersion>,
}

/// Identity and version of a host's file, as far as `lstat` tells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostVersion {
    /// Inode number.
    pub inode: u64,
    /// Type and permission bits (`st_mode`).
    pub mode: u32,
    /// Size, bytes; 0 for directories.
    pub size: u64,
    /// Last modification, nanoseconds since the epoch; 0 for directories.
    pub modified_ns: i128,
    /// Last status change, nanoseconds since the epoch; 0 for directories.
    pub changed_ns: i128,
}

/// The supervisor's single answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlReply {
    /// It is done.
    Done,
    /// It could not be done.
    Failed(Problem),
    /// The program runs.
    Detached {
        /// Id of the program, unique among all sandboxes.
        id: String,
    },
    /// The changes are recorded in the sandbox's directory.
    Changes {
        /// Number of changed paths.
        paths: u64,
    },
    /// Durations in nanoseconds.
    Measured(Vec<u64>),
    /// The machine stands still.
    Saved(Box<Saved>),
}

/// A machine but for its memory and disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Epoch of the agent's conversation; whoever goes on from here begins a higher one.
    pub epoch: u32,
    /// What its devices hold, in the words of whatever runs it.
    pub devices: ByteBuf,
    /// What the file servers know that the guest knows of their files: the file systems' tags, and how many bytes of each
    /// follow on the connection, in this order.
    pub file_systems: Vec<(String, u64)>,
    /// TCP connections that end with it: nobody carries them on in what goes on from here.
    pub connections: Vec<Connection>,
}

/// A TCP connection of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Connection {
    /// The guest's port.
    pub guest_port: u16,
    /// The other end's address.
    pub address: [u8; 4],
    /// The other end's port.
    pub port: u16,
}

/// What the holder of a lease sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaseInput {
    /// The work is done: collect the workspace's changes if it has any, then end the machine.
    Finish,
    /// The sandbox is to live on whatever becomes of this lease; answered by [`Event::Ready`].
    LiveOn,
}

/// What the holder of a lease is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// Programs can run; or, after [`LeaseInput::LiveOn`], the lease has no meaning any more.
    Ready,
    /// The sandbox could not start, or its machine died; nothing follows.
    Failed(Problem),
    /// The machine has ended after [`LeaseInput::Finish`]; nothing follows.
    Finished {
        /// Number of workspace paths changed and kept; 0 if there are none or none were asked for.
        changes: u64,
        /// What went wrong with the collection, if anything.
        problem: Option<Problem>,
    },
}

/// An error that crosses a process boundary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// A stable word for programs, such as `kernel-missing`.
    pub code: String,
    /// What failed and why, lower case, no final period.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}
