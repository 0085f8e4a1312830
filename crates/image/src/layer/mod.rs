//! Reading layers: untrusted, compressed tar streams.
//!
//! [`pump`] reads and decompresses a blob on a thread of its own, bounded; [`tar`] parses the stream into entries;
//! [`path`] turns their names into components that cannot leave the tree. What entries mean for the tree is decided
//! in `rootfs`.

mod error;
pub(crate) mod item;
pub(crate) mod path;
mod pax;
pub(crate) mod pump;
pub(crate) mod tar;

pub use error::LayerError;
pub use item::{LayerItem, LayerReader, LayerWriter, NodeKind};
pub use pump::decompressed;
pub use tar::Metadata;
