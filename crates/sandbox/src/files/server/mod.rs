//! One FUSE session: takes a request apart, calls the one function that serves it, completes the reply.
//!
//! A server keeps four things: the node table, the guest's open handles (writable exports only), a few files kept
//! open between reads, and a lock that lets a rename look at a whole tree while no other change happens.

mod directory;
mod read;
mod write;

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::RwLock;

use rustix::fs::{FileType, OFlags, Stat};
use rustix::io::Errno;

use super::abi::{self, Opcode, Request, Writer, init};
use super::descriptors::{Handle, Handles, ReadCache};
use super::export::Export;
use super::host;
use super::nodes::{Identity, Nodes};
use super::table::{SavedHandle, Table, Version};
use super::view::Facts;

/// How long a guest may keep names and attributes of a tree that does not change, in seconds.
const STABLE_SECONDS: u64 = 24 * 60 * 60;
/// The same of a tree that the host and the guest both change.
const SHARED_SECONDS: u64 = 1;
/// Requests that a guest may have waiting in the background: readahead, mostly.
const BACKGROUND: u16 = 64;

/// Serves one [`Export`] to one guest. It is shared between threads; see the module's head.
#[derive(Debug)]
pub struct FileServer {
    export: Export,
    nodes: Nodes,
    handles: Handles,
    recent: ReadCache,
    /// Held for writing while something moves, for reading while something is made.
    moving: RwLock<()>,
}

/// A node's file: found, checked to be the one the node stands for, and shown to the guest.
struct Found {
    /// Opened with `O_PATH`.
    descriptor: OwnedFd,
    stat: Stat,
    path: Vec<u8>,
}

impl Found {
    fn kind(&self) -> FileType {
        host::kind(&self.stat)
    }
}

impl FileServer {
    /// A server that has not been asked anything yet.
    pub fn new(export: Export) -> Self {
        let nodes = Nodes::new(export.tree.root_identity());
        let (handles, recent) = (Handles::default(), ReadCache::default());
        Self { export, nodes, handles, recent, moving: RwLock::new(()) }
    }

    /// What is served.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Answers one FUSE request. `None` where the protocol knows no reply (FORGET) or nobody could be answered
    /// (no header). Blocks for as long as the host's file system does; never panics, whatever the bytes are.
    pub fn handle(&self, request: &[u8]) -> Option<Vec<u8>> {
        let mut reply = Vec::new();
        self.handle_into(request, &mut reply).then_some(reply)
    }

    /// The same into a buffer that is used again: a reply of 1 MiB then costs one copy. Tells whether there is a
    /// reply.
    pub fn handle_into(&self, request: &[u8], reply: &mut Vec<u8>) -> bool {
        reply.clear();
        let Some(request) = Request::parse(request) else { return false };
        if matches!(request.opcode, Some(Opcode::Forget | Opcode::BatchForget)) {
            // A malformed one keeps its nodes: the table is bounded anyway.
            let _ = self.forget(request);
            return false;
        }
        let mut writer = Writer::start(reply);
        let outcome = self.answer(request, &mut writer);
        writer.finish(request.unique, outcome);
        true
    }

    /// Messages for the guest's kernel (to be written to its `/dev/fuse` like replies) that make it forget what it
    /// knows of `path`, relative to the root, because the host has changed it: a file that `apply` wrote, say. None
    /// where the guest never looked there. Writing one may fail with `ENOENT`, which means that nothing was cached,
    /// and may wait for a lookup to end: so never in the thread that relays the replies.
    pub fn invalidate(&self, path: &Path) -> Vec<Vec<u8>> {
        let path = path.as_os_str().as_bytes();
        let Some((parent, node)) = self.nodes.known(path).filter(|_| !path.is_empty()) else {
            return Vec::new();
        };
        let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or(path);
        let mut messages = vec![abi::notify_entry(parent, name)];
        if let Some(node) = node {
            self.recent.remove(node);
            messages.insert(0, abi::notify_inode(node));
        }
        messages
    }

    /// What the guest knows of this server, for another one that takes over ([`Self::adopt`]); with the versions of its
    /// files, if those are to be compared later. No request may be under way.
    pub(crate) fn save(&self, with_versions: bool) -> Vec<u8> {
        let (mut nodes, next) = self.nodes.save();
        if with_versions {
            for node in &mut nodes {
                // What the guest may have cached of files that go, it has of nobody's.
                let path = self.nodes.path(node.id).ok().map(|(path, _)| path);
                let known =
                    path.and_then(|path| Some((Version::of(&self.export.tree.stat(&path).ok()?), path)));
                node.version = known.map(|(version, path)| (serde_bytes::ByteBuf::from(path), version));
            }
        }
        let (handles, last_handle) = self.handles.save();
        postcard::to_allocvec(&Table { nodes, next, handles, last_handle }).unwrap_or_default()
    }

    /// Goes on for the guest of a server that [saved](Self::save) this. Files that were open are opened again, if they
    /// are still there under their names. False, and nothing is taken over, if it is damaged.
    pub(crate) fn adopt(&self, table: &[u8]) -> bool {
        let Ok(table) = postcard::from_bytes::<Table>(table) else { return false };
        if !self.nodes.adopt(table.nodes, table.next) {
            return false;
        }
        let handles = table.handles.into_iter().filter_map(|saved| {
            let found = self.find_regular(saved.node).ok()?;
            if saved.writable && self.export.guards(&found.path) {
                return None;
            }
            let flags = match (saved.readable, saved.writable) {
                (true, true) => OFlags::RDWR,
                (false, true) => OFlags::WRONLY,
                _ => OFlags::RDONLY,
            };
            let file = self.export.tree.reopen(&found.descriptor, flags).ok()?;
            let SavedHandle { id, node, readable, writable } = saved;
            Some((id, Handle { file, node, readable, writable }))
        });
        self.handles.adopt(handles, table.last_handle);
        true
    }

    /// Number of nodes the guest holds, the root included.
    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// Number of files the guest holds open.
    pub fn handle_count(&self) -> usize {
        self.handles.len()
    }

    fn answer(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let opcode = request.opcode.ok_or(Errno::NOSYS)?;
        if !request.well_framed {
            return Err(Errno::INVAL);
        }
        if opcode.writes() && !self.export.is_writable() {
            return Err(Errno::ROFS);
        }
        match opcode {
            Opcode::Init => self.init(request, reply),
            Opcode::Destroy => self.destroy(),
            Opcode::Lookup => self.lookup(request, reply),
            Opcode::GetAttr => self.get_attributes(request, reply),
            Opcode::ReadLink => self.read_link(request, reply),
            Opcode::Open => self.open(request, reply),
            Opcode::Read => self.read(request, reply),
            Opcode::LSeek => self.seek(request, reply),
            Opcode::StatFs => self.stat_file_system(reply),
            Opcode::Release => self.release(request),
            Opcode::OpenDir => self.open_directory(request, reply),
            Opcode::ReadDir => self.read_directory(request, reply, false),
            Opcode::ReadDirPlus => self.read_directory(request, reply, true),
            Opcode::ReleaseDir => Ok(()),
            Opcode::FSync => self.sync(request),
            Opcode::SetAttr => self.set_attributes(request, reply),
            Opcode::Create => self.create(request, reply),
            Opcode::MkNod => self.make_node(request, reply),
            Opcode::MkDir => self.make_directory(request, reply),
            Opcode::Symlink => self.make_symlink(request, reply),
            Opcode::Link => self.link(request, reply),
            Opcode::Unlink => self.unlink(request, false),
            Opcode::RmDir => self.unlink(request, true),
            Opcode::Rename => self.rename(request, false),
            Opcode::Rename2 => self.rename(request, true),
            Opcode::Write => self.write(request, reply),
            Opcode::FAllocate => self.allocate(request),
            // There is nothing to flush or to interrupt, and after ENOSYS the guest need not ask again.
            Opcode::Flush | Opcode::FSyncDir | Opcode::Interrupt => Err(Errno::NOSYS),
            // Programs ask every file whether it is a terminal.
            Opcode::IoCtl => Err(Errno::NOTTY),
            Opcode::Forget | Opcode::BatchForget => Err(Errno::INVAL),
        }
    }

    fn init(&self, request: Request<'_>, reply: &mut Writer<'_>) -> Result<(), Errno> {
        let mut fields = request.fields();
        let (major, minor) = (fields.u32()?, fields.u32()?);
        if major < abi::MAJOR || major == abi::MAJOR && minor < abi::MINOR_OLDEST {
            return Err(Errno::PROTO);
        }
        reply.u32(abi::MAJOR);
        if major > abi::MAJOR {
            // The guest asks again with our version.
            reply.u32(abi::MINOR_NEWEST);
            reply.zeros(56);
            return Ok(());
        }
        let (readahead, offered) = (fields.u32()?, fields.u32()?);
        reply.u32(minor.min(abi::MINOR_NEWEST));
        reply.u32(readahead.min(abi::MAX_DATA as u32));
        reply.u32(offered & self.wanted());
        reply.u16(BACKGROUND);
        reply.u16(BACKGROUND / 4 * 3);
        reply.u32(abi::MAX_DATA as u32);
        // Times are kept to the nanosecond.
        reply.u32(1);
        reply.u16(abi::MAX_PAGES);
        reply.zeros(34);
        Ok(())
    }

    fn wanted(&self) -> u32 {
        let always = init::ASYNC_READ
            | init::BIG_WRITES
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES;
        let stable = init::NO_OPEN_SUPPORT
            | init::NO_OPENDIR_SUPPORT
            | init::CACHE_SYMLINKS
            | init::EXPLICIT_INVAL_DATA;
        always | if self.export.is_writable() { init::AUTO_INVAL_DATA } else { stable }
    }

    /// The guest has unmounted.
    fn destroy(&self) -> Result<(), Errno> {
        self.nodes.clear();
        self.handles.clear();
        self.recent.clear();
        Ok(())
    }

    fn forget(&self, request: Request<'_>) -> Result<(), Errno> {
        if !request.well_framed {
            return Err(Errno::INVAL);
        }
        let mut fields = request.fields();
        if request.opcode == Some(Opcode::Forget) {
            self.forget_one(request.node, fields.u64()?);
            return Ok(());
        }
        let count = fields.u32()?;
        fields.skip(4)?;
        for _ in 0..count {
            self.forget_one(fields.u64()?, fields.u64()?);
        }
        Ok(())
    }

    fn forget_one(&self, node: u64, count: u64) {
        self.recent.remove(node);
        self.nodes.forget(node, count);
    }

    /// How long names and attributes hold, in seconds.
    fn seconds(&self) -> u64 {
        if self.export.is_writable() { SHARED_SECONDS } else { STABLE_SECONDS }
    }

    /// Finds a node's file. `ESTALE` where its name belongs to another file by now, `ENOENT` where the view
    /// hides it.
    fn find(&self, node: u64) -> Result<Found, Errno> {
        let (path, identity) = self.nodes.path(node)?;
        self.check_way(&path)?;
        let descriptor = self.export.tree.at(&path)?;
        let stat = rustix::fs::fstat(&descriptor)?;
        if Identity::of(&stat) != identity {
            self.nodes.detach_node(node);
            return Err(Errno::STALE);
        }
        if !self.export.view.shows(&path, Facts::of(&stat)) {
            return Err(Errno::NOENT);
        }
        Ok(Found { descriptor, stat, path })
    }

    /// Judges what lies above `path` again where bits decide: the host may have closed a directory since the guest
    /// passed it.
    fn check_way(&self, path: &[u8]) -> Result<(), Errno> {
        if !self.export.view.needs_mode() {
            return Ok(());
        }
        let ends = path.iter().enumerate().filter(|&(_, &byte)| byte == b'/').map(|(at, _)| at);
        for above in ends.map(|end| &path[..end]) {
            let stat = self.export.tree.stat(above)?;
            if !self.export.view.still_admits(above, Facts::of(&stat)) {
                return Err(Errno::NOENT);
            }
        }
        Ok(())
    }

    fn find_directory(&self, node: u64) -> Result<Found, Errno> {
        let found = self.find(node)?;
        if found.kind() == FileType::Directory { Ok(found) } else { Err(Errno::NOTDIR) }
    }

    fn find_regular(&self, node: u64) -> Result<Found, Errno> {
        let found = self.find(node)?;
        match found.kind() {
            FileType::RegularFile => Ok(found),
            FileType::Directory => Err(Errno::ISDIR),
            // FIFOs and sockets live in the guest's kernel; their host side is never opened.
            _ => Err(Errno::NXIO),
        }
    }

    /// Writes `fuse_attr`, as the guest shall see it.
    fn put_attributes(&self, reply: &mut Writer<'_>, path: &[u8], stat: &Stat) {
        let mode = self.export.view.mode(path, stat.st_mode & 0o7777) | (stat.st_mode & !0o7777);
        reply.u64(self.export.tree.inode(stat));
        reply.u64(stat.st_size.cast_unsigned());
        reply.u64(stat.st_blocks.cast_unsigned());
        for seconds in [stat.st_atime, stat.st_mtime, stat.st_ctime] {
            reply.u64(seconds.cast_unsigned());
        }
        for nanoseconds in [stat.st_atime_nsec, stat.st_mtime_nsec, stat.st_ctime_nsec] {
            reply.u32(nanoseconds as u32);
        }
        reply.u32(mode);
        reply.u32(u32::try_from(stat.st_nlink).unwrap_or(u32::MAX));
        reply.u32(stat.st_uid);
        reply.u32(stat.st_gid);
        reply.u32(0);
        reply.u32(u32::try_from(stat.st_blksize).unwrap_or(4096));
        reply.u32(0);
    }

    /// Writes `fuse_entry_out`.
    fn put_entry(&self, reply: &mut Writer<'_>, node: u64, path: &[u8], stat: &Stat) {
        self.export.record(path, stat);
        reply.u64(node);
        reply.u64(0);
        reply.u64(self.seconds());
        reply.u64(self.seconds());
        reply.zeros(8);
        self.put_attributes(reply, path, stat);
    }

    /// Writes `fuse_attr_out`.
    fn put_attr_out(&self, reply: &mut Writer<'_>, path: &[u8], stat: &Stat) {
        reply.u64(self.seconds());
        reply.zeros(8);
        self.put_attributes(reply, path, stat);
    }
}
