//! Connections: TCP and a unix socket, bounded in number and in how long they may be silent, ended in order.

use std::convert::Infallible;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use agentkernel_sandbox::{Problem, io, plain};
use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::access::{self, Keys, Way};
use crate::engine::Engine;

/// Code of a socket that another server has.
const TAKEN: &str = "socket-taken";
/// Connections at once.
const CONNECTIONS: usize = 4096;
/// How long the head of a request may take, and how long a connection may be idle before one.
const HEAD: Duration = Duration::from_secs(30);
/// How long a client may take nothing of what it is sent.
const STALL: Duration = Duration::from_secs(300);
/// Largest head of a request, bytes.
const HEAD_BYTES: usize = 64 << 10;
/// How long requests may take to end once the server is told to.
const FAREWELL: Duration = Duration::from_secs(10);

/// Where to listen.
#[derive(Clone, Debug)]
pub enum Place {
    /// TCP.
    Tcp(SocketAddr),
    /// A unix socket, for this user alone.
    Unix(PathBuf),
    /// A unix socket, unless another server of this user's has it already.
    UnixIfFree(PathBuf),
}

/// A server that takes connections.
#[derive(Debug)]
pub struct Listening {
    router: Router,
    ending: CancellationToken,
    keys: Keys,
    tcp: Vec<TcpListener>,
    unix: Vec<(UnixListener, PathBuf)>,
}

/// Begins to listen at `places`; with no keys only what is this machine's own.
///
/// # Errors
/// Code `usage` if others could come in without a key; `listen`, `socket-taken` if a place is.
pub async fn listen(engine: Engine, keys: Keys, places: &[Place]) -> Result<Listening, Problem> {
    let (router, ending) = super::router(engine, keys.clone());
    let mut listening = Listening { router, ending, keys, tcp: Vec::new(), unix: Vec::new() };
    for place in places {
        match place {
            Place::Tcp(address) => {
                if (listening.keys.is_empty() || listening.keys.local) && !address.ip().is_loopback() {
                    let message = format!("{address} can be reached by others, and there is no API key");
                    return Err(plain("usage", message, Some("give one: --api-key-file FILE")));
                }
                let listener = TcpListener::bind(address).await.map_err(|error| {
                    let hint = "choose another with --port; 0 takes a free one";
                    plain("listen", format!("cannot listen on {address}: {error}"), Some(hint))
                })?;
                listening.tcp.push(listener);
            }
            Place::Unix(path) => listening.unix.push((bind(path).await?, path.clone())),
            Place::UnixIfFree(path) => match bind(path).await {
                Ok(listener) => listening.unix.push((listener, path.clone())),
                Err(problem) if problem.code == TAKEN => {}
                Err(problem) => return Err(problem),
            },
        }
    }
    Ok(listening)
}

/// Takes a socket's path. What a server left that is gone is taken over; nothing else is.
async fn bind(path: &Path) -> Result<UnixListener, Problem> {
    let what = || format!("listen on {}", path.display());
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    let name =
        path.file_name().ok_or_else(|| plain("listen", format!("cannot {}: no name", what()), None))?;
    // A socket's address holds 107 bytes at most, a path may be longer.
    let opened = std::fs::File::open(directory).map_err(io(what()))?;
    let short =
        PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&opened))).join(name);
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(plain("listen", format!("{} is there and is no socket", path.display()), None));
        }
        if UnixStream::connect(&short).await.is_ok() {
            let hint = "one server answers there already; --socket takes another path";
            return Err(plain(TAKEN, format!("{} is taken", path.display()), Some(hint)));
        }
        std::fs::remove_file(path).map_err(io(what()))?;
    }
    // For the user alone from its first moment: what is made under a name nobody knows is renamed when that holds.
    let draft = short.with_file_name(format!(".{}", agentkernel_sandbox::state::random_word()));
    let listener = UnixListener::bind(&draft).map_err(io(what()))?;
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o600)).map_err(io(what()))?;
    std::fs::rename(&draft, &short).map_err(io(what()))?;
    Ok(listener)
}

impl Listening {
    /// Addresses of its TCP listeners.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.tcp.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// Its unix sockets.
    pub fn sockets(&self) -> Vec<&Path> {
        self.unix.iter().map(|(_, path)| path.as_path()).collect()
    }

    /// Serves until `end` is ready; then lets requests end, for a while. Sandboxes live on.
    ///
    /// # Errors
    /// None after the start.
    pub async fn serve(self, end: impl Future<Output = ()>) -> Result<(), Problem> {
        let Self { router, ending, keys, tcp, unix } = self;
        let connections = Connections {
            router,
            places: Arc::new(Semaphore::new(CONNECTIONS)),
            stop: CancellationToken::new(),
            abort: CancellationToken::new(),
        };
        let mut accepting = tokio::task::JoinSet::new();
        let mut paths = Vec::new();
        for listener in tcp {
            accepting.spawn(accept_tcp(listener, connections.clone(), keys.is_empty() || keys.local));
        }
        for (listener, path) in unix {
            accepting.spawn(accept_unix(listener, connections.clone()));
            paths.push(path);
        }
        end.await;
        connections.stop.cancel();
        while accepting.join_next().await.is_some() {}
        for path in paths {
            let _ = std::fs::remove_file(path);
        }
        ending.cancel();
        let all = u32::try_from(CONNECTIONS).unwrap_or(u32::MAX);
        if tokio::time::timeout(FAREWELL, connections.places.acquire_many(all)).await.is_err() {
            tracing::warn!("requests that did not end in {} s are given up", FAREWELL.as_secs());
        }
        connections.abort.cancel();
        // What is dropped now ends its sandbox.
        let _ = tokio::time::timeout(FAREWELL, connections.places.acquire_many(all)).await;
        Ok(())
    }
}

#[derive(Clone)]
struct Connections {
    router: Router,
    places: Arc<Semaphore>,
    /// Ends connections after their current request.
    stop: CancellationToken,
    /// Ends connections at once.
    abort: CancellationToken,
}

async fn accept_tcp(listener: TcpListener, connections: Connections, local: bool) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = connections.stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, client)) => {
                let way = Way::Tcp { own: local && owner(&stream, client) };
                let _ = stream.set_nodelay(true);
                connections.serve(stream, way);
            }
            Err(error) => patiently(&error).await,
        }
    }
}

fn owner(stream: &TcpStream, client: SocketAddr) -> bool {
    let own = stream.local_addr().ok().and_then(|server| access::is_own(server, client));
    // Nobody who cannot be told is taken for the user.
    own.unwrap_or(false)
}

async fn accept_unix(listener: UnixListener, connections: Connections) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = connections.stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, _)) => connections.serve(stream, Way::Unix),
            Err(error) => patiently(&error).await,
        }
    }
}

/// A stream whose other end must take what is written to it, sooner or later: who does not is taken for gone.
struct Patient<S> {
    stream: S,
    /// Since nothing more was taken.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Patient<S> {
    /// What a write came to; if it waits, not for ever.
    fn waits<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<std::io::Result<T>>,
    ) -> Poll<std::io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(STALL)));
        stalled.as_mut().poll(context).map(|()| Err(std::io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.waits(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.waits(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.waits(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// A want of descriptors passes.
async fn patiently(error: &std::io::Error) {
    tracing::warn!("cannot take a connection: {error}");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

impl Connections {
    fn serve<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(&self, stream: S, way: Way) {
        // Beyond the bound a connection is closed at once, which clients understand.
        let Ok(place) = self.places.clone().try_acquire_owned() else { return };
        let router = self.router.clone();
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(way);
            let router = router.clone();
            async move {
                match router.oneshot(request.map(Body::new)).await {
                    Ok(response) => Ok::<_, Infallible>(response),
                    Err(never) => match never {},
                }
            }
        });
        let stream = Patient { stream, stalled: None };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .max_buf_size(HEAD_BYTES)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let (stop, abort) = (self.stop.clone(), self.abort.clone());
        tokio::spawn(async move {
            let _place = place;
            tokio::pin!(connection);
            tokio::select! {
                // Clients that break off are no trouble of ours.
                _ = &mut connection => return,
                () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
            }
            tokio::select! {
                _ = connection => {}
                () = abort.cancelled() => {}
            }
        });
    }
}
