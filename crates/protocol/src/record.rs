//! Records: the outer frames on the byte stream between host and guest.
//!
//! A record is `epoch` (32 bits), `length` with the kind in its top byte (32 bits), both little-endian, then `length`
//! bytes. A session begins with the host's [`Hello`] and a new, higher epoch. Both sides drop data of older epochs, and
//! a higher epoch ends the guest's session: after a restore nothing of the saved machine's conversation is resumed.
//!
//! [`Port`] owns the descriptor; [`Session`] borrows it for one epoch and carries the multiplexer's bytes.

use std::io::{Error, ErrorKind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::future::poll_fn;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::VERSION;
use crate::frame::FrameError;
use crate::message::{Hello, HelloAnswer};

const HEADER: usize = 8;
/// Largest payload of a record, bytes.
pub const PAYLOAD_LIMIT: usize = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hello = 1,
    HelloAnswer = 2,
    Data = 3,
}

/// Why two sides could not begin to talk.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The stream failed or carried something that is no record.
    #[error("the agent's stream failed")]
    Io(#[from] Error),
    /// The greeting is not one.
    #[error("the greeting is malformed")]
    Malformed(#[from] FrameError),
    /// The other side is of another version.
    #[error("the other side speaks version {theirs}, this one {ours}")]
    Version {
        /// Their version.
        theirs: u32,
        /// Our version.
        ours: u32,
    },
}

/// One end of the byte stream, with what was read of it ahead of need.
#[derive(Debug)]
pub struct Port<T> {
    io: T,
    input: Vec<u8>,
    /// Bytes of `input` already consumed.
    start: usize,
    epoch: u32,
    output: Vec<u8>,
    written: usize,
}

struct Header {
    epoch: u32,
    kind: Kind,
    length: usize,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Port<T> {
    /// Wraps a connected byte stream.
    pub fn new(io: T) -> Self {
        Self { io, input: Vec::new(), start: 0, epoch: 0, output: Vec::new(), written: 0 }
    }

    /// What the records go over.
    pub fn get_ref(&self) -> &T {
        &self.io
    }

    /// Begins epoch `epoch` as the host and waits for the guest's answer.
    ///
    /// # Errors
    /// [`HandshakeError`]; the caller sets the deadline.
    pub async fn greet(&mut self, epoch: u32) -> Result<HelloAnswer, HandshakeError> {
        self.hail(epoch).await?;
        self.answer().await
    }

    /// Begins epoch `epoch` as the host. Nothing of the guest's is read.
    ///
    /// # Errors
    /// If the stream breaks.
    pub async fn hail(&mut self, epoch: u32) -> Result<(), HandshakeError> {
        self.epoch = epoch;
        self.send(Kind::Hello, &Hello { version: VERSION }).await
    }

    /// Waits for the guest's answer to [`Port::hail`].
    ///
    /// # Errors
    /// [`HandshakeError`]; the caller sets the deadline.
    pub async fn answer(&mut self) -> Result<HelloAnswer, HandshakeError> {
        let epoch = self.epoch;
        loop {
            let (header, payload) = self.next_record().await?;
            if header.epoch == epoch && header.kind == Kind::HelloAnswer {
                let answer: HelloAnswer = decode(&payload)?;
                return check(answer.version).map(|()| answer);
            }
            if header.epoch >= epoch {
                return Err(Error::new(ErrorKind::InvalidData, "a record before the greeting").into());
            }
        }
    }

    /// Waits as the guest for a host that begins a new epoch, and answers it.
    ///
    /// # Errors
    /// [`HandshakeError::Version`] after the answer was sent, so that the host can say so too.
    pub async fn accept(&mut self, kernel: &str) -> Result<(), HandshakeError> {
        loop {
            let (header, payload) = self.next_record().await?;
            if header.kind == Kind::Hello && header.epoch > self.epoch {
                let hello: Hello = decode(&payload)?;
                self.epoch = header.epoch;
                self.output.clear();
                self.written = 0;
                self.send(Kind::HelloAnswer, &HelloAnswer { version: VERSION, kernel: kernel.to_owned() })
                    .await?;
                return check(hello.version);
            }
        }
    }

    /// The bytes of the current epoch.
    pub fn session(&mut self) -> Session<'_, T> {
        Session { port: self, left: 0 }
    }

    async fn send<M: Serialize>(&mut self, kind: Kind, message: &M) -> Result<(), HandshakeError> {
        let payload = postcard::to_allocvec(message).map_err(|source| FrameError::Malformed { source })?;
        push_record(&mut self.output, self.epoch, kind, &payload);
        Ok(poll_fn(|context| self.poll_drain(context)).await?)
    }

    async fn next_record(&mut self) -> Result<(Header, Vec<u8>), Error> {
        poll_fn(|context| self.poll_record(context)).await
    }

    fn poll_record(&mut self, context: &mut Context<'_>) -> Poll<Result<(Header, Vec<u8>), Error>> {
        loop {
            let available = &self.input[self.start..];
            if let Some(header) = parse(available)?
                && let Some(payload) = available.get(HEADER..HEADER + header.length)
            {
                let payload = payload.to_vec();
                self.start += HEADER + header.length;
                return Poll::Ready(Ok((header, payload)));
            }
            ready!(self.poll_fill(context))?;
        }
    }

    /// Reads more bytes behind those in `input`.
    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.input.drain(..self.start);
        self.start = 0;
        let filled = self.input.len();
        self.input.resize(filled + PAYLOAD_LIMIT, 0);
        let mut buffer = ReadBuf::new(&mut self.input[filled..]);
        let result = Pin::new(&mut self.io).poll_read(context, &mut buffer);
        let count = buffer.filled().len();
        self.input.truncate(filled + count);
        match ready!(result) {
            Ok(()) if count == 0 => Poll::Ready(Err(ErrorKind::UnexpectedEof.into())),
            result => Poll::Ready(result),
        }
    }

    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        while self.written < self.output.len() {
            match ready!(Pin::new(&mut self.io).poll_write(context, &self.output[self.written..]))? {
                0 => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
                count => self.written += count,
            }
        }
        self.output.clear();
        self.written = 0;
        Pin::new(&mut self.io).poll_flush(context)
    }
}

/// The bytes of one epoch, as a stream for the multiplexer.
#[derive(Debug)]
pub struct Session<'a, T> {
    port: &'a mut Port<T>,
    /// Bytes of the current data record not yet handed out.
    left: usize,
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for Session<'_, T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<(), Error>> {
        loop {
            let this = &mut *self;
            let available = &this.port.input[this.port.start..];
            if this.left > 0 && !available.is_empty() {
                let count = this.left.min(available.len()).min(buffer.remaining());
                buffer.put_slice(&available[..count]);
                this.port.start += count;
                this.left -= count;
                return Poll::Ready(Ok(()));
            }
            if this.left == 0
                && let Some(header) = parse(available)?
            {
                if header.epoch > this.port.epoch {
                    // Left in place for `Port::accept`.
                    return Poll::Ready(Err(ErrorKind::ConnectionReset.into()));
                }
                if header.epoch < this.port.epoch {
                    ready!(this.port.poll_record(context))?;
                    continue;
                }
                if header.kind != Kind::Data {
                    return Poll::Ready(Err(Error::new(
                        ErrorKind::InvalidData,
                        "a greeting inside a session",
                    )));
                }
                this.port.start += HEADER;
                this.left = header.length;
                continue;
            }
            ready!(this.port.poll_fill(context))?;
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Session<'_, T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, Error>> {
        let port = &mut *self.port;
        if port.output.len() >= PAYLOAD_LIMIT {
            ready!(port.poll_drain(context))?;
        }
        let bytes = &bytes[..bytes.len().min(PAYLOAD_LIMIT)];
        push_record(&mut port.output, port.epoch, Kind::Data, bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.port.poll_drain(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.poll_flush(context)
    }
}

/// Reads a header if all of it is there; refuses what no peer of ours would send.
fn parse(bytes: &[u8]) -> Result<Option<Header>, Error> {
    let Some((header, _)) = bytes.split_first_chunk::<HEADER>() else { return Ok(None) };
    let [e0, e1, e2, e3, l0, l1, l2, kind] = *header;
    let length = u32::from_le_bytes([l0, l1, l2, 0]) as usize;
    let kind = match kind {
        1 => Kind::Hello,
        2 => Kind::HelloAnswer,
        3 => Kind::Data,
        _ => return Err(Error::new(ErrorKind::InvalidData, "not a record")),
    };
    if length > PAYLOAD_LIMIT {
        return Err(Error::new(ErrorKind::InvalidData, "a record exceeds its limit"));
    }
    Ok(Some(Header { epoch: u32::from_le_bytes([e0, e1, e2, e3]), kind, length }))
}

/// Appends a record; `payload` is at most [`PAYLOAD_LIMIT`] bytes, which fit 24 bits.
fn push_record(output: &mut Vec<u8>, epoch: u32, kind: Kind, payload: &[u8]) {
    debug_assert!(payload.len() <= PAYLOAD_LIMIT);
    output.extend_from_slice(&epoch.to_le_bytes());
    let [l0, l1, l2, ..] = (payload.len() as u32).to_le_bytes();
    output.extend_from_slice(&[l0, l1, l2, kind as u8]);
    output.extend_from_slice(payload);
}

fn decode<M: DeserializeOwned>(payload: &[u8]) -> Result<M, FrameError> {
    crate::frame::decode(payload)
}

fn check(theirs: u32) -> Result<(), HandshakeError> {
    if theirs == VERSION { Ok(()) } else { Err(HandshakeError::Version { theirs, ours: VERSION }) }
}
