//! Reads back the EROFS images that [`super::erofs`] writes, and no others: extended inodes, flat data, a tail behind
//! the inode. They are this program's own, in a private directory; a damaged one is an error all the same.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::erofs::{BLOCK, INODE_BYTES, SLOT, SUPERBLOCK_OFFSET, looks_whole, xattr_name};
use super::tree::{Object, Tree};
use crate::layer::LayerError;
use crate::layer::tar::Metadata;

/// Deepest directory that is read: deeper ones have paths longer than any program can use.
const DEPTH: usize = 2048;

/// A run of a file's data. What no piece covers is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where it belongs in the file.
    pub(crate) offset: u64,
    /// Where it is in the source.
    pub(crate) position: u64,
    pub(crate) length: u64,
}

/// Where a file's data is.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) source: Arc<File>,
    pub(crate) pieces: Arc<[Piece]>,
}

/// An image being read, through one block that is read again only if another is wanted.
struct Reader {
    file: Arc<File>,
    metadata: u64,
    block: Vec<u8>,
    at: u64,
}

/// One inode.
struct Node {
    kind: u16,
    size: u64,
    address: u32,
    inline: bool,
    /// Where what follows inode and attributes begins.
    tail: u64,
    metadata: Metadata,
}

/// Reads the whole tree of the image in `file` into `tree`, as one layer.
pub(crate) fn load(file: Arc<File>, tree: &mut Tree<Place>) -> Result<(), LayerError> {
    let failed = |source| LayerError::Read { source };
    if !looks_whole(&file).map_err(failed)? {
        return Err(failed(damaged()));
    }
    let mut reader = Reader { file, metadata: 0, block: vec![0; BLOCK as usize], at: u64::MAX };
    let superblock = reader.bytes(SUPERBLOCK_OFFSET as u64, 128).map_err(failed)?;
    reader.metadata = u64::from(u32_at(&superblock, 40)) * BLOCK;
    let root = u64::from(u16_at(&superblock, 14));
    tree.begin_layer();
    let mut links: BTreeMap<u64, Vec<Vec<u8>>> = BTreeMap::new();
    let mut pending = vec![(root, Vec::<Vec<u8>>::new())];
    while let Some((number, path)) = pending.pop() {
        if path.len() > DEPTH {
            return Err(failed(damaged()));
        }
        let node = reader.node(number).map_err(failed)?;
        let names = if node.kind == 0o040_000 { reader.names(&node).map_err(failed)? } else { Vec::new() };
        let parts: Vec<&[u8]> = path.iter().map(Vec::as_slice).collect();
        if let Some(first) = links.get(&number) {
            let target: Vec<&[u8]> = first.iter().map(Vec::as_slice).collect();
            tree.hard_link(&parts, &target)?;
            continue;
        }
        let (object, metadata) = reader.object(node).map_err(failed)?;
        if !matches!(object, Object::Directory) {
            links.insert(number, path.clone());
        }
        tree.insert(&parts, object, metadata)?;
        for (name, child) in names {
            let mut below = path.clone();
            below.push(name);
            pending.push((child, below));
        }
    }
    Ok(())
}

fn damaged() -> io::Error {
    io::Error::new(ErrorKind::InvalidData, "the root file system is damaged")
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from(u16_at(bytes, offset)) | u32::from(u16_at(bytes, offset + 2)) << 16
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}

impl Reader {
    /// `length` bytes from `position` on, at most one block's worth at a time from the disk.
    fn bytes(&mut self, position: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let position = position + bytes.len() as u64;
            let start = position - position % BLOCK;
            if self.at != start {
                self.file.read_exact_at(&mut self.block, start)?;
                self.at = start;
            }
            let within = (position - start) as usize;
            let count = (length - bytes.len()).min(self.block.len() - within);
            bytes.extend_from_slice(&self.block[within..within + count]);
        }
        Ok(bytes)
    }

    fn node(&mut self, number: u64) -> io::Result<Node> {
        let position = self.metadata + number * SLOT;
        let inode = self.bytes(position, INODE_BYTES as usize)?;
        let (format, xattr_count) = (u16_at(&inode, 0), u16_at(&inode, 2));
        if format & 1 != 1 {
            return Err(damaged());
        }
        let xattr_bytes = if xattr_count == 0 { 0 } else { 12 + (u64::from(xattr_count) - 1) * 4 };
        let xattrs = self.bytes(position + INODE_BYTES, xattr_bytes as usize)?;
        let mode = u16_at(&inode, 4);
        Ok(Node {
            kind: mode & 0o170_000,
            size: u64_at(&inode, 8),
            address: u32_at(&inode, 16),
            inline: format >> 1 == 2,
            tail: position + INODE_BYTES + xattr_bytes,
            metadata: Metadata {
                mode: mode & 0o7777,
                user: u32_at(&inode, 24),
                group: u32_at(&inode, 28),
                mtime: u64_at(&inode, 32).cast_signed(),
                mtime_nanoseconds: u32_at(&inode, 40),
                xattrs: xattrs_of(&xattrs)?,
            },
        })
    }

    /// Where an inode's data is: whole blocks, then what lies behind the inode.
    fn pieces(node: &Node) -> Vec<Piece> {
        let tail = if node.inline { node.size % BLOCK } else { 0 };
        let whole = node.size - tail;
        let blocks = Piece { offset: 0, position: u64::from(node.address) * BLOCK, length: whole };
        let behind = Piece { offset: whole, position: node.tail, length: tail };
        [blocks, behind].into_iter().filter(|piece| piece.length > 0).collect()
    }

    fn content(&mut self, node: &Node) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        for piece in Self::pieces(node) {
            let length = usize::try_from(piece.length).map_err(|_| damaged())?;
            content.extend(self.bytes(piece.position, length)?);
        }
        Ok(content)
    }

    fn object(&mut self, node: Node) -> io::Result<(Object<Place>, Metadata)> {
        let device = || {
            let number = node.address;
            ((number >> 8) & 0xfff, (number & 0xff) | ((number >> 12) & 0xf_ff00))
        };
        let object = match node.kind {
            0o040_000 => Object::Directory,
            0o100_000 => {
                let place = Place { source: self.file.clone(), pieces: Self::pieces(&node).into() };
                Object::File { size: node.size, data: place }
            }
            0o120_000 => Object::Symlink(self.content(&node)?),
            0o020_000 => Object::CharacterDevice { major: device().0, minor: device().1 },
            0o060_000 => Object::BlockDevice { major: device().0, minor: device().1 },
            0o010_000 => Object::Fifo,
            _ => return Err(damaged()),
        };
        Ok((object, node.metadata))
    }

    /// The names in a directory and the nodes they lead to, last first.
    fn names(&mut self, node: &Node) -> io::Result<Vec<(Vec<u8>, u64)>> {
        let content = self.content(node)?;
        let mut names = Vec::new();
        for block in content.chunks(BLOCK as usize) {
            let first = block.get(8..10).ok_or_else(damaged)?;
            let count = usize::from(u16_at(first, 0)) / 12;
            let name_at =
                |index: usize| block.get(index * 12 + 8..index * 12 + 10).map(|bytes| u16_at(bytes, 0));
            for index in 0..count {
                let start = usize::from(name_at(index).ok_or_else(damaged)?);
                let end = match index + 1 < count {
                    true => usize::from(name_at(index + 1).ok_or_else(damaged)?),
                    false => block.len(),
                };
                let name = block.get(start..end).ok_or_else(damaged)?;
                // The last name of a whole block is followed by zeros.
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                let number = u64_at(block.get(index * 12..index * 12 + 8).ok_or_else(damaged)?, 0);
                if !matches!(name, b"." | b"..") {
                    names.push((name.to_vec(), number));
                }
            }
        }
        names.reverse();
        Ok(names)
    }
}

fn xattrs_of(bytes: &[u8]) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut xattrs = BTreeMap::new();
    let mut rest = bytes.get(12..).unwrap_or_default();
    while rest.len() >= 4 {
        let (name_length, space, value_length) =
            (usize::from(rest[0]), rest[1], usize::from(u16_at(rest, 2)));
        let name = rest.get(4..4 + name_length).ok_or_else(damaged)?;
        let value = rest.get(4 + name_length..4 + name_length + value_length).ok_or_else(damaged)?;
        xattrs.insert(xattr_name(space, name).ok_or_else(damaged)?, value.to_vec());
        let used = (4 + name_length + value_length).next_multiple_of(4);
        rest = rest.get(used..).unwrap_or_default();
    }
    Ok(xattrs)
}
