//! Detached programs: they run on without a client, and clients may attach to them and let go again.
//!
//! ```text
//! guest ══ stream ══► reader ──► pump ─┬─► journal (output kept, how it ended)
//!             ▲                        └─► the attached client, if there is one
//!             └── sender ◄── inputs ◄───── that client; signals
//! ```
//! With a client attached the program runs at its pace, as at a terminal; without one it never waits. Input is sent on
//! within the guest's window whatever a client believes its own to be.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agentkernel_protocol::frame::{self, CHUNK};
use agentkernel_protocol::message::{Exec, ExecFailure, ExecInput, ExecOutput, STDIN_WINDOW, WindowSize};
use agentkernel_protocol::mux::Stream;
use serde_bytes::ByteBuf;
use tokio::io::{AsyncRead, AsyncWrite, ReadHalf};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::executions::Journal;
use crate::problem::{Problem, plain};

/// Output shown again to whoever attaches, bytes: a few screens.
const SCROLLBACK: usize = 32 << 10;
/// Messages under way to an attached client or to the guest.
const QUEUE: usize = 16;
/// How long an attached client may take for a program's last words.
const FAREWELL: Duration = Duration::from_secs(10);
/// Programs that may run detached at once.
const LIMIT: usize = 256;

/// The detached programs of a sandbox.
pub(super) struct Detached {
    directory: PathBuf,
    sandbox: String,
    running: Arc<Mutex<HashMap<String, Running>>>,
}

/// How a running program is reached.
#[derive(Clone)]
struct Running {
    inputs: mpsc::Sender<ExecInput>,
    attach: mpsc::Sender<Attachment>,
}

/// A client that takes over a program's streams.
struct Attachment {
    outputs: mpsc::Sender<ExecOutput>,
    /// Told when another client takes over.
    released: oneshot::Sender<()>,
}

impl Detached {
    pub(super) fn new(directory: PathBuf, sandbox: String) -> Self {
        Self { directory, sandbox, running: Arc::default() }
    }

    fn find(&self, id: &str) -> Option<Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// Takes charge of a program whose stream was just opened; returns its id.
    pub(super) fn start(&self, exec: &Exec, interactive: bool, stream: Stream) -> Result<String, Problem> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.len() >= LIMIT {
            let message = format!("{LIMIT} detached commands run already");
            return Err(plain("too-many", message, Some("end some: agentkernel exec-kill ID")));
        }
        let journal = Journal::begin(&self.directory, &self.sandbox, exec)?;
        let id = journal.id().to_owned();
        let (reader, writer) = tokio::io::split(stream);
        let (inputs, queued) = mpsc::channel(QUEUE);
        let (attach, attachments) = mpsc::channel(1);
        let window = Arc::new(Semaphore::new(STDIN_WINDOW));
        if !interactive {
            // The queue is empty: there is room.
            let _ = inputs.try_send(ExecInput::StdinEnd);
        }
        running.insert(id.clone(), Running { inputs, attach });
        let sender = tokio::spawn(send(writer, queued, window.clone()));
        let (all, key) = (self.running.clone(), id.clone());
        tokio::spawn(async move {
            pump(reader, journal, attachments, &window).await;
            sender.abort();
            all.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        });
        Ok(id)
    }

    /// Sends a signal; 0 kills the whole tree.
    pub(super) async fn signal(&self, id: &str, signal: i32) -> Result<(), Problem> {
        let input = if signal == 0 { ExecInput::Kill } else { ExecInput::Signal(signal) };
        let running = self.find(id);
        let sent = match &running {
            Some(running) => running.inputs.send(input).await.is_ok(),
            None => false,
        };
        if sent { Ok(()) } else { Err(plain("not-running", format!("the command {id} does not run"), None)) }
    }

    /// Connects a client with a program until one of them ends or another client takes over.
    pub(super) async fn attach(&self, id: &str, size: Option<WindowSize>, client: UnixStream) {
        let (mut from_client, mut to_client) = client.into_split();
        let Some(running) = self.find(id) else {
            let message = format!("the command {id} does not run");
            let failed = ExecOutput::Failed { kind: ExecFailure::Other, message };
            let _ = frame::write(&mut to_client, &failed).await;
            return;
        };
        let (outputs, mut output) = mpsc::channel(QUEUE);
        let (released, taken_over) = oneshot::channel();
        if running.attach.send(Attachment { outputs: outputs.clone(), released }).await.is_err() {
            return;
        }
        if let Some(size) = size {
            let _ = running.inputs.send(ExecInput::Resize(size)).await;
        }
        let outward = async {
            while let Some(message) = output.recv().await {
                let last = matches!(message, ExecOutput::Exited(_) | ExecOutput::Failed { .. });
                if frame::write(&mut to_client, &message).await.is_err() || last {
                    return;
                }
            }
        };
        let inward = async {
            loop {
                let Ok(input) = frame::read::<ExecInput, _>(&mut from_client).await else { return };
                let taken = match &input {
                    ExecInput::Stdin(bytes) => bytes.len(),
                    // The program's input outlives this client.
                    ExecInput::StdinEnd => continue,
                    _ => 0,
                };
                if running.inputs.send(input).await.is_err() {
                    // The program has ended: its last words are on their way.
                    return std::future::pending().await;
                }
                if taken > 0 {
                    let taken = u32::try_from(taken).unwrap_or(u32::MAX);
                    if outputs.send(ExecOutput::StdinTaken(taken)).await.is_err() {
                        return;
                    }
                }
            }
        };
        let handed_over = async {
            // Dropped without a word when the program ends: its last words are on their way.
            if taken_over.await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = outward => {}
            () = inward => {}
            () = handed_over => {}
        }
    }
}

/// Sends inputs to the guest, within its window.
async fn send<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut inputs: mpsc::Receiver<ExecInput>,
    window: Arc<Semaphore>,
) {
    while let Some(input) = inputs.recv().await {
        if let ExecInput::Stdin(bytes) = &input {
            let Ok(count) = u32::try_from(bytes.len()) else { return };
            if bytes.len() > CHUNK {
                continue;
            }
            let Ok(room) = window.acquire_many(count).await else { return };
            room.forget();
        }
        if frame::write(&mut writer, &input).await.is_err() {
            return;
        }
    }
}

/// Room for one message to the attached client; `None` if it is gone.
async fn reserve(client: Option<mpsc::Sender<ExecOutput>>) -> Option<mpsc::OwnedPermit<ExecOutput>> {
    client?.reserve_owned().await.ok()
}

/// Keeps what the program says, and tells it whoever is attached, until the program ends.
async fn pump<R: AsyncRead>(
    reader: ReadHalf<R>,
    mut journal: Journal,
    mut attachments: mpsc::Receiver<Attachment>,
    window: &Semaphore,
) {
    // Reading a frame must not be cut short, so it has a task of its own.
    let (sender, mut outputs) = mpsc::channel(QUEUE);
    let mut reader = reader;
    let read = async move {
        while let Ok(output) = frame::read::<ExecOutput, _>(&mut reader).await {
            if sender.send(output).await.is_err() {
                return;
            }
        }
    };
    let keep = async {
        let mut attached: Option<Attachment> = None;
        let mut scrollback: Vec<u8> = Vec::new();
        // What the attached client has not taken yet; nothing more is read before it has, or has gone.
        let mut pending: Option<ExecOutput> = None;
        let mut ended = false;
        loop {
            if attached.is_none() {
                pending = None;
            }
            if ended && pending.is_none() {
                return;
            }
            tokio::select! {
                Some(new) = attachments.recv() => {
                    if !scrollback.is_empty() {
                        let seen = ExecOutput::Stdout(ByteBuf::from(scrollback.clone()));
                        let _ = new.outputs.send(seen).await;
                    }
                    if !ended {
                        pending = None;
                    }
                    if let Some(old) = attached.replace(new) {
                        let _ = old.released.send(());
                    }
                }
                room = reserve(attached.as_ref().map(|client| client.outputs.clone())), if pending.is_some() => {
                    match (room, pending.take()) {
                        (Some(room), Some(output)) => drop(room.send(output)),
                        _ => attached = None,
                    }
                }
                () = tokio::time::sleep(FAREWELL), if ended => return,
                output = outputs.recv(), if !ended && pending.is_none() => {
                    let Some(output) = output else {
                        journal.lost();
                        return;
                    };
                    if let ExecOutput::StdinTaken(count) = output {
                        let missing = STDIN_WINDOW.saturating_sub(window.available_permits());
                        window.add_permits(usize::try_from(count).unwrap_or(missing).min(missing));
                        continue;
                    }
                    journal.take(&output);
                    if let ExecOutput::Stdout(bytes) | ExecOutput::Stderr(bytes) = &output {
                        scrollback.extend_from_slice(bytes);
                        let excess = scrollback.len().saturating_sub(SCROLLBACK);
                        scrollback.drain(..excess);
                    }
                    ended = matches!(output, ExecOutput::Exited(_) | ExecOutput::Failed { .. });
                    pending = Some(output);
                }
            }
        }
    };
    tokio::select! {
        () = keep => {}
        () = async { read.await; std::future::pending::<()>().await } => {}
    }
}
