//! Tar streams: sent to a guest, or made of what a guest sends.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use agentkernel_protocol::frame::CHUNK;
use agentkernel_protocol::message::Entry;
use serde_bytes::ByteBuf;
use tar::{EntryType, Header};

use super::{CopyError, Entries, Source, Target};
use crate::workspace::{RelativePath, TARGET_BYTES_MAX};

/// Bytes of a header's field for a link's target (POSIX ustar).
const LINK_NAME_FIELD: usize = 100;

/// A tar stream whose content goes into a directory.
pub struct TarSource<R> {
    reader: R,
}

impl<R: Read + Send + 'static> TarSource<R> {
    /// The archive that `reader` yields, uncompressed.
    pub fn new(reader: R) -> Self {
        Self { reader }
    }
}

impl<R: Read + Send + 'static> Source for TarSource<R> {
    fn send(self, send: &mut dyn FnMut(Entry) -> Result<(), CopyError>) -> Result<(), CopyError> {
        send(Entry::Directory { path: ByteBuf::new(), mode: 0o755, opaque: false })?;
        let mut archive = tar::Archive::new(self.reader);
        for entry in archive.entries().map_err(CopyError::Archive)? {
            let mut entry = entry.map_err(CopyError::Archive)?;
            let name = entry.path_bytes().into_owned();
            let shown = crate::printable(&String::from_utf8_lossy(&name));
            let refused = |why: &str| CopyError::Refused(format!("{shown} in the tar archive: {why}"));
            // Archivers write `./a/` for `a`.
            let plain: PathBuf = Path::new(OsStr::from_bytes(&name))
                .components()
                .filter(|part| !matches!(part, Component::CurDir))
                .collect();
            if plain.as_os_str().is_empty() {
                continue;
            }
            let path = RelativePath::parse(plain.as_os_str().as_bytes())
                .map_err(|error| refused(&error.to_string()))?;
            let path = ByteBuf::from(path.as_bytes());
            let mode = entry.header().mode().map_err(CopyError::Archive)? & 0o7777;
            match entry.header().entry_type() {
                EntryType::Directory => send(Entry::Directory { path, mode, opaque: false })?,
                EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                    let seconds = entry.header().mtime().map_err(CopyError::Archive)?;
                    let modified_ns = i64::try_from(seconds).unwrap_or(0).saturating_mul(1_000_000_000);
                    let size = entry.size();
                    send(Entry::File { path, mode, size, modified_ns })?;
                    send_content(&mut entry, size, send)?;
                }
                EntryType::Symlink => {
                    let target =
                        entry.link_name_bytes().map(|target| target.into_owned()).unwrap_or_default();
                    if target.is_empty() || target.len() > TARGET_BYTES_MAX || target.contains(&0) {
                        return Err(refused("a symbolic link that no system has"));
                    }
                    send(Entry::Symlink { path, target: ByteBuf::from(target) })?;
                }
                EntryType::Link => {
                    return Err(refused(
                        "hard links are not copied: make the archive with --hard-dereference",
                    ));
                }
                EntryType::Char | EntryType::Block | EntryType::Fifo => send(Entry::Special { path })?,
                EntryType::XGlobalHeader => {}
                _ => return Err(refused("an entry of an unknown kind")),
            }
        }
        Ok(())
    }
}

fn send_content(
    reader: &mut impl Read,
    size: u64,
    send: &mut dyn FnMut(Entry) -> Result<(), CopyError>,
) -> Result<(), CopyError> {
    let mut left = size;
    let mut buffer = vec![0; CHUNK];
    while left > 0 {
        let want = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let count = reader.read(&mut buffer[..want]).map_err(CopyError::Archive)?;
        if count == 0 {
            return Err(CopyError::Archive(std::io::ErrorKind::UnexpectedEof.into()));
        }
        send(Entry::Data(ByteBuf::from(&buffer[..count])))?;
        left -= count as u64;
    }
    Ok(())
}

/// A tar stream that is made of a guest's tree; its root is called `name`.
pub struct TarTarget<W> {
    writer: W,
    name: PathBuf,
}

impl<W: Write + Send + 'static> TarTarget<W> {
    /// An archive on `writer`. With an empty name the entries stand at its top.
    pub fn new(writer: W, name: &OsStr) -> Self {
        Self { writer, name: name.into() }
    }
}

impl<W: Write + Send + 'static> Target for TarTarget<W> {
    fn take(self, entries: &mut Entries) -> Result<(), CopyError> {
        let mut builder = tar::Builder::new(self.writer);
        while let Some(entry) = entries.next_entry()? {
            let locate = |path: &[u8]| -> Result<PathBuf, CopyError> {
                if path.is_empty() {
                    let bare = self.name.as_os_str().is_empty();
                    return Ok(if bare { PathBuf::from(".") } else { self.name.clone() });
                }
                let path = RelativePath::parse(path)
                    .map_err(|error| CopyError::Refused(format!("a path of the guest: {error}")))?;
                Ok(self.name.join(path.as_path()))
            };
            let mut header = Header::new_gnu();
            header.set_uid(0);
            header.set_gid(0);
            match entry {
                Entry::Directory { path, mode, .. } => {
                    header.set_entry_type(EntryType::Directory);
                    header.set_mode(mode & 0o777);
                    header.set_size(0);
                    builder
                        .append_data(&mut header, locate(&path)?, std::io::empty())
                        .map_err(CopyError::Archive)?;
                }
                Entry::File { path, mode, size, modified_ns } => {
                    header.set_entry_type(EntryType::Regular);
                    header.set_mode(mode & 0o777);
                    header.set_size(size);
                    header.set_mtime(u64::try_from(modified_ns / 1_000_000_000).unwrap_or(0));
                    let mut content = Content { entries, rest: Vec::new(), at: 0, failure: None };
                    let result = builder.append_data(&mut header, locate(&path)?, &mut content);
                    if let Some(failure) = content.failure {
                        return Err(failure);
                    }
                    result.map_err(CopyError::Archive)?;
                }
                Entry::Symlink { path, target } => {
                    header.set_entry_type(EntryType::Symlink);
                    header.set_mode(0o777);
                    header.set_size(0);
                    // Byte for byte: the crate's own way of adding links tidies their targets up.
                    if target.len() <= LINK_NAME_FIELD {
                        header.set_link_name_literal(target.as_slice()).map_err(CopyError::Archive)?;
                    } else {
                        let extension = [("linkpath", target.as_slice())];
                        builder.append_pax_extensions(extension).map_err(CopyError::Archive)?;
                    }
                    builder
                        .append_data(&mut header, locate(&path)?, std::io::empty())
                        .map_err(CopyError::Archive)?;
                }
                _ => {}
            }
        }
        builder.into_inner().and_then(|mut writer| writer.flush()).map_err(CopyError::Archive)
    }
}

/// The content of the entry that was taken last.
struct Content<'a> {
    entries: &'a mut Entries,
    rest: Vec<u8>,
    at: usize,
    failure: Option<CopyError>,
}

impl Read for Content<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.at == self.rest.len() {
            match self.entries.next_data() {
                Ok(Some(bytes)) => (self.rest, self.at) = (bytes, 0),
                Ok(None) => return Ok(0),
                Err(failure) => {
                    self.failure = Some(failure);
                    return Err(std::io::Error::other("the guest's file broke off"));
                }
            }
        }
        let count = buffer.len().min(self.rest.len() - self.at);
        buffer[..count].copy_from_slice(&self.rest[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}
