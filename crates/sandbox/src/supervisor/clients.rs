//! Clients of the control socket: each connection carries one request.

use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agentkernel_protocol::control::{ControlReply, ControlRequest, Rebase};
use agentkernel_protocol::frame;
use agentkernel_protocol::message::{
    Exec, ExecFailure, ExecInput, ExecOutput, Exit, ExitStatus, Programs, Request,
};
use agentkernel_protocol::mux::{Opener, Stream};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, Semaphore, mpsc};

use super::detached::Detached;
use super::relay;
use super::still::Still;
use crate::collect;
use crate::exports::Exports;
use crate::problem::{Problem, plain, problem};
use crate::spec::Spec;
use crate::workspace::Base;

/// Clients served at once; each may hold one execution.
const CLIENT_LIMIT: usize = 1024;
/// How long a client may take to say what it wants.
const REQUEST_PATIENCE: Duration = Duration::from_secs(5);

/// A client's wish that the sandbox stops.
pub(super) struct Stop {
    /// Time between SIGTERM and SIGKILL, milliseconds.
    pub grace_ms: u32,
    /// Who is told when it is done; nobody if it was a signal.
    pub client: Option<UnixStream>,
}

impl Stop {
    pub(super) async fn answer(self, reply: ControlReply) {
        if let Some(mut client) = self.client {
            let _ = frame::write(&mut client, &reply).await;
        }
    }
}

/// What all clients share.
pub(super) struct Clients {
    opener: Opener,
    spec: Arc<Spec>,
    directory: PathBuf,
    exports: Arc<Exports>,
    detached: Detached,
    /// One change set is recorded at a time.
    collecting: Mutex<()>,
    still: Still,
    stops: mpsc::Sender<Stop>,
}

impl Clients {
    pub(super) fn new(
        opener: Opener,
        spec: Arc<Spec>,
        directory: PathBuf,
        exports: Arc<Exports>,
        still: Still,
        stops: mpsc::Sender<Stop>,
    ) -> Self {
        let detached = Detached::new(directory.clone(), spec.name.clone());
        Self { opener, spec, directory, exports, detached, collecting: Mutex::new(()), still, stops }
    }

    /// What stops the machine and lets it go on.
    pub(super) fn still(&self) -> &Still {
        &self.still
    }

    async fn serve(&self, mut client: UnixStream) -> Result<(), Problem> {
        let refused = |error: &dyn std::error::Error| problem("control", error, None);
        let request = tokio::time::timeout(REQUEST_PATIENCE, frame::read(&mut client)).await;
        let request = request.map_err(|error| refused(&error))?.map_err(|error| refused(&error))?;
        if self.still.is_paused() && asks_the_guest(&request) {
            return self.refuse_while_paused(client, &request).await;
        }
        let reply = match request {
            ControlRequest::Guest(request) => return self.relay(client, *request).await,
            ControlRequest::Attach { id, size } => {
                self.detached.attach(&id, size, client).await;
                return Ok(());
            }
            ControlRequest::Stop { grace_ms } => {
                // A sandbox that is stopping already answers nobody; the client sees it let go.
                let _ = self.stops.try_send(Stop { grace_ms, client: Some(client) });
                return Ok(());
            }
            ControlRequest::Ping => Ok(ControlReply::Done),
            ControlRequest::Pause => self.set_paused(true).await,
            ControlRequest::Resume => self.set_paused(false).await,
            ControlRequest::Save => {
                let _alone = self.collecting.lock().await;
                match self.still.save(&mut client, &self.exports).await {
                    // It has closed the connection.
                    Ok(()) => return Ok(()),
                    Err(problem) => Err(problem),
                }
            }
            ControlRequest::Detach { exec, interactive } => self.detach(*exec, interactive).await,
            ControlRequest::Signal { id, signal } => {
                self.detached.signal(&id, signal).await.map(|()| ControlReply::Done)
            }
            ControlRequest::Changes => {
                let _alone = self.collecting.lock().await;
                let (spec, exports) = (&self.spec, &self.exports);
                collect::changes(&self.opener, Programs::Freeze, spec, &self.directory, exports)
                    .await
                    .map(|paths| ControlReply::Changes { paths })
            }
            ControlRequest::Rebase(paths) => {
                self.rebase(paths);
                Ok(ControlReply::Done)
            }
            ControlRequest::Measure { exec, count } => {
                self.measure(&exec, count).await.map(ControlReply::Measured)
            }
        };
        let reply = reply.unwrap_or_else(ControlReply::Failed);
        frame::write(&mut client, &reply).await.map_err(|error| refused(&error))
    }

    async fn refuse_while_paused(
        &self,
        mut client: UnixStream,
        request: &ControlRequest,
    ) -> Result<(), Problem> {
        let name = &self.spec.name;
        let hint = format!("agentkernel resume {name}");
        let message = format!("{name} is paused");
        let told = match request {
            // Its clients read what a guest says.
            ControlRequest::Guest(request) => match **request {
                Request::Exec(_) => {
                    let message = format!("{message}: {hint}");
                    frame::write(&mut client, &ExecOutput::Failed { kind: ExecFailure::Other, message }).await
                }
                // The end of the stream says it.
                _ => Ok(()),
            },
            _ => {
                frame::write(&mut client, &ControlReply::Failed(plain("paused", message, Some(&hint)))).await
            }
        };
        told.map_err(|error| problem("control", &error, None))
    }

    /// Opens a stream to the guest that begins with `request`.
    async fn open(&self, request: &Request) -> Result<Stream, Problem> {
        let broken = |error: &dyn std::error::Error| problem("guest-protocol", error, None);
        let mut stream = self.opener.open().await.map_err(|error| broken(&error))?;
        frame::write(&mut stream, request).await.map_err(|error| broken(&error))?;
        Ok(stream)
    }

    async fn relay(&self, mut client: UnixStream, request: Request) -> Result<(), Problem> {
        match &request {
            Request::Exec(exec) => {
                if let Err(message) = self.permit(exec) {
                    let failed = ExecOutput::Failed { kind: ExecFailure::Other, message };
                    let _ = frame::write(&mut client, &failed).await;
                    return Ok(());
                }
            }
            Request::CopyOut { .. }
            | Request::CopyIn { .. }
            | Request::FileRead { .. }
            | Request::FileWrite { .. }
            | Request::FileRemove { .. }
            | Request::LayerOut { .. }
            | Request::LayerIn { .. } => {}
            _ => {
                return Err(plain(
                    "control",
                    "a client asked the guest for what only a supervisor may",
                    None,
                ));
            }
        }
        let stream = self.open(&request).await?;
        relay::relay(client, stream).await;
        Ok(())
    }

    /// The command policy: a guard rail, for a permitted shell runs what it likes.
    fn permit(&self, exec: &Exec) -> Result<(), String> {
        self.spec.commands.check(&exec.arguments).map_err(|refusal| refusal.to_string())
    }

    async fn detach(&self, exec: Exec, interactive: bool) -> Result<ControlReply, Problem> {
        self.permit(&exec).map_err(|message| plain("command-policy", message, None))?;
        let stream = self.open(&Request::Exec(Box::new(exec.clone()))).await?;
        let id = self.detached.start(&exec, interactive, stream)?;
        Ok(ControlReply::Detached { id })
    }

    async fn set_paused(&self, paused: bool) -> Result<ControlReply, Problem> {
        if paused {
            self.still.pause().await?
        } else {
            self.still.resume().await?
        }
        self.still.until_shown(paused).await;
        Ok(ControlReply::Done)
    }

    fn rebase(&self, paths: Vec<Rebase>) {
        for Rebase { path, version } in paths {
            let path = PathBuf::from(std::ffi::OsString::from_vec(path.into_vec()));
            self.exports.bases.replace(&path, version.map(Base::from));
        }
    }

    /// Runs a program so often, one after the other; durations in nanoseconds.
    async fn measure(&self, exec: &Exec, count: u32) -> Result<Vec<u64>, Problem> {
        let broken = |error: &dyn std::error::Error| problem("guest-protocol", error, None);
        let mut durations = Vec::new();
        for _ in 0..count.min(10_000) {
            let begun = Instant::now();
            let mut stream = self.open(&Request::Exec(Box::new(exec.clone()))).await?;
            frame::write(&mut stream, &ExecInput::StdinEnd).await.map_err(|error| broken(&error))?;
            loop {
                match frame::read(&mut stream).await.map_err(|error| broken(&error))? {
                    ExecOutput::Exited(Exit { status: ExitStatus::Code(0), .. }) => break,
                    ExecOutput::Exited(_) => return Err(plain("measure", "the command failed", None)),
                    ExecOutput::Failed { message, .. } => return Err(plain("measure", message, None)),
                    _ => {}
                }
            }
            durations.push(u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX));
        }
        Ok(durations)
    }
}

/// Whether the guest would have to answer.
fn asks_the_guest(request: &ControlRequest) -> bool {
    matches!(
        request,
        ControlRequest::Guest(_)
            | ControlRequest::Detach { .. }
            | ControlRequest::Changes
            | ControlRequest::Measure { .. }
    )
}

/// Serves clients for ever.
pub(super) async fn accept(listener: &UnixListener, clients: &Arc<Clients>) -> std::convert::Infallible {
    let places = Arc::new(Semaphore::new(CLIENT_LIMIT));
    loop {
        // The semaphore is never closed.
        let place = places.clone().acquire_owned().await;
        match listener.accept().await {
            Ok((client, _)) => {
                let clients = clients.clone();
                tokio::spawn(async move {
                    if let Err(error) = clients.serve(client).await {
                        tracing::warn!("a client was refused: {}", error.message);
                    }
                    drop(place);
                });
            }
            // Out of descriptors, or the client was gone already: neither is a reason to spin.
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}
