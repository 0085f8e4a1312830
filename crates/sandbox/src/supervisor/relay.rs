//! Moves bytes between the guest's streams and what serves them: file servers and clients.

use std::sync::Arc;

use agentkernel_protocol::frame::{self, FILE_SYSTEM_LIMIT, FrameError};
use agentkernel_protocol::mux::Stream;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{Semaphore, mpsc};

use crate::files::FileServer;

/// File system requests served at once; the guest's kernel waits with the others.
const CONCURRENT_REQUESTS: usize = 16;
/// Buffer of each direction of what is relayed, bytes.
const RELAY_BUFFER: usize = 64 << 10;

/// Serves one file system until its stream ends.
///
/// # Errors
/// If the guest sends an oversized request or the stream breaks.
pub(super) async fn serve_files(stream: Stream, server: Arc<FileServer>) -> Result<(), FrameError> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (replies, mut outgoing) = mpsc::channel::<Vec<u8>>(CONCURRENT_REQUESTS);
    let send = async move {
        while let Some(reply) = outgoing.recv().await {
            frame::write_bytes(&mut writer, &reply).await?;
        }
        Ok::<_, FrameError>(())
    };
    let receive = async move {
        let places = Arc::new(Semaphore::new(CONCURRENT_REQUESTS));
        loop {
            let request = match frame::read_bytes(&mut reader, FILE_SYSTEM_LIMIT).await {
                Ok(request) => request,
                Err(FrameError::Closed) => return Ok(()),
                Err(error) => return Err(error),
            };
            // The semaphore is never closed, so a place always comes.
            let Ok(place) = places.clone().acquire_owned().await else { return Ok(()) };
            let (server, replies) = (server.clone(), replies.clone());
            tokio::task::spawn_blocking(move || {
                if let Some(reply) = server.handle(&request) {
                    // Sending fails only when the stream is gone, and the reply with it.
                    let _ = replies.blocking_send(reply);
                }
                drop(place);
            });
        }
    };
    tokio::try_join!(send, receive).map(|_| ())
}

/// Copies both ways until the guest has said all or the client is gone; what is buffered is bounded by the windows.
pub(super) async fn relay<C>(client: C, stream: Stream)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let (client_reader, mut client_writer) = tokio::io::split(client);
    let (guest_reader, mut guest_writer) = tokio::io::split(stream);
    let mut client_reader = BufReader::with_capacity(RELAY_BUFFER, client_reader);
    let mut guest_reader = BufReader::with_capacity(RELAY_BUFFER, guest_reader);
    let inward = async {
        let result = tokio::io::copy_buf(&mut client_reader, &mut guest_writer).await;
        // The guest takes the end of this direction for the client's death and kills the program.
        let _ = guest_writer.shutdown().await;
        result
    };
    let outward = async {
        let result = tokio::io::copy_buf(&mut guest_reader, &mut client_writer).await;
        let _ = client_writer.shutdown().await;
        result
    };
    tokio::pin!(inward, outward);
    tokio::select! {
        _ = &mut outward => {}
        // The guest answers a dead client by ending the stream; a client that only stopped reading fails `outward`.
        _ = &mut inward => { let _ = outward.await; }
    }
}
