//! A root file system as a build sees it: an image's, with layers laid over it one by one, read without unpacking.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::flatten::{Usage, apply_layer};
use super::output::{FileShape, FileSink};
use super::reader::{Piece, Place, load};
use super::tree::{DeadData, InodeId, Kind, ROOT, Tree};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::layer::tar::{Input, Metadata, TarReader};
use crate::layer::{LayerError, NodeKind};
use crate::layout::section_of;
use crate::limits::{Limits, SYMLINK_HOPS};
use crate::store::{Store, StoreError};

/// An object of a [`FileSystem`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(InodeId);

impl NodeId {
    /// A number that no other object of the same [`FileSystem`] has.
    pub fn number(&self) -> u64 {
        self.0.into()
    }
}

/// Where a path leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The path without symbolic links on its way.
    pub path: Vec<u8>,
    /// What is there; `None` if the path ends before that.
    pub node: Option<NodeId>,
}

/// Why a path leads nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// Symbolic links that never end.
    #[error("too many symbolic links")]
    SymlinkLoop,
    /// A part of it that is no directory.
    #[error("a part of it is not a directory")]
    NotADirectory,
}

/// A merged root file system in memory: names and attributes; data stays where it is.
#[derive(Debug)]
pub struct FileSystem {
    tree: Tree<Place>,
    usage: Usage,
    limits: Limits,
}

impl Default for FileSystem {
    fn default() -> Self {
        Self::new()
    }
}

impl FileSystem {
    /// An empty root directory: `FROM scratch`.
    pub fn new() -> Self {
        let limits = Limits::default();
        Self { tree: Tree::new(limits.metadata_bytes), usage: Usage::default(), limits }
    }

    /// Takes in a root file system that [`crate::RootFileSystem`] prepared.
    ///
    /// # Errors
    /// If it cannot be read or is damaged.
    pub fn load(&mut self, root_file_system: &Path) -> Result<(), ImageError> {
        let failed = |source| ImageError::cache("read", root_file_system, source);
        let file = Arc::new(File::open(root_file_system).map_err(failed)?);
        load(file, &mut self.tree).map_err(|error| match error {
            LayerError::Read { source } => failed(source),
            error => failed(io::Error::other(error.to_string())),
        })
    }

    /// Lays an uncompressed layer of the store over what is there.
    ///
    /// # Errors
    /// If it is missing or damaged.
    pub fn add_layer(&mut self, store: &Store, layer: &Digest) -> Result<(), StoreError> {
        let file = Arc::new(store.open_blob(layer)?);
        let wrong = |source| ImageError::Layer { index: 1, layers: 1, layer: layer.to_string(), source };
        let input = section_of(file.clone()).map_err(|source| wrong(LayerError::Read { source }))?;
        let mut reader = TarReader::new(input);
        let mut places = Places(file);
        apply_layer(&mut self.tree, &mut reader, &mut places, &mut self.usage, &self.limits)
            .map_err(|error| wrong(error).into())
    }

    /// The root directory.
    pub fn root(&self) -> NodeId {
        NodeId(ROOT)
    }

    /// What an object is.
    pub fn kind(&self, node: NodeId) -> NodeKind {
        match &self.tree.inodes[node.0 as usize].kind {
            Kind::File { size, .. } => NodeKind::File(*size),
            Kind::Directory(_) => NodeKind::Directory,
            Kind::Symlink(target) => NodeKind::Symlink(target.to_vec()),
            Kind::CharacterDevice { major, minor } => {
                NodeKind::CharacterDevice { major: *major, minor: *minor }
            }
            Kind::BlockDevice { major, minor } => NodeKind::BlockDevice { major: *major, minor: *minor },
            Kind::Fifo => NodeKind::Fifo,
        }
    }

    /// Whether an object is a directory.
    pub fn is_directory(&self, node: NodeId) -> bool {
        matches!(self.tree.inodes[node.0 as usize].kind, Kind::Directory(_))
    }

    /// How many names an object has.
    pub fn links(&self, node: NodeId) -> u32 {
        self.tree.inodes[node.0 as usize].links
    }

    /// Owner, mode, time, extended attributes.
    pub fn metadata(&self, node: NodeId) -> Metadata {
        let inode = &self.tree.inodes[node.0 as usize];
        Metadata {
            mode: inode.mode,
            user: inode.user,
            group: inode.group,
            mtime: inode.mtime,
            mtime_nanoseconds: inode.mtime_nanoseconds,
            xattrs: inode.xattrs.clone(),
        }
    }

    /// Names in a directory, sorted by bytes; none if it is no directory.
    pub fn children(&self, node: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
        let children = self.tree.children(node.0);
        children.into_iter().flatten().map(|(name, link)| (&**name, NodeId(link.inode)))
    }

    /// Reads a file's data from `offset` on; 0 at its end, and for what is no file.
    ///
    /// # Errors
    /// If the source cannot be read.
    pub fn read_at(&self, node: NodeId, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let Kind::File { size, data } = &self.tree.inodes[node.0 as usize].kind else { return Ok(0) };
        let wanted = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
        let buffer = &mut buffer[..wanted];
        // The last piece that begins at or before the offset.
        let index = data.pieces.partition_point(|piece| piece.offset <= offset);
        let piece = index.checked_sub(1).and_then(|index| data.pieces.get(index));
        let within = piece.filter(|piece| offset < piece.offset + piece.length);
        let until = |end: u64| usize::try_from(end - offset).unwrap_or(usize::MAX).min(wanted);
        match within {
            Some(piece) => {
                let count = until(piece.offset + piece.length);
                data.source.read_exact_at(&mut buffer[..count], piece.position + (offset - piece.offset))?;
                Ok(count)
            }
            None => {
                let count = data.pieces.get(index).map_or(wanted, |next| until(next.offset));
                buffer[..count].fill(0);
                Ok(count)
            }
        }
    }

    /// Follows a path from the root; symbolic links stay within it. `follow_last`: a link at the end is followed too.
    ///
    /// # Errors
    /// If it goes through something that is no directory, or in circles.
    pub fn resolve(&self, path: &[u8], follow_last: bool) -> Result<Resolved, ResolveError> {
        let mut trail: Vec<(Vec<u8>, InodeId)> = Vec::new();
        let mut missing: Vec<Vec<u8>> = Vec::new();
        let mut pending: Vec<Vec<u8>> = split(path);
        let mut hops = 0;
        while let Some(part) = pending.pop() {
            if part == b".." {
                if missing.pop().is_none() {
                    trail.pop();
                }
                continue;
            }
            if !missing.is_empty() {
                missing.push(part);
                continue;
            }
            let here = trail.last().map_or(ROOT, |(_, inode)| *inode);
            let Some(children) = self.tree.children(here) else { return Err(ResolveError::NotADirectory) };
            let Some(link) = children.get(part.as_slice()) else {
                missing.push(part);
                continue;
            };
            match &self.tree.inodes[link.inode as usize].kind {
                Kind::Symlink(target) if follow_last || !pending.is_empty() => {
                    hops += 1;
                    if hops > SYMLINK_HOPS {
                        return Err(ResolveError::SymlinkLoop);
                    }
                    if target.starts_with(b"/") {
                        trail.clear();
                    }
                    pending.extend(split(target));
                }
                _ => trail.push((part, link.inode)),
            }
        }
        let node =
            if missing.is_empty() { Some(trail.last().map_or(ROOT, |(_, inode)| *inode)) } else { None };
        if !missing.is_empty() {
            let last = trail.last().map_or(ROOT, |(_, inode)| *inode);
            if self.tree.children(last).is_none() {
                return Err(ResolveError::NotADirectory);
            }
        }
        let parts: Vec<Vec<u8>> = trail.into_iter().map(|(name, _)| name).chain(missing).collect();
        Ok(Resolved { path: parts.join(&b'/'), node: node.map(NodeId) })
    }
}

/// Components of a path, the first one last.
fn split(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|part| !matches!(*part, b"" | b"."))
        .rev()
        .map(<[u8]>::to_vec)
        .collect()
}

/// Notes where data is instead of taking it.
struct Places(Arc<File>);

impl FileSink for Places {
    type Data = Place;

    fn store<I: Input>(
        &mut self,
        reader: &mut TarReader<I>,
        file: &FileShape<'_>,
        _xattr_bytes: u64,
    ) -> Result<Place, LayerError> {
        let (mut position, _) = reader.data_range();
        let mut pieces = Vec::with_capacity(file.extents.len());
        for extent in file.extents.iter().filter(|extent| extent.length > 0) {
            pieces.push(Piece { offset: extent.offset, position, length: extent.length });
            position += extent.length;
        }
        Ok(Place { source: self.0.clone(), pieces: pieces.into() })
    }

    fn discard(&mut self, _dead: DeadData<Place>) -> Result<(), LayerError> {
        Ok(())
    }
}
