//! Trees of the host: sent to a guest, or made of what a guest sends.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use agentkernel_protocol::frame::CHUNK;
use agentkernel_protocol::message::Entry;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps};
use rustix::io::Errno;
use serde_bytes::ByteBuf;

use super::{CopyError, Entries, Source, Target};
use crate::state::random_word;
use crate::workspace::{RelativePath, TARGET_BYTES_MAX};

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A path of the host that is sent. A symbolic link is sent as one, unless the path ends in `/`.
#[derive(Clone, Debug)]
pub struct HostSource {
    path: PathBuf,
}

impl HostSource {
    /// The tree at `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }
}

/// A directory whose entries are being sent.
struct Level {
    directory: OwnedFd,
    /// Names still to come, the next one last.
    names: Vec<OsString>,
    path_length: usize,
}

impl Source for HostSource {
    fn send(self, send: &mut dyn FnMut(Entry) -> Result<(), CopyError>) -> Result<(), CopyError> {
        let whole = self.path.as_os_str().as_bytes();
        let (parent, name) = match (self.path.parent(), self.path.file_name()) {
            (Some(parent), Some(name)) if !whole.ends_with(b"/") && !whole.ends_with(b"/.") => (parent, name),
            _ => (self.path.as_path(), OsStr::new(".")),
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = rustix::fs::open(parent, flags, Mode::empty())
            .map_err(|error| CopyError::path(parent.display())(error.into()))?;
        let mut path = Vec::new();
        let at = |error: std::io::Error| CopyError::path(self.path.display())(error);
        let mut levels = Vec::new();
        if let Some(directory) = report(&parent, name, &path, send, &self.path)? {
            levels.push(Level { names: names(&directory).map_err(at)?, directory, path_length: 0 });
        }
        while let Some(level) = levels.last_mut() {
            path.truncate(level.path_length);
            let Some(name) = level.names.pop() else {
                levels.pop();
                continue;
            };
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name.as_bytes());
            let shown = self.path.join(OsStr::from_bytes(&path));
            if let Some(directory) = report(&level.directory, &name, &path, send, &shown)? {
                let names = names(&directory).map_err(CopyError::path(shown.display()))?;
                levels.push(Level { names, directory, path_length: path.len() });
            }
        }
        Ok(())
    }
}

/// The names in a directory, the first one last.
fn names(directory: &OwnedFd) -> std::io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    names.sort_by(|first, second| second.cmp(first));
    Ok(names)
}

/// Sends one entry; returns it opened if it is a directory to descend into.
fn report(
    parent: &OwnedFd,
    name: &OsStr,
    path: &[u8],
    send: &mut dyn FnMut(Entry) -> Result<(), CopyError>,
    shown: &Path,
) -> Result<Option<OwnedFd>, CopyError> {
    let failed = |error: Errno| CopyError::path(shown.display())(error.into());
    let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    let path = ByteBuf::from(path);
    let mode = stat.st_mode & 0o7777;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let directory = rustix::fs::openat(parent, name, DIRECTORY, Mode::empty()).map_err(failed)?;
            send(Entry::Directory { path, mode, opaque: false })?;
            Ok(Some(directory))
        }
        FileType::RegularFile => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = rustix::fs::openat(parent, name, flags, Mode::empty()).map_err(failed)?;
            send_file(File::from(file), path, &stat, send, shown)?;
            Ok(None)
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(parent, name, Vec::new()).map_err(failed)?;
            send(Entry::Symlink { path, target: ByteBuf::from(target.into_bytes()) })?;
            Ok(None)
        }
        _ => send(Entry::Special { path }).map(|()| None),
    }
}

fn send_file(
    mut file: File,
    path: ByteBuf,
    stat: &Stat,
    send: &mut dyn FnMut(Entry) -> Result<(), CopyError>,
    shown: &Path,
) -> Result<(), CopyError> {
    let size = stat.st_size.cast_unsigned();
    let nanoseconds = i64::try_from(stat.st_mtime_nsec).unwrap_or(0);
    let modified_ns = stat.st_mtime.saturating_mul(1_000_000_000).saturating_add(nanoseconds);
    send(Entry::File { path, mode: stat.st_mode & 0o7777, size, modified_ns })?;
    let mut left = size;
    let mut buffer = vec![0; CHUNK];
    while left > 0 {
        let want = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let count = file.read(&mut buffer[..want]).map_err(CopyError::path(shown.display()))?;
        if count == 0 {
            let error = std::io::Error::other("it became shorter while it was read");
            return Err(CopyError::path(shown.display())(error));
        }
        send(Entry::Data(ByteBuf::from(&buffer[..count])))?;
        left -= count as u64;
    }
    Ok(())
}

/// Where on the host a guest's tree goes: into the directory `path` under `name` if there is one, else to `path` itself.
#[derive(Clone, Debug)]
pub struct HostTarget {
    path: PathBuf,
    name: OsString,
}

/// The opened destination: everything is written beneath `base`.
struct Place {
    base: OwnedFd,
    /// Name of the tree's root in the base; empty if the root is the base.
    name: OsString,
    shown: PathBuf,
}

impl HostTarget {
    /// The destination `path`. In an existing directory the tree is called `name`; with an empty name what the sent
    /// directory holds goes into the directory `path`.
    pub fn new(path: &Path, name: &OsStr) -> Self {
        Self { path: path.to_owned(), name: name.to_owned() }
    }

    fn open(&self) -> Result<Place, CopyError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |path: &Path| rustix::fs::open(path, flags, Mode::empty());
        // A link at the destination may be a guest's, that came with an apply: it is followed only where that is said.
        let followed = self.path.as_os_str().as_bytes().ends_with(b"/") || self.name.is_empty();
        if !followed && std::fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.is_symlink()) {
            let path = self.path.display();
            return Err(CopyError::Refused(format!("{path} is a symbolic link: write {path}/ to follow it")));
        }
        let failed = |path: &Path, error: Errno| CopyError::path(path.display())(error.into());
        match open(&self.path) {
            Ok(base) => Ok(Place { base, name: self.name.clone(), shown: self.path.clone() }),
            Err(Errno::NOENT | Errno::NOTDIR)
                if !self.name.is_empty() && !self.path.as_os_str().as_bytes().ends_with(b"/") =>
            {
                let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
                let parent = parent.unwrap_or(Path::new("."));
                let Some(name) = self.path.file_name() else { return Err(failed(&self.path, Errno::INVAL)) };
                let base = open(parent).map_err(|error| failed(parent, error))?;
                Ok(Place { base, name: name.to_owned(), shown: parent.to_owned() })
            }
            Err(error) => Err(failed(&self.path, error)),
        }
    }
}

impl Target for HostTarget {
    fn take(self, entries: &mut Entries) -> Result<(), CopyError> {
        let place = self.open()?;
        while let Some(entry) = entries.next_entry()? {
            match entry {
                Entry::Directory { path, mode, .. } => place.directory(&path, mode)?,
                Entry::File { path, mode, modified_ns, .. } => {
                    place.file(&path, mode, modified_ns, entries)?
                }
                Entry::Symlink { path, target } => place.symlink(&path, &target)?,
                _ => {}
            }
        }
        Ok(())
    }
}

impl Place {
    /// Where an entry goes, beneath the base; the path is a hostile guest's.
    fn locate(&self, path: &[u8]) -> Result<PathBuf, CopyError> {
        let mut place = PathBuf::from(&self.name);
        if !path.is_empty() {
            let path = RelativePath::parse(path).map_err(|error| {
                CopyError::Refused(format!("{}: {error}", crate::printable(&String::from_utf8_lossy(path))))
            })?;
            place.push(path.as_path());
        }
        Ok(place)
    }

    fn failed(&self, place: &Path) -> impl FnOnce(Errno) -> CopyError + use<> {
        let path = self.shown.join(place).display().to_string();
        move |error| CopyError::path(crate::printable(&path))(error.into())
    }

    fn parent(&self, place: &Path) -> Result<(OwnedFd, OsString), CopyError> {
        let Some(name) = place.file_name() else {
            return Err(CopyError::Refused("a copy of a file needs a name".into()));
        };
        let parent = place.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let directory = rustix::fs::openat2(&self.base, parent, flags, Mode::empty(), resolve)
            .map_err(self.failed(parent))?;
        Ok((directory, name.to_owned()))
    }

    fn directory(&self, path: &[u8], mode: u32) -> Result<(), CopyError> {
        let place = self.locate(path)?;
        if place.as_os_str().is_empty() {
            return Ok(());
        }
        let (parent, name) = self.parent(&place)?;
        // The owner may always fill what is being copied, whatever the guest's bits are.
        let mode = Mode::from_raw_mode(mode & 0o777 | 0o700);
        match rustix::fs::mkdirat(&parent, &name, mode) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => {
                let stat = rustix::fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(self.failed(&place))?;
                match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Directory => Ok(()),
                    _ => Err(self.failed(&place)(Errno::NOTDIR)),
                }
            }
            Err(error) => Err(self.failed(&place)(error)),
        }
    }

    fn file(&self, path: &[u8], mode: u32, modified_ns: i64, entries: &mut Entries) -> Result<(), CopyError> {
        let place = self.locate(path)?;
        let (parent, name) = self.parent(&place)?;
        let temporary = format!(".agentkernel-{}", random_word());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&parent, &temporary, flags, Mode::from_raw_mode(0o600))
            .map_err(self.failed(&place))?;
        let mut file = File::from(file);
        let mut write = || -> Result<(), CopyError> {
            while let Some(bytes) = entries.next_data()? {
                file.write_all(&bytes).map_err(CopyError::path(self.shown.join(&place).display()))?;
            }
            // Set-id bits never leave a guest.
            rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o777)).map_err(self.failed(&place))?;
            let time = Timespec {
                tv_sec: modified_ns.div_euclid(1_000_000_000),
                tv_nsec: modified_ns.rem_euclid(1_000_000_000),
            };
            rustix::fs::futimens(&file, &Timestamps { last_access: time, last_modification: time })
                .map_err(self.failed(&place))?;
            rustix::fs::renameat(&parent, &temporary, &parent, &name).map_err(self.failed(&place))
        };
        write().inspect_err(|_| {
            let _ = rustix::fs::unlinkat(&parent, &temporary, AtFlags::empty());
        })
    }

    fn symlink(&self, path: &[u8], target: &[u8]) -> Result<(), CopyError> {
        if target.is_empty() || target.len() > TARGET_BYTES_MAX || target.contains(&0) {
            return Err(CopyError::Refused("a symbolic link that no system has".into()));
        }
        let place = self.locate(path)?;
        let (parent, name) = self.parent(&place)?;
        let temporary = format!(".agentkernel-{}", random_word());
        let put = || -> Result<(), Errno> {
            rustix::fs::symlinkat(OsStr::from_bytes(target), &parent, &temporary)?;
            rustix::fs::renameat(&parent, &temporary, &parent, &name)
        };
        put().map_err(|error| {
            let _ = rustix::fs::unlinkat(&parent, &temporary, AtFlags::empty());
            self.failed(&place)(error)
        })
    }
}
