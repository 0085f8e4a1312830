//! A root file system with nothing in it but what the guarded program reads.
//!
//! Everything is attached from descriptors that were opened without following links, then the old root is let go of. The
//! program, its libraries and its data are at their usual paths; files of the machine are `/file-N`.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change,
    mount_remount, move_mount, open_tree, unmount,
};

use super::Orders;
use super::enter::{Failure, doing, is_directory, open_without_links, same_file, touch};

/// Where the new root is put together: a directory every host has, and which nothing below needs any more.
const PLACE: &str = "/proc";

struct Attachment {
    tree: OwnedFd,
    /// Relative to the new root.
    place: PathBuf,
    directory: bool,
    device: bool,
}

/// The name in the new root of a file that is passed as descriptor and opened again.
pub(super) fn reopened_name(index: usize) -> String {
    format!("file-{index}")
}

/// Everything the new root will hold, with an empty file system to put it in.
pub(super) struct Prepared {
    attachments: Vec<Attachment>,
    owner: Option<u32>,
    links: Vec<(&'static str, PathBuf)>,
}

/// Does what a host may refuse. After an error the old root is whole.
pub(super) fn prepare(orders: &Orders, descriptors: &[OwnedFd]) -> Result<Prepared, Failure> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(doing("keep mounts private"))?;
    let attachments = collect(orders, descriptors)?;
    let links = top_level_links();
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("machine", PLACE, "tmpfs", flags, Some(c"size=1m,mode=755"))
        .map_err(doing("mount an empty root"))?;
    Ok(Prepared { attachments, owner: orders.identity, links })
}

impl Prepared {
    /// Puts the new root together and changes to it.
    pub(super) fn enter(self) -> Result<(), Failure> {
        let place = Path::new(PLACE);
        for attachment in &self.attachments {
            let own = self.owner.filter(|_| attachment.device);
            if own.is_none_or(|owner| make_device(place, attachment, owner).is_err()) {
                attach(place, attachment)?;
            }
        }
        for (name, target) in self.links {
            // A link that is in the way of a directory that was attached is not needed.
            let _ = symlink(target, place.join(name));
        }
        rustix::process::chdir(PLACE).map_err(doing("enter the new root"))?;
        rustix::process::pivot_root(".", ".").map_err(doing("change the root"))?;
        unmount(".", UnmountFlags::DETACH).map_err(doing("let go of the old root"))?;
        rustix::process::chdir("/").map_err(doing("enter the new root"))?;
        // Without NODEV where devices were made in it; to make more takes a capability that is given up next.
        let devices = if self.owner.is_some() { MountFlags::empty() } else { MountFlags::NODEV };
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::RDONLY | MountFlags::BIND | devices;
        mount_remount("/", flags, c"").map_err(doing("make the new root read-only"))
    }
}

fn collect(orders: &Orders, descriptors: &[OwnedFd]) -> Result<Vec<Attachment>, Failure> {
    let mut attachments = Vec::new();
    for path in orders.readable.iter().chain(orders.program.iter()) {
        // A directory that holds it may be listed too; then it is there already.
        let covered = orders.readable.iter().any(|other| other != path && path.starts_with(other));
        if !covered
            && !attachments.iter().any(|known: &Attachment| Path::new("/").join(&known.place) == *path)
        {
            attachments.push(copy_tree(path, relative(path), false)?);
        }
    }
    for path in &orders.devices {
        attachments.push(copy_tree(path, relative(path), true)?);
    }
    for (index, path) in &orders.reopened {
        let attachment = copy_tree(path, PathBuf::from(reopened_name(*index)), false)?;
        let descriptor = descriptors.get(*index).ok_or("an argument names no descriptor")?;
        if !same_file(attachment.tree.as_fd(), descriptor.as_fd()).map_err(doing("look at a file"))? {
            return Err(format!("{} was replaced meanwhile", path.display()));
        }
        attachments.push(attachment);
    }
    Ok(attachments)
}

fn relative(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_owned()
}

fn copy_tree(path: &Path, place: PathBuf, device: bool) -> Result<Attachment, Failure> {
    let opened = open_without_links(path).map_err(doing(format!("open {}", path.display())))?;
    let directory = is_directory(&opened).map_err(doing("look at a file"))?;
    // Mounts below belong to it: a namespace of a user may not lift what lies over a directory.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree =
        open_tree(&opened, "", flags).map_err(doing(format!("copy the mount of {}", path.display())))?;
    Ok(Attachment { tree, place, directory, device })
}

/// Root makes the machine device nodes of its own: those of the host may be root's alone (`/dev/kvm` without udev).
fn make_device(root: &Path, attachment: &Attachment, owner: u32) -> io::Result<()> {
    use rustix::fs::{FileType, Gid, Mode, Uid, chown, fstat, mknodat};
    let place = root.join(&attachment.place);
    if let Some(parent) = place.parent() {
        fs::create_dir_all(parent)?;
    }
    let device = fstat(&attachment.tree)?;
    mknodat(CWD, &place, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, device.st_rdev)?;
    let made = chown(&place, Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)));
    // A device that is not usable there (a container's policy) makes way for the host's.
    let usable = made
        .map_err(io::Error::from)
        .and_then(|()| fs::OpenOptions::new().read(true).write(true).open(&place));
    if usable.is_err() {
        fs::remove_file(&place)?;
    }
    usable.map(drop)
}

fn attach(root: &Path, attachment: &Attachment) -> Result<(), Failure> {
    let place = root.join(&attachment.place);
    let parent = if attachment.directory { Some(place.as_path()) } else { place.parent() };
    if let Some(parent) = parent {
        fs::create_dir_all(parent).map_err(doing("make a directory in the new root"))?;
    }
    if !attachment.directory {
        touch(&place).map_err(doing("make a file in the new root"))?;
    }
    let shown = place.display();
    move_mount(&attachment.tree, "", CWD, &place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(doing(format!("attach {shown}")))?;
    let flags = match attachment.device {
        true => MountFlags::NOSUID | MountFlags::NOEXEC,
        false => MountFlags::NOSUID | MountFlags::NODEV | MountFlags::RDONLY,
    };
    mount_remount(&place, flags | MountFlags::BIND, c"").map_err(doing(format!("restrict {shown}")))
}

/// `/lib64 -> usr/lib64` and the like, by which programs name their loader.
fn top_level_links() -> Vec<(&'static str, PathBuf)> {
    let names = ["bin", "sbin", "lib", "lib32", "lib64", "libx32"];
    names
        .into_iter()
        .filter_map(|name| Some((name, fs::read_link(Path::new("/").join(name)).ok()?)))
        .collect()
}
