//! Operations that change a workspace the guest may write to.
//!
//! Each checks the guest's path before it acts: hidden names cannot be made (`EACCES`), guarded ones not be
//! changed (`EROFS`). The check and the act use the same path, resolved anew. What moves is checked with all that
//! lies below it, while nothing else is made, moved or linked: see [`FileServer::may_move`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Mode, OFlags, RawMode, RenameFlags, Stat, Timespec, Timestamps,
};
use rustix::io::{Errno, ReadWriteFlags};

use super::super::abi::{self, MAX_DATA, OUT_HEADER, Request, Writer, set};
use super::super::descriptors::Handle;
use super::super::export::join;
use super::super::host;
use super::super::nodes::Identity;
use super::super::view::Facts;
use super::{FileServer, Found};

/// Most entries of a directory tree that is moved at once; a larger one is copied by the guest (`EXDEV`).
const MOVE_LIMIT: usize = 50_000;
/// Permission bits a guest can give: never set-uid nor set-gid.
const GUEST_BITS: u32 = 0o1777;

/// A name about to be made, changed or removed, in a directory that was found.
struct Place<'a> {
    parent: u64,
    directory: Found,
    name: &'a [u8],
    path: Vec<u8>,
}

impl Place<'_> {
    fn key(&self) -> (u64, &[u8]) {
        (self.parent, self.name)
    }

    fn stat(&self) -> Result<Stat, Errno> {
        host::stat_entry(&self.directory.descriptor, self.name)
    }
}

/// What SETATTR is about: an open handle's file or a node's.
enum Target {
    Open(Arc<Handle>),
    Found(Found),
}

impl AsFd for Target {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Open(handle) => handle.file.as_fd(),
            Self::Found(found) => found.descriptor.as_fd(),
        }
    }
}

impl FileServer {
    fn making(&self) -> RwLockReadGuard<'_, ()> {
        self.moving.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn moving(&self) -> RwLockWriteGuard<'_, ()> {
        self.moving.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A name the guest may change.
    fn place<'a>(&self, parent: u64, name: &'a [u8]) -> Result<Place<'a>, Errno> {
        let directory = self.find_directory(parent)?;
        let path = join(&directory.path, name);
        if self.export.guards(&path) { Err(Errno::ROFS) } else { Ok(Place { parent, directory, name, path }) }
    }

    /// A name the guest may make a new entry of this kind at.
    fn new_place<'a>(&self, parent: u64, name: &'a [u8], kind: FileType) -> Result<Place<'a>, Errno> {
        let place = self.place(parent, name)?;
        if self.shows(&place.path, kind) { Ok(place) } else { Err(Errno::ACCESS) }
    }

    fn shows(&self, path: &[u8], kind: FileType) -> bool {
        self.export.view.shows(path, Facts { kind, mode: 0, owner: 0 })
    }

    /// An existing name the guest sees and may change.
    fn shown_place<'a>(&self, parent: u64, name: &'a [u8]) -> Result<(Place<'a>, Stat), Errno> {
        let place = self.place(parent, name)?;
        let stat = place.stat()?;
        if self.shows(&place.path, host::kind(&stat)) { Ok((place, stat)) } else { Err(Errno::NOENT) }
    }

    fn put_new(&self, place: &Place<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let Place { parent, directory, name, .. } = place;
        self.lookup_in(&directory.descriptor, *parent, &directory.path, name, reply)
    }

    /// Gives a file that was just made the bits the guest asked for, whatever the supervisor's umask is.
    fn settle_mode(&self, descriptor: impl AsFd, mode: u32) -> Result<(), Errno> {
        let stat = rustix::fs::fstat(&descriptor)?;
        let wanted = mode & GUEST_BITS;
        if stat.st_mode & 0o1777 == wanted {
            return Ok(());
        }
        // A set-gid bit that the host gave to a new directory is the host's affair.
        self.export.tree.change_mode(descriptor, Mode::from_raw_mode(wanted | stat.st_mode & 0o2000))
    }

    /// The same for an entry that is reached by name, if it still is what was made.
    fn settle_entry(&self, place: &Place<'_>, kind: FileType, mode: u32) -> Result<(), Errno> {
        let descriptor = self.export.tree.at(&place.path)?;
        if host::kind(&rustix::fs::fstat(&descriptor)?) != kind {
            return Err(Errno::STALE);
        }
        self.settle_mode(&descriptor, mode)
    }

    pub(super) fn create(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let mut fields = request.fields();
        let flags = OFlags::from_bits_retain(fields.u32()?);
        let mode = fields.u32()?;
        fields.skip(8)?;
        let _making = self.making();
        let place = self.new_place(request.node, fields.name()?, FileType::RegularFile)?;
        let access = flags & (OFlags::RWMODE | OFlags::DSYNC | OFlags::SYNC);
        let safe = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
        let bits = Mode::from_raw_mode(mode & GUEST_BITS);
        match rustix::fs::openat(&place.directory.descriptor, place.name, access | safe, bits) {
            Ok(file) => {
                self.settle_mode(&file, mode)?;
                self.put_new(&place, reply)?;
                let node = entry_node(reply)?;
                let readable = flags & OFlags::RWMODE != OFlags::WRONLY;
                let writable = flags & OFlags::RWMODE != OFlags::RDONLY;
                let handle = Handle { file, node, readable, writable };
                self.put_handle(node, self.handles.insert(handle), reply)
            }
            // The host made it first: an ordinary open, unless the guest wanted to be the maker.
            Err(Errno::EXIST) if !flags.contains(OFlags::EXCL) => {
                self.put_new(&place, reply)?;
                let node = entry_node(reply)?;
                self.put_handle(node, self.open_handle(node, flags), reply)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Completes CREATE; without a handle the guest gets no entry, so its lookup is taken back.
    fn put_handle(&self, node: u64, handle: Result<u64, Errno>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        reply.u64(handle.inspect_err(|_| self.nodes.forget(node, 1))?);
        reply.zeros(8);
        Ok(())
    }

    pub(super) fn make_node(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let mut fields = request.fields();
        let mode = fields.u32()?;
        fields.skip(12)?;
        let kind = match FileType::from_raw_mode(mode as RawMode) {
            FileType::Unknown => FileType::RegularFile,
            kind @ (FileType::RegularFile | FileType::Fifo | FileType::Socket) => kind,
            _ => return Err(Errno::PERM),
        };
        let _making = self.making();
        let place = self.new_place(request.node, fields.name()?, kind)?;
        let bits = Mode::from_raw_mode(mode & GUEST_BITS);
        rustix::fs::mknodat(&place.directory.descriptor, place.name, kind, bits, 0)?;
        self.settle_entry(&place, kind, mode)?;
        self.put_new(&place, reply)
    }

    pub(super) fn make_directory(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let mut fields = request.fields();
        let mode = fields.u32()?;
        fields.skip(4)?;
        let _making = self.making();
        let place = self.new_place(request.node, fields.name()?, FileType::Directory)?;
        let bits = Mode::from_raw_mode(mode & GUEST_BITS);
        rustix::fs::mkdirat(&place.directory.descriptor, place.name, bits)?;
        self.settle_entry(&place, FileType::Directory, mode)?;
        self.put_new(&place, reply)
    }

    pub(super) fn make_symlink(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let mut fields = request.fields();
        let (name, target) = (fields.name()?, fields.target()?);
        let _making = self.making();
        let place = self.new_place(request.node, name, FileType::Symlink)?;
        rustix::fs::symlinkat(target, &place.directory.descriptor, place.name)?;
        self.put_new(&place, reply)
    }

    pub(super) fn link(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let mut fields = request.fields();
        let (node, name) = (fields.u64()?, fields.name()?);
        let _making = self.making();
        let source = self.find(node)?;
        // A second name of a guarded file would be a way around the guard.
        if self.export.guards(&source.path) {
            return Err(Errno::ROFS);
        }
        let kind = source.kind();
        if kind == FileType::Directory {
            return Err(Errno::PERM);
        }
        let place = self.new_place(request.node, name, kind)?;
        self.export.tree.link(&source.descriptor, &place.directory.descriptor, place.name)?;
        self.put_new(&place, reply)
    }

    pub(super) fn unlink(&self, request: Request<'_>, directory: bool) -> Result<(), Errno> {
        let _making = self.making();
        let (place, _) = self.shown_place(request.node, request.fields().name()?)?;
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(&place.directory.descriptor, place.name, flags)?;
        self.nodes.detach(place.parent, place.name);
        Ok(())
    }

    pub(super) fn rename(&self, request: Request<'_>, with_flags: bool) -> Result<(), Errno> {
        let mut fields = request.fields();
        let new_parent = fields.u64()?;
        let flags = if with_flags { fields.u32()? } else { 0 };
        fields.skip(if with_flags { 4 } else { 0 })?;
        let flags = RenameFlags::from_bits_retain(flags);
        let exchange = flags == RenameFlags::EXCHANGE;
        if !(exchange || flags.is_empty() || flags == RenameFlags::NOREPLACE) {
            return Err(Errno::INVAL);
        }
        let _moving = self.moving();
        let (from, stat) = self.shown_place(request.node, fields.name()?)?;
        let to = self.new_place(new_parent, fields.name()?, host::kind(&stat))?;
        self.may_move(&from.path, &to.path, &stat)?;
        if exchange {
            let (other, other_stat) = self.shown_place(new_parent, to.name)?;
            self.may_move(&other.path, &from.path, &other_stat)?;
        } else if to.stat().is_ok_and(|there| !self.shows(&to.path, host::kind(&there))) {
            return Err(Errno::ACCESS);
        }
        rustix::fs::renameat_with(
            &from.directory.descriptor,
            from.name,
            &to.directory.descriptor,
            to.name,
            flags,
        )?;
        if exchange {
            self.nodes.exchange(from.key(), to.key());
        } else if !self.are_one_file(&to, &from) {
            self.nodes.rename(from.key(), to.key());
        }
        Ok(())
    }

    /// Whether a rename did nothing because both names are links to one file.
    fn are_one_file(&self, to: &Place<'_>, from: &Place<'_>) -> bool {
        from.stat().is_ok_and(|old| to.stat().is_ok_and(|new| Identity::of(&old) == Identity::of(&new)))
    }

    /// Whether `from` may become `to`, looking at everything below: nothing guarded may move, arrive at a guarded
    /// path, or turn from hidden to shown. Called while `moving` is held, so that nothing appears meanwhile.
    fn may_move(&self, from: &[u8], to: &[u8], stat: &Stat) -> Result<(), Errno> {
        if self.export.guards(from) || self.export.guards(to) {
            return Err(Errno::ROFS);
        }
        if !self.shows(to, host::kind(stat)) {
            return Err(Errno::ACCESS);
        }
        if host::kind(stat) != FileType::Directory {
            return Ok(());
        }
        let mut pending = vec![Vec::new()];
        let mut seen = 0;
        while let Some(below) = pending.pop() {
            let descriptor = self.export.tree.at(&join_below(from, &below))?;
            let directory = self.export.tree.reopen_directory(&descriptor)?;
            for entry in rustix::fs::Dir::new(directory)? {
                let entry = entry?;
                let name = entry.file_name().to_bytes();
                if matches!(name, b"." | b"..") {
                    continue;
                }
                seen += 1;
                if seen > MOVE_LIMIT {
                    return Err(Errno::XDEV);
                }
                let below = join(&below, name);
                let kind = self.may_move_entry(from, to, &below, &descriptor, name)?;
                if kind == FileType::Directory {
                    pending.push(below);
                }
            }
        }
        Ok(())
    }

    fn may_move_entry(
        &self,
        from: &[u8],
        to: &[u8],
        below: &[u8],
        directory: &OwnedFd,
        name: &[u8],
    ) -> Result<FileType, Errno> {
        let kind = host::kind(&host::stat_entry(directory, name)?);
        let (old, new) = (join_below(from, below), join_below(to, below));
        if self.export.guards(&old) || self.export.guards(&new) {
            return Err(Errno::ROFS);
        }
        if !self.shows(&old, kind) && self.shows(&new, kind) { Err(Errno::ACCESS) } else { Ok(kind) }
    }

    pub(super) fn write(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let mut fields = request.fields();
        let (handle, offset, size) = (fields.u64()?, fields.u64()?, fields.u32()?);
        fields.skip(12)?;
        let flags = OFlags::from_bits_retain(fields.u32()?);
        fields.skip(4)?;
        let size = size as usize;
        if size > MAX_DATA || i64::try_from(offset).is_err() {
            return Err(Errno::INVAL);
        }
        let mut data = fields.data(size)?;
        if !fields.is_empty() {
            return Err(Errno::INVAL);
        }
        let handle = self.writable_handle(handle, request.node)?;
        let append = flags.contains(OFlags::APPEND);
        let mut done = 0;
        while !data.is_empty() {
            let written = if append {
                let data = [std::io::IoSlice::new(data)];
                rustix::io::pwritev2(&handle.file, &data, 0, ReadWriteFlags::APPEND)
            } else {
                rustix::io::pwrite(&handle.file, data, offset + u64::from(done))
            };
            match written {
                Ok(count) => {
                    done += count as u32;
                    data = &data[count.min(data.len())..];
                }
                Err(Errno::INTR) => {}
                Err(_) if done > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        reply.u32(done);
        reply.zeros(4);
        Ok(())
    }

    fn writable_handle(&self, id: u64, node: u64) -> Result<Arc<Handle>, Errno> {
        let handle = self.handles.get(id, node)?;
        if handle.writable { Ok(handle) } else { Err(Errno::BADF) }
    }

    pub(super) fn allocate(&self, request: Request<'_>) -> Result<(), Errno> {
        let mut fields = request.fields();
        let (handle, offset, length) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let flags = FallocateFlags::from_bits_retain(fields.u32()?);
        let supported = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        if !supported.contains(flags) {
            return Err(Errno::OPNOTSUPP);
        }
        let handle = self.writable_handle(handle, request.node)?;
        rustix::fs::fallocate(&handle.file, flags, offset, length)
    }

    pub(super) fn sync(&self, request: Request<'_>) -> Result<(), Errno> {
        if !self.export.is_writable() {
            return Ok(());
        }
        let mut fields = request.fields();
        let handle = self.handles.get(fields.u64()?, request.node)?;
        if fields.u32()? & abi::FSYNC_DATA != 0 {
            rustix::fs::fdatasync(&handle.file)
        } else {
            rustix::fs::fsync(&handle.file)
        }
    }

    pub(super) fn set_attributes(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let change = Change::read(request)?;
        let (target, path) = self.target(request.node, &change)?;
        let stat = rustix::fs::fstat(&target)?;
        // Owners on the host are not the guest's to give; naming the present ones changes nothing.
        if change.uid.is_some_and(|uid| uid != stat.st_uid)
            || change.gid.is_some_and(|gid| gid != stat.st_gid)
        {
            return Err(Errno::PERM);
        }
        let symlink = host::kind(&stat) == FileType::Symlink;
        if let Some(mode) = change.mode {
            if symlink {
                return Err(Errno::OPNOTSUPP);
            }
            // The set-gid bit of a directory, which the host gave, says who owns new files: it is kept.
            let kept = if host::kind(&stat) == FileType::Directory { stat.st_mode & 0o2000 } else { 0 };
            self.export.tree.change_mode(&target, Mode::from_raw_mode(mode & GUEST_BITS | kept))?;
        }
        if let Some(size) = change.size {
            self.resize(&target, &stat, size)?;
        }
        if let Some(times) = &change.times {
            // With an empty path: symlinks and files that are open with `O_PATH`, too.
            rustix::fs::utimensat(&target, c"", times, AtFlags::EMPTY_PATH)?;
        }
        let stat = rustix::fs::fstat(&target)?;
        self.put_attr_out(reply, &path, &stat);
        Ok(())
    }

    /// The file a SETATTR is about, by its handle where the guest names one or the name has gone, and its path.
    fn target(&self, node: u64, change: &Change) -> Result<(Target, Vec<u8>), Errno> {
        let open = change.handle.map(|id| self.writable_handle(id, node)).transpose();
        match self.find(node) {
            Ok(found) if self.export.guards(&found.path) => Err(Errno::ROFS),
            Ok(found) => {
                let path = found.path.clone();
                Ok((open?.map_or(Target::Found(found), Target::Open), path))
            }
            Err(errno) => {
                let handle = open?.or_else(|| self.handles.of_node(node)).filter(|handle| handle.writable);
                Ok((Target::Open(handle.ok_or(errno)?), Vec::new()))
            }
        }
    }

    fn resize(&self, target: &Target, stat: &Stat, size: u64) -> Result<(), Errno> {
        if i64::try_from(size).is_err() {
            return Err(Errno::FBIG);
        }
        match (target, host::kind(stat)) {
            (Target::Open(handle), _) => rustix::fs::ftruncate(&handle.file, size),
            (Target::Found(found), FileType::RegularFile) => {
                may_write(stat)?;
                let file = self.export.tree.reopen(&found.descriptor, OFlags::WRONLY)?;
                rustix::fs::ftruncate(&file, size)
            }
            (Target::Found(_), FileType::Directory) => Err(Errno::ISDIR),
            _ => Err(Errno::INVAL),
        }
    }
}

/// A SETATTR, taken apart.
struct Change {
    handle: Option<u64>,
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
    size: Option<u64>,
    times: Option<Timestamps>,
}

impl Change {
    fn read(request: Request<'_>) -> Result<Self, Errno> {
        const NOW: i64 = 0x3fff_ffff;
        const OMIT: i64 = 0x3fff_fffe;
        let mut fields = request.fields();
        let valid = fields.u32()?;
        fields.skip(4)?;
        let (handle, size) = (fields.u64()?, fields.u64()?);
        fields.skip(8)?;
        let seconds = [fields.u64()?, fields.u64()?];
        fields.skip(8)?;
        let nanoseconds = [fields.u32()?, fields.u32()?];
        fields.skip(4)?;
        let mode = fields.u32()?;
        fields.skip(4)?;
        let (uid, gid) = (fields.u32()?, fields.u32()?);
        let asked = |bit| valid & bit != 0;
        let time = |at: usize, given, now| match (asked(given), asked(now)) {
            (_, true) => Ok(Timespec { tv_sec: 0, tv_nsec: NOW }),
            (true, _) if nanoseconds[at] >= 1_000_000_000 => Err(Errno::INVAL),
            (true, _) => {
                Ok(Timespec { tv_sec: seconds[at].cast_signed(), tv_nsec: i64::from(nanoseconds[at]) })
            }
            _ => Ok(Timespec { tv_sec: 0, tv_nsec: OMIT }),
        };
        let times = Timestamps {
            last_access: time(0, set::ATIME, set::ATIME_NOW)?,
            last_modification: time(1, set::MTIME, set::MTIME_NOW)?,
        };
        let any_time = asked(set::ATIME | set::MTIME | set::ATIME_NOW | set::MTIME_NOW);
        Ok(Self {
            handle: asked(set::FH).then_some(handle),
            mode: asked(set::MODE).then_some(mode),
            uid: asked(set::UID).then_some(uid),
            gid: asked(set::GID).then_some(gid),
            size: asked(set::SIZE).then_some(size),
            times: any_time.then_some(times),
        })
    }
}

/// Whether a file's content may be changed: never that of a program the host runs as somebody else.
pub(super) fn may_write(stat: &Stat) -> Result<(), Errno> {
    if stat.st_mode & 0o6000 == 0 { Ok(()) } else { Err(Errno::PERM) }
}

/// The node of the entry that a reply starts with.
fn entry_node(reply: &Writer<'_>) -> Result<u64, Errno> {
    let bytes = reply.0.get(OUT_HEADER..).and_then(|rest| rest.first_chunk()).ok_or(Errno::IO)?;
    Ok(u64::from_le_bytes(*bytes))
}

/// `base/below`, or `base` where nothing is below.
fn join_below(base: &[u8], below: &[u8]) -> Vec<u8> {
    if below.is_empty() { base.to_vec() } else { join(base, below) }
}
