//! What can be wrong with a layer.

use std::io;

use crate::digest::Digest;

/// Why a layer was refused or could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The blob cannot be read.
    #[error("cannot read the blob")]
    Read {
        /// The system's error.
        source: io::Error,
    },
    /// The compressed stream is damaged.
    #[error("damaged {compression} stream")]
    Corrupt {
        /// `gzip` or `zstd`.
        compression: &'static str,
        /// The decoder's words.
        source: io::Error,
    },
    /// The blob is not what its descriptor promises.
    #[error("the blob's digest is {actual}, not {expected}")]
    WrongDigest {
        /// As in the manifest.
        expected: Digest,
        /// As read.
        actual: Digest,
    },
    /// The uncompressed layer is not what the configuration promises.
    #[error("the uncompressed layer's digest is {actual}, but the image's configuration says {expected}")]
    WrongDiffId {
        /// As in the configuration.
        expected: Digest,
        /// As read.
        actual: Digest,
    },
    /// The tar stream ends in the middle of an entry.
    #[error("the tar stream ends early, {place}")]
    Truncated {
        /// Where it ended.
        place: String,
    },
    /// A tar header makes no sense.
    #[error("invalid tar entry {entry:?}: {reason}")]
    InvalidEntry {
        /// The entry's name, or where it is.
        entry: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A kind of tar entry that no file system holds.
    #[error("tar entry {entry:?} is of unsupported type {kind:?}")]
    UnsupportedEntry {
        /// The entry's name.
        entry: String,
        /// Its type flag.
        kind: char,
    },
    /// A name or hard link leads out of the root file system.
    #[error("tar entry {entry:?} leads out of the root file system")]
    Escapes {
        /// The entry's name.
        entry: String,
    },
    /// A hard link to something that is not there.
    #[error("tar entry {entry:?} is a hard link to {target:?}, which is not an earlier file")]
    HardLinkTarget {
        /// The entry's name.
        entry: String,
        /// What it links to.
        target: String,
    },
    /// Symbolic links that never end.
    #[error("tar entry {entry:?} lies behind too many symbolic links")]
    SymlinkLoop {
        /// The entry's name.
        entry: String,
    },
    /// More entries than allowed.
    #[error("more than {limit} entries")]
    TooManyEntries {
        /// The bound.
        limit: u64,
    },
    /// More data than allowed.
    #[error("more than {limit} bytes once uncompressed")]
    TooLarge {
        /// The bound.
        limit: u64,
    },
    /// More names, link targets and attributes than allowed.
    #[error("names, links and attributes take more than {limit} bytes")]
    TooMuchMetadata {
        /// The bound.
        limit: u64,
    },
    /// A decompression bomb.
    #[error("the layer grows to more than {ratio} times its compressed size")]
    CompressionRatio {
        /// The bound.
        ratio: u64,
    },
    /// The root file system cannot be written.
    #[error("cannot write the root file system")]
    Write {
        /// The system's error.
        source: io::Error,
    },
}

impl LayerError {
    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Corrupt { .. } | Self::WrongDigest { .. } | Self::Truncated { .. } => {
                Some("the image is damaged; copy or save it again".into())
            }
            Self::TooManyEntries { .. }
            | Self::TooLarge { .. }
            | Self::TooMuchMetadata { .. }
            | Self::CompressionRatio { .. } => {
                Some("the limit protects this machine; use the image only if you trust its author".into())
            }
            _ => None,
        }
    }

    pub(crate) fn invalid(entry: &[u8], reason: &'static str) -> Self {
        Self::InvalidEntry { entry: printable(entry), reason }
    }
}

/// A name for an error text: escaped, because it is hostile, and shortened.
pub(crate) fn printable(name: &[u8]) -> String {
    const SHOWN: usize = 200;
    if name.len() <= SHOWN {
        return String::from_utf8_lossy(name).into_owned();
    }
    format!("{}…", String::from_utf8_lossy(&name[..SHOWN]))
}
