//! Sends a tree: an upper layer, to tell what was changed in a copy-on-write mount, or what is copied to the host.
//!
//! A layer is read as overlayfs writes it: a character device 0/0 stands for something removed, and the attribute
//! `trusted.overlay.opaque` for a directory through which nothing shows.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{Error, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::Arc;

use agentkernel_protocol::frame::{self, CHUNK, FrameError};
use agentkernel_protocol::message::Entry;
use agentkernel_protocol::mux::Stream;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use serde_bytes::ByteBuf;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

pub(crate) const OPAQUE: &str = "trusted.overlay.opaque";
/// Deepest directory that is listed; deeper ones have paths longer than any program can use.
const DEPTH_LIMIT: usize = 2048;

/// Files up to this size are read to their end before their size is told, bytes.
const SMALL: u64 = 64 << 10;
/// Longest file without a size, as those of `/proc` are, bytes.
const SIZELESS_LIMIT: u64 = 4 << 20;

/// Sends what is in a layer, then `End`.
pub(crate) async fn send_layer(upper: Arc<OwnedFd>, stream: Stream) -> Result<(), FrameError> {
    serve(stream, last, move |send| {
        let root = rustix::fs::openat(&upper, ".", directory_flags(), Mode::empty())?;
        walk(root, &mut |parent, name, path| report(parent, name, path, send))
    })
    .await
}

/// Sends the thing at `path` with all that is in it, then `End`.
pub(crate) async fn send_copy(path: Vec<u8>, stream: Stream) -> Result<(), FrameError> {
    serve(stream, last, move |send| {
        let (parent, name) = split(&path)?;
        match report(&parent, &name, b"", send)? {
            Some(directory) => walk(directory, &mut |parent, name, path| report(parent, name, path, send)),
            None => Ok(()),
        }
    })
    .await
}

fn last(result: Result<(), String>) -> Entry {
    match result {
        Ok(()) => Entry::End,
        Err(message) => Entry::Failed { message },
    }
}

/// The directory that `path` is in, and its name there. A path that ends in `/` is followed, and is `.` in itself.
fn split(path: &[u8]) -> Result<(OwnedFd, OsString), Error> {
    let path = Path::new(OsStr::from_bytes(path));
    if !path.is_absolute() {
        return Err(Error::other(format!("{} is no absolute path", path.display())));
    }
    let (parent, name) = match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if !path.as_os_str().as_bytes().ends_with(b"/") => {
            (parent, name.to_owned())
        }
        _ => (path, OsString::from(".")),
    };
    let parent = rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| Error::other(format!("{}: {}", parent.display(), Error::from(error))))?;
    Ok((parent, name))
}

/// Sends what `walk` reports, then what `last` makes of its result.
pub(crate) async fn serve<T, W>(
    mut stream: Stream,
    last: fn(Result<(), String>) -> T,
    walk: W,
) -> Result<(), FrameError>
where
    T: serde::Serialize + Send + 'static,
    W: FnOnce(&mut dyn FnMut(T) -> Result<(), Error>) -> Result<(), Error> + Send + 'static,
{
    let (sender, mut receiver) = mpsc::channel(16);
    let walk = spawn_blocking(move || {
        let mut send = |change| sender.blocking_send(change).map_err(|_| Error::other("the host is gone"));
        let result = walk(&mut send).map_err(|error| error.to_string());
        let _ = send(last(result));
    });
    while let Some(change) = receiver.recv().await {
        frame::write(&mut stream, &change).await?;
    }
    let _ = walk.await;
    Ok(stream.shutdown().await?)
}

/// A directory whose entries are being listed.
struct Level {
    directory: OwnedFd,
    /// Names still to come, the next one last.
    names: Vec<OsString>,
    /// Length of this directory's own path in the path buffer.
    path_length: usize,
}

/// Told of an entry: the directory it is in, its name there, its path. Returns it opened if it is to be descended into.
type Visit<'a> = &'a mut dyn FnMut(&OwnedFd, &OsString, &[u8]) -> Result<Option<OwnedFd>, Error>;

/// Walks the tree below `root`, parents before children, names in order.
pub(crate) fn walk(root: OwnedFd, visit: Visit<'_>) -> Result<(), Error> {
    let mut path = Vec::new();
    let mut levels = vec![Level { names: names(&root)?, directory: root, path_length: 0 }];
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
        if let Some(directory) = visit(&level.directory, &name, &path)? {
            if levels.len() >= DEPTH_LIMIT {
                return Err(Error::other("directories are nested too deeply"));
            }
            levels.push(Level { names: names(&directory)?, directory, path_length: path.len() });
        }
    }
    Ok(())
}

/// Sends one entry; returns it opened if it is a directory to descend into.
fn report(
    parent: &OwnedFd,
    name: &OsString,
    path: &[u8],
    send: &mut dyn FnMut(Entry) -> Result<(), Error>,
) -> Result<Option<OwnedFd>, Error> {
    let stat = stat(parent, name)?;
    let path = ByteBuf::from(path);
    let mode = stat.st_mode & 0o7777;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let directory = open_directory(parent, name)?;
            send(Entry::Directory { path, mode, opaque: is_opaque(&directory) })?;
            Ok(Some(directory))
        }
        FileType::RegularFile => {
            let file = open_file(parent, name)?;
            let modified_ns = modified_ns(&stat);
            let size = stat.st_size.cast_unsigned();
            if size > SMALL {
                send(Entry::File { path, mode, size, modified_ns })?;
                return send_content(file, size, &mut |bytes| send(Entry::Data(bytes))).map(|()| None);
            }
            // The kernel's own files say that they are empty, or a page long, and are not.
            let mut content = Vec::new();
            file.take(SIZELESS_LIMIT).read_to_end(&mut content)?;
            send(Entry::File { path, mode, size: content.len() as u64, modified_ns })?;
            for chunk in content.chunks(CHUNK) {
                send(Entry::Data(ByteBuf::from(chunk)))?;
            }
            Ok(None)
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(parent, name.as_os_str(), Vec::new())?;
            send(Entry::Symlink { path, target: ByteBuf::from(target.into_bytes()) }).map(|()| None)
        }
        FileType::CharacterDevice if stat.st_rdev == 0 => send(Entry::Removed { path }).map(|()| None),
        _ => send(Entry::Special { path }).map(|()| None),
    }
}

pub(crate) fn stat(parent: &OwnedFd, name: &OsStr) -> Result<Stat, Error> {
    rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|error| Error::other(format!("{}: {}", name.display(), Error::from(error))))
}

pub(crate) fn modified_ns(stat: &Stat) -> i64 {
    stat.st_mtime.saturating_mul(1_000_000_000).saturating_add_unsigned(stat.st_mtime_nsec)
}

pub(crate) fn open_directory(parent: &OwnedFd, name: &OsStr) -> Result<OwnedFd, Error> {
    Ok(rustix::fs::openat(parent, name, directory_flags(), Mode::empty())?)
}

pub(crate) fn open_file(parent: &OwnedFd, name: &OsStr) -> Result<File, Error> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    Ok(File::from(rustix::fs::openat(parent, name, flags, Mode::empty())?))
}

/// Sends `size` bytes of a file in chunks.
pub(crate) fn send_content(
    mut file: File,
    size: u64,
    send: &mut dyn FnMut(ByteBuf) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut left = size;
    let mut buffer = vec![0; CHUNK];
    while left > 0 {
        let want = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let count = file.read(&mut buffer[..want])?;
        if count == 0 {
            return Err(Error::other("a file shrank while it was read"));
        }
        send(ByteBuf::from(&buffer[..count]))?;
        left -= count as u64;
    }
    Ok(())
}

/// The names in a directory, the first one last.
fn names(directory: &OwnedFd) -> Result<Vec<OsString>, Error> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name: CString = entry.file_name().to_owned();
        if !matches!(name.as_bytes(), b"." | b"..") {
            names.push(OsString::from_vec(name.into_bytes()));
        }
    }
    names.sort_by(|first, second| second.cmp(first));
    Ok(names)
}

pub(crate) fn is_opaque(directory: &OwnedFd) -> bool {
    let mut value = [0; 2];
    matches!(rustix::fs::fgetxattr(directory, OPAQUE, &mut value[..]), Ok(1)) && value[0] == b'y'
}

pub(crate) fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_listed_in_order_with_parents_first() {
        let layer = tempfile::tempdir().unwrap();
        let at = |path: &str| layer.path().join(path);
        std::fs::create_dir_all(at("b/deep")).unwrap();
        std::fs::write(at("b/deep/file"), vec![7; CHUNK + 1]).unwrap();
        std::fs::write(at("a"), b"").unwrap();
        std::os::unix::fs::symlink("/nowhere", at("c")).unwrap();
        let odd = OsStr::from_bytes(b"\xff\n");
        std::fs::write(layer.path().join(odd), b"odd").unwrap();
        let root = || rustix::fs::open(layer.path(), directory_flags(), Mode::empty()).unwrap();
        let mut seen = Vec::new();
        let mut bytes = 0;
        let mut send = |change| {
            match change {
                Entry::Data(data) => bytes += data.len(),
                Entry::File { path, size, .. } => seen.push((path.into_vec(), size)),
                Entry::Directory { path, opaque, .. } => seen.push((path.into_vec(), u64::from(opaque))),
                Entry::Symlink { path, target } => seen.push((path.into_vec(), target.len() as u64)),
                other => panic!("{other:?}"),
            }
            Ok(())
        };
        walk(root(), &mut |parent, name, path| report(parent, name, path, &mut send)).unwrap();
        let expected: [(&[u8], u64); 6] = [
            (b"a", 0),
            (b"b", 0),
            (b"b/deep", 0),
            (b"b/deep/file", CHUNK as u64 + 1),
            (b"c", 8),
            (b"\xff\n", 3),
        ];
        assert_eq!(seen, expected.map(|(path, size)| (path.to_vec(), size)));
        assert_eq!(bytes, CHUNK + 4);
    }
}
