//! The port as an asynchronous stream.
//!
//! A read of no bytes only means that the host is not connected now (while a machine is saved, say): that is waited for,
//! at a pace that costs nothing.

use std::fs::File;
use std::io::{Error, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

const PAUSE: Duration = Duration::from_millis(20);

/// The agent's end of the machine's byte stream.
pub(crate) struct PortIo {
    port: AsyncFd<File>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl PortIo {
    pub(crate) fn new(port: File) -> Result<Self, Error> {
        Ok(Self { port: crate::system::register(port)?, pause: None })
    }
}

impl AsyncRead for PortIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<(), Error>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(context));
                self.pause = None;
            }
            let this = &mut *self;
            let mut guard = ready!(this.port.poll_read_ready(context))?;
            let target = buffer.initialize_unfilled();
            match guard.try_io(|port| port.get_ref().read(target)) {
                Ok(Ok(0)) => this.pause = Some(Box::pin(tokio::time::sleep(PAUSE))),
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for PortIo {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, Error>> {
        loop {
            let mut guard = ready!(self.port.poll_write_ready(context))?;
            match guard.try_io(|port| port.get_ref().write(bytes)) {
                Ok(Err(error)) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }
}
