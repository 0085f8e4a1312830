//! OCI images on disk, and the root file systems made from them.
//!
//! Flow: [`RootFileSystem::prepare`] opens a layout (a directory or an archive), follows it to
//! one manifest for `linux/amd64`, verifies every document by digest and size, reads the layers as a stream, merges
//! them into one tree in memory and writes that tree as a single read-only EROFS image, which is cached by content.
//!
//! Everything read is hostile: documents, names, links and sizes are bounded, and no path of an image ever becomes a
//! path of the host. Nothing needs root, and no external program runs but the helpers for
//! credentials that Docker's configuration names.

#![forbid(unsafe_code)]
#![allow(unexpected_cfgs, reason = "cargo-fuzz sets cfg(fuzzing)")]

mod cache;
mod config;
mod digest;
mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod http;
mod layer;
mod layout;
mod limits;
mod prepare;
mod reference;
pub mod registry;
mod rootfs;
mod store;

pub use config::{Descriptor, ImageConfig, Platform, signal_number};
pub use digest::Digest;
pub use error::ImageError;
pub use layer::{LayerError, LayerItem, LayerReader, LayerWriter, Metadata, NodeKind, decompressed};
pub use layout::LayoutError;
pub use limits::Limits;
pub use prepare::{PreparedImage, Progress, RootFileSystem, split_reference};
pub use reference::{InvalidReference, Reference};
pub use rootfs::view::{FileSystem, NodeId, ResolveError, Resolved};
pub use store::{BlobWriter, ListedImage, Pruned, Store, StoreError, StoredImage, Writing};
