//! Frames: a 32-bit little-endian length, then so many bytes, on any ordered byte stream.

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Largest frame of encoded messages, bytes. Output travels in chunks far below it.
pub const MESSAGE_LIMIT: usize = 8 << 20;

/// Largest frame of a file system stream, bytes: one FUSE message with 1 MiB of data and its header.
pub const FILE_SYSTEM_LIMIT: usize = (1 << 20) + (64 << 10);

/// Bytes of process output or input sent in one message.
pub const CHUNK: usize = 32 << 10;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream ended between two frames.
    #[error("the other side closed the stream")]
    Closed,
    /// The peer announced more than it may send.
    #[error("a frame of {length} bytes exceeds the limit of {limit}")]
    TooLong {
        /// Announced length, bytes.
        length: usize,
        /// Largest length allowed, bytes.
        limit: usize,
    },
    /// The bytes are not a message of this version.
    #[error("a frame is not a message of this version")]
    Malformed {
        /// What the codec found.
        #[source]
        source: postcard::Error,
    },
    /// The stream failed, or ended inside a frame.
    #[error("the stream failed")]
    Io(#[from] std::io::Error),
}

impl FrameError {
    /// True if the peer ended or broke the stream, false if it sent something wrong.
    pub fn is_disconnect(&self) -> bool {
        matches!(self, Self::Closed | Self::Io(_))
    }
}

/// Reads one frame's bytes.
///
/// # Errors
/// [`FrameError::Closed`] at a clean end, [`FrameError::TooLong`] before anything is allocated.
pub async fn read_bytes<R: AsyncRead + Unpin>(reader: &mut R, limit: usize) -> Result<Vec<u8>, FrameError> {
    let mut header = [0; 4];
    let mut filled = 0;
    while filled < header.len() {
        match reader.read(&mut header[filled..]).await? {
            0 if filled == 0 => return Err(FrameError::Closed),
            0 => return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
            count => filled += count,
        }
    }
    let length = u32::from_le_bytes(header) as usize;
    if length > limit {
        return Err(FrameError::TooLong { length, limit });
    }
    // Memory grows with what arrives, not with what was announced.
    let mut bytes = Vec::with_capacity(length.min(CHUNK));
    let read = reader.take(length as u64).read_to_end(&mut bytes).await?;
    if read < length {
        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
    }
    Ok(bytes)
}

/// Writes `bytes` as one frame and flushes it.
///
/// # Errors
/// [`FrameError::TooLong`] if `bytes` exceed [`MESSAGE_LIMIT`]; [`FrameError::Io`] if the stream fails.
pub async fn write_bytes<W: AsyncWrite + Unpin>(writer: &mut W, bytes: &[u8]) -> Result<(), FrameError> {
    let mut frame = Vec::with_capacity(bytes.len() + 4);
    frame.extend_from_slice(&header(bytes.len())?);
    frame.extend_from_slice(bytes);
    writer.write_all(&frame).await?;
    Ok(writer.flush().await?)
}

/// Reads one message.
///
/// # Errors
/// As [`read_bytes`]; [`FrameError::Malformed`] if the bytes are no `T` or have a tail.
pub async fn read<T: DeserializeOwned, R: AsyncRead + Unpin>(reader: &mut R) -> Result<T, FrameError> {
    decode(&read_bytes(reader, MESSAGE_LIMIT).await?)
}

/// Writes one message.
///
/// # Errors
/// As [`write_bytes`].
pub async fn write<T: Serialize, W: AsyncWrite + Unpin>(
    writer: &mut W,
    message: &T,
) -> Result<(), FrameError> {
    let frame = encode(message)?;
    writer.write_all(&frame).await?;
    Ok(writer.flush().await?)
}

/// Encodes `message` with its length in front.
///
/// # Errors
/// [`FrameError::TooLong`] if the message exceeds [`MESSAGE_LIMIT`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame =
        postcard::to_extend(message, vec![0; 4]).map_err(|source| FrameError::Malformed { source })?;
    let header = header(frame.len() - 4)?;
    frame[..4].copy_from_slice(&header);
    Ok(frame)
}

/// Decodes a frame's bytes; all of them must be used.
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, FrameError> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok(_) => Err(FrameError::Malformed { source: postcard::Error::DeserializeBadEncoding }),
        Err(source) => Err(FrameError::Malformed { source }),
    }
}

fn header(length: usize) -> Result<[u8; 4], FrameError> {
    let limit = MESSAGE_LIMIT;
    match u32::try_from(length) {
        Ok(length) if length as usize <= limit => Ok(length.to_le_bytes()),
        _ => Err(FrameError::TooLong { length, limit }),
    }
}
