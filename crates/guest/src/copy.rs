//! Writes a tree that the host sends.
//!
//! The destination is looked up as the guest's programs would; below it no symbolic link is followed. A file is written
//! under a temporary name and renamed, so whoever reads it sees the old content or the new.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Error, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use agentkernel_protocol::frame::{self, FrameError};
use agentkernel_protocol::message::{Entry, Reply};
use agentkernel_protocol::mux::Stream;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use crate::user;

/// Receives entries until `End`, and answers once: as soon as something fails, or when all is written.
pub(crate) async fn receive(
    path: Vec<u8>,
    name: Vec<u8>,
    user: String,
    stream: Stream,
) -> Result<(), FrameError> {
    let is_last = |entry: &Entry| matches!(entry, Entry::End | Entry::Failed { .. });
    receive_entries(stream, is_last, move |entries| write(&path, &name, &user, entries)).await
}

/// Gives `write` what the host sends up to the last entry, and answers once: as soon as it fails, or when it is done.
pub(crate) async fn receive_entries<T, W>(
    stream: Stream,
    is_last: fn(&T) -> bool,
    write: W,
) -> Result<(), FrameError>
where
    T: DeserializeOwned + Send + 'static,
    W: FnOnce(mpsc::Receiver<T>) -> Result<(), String> + Send + 'static,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (sender, receiver) = mpsc::channel(16);
    let mut write = spawn_blocking(move || write(receiver));
    let feed = async {
        loop {
            let entry: T = frame::read(&mut reader).await?;
            let last = is_last(&entry);
            // A writer that failed takes no more; the rest is read all the same, or its answer would be stuck behind it.
            let _ = sender.send(entry).await;
            if last {
                return Ok::<(), FrameError>(());
            }
        }
    };
    tokio::pin!(feed);
    let mut fed = false;
    let reply = loop {
        let (written, result) = either(&mut write, &mut feed, fed).await;
        match (written, result) {
            (Some(Ok(Ok(()))), _) => break Reply::Done,
            (Some(Ok(Err(message))), _) => break Reply::Failed { message },
            (Some(Err(error)), _) => break Reply::Failed { message: error.to_string() },
            (None, Some(Ok(()))) => fed = true,
            (None, Some(Err(error))) => return Err(error),
            (None, None) => {}
        }
    };
    frame::write(&mut writer, &reply).await?;
    if !fed {
        let _ = feed.await;
    }
    Ok(writer.shutdown().await?)
}

type Written = Result<Result<(), String>, tokio::task::JoinError>;

/// Waits for the first of both; the second only if it is not over yet.
async fn either<F: Future<Output = Result<(), FrameError>>>(
    write: &mut tokio::task::JoinHandle<Result<(), String>>,
    feed: &mut std::pin::Pin<&mut F>,
    fed: bool,
) -> (Option<Written>, Option<Result<(), FrameError>>) {
    std::future::poll_fn(|context| {
        if let std::task::Poll::Ready(written) = std::pin::Pin::new(&mut *write).poll(context) {
            return std::task::Poll::Ready((Some(written), None));
        }
        if !fed && let std::task::Poll::Ready(result) = feed.as_mut().poll(context) {
            return std::task::Poll::Ready((None, Some(result)));
        }
        std::task::Poll::Pending
    })
    .await
}

/// Where the tree goes.
struct Target {
    /// Everything is written beneath this directory.
    base: OwnedFd,
    /// Name of the tree's root in it; empty if the root is the base itself.
    name: OsString,
    owner: (u32, u32),
}

fn write(path: &[u8], name: &[u8], user: &str, mut entries: mpsc::Receiver<Entry>) -> Result<(), String> {
    let target = Target::open(Path::new(OsStr::from_bytes(path)), OsStr::from_bytes(name), user)?;
    let mut pending: Option<Pending> = None;
    while let Some(entry) = entries.blocking_recv() {
        if let Entry::Data(bytes) = &entry {
            let pending = pending.as_mut().ok_or("the host sent content of no file")?;
            pending.file.write_all(bytes).map_err(|error| pending.failed(&error))?;
            continue;
        }
        if let Some(pending) = pending.take() {
            pending.finish(&target)?;
        }
        match entry {
            Entry::Directory { path, mode, .. } => target.directory(&path, mode)?,
            Entry::File { path, mode, modified_ns, .. } => {
                pending = Some(target.file(&path, mode, modified_ns)?);
            }
            Entry::Symlink { path, target: link } => target.symlink(&path, OsStr::from_bytes(&link))?,
            Entry::End => return Ok(()),
            Entry::Failed { message } => return Err(message),
            Entry::Special { .. } | Entry::Data(_) => {}
            Entry::Removed { .. } => return Err("the host sent what is no copy".into()),
        }
    }
    if let Some(pending) = pending {
        pending.forget();
    }
    Err("the copy was broken off".into())
}

/// A file that is being written.
struct Pending {
    file: File,
    parent: OwnedFd,
    temporary: String,
    name: OsString,
    path: PathBuf,
    mode: u32,
    modified_ns: i64,
}

impl Pending {
    fn forget(&self) {
        let _ = rustix::fs::unlinkat(&self.parent, &self.temporary, AtFlags::empty());
    }

    fn failed(&self, error: &Error) -> String {
        self.forget();
        format!("cannot write {}: {error}", self.path.display())
    }

    fn finish(self, target: &Target) -> Result<(), String> {
        let put = || -> Result<(), Errno> {
            target.give(&self.file)?;
            rustix::fs::fchmod(&self.file, Mode::from_raw_mode(self.mode & 0o7777))?;
            let time = Timespec {
                tv_sec: self.modified_ns.div_euclid(1_000_000_000),
                tv_nsec: self.modified_ns.rem_euclid(1_000_000_000),
            };
            rustix::fs::futimens(&self.file, &Timestamps { last_access: time, last_modification: time })?;
            rustix::fs::renameat(&self.parent, &self.temporary, &self.parent, &self.name)
        };
        put().map_err(|error| self.failed(&error.into()))
    }
}

impl Target {
    fn open(path: &Path, name: &OsStr, user: &str) -> Result<Self, String> {
        let user = user::resolve(user, None)?;
        let owner = (user.uid, user.gid);
        if !path.is_absolute() {
            return Err(format!("{} is no absolute path", path.display()));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let failed = |path: &Path, error: Errno| format!("{}: {}", path.display(), Error::from(error));
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(base) => Ok(Self { base, name: name.to_owned(), owner }),
            Err(Errno::NOENT | Errno::NOTDIR)
                if !name.is_empty() && !path.as_os_str().as_bytes().ends_with(b"/") =>
            {
                let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                    return Err(format!("{} is no name for a copy", path.display()));
                };
                let base =
                    rustix::fs::open(parent, flags, Mode::empty()).map_err(|error| failed(parent, error))?;
                Ok(Self { base, name: name.to_owned(), owner })
            }
            Err(error) => Err(failed(path, error)),
        }
    }

    /// Where an entry goes, beneath the base.
    fn place(&self, path: &[u8]) -> Result<PathBuf, String> {
        let path = Path::new(OsStr::from_bytes(path));
        let plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if !plain {
            return Err(format!("{} is no path in a copy", path.display()));
        }
        let mut place = PathBuf::from(&self.name);
        if !path.as_os_str().is_empty() {
            place.push(path);
        }
        Ok(place)
    }

    /// The directory an entry goes into, and its name there.
    fn parent(&self, place: &Path) -> Result<(OwnedFd, OsString), String> {
        let parent = place.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let name = place.file_name().ok_or("a copy of a file needs a name")?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let directory = rustix::fs::openat2(&self.base, parent, flags, Mode::empty(), resolve)
            .map_err(|error| format!("cannot enter {}: {}", parent.display(), Error::from(error)))?;
        Ok((directory, name.to_owned()))
    }

    fn give(&self, file: impl AsFd) -> Result<(), Errno> {
        let (uid, gid) = self.owner;
        match rustix::fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))) {
            // A directory of the host: there the owner is the host's.
            Err(Errno::PERM | Errno::INVAL | Errno::NOTSUP) => Ok(()),
            result => result,
        }
    }

    fn directory(&self, path: &[u8], mode: u32) -> Result<(), String> {
        let place = self.place(path)?;
        if place.as_os_str().is_empty() {
            return Ok(());
        }
        let (parent, name) = self.parent(&place)?;
        let failed = |error: Errno| format!("cannot make {}: {}", place.display(), Error::from(error));
        match rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(0o700)) {
            Ok(()) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let directory = rustix::fs::openat(&parent, &name, flags, Mode::empty()).map_err(failed)?;
                self.give(&directory).map_err(failed)?;
                rustix::fs::fchmod(&directory, Mode::from_raw_mode(mode & 0o7777)).map_err(failed)
            }
            Err(Errno::EXIST) => {
                let stat = rustix::fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
                if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    Ok(())
                } else {
                    Err(format!("cannot put a directory in place of {}, which is none", place.display()))
                }
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn file(&self, path: &[u8], mode: u32, modified_ns: i64) -> Result<Pending, String> {
        let place = self.place(path)?;
        let (parent, name) = self.parent(&place)?;
        if let Ok(stat) = rustix::fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW) {
            let kind = FileType::from_raw_mode(stat.st_mode);
            if !matches!(kind, FileType::RegularFile | FileType::Symlink) {
                return Err(format!("cannot put a file in place of {}, which is none", place.display()));
            }
        }
        let temporary = temporary_name();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&parent, &temporary, flags, Mode::from_raw_mode(0o600))
            .map_err(|error| format!("cannot write {}: {}", place.display(), Error::from(error)))?;
        Ok(Pending { file: File::from(file), parent, temporary, name, path: place, mode, modified_ns })
    }

    fn symlink(&self, path: &[u8], link: &OsStr) -> Result<(), String> {
        let place = self.place(path)?;
        let (parent, name) = self.parent(&place)?;
        let temporary = temporary_name();
        let (uid, gid) = self.owner;
        let put = || -> Result<(), Errno> {
            rustix::fs::symlinkat(link, &parent, &temporary)?;
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            // As for files: a directory of the host has owners of its own.
            let _ = rustix::fs::chownat(&parent, &temporary, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW);
            rustix::fs::renameat(&parent, &temporary, &parent, &name)
        };
        put().map_err(|error| {
            let _ = rustix::fs::unlinkat(&parent, &temporary, AtFlags::empty());
            format!("cannot write {}: {}", place.display(), Error::from(error))
        })
    }
}

/// A name that nothing has by chance.
pub(crate) fn temporary_name() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut bytes = [0; 8];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    format!(".copy-{:016x}-{}", u64::from_le_bytes(bytes), NEXT.fetch_add(1, Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(base: &Path, name: &str) -> Target {
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        Target { base: rustix::fs::open(base, flags, Mode::empty()).unwrap(), name: name.into(), owner }
    }

    #[test]
    fn nothing_is_written_through_links_or_outside() {
        let root = tempfile::tempdir().unwrap();
        let (base, outside) = (root.path().join("base"), root.path().join("outside"));
        std::fs::create_dir(&base).unwrap();
        std::fs::create_dir(&outside).unwrap();
        let target = target(&base, "");
        target.symlink(b"link", outside.as_os_str()).unwrap();
        assert!(target.file(b"link/file", 0o644, 0).is_err());
        assert!(target.directory(b"link/directory", 0o755).is_err());
        assert!(target.directory(b"link", 0o755).is_err());
        for path in [b"../file".as_slice(), b"/file", b"", b"a/../../file"] {
            assert!(target.file(path, 0o644, 0).is_err(), "{}", String::from_utf8_lossy(path));
        }
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        // In place of the link, not through it.
        let mut pending = target.file(b"link", 0o640, 1_500_000_000_000_000_000).unwrap();
        pending.file.write_all(b"content").unwrap();
        pending.finish(&target).unwrap();
        assert!(std::fs::symlink_metadata(base.join("link")).unwrap().is_file());
        assert_eq!(std::fs::read(base.join("link")).unwrap(), b"content");
        assert_eq!(std::fs::read_dir(&base).unwrap().count(), 1, "no temporary name is left");
    }
}
