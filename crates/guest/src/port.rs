//! The port as an asynchronous stream.
//!
//! A read of no bytes, or a hang-up, only means that the host is not connected now (while a machine is saved, say). The
//! event loop remembers a hang-up for as long as the descriptor is registered, so the port waits on a timer and then
//! registers anew: waiting costs nothing.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// Time between looks at a port without a host.
const PAUSE: Duration = Duration::from_millis(20);

/// The agent's end of the machine's byte stream.
pub(crate) struct PortIo {
    /// Always there but for the moment in which it is replaced.
    port: Option<AsyncFd<File>>,
    pause: Option<Pin<Box<Sleep>>>,
    /// Both sides wait on one registration: whoever renews it wakes the other.
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl PortIo {
    pub(crate) fn new(port: File) -> Result<Self, Error> {
        Ok(Self { port: Some(crate::system::register(port)?), pause: None, reader: None, writer: None })
    }

    /// Waits while the host is away, then registers the port anew.
    fn poll_present(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let Some(pause) = &mut self.pause else { return Poll::Ready(Ok(())) };
        ready!(pause.as_mut().poll(context));
        self.pause = None;
        if let Some(port) = self.port.take() {
            self.port = Some(crate::system::register(port.into_inner())?);
        }
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
        Poll::Ready(Ok(()))
    }

    fn leave(&mut self) {
        self.pause = Some(Box::pin(tokio::time::sleep(PAUSE)));
    }

    fn port(&self) -> Result<&AsyncFd<File>, Error> {
        self.port.as_ref().ok_or_else(|| ErrorKind::NotConnected.into())
    }
}

impl AsyncRead for PortIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<(), Error>> {
        let this = &mut *self;
        this.reader = Some(context.waker().clone());
        loop {
            ready!(this.poll_present(context))?;
            let mut guard = ready!(this.port()?.poll_read_ready(context))?;
            let away = match guard.get_inner().read(buffer.initialize_unfilled()) {
                Ok(0) => true,
                Ok(count) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let away = guard.ready().is_read_closed();
                    guard.clear_ready();
                    away
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => false,
                Err(error) => return Poll::Ready(Err(error)),
            };
            if away {
                this.leave();
            }
        }
    }
}

impl AsyncWrite for PortIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, Error>> {
        let this = &mut *self;
        this.writer = Some(context.waker().clone());
        loop {
            ready!(this.poll_present(context))?;
            let mut guard = ready!(this.port()?.poll_write_ready(context))?;
            let away = match guard.get_inner().write(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let away = guard.ready().is_write_closed();
                    guard.clear_ready();
                    away
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => false,
                result => return Poll::Ready(result),
            };
            if away {
                this.leave();
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
