//! The client's side of a live sandbox: starts its supervisor, runs programs in it, finishes it.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use agentkernel_protocol::control::{ControlRequest, Event, LeaseInput};
use agentkernel_protocol::frame::{self, FrameError};
use agentkernel_protocol::message::{Exec, ExecInput, ExecOutput};
use rustix::fs::{Mode, OFlags};
use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::problem::{Problem, io, os, plain, problem};
use crate::spec::Spec;
use crate::state::{HeldSandbox, Home, SandboxDirectory};
use crate::supervisor::CONTROL_SOCKET;

/// Name of the hidden verb that becomes a supervisor.
pub const SUPERVISE_VERB: &str = "__supervise";

/// A live sandbox and its lease: dropping this ends the sandbox.
#[derive(Debug)]
pub struct Lease {
    stream: UnixStream,
    supervisor: Child,
    directory: SandboxDirectory,
}

/// Resident memory, bytes; `None` where the host does not tell.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Of the machine's process: the guest's memory as far as it is backed, and the emulator's own.
    pub machine: Option<u64>,
    /// Of the supervisor.
    pub supervisor: Option<u64>,
}

/// What [`Lease::finish`] brought.
#[derive(Debug)]
pub struct Finished {
    /// Number of changed workspace paths.
    pub changes: u64,
    /// Where the change set lies, if there is one; taken by whoever keeps it before [`Lease::release`].
    pub change_set: Option<PathBuf>,
    /// Why the changes could not be collected.
    pub problem: Option<Problem>,
}

impl Lease {
    /// Makes the sandbox's directory and disk, starts its supervisor, and waits until programs can run.
    ///
    /// # Errors
    /// Whatever kept it from starting; nothing is left of it then.
    pub async fn start(home: &Home, spec: &Spec) -> Result<Self, Problem> {
        let HeldSandbox { directory, lock } = home.create_sandbox(&spec.name)?;
        let prepared = spec.save(&directory).and_then(|()| {
            crate::disk::create(&home.cache(), spec.disk_mib, &directory.path().join(crate::disk::FILE_NAME))
        });
        let spawned = prepared.and_then(|_disk| spawn(&directory, spec, lock));
        let (stream, supervisor) = match spawned {
            Ok(spawned) => spawned,
            Err(problem) => {
                directory.remove();
                return Err(problem);
            }
        };
        let mut lease = Self { stream, supervisor, directory };
        match lease.event().await {
            Ok(Event::Ready) => Ok(lease),
            Ok(Event::Failed(problem)) | Err(problem) => {
                lease.release();
                Err(problem)
            }
            Ok(Event::Finished { .. }) => {
                Err(plain("supervisor", "the supervisor answered out of turn", None))
            }
        }
    }

    /// Runs a program; several may run at once.
    ///
    /// # Errors
    /// If the supervisor cannot be reached.
    pub async fn exec(&self, exec: Exec) -> Result<Execution, Problem> {
        let directory =
            rustix::fs::open(self.directory.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .map_err(os("reach the sandbox"))?;
        // A socket's path holds 107 bytes at most, a state directory's may be longer.
        let socket =
            format!("/proc/self/fd/{}/{CONTROL_SOCKET}", std::os::fd::AsRawFd::as_raw_fd(&directory));
        let stream = UnixStream::connect(socket).await.map_err(io("reach the sandbox's supervisor"))?;
        let (reader, mut writer) = stream.into_split();
        frame::write(&mut writer, &ControlRequest::Exec(Box::new(exec)))
            .await
            .map_err(|error| problem("control", &error, None))?;
        Ok(Execution {
            output: ExecutionOutput { reader: BufReader::with_capacity(64 << 10, reader) },
            input: ExecutionInput { writer },
        })
    }

    /// Says that the work is done and takes the changes.
    ///
    /// # Errors
    /// If the machine or the supervisor died.
    pub async fn finish(&mut self) -> Result<Finished, Problem> {
        if frame::write(&mut self.stream, &LeaseInput::Finish).await.is_err() {
            return Err(self.failure().await);
        }
        match self.event().await? {
            Event::Finished { changes, problem } => {
                let change_set = self.directory.path().join(crate::collect::DIRECTORY);
                let change_set = change_set.is_dir().then_some(change_set);
                Ok(Finished { changes, change_set, problem })
            }
            Event::Failed(problem) => Err(problem),
            Event::Ready => Err(plain("supervisor", "the supervisor answered out of turn", None)),
        }
    }

    /// Why the sandbox died, once an execution's stream broke.
    pub async fn failure(&mut self) -> Problem {
        match tokio::time::timeout(Duration::from_secs(10), self.event()).await {
            Ok(Ok(Event::Failed(problem)) | Err(problem)) => problem,
            Ok(Ok(_)) | Err(_) => plain("execution", "the execution's stream broke", None),
        }
    }

    /// Resident memory of the sandbox's processes on the host.
    pub fn memory(&self) -> Memory {
        let supervisor = self.supervisor.id();
        Memory {
            machine: machine_of(supervisor).and_then(resident_bytes),
            supervisor: resident_bytes(supervisor),
        }
    }

    /// Ends the sandbox and waits until nothing is left of it.
    pub fn release(self) {
        let Self { stream, mut supervisor, directory } = self;
        drop(stream);
        let _ = supervisor.wait();
        // The supervisor removes everything; if it was killed, its machine dies with it and the rest is ours.
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while directory.path().exists() {
            if directory.is_dead() {
                directory.remove();
                return;
            }
            if std::time::Instant::now() > deadline {
                tracing::warn!("{} is still held; a later command removes it", directory.path().display());
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    async fn event(&mut self) -> Result<Event, Problem> {
        match frame::read(&mut self.stream).await {
            Ok(event) => Ok(event),
            Err(error) if error.is_disconnect() => Err(plain(
                "supervisor-died",
                "the sandbox's supervisor was killed, and the sandbox with it",
                None,
            )),
            Err(error) => Err(problem("control", &error, None)),
        }
    }
}

/// Starts the supervisor with the lease as its standard input and the lock as its standard output.
fn spawn(
    directory: &SandboxDirectory,
    spec: &Spec,
    lock: std::fs::File,
) -> Result<(UnixStream, Child), Problem> {
    let what = "start the sandbox's supervisor";
    let (near, far) = std::os::unix::net::UnixStream::pair().map_err(io(what))?;
    near.set_nonblocking(true).map_err(io(what))?;
    let child = Command::new(&spec.program)
        .arg(SUPERVISE_VERB)
        .arg(directory.path())
        .args(tracing::enabled!(tracing::Level::DEBUG).then_some("--verbose"))
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(far)))
        .stdout(Stdio::from(lock))
        // A group of its own: Ctrl-C at the terminal is for the program in the guest, not for the supervisor.
        .process_group(0)
        .spawn()
        .map_err(io(what))?;
    Ok((UnixStream::from_std(near).map_err(io(what))?, child))
}

/// The process a supervisor's threads have as their only child.
fn machine_of(supervisor: u32) -> Option<u32> {
    let threads = std::fs::read_dir(format!("/proc/{supervisor}/task")).ok()?;
    threads.flatten().find_map(|thread| {
        let children = std::fs::read_to_string(thread.path().join("children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    })
}

fn resident_bytes(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// A running program.
#[derive(Debug)]
pub struct Execution {
    /// What it says.
    pub output: ExecutionOutput,
    /// What it is told; dropping this kills it.
    pub input: ExecutionInput,
}

/// What a running program says.
#[derive(Debug)]
pub struct ExecutionOutput {
    reader: BufReader<OwnedReadHalf>,
}

/// What a running program is told.
#[derive(Debug)]
pub struct ExecutionInput {
    writer: OwnedWriteHalf,
}

impl ExecutionOutput {
    /// The next message; the last one is `Exited` or `Failed`.
    ///
    /// # Errors
    /// If the stream breaks before that.
    pub async fn next(&mut self) -> Result<ExecOutput, FrameError> {
        frame::read(&mut self.reader).await
    }
}

impl ExecutionInput {
    /// Sends input, a signal or a window size.
    ///
    /// # Errors
    /// If the program or the sandbox is gone.
    pub async fn send(&mut self, input: &ExecInput) -> Result<(), FrameError> {
        frame::write(&mut self.writer, input).await
    }
}
