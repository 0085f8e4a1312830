//! The FUSE wire format: little structs of little-endian integers, read and written field by field.
//!
//! Requests come from the guest and are hostile: every read is checked and nothing is trusted to be aligned,
//! terminated or in range. The numbers are those of Linux `include/uapi/linux/fuse.h`, protocol 7.31 to 7.38.

use rustix::io::Errno;

/// Major version of the protocol.
pub(super) const MAJOR: u32 = 7;
/// Oldest minor version served: the first with `max_pages`, `NO_OPENDIR_SUPPORT` and `CACHE_SYMLINKS`.
pub(super) const MINOR_OLDEST: u32 = 31;
/// Newest minor version this code was written for.
pub(super) const MINOR_NEWEST: u32 = 38;

/// Most data bytes in one READ, READDIR or WRITE.
pub(super) const MAX_DATA: usize = 1 << 20;
/// Pages in [`MAX_DATA`].
pub(super) const MAX_PAGES: u16 = 256;
/// Longest request: data, header, arguments and two names, generously.
pub(super) const MAX_REQUEST: usize = MAX_DATA + 16 * 1024;
/// Longest file name.
pub(super) const MAX_NAME: usize = 255;
/// Longest path from an export's root, and longest symlink target (`PATH_MAX` with its NUL).
pub(super) const MAX_PATH: usize = 4095;

/// Node id of an export's root.
pub(super) const ROOT: u64 = 1;

/// Length of `fuse_out_header`.
pub(super) const OUT_HEADER: usize = 16;
/// Length of `fuse_entry_out`.
pub(super) const ENTRY_OUT: usize = 128;
/// Length of `fuse_dirent` without its name.
pub(super) const DIRENT: usize = 24;
const IN_HEADER: usize = 40;

/// What a request asks for. Operations that are not here are answered with `ENOSYS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opcode {
    Lookup,
    Forget,
    GetAttr,
    SetAttr,
    ReadLink,
    Symlink,
    MkNod,
    MkDir,
    Unlink,
    RmDir,
    Rename,
    Link,
    Open,
    Read,
    Write,
    StatFs,
    Release,
    FSync,
    Flush,
    Init,
    OpenDir,
    ReadDir,
    ReleaseDir,
    FSyncDir,
    Create,
    Interrupt,
    Destroy,
    IoCtl,
    BatchForget,
    FAllocate,
    ReadDirPlus,
    Rename2,
    LSeek,
}

impl Opcode {
    fn of(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Lookup,
            2 => Self::Forget,
            3 => Self::GetAttr,
            4 => Self::SetAttr,
            5 => Self::ReadLink,
            6 => Self::Symlink,
            8 => Self::MkNod,
            9 => Self::MkDir,
            10 => Self::Unlink,
            11 => Self::RmDir,
            12 => Self::Rename,
            13 => Self::Link,
            14 => Self::Open,
            15 => Self::Read,
            16 => Self::Write,
            17 => Self::StatFs,
            18 => Self::Release,
            20 => Self::FSync,
            25 => Self::Flush,
            26 => Self::Init,
            27 => Self::OpenDir,
            28 => Self::ReadDir,
            29 => Self::ReleaseDir,
            30 => Self::FSyncDir,
            35 => Self::Create,
            36 => Self::Interrupt,
            38 => Self::Destroy,
            39 => Self::IoCtl,
            42 => Self::BatchForget,
            43 => Self::FAllocate,
            44 => Self::ReadDirPlus,
            45 => Self::Rename2,
            46 => Self::LSeek,
            _ => return None,
        })
    }

    /// Whether the operation changes the tree.
    pub(super) fn writes(self) -> bool {
        matches!(
            self,
            Self::SetAttr
                | Self::Symlink
                | Self::MkNod
                | Self::MkDir
                | Self::Unlink
                | Self::RmDir
                | Self::Rename
                | Self::Rename2
                | Self::Link
                | Self::Write
                | Self::Create
                | Self::FAllocate
        )
    }
}

/// A request's header and the bytes after it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    /// `None` for an operation this server does not know.
    pub(super) opcode: Option<Opcode>,
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) body: &'a [u8],
    /// Whether the length the header tells is the length that came.
    pub(super) well_framed: bool,
}

impl<'a> Request<'a> {
    /// Reads the header; `None` where there is none, so that nobody could be answered.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, body) = bytes.split_at_checked(IN_HEADER)?;
        let mut fields = Fields(header);
        let length = fields.u32().ok()?;
        let opcode = Opcode::of(fields.u32().ok()?);
        let unique = fields.u64().ok()?;
        let node = fields.u64().ok()?;
        // What follows the ids (uid, gid, pid) is the length of extensions at the end, in units of 8 bytes.
        let extensions = usize::from(u16::from_le_bytes([header[36], header[37]])) * 8;
        let told = u64::from(length) == bytes.len() as u64 && bytes.len() <= MAX_REQUEST;
        let end = body.len().checked_sub(extensions);
        let body = body.get(..end.unwrap_or(0)).unwrap_or_default();
        Some(Self { opcode, unique, node, body, well_framed: told && end.is_some() })
    }

    /// The arguments after the header.
    pub(super) fn fields(&self) -> Fields<'a> {
        Fields(self.body)
    }
}

/// A cursor over a request's arguments. What is missing or malformed is `EINVAL`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*field)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        self.take().map(u64::from_le_bytes)
    }

    pub(super) fn skip(&mut self, count: usize) -> Result<(), Errno> {
        self.0 = self.0.get(count..).ok_or(Errno::INVAL)?;
        Ok(())
    }

    /// The bytes up to a NUL, which is taken too.
    fn terminated(&mut self) -> Result<&'a [u8], Errno> {
        let end = self.0.iter().position(|&byte| byte == 0).ok_or(Errno::INVAL)?;
        let text = &self.0[..end];
        self.0 = &self.0[end + 1..];
        Ok(text)
    }

    /// One file name: any bytes but `/` and NUL, 1 to 255 of them, neither `.` nor `..`.
    pub(super) fn name(&mut self) -> Result<&'a [u8], Errno> {
        let name = self.terminated()?;
        match name {
            b"" | b"." | b".." => Err(Errno::INVAL),
            _ if name.len() > MAX_NAME => Err(Errno::NAMETOOLONG),
            _ if name.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(name),
        }
    }

    /// What a symlink shall point to: any text that fits a path.
    pub(super) fn target(&mut self) -> Result<&'a [u8], Errno> {
        let target = self.terminated()?;
        match target.len() {
            0 => Err(Errno::NOENT),
            length if length > MAX_PATH => Err(Errno::NAMETOOLONG),
            _ => Ok(target),
        }
    }

    /// Exactly `count` data bytes.
    pub(super) fn data(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let data = self.0.get(..count).ok_or(Errno::INVAL)?;
        self.0 = &self.0[count..];
        Ok(data)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Writes one reply into a buffer that its owner may use again.
#[derive(Debug)]
pub(super) struct Writer<'a>(pub(super) &'a mut Vec<u8>);

impl<'a> Writer<'a> {
    /// Starts a reply in `buffer`, leaving room for its header.
    pub(super) fn start(buffer: &'a mut Vec<u8>) -> Self {
        buffer.clear();
        buffer.resize(OUT_HEADER, 0);
        Self(buffer)
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn zeros(&mut self, count: usize) {
        self.0.resize(self.0.len() + count, 0);
    }

    /// Bytes written after the header.
    pub(super) fn written(&self) -> usize {
        self.0.len() - OUT_HEADER
    }

    /// One `fuse_dirent`, padded to 8 bytes.
    pub(super) fn dirent(&mut self, inode: u64, cookie: u64, kind: u32, name: &[u8]) {
        self.u64(inode);
        self.u64(cookie);
        self.u32(name.len() as u32);
        self.u32(kind);
        self.bytes(name);
        self.zeros(name.len().next_multiple_of(8) - name.len());
    }

    /// Completes the header of a notification, which has a code where a reply has its error.
    fn notify(self, code: i32) {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_le_bytes());
        self.0[4..8].copy_from_slice(&code.to_le_bytes());
    }

    /// Completes the header; after an error nothing but the header is kept.
    pub(super) fn finish(self, unique: u64, outcome: Result<(), Errno>) {
        let error = match outcome {
            Ok(()) => 0,
            Err(errno) => {
                self.0.truncate(OUT_HEADER);
                -errno.raw_os_error()
            }
        };
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_le_bytes());
        self.0[4..8].copy_from_slice(&error.to_le_bytes());
        self.0[8..16].copy_from_slice(&unique.to_le_bytes());
    }
}

/// A message the guest did not ask for: forget what is cached of a node, attributes and content.
pub(super) fn notify_inode(node: u64) -> Vec<u8> {
    const CODE: i32 = 2;
    let mut message = Vec::new();
    let mut writer = Writer::start(&mut message);
    writer.u64(node);
    // From the first byte to the last.
    writer.zeros(16);
    writer.notify(CODE);
    message
}

/// A message the guest did not ask for: look `name` up again, whether it was there or not.
pub(super) fn notify_entry(parent: u64, name: &[u8]) -> Vec<u8> {
    const CODE: i32 = 3;
    let mut message = Vec::new();
    let mut writer = Writer::start(&mut message);
    writer.u64(parent);
    writer.u32(name.len() as u32);
    writer.u32(0);
    writer.bytes(name);
    writer.zeros(1);
    writer.notify(CODE);
    message
}

/// Bits of `fuse_init_in.flags`.
pub(super) mod init {
    pub(in super::super) const ASYNC_READ: u32 = 1 << 0;
    pub(in super::super) const BIG_WRITES: u32 = 1 << 5;
    pub(in super::super) const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub(in super::super) const DO_READDIRPLUS: u32 = 1 << 13;
    pub(in super::super) const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub(in super::super) const NO_OPEN_SUPPORT: u32 = 1 << 17;
    pub(in super::super) const PARALLEL_DIROPS: u32 = 1 << 18;
    pub(in super::super) const MAX_PAGES: u32 = 1 << 22;
    pub(in super::super) const CACHE_SYMLINKS: u32 = 1 << 23;
    pub(in super::super) const NO_OPENDIR_SUPPORT: u32 = 1 << 24;
    pub(in super::super) const EXPLICIT_INVAL_DATA: u32 = 1 << 25;
}

/// Bits of `fuse_setattr_in.valid`.
pub(super) mod set {
    pub(in super::super) const MODE: u32 = 1 << 0;
    pub(in super::super) const UID: u32 = 1 << 1;
    pub(in super::super) const GID: u32 = 1 << 2;
    pub(in super::super) const SIZE: u32 = 1 << 3;
    pub(in super::super) const ATIME: u32 = 1 << 4;
    pub(in super::super) const MTIME: u32 = 1 << 5;
    pub(in super::super) const FH: u32 = 1 << 6;
    pub(in super::super) const ATIME_NOW: u32 = 1 << 7;
    pub(in super::super) const MTIME_NOW: u32 = 1 << 8;
}

/// `fuse_getattr_in.getattr_flags`: the file handle is meant.
pub(super) const GETATTR_FH: u32 = 1 << 0;
/// `fuse_fsync_in.fsync_flags`: data only.
pub(super) const FSYNC_DATA: u32 = 1 << 0;
