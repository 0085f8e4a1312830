//! The life of one machine, from its start to the removal of everything it had.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agentkernel_machine::accelerator::Accelerator;
use agentkernel_protocol::control::{ControlRequest, Event, LeaseInput};
use agentkernel_protocol::frame;
use agentkernel_protocol::message::{Configure, Mount, MountMode, Reply, Request, Root, Writable};
use agentkernel_protocol::mux::{self, Opener};
use agentkernel_protocol::record::Port;
use serde_bytes::ByteBuf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::confine::{Reach, confine};
use super::{Inherited, machine, relay, teardown};
use crate::collect;
use crate::exports::Exports;
use crate::problem::{Problem, io, plain, problem};
use crate::project::WorkspaceMode;
use crate::spec::{Image, Spec, fresh_machine_id};
use crate::state::{SandboxDirectory, fill_random};

/// Clients served at once; each may hold one execution.
const CLIENT_LIMIT: usize = 1024;
/// Index of the workspace in [`Configure::mounts`].
const WORKSPACE_MOUNT: u32 = 0;
/// Name of the control socket in the sandbox's directory.
pub(crate) const CONTROL_SOCKET: &str = "control.sock";

/// How long a machine may take from its start to the agent's greeting. Many times the usual 0.2 s under hardware
/// virtualisation and 1.5 s under emulation: a busy host is no error.
fn boot_deadline(accelerator: Accelerator) -> Duration {
    match accelerator {
        Accelerator::Kvm => Duration::from_secs(20),
        Accelerator::Tcg => Duration::from_secs(90),
    }
}

/// Runs the sandbox until its lease ends, it is finished, or its machine dies; then removes it.
pub(super) async fn run(
    spec: &Spec,
    sandbox: &SandboxDirectory,
    inherited: Inherited,
) -> Result<(), Problem> {
    let Inherited { lease, lock } = inherited;
    let mut lease = Lease::new(lease)?;
    let result = live(spec, sandbox, &mut lease, &lock).await;
    match &result {
        Ok(()) => {}
        Err(problem) => lease.send(&Event::Failed(problem.clone())).await,
    }
    teardown::remove(sandbox.path());
    result
}

async fn live(
    spec: &Spec,
    sandbox: &SandboxDirectory,
    lease: &mut Lease,
    lock: &std::fs::File,
) -> Result<(), Problem> {
    let listener = UnixListener::bind(CONTROL_SOCKET).map_err(io("open the control socket"))?;
    let exports = Exports::open(spec)?;
    let directory = sandbox.path();
    tracing::debug!("the supervisor is up");
    let started = machine::start(spec, sandbox, lock).await?;
    confine(&Reach { read: exports.read_roots(), write: exports.write_roots(), own: directory.to_owned() })
        .map_err(|message| {
        plain("confinement", format!("the supervisor cannot confine itself: {message}"), None)
    })?;
    tracing::debug!("the machine's process runs");
    let deadline = boot_deadline(started.accelerator);
    let result = tokio::select! {
        result = converse(spec, directory, &exports, &listener, started.stream, deadline, lease) => Outcome::Talk(result),
        exit = started.machine.wait() => Outcome::Exit(exit.to_string()),
    };
    let outcome = match result {
        // A machine that dies takes its port along: its own last words explain more than the broken stream.
        Outcome::Talk(Err(problem)) => {
            match tokio::time::timeout(Duration::from_millis(500), started.machine.wait()).await {
                Ok(exit) => Err(machine_ended(&exit.to_string())),
                Err(_) => Err(explained(problem, started.machine.explain())),
            }
        }
        Outcome::Talk(Ok(())) => Ok(()),
        Outcome::Exit(reason) => Err(machine_ended(&reason)),
    };
    started.machine.kill();
    // The directory may go only when nothing writes into it any more.
    let _ = tokio::time::timeout(Duration::from_secs(5), started.machine.wait()).await;
    outcome
}

enum Outcome {
    Talk(Result<(), Problem>),
    Exit(String),
}

/// Adds what the console says.
fn explained(mut problem: Problem, words: Option<String>) -> Problem {
    if let Some(words) = words {
        problem.message = format!("{}; its console says: {words}", problem.message);
    }
    problem
}

fn machine_ended(reason: &str) -> Problem {
    plain("machine-ended", format!("the machine ended: {reason}"), None)
}

/// Greets and configures the guest, then serves clients until the lease says otherwise.
async fn converse(
    spec: &Spec,
    directory: &Path,
    exports: &Exports,
    listener: &UnixListener,
    stream: UnixStream,
    deadline: Duration,
    lease: &mut Lease,
) -> Result<(), Problem> {
    let mut port = Port::new(stream);
    tokio::select! {
        greeting = tokio::time::timeout(deadline, port.greet(1)) => match greeting {
            Ok(Ok(answer)) => tracing::debug!("the agent greets, kernel {}", answer.kernel),
            Ok(Err(error)) => return Err(problem("boot", &error, None)),
            Err(_) => return Err(boot_timeout(deadline)),
        },
        () = lease.ended() => return Ok(()),
    }
    let (opener, driver) = mux::host(port.session());
    let talk = async {
        tokio::select! {
            configured = tokio::time::timeout(deadline, configure(spec, exports, &opener)) => {
                configured.map_err(|_| boot_timeout(deadline))??;
            }
            () = lease.ended() => return Ok(()),
        }
        tracing::debug!("the guest is configured");
        lease.send(&Event::Ready).await;
        tokio::select! {
            never = accept(listener, &opener) => match never {},
            wish = lease.wish() => match wish {
                Wish::Gone => Ok(()),
                Wish::Finish => {
                    let event = tokio::select! {
                        event = finish(spec, directory, exports, &opener) => event,
                        () = lease.ended() => return Ok(()),
                    };
                    lease.send(&event).await;
                    lease.ended().await;
                    Ok(())
                }
            },
        }
    };
    tokio::select! {
        result = talk => result,
        error = driver => Err(broken_by_guest(&error)),
    }
}

/// The guest sent what no agent of ours sends; the innermost error says what.
fn broken_by_guest(error: &dyn std::error::Error) -> Problem {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let hint = "something in the guest, which only its root can be, wrote on the agent's port; the sandbox was ended";
    plain("guest-protocol", format!("the guest broke its agent's protocol: {cause}"), Some(hint))
}

fn boot_timeout(deadline: Duration) -> Problem {
    plain(
        "boot-timeout",
        format!("the machine did not start within {} s", deadline.as_secs()),
        Some("agentkernel doctor"),
    )
}

/// Serves the files, tells the machine who it is, and waits until it is ready.
async fn configure(spec: &Spec, exports: &Exports, opener: &Opener) -> Result<(), Problem> {
    let wire = |error: &dyn std::error::Error| problem("guest-protocol", error, None);
    for export in exports.iter() {
        let mut stream = opener.open().await.map_err(|error| wire(&error))?;
        let request = Request::FileSystem { tag: export.tag.to_owned(), read_only: export.read_only };
        frame::write(&mut stream, &request).await.map_err(|error| wire(&error))?;
        let server = export.server.clone();
        tokio::spawn(async move {
            if let Err(error) = relay::serve_files(stream, server).await
                && !error.is_disconnect()
            {
                tracing::warn!("the guest's file requests are refused from here on: {error}");
            }
        });
    }
    let mut stream = opener.open().await.map_err(|error| wire(&error))?;
    let request = Request::Configure(Box::new(configuration(spec)));
    frame::write(&mut stream, &request).await.map_err(|error| wire(&error))?;
    match frame::read::<Reply, _>(&mut stream).await.map_err(|error| wire(&error))? {
        Reply::Done => Ok(()),
        Reply::Failed { message } => {
            Err(plain("guest-setup", format!("the guest cannot be set up: {message}"), None))
        }
    }
}

fn configuration(spec: &Spec) -> Configure {
    let mut entropy = vec![0; 64];
    fill_random(&mut entropy);
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let mounts = spec.workspace.iter().map(|workspace| Mount {
        tag: Exports::WORKSPACE.into(),
        target: ByteBuf::from(workspace.root.as_os_str().as_encoded_bytes()),
        mode: match workspace.mode {
            WorkspaceMode::Cow => MountMode::CopyOnWrite,
            WorkspaceMode::Rw => MountMode::ReadWrite,
            WorkspaceMode::Ro | WorkspaceMode::None => MountMode::ReadOnly,
        },
    });
    Configure {
        hostname: spec.name.clone(),
        unix_time_ns: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
        entropy: ByteBuf::from(entropy),
        machine_id: fresh_machine_id(),
        root: match &spec.image {
            Image::Host { .. } => Root::FileSystem { tag: Exports::HOST.into() },
            Image::Disk { .. } => Root::Disk { serial: machine::IMAGE_SERIAL.into() },
        },
        writable: Writable::Disk { serial: machine::WRITABLE_SERIAL.into() },
        mounts: mounts.collect(),
        directories: spec.directories(),
        files: spec.files(),
    }
}

/// Collects the changes of a copy-on-write workspace.
async fn finish(spec: &Spec, directory: &Path, exports: &Exports, opener: &Opener) -> Event {
    let Some(workspace) = spec.workspace.as_ref().filter(|workspace| workspace.mode == WorkspaceMode::Cow)
    else {
        return Event::Finished { changes: 0, problem: None };
    };
    match collect::changes(opener, WORKSPACE_MOUNT, spec, workspace, directory, exports).await {
        Ok(changes) => Event::Finished { changes, problem: None },
        Err(problem) => Event::Finished { changes: 0, problem: Some(problem) },
    }
}

/// Serves clients for ever.
async fn accept(listener: &UnixListener, opener: &Opener) -> std::convert::Infallible {
    let places = Arc::new(Semaphore::new(CLIENT_LIMIT));
    loop {
        // The semaphore is never closed.
        let place = places.clone().acquire_owned().await;
        match listener.accept().await {
            Ok((client, _)) => {
                let opener = opener.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve_client(client, &opener).await {
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

async fn serve_client(mut client: UnixStream, opener: &Opener) -> Result<(), Problem> {
    let refused = |error: &dyn std::error::Error| problem("control", error, None);
    let request = tokio::time::timeout(Duration::from_secs(5), frame::read(&mut client)).await;
    match request.map_err(|error| refused(&error))?.map_err(|error| refused(&error))? {
        ControlRequest::Exec(exec) => {
            let mut stream = opener.open().await.map_err(|error| refused(&error))?;
            frame::write(&mut stream, &Request::Exec(exec)).await.map_err(|error| refused(&error))?;
            relay::relay_execution(client, stream).await;
            Ok(())
        }
    }
}

/// The connection to whoever wants this sandbox to exist.
struct Lease {
    reader: tokio::net::unix::OwnedReadHalf,
    writer: tokio::net::unix::OwnedWriteHalf,
}

enum Wish {
    Finish,
    Gone,
}

impl Lease {
    fn new(stream: std::os::unix::net::UnixStream) -> Result<Self, Problem> {
        stream.set_nonblocking(true).map_err(io("take over the lease"))?;
        let (reader, writer) = UnixStream::from_std(stream).map_err(io("take over the lease"))?.into_split();
        Ok(Self { reader, writer })
    }

    /// Tells the holder; one that is gone already needs no news.
    async fn send(&mut self, event: &Event) {
        let _ = frame::write(&mut self.writer, event).await;
    }

    async fn wish(&mut self) -> Wish {
        match frame::read(&mut self.reader).await {
            Ok(LeaseInput::Finish) => Wish::Finish,
            Err(_) => Wish::Gone,
        }
    }

    /// Waits until the holder is gone.
    async fn ended(&mut self) {
        while matches!(self.wish().await, Wish::Finish) {}
    }
}
