//! Layers of the writable disk: what a build's steps wrote, one directory each.
//!
//! ```text
//! writable disk   layer-N/upper    the layer, as overlayfs writes and reads it
//!                 layer-N/work     overlayfs's own
//! ```
//! A character device 0/0 stands for something removed, the attribute `trusted.overlay.opaque` for a directory through
//! which nothing shows. The host numbers the layers; it makes them by sending them, or by running a program in a
//! [`root`] whose writes go there.

pub(crate) mod root;

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Error, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agentkernel_protocol::frame::FrameError;
use agentkernel_protocol::message::{Attributes, LayerEntry, NodeKind};
use agentkernel_protocol::mux::Stream;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use serde_bytes::ByteBuf;
use tokio::sync::mpsc;

use crate::trust::Trust;
use crate::{copy, tree};

/// Attributes of overlayfs itself begin so.
const OVERLAY_ATTRIBUTES: &[u8] = b"trusted.overlay.";
/// Most bytes of an attribute's value, and of the list of names: Linux's own bound.
const XATTR_BYTES: usize = 64 << 10;
const NANOSECONDS: i64 = 1_000_000_000;

/// Where the layers are.
pub(crate) struct Layers {
    /// The writable disk's root directory.
    writable: OwnedFd,
    /// The machine's image, below all layers.
    image: OwnedFd,
    /// What programs trust besides what the layers bring.
    pub(crate) trust: Trust,
}

impl Layers {
    pub(crate) fn new(writable: OwnedFd, image: OwnedFd, trust: Trust) -> Self {
        Self { writable, image, trust }
    }

    /// A directory of layer number `layer`, made if it is not there.
    fn directory(&self, layer: u32, part: &str) -> Result<OwnedFd, Error> {
        let path = format!("layer-{layer}/{part}");
        for path in [&format!("layer-{layer}"), &path] {
            match rustix::fs::mkdirat(&self.writable, path.as_str(), Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(rustix::fs::openat(&self.writable, path, tree::directory_flags(), Mode::empty())?)
    }

    fn exists(&self, layer: u32) -> bool {
        let path = format!("layer-{layer}/upper");
        rustix::fs::accessat(&self.writable, path, rustix::fs::Access::EXISTS, AtFlags::empty()).is_ok()
    }

    /// Removes a layer and all that is in it.
    fn remove(&self, layer: u32) -> Result<(), Error> {
        match std::fs::remove_dir_all(format!("/proc/self/fd/{}/layer-{layer}", self.writable.as_raw_fd())) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Sends a layer, then `End`.
pub(crate) async fn send(layers: Arc<Layers>, layer: u32, stream: Stream) -> Result<(), FrameError> {
    tree::serve(
        stream,
        |result| match result {
            Ok(()) => LayerEntry::End,
            Err(message) => LayerEntry::Failed { message },
        },
        move |send| {
            let mut links = HashMap::new();
            tree::walk(layers.directory(layer, "upper")?, &mut |parent, name, path| {
                report(parent, name, path, &mut links, send)
            })
        },
    )
    .await
}

/// Receives a layer, and answers once.
pub(crate) async fn receive(layers: Arc<Layers>, layer: u32, stream: Stream) -> Result<(), FrameError> {
    let is_last = |entry: &LayerEntry| matches!(entry, LayerEntry::End | LayerEntry::Failed { .. });
    let write = move |entries: mpsc::Receiver<LayerEntry>| {
        let made = layers.remove(layer).and_then(|()| layers.directory(layer, "upper"));
        let base = made.map_err(|error| format!("cannot make layer {layer}: {error}"))?;
        Writer { base, directories: Vec::new() }.write(entries)
    };
    copy::receive_entries(stream, is_last, write).await
}

type Send<'a> = &'a mut dyn FnMut(LayerEntry) -> Result<(), Error>;
/// First names of objects that have several, by inode.
type Links = HashMap<u64, ByteBuf>;

/// Sends one entry; returns it opened if it is a directory to descend into.
fn report(
    parent: &OwnedFd,
    name: &OsString,
    path: &[u8],
    links: &mut Links,
    send: Send<'_>,
) -> Result<Option<OwnedFd>, Error> {
    let stat = tree::stat(parent, name)?;
    let path = ByteBuf::from(path);
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind == FileType::CharacterDevice && stat.st_rdev == 0 {
        return send(LayerEntry::Removed { path }).map(|()| None);
    }
    if kind != FileType::Directory && stat.st_nlink > 1 {
        if let Some(target) = links.get(&stat.st_ino) {
            let target = target.clone();
            return send(LayerEntry::HardLink { path, target }).map(|()| None);
        }
        links.insert(stat.st_ino, path.clone());
    }
    let attributes = attributes(parent, name, &stat)?;
    let device = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    let node = |kind| LayerEntry::Node { path: path.clone(), attributes: attributes.clone(), kind };
    match kind {
        FileType::Directory => {
            let directory = tree::open_directory(parent, name)?;
            send(node(NodeKind::Directory))?;
            if tree::is_opaque(&directory) {
                send(LayerEntry::Opaque { path })?;
            }
            Ok(Some(directory))
        }
        FileType::RegularFile => {
            let size = stat.st_size.cast_unsigned();
            send(node(NodeKind::File { size }))?;
            let file = tree::open_file(parent, name)?;
            tree::send_content(file, size, &mut |bytes| send(LayerEntry::Data(bytes)))?;
            Ok(None)
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(parent, name.as_os_str(), Vec::new())?;
            send(node(NodeKind::Symlink { target: ByteBuf::from(target.into_bytes()) })).map(|()| None)
        }
        FileType::CharacterDevice => {
            send(node(NodeKind::CharacterDevice { major: device.0, minor: device.1 })).map(|()| None)
        }
        FileType::BlockDevice => {
            send(node(NodeKind::BlockDevice { major: device.0, minor: device.1 })).map(|()| None)
        }
        FileType::Fifo => send(node(NodeKind::Fifo)).map(|()| None),
        // A socket is of no use to who was not there when it was made; no layer holds one.
        _ => Ok(None),
    }
}

fn attributes(parent: &OwnedFd, name: &OsStr, stat: &Stat) -> Result<Attributes, Error> {
    // Symbolic links and devices cannot be opened for this, their directory can.
    let path = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(name);
    let mut names = vec![0; XATTR_BYTES];
    let length = match rustix::fs::llistxattr(&path, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => 0,
        Err(error) => return Err(error.into()),
    };
    let mut xattrs = Vec::new();
    for attribute in names[..length].split(|byte| *byte == 0) {
        if attribute.is_empty() || attribute.starts_with(OVERLAY_ATTRIBUTES) {
            continue;
        }
        let mut value = vec![0; XATTR_BYTES];
        let length = rustix::fs::lgetxattr(&path, OsStr::from_bytes(attribute), &mut value[..])?;
        value.truncate(length);
        xattrs.push((ByteBuf::from(attribute), ByteBuf::from(value)));
    }
    xattrs.sort();
    Ok(Attributes {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified_ns: tree::modified_ns(stat),
        xattrs,
    })
}

/// Writes a layer as overlayfs reads it.
struct Writer {
    base: OwnedFd,
    /// Directories and their times, which change again with all that is put into them.
    directories: Vec<(PathBuf, i64)>,
}

impl Writer {
    fn write(mut self, mut entries: mpsc::Receiver<LayerEntry>) -> Result<(), String> {
        let mut pending: Option<(File, PathBuf, Attributes)> = None;
        while let Some(entry) = entries.blocking_recv() {
            if let LayerEntry::Data(bytes) = &entry {
                let (file, path, _) = pending.as_mut().ok_or("the host sent content of no file")?;
                file.write_all(bytes).map_err(|error| failed(path, error))?;
                continue;
            }
            if let Some((file, path, attributes)) = pending.take() {
                give_file(&file, &attributes).map_err(|error| failed(&path, error))?;
            }
            match entry {
                LayerEntry::Node { path, attributes, kind } => {
                    let path = place(&path)?;
                    let file = self.node(&path, &attributes, &kind).map_err(|error| failed(&path, error))?;
                    pending = file.map(|file| (file, path, attributes));
                }
                LayerEntry::HardLink { path, target } => {
                    let (path, target) = (place(&path)?, place(&target)?);
                    self.link(&path, &target).map_err(|error| failed(&path, error))?;
                }
                LayerEntry::Removed { path } => {
                    let path = place(&path)?;
                    self.whiteout(&path).map_err(|error| failed(&path, error))?;
                }
                LayerEntry::Opaque { path } => {
                    let path = place(&path)?;
                    self.opaque(&path).map_err(|error| failed(&path, error))?;
                }
                LayerEntry::End => {
                    for (path, modified_ns) in self.directories.iter().rev() {
                        self.date(path, *modified_ns).map_err(|error| failed(path, error))?;
                    }
                    return Ok(());
                }
                LayerEntry::Failed { message } => return Err(message),
                LayerEntry::Data(_) => {}
            }
        }
        Err("the layer was broken off".into())
    }

    /// The directory an entry goes into, and its name there. No link is followed: the host knows where it leads.
    fn parent(&self, path: &Path) -> Result<(OwnedFd, OsString), Errno> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let name = path.file_name().ok_or(Errno::INVAL)?;
        Ok((self.open(parent)?, name.to_owned()))
    }

    fn open(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.base, path, tree::directory_flags(), Mode::empty(), resolve)
    }

    /// Makes an object; a file is returned to be filled.
    fn node(&mut self, path: &Path, attributes: &Attributes, kind: &NodeKind) -> Result<Option<File>, Errno> {
        if path.as_os_str().is_empty() {
            self.directories.push((PathBuf::from("."), attributes.modified_ns));
            return give_directory(&self.base, attributes).map(|()| None);
        }
        let (parent, name) = self.parent(path)?;
        let mode = Mode::from_raw_mode(0o600);
        let device = |major: u32, minor: u32, kind| {
            rustix::fs::mknodat(&parent, &name, kind, mode, rustix::fs::makedev(major, minor))
        };
        match kind {
            NodeKind::Directory => {
                match rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(0o700)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error),
                }
                self.directories.push((path.to_owned(), attributes.modified_ns));
                return give_directory(&self.open(path)?, attributes).map(|()| None);
            }
            NodeKind::File { .. } => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                return rustix::fs::openat(&parent, &name, flags, mode).map(|file| Some(file.into()));
            }
            NodeKind::Symlink { target } => {
                rustix::fs::symlinkat(OsStr::from_bytes(target), &parent, &name)?;
            }
            NodeKind::CharacterDevice { major, minor } => device(*major, *minor, FileType::CharacterDevice)?,
            NodeKind::BlockDevice { major, minor } => device(*major, *minor, FileType::BlockDevice)?,
            NodeKind::Fifo => device(0, 0, FileType::Fifo)?,
        }
        let owner = (Some(Uid::from_raw(attributes.uid)), Some(Gid::from_raw(attributes.gid)));
        rustix::fs::chownat(&parent, &name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?;
        let inside = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(&name);
        if !matches!(kind, NodeKind::Symlink { .. }) {
            rustix::fs::chmodat(
                &parent,
                &name,
                Mode::from_raw_mode(attributes.mode & 0o7777),
                AtFlags::empty(),
            )?;
        }
        for (attribute, value) in &attributes.xattrs {
            rustix::fs::lsetxattr(&inside, OsStr::from_bytes(attribute), value, XattrFlags::empty())?;
        }
        let times = timestamps(attributes.modified_ns);
        rustix::fs::utimensat(&parent, &name, &times, AtFlags::SYMLINK_NOFOLLOW).map(|()| None)
    }

    fn link(&self, path: &Path, target: &Path) -> Result<(), Errno> {
        let (parent, name) = self.parent(path)?;
        let (target_parent, target_name) = self.parent(target)?;
        rustix::fs::linkat(&target_parent, &target_name, &parent, &name, AtFlags::empty())
    }

    fn whiteout(&self, path: &Path) -> Result<(), Errno> {
        let (parent, name) = self.parent(path)?;
        rustix::fs::mknodat(&parent, &name, FileType::CharacterDevice, Mode::empty(), 0)
    }

    fn opaque(&self, path: &Path) -> Result<(), Errno> {
        let directory = if path.as_os_str().is_empty() { self.open(Path::new(".")) } else { self.open(path) };
        rustix::fs::fsetxattr(directory?, tree::OPAQUE, b"y", XattrFlags::empty())
    }

    fn date(&self, path: &Path, modified_ns: i64) -> Result<(), Errno> {
        rustix::fs::futimens(self.open(path)?, &timestamps(modified_ns))
    }
}

/// An entry's path, which leads nowhere else.
fn place(path: &[u8]) -> Result<PathBuf, String> {
    let path = Path::new(OsStr::from_bytes(path));
    if path.components().all(|part| matches!(part, std::path::Component::Normal(_))) {
        Ok(path.to_owned())
    } else {
        Err(format!("{} is no path in a layer", path.display()))
    }
}

fn failed(path: &Path, error: impl Into<Error>) -> String {
    format!("cannot write {}: {}", path.display(), error.into())
}

pub(crate) fn timestamps(modified_ns: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: modified_ns.div_euclid(NANOSECONDS),
        tv_nsec: modified_ns.rem_euclid(NANOSECONDS),
    };
    Timestamps { last_access: time, last_modification: time }
}

/// Owner first: a change of it takes set-id bits and capabilities away.
fn give_file(file: &File, attributes: &Attributes) -> Result<(), Errno> {
    give_directory(file, attributes)?;
    rustix::fs::futimens(file, &timestamps(attributes.modified_ns))
}

fn give_directory(file: impl std::os::fd::AsFd, attributes: &Attributes) -> Result<(), Errno> {
    let file = file.as_fd();
    rustix::fs::fchown(file, Some(Uid::from_raw(attributes.uid)), Some(Gid::from_raw(attributes.gid)))?;
    rustix::fs::fchmod(file, Mode::from_raw_mode(attributes.mode & 0o7777))?;
    for (name, value) in &attributes.xattrs {
        rustix::fs::fsetxattr(file, OsStr::from_bytes(name), value, XattrFlags::empty())?;
    }
    Ok(())
}
