//! Programs: each has a stream to the host, a cgroup of its own, and an end that is always reported.
//!
//! ```text
//! host ══ stream ══► inputs ──► stdin writer ──► pipe or terminal ─► program (session and cgroup of its own)
//!           ▲           │ signals, sizes, kill                          │
//!           └── sender ◄┴── stdin taken ◄── output readers ◄────────────┤
//!                  ▲                                                    │
//!                  └───────────── exit status ◄── reaper ◄──────────────┘
//! ```
//! After the program ended, what it left in its pipes is read, without waiting for background children that hold them
//! open; then `Exited` is sent. A host that reads slowly stalls the sender and so this program alone.

pub(crate) mod cgroup;
mod reaper;
mod spawn;
mod streams;

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use agentkernel_protocol::frame::{self, FrameError};
use agentkernel_protocol::message::{Exec, ExecFailure, ExecInput, ExecOutput, Exit, ExitStatus};
use agentkernel_protocol::mux::Stream;
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::task::{spawn_blocking, spawn_local};

pub(crate) use reaper::Reaper;

use crate::agent::Session;
use crate::configure::{Layout, read_below};
use crate::layers::root::StepRoot;
use crate::system;
use cgroup::Cgroup;
use spawn::{Failure, Spawned};
use streams::Stdin;

/// How long killed processes may take to be gone.
const EMPTY_PATIENCE: Duration = Duration::from_secs(5);
/// Messages under way from a program's streams to the host.
const OUTPUT_QUEUE: usize = 4;

/// Runs one program for the host.
///
/// # Errors
/// If the host's stream breaks. The program is killed then, unless all of the host's session ended: in a machine that was
/// restored programs run on, and what they say is lost.
pub(crate) async fn serve(
    reaper: Arc<Reaper>,
    layout: Arc<Layout>,
    wish: Exec,
    session: Session,
    mut stream: Stream,
) -> Result<(), FrameError> {
    let timeout = wish.timeout_ms.map(Duration::from_millis);
    let stop_signal = wish.stop_signal;
    let killed_before = oom_kills(&layout);
    let started = {
        let layout = layout.clone();
        spawn_blocking(move || start(&reaper, &layout, &wish)).await
    };
    let (spawned, cgroup, root) = match started {
        Ok(Ok(started)) => started,
        Ok(Err(Failure { kind, message })) => return fail(&mut stream, kind, message).await,
        Err(error) => return fail(&mut stream, ExecFailure::Other, error.to_string()).await,
    };
    // Without a descriptor to spare it is asked as all others are.
    let _asked = stop_signal.and_then(|signal| cgroup.ask_with(spawned.pid.cast_signed(), signal).ok());
    let (reader, writer) = tokio::io::split(stream);
    let mut program = Program { writer, cgroup: Rc::new(cgroup), root, layout, killed_before, session };
    program.run(spawned, reader, timeout).await
}

async fn fail(stream: &mut Stream, kind: ExecFailure, message: String) -> Result<(), FrameError> {
    frame::write(stream, &ExecOutput::Failed { kind, message }).await?;
    Ok(stream.shutdown().await?)
}

/// Runs a program that does nothing, on another processor than the one that gets the machine ready, for what an emulator
/// translates meanwhile.
pub(crate) fn rehearse(reaper: &Reaper, layout: &Layout) {
    let wish = Exec {
        arguments: vec![serde_bytes::ByteBuf::from("/bin/true")],
        environment: Vec::new(),
        directory: serde_bytes::ByteBuf::from("/"),
        user: String::new(),
        terminal: None,
        timeout_ms: None,
        root: None,
        stop_signal: None,
    };
    let _ = start(reaper, layout, &wish);
}

/// Everything that may touch a path, on a thread that may wait.
fn start(reaper: &Reaper, layout: &Layout, wish: &Exec) -> Result<Started, Failure> {
    let cgroup = Cgroup::create(&layout.cgroups, layout.process_limit())
        .map_err(|error| Failure::other("make a cgroup", &error))?;
    let root = wish.root.as_ref().map(|wish| StepRoot::assemble(&layout.layers, wish)).transpose();
    let root = root.map_err(|message| Failure { kind: ExecFailure::Other, message })?;
    let spawned = spawn::spawn(reaper, wish, &cgroup, root.as_ref(), &layout.layers.trust)?;
    Ok((spawned, cgroup, root))
}

/// A program, its cgroup, and its root if that is one of its own.
type Started = (Spawned, Cgroup, Option<StepRoot>);

/// What a program's tasks tell the one that talks to the host.
enum Event {
    Say(ExecOutput),
    Ended(i32),
}

struct Program {
    writer: WriteHalf<Stream>,
    cgroup: Rc<Cgroup>,
    root: Option<StepRoot>,
    layout: Arc<Layout>,
    killed_before: u64,
    session: Session,
}

impl Program {
    async fn run(
        &mut self,
        spawned: Spawned,
        reader: ReadHalf<Stream>,
        timeout: Option<Duration>,
    ) -> Result<(), FrameError> {
        let Spawned { pid, status, stdin, outputs } = spawned;
        let mut broken = frame::write(&mut self.writer, &ExecOutput::Started { pid }).await.err();
        let (sender, mut events) = mpsc::channel(OUTPUT_QUEUE);
        let (ended, end) = watch::channel(false);
        let timed_out = Rc::new(Cell::new(false));
        for output in outputs {
            spawn_local(output.pump(sender.clone(), end.clone()));
        }
        let session = self.session.clone();
        let input = spawn_local(inputs(reader, stdin, sender.clone(), pid, self.cgroup.clone(), session));
        let deadline = spawn_local(enforce(timeout, timed_out.clone(), self.cgroup.clone()));
        spawn_local(async move {
            // The reaper outlives every program, so a status always comes.
            let status = status.await.unwrap_or(libc::SIGKILL);
            let _ = ended.send(true);
            let _ = sender.send(Event::Ended(status)).await;
        });
        let mut status = None;
        // Ends when the program has ended, its outputs are read, and the input is stopped: then nobody sends any more.
        while let Some(event) = events.recv().await {
            match event {
                // Read on, so that a program which lives on is not stopped by a full pipe.
                Event::Say(_) if broken.is_some() => {}
                Event::Say(message) => broken = frame::write(&mut self.writer, &message).await.err(),
                Event::Ended(ended) => {
                    status = Some(ended);
                    input.abort();
                    deadline.abort();
                }
            }
            if broken.is_some() && !self.session.is_over() {
                self.cgroup.kill();
                input.abort();
            }
        }
        self.dismantle().await;
        if let Some(error) = broken {
            return Err(error);
        }
        let exit = self.exit(status.unwrap_or(libc::SIGKILL), timed_out.get());
        frame::write(&mut self.writer, &ExecOutput::Exited(exit)).await?;
        Ok(self.writer.shutdown().await?)
    }

    /// Ends what the program left behind in a root of its own, and takes that apart.
    async fn dismantle(&mut self) {
        let Some(root) = self.root.take() else { return };
        self.cgroup.kill();
        let deadline = tokio::time::Instant::now() + EMPTY_PATIENCE;
        while !self.cgroup.is_empty() && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let _ = spawn_blocking(move || drop(root)).await;
    }

    fn exit(&self, status: i32, timed_out: bool) -> Exit {
        let clean = libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0;
        Exit {
            status: if libc::WIFSIGNALED(status) {
                ExitStatus::Signal(libc::WTERMSIG(status) as u8)
            } else {
                ExitStatus::Code(libc::WEXITSTATUS(status) as u8)
            },
            timed_out,
            out_of_memory: !clean && oom_kills(&self.layout) > self.killed_before,
        }
    }
}

/// Kills the program's whole tree when its time is up.
async fn enforce(timeout: Option<Duration>, timed_out: Rc<Cell<bool>>, cgroup: Rc<Cgroup>) {
    if let Some(timeout) = timeout {
        tokio::time::sleep(timeout).await;
        timed_out.set(true);
        cgroup.kill();
    }
}

/// Takes what the host sends, always: a signal never waits behind input that the program does not take. A host that is
/// gone, or breaks its window, ends the program; in a restored machine the program's input ends.
async fn inputs(
    mut reader: ReadHalf<Stream>,
    stdin: Stdin,
    events: mpsc::Sender<Event>,
    pid: u32,
    cgroup: Rc<Cgroup>,
    session: Session,
) {
    let group = i32::try_from(pid).unwrap_or(i32::MAX);
    let mut stdin = stdin.start(events);
    loop {
        let good = match frame::read(&mut reader).await {
            Ok(ExecInput::Stdin(bytes)) => stdin.write(bytes.into_vec()),
            Ok(ExecInput::StdinEnd) => {
                stdin.end();
                true
            }
            Ok(ExecInput::Resize(size)) => {
                stdin.resize(size);
                true
            }
            Ok(ExecInput::Signal(signal)) => {
                system::kill(-stdin.foreground_group().unwrap_or(group), signal);
                true
            }
            Ok(ExecInput::Kill) | Err(_) => false,
        };
        if !good {
            if !session.is_over() {
                cgroup.kill();
            }
            return;
        }
    }
}

/// Processes the kernel has killed for want of memory since it started.
fn oom_kills(layout: &Layout) -> u64 {
    let text = read_below(&layout.proc, "vmstat", 64 << 10).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
}
