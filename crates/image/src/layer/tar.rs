//! A tar reader for hostile input.
//!
//! The `tar` crate decodes header fields; the framing is here, because extension headers must be bounded before they
//! are read (a GNU long name may claim any size), PAX values may hold newlines, and the place of each member's data in
//! an archive is wanted.
//!
//! Flow: [`TarReader::next_entry`] gives an entry, [`TarReader::read`] its data; what is not read is skipped.

use std::collections::BTreeMap;
use std::io::{self, Read};

use tar::{EntryType, Header};

use super::LayerError;
use super::error::printable;
use super::pax::{Pax, number};
use crate::limits::{EXTENSION_BYTES, PATH_BYTES, SPARSE_EXTENTS};

const BLOCK: usize = 512;

/// Bytes to parse, and a way past those that are not wanted.
pub(crate) trait Input: Read {
    /// Passes over `count` bytes; fails with `UnexpectedEof` if they are not there.
    fn skip(&mut self, count: u64) -> io::Result<()>;
}

/// A stream that can only be read.
pub(crate) struct Stream<R>(pub(crate) R);

impl<R: Read> Read for Stream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read> Input for Stream<R> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let skipped = io::copy(&mut (&mut self.0).take(count), &mut io::sink())?;
        if skipped < count { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }
}

/// One entry of a tar.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// As written: neither normalised nor checked.
    pub(crate) name: Vec<u8>,
    pub(crate) kind: EntryKind,
    pub(crate) metadata: Metadata,
}

/// Owner, mode, time and extended attributes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// The twelve permission bits.
    pub mode: u16,
    /// Owner.
    pub user: u32,
    /// Group.
    pub group: u32,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds besides.
    pub mtime_nanoseconds: u32,
    /// Extended attributes by full name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What an entry is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// A file of `size` bytes; data is present only for the extents, in order, the rest is zero.
    File {
        size: u64,
        extents: Vec<Extent>,
        sparse: bool,
    },
    Directory,
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    CharacterDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// A run of data within a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// Reads a tar, entry by entry.
pub(crate) struct TarReader<I> {
    input: I,
    position: u64,
    /// Data of the current entry that was not read yet.
    remaining: u64,
    padding: u64,
    ended: bool,
}

/// The extension headers before an entry.
#[derive(Default)]
struct Extensions {
    pax: Option<Pax>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<I: Input> TarReader<I> {
    pub(crate) fn new(input: I) -> Self {
        Self { input, position: 0, remaining: 0, padding: 0, ended: false }
    }

    /// The next entry, or `None` at the end.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, LayerError> {
        let mut extensions = Extensions::default();
        while let Some(header) = self.next_header()? {
            match header.entry_type() {
                EntryType::XHeader => extensions.pax = Some(Pax::parse(&self.extension()?)?),
                EntryType::GNULongName => extensions.long_name = Some(until_zero(self.extension()?)),
                EntryType::GNULongLink => extensions.long_link = Some(until_zero(self.extension()?)),
                // Comments of a whole archive and volume labels say nothing about files.
                EntryType::XGlobalHeader => {}
                kind if kind.as_byte() == b'V' => {}
                _ => return self.entry(&header, extensions).map(Some),
            }
        }
        Ok(None)
    }

    /// Where the current entry's data starts in the stream, and how long it is; only before it is read.
    pub(crate) fn data_range(&self) -> (u64, u64) {
        (self.position, self.remaining)
    }

    /// Data of the current entry: whole runs of its extents, without the holes.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        let wanted = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let read = loop {
            match self.input.read(&mut buffer[..wanted]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result.map_err(|source| self.failed(source))?,
            }
        };
        if read == 0 {
            return Err(self.truncated());
        }
        self.position += read as u64;
        self.remaining -= read as u64;
        Ok(read)
    }

    /// Gives the input back, for what follows the tar's end.
    pub(crate) fn into_input(self) -> I {
        self.input
    }

    fn next_header(&mut self) -> Result<Option<Header>, LayerError> {
        self.skip_rest()?;
        if self.ended {
            return Ok(None);
        }
        let mut block = [0; BLOCK];
        let filled = self.fill(&mut block)?;
        if filled == 0 || (filled == BLOCK && block.iter().all(|byte| *byte == 0)) {
            self.ended = true;
            return Ok(None);
        }
        if filled < BLOCK {
            return Err(self.truncated());
        }
        let header = Header::from_byte_slice(&block).clone();
        if !checksum_holds(&header, &block) {
            return Err(self.invalid("the header's checksum does not hold"));
        }
        let size = header.entry_size().map_err(|_| self.invalid("the size is not a number"))?;
        self.set_size(size)?;
        Ok(Some(header))
    }

    fn set_size(&mut self, size: u64) -> Result<(), LayerError> {
        // No file system holds more, and sums stay far from overflow.
        if size > i64::MAX as u64 / 2 {
            return Err(self.invalid("the size is out of range"));
        }
        self.remaining = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
    }

    fn skip_rest(&mut self) -> Result<(), LayerError> {
        let count = self.remaining + self.padding;
        if count > 0 {
            self.input.skip(count).map_err(|source| self.failed(source))?;
        }
        self.position += count;
        (self.remaining, self.padding) = (0, 0);
        Ok(())
    }

    /// The whole data of an extension header, bounded before a byte of it is held.
    fn extension(&mut self) -> Result<Vec<u8>, LayerError> {
        if self.remaining > EXTENSION_BYTES {
            return Err(self.invalid("an extension header is larger than 1 MiB"));
        }
        let mut data = Vec::new();
        let mut buffer = [0; 4096];
        while self.remaining > 0 {
            let read = self.read(&mut buffer)?;
            data.extend_from_slice(&buffer[..read]);
        }
        Ok(data)
    }

    fn entry(&mut self, header: &Header, extensions: Extensions) -> Result<Entry, LayerError> {
        let mut pax = extensions.pax.unwrap_or_default();
        let name = pax
            .sparse
            .name
            .take()
            .or(pax.path.take())
            .or(extensions.long_name)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = pax
            .link_path
            .take()
            .or(extensions.long_link)
            .or_else(|| header.link_name_bytes().map(|link| link.into_owned()))
            .unwrap_or_default();
        let metadata = metadata(header, &mut pax, &name)?;
        let kind = self.kind(header, &pax, &name, link)?;
        Ok(Entry { name, kind, metadata })
    }

    fn kind(
        &mut self,
        header: &Header,
        pax: &Pax,
        name: &[u8],
        link: Vec<u8>,
    ) -> Result<EntryKind, LayerError> {
        let kind = header.entry_type();
        if kind.is_file() && name.ends_with(b"/") {
            // How tars of before 1988 write a directory.
            self.set_size(0)?;
            return Ok(EntryKind::Directory);
        }
        match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => self.file(header, pax, name),
            _ => {
                // Other kinds have no data, whatever the size field says.
                self.set_size(0)?;
                special(header, kind, name, link)
            }
        }
    }

    fn file(&mut self, header: &Header, pax: &Pax, name: &[u8]) -> Result<EntryKind, LayerError> {
        if let Some(size) = pax.size {
            self.set_size(size)?;
        }
        let (size, extents) = if header.entry_type().is_gnu_sparse() {
            let size = header.size().map_err(|_| LayerError::invalid(name, "the size is not a number"))?;
            (size, self.gnu_extents(header, name)?)
        } else if pax.sparse.major == Some(1) {
            let size = pax.sparse.real_size.unwrap_or(0);
            (size, pairs(&self.leading_map(name)?, name)?)
        } else if let (Some(size), false) = (pax.sparse.real_size, pax.sparse.numbers.is_empty()) {
            (size, pairs(&pax.sparse.numbers, name)?)
        } else {
            let size = self.remaining;
            let extents = vec![Extent { offset: 0, length: size }];
            return Ok(EntryKind::File { size, extents, sparse: false });
        };
        check_extents(size, self.remaining, &extents).map_err(|reason| LayerError::invalid(name, reason))?;
        Ok(EntryKind::File { size, extents, sparse: true })
    }

    /// The map in an old GNU header and in the extension blocks right after it.
    fn gnu_extents(&mut self, header: &Header, name: &[u8]) -> Result<Vec<Extent>, LayerError> {
        let invalid = || LayerError::invalid(name, "malformed map of a sparse file");
        let gnu = header.as_gnu().ok_or_else(invalid)?;
        let mut extents = Vec::new();
        for sparse in &gnu.sparse {
            push_extent(&mut extents, sparse).ok_or_else(invalid)?;
        }
        let mut more = gnu.is_extended();
        while more {
            let mut extended = tar::GnuExtSparseHeader::new();
            if self.fill(extended.as_mut_bytes())? < BLOCK {
                return Err(self.truncated());
            }
            for sparse in &extended.sparse {
                push_extent(&mut extents, sparse).ok_or_else(invalid)?;
            }
            if extents.len() > SPARSE_EXTENTS {
                return Err(LayerError::invalid(name, "too many extents of a sparse file"));
            }
            more = extended.is_extended();
        }
        Ok(extents)
    }

    /// The map of PAX version 1.0: decimal lines at the head of the data, filled up to a whole block.
    fn leading_map(&mut self, name: &[u8]) -> Result<Vec<u64>, LayerError> {
        let mut numbers = Vec::new();
        let mut line = Vec::new();
        let mut block = [0; BLOCK];
        let mut wanted = 1;
        while numbers.len() < wanted {
            let mut filled = 0;
            while filled < BLOCK {
                match self.read(&mut block[filled..])? {
                    0 => return Err(LayerError::invalid(name, "malformed map of a sparse file")),
                    read => filled += read,
                }
            }
            for byte in block {
                if numbers.len() == wanted {
                    break;
                }
                if byte != b'\n' && line.len() < 20 {
                    line.push(byte);
                    continue;
                }
                numbers.push(number(&line)?);
                line.clear();
                if numbers.len() == 1 {
                    let count = usize::try_from(numbers[0]).unwrap_or(usize::MAX);
                    if count > SPARSE_EXTENTS {
                        return Err(LayerError::invalid(name, "too many extents of a sparse file"));
                    }
                    wanted += 2 * count;
                }
            }
        }
        numbers.remove(0);
        Ok(numbers)
    }

    /// Fills the buffer from the stream as far as it goes.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.input.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.failed(source)),
            }
        }
        self.position += filled as u64;
        Ok(filled)
    }

    fn failed(&self, source: io::Error) -> LayerError {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            return self.truncated();
        }
        LayerError::Read { source }
    }

    fn truncated(&self) -> LayerError {
        LayerError::Truncated { place: format!("in an entry at byte {}", self.position) }
    }

    fn invalid(&self, reason: &'static str) -> LayerError {
        LayerError::InvalidEntry { entry: format!("at byte {}", self.position), reason }
    }
}

fn metadata(header: &Header, pax: &mut Pax, name: &[u8]) -> Result<Metadata, LayerError> {
    let invalid = |reason| move |_| LayerError::invalid(name, reason);
    let id = |given: Option<u64>, field: io::Result<u64>| -> Result<u32, LayerError> {
        let id = match given {
            Some(id) => id,
            None => field.map_err(invalid("an owner is not a number"))?,
        };
        u32::try_from(id).map_err(|_| LayerError::invalid(name, "an owner is out of range"))
    };
    let (mtime, mtime_nanoseconds) = match pax.mtime {
        Some(time) => time,
        None => (header.mtime().map_err(invalid("the time is not a number"))?.cast_signed(), 0),
    };
    Ok(Metadata {
        mode: (header.mode().map_err(invalid("the mode is not a number"))? & 0o7777) as u16,
        user: id(pax.user, header.uid())?,
        group: id(pax.group, header.gid())?,
        mtime,
        mtime_nanoseconds,
        xattrs: std::mem::take(&mut pax.xattrs),
    })
}

fn special(header: &Header, kind: EntryType, name: &[u8], link: Vec<u8>) -> Result<EntryKind, LayerError> {
    match kind {
        EntryType::Directory => Ok(EntryKind::Directory),
        EntryType::Fifo => Ok(EntryKind::Fifo),
        EntryType::Symlink if link.is_empty() || link.len() > PATH_BYTES || link.contains(&0) => {
            Err(LayerError::invalid(name, "bad target of a symbolic link"))
        }
        EntryType::Symlink => Ok(EntryKind::Symlink(link)),
        EntryType::Link => Ok(EntryKind::HardLink(link)),
        EntryType::Char | EntryType::Block => {
            let number = |field: io::Result<Option<u32>>| field.ok().flatten();
            let device = number(header.device_major()).zip(number(header.device_minor()));
            let (major, minor) = device
                .filter(|(major, minor)| *major < 1 << 12 && *minor < 1 << 20)
                .ok_or_else(|| LayerError::invalid(name, "bad device number"))?;
            Ok(match kind {
                EntryType::Char => EntryKind::CharacterDevice { major, minor },
                _ => EntryKind::BlockDevice { major, minor },
            })
        }
        _ => Err(LayerError::UnsupportedEntry { entry: printable(name), kind: char::from(kind.as_byte()) }),
    }
}

fn push_extent(extents: &mut Vec<Extent>, sparse: &tar::GnuSparseHeader) -> Option<()> {
    if !sparse.is_empty() {
        extents.push(Extent { offset: sparse.offset().ok()?, length: sparse.length().ok()? });
    }
    Some(())
}

fn pairs(numbers: &[u64], name: &[u8]) -> Result<Vec<Extent>, LayerError> {
    let (pairs, rest) = numbers.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(LayerError::invalid(name, "malformed map of a sparse file"));
    }
    Ok(pairs.iter().map(|[offset, length]| Extent { offset: *offset, length: *length }).collect())
}

/// Extents must ascend, stay within the file and account for exactly the data present.
fn check_extents(size: u64, data: u64, extents: &[Extent]) -> Result<(), &'static str> {
    let mut end = 0;
    let mut sum = 0;
    for extent in extents {
        if extent.offset < end {
            return Err("the extents of a sparse file overlap");
        }
        end = extent.offset.checked_add(extent.length).ok_or("an extent of a sparse file is out of range")?;
        sum += extent.length;
    }
    if end > size || size > i64::MAX as u64 / 2 {
        return Err("an extent of a sparse file is out of range");
    }
    if sum == data { Ok(()) } else { Err("a sparse file's extents and data differ in length") }
}

fn checksum_holds(header: &Header, block: &[u8; BLOCK]) -> bool {
    let sum: u32 = block[..148].iter().chain(&block[156..]).map(|byte| u32::from(*byte)).sum();
    // A fuzzer would spend its time on sums otherwise.
    cfg!(fuzzing) || header.cksum().is_ok_and(|stated| stated == sum + 8 * u32::from(b' '))
}

fn until_zero(mut data: Vec<u8>) -> Vec<u8> {
    if let Some(end) = data.iter().position(|byte| *byte == 0) {
        data.truncate(end);
    }
    data
}
