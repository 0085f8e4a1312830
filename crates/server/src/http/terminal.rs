//! A terminal over a WebSocket.
//!
//! | message | from the client | from the server |
//! |---|---|---|
//! | text, the first | [`TerminalRequest`] | |
//! | binary | what is typed | what the terminal shows |
//! | text | [`Control`]: a new size, a signal | the last: `{"exit_code": N}` or `{"error": ..., "code": ...}` |
//!
//! The command is as slow as who reads, takes no more than it has room for, and is killed when the connection closes.

use std::sync::Arc;
use std::time::Duration;

use agentkernel_protocol::frame::CHUNK;
use agentkernel_protocol::message::{ExecInput, STDIN_WINDOW, WindowSize};
use agentkernel_sandbox::{Problem, plain};
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use serde::Deserialize;
use serde_bytes::ByteBuf;
use serde_json::json;
use tokio::sync::{Semaphore, mpsc};
use utoipa::ToSchema;

use super::App;
use super::answer::{Failed, Path, words};
use crate::engine::{Interaction, Step};
use crate::model::ExecRequest;
use crate::problem::shown;

/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);
/// Largest message, bytes.
const MESSAGE: usize = 1 << 20;
/// Inputs that wait for the guest.
const QUEUE: usize = 16;
/// How often a silent connection is asked whether it lives.
const ALIVE: Duration = Duration::from_secs(20);
/// What is run where nothing is said.
const SHELL: &str = "if [ -x /bin/bash ]; then exec /bin/bash; fi; exec /bin/sh";

/// The first message.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TerminalRequest {
    /// The command and its arguments; a shell if there is none.
    #[serde(default)]
    command: Vec<String>,
    /// Variables, `K=V`.
    #[serde(default)]
    env: Vec<String>,
    /// Where it starts.
    #[serde(default)]
    workdir: Option<String>,
    /// Run it as root of the guest.
    #[serde(default)]
    sudo: Option<bool>,
    /// Run it as this user.
    #[serde(default)]
    user: Option<String>,
    /// Lines of the terminal.
    #[serde(default)]
    rows: Option<u16>,
    /// Columns of the terminal.
    #[serde(default)]
    cols: Option<u16>,
}

/// Later text messages.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
enum Control {
    /// The client's window has another size.
    Resize { rows: u16, cols: u16 },
    /// A signal for the command, by its number.
    Signal(i32),
}

/// Run a command with a terminal, over a WebSocket.
///
/// The first message is text: `{"command": [...], "env": [...], "workdir": ..., "user": ..., "rows": 24, "cols": 80}`, all
/// of it optional. Then binary messages are what is typed, and what the terminal shows; text messages are
/// `{"resize": {"rows": 50, "cols": 120}}` and `{"signal": 2}`. The last message is text: `{"exit_code": 0}`, or
/// `{"error": ..., "code": ...}`.
#[utoipa::path(get, path = "/sandboxes/{name}/exec/ws", tag = "exec", params(("name" = String, Path)),
    responses((status = 101, description = "The connection is a WebSocket."),
        (status = 426, description = "The request asks for no WebSocket.", body = crate::model::Failure)))]
pub(super) async fn terminal(
    State(app): State<App>,
    Path(name): Path<String>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Failed> {
    let upgrade = upgrade.map_err(|error| {
        let message = format!("this route is a WebSocket's: {}", words(&error.body_text()));
        Failed(plain("upgrade", message, None))
    })?;
    // What is wrong is said as HTTP as long as that is spoken.
    app.engine.check_live(&name).await?;
    let place = app.terminals.clone().try_acquire_owned();
    let place = place.map_err(|_| plain("busy", "too many terminals are open already", None))?;
    let upgrade = upgrade.max_message_size(MESSAGE).max_frame_size(MESSAGE);
    Ok(upgrade.on_upgrade(async move |socket| {
        let _place = place;
        let (mut sender, mut receiver) = socket.split();
        let last = match converse(&app, &name, &mut sender, &mut receiver).await {
            Ok(Some(code)) => json!({ "exit_code": code }),
            Ok(None) => return,
            Err(problem) => {
                json!({ "error": shown(&app.engine, &problem), "code": problem.code, "hint": problem.hint })
            }
        };
        let _ = tokio::time::timeout(PATIENCE, async {
            let _ = sender.send(Message::Text(last.to_string().into())).await;
            let _ = sender.close().await;
        })
        .await;
    }))
}

/// Runs the command; its exit code, or nothing if the client is gone.
async fn converse(
    app: &App,
    name: &str,
    sender: &mut SplitSink<WebSocket, Message>,
    receiver: &mut SplitStream<WebSocket>,
) -> Result<Option<u8>, Problem> {
    let first = tokio::time::timeout(PATIENCE, receiver.next()).await;
    let text = match first {
        Ok(Some(Ok(Message::Text(text)))) => text,
        Ok(Some(Ok(_))) => return Err(plain("json", "the first message is no text", None)),
        Ok(Some(Err(_)) | None) => return Ok(None),
        Err(_) => return Err(plain("slow", "the first message did not come", None)),
    };
    let request: TerminalRequest =
        serde_json::from_str(&text).map_err(|error| plain("json", words(&error.to_string()), None))?;
    let size =
        WindowSize { rows: request.rows.unwrap_or(24).max(1), columns: request.cols.unwrap_or(80).max(1) };
    let command = match request.command {
        words if words.is_empty() => ["/bin/sh", "-c", SHELL].map(str::to_owned).to_vec(),
        words => words,
    };
    let exec = ExecRequest {
        command,
        env: request.env,
        workdir: request.workdir,
        sudo: request.sudo,
        user: request.user,
        timeout: None,
    };
    let Interaction { program, sandbox } = app.engine.interact(name, &exec, size).await?;
    let (mut output, mut input) = program.split();
    let window = Arc::new(Semaphore::new(STDIN_WINDOW));
    let (inputs, mut queued) = mpsc::channel::<ExecInput>(QUEUE);
    let send = async {
        while let Some(message) = queued.recv().await {
            if let ExecInput::Stdin(bytes) = &message {
                let count = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                let Ok(room) = window.acquire_many(count).await else { break };
                room.forget();
            }
            if input.send(&message).await.is_err() {
                break;
            }
        }
        // The command has ended: its last words are on their way.
        std::future::pending::<()>().await;
    };
    let take = take(receiver, &inputs);
    let show = async {
        let mut alive = tokio::time::interval(ALIVE);
        alive.reset();
        loop {
            // Reading must not be cut short: the rest of a message would be taken for the next.
            let next = output.next();
            tokio::pin!(next);
            let step = loop {
                tokio::select! {
                    step = &mut next => break step,
                    _ = alive.tick() => {
                        if sender.send(Message::Ping(Vec::new().into())).await.is_err() {
                            return Ok(None);
                        }
                    }
                }
            };
            match step {
                Some(Step::Said(bytes, _)) => {
                    if sender.send(Message::Binary(bytes.into())).await.is_err() {
                        return Ok(None);
                    }
                }
                Some(Step::Takes(count)) => {
                    let missing = STDIN_WINDOW.saturating_sub(window.available_permits());
                    window.add_permits(usize::try_from(count).unwrap_or(missing).min(missing));
                }
                Some(Step::Ended(ended)) => {
                    return match ended.error {
                        Some(message) => Err(plain("not-started", message, None)),
                        None => Ok(Some(ended.code)),
                    };
                }
                None => return Err(sandbox.failure().await),
            }
        }
    };
    tokio::select! {
        result = show => result,
        result = take => result.map(|()| None),
        () = send => Ok(None),
        () = app.ending.cancelled() => Err(plain("ending", "the server is ending", None)),
    }
}

/// Takes what the client sends until it is gone.
async fn take(
    receiver: &mut SplitStream<WebSocket>,
    inputs: &mpsc::Sender<ExecInput>,
) -> Result<(), Problem> {
    while let Some(Ok(message)) = receiver.next().await {
        let messages: Vec<ExecInput> = match message {
            Message::Binary(bytes) => {
                bytes.chunks(CHUNK).map(|bytes| ExecInput::Stdin(ByteBuf::from(bytes))).collect()
            }
            Message::Text(text) => {
                let control = serde_json::from_str(&text)
                    .map_err(|error| plain("json", words(&error.to_string()), None))?;
                vec![match control {
                    Control::Resize { rows, cols } => {
                        ExecInput::Resize(WindowSize { rows: rows.max(1), columns: cols.max(1) })
                    }
                    Control::Signal(number) => ExecInput::Signal(number),
                }]
            }
            Message::Close(_) => return Ok(()),
            Message::Ping(_) | Message::Pong(_) => continue,
        };
        for message in messages {
            if inputs.send(message).await.is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}
