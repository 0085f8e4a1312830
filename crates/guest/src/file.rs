//! Single files that the host reads, writes or removes.
//!
//! A path is looked up as the guest's programs would look it up, by root: links of the guest's lead where they lead inside
//! the guest. A file is written under a temporary name and renamed, so whoever reads it sees the old content or the new.

use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io::{Error, ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use agentkernel_protocol::frame::{self, CHUNK, FrameError};
use agentkernel_protocol::message::{FILE_LIMIT, FileFailure, FileInput, FileReply};
use agentkernel_protocol::mux::Stream;
use rustix::fs::{Gid, OFlags, Uid};
use rustix::io::Errno;
use serde_bytes::ByteBuf;
use tokio::io::AsyncWriteExt;
use tokio::task::spawn_blocking;

use crate::copy::temporary_name;
use crate::user::{self, User};

/// Most symbolic links on the way to a file that does not exist yet (path_resolution(7)).
const LINKS: usize = 40;

/// The answer of an agent that was not told yet what it is.
pub(crate) fn not_configured() -> FileReply {
    FileReply::Failed { kind: FileFailure::Other, message: "the machine is not configured yet".into() }
}

/// Sends a file's content.
pub(crate) async fn read(path: Vec<u8>, mut stream: Stream) -> Result<(), FrameError> {
    let read = spawn_blocking(move || content(Path::new(OsStr::from_bytes(&path)))).await;
    let last = match read {
        Ok(Ok(content)) => {
            for bytes in content.chunks(CHUNK) {
                frame::write(&mut stream, &FileReply::Data(ByteBuf::from(bytes))).await?;
            }
            FileReply::Done
        }
        Ok(Err(failed)) => failed.reply(),
        Err(error) => Failed::new(FileFailure::Other, error.to_string()).reply(),
    };
    frame::write(&mut stream, &last).await?;
    Ok(stream.shutdown().await?)
}

/// Takes a file's content and writes it.
pub(crate) async fn write(path: Vec<u8>, user: String, stream: Stream) -> Result<(), FrameError> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut content = Vec::new();
    let reply = loop {
        match frame::read(&mut reader).await? {
            FileInput::Data(bytes) if content.len() + bytes.len() <= FILE_LIMIT => content.extend(bytes),
            FileInput::Data(_) => break too_large().reply(),
            FileInput::End => {
                let put = move || put(Path::new(OsStr::from_bytes(&path)), &user, &content);
                break done(spawn_blocking(put).await);
            }
        }
    };
    frame::write(&mut writer, &reply).await?;
    Ok(writer.shutdown().await?)
}

/// Removes a file.
pub(crate) async fn remove(path: Vec<u8>, mut stream: Stream) -> Result<(), FrameError> {
    let unlink = move || unlink(Path::new(OsStr::from_bytes(&path)));
    let reply = done(spawn_blocking(unlink).await);
    frame::write(&mut stream, &reply).await?;
    Ok(stream.shutdown().await?)
}

fn unlink(path: &Path) -> Result<(), Failed> {
    std::fs::remove_file(path).map_err(|error| {
        // Some file systems say something else of a directory.
        let directory = path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
        if directory { directory_failed(path) } else { Failed::of("remove", path, &error) }
    })
}

fn done(result: Result<Result<(), Failed>, tokio::task::JoinError>) -> FileReply {
    match result {
        Ok(Ok(())) => FileReply::Done,
        Ok(Err(failed)) => failed.reply(),
        Err(error) => Failed::new(FileFailure::Other, error.to_string()).reply(),
    }
}

/// Why it could not be done.
#[derive(Debug, PartialEq, Eq)]
struct Failed {
    kind: FileFailure,
    message: String,
}

impl Failed {
    fn new(kind: FileFailure, message: String) -> Self {
        Self { kind, message }
    }

    fn of(what: &str, path: &Path, error: &Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => FileFailure::NotFound,
            ErrorKind::IsADirectory => FileFailure::Directory,
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => FileFailure::Full,
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem | ErrorKind::ResourceBusy => {
                FileFailure::Refused
            }
            _ => FileFailure::Other,
        };
        Self::new(kind, format!("cannot {what} {}: {error}", path.display()))
    }

    fn reply(self) -> FileReply {
        FileReply::Failed { kind: self.kind, message: self.message }
    }
}

fn directory_failed(path: &Path) -> Failed {
    Failed::new(FileFailure::Directory, format!("{} is a directory", path.display()))
}

fn too_large() -> Failed {
    Failed::new(FileFailure::TooLarge, format!("the file is larger than {} MiB", FILE_LIMIT >> 20))
}

/// Refuses what is no regular file.
fn regular(path: &Path, metadata: &Metadata) -> Result<(), Failed> {
    if metadata.is_dir() {
        Err(directory_failed(path))
    } else if metadata.is_file() {
        Ok(())
    } else {
        Err(Failed::new(FileFailure::Special, format!("{} is no regular file", path.display())))
    }
}

fn content(path: &Path) -> Result<Vec<u8>, Failed> {
    let failed = |error: Error| Failed::of("read", path, &error);
    // Before it is opened, which with some has effects; and without waiting, should it be another thing by then.
    regular(path, &path.metadata().map_err(failed)?)?;
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits();
    let open = File::options().read(true).custom_flags(i32::try_from(flags).unwrap_or(0)).open(path);
    let file = open.map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    regular(path, &metadata)?;
    if metadata.len() > FILE_LIMIT as u64 {
        return Err(too_large());
    }
    let mut content = Vec::new();
    // It may grow meanwhile, or be one whose size is not known before (proc(5)).
    file.take(FILE_LIMIT as u64 + 1).read_to_end(&mut content).map_err(failed)?;
    if content.len() > FILE_LIMIT { Err(too_large()) } else { Ok(content) }
}

fn put(path: &Path, user: &str, content: &[u8]) -> Result<(), Failed> {
    let user = user::resolve(user, None).map_err(|message| Failed::new(FileFailure::Other, message))?;
    let path = &target(path)?;
    let failed = |error: Error| Failed::of("write", path, &error);
    let existing = match path.metadata() {
        Ok(metadata) => Some(metadata),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(failed(error)),
    };
    if let Some(metadata) = &existing {
        regular(path, metadata)?;
    }
    let parent = path.parent().filter(|_| path.file_name().is_some());
    let parent = parent.ok_or_else(|| directory_failed(path))?;
    make_directories(parent, &user)?;
    let draft = parent.join(temporary_name());
    let write = || -> std::io::Result<()> {
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&draft)?;
        file.write_all(content)?;
        let (uid, gid, mode) = match &existing {
            Some(metadata) => (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777),
            None => (user.uid, user.gid, 0o644),
        };
        give(&file, uid, gid)?;
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        match std::fs::rename(&draft, path) {
            // Something is mounted there, such as `/etc/hosts`: it cannot be replaced, but written.
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                std::fs::write(path, content)?;
                std::fs::remove_file(&draft)
            }
            renamed => renamed,
        }
    };
    write().map_err(|error| {
        let _ = std::fs::remove_file(&draft);
        failed(error)
    })
}

/// The file that a path means: where symbolic links lead, also one that leads to nothing yet.
fn target(path: &Path) -> Result<PathBuf, Failed> {
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        match std::fs::read_link(&path) {
            Ok(link) => path = path.parent().unwrap_or(Path::new("/")).join(link),
            Err(_) => return Ok(path),
        }
    }
    Err(Failed::of("write", &path, &Errno::LOOP.into()))
}

/// Makes what is missing of a directory's path, for the user.
fn make_directories(path: &Path, user: &User) -> Result<(), Failed> {
    let mut missing = Vec::new();
    let mut at = Some(path);
    while let Some(directory) = at.filter(|directory| directory.symlink_metadata().is_err()) {
        missing.push(directory);
        at = directory.parent();
    }
    for directory in missing.into_iter().rev() {
        let make = || -> std::io::Result<()> {
            match std::fs::create_dir(directory) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(()),
                made => made?,
            }
            // Whoever owns the directory above may have put a link there meanwhile.
            let flags = (OFlags::DIRECTORY | OFlags::NOFOLLOW).bits();
            let made =
                File::options().read(true).custom_flags(i32::try_from(flags).unwrap_or(0)).open(directory)?;
            give(&made, user.uid, user.gid)?;
            made.set_permissions(std::fs::Permissions::from_mode(0o755))
        };
        make().map_err(|error| Failed::of("make", directory, &error))?;
    }
    Ok(())
}

fn give(file: &File, uid: u32, gid: u32) -> std::io::Result<()> {
    match rustix::fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))) {
        // A directory of the host: there the owner is the host's.
        Err(Errno::PERM | Errno::INVAL | Errno::NOTSUP) => Ok(()),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn me() -> String {
        format!("{}:{}", rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
    }

    fn kind<T: std::fmt::Debug>(result: Result<T, Failed>) -> FileFailure {
        result.unwrap_err().kind
    }

    #[test]
    fn files_are_written_whole_through_links_and_keep_their_permissions() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("a/b/file");
        put(&file, &me(), b"one").unwrap();
        assert_eq!(content(&file).unwrap(), b"one");
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o644);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o751)).unwrap();
        let link = root.path().join("link");
        symlink("a/b/file", &link).unwrap();
        put(&link, &me(), b"two").unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!((content(&link).unwrap(), content(&file).unwrap()), (b"two".to_vec(), b"two".to_vec()));
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o751);
        let dangling = root.path().join("dangling");
        symlink(root.path().join("new"), &dangling).unwrap();
        put(&dangling, &me(), b"three").unwrap();
        assert_eq!(content(&root.path().join("new")).unwrap(), b"three");
        assert_eq!(file.parent().unwrap().read_dir().unwrap().count(), 1, "no temporary name is left");
        assert_eq!(file.parent().unwrap().metadata().unwrap().mode() & 0o7777, 0o755);
        // A link goes, and where it leads stays.
        unlink(&link).unwrap();
        assert!(link.symlink_metadata().is_err() && file.exists());
        unlink(&file).unwrap();
        assert_eq!(kind(unlink(&file)), FileFailure::NotFound);
        assert_eq!(kind(unlink(root.path())), FileFailure::Directory);
    }

    #[test]
    fn what_is_no_file_is_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        rustix::fs::mkfifoat(rustix::fs::CWD, path("fifo"), rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        symlink("loop", path("loop")).unwrap();
        std::fs::write(path("file"), b"x").unwrap();
        assert_eq!(kind(content(&path("none"))), FileFailure::NotFound);
        assert_eq!(kind(content(&path("file/below"))), FileFailure::NotFound);
        assert_eq!(kind(content(root.path())), FileFailure::Directory);
        assert_eq!(kind(content(&path("fifo"))), FileFailure::Special);
        assert_eq!(kind(content(&path("socket"))), FileFailure::Special);
        assert_eq!(kind(content(Path::new("/dev/zero"))), FileFailure::Special);
        assert_eq!(kind(put(root.path(), &me(), b"")), FileFailure::Directory);
        assert_eq!(kind(put(Path::new("/"), &me(), b"")), FileFailure::Directory);
        assert_eq!(kind(put(&path("fifo"), &me(), b"")), FileFailure::Special);
        assert_eq!(kind(put(&path("file/below"), &me(), b"")), FileFailure::NotFound);
        assert_eq!(kind(put(&path("loop"), &me(), b"")), FileFailure::Other);
        let large = File::create(path("large")).unwrap();
        large.set_len(FILE_LIMIT as u64 + 1).unwrap();
        assert_eq!(kind(content(&path("large"))), FileFailure::TooLarge);
        large.set_len(FILE_LIMIT as u64).unwrap();
        assert_eq!(content(&path("large")).unwrap().len(), FILE_LIMIT);
        assert!(!content(Path::new("/proc/self/status")).unwrap().is_empty());
    }
}
