//! The client's side of a live sandbox: starts its supervisor, talks to it, ends it.
//!
//! ```text
//! create ─► HeldSandbox ─► start ─► Lease ─┬─► finish, release    `run`: the lease's end is the sandbox's
//!                                          └─► live_on            `create`, `start`: it needs nobody any more
//! Home::find ─► SandboxDirectory ─► Sandbox ─► exec, guest, detach, changes, stop ...
//! ```

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use agentkernel_protocol::control::{ControlReply, ControlRequest, Event, LeaseInput, Rebase, Saved};
use agentkernel_protocol::frame::{self, FrameError};
use agentkernel_protocol::message::{Exec, ExecInput, ExecOutput, Request, WindowSize};
use rustix::fs::{Mode, OFlags};
use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::deadline::Deadline;
use crate::problem::{Problem, io, os, plain, problem};
use crate::record::{Record, RecordReader};
use crate::spec::Spec;
use crate::state::{HeldSandbox, Home, Live, Phase, SandboxDirectory, TEMPORARY};
use crate::supervisor::CONTROL_SOCKET;

/// Name of the hidden verb that becomes a supervisor.
pub const SUPERVISE_VERB: &str = "__supervise";
/// Name of the hidden verb that waits for a resting sandbox's deadline.
pub const REAP_VERB: &str = "__reap";

/// How long a supervisor may take to let go of a sandbox once it was told to.
const LET_GO: Duration = Duration::from_secs(20);
/// How long a supervisor may take to answer whether it lives, before it is taken for one that is only slow.
const PING_PATIENCE: Duration = Duration::from_secs(10);

/// What becomes of a sandbox whose maker is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It is removed: `run`.
    Temporary,
    /// It stays: `create`.
    Persistent,
}

/// Makes the sandbox's directory; its disk comes with the first start. It is held by this process and rests; [`start`] makes it live, dropping
/// the lock leaves it stopped.
///
/// # Errors
/// Code `name-taken`, or whatever kept it from being made; nothing is left of it then.
pub fn create(
    home: &Home,
    spec: &Spec,
    life: Life,
    deadline: Option<&Deadline>,
) -> Result<HeldSandbox, Problem> {
    home.create_sandbox(&spec.name, |directory| {
        spec.save(directory)?;
        crate::deadline::write(directory, deadline)?;
        if life == Life::Temporary {
            std::fs::write(directory.join(TEMPORARY), b"").map_err(io("mark the sandbox as temporary"))?;
        }
        if life == Life::Persistent {
            Record::open(directory).say("created", "");
        }
        Ok(())
    })
}

/// How a sandbox is started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Warmth {
    /// Going on from a template, if the sandbox never ran; one is made if there is none.
    #[default]
    Warm,
    /// Booting.
    Cold,
}

/// Starts a sandbox's supervisor and waits until programs can run. `program` is the one with the hidden verbs: ours.
///
/// # Errors
/// Whatever kept it from starting; a temporary sandbox is removed then, another one is stopped.
pub async fn start(held: HeldSandbox, program: &Path, warmth: Warmth) -> Result<Lease, Problem> {
    let disk = held.directory.path().join(crate::disk::FILE_NAME);
    if disk.exists() {
        return launch(held, program).await;
    }
    let begun = match warmth {
        // Boxed, for making one starts a sandbox, too.
        Warmth::Warm => Box::pin(crate::templates::begin(&held.directory, program)).await,
        Warmth::Cold => Ok(None),
    };
    let made = begun.and_then(|template| match template {
        Some(template) => Ok(Some(template)),
        None => {
            let spec = Spec::load(held.directory.path())?;
            crate::disk::create(&held.directory.home().cache(), spec.disk_mib, &disk).map(|_| None)
        }
    });
    match made {
        Ok(template) => {
            let lease = launch(held, program).await;
            if let (Some(template), Err(_)) = (template, &lease) {
                // Whatever it was: the next one begins with another.
                template.discard();
            }
            lease
        }
        Err(problem) => {
            if held.directory.is_temporary() {
                held.remove();
            }
            Err(problem)
        }
    }
}

async fn launch(held: HeldSandbox, program: &Path) -> Result<Lease, Problem> {
    tracing::debug!("the sandbox is made");
    let HeldSandbox { directory, lock } = held;
    let temporary = directory.is_temporary();
    let (stream, supervisor) = match spawn(&directory, program, lock) {
        Ok(spawned) => spawned,
        Err(problem) => {
            directory.repair();
            return Err(problem);
        }
    };
    let mut lease = Lease { stream, supervisor, sandbox: Sandbox { directory }, temporary };
    match lease.event().await {
        Ok(Event::Ready) => Ok(lease),
        Ok(Event::Failed(problem)) | Err(problem) => {
            lease.release();
            Err(problem)
        }
        Ok(Event::Finished { .. }) => Err(out_of_turn()),
    }
}

/// Starts the supervisor with the lease as its standard input and the lock as its standard output.
fn spawn(
    directory: &SandboxDirectory,
    program: &Path,
    lock: std::fs::File,
) -> Result<(UnixStream, Process), Problem> {
    let what = "start the sandbox's supervisor";
    let (near, far) = std::os::unix::net::UnixStream::pair().map_err(io(what))?;
    near.set_nonblocking(true).map_err(io(what))?;
    let verbose = tracing::enabled!(tracing::Level::DEBUG);
    let mut command = Command::new(program);
    command
        .arg(SUPERVISE_VERB)
        .arg(directory.path())
        .args(verbose.then_some("--verbose"))
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(far)))
        .stdout(Stdio::from(lock));
    if !directory.is_temporary() && !verbose {
        // Whoever waits for the end of this process's standard error must not wait for the sandbox.
        command.stderr(Stdio::null());
    }
    let child = Process(Some(command.spawn().map_err(io(what))?));
    Ok((UnixStream::from_std(near).map_err(io(what))?, child))
}

/// Leaves a process that removes the resting sandbox when its time is up, if it has a deadline.
///
/// # Errors
/// If no process can be started.
pub fn watch_deadline(directory: &SandboxDirectory, program: &Path) -> Result<(), Problem> {
    if crate::deadline::read(directory.path()).is_none() {
        return Ok(());
    }
    let command = Command::new(program)
        .arg(REAP_VERB)
        .arg(directory.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let process = command.map(|child| Process(Some(child)));
    process.map(drop).map_err(io("start what waits for the sandbox's deadline"))
}

/// A process of ours that may outlive its owner. The system remembers one that ended until somebody asks; a program that
/// lives long must ask.
#[derive(Debug)]
struct Process(Option<Child>);

/// Processes whose owner is gone.
static OWNERLESS: Mutex<Vec<Child>> = Mutex::new(Vec::new());

impl Process {
    fn id(&self) -> Option<u32> {
        self.0.as_ref().map(Child::id)
    }

    /// Waits until it has ended.
    fn wait(mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.wait();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(child) = self.0.take() {
            let mut ownerless = OWNERLESS.lock().unwrap_or_else(PoisonError::into_inner);
            ownerless.push(child);
        }
    }
}

/// Lets the system forget processes of sandboxes that live on, or lived on, without this one. For programs that live long,
/// now and then.
pub fn reap() {
    let mut ownerless = OWNERLESS.lock().unwrap_or_else(PoisonError::into_inner);
    ownerless.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
}

/// A live sandbox and its lease: dropping this ends the sandbox.
#[derive(Debug)]
pub struct Lease {
    stream: UnixStream,
    supervisor: Process,
    sandbox: Sandbox,
    temporary: bool,
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
    /// The sandbox.
    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
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
                let change_set = self.sandbox.directory.path().join(crate::collect::DIRECTORY);
                let change_set = change_set.is_dir().then_some(change_set);
                Ok(Finished { changes, change_set, problem })
            }
            Event::Failed(problem) => Err(problem),
            Event::Ready => Err(out_of_turn()),
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
        let live = self.sandbox.directory.live();
        Memory {
            machine: live.and_then(|live| live.machine).and_then(resident_bytes),
            supervisor: self.supervisor.id().and_then(resident_bytes),
        }
    }

    /// Lets the sandbox live on without this process.
    ///
    /// # Errors
    /// If the supervisor has died meanwhile.
    pub async fn live_on(mut self) -> Result<Sandbox, Problem> {
        if frame::write(&mut self.stream, &LeaseInput::LiveOn).await.is_err() {
            return Err(self.failure().await);
        }
        match self.event().await? {
            Event::Ready => Ok(self.sandbox),
            Event::Failed(problem) => Err(problem),
            Event::Finished { .. } => Err(out_of_turn()),
        }
    }

    /// Ends the sandbox and waits until nothing of it runs: a temporary one is gone then, another one stopped.
    pub fn release(self) {
        let Self { stream, supervisor, sandbox, temporary } = self;
        drop(stream);
        if temporary {
            // The supervisor of another one may stay to wait for its deadline.
            supervisor.wait();
        }
        // The supervisor tidies up; if it was killed, its machine dies with it and the rest is ours.
        let directory = sandbox.directory;
        let deadline =
            std::time::Instant::now() + if temporary { Duration::from_secs(5) } else { 2 * LET_GO };
        while !directory.is_dead() {
            if std::time::Instant::now() > deadline {
                tracing::warn!("{} is still held; a later command sees to it", directory.path().display());
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        if !temporary || directory.path().exists() {
            directory.repair();
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

fn out_of_turn() -> Problem {
    plain("supervisor", "the supervisor answered out of turn", None)
}

/// Resident memory of a process of the host, bytes.
pub fn resident_bytes(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// A live sandbox that one may talk to.
#[derive(Clone, Debug)]
pub struct Sandbox {
    directory: SandboxDirectory,
}

impl Sandbox {
    /// The live sandbox in `directory`.
    ///
    /// # Errors
    /// Code `not-running` if it does not live; `other-version` if its supervisor speaks another version.
    pub fn open(directory: SandboxDirectory) -> Result<Self, Problem> {
        let name = directory.name();
        if directory.is_dead() {
            return Err(Problem {
                code: "not-running".to_owned(),
                message: format!("{name} is not running"),
                hint: Some(format!("agentkernel start {name}")),
            });
        }
        match directory.live() {
            Some(Live { protocol, program, .. }) if protocol != agentkernel_protocol::VERSION => {
                Err(Problem {
                    code: "other-version".to_owned(),
                    message: format!(
                        "{name} was started by agentkernel {program}, which this one cannot talk to"
                    ),
                    hint: Some(format!("agentkernel stop --force {name}; agentkernel start {name}")),
                })
            }
            _ => Ok(Self { directory }),
        }
    }

    /// Its directory.
    pub fn directory(&self) -> &SandboxDirectory {
        &self.directory
    }

    /// Runs a program; several may run at once.
    ///
    /// # Errors
    /// If the supervisor cannot be reached.
    pub async fn exec(&self, exec: Exec) -> Result<Execution, Problem> {
        Ok(Execution::over(self.guest(Request::Exec(Box::new(exec))).await?))
    }

    /// Opens a stream on which the guest answers `request`: an execution or a copy.
    ///
    /// # Errors
    /// If the supervisor cannot be reached.
    pub async fn guest(&self, request: Request) -> Result<UnixStream, Problem> {
        self.send(&ControlRequest::Guest(Box::new(request))).await
    }

    /// Runs a program that lives on without this process; returns its id.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn detach(&self, exec: Exec, interactive: bool) -> Result<String, Problem> {
        match self.ask(&ControlRequest::Detach { exec: Box::new(exec), interactive }).await? {
            ControlReply::Detached { id } => Ok(id),
            _ => Err(out_of_turn()),
        }
    }

    /// Takes over the streams of a detached program.
    ///
    /// # Errors
    /// If the supervisor cannot be reached. A program that has ended says how at once.
    pub async fn attach(&self, id: &str, size: Option<WindowSize>) -> Result<Execution, Problem> {
        Ok(Execution::over(self.send(&ControlRequest::Attach { id: id.to_owned(), size }).await?))
    }

    /// Sends a signal to a detached program; 0 kills it with all it started.
    ///
    /// # Errors
    /// If it does not run.
    pub async fn signal(&self, id: &str, signal: i32) -> Result<(), Problem> {
        self.done(&ControlRequest::Signal { id: id.to_owned(), signal }).await
    }

    /// Records the workspace's changes in the sandbox's directory; programs stand still meanwhile.
    ///
    /// # Errors
    /// If the workspace is not copy-on-write, or the guest cannot list them.
    pub async fn changes(&self) -> Result<PathBuf, Problem> {
        match self.ask(&ControlRequest::Changes).await? {
            ControlReply::Changes { .. } => Ok(self.directory.path().join(crate::collect::DIRECTORY)),
            _ => Err(out_of_turn()),
        }
    }

    /// Tells the sandbox which versions of its workspace's paths are on the host now.
    ///
    /// # Errors
    /// If the supervisor cannot be reached.
    pub async fn rebase(&self, paths: Vec<Rebase>) -> Result<(), Problem> {
        self.done(&ControlRequest::Rebase(paths)).await
    }

    /// Measures a program on the agent's own stream, without this process in between; nanoseconds.
    ///
    /// # Errors
    /// If the program fails.
    pub async fn measure(&self, exec: Exec, count: u32) -> Result<Vec<u64>, Problem> {
        match self.ask(&ControlRequest::Measure { exec: Box::new(exec), count }).await? {
            ControlReply::Measured(durations) => Ok(durations),
            _ => Err(out_of_turn()),
        }
    }

    /// Ends the programs and the machine in order, and waits until the sandbox is let go.
    ///
    /// # Errors
    /// If it does not let go in time.
    pub async fn stop(&self, grace: Duration) -> Result<(), Problem> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        match self.done(&ControlRequest::Stop { grace_ms }).await {
            Err(problem) if !self.directory.is_dead() => Err(problem),
            // Two that stop it at once: the other's end is ours.
            _ => self.let_go(grace).await,
        }
    }

    async fn let_go(&self, grace: Duration) -> Result<(), Problem> {
        let deadline = tokio::time::Instant::now() + LET_GO + grace;
        while !self.directory.is_dead() {
            if tokio::time::Instant::now() > deadline {
                return Err(Problem {
                    code: "still-held".to_owned(),
                    message: format!("{} does not let go", self.directory.name()),
                    hint: Some(format!("agentkernel stop --force {}", self.directory.name())),
                });
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        self.directory.repair();
        Ok(())
    }

    /// Ends the sandbox as if the power was cut, whatever its supervisor does or speaks.
    ///
    /// # Errors
    /// If its processes cannot be found or do not go.
    pub async fn kill(directory: &SandboxDirectory) -> Result<(), Problem> {
        // The lock is held, so those who hold it live; a supervisor just started says in a moment who it is.
        let mut patience = 500;
        let live = loop {
            match directory.live() {
                Some(live) => break Some(live),
                None if directory.is_dead() => break None,
                None if patience == 0 => {
                    let message =
                        format!("{} is held by a process that does not say which it is", directory.name());
                    return Err(plain("still-held", message, None));
                }
                None => tokio::time::sleep(Duration::from_millis(10)).await,
            }
            patience -= 1;
        };
        // The supervisor first: its death is the machine's.
        let processes = live.map(|live| [Some(live.supervisor), live.machine]).into_iter().flatten();
        for process in processes.flatten() {
            if let Some(pid) = i32::try_from(process).ok().and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        Self { directory: directory.clone() }.let_go(Duration::ZERO).await
    }

    /// Stops its machine's processors, or lets them go on.
    ///
    /// # Errors
    /// If the supervisor cannot be reached or the machine does not obey.
    pub async fn set_paused(&self, paused: bool) -> Result<(), Problem> {
        self.done(&if paused { ControlRequest::Pause } else { ControlRequest::Resume }).await
    }

    /// Stops the machine to be saved. It goes on when what is returned is dropped.
    pub(crate) async fn save(&self) -> Result<Standstill, Problem> {
        let mut stream = self.send(&ControlRequest::Save).await?;
        match frame::read(&mut stream).await {
            Ok(ControlReply::Saved(saved)) => Ok(Standstill { stream, saved: *saved }),
            Ok(ControlReply::Failed(problem)) => Err(problem),
            Ok(_) => Err(out_of_turn()),
            Err(error) if error.is_disconnect() => Err(self.failure().await),
            Err(error) => Err(problem("control", &error, None)),
        }
    }

    /// Whether its supervisor answers. One that was just killed holds its locks until the kernel is done with it.
    pub(crate) async fn is_alive(&self) -> bool {
        let answer = tokio::time::timeout(PING_PATIENCE, self.ask(&ControlRequest::Ping)).await;
        // Whoever is only slow lives.
        answer.is_err() || matches!(answer, Ok(Ok(_)))
    }

    /// Why the sandbox died, once a stream to it broke.
    pub async fn failure(&self) -> Problem {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        while !self.directory.is_dead() && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let name = self.directory.name();
        if !self.directory.is_dead() {
            return plain("execution", format!("the stream to {name} broke"), None);
        }
        let entries = RecordReader::new(self.directory.path()).read().unwrap_or_default();
        let last = entries.iter().rev().find(|entry| entry.event != "console");
        let (code, message) = match last {
            Some(entry) if entry.event == "died" => ("sandbox-died", format!("{name} died: {}", entry.text)),
            Some(entry) if entry.event == "stopped" => {
                ("not-running", format!("{name} was stopped meanwhile"))
            }
            Some(_) => ("sandbox-died", format!("{name}'s supervisor was killed, and its machine with it")),
            None => ("not-found", format!("{name} was removed meanwhile")),
        };
        let hint = last.map(|_| format!("agentkernel start {name} brings it back; agentkernel logs {name}"));
        Problem { code: code.to_owned(), message, hint }
    }

    async fn done(&self, request: &ControlRequest) -> Result<(), Problem> {
        match self.ask(request).await? {
            ControlReply::Done => Ok(()),
            _ => Err(out_of_turn()),
        }
    }

    async fn ask(&self, request: &ControlRequest) -> Result<ControlReply, Problem> {
        let mut stream = self.send(request).await?;
        match frame::read(&mut stream).await {
            Ok(ControlReply::Failed(problem)) => Err(problem),
            Ok(reply) => Ok(reply),
            Err(error) if error.is_disconnect() => Err(self.failure().await),
            Err(error) => Err(problem("control", &error, None)),
        }
    }

    async fn send(&self, request: &ControlRequest) -> Result<UnixStream, Problem> {
        let directory =
            rustix::fs::open(self.directory.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .map_err(os("reach the sandbox"))?;
        // A socket's path holds 107 bytes at most, a state directory's may be longer.
        let socket =
            format!("/proc/self/fd/{}/{CONTROL_SOCKET}", std::os::fd::AsRawFd::as_raw_fd(&directory));
        let mut patience = 500;
        let mut stream = loop {
            match UnixStream::connect(&socket).await {
                Ok(stream) => break stream,
                Err(_) if self.directory.is_dead() => return Err(self.failure().await),
                // It was started a moment ago and has not opened its socket yet.
                Err(_) if self.directory.phase() == Phase::Starting && patience > 0 => {
                    patience -= 1;
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => return Err(io("reach the sandbox's supervisor")(error)),
            }
        };
        frame::write(&mut stream, request).await.map_err(|error| problem("control", &error, None))?;
        Ok(stream)
    }
}

/// A machine that stands still.
#[derive(Debug)]
pub(crate) struct Standstill {
    stream: UnixStream,
    saved: Saved,
}

impl Standstill {
    /// What its devices hold, and which tables can be copied next.
    pub(crate) fn saved(&self) -> Saved {
        self.saved.clone()
    }

    /// Takes the next `length` bytes of what follows.
    pub(crate) async fn copy(&mut self, length: u64, target: &mut std::fs::File) -> Result<(), Problem> {
        if length > crate::files::table::BYTES_LIMIT {
            return Err(plain("save", "the supervisor sends too much of its files", None));
        }
        let mut source = tokio::io::AsyncReadExt::take(&mut self.stream, length);
        let mut target = tokio::fs::File::from_std(target.try_clone().map_err(io("save a machine"))?);
        let copied = tokio::io::copy(&mut source, &mut target).await.map_err(io("save a machine"))?;
        tokio::io::AsyncWriteExt::flush(&mut target).await.map_err(io("save a machine"))?;
        if copied == length { Ok(()) } else { Err(plain("save", "the supervisor broke off", None)) }
    }
}

/// A running program.
#[derive(Debug)]
pub struct Execution {
    /// What it says.
    pub output: ExecutionOutput,
    /// What it is told; dropping this kills it, or lets go of it if it is detached.
    pub input: ExecutionInput,
}

impl Execution {
    fn over(stream: UnixStream) -> Self {
        let (reader, writer) = stream.into_split();
        Self {
            output: ExecutionOutput { reader: BufReader::with_capacity(64 << 10, reader) },
            input: ExecutionInput { writer },
        }
    }
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
