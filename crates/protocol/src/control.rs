//! What a client says to a sandbox's supervisor over its control socket, and what comes back.
//!
//! Whoever starts a supervisor holds its lease, a socket: [`Event`]s come over it, [`LeaseInput`] may be sent, and its
//! end, however it comes, ends the sandbox. On the control socket a client sends one [`ControlRequest`] per connection.
//! An execution then speaks the guest's own
//! [`ExecInput`](crate::message::ExecInput) and [`ExecOutput`](crate::message::ExecOutput): the supervisor relays.

use serde::{Deserialize, Serialize};

use crate::message::Exec;

/// First message of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlRequest {
    /// Run a program.
    Exec(Box<Exec>),
}

/// What the holder of a lease sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaseInput {
    /// The work is done: collect the workspace's changes if it has any, then end the machine.
    Finish,
}

/// What the holder of a lease is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// Programs can run.
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
