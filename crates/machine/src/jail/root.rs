//! A root file system with nothing in it but what the guarded program reads.
//!
//! Everything is attached from descriptors that were opened without following links, then the old root is let go of. The
//! program, its libraries and its data are at their usual paths; files of the machine are `/file-N`.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, chown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, mknodat};
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
    /// A device that only root may use: its number, and who is to have a node of it.
    node: Option<(u64, u32)>,
}

/// The name in the new root of a file that is passed as descriptor and opened again.
pub(super) fn reopened_name(index: usize) -> String {
    format!("file-{index}")
}

/// Everything the new root will hold, with an empty file system to put it in.
pub(super) struct Prepared {
    attachments: Vec<Attachment>,
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
    Ok(Prepared { attachments, links })
}

impl Prepared {
    /// Puts the new root together and changes to it.
    pub(super) fn enter(self) -> Result<(), Failure> {
        let place = Path::new(PLACE);
        for attachment in &self.attachments {
            attach(place, attachment)?;
        }
        for (name, target) in self.links {
            // A link that is in the way of a directory that was attached is not needed.
            let _ = symlink(target, place.join(name));
        }
        rustix::process::chdir(PLACE).map_err(doing("enter the new root"))?;
        rustix::process::pivot_root(".", ".").map_err(doing("change the root"))?;
        unmount(".", UnmountFlags::DETACH).map_err(doing("let go of the old root"))?;
        rustix::process::chdir("/").map_err(doing("enter the new root"))?;
        let flags = MountFlags::NOSUID
            | MountFlags::NOEXEC
            | MountFlags::NODEV
            | MountFlags::RDONLY
            | MountFlags::BIND;
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
        let node = orders.identity.and_then(|identity| Some((number_if_private(path)?, identity)));
        attachments.push(Attachment { node, ..copy_tree(path, relative(path), true)? });
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

/// The number of a character device that neither a group nor everybody may use, as where no udev gave `/dev/kvm` away.
fn number_if_private(path: &Path) -> Option<u64> {
    let data = fs::symlink_metadata(path).ok()?;
    let usable = data.mode() & 0o006 == 0o006 || (data.mode() & 0o060 == 0o060 && data.gid() != 0);
    (data.file_type().is_char_device() && !usable).then(|| data.rdev())
}

/// A node of the device for one user, in the new root's own file system.
fn make_node(place: &Path, number: u64, owner: u32) -> io::Result<OwnedFd> {
    mknodat(CWD, place, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, number)?;
    chown(place, Some(owner), Some(owner))?;
    Ok(open_tree(CWD, place, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?)
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
    Ok(Attachment { tree, place, directory, device, node: None })
}

fn attach(root: &Path, attachment: &Attachment) -> Result<(), Failure> {
    let place = root.join(&attachment.place);
    let parent = if attachment.directory { Some(place.as_path()) } else { place.parent() };
    if let Some(parent) = parent {
        fs::create_dir_all(parent).map_err(doing("make a directory in the new root"))?;
    }
    // Root without the capability to make nodes (in a container) gives its uid away and the device with it.
    let node = attachment.node.and_then(|(number, owner)| make_node(&place, number, owner).ok());
    if !attachment.directory && !place.exists() {
        touch(&place).map_err(doing("make a file in the new root"))?;
    }
    let shown = place.display();
    move_mount(
        node.as_ref().unwrap_or(&attachment.tree),
        "",
        CWD,
        &place,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
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
