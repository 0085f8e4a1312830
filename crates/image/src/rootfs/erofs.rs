//! Writes the metadata of an EROFS image: superblock, directories, inodes.
//!
//! The image, in blocks of 4096 bytes:
//! ```text
//! 0                superblock, at byte 1024
//! 1 ..             whole blocks of files, as the layers brought them
//! then             whole blocks of directories, and symbolic links too long for an inode
//! meta_blkaddr ..  inodes, each followed by its extended attributes and its tail; a directory's before its files'
//! ```
//! All inodes are of the extended kind (64 bytes): only those hold times, 32-bit owners and sizes beyond 4 GiB. Data
//! is flat; the tail lies inline where it fits. Same layers, same bytes: no time and no randomness enters.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use super::directory::{self, Name};
use super::tree::{Inode, InodeId, Kind, ROOT, Tree};

/// Bytes in a block.
pub(crate) const BLOCK: u64 = 4096;
/// Bytes of an inode without what follows it.
pub(crate) const INODE_BYTES: u64 = 64;
/// The unit in which nodes are numbered.
pub(super) const SLOT: u64 = 32;
/// Changed whenever the same layers would give another image: part of the cache's key.
pub(crate) const FORMAT_VERSION: u32 = 1;

const MAGIC: u32 = 0xE0F5_E1E2;
pub(super) const SUPERBLOCK_OFFSET: usize = 1024;
const FEATURE_CHECKSUM: u32 = 1;
const FEATURE_MTIME: u32 = 2;
const EXTENDED: u16 = 1;
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
/// No block: what `mkfs.erofs` writes for an inode without data.
const NO_BLOCK: u32 = u32::MAX;

/// Block addresses have 32 bits.
pub(crate) fn block_address(block: u64) -> io::Result<u32> {
    u32::try_from(block).ok().filter(|block| *block != NO_BLOCK).ok_or_else(|| {
        io::Error::new(io::ErrorKind::FileTooLarge, "the root file system would be larger than 16 TiB")
    })
}

/// Name spaces of extended attributes, as EROFS numbers them.
const SPACES: [(u8, &[u8]); 4] = [(1, b"user."), (4, b"trusted."), (5, b"lustre."), (6, b"security.")];

/// The full name of an extended attribute.
pub(super) fn xattr_name(space: u8, rest: &[u8]) -> Option<Vec<u8>> {
    match space {
        2 => Some(b"system.posix_acl_access".to_vec()),
        3 => Some(b"system.posix_acl_default".to_vec()),
        _ => SPACES.iter().find(|(index, _)| *index == space).map(|(_, prefix)| [prefix, rest].concat()),
    }
}

/// The name space of an extended attribute, as EROFS numbers it, and the rest of its name.
pub(crate) fn xattr_prefix(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        _ => SPACES.iter().find_map(|(index, space)| {
            name.strip_prefix(*space).filter(|rest| !rest.is_empty()).map(|rest| (*index, rest))
        }),
    }
}

/// What a set of extended attributes takes behind an inode.
pub(crate) fn xattr_bytes(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> u64 {
    if xattrs.is_empty() {
        return 0;
    }
    let entry = |(name, value): (&Vec<u8>, &Vec<u8>)| {
        let rest = xattr_prefix(name).map_or(0, |(_, rest)| rest.len());
        (4 + rest + value.len()).next_multiple_of(4) as u64
    };
    12 + xattrs.iter().map(entry).sum::<u64>()
}

/// Where everything will lie.
struct Plan {
    /// Node numbers by inode; 0 for inodes that nothing names.
    nodes: Vec<u32>,
    /// First whole block of directories and long symbolic links.
    blocks: BTreeMap<InodeId, u32>,
    /// Live inodes in the order of the disk, each with its parent directory (its own, for other kinds).
    order: Vec<(InodeId, InodeId)>,
    metadata_block: u32,
    end_block: u32,
}

/// How an inode's content is split.
#[derive(Clone, Copy)]
struct Shape {
    size: u64,
    xattr_bytes: u64,
    /// Bytes behind the inode.
    tail: u64,
}

impl Shape {
    fn of(tree: &Tree, inode: &Inode) -> Self {
        let xattr_bytes = xattr_bytes(&inode.xattrs);
        let fit = |size: u64| {
            let tail = size % BLOCK;
            if INODE_BYTES + xattr_bytes + tail <= BLOCK { tail } else { 0 }
        };
        let (size, tail) = match &inode.kind {
            Kind::File { size, data } => (*size, data.tail.map_or(0, |_| size % BLOCK)),
            Kind::Directory(index) => {
                let size = directory::size(&tree.directories[*index as usize].children);
                (size, fit(size))
            }
            Kind::Symlink(target) => (target.len() as u64, fit(target.len() as u64)),
            _ => (0, 0),
        };
        Self { size, xattr_bytes, tail }
    }

    fn whole_blocks(&self) -> u64 {
        (self.size - self.tail).div_ceil(BLOCK)
    }

    fn slot_bytes(&self) -> u64 {
        INODE_BYTES + self.xattr_bytes + self.tail
    }
}

/// Writes everything but file data into `image`, whose data ends before block `first_free`. `spool` holds the tails.
pub(crate) fn write_metadata(
    tree: &Tree,
    image: &File,
    spool: &File,
    first_free: u64,
    uuid: [u8; 16],
) -> io::Result<()> {
    let plan = Plan::make(tree, first_free)?;
    let mut writer = PositionedWriter::new(image, first_free * BLOCK)?;
    for (inode, parent) in &plan.order {
        write_whole_blocks(tree, &plan, *inode, *parent, &mut writer)?;
    }
    writer.pad_to(u64::from(plan.metadata_block) * BLOCK)?;
    for (number, (inode, parent)) in plan.order.iter().enumerate() {
        write_inode(tree, &plan, *inode, *parent, number, spool, &mut writer)?;
    }
    writer.pad_to(u64::from(plan.end_block) * BLOCK)?;
    writer.finish()?;
    image.write_all_at(&superblock(&plan, uuid), 0)
}

impl Plan {
    fn make(tree: &Tree, first_free: u64) -> io::Result<Self> {
        let order = order(tree);
        let mut blocks = BTreeMap::new();
        let mut next_block = first_free;
        for (id, _) in &order {
            let inode = &tree.inodes[*id as usize];
            let whole = Shape::of(tree, inode).whole_blocks();
            if whole > 0 && !matches!(inode.kind, Kind::File { .. }) {
                blocks.insert(*id, block_address(next_block)?);
                next_block += whole;
            }
        }
        let metadata_block = block_address(next_block)?;
        let mut nodes = vec![0; tree.inodes.len()];
        // The first slot stays free: a node number 0 would be an inode number 0, which means "deleted" to readdir.
        let mut position = SLOT;
        for (id, _) in &order {
            let bytes = Shape::of(tree, &tree.inodes[*id as usize]).slot_bytes();
            position = place(position, bytes);
            nodes[*id as usize] = u32::try_from(position / SLOT)
                .map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, "too many inodes"))?;
            position += bytes;
        }
        let end_block = block_address(next_block + position.div_ceil(BLOCK))?;
        Ok(Self { nodes, blocks, order, metadata_block, end_block })
    }
}

/// The next place for a slot of `bytes`: it crosses no block if it can help it, for a tail must not.
fn place(position: u64, bytes: u64) -> u64 {
    let position = position.next_multiple_of(SLOT);
    let within = position % BLOCK;
    if within != 0 && within + bytes > BLOCK { position - within + BLOCK } else { position }
}

/// Live inodes, once each: a directory, its other children, then its subdirectories, deep first.
fn order(tree: &Tree) -> Vec<(InodeId, InodeId)> {
    let mut seen = vec![false; tree.inodes.len()];
    let mut order = Vec::new();
    let mut pending = vec![(ROOT, ROOT)];
    while let Some((directory, parent)) = pending.pop() {
        order.push((directory, parent));
        let first = pending.len();
        for link in tree.children(directory).into_iter().flat_map(|children| children.values()) {
            if matches!(tree.inodes[link.inode as usize].kind, Kind::Directory(_)) {
                pending.push((link.inode, directory));
            } else if !std::mem::replace(&mut seen[link.inode as usize], true) {
                order.push((link.inode, link.inode));
            }
        }
        pending[first..].reverse();
    }
    order
}

/// Directory content, block by block.
fn directory_blocks<'a>(
    tree: &'a Tree,
    plan: &'a Plan,
    index: u32,
    inode: InodeId,
    parent: InodeId,
) -> impl Iterator<Item = Vec<u8>> + 'a {
    directory::blocks(&tree.directories[index as usize].children, move |name| {
        let target = match name {
            Name::This => inode,
            Name::Parent => parent,
            Name::Child(_, link) => link.inode,
        };
        (u64::from(plan.nodes[target as usize]), file_type(&tree.inodes[target as usize].kind))
    })
}

fn write_whole_blocks(
    tree: &Tree,
    plan: &Plan,
    id: InodeId,
    parent: InodeId,
    writer: &mut PositionedWriter,
) -> io::Result<()> {
    let Some(start) = plan.blocks.get(&id) else { return Ok(()) };
    let inode = &tree.inodes[id as usize];
    let whole = Shape::of(tree, inode).whole_blocks();
    match &inode.kind {
        Kind::Directory(index) => {
            // Whole blocks only: what is left is the tail, which follows the inode.
            let whole = usize::try_from(whole).unwrap_or(usize::MAX);
            for block in directory_blocks(tree, plan, *index, id, parent).take(whole) {
                writer.write(&block)?;
            }
        }
        Kind::Symlink(target) => writer.write(target)?,
        _ => {}
    }
    writer.pad_to((u64::from(*start) + whole) * BLOCK)
}

fn write_inode(
    tree: &Tree,
    plan: &Plan,
    id: InodeId,
    parent: InodeId,
    number: usize,
    spool: &File,
    writer: &mut PositionedWriter,
) -> io::Result<()> {
    let inode = &tree.inodes[id as usize];
    let shape = Shape::of(tree, inode);
    let position = u64::from(plan.metadata_block) * BLOCK + u64::from(plan.nodes[id as usize]) * SLOT;
    writer.pad_to(position)?;
    writer.write(&inode_record(tree, plan, id, number, shape))?;
    write_xattrs(&inode.xattrs, writer)?;
    if shape.tail == 0 {
        return Ok(());
    }
    match &inode.kind {
        Kind::File { data, .. } => {
            let mut tail = [0; BLOCK as usize];
            let tail = &mut tail[..shape.tail as usize];
            spool.read_exact_at(tail, data.tail.unwrap_or(0))?;
            writer.write(tail)
        }
        Kind::Directory(index) => match directory_blocks(tree, plan, *index, id, parent).last() {
            Some(block) => writer.write(&block),
            None => Ok(()),
        },
        Kind::Symlink(target) => writer.write(target),
        _ => Ok(()),
    }
}

fn inode_record(tree: &Tree, plan: &Plan, id: InodeId, number: usize, shape: Shape) -> Vec<u8> {
    let inode = &tree.inodes[id as usize];
    let layout = if shape.tail > 0 { FLAT_INLINE } else { FLAT_PLAIN };
    let xattr_count = if shape.xattr_bytes == 0 { 0 } else { (shape.xattr_bytes - 12) / 4 + 1 };
    let (type_bits, address) = match &inode.kind {
        Kind::File { data, .. } if shape.whole_blocks() > 0 => (0o100_000, data.first_block),
        Kind::File { .. } => (0o100_000, NO_BLOCK),
        Kind::Directory(_) => (0o040_000, plan.blocks.get(&id).copied().unwrap_or(NO_BLOCK)),
        Kind::Symlink(_) => (0o120_000, plan.blocks.get(&id).copied().unwrap_or(NO_BLOCK)),
        Kind::CharacterDevice { major, minor } => (0o020_000, device(*major, *minor)),
        Kind::BlockDevice { major, minor } => (0o060_000, device(*major, *minor)),
        Kind::Fifo => (0o010_000, 0),
    };
    let mut record = Vec::with_capacity(INODE_BYTES as usize);
    record.extend_from_slice(&(EXTENDED | layout << 1).to_le_bytes());
    // Fits: attributes are bounded to 128 KiB.
    record.extend_from_slice(&(xattr_count as u16).to_le_bytes());
    record.extend_from_slice(&(type_bits | inode.mode).to_le_bytes());
    record.extend_from_slice(&[0; 2]);
    record.extend_from_slice(&shape.size.to_le_bytes());
    record.extend_from_slice(&address.to_le_bytes());
    record.extend_from_slice(&(number as u32 + 1).to_le_bytes());
    record.extend_from_slice(&inode.user.to_le_bytes());
    record.extend_from_slice(&inode.group.to_le_bytes());
    record.extend_from_slice(&inode.mtime.to_le_bytes());
    record.extend_from_slice(&inode.mtime_nanoseconds.to_le_bytes());
    record.extend_from_slice(&link_count(tree, id).to_le_bytes());
    record.extend_from_slice(&[0; 16]);
    record
}

/// Names of a file; for a directory its own two and one for each subdirectory, as everywhere on Unix.
fn link_count(tree: &Tree, id: InodeId) -> u32 {
    match tree.children(id) {
        None => tree.inodes[id as usize].links,
        Some(children) => {
            let is_directory =
                |inode: InodeId| matches!(tree.inodes[inode as usize].kind, Kind::Directory(_));
            2 + children.values().filter(|link| is_directory(link.inode)).count() as u32
        }
    }
}

fn write_xattrs(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>, writer: &mut PositionedWriter) -> io::Result<()> {
    if xattrs.is_empty() {
        return Ok(());
    }
    writer.write(&[0; 12])?;
    for (name, value) in xattrs {
        let (index, rest) = xattr_prefix(name).unwrap_or((0, b""));
        // Fits: names have at most 255 bytes, values 65535.
        let mut entry = vec![rest.len() as u8, index];
        entry.extend_from_slice(&(value.len() as u16).to_le_bytes());
        entry.extend_from_slice(rest);
        entry.extend_from_slice(value);
        entry.resize(entry.len().next_multiple_of(4), 0);
        writer.write(&entry)?;
    }
    Ok(())
}

fn file_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File { .. } => 1,
        Kind::Directory(_) => 2,
        Kind::CharacterDevice { .. } => 3,
        Kind::BlockDevice { .. } => 4,
        Kind::Fifo => 5,
        Kind::Symlink(_) => 7,
    }
}

/// A device number as Linux writes it to disks.
fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The first block.
fn superblock(plan: &Plan, uuid: [u8; 16]) -> Vec<u8> {
    let mut block = vec![0; BLOCK as usize];
    let mut put = |offset: usize, bytes: &[u8]| {
        block[SUPERBLOCK_OFFSET + offset..SUPERBLOCK_OFFSET + offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, &MAGIC.to_le_bytes());
    put(8, &(FEATURE_CHECKSUM | FEATURE_MTIME).to_le_bytes());
    put(12, &[BLOCK.trailing_zeros() as u8]);
    // Fits: the root's slot is the second of all.
    put(14, &(plan.nodes[ROOT as usize] as u16).to_le_bytes());
    put(16, &(plan.order.len() as u64).to_le_bytes());
    put(36, &plan.end_block.to_le_bytes());
    put(40, &plan.metadata_block.to_le_bytes());
    put(48, &uuid);
    let checksum = checksum(&block[SUPERBLOCK_OFFSET..]);
    block[SUPERBLOCK_OFFSET + 4..SUPERBLOCK_OFFSET + 8].copy_from_slice(&checksum.to_le_bytes());
    block
}

/// CRC-32C without the final inversion, as the kernel computes it here.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0x82F6_3B78 & (sum & 1).wrapping_neg()))
    })
}

/// Whether `image` is whole: its superblock is sound and speaks of as many blocks as there are.
pub(crate) fn looks_whole(image: &File) -> io::Result<bool> {
    let mut block = [0; BLOCK as usize];
    if image.metadata()?.len() < BLOCK {
        return Ok(false);
    }
    image.read_exact_at(&mut block, 0)?;
    let stored = read_u32(&block, SUPERBLOCK_OFFSET + 4);
    block[SUPERBLOCK_OFFSET + 4..SUPERBLOCK_OFFSET + 8].fill(0);
    let blocks = u64::from(read_u32(&block, SUPERBLOCK_OFFSET + 36));
    Ok(read_u32(&block, SUPERBLOCK_OFFSET) == MAGIC
        && stored == checksum(&block[SUPERBLOCK_OFFSET..])
        && image.metadata()?.len() == blocks * BLOCK)
}

fn read_u32(block: &[u8], offset: usize) -> u32 {
    block[offset..offset + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// Buffered writing from a place on, with its position known.
struct PositionedWriter {
    inner: BufWriter<File>,
    position: u64,
}

impl PositionedWriter {
    fn new(file: &File, position: u64) -> io::Result<Self> {
        let mut file = file.try_clone()?;
        file.seek(SeekFrom::Start(position))?;
        Ok(Self { inner: BufWriter::with_capacity(1 << 20, file), position })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.position += bytes.len() as u64;
        self.inner.write_all(bytes)
    }

    fn pad_to(&mut self, target: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];
        while self.position < target {
            let count = (target - self.position).min(BLOCK);
            self.write(&ZEROS[..count as usize])?;
        }
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
