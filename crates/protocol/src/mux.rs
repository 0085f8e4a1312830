//! Many streams over one: yamux with explicit limits. The host opens streams, the guest accepts them.
//!
//! A reader that stops stalls only its own stream: each has a window of its own. The buffered bytes of all streams are
//! bounded by 256 KiB for each stream that the *host* opened, plus [`WINDOW_GROWTH`] shared by the busy ones; a guest
//! that opens streams itself has broken the protocol.

use std::future::poll_fn;
use std::task::Poll;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};
use yamux::{Config, Connection, ConnectionError, Mode};

/// Streams open at once; some are file systems, the rest executions.
pub const STREAM_LIMIT: usize = 2048;
/// Bytes by which the windows of all streams together may grow above their initial 256 KiB each.
pub const WINDOW_GROWTH: usize = 16 << 20;

/// One stream.
pub type Stream = Compat<yamux::Stream>;

/// Why the multiplexer ended.
#[derive(Debug, thiserror::Error)]
pub enum MuxError {
    /// The connection failed or the peer broke its rules.
    #[error("the connection to the other side ended")]
    Connection(#[from] ConnectionError),
    /// The peer opened a stream, which only the host may.
    #[error("the guest opened a stream")]
    UnexpectedStream,
    /// The connection is gone.
    #[error("the connection to the other side is closed")]
    Closed,
}

/// Opens streams on a running connection; cheap to clone.
#[derive(Clone, Debug)]
pub struct Opener {
    requests: mpsc::Sender<oneshot::Sender<Result<yamux::Stream, ConnectionError>>>,
}

impl Opener {
    /// Opens a stream. Nothing is sent until the first write.
    ///
    /// # Errors
    /// [`MuxError::Closed`] after the connection ended, [`MuxError::Connection`] at the stream limit.
    pub async fn open(&self) -> Result<Stream, MuxError> {
        let (sender, receiver) = oneshot::channel();
        self.requests.send(sender).await.map_err(|_| MuxError::Closed)?;
        Ok(receiver.await.map_err(|_| MuxError::Closed)??.compat())
    }
}

/// The host's side: returns what opens streams and the future that must be polled for them to move.
pub fn host<T: AsyncRead + AsyncWrite + Unpin>(io: T) -> (Opener, impl Future<Output = MuxError>) {
    let (requests, mut receiver) = mpsc::channel::<oneshot::Sender<_>>(64);
    let mut connection = Connection::new(io.compat(), config(), Mode::Client);
    let driver = async move {
        let mut waiting: Option<oneshot::Sender<_>> = None;
        let mut open = true;
        poll_fn(move |context| {
            loop {
                if waiting.is_none() && open {
                    match receiver.poll_recv(context) {
                        Poll::Ready(Some(sender)) => waiting = Some(sender),
                        Poll::Ready(None) => open = false,
                        Poll::Pending => {}
                    }
                }
                if let Some(sender) = waiting.take() {
                    match connection.poll_new_outbound(context) {
                        Poll::Ready(result) => {
                            // The caller may have given up meanwhile; the stream is then dropped and reset.
                            let _ = sender.send(result);
                            continue;
                        }
                        Poll::Pending => waiting = Some(sender),
                    }
                }
                return match connection.poll_next_inbound(context) {
                    Poll::Ready(Some(Ok(_))) => Poll::Ready(MuxError::UnexpectedStream),
                    Poll::Ready(Some(Err(error))) => Poll::Ready(error.into()),
                    Poll::Ready(None) => Poll::Ready(MuxError::Closed),
                    Poll::Pending => Poll::Pending,
                };
            }
        })
        .await
    };
    (Opener { requests }, driver)
}

/// The guest's side: calls `accept` for each stream the host opens, until the connection ends.
pub async fn guest<T, F>(io: T, mut accept: F) -> MuxError
where
    T: AsyncRead + AsyncWrite + Unpin,
    F: FnMut(Stream),
{
    let mut connection = Connection::new(io.compat(), config(), Mode::Server);
    loop {
        match poll_fn(|context| connection.poll_next_inbound(context)).await {
            Some(Ok(stream)) => accept(stream.compat()),
            Some(Err(error)) => return error.into(),
            None => return MuxError::Closed,
        }
    }
}

fn config() -> Config {
    let mut config = Config::default();
    // The window limit must be raised before the number of streams: the crate checks their product.
    config.set_max_connection_receive_window(None);
    config.set_max_num_streams(STREAM_LIMIT);
    config.set_max_connection_receive_window(Some(
        STREAM_LIMIT * yamux::DEFAULT_CREDIT as usize + WINDOW_GROWTH,
    ));
    config
}
