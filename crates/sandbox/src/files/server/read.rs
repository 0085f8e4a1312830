//! Operations that only look.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::buffer::spare_capacity;
use rustix::fs::{FileType, OFlags, SeekFrom};
use rustix::io::Errno;

use super::super::abi::{self, ENTRY_OUT, MAX_DATA, MAX_NAME, OUT_HEADER, Request, Writer};
use super::super::descriptors::Handle;
use super::super::export::join;
use super::super::host;
use super::super::nodes::Identity;
use super::super::view::Facts;
use super::FileServer;
use super::write::may_write;

impl FileServer {
    pub(super) fn lookup(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let name = request.fields().name()?;
        let parent = self.find_directory(request.node)?;
        match self.lookup_in(&parent.descriptor, request.node, &parent.path, name, reply) {
            // A name that is not there is remembered like one that is, where nothing changes.
            Err(Errno::NOENT) if !self.export.is_writable() => {
                reply.zeros(ENTRY_OUT);
                let seconds = self.seconds().to_le_bytes();
                reply.0[OUT_HEADER + 16..OUT_HEADER + 24].copy_from_slice(&seconds);
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// Looks `name` up in an open directory, counts the lookup and writes the entry.
    pub(super) fn lookup_in(
        &self,
        directory: &OwnedFd,
        parent: u64,
        parent_path: &[u8],
        name: &[u8],
        reply: &mut Writer<'_>,
    ) -> Result<(), Errno> {
        let path = join(parent_path, name);
        let stat = host::stat_entry(directory, name).map_err(|errno| match errno {
            // What the supervisor itself may not pass does not exist.
            Errno::ACCESS if !self.export.is_writable() => Errno::NOENT,
            other => other,
        })?;
        if !self.export.view.shows(&path, Facts::of(&stat)) {
            return Err(Errno::NOENT);
        }
        let node = self.nodes.enter(parent, name, Identity::of(&stat))?;
        self.put_entry(reply, node, &path, &stat);
        Ok(())
    }

    pub(super) fn get_attributes(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let mut fields = request.fields();
        let flags = fields.u32()?;
        fields.skip(4)?;
        let handle = fields.u64()?;
        let open = if flags & abi::GETATTR_FH != 0 && self.export.is_writable() {
            Some(self.handles.get(handle, request.node)?)
        } else {
            None
        };
        let found = match self.find(request.node) {
            Ok(found) => found,
            // A file without a name lives on in its handles.
            Err(errno) => {
                let handle = open.or_else(|| self.handles.of_node(request.node)).ok_or(errno)?;
                let stat = rustix::fs::fstat(&handle.file)?;
                self.put_attr_out(reply, b"", &stat);
                return Ok(());
            }
        };
        self.export.record(&found.path, &found.stat);
        self.put_attr_out(reply, &found.path, &found.stat);
        Ok(())
    }

    pub(super) fn read_link(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let found = self.find(request.node)?;
        if found.kind() != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = rustix::fs::readlinkat(&found.descriptor, c"", Vec::new())?;
        reply.bytes(target.as_bytes());
        Ok(())
    }

    pub(super) fn open(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        if !self.export.is_writable() {
            // The guest's kernel never asks again and reads by node.
            return Err(Errno::NOSYS);
        }
        let flags = OFlags::from_bits_retain(request.fields().u32()?);
        let handle = self.open_handle(request.node, flags)?;
        reply.u64(handle);
        reply.zeros(8);
        Ok(())
    }

    /// Opens a node's regular file for a handle.
    pub(super) fn open_handle(&self, node: u64, flags: OFlags) -> Result<u64, Errno> {
        let found = self.find_regular(node)?;
        let writable = flags & OFlags::RWMODE != OFlags::RDONLY;
        if writable || flags.contains(OFlags::TRUNC) {
            if self.export.guards(&found.path) {
                return Err(Errno::ROFS);
            }
            may_write(&found.stat)?;
        }
        let access = flags & (OFlags::RWMODE | OFlags::TRUNC | OFlags::DSYNC | OFlags::SYNC);
        let file = self.export.tree.reopen(&found.descriptor, access)?;
        let readable = flags & OFlags::RWMODE != OFlags::WRONLY;
        self.handles.insert(Handle { file, node, readable, writable })
    }

    pub(super) fn release(&self, request: Request<'_>) -> Result<(), Errno> {
        let id = request.fields().u64()?;
        if self.export.is_writable() && self.handles.get(id, request.node).is_ok() {
            self.handles.remove(id);
        }
        Ok(())
    }

    pub(super) fn read(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let mut fields = request.fields();
        let (handle, offset, size) = (fields.u64()?, fields.u64()?, fields.u32()?);
        let size = (size as usize).min(MAX_DATA);
        if i64::try_from(offset).is_err() {
            return Err(Errno::INVAL);
        }
        // With spare capacity, `pread` writes where the reply will be sent from.
        reply.0.reserve_exact(size);
        if self.export.is_writable() {
            let handle = self.handles.get(handle, request.node)?;
            if !handle.readable {
                return Err(Errno::BADF);
            }
            read_fully(&handle.file, reply.0, size, offset)
        } else {
            let file = self.reading(request.node)?;
            read_fully(&file, reply.0, size, offset)
        }
    }

    /// The open file of a node that is read without having been opened.
    fn reading(&self, node: u64) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(file) = self.recent.get(node) {
            return Ok(file);
        }
        let found = self.find_regular(node)?;
        let file = self.export.tree.reopen(&found.descriptor, OFlags::RDONLY)?;
        Ok(self.recent.insert(node, file))
    }

    pub(super) fn seek(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        const DATA: u32 = 3;
        const HOLE: u32 = 4;
        let mut fields = request.fields();
        let (handle, offset, whence) = (fields.u64()?, fields.u64()?, fields.u32()?);
        let position = match whence {
            DATA => SeekFrom::Data(offset),
            HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        // The position of a shared descriptor does not matter: reads and writes carry theirs.
        let at = if self.export.is_writable() {
            rustix::fs::seek(&self.handles.get(handle, request.node)?.file, position)?
        } else {
            rustix::fs::seek(&*self.reading(request.node)?, position)?
        };
        reply.u64(at);
        Ok(())
    }

    pub(super) fn stat_file_system(&self, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let statistics = rustix::fs::fstatvfs(&self.export.tree.at(b"")?)?;
        for count in [
            statistics.f_blocks,
            statistics.f_bfree,
            statistics.f_bavail,
            statistics.f_files,
            statistics.f_ffree,
        ] {
            reply.u64(count);
        }
        reply.u32(u32::try_from(statistics.f_bsize).unwrap_or(4096));
        reply.u32(MAX_NAME as u32);
        reply.u32(u32::try_from(statistics.f_frsize).unwrap_or(4096));
        reply.zeros(28);
        Ok(())
    }
}

/// Appends up to `size` bytes from `offset`; fewer only at the end of the file, because the guest's kernel takes
/// a short read for that.
fn read_fully(file: &OwnedFd, reply: &mut Vec<u8>, size: usize, offset: u64) -> Result<(), Errno> {
    if reply.capacity() - reply.len() == size {
        // The usual, large read: nothing is cleared first.
        while reply.len() < reply.capacity() {
            let at = offset + (reply.len() - OUT_HEADER) as u64;
            if rustix::io::pread(file, spare_capacity(reply), at)? == 0 {
                break;
            }
        }
        return Ok(());
    }
    let mut end = reply.len();
    reply.resize(end + size, 0);
    while end < reply.len() {
        let at = offset + (end - OUT_HEADER) as u64;
        match rustix::io::pread(file, &mut reply[end..], at)? {
            0 => break,
            count => end += count,
        }
    }
    reply.truncate(end);
    Ok(())
}
