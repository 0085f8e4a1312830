//! Runs one program in a sandbox with this process's own standard streams, terminal and signals.
//!
//! ```text
//! stdin ──► inputs ─┐                           ┌─► stdout
//! signals, sizes ───┴─► sender ══ guest ══► receiver ─► stderr
//! ```

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use agentkernel_protocol::frame::CHUNK;
use agentkernel_protocol::message::{
    Exec, ExecFailure, ExecInput, ExecOutput, Exit, ExitStatus, STDIN_WINDOW,
};
use agentkernel_sandbox::client::{Execution, ExecutionInput, ExecutionOutput, Sandbox};
use agentkernel_sandbox::executions::{exit_code, failure_code};
use agentkernel_sandbox::{Problem, problem};
use serde_bytes::ByteBuf;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, mpsc};

use crate::terminal::{self, RawMode};

/// How the program ended, or why it never began.
pub(super) enum Ended {
    Exited(Exit),
    NotStarted {
        kind: ExecFailure,
        message: String,
    },
    /// The person at the terminal interrupted twice, or agentkernel was told to end.
    Abandoned {
        signal: u8,
    },
    /// The person at the terminal let go of it; it runs on.
    Detached,
}

/// Why a program's end is not known.
pub(super) enum Failure {
    /// The stream to it broke: the sandbox died, or is dying.
    Broken,
    /// Something of our own.
    Problem(Problem),
}

impl Ended {
    /// The exit code of `run`.
    pub(super) fn code(&self) -> u8 {
        match self {
            Self::Exited(exit) => exit_code(exit),
            Self::Abandoned { signal } => 128u8.saturating_add(*signal),
            Self::NotStarted { kind, .. } => failure_code(*kind),
            Self::Detached => 0,
        }
    }
}

/// Output kept in memory for `--json`, bounded.
#[derive(Default)]
pub(super) struct Captured {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// Both as they came.
    pub output: Vec<u8>,
    /// Bytes beyond [`Captured::LIMIT`], left out.
    pub omitted: u64,
}

impl Captured {
    /// Bytes kept of both streams together.
    const LIMIT: usize = 64 << 20;

    fn take(&mut self, bytes: &[u8], error: bool) {
        let room = Self::LIMIT.saturating_sub(self.output.len()).min(bytes.len());
        self.omitted += (bytes.len() - room) as u64;
        self.output.extend_from_slice(&bytes[..room]);
        if error { &mut self.stderr } else { &mut self.stdout }.extend_from_slice(&bytes[..room]);
    }
}

/// Where the program's output goes.
pub(super) enum Sink<'a> {
    Streams,
    Capture(&'a mut Captured),
}

/// Where the program's input comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Stdin,
    Nothing,
}

/// Runs `exec` to its end.
///
/// # Errors
/// If the sandbox dies first.
pub(super) async fn execute(
    sandbox: &Sandbox,
    exec: Exec,
    source: Source,
    sink: Sink<'_>,
) -> Result<Ended, Failure> {
    let interactive = exec.terminal.is_some() && terminal::is_interactive();
    // The guest ends the program in time; a guest that does not is ended with all it has.
    let limit = exec.timeout_ms.map(|timeout| Duration::from_millis(timeout) + TIMEOUT_GRACE);
    let execution = sandbox.exec(exec).await.map_err(Failure::Problem)?;
    let streams = Streams { source, interactive, detach_keys: None, limit };
    converse(execution, streams, sink).await
}

/// How a program is connected with this process.
pub(super) struct Streams {
    pub source: Source,
    /// There is a person at a terminal.
    pub interactive: bool,
    /// Keys that let go of the program.
    pub detach_keys: Option<Vec<u8>>,
    /// Time after which it is given up.
    pub limit: Option<Duration>,
}

/// Connects a program with this process's streams until it ends or is let go.
///
/// # Errors
/// If the sandbox dies first.
pub(super) async fn converse(
    execution: Execution,
    streams: Streams,
    sink: Sink<'_>,
) -> Result<Ended, Failure> {
    let Streams { source, interactive, detach_keys, limit } = streams;
    let _raw = if interactive { RawMode::enter() } else { None };
    let (sender, receiver) = mpsc::channel(4);
    let input = tokio::spawn(send_inputs(execution.input, receiver));
    let window = Arc::new(Semaphore::new(STDIN_WINDOW));
    let detachable = detach_keys.is_some();
    let keys = KeyFilter::new(detach_keys.unwrap_or_default());
    let mut stdin = tokio::spawn(read_stdin(source, sender.clone(), window.clone(), keys));
    let let_go = async {
        match (&mut stdin).await {
            Ok(StdinEnd::LetGo) => {}
            _ => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        result = receive(execution.output, sink, &sender, &window) => result,
        signal = watch_signals(&sender, interactive, detachable) => Ok(Ended::Abandoned { signal }),
        () = let_go => Ok(Ended::Detached),
        () = overdue(limit) => Ok(Ended::Exited(Exit {
            status: ExitStatus::Signal(9),
            timed_out: true,
            out_of_memory: false,
        })),
    };
    stdin.abort();
    input.abort();
    match ended {
        Ok(ended) => Ok(ended),
        Err(Broken::Stream) => Err(Failure::Broken),
        Err(Broken::Output(error)) => Err(Failure::Problem(problem("output", &error, None))),
    }
}

/// Finds the detach keys in what is typed. A part of them is held back until it is clear that they do not follow.
struct KeyFilter {
    keys: Vec<u8>,
    matched: usize,
}

impl KeyFilter {
    fn new(keys: Vec<u8>) -> Self {
        Self { keys, matched: 0 }
    }

    /// What of `typed` goes to the program; `None` once the keys were typed.
    fn pass(&mut self, typed: &[u8]) -> Option<Vec<u8>> {
        if self.keys.is_empty() {
            return Some(typed.to_vec());
        }
        let mut passed = Vec::with_capacity(typed.len() + self.matched);
        for &byte in typed {
            if byte != self.keys[self.matched] {
                passed.extend_from_slice(&self.keys[..self.matched]);
                self.matched = 0;
            }
            if byte == self.keys[self.matched] {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    return None;
                }
            } else {
                passed.push(byte);
            }
        }
        Some(passed)
    }
}

/// Why standard input is not read any more.
enum StdinEnd {
    /// It has ended, or nobody takes it.
    Over,
    /// The detach keys were typed.
    LetGo,
}

/// How much later than the guest the host ends a program whose time is up.
const TIMEOUT_GRACE: Duration = Duration::from_secs(10);

async fn overdue(limit: Option<Duration>) {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
}

enum Broken {
    Stream,
    Output(std::io::Error),
}

async fn send_inputs(mut input: ExecutionInput, mut inputs: mpsc::Receiver<ExecInput>) {
    while let Some(message) = inputs.recv().await {
        // A program that has ended needs no input.
        if input.send(&message).await.is_err() {
            return;
        }
    }
    // Dropping `input` would kill the program; it lives until the task is aborted.
    std::future::pending::<()>().await;
}

/// Sends standard input, never more of it than the guest has room for.
async fn read_stdin(
    source: Source,
    inputs: mpsc::Sender<ExecInput>,
    window: Arc<Semaphore>,
    mut keys: KeyFilter,
) -> StdinEnd {
    if source == Source::Nothing {
        let _ = inputs.send(ExecInput::StdinEnd).await;
        return StdinEnd::Over;
    }
    let mut stdin = tokio::io::stdin();
    // Room for held back keys besides.
    let mut buffer = vec![0; CHUNK - 8];
    loop {
        // Room for a whole buffer first, the unused part back afterwards: what was read must not wait in here.
        let Ok(room) = window.acquire_many(CHUNK as u32).await else { return StdinEnd::Over };
        let message = match stdin.read(&mut buffer).await {
            Ok(0) | Err(_) => ExecInput::StdinEnd,
            Ok(count) => {
                let Some(bytes) = keys.pass(&buffer[..count]) else { return StdinEnd::LetGo };
                room.forget();
                window.add_permits(CHUNK - bytes.len());
                ExecInput::Stdin(ByteBuf::from(bytes))
            }
        };
        let last = message == ExecInput::StdinEnd;
        if inputs.send(message).await.is_err() || last {
            return StdinEnd::Over;
        }
    }
}

async fn receive(
    mut output: ExecutionOutput,
    mut sink: Sink<'_>,
    inputs: &mpsc::Sender<ExecInput>,
    window: &Semaphore,
) -> Result<Ended, Broken> {
    let mut stdout = Some(tokio::io::stdout());
    let mut stderr = Some(tokio::io::stderr());
    loop {
        match output.next().await.map_err(|_| Broken::Stream)? {
            ExecOutput::Started { .. } => {}
            // A guest that gives more back than it was sent gains nothing but its own trouble.
            ExecOutput::StdinTaken(count) => {
                let missing = STDIN_WINDOW.saturating_sub(window.available_permits());
                window.add_permits(usize::try_from(count).unwrap_or(missing).min(missing));
            }
            ExecOutput::Stdout(bytes) => match &mut sink {
                Sink::Capture(captured) => captured.take(&bytes, false),
                Sink::Streams => write(&mut stdout, &bytes, inputs).await?,
            },
            ExecOutput::Stderr(bytes) => match &mut sink {
                Sink::Capture(captured) => captured.take(&bytes, true),
                Sink::Streams => write(&mut stderr, &bytes, inputs).await?,
            },
            ExecOutput::Exited(exit) => return Ok(Ended::Exited(exit)),
            ExecOutput::Failed { kind, message } => return Ok(Ended::NotStarted { kind, message }),
        }
    }
}

/// How long a program may go on after nobody reads its output any more.
const PIPE_GRACE: Duration = Duration::from_secs(2);

/// Writes to one of our own streams. A reader that went away ends the program as it would have ended here: by SIGPIPE.
async fn write<W: tokio::io::AsyncWrite + Unpin>(
    stream: &mut Option<W>,
    bytes: &[u8],
    inputs: &mpsc::Sender<ExecInput>,
) -> Result<(), Broken> {
    let Some(writer) = stream else { return Ok(()) };
    let result = match writer.write_all(bytes).await {
        Ok(()) => writer.flush().await,
        Err(error) => Err(error),
    };
    match result {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => {
            *stream = None;
            let _ = inputs.send(ExecInput::Signal(rustix::process::Signal::PIPE.as_raw())).await;
            // Python and Node ignore that signal and wait for an error that their own pipe will never have.
            let inputs = inputs.clone();
            tokio::spawn(async move {
                tokio::time::sleep(PIPE_GRACE).await;
                let _ = inputs.send(ExecInput::Kill).await;
            });
            Ok(())
        }
        Err(error) => Err(Broken::Output(error)),
    }
}

/// Passes signals on to the program. Returns the signal that makes this process leave at once: the second interrupt, or
/// any if the program is to live on.
async fn watch_signals(inputs: &mpsc::Sender<ExecInput>, interactive: bool, detachable: bool) -> u8 {
    const INTERRUPT: u8 = 2;
    const TERMINATE: u8 = 15;
    const HANGUP: u8 = 1;
    let mut interrupt = Listener::new(SignalKind::interrupt());
    let mut terminate = Listener::new(SignalKind::terminate());
    let mut hangup = Listener::new(SignalKind::hangup());
    let mut resize = Listener::new(SignalKind::window_change());
    let mut asked = false;
    loop {
        let signal = tokio::select! {
            () = interrupt.next() => INTERRUPT,
            () = terminate.next() => TERMINATE,
            () = hangup.next() => HANGUP,
            () = resize.next() => {
                if interactive {
                    let _ = inputs.try_send(ExecInput::Resize(terminal::size()));
                }
                continue;
            }
        };
        // An input queue that is full means a program that reads nothing: then there is no gentle way.
        if asked || detachable || inputs.try_send(ExecInput::Signal(i32::from(signal))).is_err() {
            return signal;
        }
        asked = true;
    }
}

/// A signal's stream; one that cannot be listened to never fires.
struct Listener(Option<Signal>);

impl Listener {
    fn new(kind: SignalKind) -> Self {
        Self(signal(kind).ok())
    }

    async fn next(&mut self) {
        match &mut self.0 {
            Some(signal) => {
                signal.recv().await;
            }
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detach_keys_are_found_across_reads_and_nothing_else_is_lost() {
        let mut filter = KeyFilter::new(vec![16, 17]);
        assert_eq!(filter.pass(b"ls\x10"), Some(b"ls".to_vec()));
        assert_eq!(filter.pass(b"\x10x"), Some(b"\x10\x10x".to_vec()));
        assert_eq!(filter.pass(b"\x11\x10"), Some(b"\x11".to_vec()));
        assert_eq!(filter.pass(b"\x11rest"), None);
        assert_eq!(KeyFilter::new(Vec::new()).pass(b"\x10\x11"), Some(b"\x10\x11".to_vec()));
    }
}
