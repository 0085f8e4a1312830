//! Where an image's parts are: files below a directory, or members of an archive that is never unpacked.
//!
//! A directory is hostile: files are opened relative to it with `openat2`, which refuses every link and every way out.
//! An archive is read through its members' places; names in it are only ever compared.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

use super::LayoutError;
use crate::error::{ImageError, out_of_space};
use crate::layer::LayerError;
use crate::layer::path::components;
use crate::layer::pump::{Compression, Decoder, copy_bounded};
use crate::layer::tar::{EntryKind, Input, TarReader};
use crate::limits::{ARCHIVE_MEMBERS, Limits};

/// A run of bytes in a file: a blob.
#[derive(Debug, Clone)]
pub(crate) struct Section {
    file: Arc<File>,
    offset: u64,
    length: u64,
}

impl Section {
    pub(crate) fn whole(file: Arc<File>) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { file, offset: 0, length })
    }

    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    pub(crate) fn reader(&self) -> io::Result<SectionReader> {
        // Cut short since it was found: told here, before any of it is used.
        if self.file.metadata()?.len() < self.offset + self.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(SectionReader { section: self.clone(), position: 0 })
    }
}

/// Reads a section from its start.
#[derive(Debug)]
pub(crate) struct SectionReader {
    section: Section,
    position: u64,
}

impl Read for SectionReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.section.length - self.position;
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.section.file.read_at(&mut buffer[..count], self.section.offset + self.position)?;
        self.position += read as u64;
        if read == 0 && count > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(read)
    }
}

impl Input for SectionReader {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        if count > self.section.length - self.position {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.position += count;
        Ok(())
    }
}

/// A directory or an archive.
pub(super) struct Storage {
    path: PathBuf,
    kind: Kind,
}

enum Kind {
    Directory(OwnedFd),
    Archive { file: Arc<File>, members: HashMap<Vec<u8>, Member> },
}

/// What an archive holds under a name.
enum Member {
    Data {
        offset: u64,
        length: u64,
    },
    /// Older versions of `docker save` link equal layers.
    Link(Vec<u8>),
}

impl Storage {
    pub(super) fn open(
        path: &Path,
        limits: &Limits,
        scratch: &mut dyn FnMut() -> Result<File, ImageError>,
    ) -> Result<Self, ImageError> {
        let failed = |source| LayoutError::Open { path: path.to_owned(), source };
        // Not blocking on a FIFO that stands where an archive should.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = openat(CWD, path, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        let file = File::from(opened);
        let metadata = file.metadata().map_err(failed)?;
        if metadata.is_dir() {
            return Ok(Self { path: path.to_owned(), kind: Kind::Directory(file.into()) });
        }
        if !metadata.is_file() {
            return Err(LayoutError::NotAnImage { path: path.to_owned() }.into());
        }
        let file = plain(path, file, limits, scratch)?;
        let members = index(&file).map_err(|error| archive_error(path, error))?;
        Ok(Self { path: path.to_owned(), kind: Kind::Archive { file, members } })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn is_archive(&self) -> bool {
        matches!(self.kind, Kind::Archive { .. })
    }

    /// The part called `name`, if there is one.
    pub(super) fn find(&self, name: &str) -> Result<Option<Section>, LayoutError> {
        match &self.kind {
            Kind::Directory(directory) => {
                open_below(directory, name).map_err(|source| LayoutError::Read { what: name.into(), source })
            }
            Kind::Archive { file, members } => Ok(find_member(members, name)
                .map(|(offset, length)| Section { file: file.clone(), offset, length })),
        }
    }
}

fn open_below(directory: &OwnedFd, name: &str) -> io::Result<Option<Section>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let file = match openat2(directory, name, flags, Mode::empty(), resolve) {
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
        opened => File::from(opened?),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
    }
    Ok(Some(Section { file: Arc::new(file), offset: 0, length: metadata.len() }))
}

fn find_member(members: &HashMap<Vec<u8>, Member>, name: &str) -> Option<(u64, u64)> {
    let path = components(name.as_bytes()).ok()?;
    match members.get(&path.join(&b'/'))? {
        Member::Data { offset, length } => Some((*offset, *length)),
        Member::Link(target) => {
            // Relative to the link's own directory, and one hop only.
            let mut joined = path.split_last()?.1.join(&b'/');
            joined.push(b'/');
            joined.extend_from_slice(target);
            match members.get(&components(&joined).ok()?.join(&b'/'))? {
                Member::Data { offset, length } => Some((*offset, *length)),
                Member::Link(_) => None,
            }
        }
    }
}

/// The archive itself, or what it decompresses to, bounded.
fn plain(
    path: &Path,
    file: File,
    limits: &Limits,
    scratch: &mut dyn FnMut() -> Result<File, ImageError>,
) -> Result<Arc<File>, ImageError> {
    let failed = |source| LayoutError::Open { path: path.to_owned(), source };
    let mut head = [0; 4];
    let filled = file.read_at(&mut head, 0).map_err(failed)?;
    let compression = Compression::detect(&head[..filled]);
    if compression == Compression::None {
        return Ok(Arc::new(file));
    }
    let mut target = scratch()?;
    let mut decoder = Decoder::new(file).map_err(failed)?;
    let copied = copy_bounded(&mut decoder, &mut target, limits.total_bytes, compression);
    copied.map_err(|error| archive_error(path, error))?;
    Ok(Arc::new(target))
}

/// Notes where each member's data is, without reading it.
fn index(file: &Arc<File>) -> Result<HashMap<Vec<u8>, Member>, LayerError> {
    let length = file.metadata().map_err(|source| LayerError::Read { source })?.len();
    let section = Section { file: file.clone(), offset: 0, length };
    let mut reader = TarReader::new(SectionReader { section, position: 0 });
    let mut members = HashMap::new();
    let mut count = 0;
    while let Some(entry) = reader.next_entry()? {
        count += 1;
        if count > ARCHIVE_MEMBERS {
            return Err(LayerError::TooManyEntries { limit: ARCHIVE_MEMBERS as u64 });
        }
        let name = components(&entry.name)?.join(&b'/');
        match entry.kind {
            EntryKind::File { sparse: false, .. } => {
                let (offset, length) = reader.data_range();
                members.insert(name, Member::Data { offset, length });
            }
            EntryKind::Symlink(target) => {
                members.insert(name, Member::Link(target));
            }
            _ => {}
        }
    }
    Ok(members)
}

fn archive_error(path: &Path, error: LayerError) -> ImageError {
    match error {
        LayerError::Write { source } if out_of_space(&source) => ImageError::cache("write", path, source),
        source => LayoutError::Archive { path: path.to_owned(), source }.into(),
    }
}
