//! Copies of a machine's memory, made from outside while it stands still.
//!
//! ```text
//! booted machine      memory is a file in memory (memfd)        its data ──────────────────────────────────┐
//! restored machine    memory maps a file privately              that file ──(before the machine stops)──┐  │
//!                     what it wrote lies in pages of its own    those pages ──(while it stands still)──┐ │  │
//!                                                                                                      ▼ ▼  ▼
//!                                                               a new sparse file, which others map privately
//! ```
//! INVARIANT: the caller knows that the process is the machine it means ([`Capture::open`] is told a file that only that
//! machine holds open); what the process maps is its own affair, and only ever copied out of itself.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use rustix::fs::SeekFrom;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Bytes moved at a time.
pub(crate) const CHUNK: usize = 1 << 20;
/// Bits of an entry of `/proc/PID/pagemap` (`Documentation/admin-guide/mm/pagemap.rst`): a page of a file, or shared.
const FILE_PAGE: u64 = 1 << 61;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;
/// Bytes of such an entry.
const ENTRY: u64 = 8;
/// Most lines that are read of `/proc/PID/maps`.
const MAPS_LIMIT: u64 = 4 << 20;

/// The memory of a machine, on its way into a file.
#[derive(Debug)]
pub struct Capture {
    process: u32,
    /// Refers to the process as long as it is held; its number could come to mean another.
    handle: std::os::fd::OwnedFd,
    /// The file behind the memory.
    base: File,
    mappings: Vec<Area>,
    size: u64,
}

/// A part of a process's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Area {
    pub start: u64,
    pub end: u64,
    /// Where in the file it begins.
    pub offset: u64,
    /// That of the file; 0 if there is none.
    pub inode: u64,
    /// `PROT_*`.
    pub protection: i32,
    pub is_shared: bool,
}

impl Capture {
    /// Finds the memory, of `size` bytes, of the machine that is process `process` and holds `held` open.
    ///
    /// # Errors
    /// If the process does not hold that file, has no such memory, or may not be looked into.
    pub fn open(process: u32, held: &File, size: u64) -> io::Result<Self> {
        let pid = i32::try_from(process).ok().and_then(Pid::from_raw);
        let handle = pidfd_open(pid.ok_or(ErrorKind::InvalidInput)?, PidfdFlags::empty())?;
        let held = held.metadata()?;
        let files = open_files(process)?;
        let is_held = |path: &PathBuf| {
            fs::metadata(path).is_ok_and(|data| (data.dev(), data.ino()) == (held.dev(), held.ino()))
        };
        if !files.iter().any(is_held) {
            return Err(io::Error::new(ErrorKind::NotFound, "the process is not the machine it should be"));
        }
        let maps = read_limited(&format!("/proc/{process}/maps"))?;
        let areas = maps.lines().filter_map(parse_area).map(|(area, _)| area);
        let all: Vec<Area> = areas.filter(|area| area.inode != 0).collect();
        let missing = || io::Error::new(ErrorKind::NotFound, "the machine's memory was not found");
        for path in &files {
            let Ok(data) = fs::metadata(path) else { continue };
            let is_memory = |mapping: &&Area| mapping.inode == data.ino();
            let mappings: Vec<Area> = all.iter().filter(is_memory).copied().collect();
            let mapped: u64 = mappings.iter().map(|mapping| mapping.end - mapping.start).sum();
            if data.is_file() && data.len() == size && mapped == size {
                // What was a file a moment ago is whatever the process makes of it: opening must not wait.
                let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
                let base = File::options().read(true).custom_flags(flags).open(path)?;
                return Ok(Self { process, handle, base, mappings, size });
            }
        }
        Err(missing())
    }

    /// Copies what the machine cannot change any more. Needs no pause, and may take long.
    ///
    /// # Errors
    /// If the disk is full.
    pub fn prepare(&self, target: &File) -> io::Result<()> {
        if self.is_shared() {
            return target.set_len(self.size);
        }
        copy_sparsely(&self.base, target)
    }

    /// Copies what the machine wrote. It must stand still.
    ///
    /// # Errors
    /// If the disk is full, or the machine has ended.
    pub fn finish(&self, target: &File) -> io::Result<()> {
        if self.is_shared() {
            return copy_data(&self.base, target);
        }
        let memory = File::open(format!("/proc/{}/mem", self.process))?;
        let pages = OwnPages::open(self.process)?;
        let mut buffer = vec![0; CHUNK];
        for area in &self.mappings {
            for run in pages.runs(area.start..area.end)? {
                let to = area.offset + (run.start - area.start);
                copy_range(&memory, run, target, to, &mut buffer)?;
            }
        }
        Ok(())
    }

    fn is_shared(&self) -> bool {
        self.mappings.iter().all(|mapping| mapping.is_shared)
    }

    /// Whether the process has ended.
    pub(crate) fn has_ended(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut polled = [PollFd::new(&self.handle, PollFlags::IN)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) != Ok(0)
    }

    /// The process.
    pub(crate) fn process(&self) -> u32 {
        self.process
    }

    /// What lies behind the memory: a file, or memory that is called one.
    pub(crate) fn base(&self) -> &File {
        &self.base
    }
}

/// Which of its pages a process has of its own.
#[derive(Debug)]
pub(crate) struct OwnPages {
    table: File,
    page: u64,
}

impl OwnPages {
    pub(crate) fn open(process: u32) -> io::Result<Self> {
        let table = File::open(format!("/proc/{process}/pagemap"))?;
        Ok(Self { table, page: rustix::param::page_size() as u64 })
    }

    /// Those that are not of a file, in runs of neighbours.
    pub(crate) fn runs(&self, area: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let step = CHUNK as u64 / ENTRY * self.page;
        let mut entries = vec![0; CHUNK];
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut start = area.start;
        while start < area.end {
            let end = area.end.min(start + step);
            let count = usize::try_from((end - start) / self.page * ENTRY).map_err(io::Error::other)?;
            let entries = &mut entries[..count];
            self.table.read_exact_at(entries, start / self.page * ENTRY)?;
            for (index, entry) in entries.chunks_exact(ENTRY as usize).enumerate() {
                let entry = entry.try_into().map_or(0, u64::from_le_bytes);
                if entry & (PRESENT | SWAPPED) == 0 || entry & FILE_PAGE != 0 {
                    continue;
                }
                let page = start + index as u64 * self.page;
                match runs.last_mut() {
                    Some(run) if run.end == page => run.end += self.page,
                    _ => runs.push(page..page + self.page),
                }
            }
            start = end;
        }
        Ok(runs)
    }
}

/// Copies what a process has at these addresses to `to`.
pub(crate) fn copy_range(
    memory: &File,
    addresses: Range<u64>,
    target: &File,
    to: u64,
    buffer: &mut [u8],
) -> io::Result<()> {
    let mut at = addresses.start;
    while at < addresses.end {
        let count = usize::try_from(addresses.end - at).unwrap_or(usize::MAX).min(buffer.len());
        memory.read_exact_at(&mut buffer[..count], at)?;
        target.write_all_at(&buffer[..count], to + (at - addresses.start))?;
        at += count as u64;
    }
    Ok(())
}

/// The links to the files that a process holds open.
fn open_files(process: u32) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(format!("/proc/{process}/fd"))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

pub(crate) fn read_limited(path: &str) -> io::Result<String> {
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(File::open(path)?, MAPS_LIMIT), &mut text)?;
    Ok(text)
}

/// A line of `/proc/PID/maps`: `start-end permissions offset device inode path`; and the path, or the kernel's name.
pub(crate) fn parse_area(line: &str) -> Option<(Area, &str)> {
    let mut words = line.splitn(6, ' ');
    let (start, end) = words.next()?.split_once('-')?;
    let permissions = words.next()?;
    let offset = words.next()?;
    let inode = words.nth(1)?.parse().ok()?;
    let name = words.next().unwrap_or_default().trim_start();
    let hexadecimal = |text| u64::from_str_radix(text, 16).ok();
    let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
    let bits = [('r', libc::PROT_READ), ('w', libc::PROT_WRITE), ('x', libc::PROT_EXEC)];
    let bits = bits.into_iter().filter(|(letter, _)| permissions.contains(*letter));
    let protection = bits.fold(libc::PROT_NONE, |all, (_, bit)| all | bit);
    let is_shared = permissions.ends_with('s');
    let area = Area { start, end, offset: hexadecimal(offset)?, inode, protection, is_shared };
    (start < end).then_some((area, name))
}

/// Makes `target` a copy of `source`: by reference where the file system can do that, else its data, and holes as holes.
///
/// # Errors
/// If the disk is full.
pub fn copy_sparsely(source: &File, target: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(target, source).is_ok() {
        return Ok(());
    }
    target.set_len(source.metadata()?.len())?;
    copy_data(source, target)
}

/// Copies the regions that hold data to the same places.
fn copy_data(source: &File, target: &File) -> io::Result<()> {
    use rustix::io::Errno;
    let length = source.metadata()?.len();
    let mut buffer = Vec::new();
    let mut position = 0;
    while position < length {
        let start = match rustix::fs::seek(source, SeekFrom::Data(position)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(source, SeekFrom::Hole(start))?.min(length);
        let (mut from, mut to) = (start, start);
        while from < end {
            let count = usize::try_from(end - from).unwrap_or(usize::MAX).min(CHUNK);
            let copied = if buffer.is_empty() {
                rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), count)
            } else {
                Err(Errno::XDEV)
            };
            match copied {
                Ok(1..) => {}
                // Cut short meanwhile.
                Ok(0) => return Ok(()),
                // Of another kind of file system: by hand. Such ones may not tell their holes either.
                Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                    buffer.resize(CHUNK, 0);
                    let count = source.read_at(&mut buffer[..count], from)?;
                    if count == 0 {
                        return Ok(());
                    }
                    if buffer[..count].iter().any(|byte| *byte != 0) {
                        target.write_all_at(&buffer[..count], from)?;
                    }
                    from += count as u64;
                    to = from;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        position = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read() {
        let line = "7f0000000000-7f0020000000 rw-p 00001000 fd:01 5431     /a b (deleted)";
        let (area, name) = parse_area(line).unwrap();
        assert_eq!((area.start, area.offset, area.inode), (0x7f00_0000_0000, 0x1000, 5431));
        assert_eq!((area.protection, area.is_shared), (libc::PROT_READ | libc::PROT_WRITE, false));
        assert_eq!(name, "/a b (deleted)");
        let (area, name) = parse_area("10-20 ---s 0 0:0 0 ").unwrap();
        assert_eq!((area.inode, area.protection, area.is_shared, name), (0, libc::PROT_NONE, true, ""));
        for line in ["", "1-2", "7f00-7f00 r--p 0 0:0 1", "zz-10 rw-s 0 0:0 7 x", "10-20 rw-s 0 0:0"] {
            assert_eq!(parse_area(line), None, "{line}");
        }
    }

    #[test]
    fn holes_stay_holes() {
        let (source, target) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        source.set_len(64 << 20).unwrap();
        source.write_all_at(b"data", 32 << 20).unwrap();
        copy_sparsely(&source, &target).unwrap();
        let mut data = [0; 4];
        target.read_exact_at(&mut data, 32 << 20).unwrap();
        assert_eq!(&data, b"data");
        assert_eq!(target.metadata().unwrap().len(), 64 << 20);
        assert!(target.metadata().unwrap().blocks() < 4096);
    }

    #[test]
    fn another_process_is_refused() {
        let held = tempfile::tempfile().unwrap();
        let error = Capture::open(std::process::id(), &held, 1 << 30).unwrap_err();
        assert_eq!(error.to_string(), "the machine's memory was not found");
        let init = Capture::open(1, &held, 1 << 30).unwrap_err();
        assert!(matches!(init.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied), "{init}");
    }
}
