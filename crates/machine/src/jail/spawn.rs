//! The supervisor's side: start the jail, give it its orders, hear which walls stand, and wait for its end.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::{oneshot, watch};

use super::{Argument, Layer, Limits, Orders, Report, VERB, Wall, message, opening};

/// Setting up takes milliseconds; a host so busy that it takes this long is not usable.
const SETUP_LIMIT: Duration = Duration::from_secs(20);
/// How often it is tried again to go on as a saved process.
const RESUMPTIONS: usize = 2;
/// How much of the process's standard error is kept: its last words.
const ERRORS_KEPT: usize = 8 << 10;
/// How long the last words are waited for after the process ended.
const ERRORS_GRACE: Duration = Duration::from_millis(200);
/// Uids of machines: far above those of people, services and containers, below those that some tools take for negative.
const FIRST_UID: u32 = 2_000_000_000;
const UIDS: u32 = 100_000_000;

/// What a thread does to confine itself; the text says why it could not.
pub type Confinement = Box<dyn FnOnce() -> Result<(), String> + Send>;

/// What to run, and what it may use.
pub struct JailConfig {
    /// The program whose verb [`VERB`] calls [`super::main`].
    pub launcher: PathBuf,
    /// The program to guard; `None`: only set up and report.
    pub program: Option<PathBuf>,
    /// Its arguments.
    pub arguments: Vec<Argument>,
    /// Its descriptors, from [`super::FIRST_DESCRIPTOR`] on.
    pub descriptors: Vec<OwnedFd>,
    /// Files and directories it may read and execute. Symbolic links are resolved here, before anything is confined.
    pub readable: Vec<PathBuf>,
    /// Device nodes it may use.
    pub devices: Vec<PathBuf>,
    /// The uid it gets when we are root; `None`: one that is drawn by lot.
    pub identity: Option<u32>,
    /// What it may use up.
    pub limits: Limits,
    /// Walls to leave out, to try the others alone.
    pub without: Vec<Wall>,
    /// What the first file that the program opens for reading and writing turns out to be: this one, as it was opened here.
    pub opened: Option<File>,
    /// In place of a program: the process goes on as the one that was saved in the descriptor called [`super::IMAGE`]. Names
    /// for [`Self::descriptors`], in their order.
    pub resumed: Option<Vec<String>>,
    /// What the threads that watch the process do once it runs, before anything of it is read.
    pub watchers: Option<Confinement>,
}

/// Why nothing runs in the jail.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The process cannot be started.
    #[error("cannot start {}", launcher.display())]
    Start {
        /// The program that was to be started.
        launcher: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The process cannot be spoken to.
    #[error("cannot set up the machine's jail")]
    Talk {
        /// What the system said.
        source: io::Error,
    },
    /// A path that was to be passed cannot be resolved.
    #[error("cannot pass {}", path.display())]
    Path {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The process gave up.
    #[error("the machine's jail could not be set up: {reason}")]
    Setup {
        /// Its own words.
        reason: String,
    },
}

/// A process in the jail. Dropping it does not end it; see [`Jailed::kill`].
#[derive(Debug)]
pub struct Jailed {
    pid: Pid,
    handle: OwnedFd,
    layers: Vec<Layer>,
    identity: Option<u32>,
    ended: watch::Receiver<Option<Ended>>,
}

/// How a jailed process ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Its status; `None` if the system would not tell.
    pub status: Option<ExitStatus>,
    /// The last of what it wrote to its standard error.
    pub errors: String,
}

impl Jailed {
    /// Its process id, for reading its metrics; it may have ended.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Which walls stand around it.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The uid it was to run under, when it was started by root.
    #[must_use]
    pub fn identity(&self) -> Option<u32> {
        self.identity
    }

    /// Ends it at once. Does nothing if it has ended.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.handle, Signal::KILL);
    }

    /// Waits for its end. May be called any number of times.
    pub async fn wait(&self) -> Ended {
        let mut ended = self.ended.clone();
        let result = ended.wait_for(Option::is_some).await.map(|value| value.clone());
        result.ok().flatten().unwrap_or(Ended { status: None, errors: String::new() })
    }

    /// Whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }
}

struct Started {
    pid: Pid,
    handle: OwnedFd,
    layers: Vec<Layer>,
    /// Where the program's open call arrives.
    listener: Option<OwnedFd>,
}

/// Starts a process in the jail, on a thread of its own that lives as long as the process.
///
/// # Errors
/// [`JailError`]; nothing runs then.
pub async fn spawn(config: JailConfig) -> Result<Jailed, JailError> {
    let identity = rustix::process::geteuid().is_root().then(|| config.identity.unwrap_or_else(draw_uid));
    let orders = orders(&config, identity)?;
    let (started_in, started) = oneshot::channel();
    let (ended_in, ended) = watch::channel(None);
    let launcher = config.launcher.clone();
    let talk = |source| JailError::Talk { source };
    thread::Builder::new()
        .name("machine".to_owned())
        .spawn(move || {
            let mut config = config;
            let (mut child, mut started) = match start_again(&config, &orders) {
                Ok(running) => running,
                Err(error) => return drop(started_in.send(Err(error))),
            };
            let listener = started.listener.take();
            if let Some(Err(reason)) = config.watchers.take().map(|confine| confine()) {
                // It may have come as far as its filter.
                let _ = pidfd_send_signal(&started.handle, Signal::KILL);
                let _ = child.wait();
                return drop(started_in.send(Err(JailError::Setup { reason })));
            }
            if let (Some(listener), Some(file)) = (listener, config.opened.take()) {
                // After that the listener is closed, and nothing else is ever answered. A program that did not ask ends
                // by itself, and says why.
                let asked = move || opening::answer(&listener, &file);
                drop(thread::Builder::new().name("machine-memory".to_owned()).spawn(asked));
            }
            // The caller is gone: so is the reason for the process.
            if let Err(Ok(started)) = started_in.send(Ok(started)) {
                // This thread is confined: it ends the process as everybody else does.
                let _ = pidfd_send_signal(&started.handle, Signal::KILL);
            }
            drop(config);
            let errors = keep_errors(child.stderr.take());
            let status = child.wait().ok();
            ended_in.send_replace(Some(Ended { status, errors: errors.collect() }));
        })
        .map_err(|source| JailError::Start { launcher, source })?;
    let Started { pid, handle, layers, .. } =
        started.await.map_err(|_| talk(io::Error::other("the machine's thread ended")))??;
    Ok(Jailed { pid, handle, layers, identity, ended })
}

fn draw_uid() -> u32 {
    let mut bytes = [0; 4];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    FIRST_UID + u32::from_ne_bytes(bytes) % UIDS
}

fn orders(config: &JailConfig, identity: Option<u32>) -> Result<Orders, JailError> {
    let resolve =
        |path: &PathBuf| path.canonicalize().map_err(|source| JailError::Path { path: path.clone(), source });
    let reopened = config.arguments.iter().filter_map(|argument| match argument {
        Argument::Reopen(index) => Some(*index),
        Argument::Text(_) => None,
    });
    let reopened = reopened.map(|index| {
        let descriptor = config.descriptors.get(index).ok_or_else(|| JailError::Talk {
            source: io::Error::new(io::ErrorKind::InvalidInput, "an argument names no descriptor"),
        })?;
        let link = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(descriptor)));
        let path = std::fs::read_link(&link).map_err(|source| JailError::Path { path: link, source })?;
        Ok((index, path))
    });
    Ok(Orders {
        parent: rustix::process::getpid().as_raw_nonzero().get(),
        program: config.program.as_ref().map(resolve).transpose()?,
        arguments: config.arguments.clone(),
        readable: config.readable.iter().map(resolve).collect::<Result<_, _>>()?,
        devices: config.devices.clone(),
        reopened: reopened.collect::<Result<_, JailError>>()?,
        identity,
        limits: config.limits,
        without: config.without.clone(),
        asks: config.opened.is_some(),
        resumed: config.resumed.clone(),
    })
}

/// A process that is to go on as another may find something of its own where that one's memory belongs, once in some
/// hundred times.
fn start_again(config: &JailConfig, orders: &Orders) -> Result<(Child, Started), JailError> {
    let mut result = start(config, orders);
    for _ in 0..RESUMPTIONS {
        match result {
            Err(JailError::Setup { .. }) if config.resumed.is_some() => result = start(config, orders),
            _ => break,
        }
    }
    result
}

fn start(config: &JailConfig, orders: &Orders) -> Result<(Child, Started), JailError> {
    let talk = |source| JailError::Talk { source };
    let (ours, theirs) = message::pair().map_err(talk)?;
    set_socket_timeout(&ours, Timeout::Recv, Some(SETUP_LIMIT)).map_err(|error| talk(error.into()))?;
    let mut child = Command::new(&config.launcher)
        .arg(VERB)
        .env_clear()
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| JailError::Start { launcher: config.launcher.clone(), source })?;
    match negotiate(&child, &ours, config, orders) {
        Ok(started) => Ok((child, started)),
        Err(error) => {
            let _ = child.kill();
            let errors = keep_errors(child.stderr.take());
            let _ = child.wait();
            Err(match error {
                JailError::Talk { source } if ended_early(&source) => {
                    JailError::Setup { reason: format!("it ended early: {}", errors.collect().trim()) }
                }
                error => error,
            })
        }
    }
}

fn ended_early(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

fn negotiate(
    child: &Child,
    socket: &OwnedFd,
    config: &JailConfig,
    orders: &Orders,
) -> Result<Started, JailError> {
    let talk = |source: io::Error| JailError::Talk { source };
    let descriptors: Vec<_> = config.descriptors.iter().map(AsFd::as_fd).collect();
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| talk(io::Error::other("the process has no id")))?;
    let handle = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| talk(error.into()))?;
    message::send(socket, orders, &descriptors).map_err(talk)?;
    let (mut layers, mut listener) = (None, None);
    while let Some((report, mut sent)) = message::receive::<Report>(socket).map_err(talk)? {
        match report {
            Report::Layers(reported) => layers = Some(reported),
            Report::Asks => listener = sent.pop(),
            Report::Failed(reason) => return Err(JailError::Setup { reason }),
        }
    }
    let layers = layers.ok_or_else(|| talk(io::ErrorKind::UnexpectedEof.into()))?;
    Ok(Started { pid, handle, layers, listener })
}

/// Reads a process's standard error to its end, so that the process never waits, and keeps the last of it.
struct Errors {
    kept: Arc<Mutex<Vec<u8>>>,
    reader: Option<thread::JoinHandle<()>>,
}

fn keep_errors(stream: Option<impl Read + Send + 'static>) -> Errors {
    let kept = Arc::new(Mutex::new(Vec::new()));
    let keeper = Arc::clone(&kept);
    let reader = stream.and_then(|mut stream| {
        let body = move || {
            let mut chunk = [0; 2048];
            while let Ok(count @ 1..) = stream.read(&mut chunk) {
                let mut kept = keeper.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(&chunk[..count]);
                let excess = kept.len().saturating_sub(ERRORS_KEPT);
                kept.drain(..excess);
            }
        };
        thread::Builder::new().name("machine-errors".to_owned()).spawn(body).ok()
    });
    Errors { kept, reader }
}

impl Errors {
    /// What was kept. Called after the process's end; a descendant that still holds the stream is not waited for.
    fn collect(self) -> String {
        let deadline = Instant::now() + ERRORS_GRACE;
        while self.reader.as_ref().is_some_and(|reader| !reader.is_finished()) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept).into_owned()
    }
}
