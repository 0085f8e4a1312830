//! Where file data goes while layers are read.
//!
//! Whole blocks are appended to the image file as they come. The last, partial block of a file is spooled: it will lie
//! beside the file's inode, whose place is known only at the end. Nothing is held in memory but two buffers.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::erofs::{BLOCK, INODE_BYTES, block_address};
use super::tree::{Data, DeadData};
use crate::layer::LayerError;
use crate::layer::tar::{Extent, Input, TarReader};

const BUFFER: usize = 1 << 20;
/// Holes of sparse files from this size on are left out of the image file.
const HOLE: u64 = 64 << 10;
/// Longer tails get a block of their own: packed beside inodes they would leave more waste than they save.
const TAIL: u64 = 2048;

/// Takes the data of files.
pub(crate) trait FileSink {
    /// How a file's data is found again.
    type Data: Clone;

    /// Stores the current entry's data; `xattr_bytes` is what lies between its inode and its tail.
    fn store<I: Input>(
        &mut self,
        reader: &mut TarReader<I>,
        file: &FileShape<'_>,
        xattr_bytes: u64,
    ) -> Result<Self::Data, LayerError>;

    /// Gives back the space of data that nothing refers to any more.
    fn discard(&mut self, dead: DeadData<Self::Data>) -> Result<(), LayerError>;
}

/// A file's size and where its data lies.
pub(crate) struct FileShape<'a> {
    pub(crate) size: u64,
    pub(crate) extents: &'a [Extent],
    pub(crate) sparse: bool,
}

impl FileShape<'_> {
    /// How many bytes at the end wait for their inode.
    fn tail(&self, xattr_bytes: u64) -> u64 {
        let tail = self.size % BLOCK;
        let fits = tail <= TAIL && INODE_BYTES + xattr_bytes + tail <= BLOCK;
        if self.sparse || !fits { 0 } else { tail }
    }
}

/// The image file and its spool.
pub(crate) struct ImageOutput {
    image: Appender,
    spool: Appender,
}

impl ImageOutput {
    /// `image` is written from its second block on; `spool` is scratch.
    pub(crate) fn new(image: File, spool: File) -> Self {
        Self { image: Appender::new(image, BLOCK), spool: Appender::new(spool, 0) }
    }

    /// Ends the data: the image and the spool, and the image's first free block.
    pub(crate) fn finish(mut self) -> io::Result<(File, File, u64)> {
        self.image.flush()?;
        self.spool.flush()?;
        let end = self.image.position;
        Ok((self.image.file, self.spool.file, end / BLOCK))
    }
}

impl FileSink for ImageOutput {
    type Data = Data;

    fn store<I: Input>(
        &mut self,
        reader: &mut TarReader<I>,
        file: &FileShape<'_>,
        xattr_bytes: u64,
    ) -> Result<Data, LayerError> {
        let tail = file.tail(xattr_bytes);
        let start = self.image.position();
        let first_block = block_address(start / BLOCK).map_err(|source| LayerError::Write { source })?;
        let end = start + (file.size - tail).next_multiple_of(BLOCK);
        for extent in file.extents {
            self.image.skip_to(start + extent.offset).map_err(|source| LayerError::Write { source })?;
            // A tail is only ever split off a file of one extent.
            self.image.copy(reader, extent.length - tail)?;
        }
        self.image.skip_to(end).map_err(|source| LayerError::Write { source })?;
        let spooled = self.spool.position();
        self.spool.copy(reader, tail)?;
        Ok(Data { first_block, tail: (tail > 0).then_some(spooled) })
    }

    fn discard(&mut self, dead: DeadData) -> Result<(), LayerError> {
        let length = match dead.data.tail {
            Some(_) => dead.size - dead.size % BLOCK,
            None => dead.size.next_multiple_of(BLOCK),
        };
        self.image
            .punch(u64::from(dead.data.first_block) * BLOCK, length)
            .map_err(|source| LayerError::Write { source })
    }
}

/// A file written in order, through one buffer.
struct Appender {
    file: File,
    buffer: Vec<u8>,
    filled: usize,
    /// Where the buffer's first byte belongs.
    position: u64,
}

impl Appender {
    fn new(file: File, position: u64) -> Self {
        Self { file, buffer: vec![0; BUFFER], filled: 0, position }
    }

    fn position(&self) -> u64 {
        self.position + self.filled as u64
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer[..self.filled], self.position)?;
        self.position += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    /// Moves on to `target`, leaving zeros.
    fn skip_to(&mut self, target: u64) -> io::Result<()> {
        let mut gap = target.saturating_sub(self.position());
        if gap >= HOLE {
            self.flush()?;
            self.position = target;
            return Ok(());
        }
        while gap > 0 {
            if self.filled == BUFFER {
                self.flush()?;
            }
            let count = usize::try_from(gap).unwrap_or(BUFFER).min(BUFFER - self.filled);
            self.buffer[self.filled..self.filled + count].fill(0);
            self.filled += count;
            gap -= count as u64;
        }
        Ok(())
    }

    /// Appends exactly `length` bytes of the reader's current entry.
    fn copy<I: Input>(&mut self, reader: &mut TarReader<I>, mut length: u64) -> Result<(), LayerError> {
        while length > 0 {
            if self.filled == BUFFER {
                self.flush().map_err(|source| LayerError::Write { source })?;
            }
            let room = usize::try_from(length).unwrap_or(BUFFER).min(BUFFER - self.filled);
            let read = reader.read(&mut self.buffer[self.filled..self.filled + room])?;
            if read == 0 {
                return Err(LayerError::Truncated { place: "in a file".into() });
            }
            self.filled += read;
            length -= read as u64;
        }
        Ok(())
    }

    /// Frees a run of bytes; they read as zeros from then on.
    fn punch(&mut self, offset: u64, length: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        if length == 0 {
            return Ok(());
        }
        self.flush()?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, offset, length) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => self.zero(offset, length),
            result => Ok(result?),
        }
    }

    /// What punching means on a file system without holes: the image's bytes stay the same everywhere.
    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let zeros = vec![0; BUFFER];
        let end = offset + length;
        let mut position = offset;
        while position < end {
            let count = usize::try_from(end - position).unwrap_or(BUFFER).min(BUFFER);
            self.file.write_all_at(&zeros[..count], position)?;
            position += count as u64;
        }
        Ok(())
    }
}
