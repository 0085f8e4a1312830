//! A blob, verified and decompressed on a thread of its own, so that inflating and writing overlap.
//!
//! Flow: the pump thread reads the blob, hashes it, decompresses it into chunks and sends them over a bounded channel;
//! [`PumpReader`] is the receiving end and an ordinary stream. The digest is known only at the end: a consumer must
//! read to the end and ask [`PumpReader::finish`] before it trusts anything.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::Scope;

use super::LayerError;
use crate::digest::{Digest, HashingReader};
use crate::limits::Limits;

const CHUNK: usize = 256 << 10;
const CHUNKS_AHEAD: usize = 8;

/// How a stream is compressed, told by its first bytes: media types are known to lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// Recognises the compression of a stream that starts with `head`.
    pub(crate) fn detect(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // Skippable frames may come first (zstd:chunked and seekable streams).
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// What a layer's media type has at its end.
    pub(crate) fn media_type_suffix(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Gzip => "+gzip",
            Self::Zstd => "+zstd",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::None => "plain",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    /// What a failed read means: a decoder's errors are the stream's fault, anything the system says is not.
    pub(crate) fn error(self, source: io::Error) -> LayerError {
        if source.raw_os_error().is_none() && self != Self::None {
            return LayerError::Corrupt { compression: self.name(), source };
        }
        LayerError::Read { source }
    }
}

/// What `source` decompresses to, at most `limit` bytes, in `target`; `source` itself if it is not compressed. Both are at
/// their start.
///
/// # Errors
/// If it is damaged or too large, or `target` takes no more.
pub fn decompressed(source: File, mut target: File, limit: u64) -> Result<File, LayerError> {
    let failed = |source| LayerError::Read { source };
    let copy = source.try_clone().map_err(failed)?;
    let mut decoder = Decoder::new(copy).map_err(failed)?;
    let compression = decoder.compression();
    if compression == Compression::None {
        return Ok(source);
    }
    copy_bounded(&mut decoder, &mut target, limit, compression)?;
    Ok(target)
}

/// Copies what a decoder gives.
pub(crate) fn copy_bounded<R: Read>(
    decoder: &mut Decoder<R>,
    target: &mut File,
    limit: u64,
    compression: Compression,
) -> Result<(), LayerError> {
    use std::io::Write;
    let mut buffer = vec![0; CHUNK];
    let mut total = 0;
    loop {
        let read = match decoder.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(compression.error(source)),
        };
        total += read as u64;
        if total > limit {
            return Err(LayerError::TooLarge { limit });
        }
        target.write_all(&buffer[..read]).map_err(|source| LayerError::Write { source })?;
    }
}

/// Decompresses a stream whose compression it finds out itself. Errors of the source and of the format are told
/// apart by their kind: the decoders report `InvalidData`, `InvalidInput`, `UnexpectedEof` or `Other`.
pub(crate) struct Decoder<R> {
    inner: Inner<R>,
    compression: Compression,
}

enum Inner<R> {
    Plain(BufReader<R>),
    Gzip(Box<flate2::bufread::MultiGzDecoder<BufReader<R>>>),
    Zstd(Box<ZstdFrames<R>>),
}

impl<R: Read> Decoder<R> {
    pub(crate) fn new(source: R) -> io::Result<Self> {
        let mut source = BufReader::with_capacity(CHUNK, source);
        let compression = Compression::detect(source.fill_buf()?);
        let inner = match compression {
            Compression::None => Inner::Plain(source),
            Compression::Gzip => Inner::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(source))),
            Compression::Zstd => Inner::Zstd(Box::new(ZstdFrames::new(source))),
        };
        Ok(Self { inner, compression })
    }

    pub(crate) fn compression(&self) -> Compression {
        self.compression
    }

    /// The source, for what the decoder left unread and for its digest.
    fn into_source(self) -> R {
        match self.inner {
            Inner::Plain(source) => source.into_inner(),
            Inner::Gzip(decoder) => decoder.into_inner().into_inner(),
            Inner::Zstd(frames) => frames.source.into_inner(),
        }
    }

    fn source(&self) -> &R {
        match &self.inner {
            Inner::Plain(source) => source.get_ref(),
            Inner::Gzip(decoder) => decoder.get_ref().get_ref(),
            Inner::Zstd(frames) => frames.source.get_ref(),
        }
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.inner {
            Inner::Plain(source) => source.read(buffer),
            Inner::Gzip(decoder) => decoder.read(buffer),
            Inner::Zstd(frames) => frames.read(buffer),
        }
    }
}

/// A zstd stream is a row of frames; the decoder knows one at a time.
struct ZstdFrames<R> {
    source: BufReader<R>,
    decoder: ruzstd::decoding::FrameDecoder,
    in_frame: bool,
}

impl<R: Read> ZstdFrames<R> {
    fn new(source: BufReader<R>) -> Self {
        Self { source, decoder: ruzstd::decoding::FrameDecoder::new(), in_frame: false }
    }

    /// Enters the next frame; `false` at the end of the stream.
    fn next_frame(&mut self) -> io::Result<bool> {
        use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.reset(&mut self.source) {
                Ok(()) => {
                    self.in_frame = true;
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    if io::copy(&mut (&mut self.source).take(length), &mut io::sink())? < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
        }
    }

    fn end_frame(&mut self) -> io::Result<()> {
        self.in_frame = false;
        match (self.decoder.get_checksum_from_data(), self.decoder.get_calculated_checksum()) {
            (Some(stated), Some(actual)) if stated != actual => {
                Err(io::Error::new(io::ErrorKind::InvalidData, "the frame's checksum does not hold"))
            }
            _ => Ok(()),
        }
    }
}

impl<R: Read> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use ruzstd::decoding::BlockDecodingStrategy;
        loop {
            if !self.in_frame && !self.next_frame()? {
                return Ok(0);
            }
            if self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBytes(buffer.len()))
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            }
            let read = self.decoder.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            if self.decoder.is_finished() {
                self.end_frame()?;
            }
        }
    }
}

/// What the pump sends.
enum Chunk {
    /// Uncompressed bytes, and how much of the blob was read for all so far.
    Data(Vec<u8>, u64),
    /// The blob's end: its digest if it was asked for, and how it was compressed.
    End(Option<Digest>, Compression),
    Failed(LayerError),
}

/// Starts pumping `source`. `hashed` asks for the digest of the blob as stored.
pub(crate) fn start<'scope, R: Read + Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    source: R,
    hashed: bool,
    limits: Limits,
) -> PumpReader {
    let (sender, receiver) = sync_channel(CHUNKS_AHEAD);
    scope.spawn(move || {
        let source = if hashed { HashingReader::new(source) } else { HashingReader::counting(source) };
        let last = match run(source, &sender, limits) {
            Ok((digest, compression)) => Chunk::End(digest, compression),
            Err(error) => Chunk::Failed(error),
        };
        // The reader may be gone already, having failed.
        let _ = sender.send(last);
    });
    PumpReader { receiver, chunk: Vec::new(), used: 0, blob_bytes: 0, end: None, error: None }
}

fn run<R: Read>(
    source: HashingReader<R>,
    sender: &SyncSender<Chunk>,
    limits: Limits,
) -> Result<(Option<Digest>, Compression), LayerError> {
    let mut decoder = Decoder::new(source).map_err(|source| LayerError::Read { source })?;
    let compression = decoder.compression();
    let mut produced = 0u64;
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        (&mut decoder)
            .take(CHUNK as u64)
            .read_to_end(&mut chunk)
            .map_err(|source| compression.error(source))?;
        if chunk.is_empty() {
            break;
        }
        produced += chunk.len() as u64;
        let consumed = decoder.source().count();
        check_growth(produced, consumed, limits)?;
        if sender.send(Chunk::Data(chunk, consumed)).is_err() {
            break;
        }
    }
    // Whatever follows the compressed stream belongs to the blob's digest all the same.
    let mut source = decoder.into_source();
    io::copy(&mut source, &mut io::sink()).map_err(|source| LayerError::Read { source })?;
    Ok((source.finish().1, compression))
}

fn check_growth(produced: u64, consumed: u64, limits: Limits) -> Result<(), LayerError> {
    if produced > limits.total_bytes {
        return Err(LayerError::TooLarge { limit: limits.total_bytes });
    }
    if produced > limits.ratio_floor_bytes && produced / limits.compression_ratio.max(1) > consumed {
        return Err(LayerError::CompressionRatio { ratio: limits.compression_ratio });
    }
    Ok(())
}

/// The uncompressed stream.
pub(crate) struct PumpReader {
    receiver: Receiver<Chunk>,
    chunk: Vec<u8>,
    used: usize,
    blob_bytes: u64,
    end: Option<(Option<Digest>, Compression)>,
    error: Option<LayerError>,
}

impl PumpReader {
    /// Bytes of the blob, as stored, behind what was received so far.
    pub(crate) fn blob_bytes(&self) -> u64 {
        self.blob_bytes
    }

    /// The digest of the blob and its compression, once the stream was read to its end.
    pub(crate) fn finish(mut self) -> Result<(Option<Digest>, Compression), LayerError> {
        let drained = io::copy(&mut self, &mut io::sink());
        drained.map_err(|source| self.error.take().unwrap_or(LayerError::Read { source }))?;
        match self.end {
            Some(end) => Ok(end),
            None => Err(LayerError::Read { source: io::ErrorKind::BrokenPipe.into() }),
        }
    }

    /// The pump's own error, which tells more than the one that passed through [`Read`].
    pub(crate) fn take_error(&mut self) -> Option<LayerError> {
        self.error.take()
    }

    fn refill(&mut self) -> io::Result<()> {
        while self.used == self.chunk.len() && self.end.is_none() {
            match self.receiver.recv() {
                Ok(Chunk::Data(chunk, blob_bytes)) => {
                    (self.chunk, self.used, self.blob_bytes) = (chunk, 0, blob_bytes);
                }
                Ok(Chunk::End(digest, compression)) => self.end = Some((digest, compression)),
                Ok(Chunk::Failed(error)) => {
                    self.error = Some(error);
                    return Err(io::Error::other("the layer cannot be read"));
                }
                Err(_) => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
        Ok(())
    }
}

impl Read for PumpReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.refill()?;
        let count = buffer.len().min(self.chunk.len() - self.used);
        buffer[..count].copy_from_slice(&self.chunk[self.used..self.used + count]);
        self.used += count;
        Ok(count)
    }
}
