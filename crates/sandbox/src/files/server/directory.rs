//! Listing directories, with or without the entries' attributes.
//!
//! Nothing is kept between two requests: the guest's offset is the host's own directory cookie, so a directory
//! of any size costs no memory. Only passages of a host image, which list a few fixed names, count their entries.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, RawDir, SeekFrom, Stat};
use rustix::io::Errno;

use super::super::abi::{DIRENT, ENTRY_OUT, MAX_DATA, Request, Writer};
use super::super::export::join;
use super::super::host;
use super::super::nodes::Identity;
use super::super::view::{Facts, Listing};
use super::{FileServer, Found};

/// Bytes of the host's directory read at once.
const BATCH: usize = 16 * 1024;

/// One listing in the making.
struct Page<'a, 'b> {
    server: &'a FileServer,
    reply: &'a mut Writer<'b>,
    parent: u64,
    path: &'a [u8],
    directory: &'a OwnedFd,
    /// Most bytes the guest takes.
    size: usize,
    /// Whether attributes come with the names.
    plus: bool,
}

/// What the host's directory says of an entry.
struct Listed<'a> {
    name: &'a [u8],
    inode: u64,
    /// `None` where the file system does not tell.
    kind: Option<FileType>,
    /// Where the listing goes on after this entry.
    cookie: u64,
}

impl FileServer {
    pub(super) fn open_directory(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        if !self.export.is_writable() {
            return Err(Errno::NOSYS);
        }
        self.find_directory(request.node)?;
        reply.zeros(16);
        Ok(())
    }

    pub(super) fn read_directory(
        &self,
        request: Request<'_>,
        reply: &mut Writer<'_>,
        plus: bool,
    ) -> Result<(), Errno> {
        let mut fields = request.fields();
        let (_handle, offset, size) = (fields.u64()?, fields.u64()?, fields.u32()?);
        let size = (size as usize).min(MAX_DATA);
        let found = self.find_directory(request.node)?;
        let listing = self.export.view.listing(&found.path, Facts::of(&found.stat));
        let Found { descriptor, path, .. } = found;
        let directory = match listing {
            Listing::Denied => return Err(Errno::ACCESS),
            Listing::Host => self.export.tree.reopen_directory(&descriptor)?,
            Listing::Names(_) => descriptor,
        };
        let mut page = Page {
            server: self,
            reply,
            parent: request.node,
            path: &path,
            directory: &directory,
            size,
            plus,
        };
        match listing {
            Listing::Names(names) => page.list_names(&names, offset),
            _ => page.list_host(offset),
        }
    }
}

impl Page<'_, '_> {
    fn list_names(&mut self, names: &[Vec<u8>], offset: u64) -> Result<(), Errno> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, name) in names.iter().enumerate().skip(start) {
            if !self.add(&Listed { name, inode: 0, kind: None, cookie: at as u64 + 1 }) {
                break;
            }
        }
        Ok(())
    }

    fn list_host(&mut self, offset: u64) -> Result<(), Errno> {
        if offset != 0 {
            rustix::fs::seek(self.directory, SeekFrom::Start(offset))?;
        }
        let mut buffer = [MaybeUninit::uninit(); BATCH];
        let mut entries = RawDir::new(self.directory, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                // What was listed so far counts; the error comes back with the next page.
                Err(_) if self.reply.written() > 0 => break,
                Err(errno) => return Err(errno),
            };
            let listed = Listed {
                name: entry.file_name().to_bytes(),
                inode: entry.ino(),
                kind: Some(entry.file_type()).filter(|&kind| kind != FileType::Unknown),
                cookie: entry.next_entry_cookie(),
            };
            if !self.add(&listed) {
                break;
            }
        }
        Ok(())
    }

    /// Adds an entry if the guest may see it. `false` when it does not fit: the page is full.
    fn add(&mut self, listed: &Listed<'_>) -> bool {
        let entry = if self.plus { ENTRY_OUT } else { 0 };
        if self.reply.written() + entry + DIRENT + listed.name.len().next_multiple_of(8) > self.size {
            return false;
        }
        if matches!(listed.name, b"." | b"..") {
            self.reply.zeros(entry);
            self.put(listed, listed.inode, FileType::Directory);
            return true;
        }
        let path = join(self.path, listed.name);
        match listed.kind {
            Some(kind) if !self.plus && !self.server.export.view.needs_mode() => {
                if self.server.export.view.shows(&path, Facts { kind, mode: 0, owner: 0 }) {
                    self.put(listed, listed.inode, kind);
                }
            }
            _ => self.add_judged(listed, &path),
        }
        true
    }

    fn add_judged(&mut self, listed: &Listed<'_>, path: &[u8]) {
        // An entry that went meanwhile is left out.
        let Ok(stat) = host::stat_entry(self.directory, listed.name) else { return };
        if !self.server.export.view.shows(path, Facts::of(&stat)) {
            return;
        }
        if self.plus {
            self.put_entry(listed, path, &stat);
        }
        self.put(listed, self.server.export.tree.inode(&stat), host::kind(&stat));
    }

    fn put_entry(&mut self, listed: &Listed<'_>, path: &[u8], stat: &Stat) {
        match self.server.nodes.enter(self.parent, listed.name, Identity::of(stat)) {
            Ok(node) => self.server.put_entry(self.reply, node, path, stat),
            // Node 0: the guest shall look it up by itself, and then is told why that fails.
            Err(_) => self.reply.zeros(ENTRY_OUT),
        }
    }

    fn put(&mut self, listed: &Listed<'_>, inode: u64, kind: FileType) {
        // `DT_*` are the type bits of a mode, shifted.
        self.reply.dirent(inode.max(1), listed.cookie, kind.as_raw_mode() >> 12, listed.name);
    }
}
