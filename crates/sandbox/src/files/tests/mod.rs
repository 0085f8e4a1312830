//! Tests of the whole server, driven by a small FUSE client over directories of their own.

mod hostile;
mod reading;
mod table;
mod writing;

use std::path::Path;

use rustix::io::Errno;

use super::{Access, Export, FileServer};

pub(super) const LOOKUP: u32 = 1;
pub(super) const FORGET: u32 = 2;
pub(super) const GETATTR: u32 = 3;
pub(super) const SETATTR: u32 = 4;
pub(super) const READLINK: u32 = 5;
pub(super) const SYMLINK: u32 = 6;
pub(super) const MKNOD: u32 = 8;
pub(super) const MKDIR: u32 = 9;
pub(super) const UNLINK: u32 = 10;
pub(super) const RMDIR: u32 = 11;
pub(super) const RENAME: u32 = 12;
pub(super) const LINK: u32 = 13;
pub(super) const OPEN: u32 = 14;
pub(super) const READ: u32 = 15;
pub(super) const WRITE: u32 = 16;
pub(super) const STATFS: u32 = 17;
pub(super) const RELEASE: u32 = 18;
pub(super) const INIT: u32 = 26;
pub(super) const OPENDIR: u32 = 27;
pub(super) const READDIR: u32 = 28;
pub(super) const CREATE: u32 = 35;
pub(super) const DESTROY: u32 = 38;
pub(super) const BATCH_FORGET: u32 = 42;
pub(super) const READDIRPLUS: u32 = 44;
pub(super) const RENAME2: u32 = 45;

pub(super) const ROOT: u64 = 1;

/// An empty directory in the workspace's target directory, removed when dropped.
pub(super) fn directory() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tmp");
    std::fs::create_dir_all(&target).unwrap();
    tempfile::Builder::new().prefix("files-").tempdir_in(target.canonicalize().unwrap()).unwrap()
}

/// The guest's kernel, as far as these tests need one.
struct Client {
    server: FileServer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Found {
    node: u64,
    mode: u32,
    size: u64,
}

impl Client {
    fn new(export: Export) -> Self {
        Self { server: FileServer::new(export) }
    }

    fn read_only(root: &Path) -> Self {
        Self::new(Export::workspace(root, Access::ReadOnly, None).unwrap())
    }

    fn read_write(root: &Path) -> Self {
        let guard = |path: &Path| {
            path.file_name().is_some_and(|name| name == ".envrc" || name == ".agentkernelignore")
                || path.ends_with(".git/hooks")
        };
        Self::new(Export::workspace(root, Access::ReadWrite { guard }, None).unwrap())
    }

    /// Sends a request and checks the reply's form; what follows the header, or the error.
    fn call(&self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let reply = self.server.handle(&request(opcode, node, body)).expect("a reply");
        parse(&reply)
    }

    fn lookup(&self, parent: u64, name: &[u8]) -> Result<Found, Errno> {
        let reply = self.call(LOOKUP, parent, &terminated(&[name]))?;
        entry(&reply).ok_or(Errno::NOENT)
    }

    /// Looks up each name of a path.
    fn walk(&self, path: &str) -> Result<Found, Errno> {
        let root = Found { node: ROOT, mode: 0, size: 0 };
        path.split('/').try_fold(root, |found, name| self.lookup(found.node, name.as_bytes()))
    }

    fn open(&self, node: u64, flags: u32) -> Result<u64, Errno> {
        Ok(u64_at(&self.call(OPEN, node, &fields(&[u64::from(flags)]))?, 0))
    }

    fn read(&self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        self.call(READ, node, &fields(&[handle, offset, u64::from(size), 0, 0]))
    }

    fn write(&self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        let mut body = fields(&[handle, offset, data.len() as u64, 0, 0]);
        body.extend_from_slice(data);
        self.call(WRITE, node, &body).map(|reply| reply[0] as usize | (reply[1] as usize) << 8)
    }

    /// All names of a directory, page by page.
    fn list(&self, node: u64, plus: bool, page: u32) -> Result<Vec<(Vec<u8>, u64)>, Errno> {
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let opcode = if plus { READDIRPLUS } else { READDIR };
            let reply = self.call(opcode, node, &fields(&[0, offset, u64::from(page), 0, 0]))?;
            assert!(reply.len() <= page as usize);
            let mut rest = reply.as_slice();
            if rest.is_empty() {
                return Ok(names);
            }
            while !rest.is_empty() {
                let node = if plus { u64_at(rest, 0) } else { 0 };
                rest = &rest[if plus { 128 } else { 0 }..];
                offset = u64_at(rest, 8);
                let length = u32::from_le_bytes(rest[16..20].try_into().unwrap()) as usize;
                names.push((rest[24..24 + length].to_vec(), node));
                rest = &rest[(24 + length).next_multiple_of(8)..];
            }
        }
    }

    /// The names alone, sorted, without `.` and `..`.
    fn names(&self, node: u64) -> Vec<String> {
        let mut names: Vec<String> = self
            .list(node, false, 4096)
            .unwrap()
            .into_iter()
            .map(|(name, _)| String::from_utf8_lossy(&name).into_owned())
            .filter(|name| name != "." && name != "..")
            .collect();
        names.sort();
        names
    }

    fn forget(&self, node: u64, count: u64) {
        assert_eq!(self.server.handle(&request(FORGET, node, &fields(&[count]))), None);
    }
}

fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut request = ((40 + body.len()) as u32).to_le_bytes().to_vec();
    request.extend(opcode.to_le_bytes());
    request.extend(fields(&[7, node, 0, 0]));
    request.extend_from_slice(body);
    request
}

/// Splits a reply, checking what the guest's kernel checks.
fn parse(reply: &[u8]) -> Result<Vec<u8>, Errno> {
    assert!((16..=16 + (1 << 20)).contains(&reply.len()), "{} bytes", reply.len());
    assert_eq!(u32::from_le_bytes(reply[..4].try_into().unwrap()) as usize, reply.len());
    assert_eq!(u64_at(reply, 8), 7);
    let error = i32::from_le_bytes(reply[4..8].try_into().unwrap());
    assert!((-511..=0).contains(&error));
    if error == 0 {
        return Ok(reply[16..].to_vec());
    }
    assert_eq!(reply.len(), 16);
    Err(Errno::from_raw_os_error(-error))
}

fn entry(reply: &[u8]) -> Option<Found> {
    assert!(reply.len() >= 128);
    let mode = u32::from_le_bytes(reply[100..104].try_into().unwrap());
    let node = u64_at(reply, 0);
    (node != 0).then_some(Found { node, mode, size: u64_at(reply, 48) })
}

fn fields(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn halves(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn terminated(names: &[&[u8]]) -> Vec<u8> {
    names.iter().flat_map(|name| name.iter().copied().chain([0])).collect()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
