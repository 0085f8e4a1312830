//! What can go wrong in the store.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::error::{ImageError, out_of_space};
use crate::layout::LayoutError;
use crate::reference::InvalidReference;

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// An image or one of its documents is at fault.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A text is not the name of an image.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    /// No image of that name.
    #[error("Image '{name}' not found")]
    NotFound {
        /// As it was asked for.
        name: String,
        /// A name that is there and looks like it.
        nearest: Option<String>,
    },
    /// An id that several images begin with.
    #[error("several images have an id that begins with {prefix}")]
    Ambiguous {
        /// As it was asked for.
        prefix: String,
    },
    /// A blob is not there.
    #[error("the store lacks the blob {digest}")]
    MissingBlob {
        /// Its digest.
        digest: Digest,
    },
    /// A blob's content is not what it should be.
    #[error("a blob's digest is {actual}, not {expected}")]
    WrongDigest {
        /// As promised.
        expected: Digest,
        /// As read.
        actual: Digest,
    },
    /// A blob was cut off, or grew.
    #[error("blob {digest} has {actual} bytes, not {expected}")]
    WrongSize {
        /// The blob.
        digest: Digest,
        /// As promised.
        expected: u64,
        /// As it is.
        actual: u64,
    },
    /// Another process does not let go of the store.
    #[error("another process is at work in the image store ({})", path.display())]
    Busy {
        /// The lock.
        path: PathBuf,
    },
    /// The disk is full; nothing half-written is left.
    #[error("no space left for images in {}", directory.display())]
    NoSpace {
        /// Where.
        directory: PathBuf,
    },
    /// The store cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl StoreError {
    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Image(error) => error.hint(),
            Self::Reference(error) => Some(error.hint()),
            Self::NotFound { nearest: Some(nearest), .. } => Some(format!("did you mean {nearest}?")),
            Self::NotFound { nearest: None, .. } => {
                Some("agentkernel images list shows what is there; images pull brings more".into())
            }
            Self::Ambiguous { .. } => Some("give more of its digits".into()),
            Self::MissingBlob { .. } | Self::WrongDigest { .. } | Self::WrongSize { .. } => {
                Some("the image is damaged; pull, load or build it again".into())
            }
            Self::Busy { .. } => Some("wait until builds and pulls are done, then try again".into()),
            Self::NoSpace { .. } => Some("agentkernel images prune frees what no image uses".into()),
            Self::Io { .. } => None,
        }
    }

    /// A failure of the system at `path`, a full disk told apart.
    pub(crate) fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| {
            if out_of_space(&source) {
                let directory = path.parent().map(Into::into).unwrap_or(path);
                return Self::NoSpace { directory };
            }
            Self::Io { action, path, source }
        }
    }
}

impl From<LayoutError> for StoreError {
    fn from(error: LayoutError) -> Self {
        Self::Image(error.into())
    }
}
