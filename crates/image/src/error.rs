//! What can go wrong between an image on disk and its prepared root file system.

use std::io;
use std::path::PathBuf;

use crate::layer::LayerError;
use crate::layout::LayoutError;

/// Why an image could not be prepared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The layout, one of its documents or its choice of image is at fault.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A layer's content is at fault.
    #[error("cannot read layer {index} of {layers} ({layer})")]
    Layer {
        /// Counted from 1, lowest first.
        index: usize,
        /// How many layers the image has.
        layers: usize,
        /// The layer's digest, or its name in a Docker archive.
        layer: String,
        /// What is wrong with it.
        source: LayerError,
    },
    /// The disk of the cache is full; nothing half-written is left.
    #[error("no space left for the root file system in {}", directory.display())]
    NoSpace {
        /// The cache directory.
        directory: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The cache cannot be written or read.
    #[error("cannot {action} {}", path.display())]
    Cache {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl ImageError {
    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Layout(error) => error.hint(),
            Self::Layer { source, .. } => source.hint(),
            Self::NoSpace { directory, .. } => {
                Some(format!("free space on the disk of {}, then run it again", directory.display()))
            }
            Self::Cache { .. } => None,
        }
    }

    /// A failure in the cache directory, a full disk told apart.
    pub(crate) fn cache(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        if out_of_space(&source) {
            let directory = path.parent().map(Into::into).unwrap_or(path);
            return Self::NoSpace { directory, source };
        }
        Self::Cache { action, path, source }
    }
}

/// Whether a write failed for want of space or quota.
pub(crate) fn out_of_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
