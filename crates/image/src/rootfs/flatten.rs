//! One layer's entries, brought into the tree.

use std::collections::BTreeMap;

use super::erofs::xattr_bytes;
use super::output::{FileShape, FileSink};
use super::tree::{Object, Tree};
use crate::layer::LayerError;
use crate::layer::path::{Marker, components, marker};
use crate::layer::tar::{Entry, EntryKind, Input, Metadata, TarReader};
use crate::limits::Limits;

/// What layers have used up so far.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    entries: u64,
    bytes: u64,
}

/// Reads one layer into the tree, and its files' data into the sink.
pub(crate) fn apply_layer<I: Input, S: FileSink>(
    tree: &mut Tree<S::Data>,
    reader: &mut TarReader<I>,
    sink: &mut S,
    usage: &mut Usage,
    limits: &Limits,
) -> Result<(), LayerError> {
    tree.begin_layer();
    while let Some(entry) = reader.next_entry()? {
        usage.entries += 1;
        if usage.entries > limits.entries {
            return Err(LayerError::TooManyEntries { limit: limits.entries });
        }
        apply_entry(tree, reader, sink, usage, limits, entry)?;
        for dead in tree.take_dead() {
            sink.discard(dead)?;
        }
    }
    Ok(())
}

fn apply_entry<I: Input, S: FileSink>(
    tree: &mut Tree<S::Data>,
    reader: &mut TarReader<I>,
    sink: &mut S,
    usage: &mut Usage,
    limits: &Limits,
    entry: Entry,
) -> Result<(), LayerError> {
    let path = components(&entry.name)?;
    if let Some((last, parents)) = path.split_last() {
        match marker(last).ok_or_else(|| LayerError::invalid(&entry.name, "bad name of a whiteout"))? {
            Marker::None => {}
            Marker::Whiteout(name) => return tree.whiteout(parents, name),
            Marker::Opaque => return tree.opaque(parents),
            Marker::Ignored => return Ok(()),
        }
    }
    let metadata = storable(entry.metadata);
    let object = match entry.kind {
        EntryKind::HardLink(target) => return hard_link(tree, &entry.name, &path, &target),
        EntryKind::File { size, extents, sparse } => {
            usage.bytes = usage.bytes.saturating_add(size);
            if usage.bytes > limits.total_bytes {
                return Err(LayerError::TooLarge { limit: limits.total_bytes });
            }
            let shape = FileShape { size, extents: &extents, sparse };
            Object::File { size, data: sink.store(reader, &shape, xattr_bytes(&metadata.xattrs))? }
        }
        EntryKind::Directory => Object::Directory,
        EntryKind::Symlink(target) => Object::Symlink(target),
        EntryKind::CharacterDevice { major, minor } => Object::CharacterDevice { major, minor },
        EntryKind::BlockDevice { major, minor } => Object::BlockDevice { major, minor },
        EntryKind::Fifo => Object::Fifo,
    };
    tree.insert(&path, object, metadata)
}

fn hard_link<D: Clone>(
    tree: &mut Tree<D>,
    name: &[u8],
    path: &[&[u8]],
    target: &[u8],
) -> Result<(), LayerError> {
    let missing = || LayerError::HardLinkTarget {
        entry: String::from_utf8_lossy(name).into_owned(),
        target: String::from_utf8_lossy(&target[..target.len().min(200)]).into_owned(),
    };
    if target.is_empty() {
        return Err(missing());
    }
    let target_path = components(target).map_err(|error| match error {
        // The entry is at fault, not a file of the target's name.
        LayerError::Escapes { .. } => {
            LayerError::Escapes { entry: String::from_utf8_lossy(name).into_owned() }
        }
        other => other,
    })?;
    if tree.hard_link(path, &target_path)? { Ok(()) } else { Err(missing()) }
}

/// Drops the attributes that no Linux file system stores, such as those of a Mac; tar itself only warns of them.
fn storable(mut metadata: Metadata) -> Metadata {
    let before = metadata.xattrs.len();
    let xattrs: BTreeMap<_, _> =
        metadata.xattrs.into_iter().filter(|(name, _)| super::erofs::xattr_prefix(name).is_some()).collect();
    if xattrs.len() < before {
        tracing::debug!(dropped = before - xattrs.len(), "extended attributes of an unknown name space");
    }
    metadata.xattrs = xattrs;
    metadata
}
