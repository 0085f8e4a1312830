//! The formats in which distributions compress kernels and modules, told apart by their first bytes.
//!
//! The input is a file of the host or of its package mirror; even so every output is bounded, because a broken or hostile
//! archive must end in an error and not in an exhausted host.

use std::io::{self, Read};

use lzma_rust2::XzReader;
use miniz_oxide::inflate::decompress_to_vec_with_limit;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

const GZIP: &[u8] = &[0x1f, 0x8b, 0x08];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];

/// `zstd -22 --ultra`, with which kernels are packed, asks for a window of 128 MiB.
const ZSTD_WINDOW: u64 = 128 << 20;
/// LZ4's legacy frame cuts its content into blocks of this size.
const LZ4_BLOCK: usize = 8 << 20;
/// Memory the xz decoder may take, in KiB: dictionaries of up to 128 MiB.
const XZ_MEMORY_KIB: u32 = 160 << 10;

/// Why bytes could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum DecompressError {
    /// None of gzip, xz, zstd and LZ4.
    #[error("the compression format is not known")]
    UnknownFormat,
    /// More came out than a kernel or module can have.
    #[error("unpacks to more than {limit} bytes")]
    TooLarge {
        /// Bytes allowed.
        limit: usize,
    },
    /// The archive is damaged.
    #[error("the {format} data is damaged: {reason}")]
    Damaged {
        /// The format it claims to have.
        format: &'static str,
        /// What the decoder said.
        reason: String,
    },
}

/// Unpacks the first archive in `input` to at most `limit` bytes; what follows the archive is ignored.
pub(crate) fn decompress(input: &[u8], limit: usize) -> Result<Vec<u8>, DecompressError> {
    match input {
        _ if input.starts_with(XZ) => {
            bounded("xz", XzReader::new_mem_limit(input, false, XZ_MEMORY_KIB), limit)
        }
        _ if input.starts_with(ZSTD) => zstd(input, limit),
        _ if input.starts_with(GZIP) => gzip(input, limit),
        _ if input.starts_with(LZ4_LEGACY) => lz4(&input[LZ4_LEGACY.len()..], limit),
        _ => Err(DecompressError::UnknownFormat),
    }
}

fn damaged(format: &'static str, reason: impl ToString) -> DecompressError {
    DecompressError::Damaged { format, reason: reason.to_string() }
}

fn bounded(format: &'static str, reader: impl Read, limit: usize) -> Result<Vec<u8>, DecompressError> {
    let mut output = Vec::new();
    let read: io::Result<usize> = reader.take(limit as u64 + 1).read_to_end(&mut output);
    read.map_err(|error| damaged(format, error))?;
    if output.len() > limit {
        return Err(DecompressError::TooLarge { limit });
    }
    Ok(output)
}

fn zstd(input: &[u8], limit: usize) -> Result<Vec<u8>, DecompressError> {
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(ZSTD_WINDOW);
    let reader =
        StreamingDecoder::new_with_decoder(input, decoder).map_err(|error| damaged("zstd", error))?;
    bounded("zstd", reader, limit)
}

/// Skips the header of RFC 1952; the deflate stream ends by itself.
fn gzip(input: &[u8], limit: usize) -> Result<Vec<u8>, DecompressError> {
    let body = gzip_body(input).ok_or_else(|| damaged("gzip", "the header is cut short"))?;
    decompress_to_vec_with_limit(body, limit).map_err(|error| match error.status {
        miniz_oxide::inflate::TINFLStatus::HasMoreOutput => DecompressError::TooLarge { limit },
        status => damaged("gzip", format!("{status:?}")),
    })
}

fn gzip_body(input: &[u8]) -> Option<&[u8]> {
    let flags = *input.get(3)?;
    let mut rest = input.get(10..)?;
    if flags & 4 != 0 {
        let length = usize::from(u16::from_le_bytes(rest.get(..2)?.try_into().ok()?));
        rest = rest.get(2 + length..)?;
    }
    for bit in [8, 16] {
        if flags & bit != 0 {
            let end = rest.iter().position(|byte| *byte == 0)?;
            rest = rest.get(end + 1..)?;
        }
    }
    if flags & 2 != 0 {
        rest = rest.get(2..)?;
    }
    Some(rest)
}

fn lz4(mut input: &[u8], limit: usize) -> Result<Vec<u8>, DecompressError> {
    let mut output = Vec::new();
    let mut block = vec![0_u8; LZ4_BLOCK];
    while let Some((size, rest)) = input.split_first_chunk::<4>() {
        let size = u32::from_le_bytes(*size) as usize;
        // The kernel's build appends the unpacked size after the last block; it reads as a block that is not there.
        let Some(data) = rest.get(..size).filter(|_| size != 0) else { break };
        let length =
            lz4_flex::block::decompress_into(data, &mut block).map_err(|error| damaged("lz4", error))?;
        if output.len() + length > limit {
            return Err(DecompressError::TooLarge { limit });
        }
        output.extend_from_slice(&block[..length]);
        input = &rest[size..];
    }
    if output.is_empty() {
        return Err(damaged("lz4", "there is no complete block"));
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_bomb_ends_at_the_limit() {
        // Ten thousand zeroes, as gzip writes them.
        let packed = miniz_oxide::deflate::compress_to_vec(&[0; 10_000], 6);
        let mut gzip = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
        gzip.extend(packed);
        assert_eq!(decompress(&gzip, 10_000).expect("unpacks").len(), 10_000);
        assert!(matches!(decompress(&gzip, 9_999), Err(DecompressError::TooLarge { limit: 9_999 })));
    }

    proptest! {
        #[test]
        fn damage_is_an_error_and_never_a_panic(
            magic in prop::sample::select(vec![GZIP, XZ, ZSTD, LZ4_LEGACY]),
            tail in prop::collection::vec(any::<u8>(), 0..512),
        ) {
            let input = [magic, &tail].concat();
            if let Ok(output) = decompress(&input, 4096) {
                prop_assert!(output.len() <= 4096);
            }
        }
    }
}
