//! What can be wrong with an image's documents.

use std::io;
use std::path::PathBuf;

use crate::digest::Digest;
use crate::layer::LayerError;

/// Why no image could be read from a source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The source cannot be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The source.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The source is something else.
    #[error("{} is no OCI image layout and no archive of one", path.display())]
    NotAnImage {
        /// The source.
        path: PathBuf,
    },
    /// The archive's own tar is damaged.
    #[error("cannot read the archive {}", path.display())]
    Archive {
        /// The source.
        path: PathBuf,
        /// What is wrong with it.
        source: LayerError,
    },
    /// A part of the image cannot be read.
    #[error("cannot read {what} of the image")]
    Read {
        /// Which part.
        what: String,
        /// The system's error.
        source: io::Error,
    },
    /// A part of the image is not there.
    #[error("the image lacks its {what}")]
    Missing {
        /// Which part.
        what: String,
    },
    /// A blob's content is not what its name says.
    #[error("a blob's digest is {actual}, not {expected}")]
    WrongDigest {
        /// Its name.
        expected: Digest,
        /// As read.
        actual: Digest,
    },
    /// A blob was cut off, or grew.
    #[error("blob {digest} has {actual} bytes, not {expected}")]
    WrongSize {
        /// The blob.
        digest: Digest,
        /// As its descriptor says.
        expected: u64,
        /// As it is.
        actual: u64,
    },
    /// A document beyond 4 MiB.
    #[error("the image's {what} is too large: {size} bytes")]
    DocumentTooLarge {
        /// Which document.
        what: String,
        /// Its size in bytes.
        size: u64,
    },
    /// A document that is not what it should be.
    #[error("the image's {what} is invalid")]
    InvalidDocument {
        /// Which document.
        what: String,
        /// The parser's words.
        source: serde_json::Error,
    },
    /// A document that contradicts itself or its descriptor.
    #[error("the image's {what} contradicts itself: {reason}")]
    Contradiction {
        /// Which document.
        what: &'static str,
        /// How.
        reason: &'static str,
    },
    /// A kind of content this program does not know.
    #[error("the image's {what} is of unsupported type {media_type:?}")]
    UnsupportedMediaType {
        /// Which part.
        what: &'static str,
        /// Its media type.
        media_type: String,
    },
    /// A layer nobody can read without a key.
    #[error("layer {digest} is encrypted")]
    EncryptedLayer {
        /// The layer.
        digest: Digest,
    },
    /// Made for other systems only.
    #[error("the image is not made for linux/amd64, but for {}", available.join(", "))]
    NoPlatform {
        /// What it is made for.
        available: Vec<String>,
    },
    /// Several images, and no tag to choose by.
    #[error("{} holds several images: {}", path.display(), names.join(", "))]
    SeveralImages {
        /// The source.
        path: PathBuf,
        /// What they are called.
        names: Vec<String>,
    },
    /// No image of that tag.
    #[error("{} holds no image called {tag:?}{}", path.display(), listed(names))]
    UnknownTag {
        /// The source.
        path: PathBuf,
        /// What was asked for.
        tag: String,
        /// What there is.
        names: Vec<String>,
    },
    /// An image that does not say what it is called.
    #[error("the image {image} in {} has no full name", path.display())]
    NoName {
        /// The source.
        path: PathBuf,
        /// What is known of its name.
        image: String,
    },
    /// An index without a manifest.
    #[error("{} holds no image", path.display())]
    Empty {
        /// The source.
        path: PathBuf,
    },
    /// Indexes within indexes.
    #[error("the image's indexes are nested too deep")]
    TooDeep,
    /// More layers than allowed.
    #[error("the image has {layers} layers, which is too many")]
    TooManyLayers {
        /// How many.
        layers: usize,
    },
    /// Manifest and configuration do not fit.
    #[error("the image's manifest has {layers} layers, but its configuration {diff_ids}")]
    LayerCount {
        /// In the manifest.
        layers: usize,
        /// In the configuration.
        diff_ids: usize,
    },
}

impl LayoutError {
    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotAnImage { .. } => Some(
                "give a directory with an index.json, or an archive as `skopeo copy` or `docker save` write"
                    .into(),
            ),
            Self::SeveralImages { path, names } => {
                let first = names.first().map_or("TAG", String::as_str);
                Some(format!("choose one: {}:{first}", path.display()))
            }
            Self::UnknownTag { path, names, .. } => {
                names.first().map(|first| format!("choose one, such as {}:{first}", path.display()))
            }
            Self::NoName { .. } => Some("give it one: --tag NAME".into()),
            Self::WrongDigest { .. }
            | Self::WrongSize { .. }
            | Self::Missing { .. }
            | Self::Archive { .. } => {
                Some("the image is damaged or incomplete; copy or save it again".into())
            }
            Self::EncryptedLayer { .. } => {
                Some("decrypt the image first, with the tool that encrypted it".into())
            }
            Self::NoPlatform { .. } => Some("save the image for linux/amd64".into()),
            _ => None,
        }
    }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("; there is {}", names.join(", ")) }
}
