//! What every driver offers: a running machine, whatever it runs on.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use serde::Serialize;
use tokio::net::UnixStream;

use crate::jail::Layer;

/// A future of a [`Machine`]'s method; boxed, so that drivers can be told apart at run time.
pub type Work<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A machine that was started. Dropping it ends it.
pub trait Machine: Send + Sync {
    /// What this driver can do.
    fn capabilities(&self) -> Capabilities;

    /// The ordered byte stream to the agent in the guest. Given once; `None` afterwards. Bytes written before the agent
    /// listens are kept for it.
    fn take_stream(&self) -> Option<UnixStream>;

    /// Stops the machine's processors; the guest does not notice.
    fn pause(&self) -> Work<'_, Result<(), MachineError>>;

    /// Lets a paused machine go on.
    fn resume(&self) -> Work<'_, Result<(), MachineError>>;

    /// What the devices of a paused machine hold, in the driver's own words: with a copy of its memory
    /// ([`crate::memory`]) and of its disks it can be restored.
    fn save(&self) -> Work<'_, Result<Vec<u8>, MachineError>>;

    /// Waits until the machine has ended. May be called any number of times, at any time.
    fn wait(&self) -> Work<'_, Exit>;

    /// Waits for the machine to end by itself (the agent was asked to shut it down), then ends it.
    fn stop(&self, deadline: Duration) -> Work<'_, Exit>;

    /// Ends the machine at once, as if its power was cut.
    fn kill(&self);

    /// Process id of the machine on the host.
    fn process(&self) -> u32;

    /// What the machine takes from the host now.
    ///
    /// # Errors
    /// [`MachineError::Ended`] once it has ended.
    fn metrics(&self) -> Result<Metrics, MachineError>;

    /// What the guest's console and the machine's process say about trouble, in a line or two; for a machine that does
    /// not come up in time, or has ended. The words are the guest's and have been stripped of control characters.
    fn explain(&self) -> Option<String>;

    /// What the guest wrote to its console, the middle left out if it was too much.
    fn console(&self) -> Vec<u8>;

    /// Which walls stand around the machine's process.
    fn layers(&self) -> &[Layer];
}

/// What a driver can do; what it cannot is refused early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// [`Machine::pause`] and [`Machine::resume`].
    pub pause: bool,
    /// Saving and restoring memory.
    pub save: bool,
    /// The guest has a kernel of its own.
    pub own_kernel: bool,
    /// Processors are virtualised by hardware rather than emulated.
    pub hardware: bool,
}

/// What a machine takes from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Resident memory of its process, in bytes.
    pub resident_bytes: u64,
    /// Processor time its process has used since it was started.
    pub cpu_time: Duration,
}

/// What the process `pid` takes from the host now; `None` if there is none.
#[must_use]
pub fn process_metrics(pid: u32) -> Option<Metrics> {
    let memory = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = memory.split(' ').nth(1)?.parse().ok()?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold spaces and brackets; the fields after it do not.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Some(Metrics {
        resident_bytes: pages * rustix::param::page_size() as u64,
        cpu_time: Duration::from_millis(ticks * 1000 / per_second),
    })
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// The kind of end.
    pub reason: ExitReason,
    /// What the console or the process said about it, where it is worth saying.
    pub explanation: Option<String>,
}

/// Kinds of end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off or restarted.
    Guest,
    /// The guest's kernel panicked.
    Panic,
    /// It was ended by [`Machine::kill`] or the deadline of [`Machine::stop`].
    Killed,
    /// Its process was killed by something else.
    Signal {
        /// The signal's number.
        signal: i32,
    },
    /// Its process failed.
    Failed {
        /// Its exit code.
        code: i32,
    },
    /// The system did not say.
    Unknown,
}

impl fmt::Display for Exit {
    /// One line, to follow "the machine ended: ".
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason {
            ExitReason::Guest => formatter.write_str("the guest powered off"),
            ExitReason::Panic => formatter.write_str("the guest's kernel panicked"),
            ExitReason::Killed => formatter.write_str("it was ended on request"),
            ExitReason::Signal { signal } => write!(formatter, "its process was killed by signal {signal}"),
            ExitReason::Failed { code } => write!(formatter, "its process failed with exit code {code}"),
            ExitReason::Unknown => formatter.write_str("the system did not say how"),
        }?;
        match &self.explanation {
            Some(words) => write!(formatter, ": {words}"),
            None => Ok(()),
        }
    }
}

/// Why a request to a running machine failed.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// It has ended.
    #[error("the machine has ended")]
    Ended,
    /// It does not answer in time, or not in its protocol.
    #[error("the machine does not answer: {reason}")]
    NoAnswer {
        /// What was expected.
        reason: String,
    },
    /// It refuses.
    #[error("the machine refuses to {action}: {reason}")]
    Refused {
        /// What was asked.
        action: &'static str,
        /// Its words.
        reason: String,
    },
}
