//! One read-only root file system from an image's layers.
//!
//! Flow: [`flatten`] reads each layer, lowest first, into the [`tree`], which holds what the file system is so far;
//! file data goes straight to the image through [`output`]; when all layers are read, [`erofs`] lays out and writes
//! the metadata after the data. Data that a later layer replaced is punched out of the image file again.

pub(crate) mod directory;
pub(crate) mod erofs;
pub(crate) mod flatten;
pub(crate) mod output;
pub(crate) mod reader;
pub(crate) mod tree;
pub(crate) mod view;
