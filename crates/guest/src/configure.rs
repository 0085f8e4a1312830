//! Assembles the root file system, gives the machine its identity, furnishes it.
//!
//! ```text
//! initramfs /            /served/TAG   served file systems, as mounted by `fuse`
//!                        /image        EROFS image, if the root is one
//!                        /writable     ext4: root/{upper,work}, TAG/{upper,work}
//!                        /trust        bundles of certificates, with the host's
//!                        /prepared     a copy-on-write mount that waits for its place
//!                        /identity     files that are mounted over the root's and the kernel's
//! new root  /            overlay(lower = trust over served or image, upper = writable/root)
//!           TARGET       served file system, or overlay(lower = served, upper = writable/TAG)
//!           /proc ...    moved from the initramfs
//! ```
//! The three steps run on threads that may wait for the host's file servers. Assembling and furnishing happen once in a
//! machine's life; an identity is taken on after each start and each restore, before any program of the user's runs.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use agentkernel_protocol::message::{self, Assemble, Furnish, Identity, Mount, MountMode, Root, Writable};
use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};

use crate::exec::cgroup;
use crate::layers::Layers;
use crate::trust::{BUNDLE, Trust};
use crate::{fuse, network, system};

/// Name of the cgroup of all programs.
const PROGRAMS: &str = "programs";
const NEW_ROOT: &str = "/root-to-be";
const WRITABLE: &str = "/writable";
const PREPARED: &str = "/prepared";
const TRUST: &str = "/trust";
/// Nothing that Docker's overlays do not do either: a directory's rename is `EXDEV`, and upper layers need no index.
pub(crate) const OVERLAY_OPTIONS: &str = "redirect_dir=off,metacopy=off,index=off";
/// Most processes of what runs in a machine that is not furnished yet.
const ASSEMBLED_PROCESS_LIMIT: u32 = 256;

/// Directory of what the machine says of itself to programs.
const OURS: &str = "/run/agentkernel";
/// Directory of the files that are mounted over others: written anew with each identity, whatever becomes of the root.
const IDENTITY: &str = "/identity";
/// Those mounted over the root's, by the paths they are mounted at. As with containers, they cannot be removed there.
const IDENTITY_FILES: [(&str, &str); 4] = [
    ("hostname", "/etc/hostname"),
    ("machine-id", "/etc/machine-id"),
    ("hosts", "/etc/hosts"),
    ("resolv.conf", "/etc/resolv.conf"),
];
/// What is mounted over the kernel's own word for this boot, which would be the same in all that is restored of it.
const BOOT_ID: &str = "boot-id";

/// What stays reachable after the root was switched.
pub(crate) struct Layout {
    /// The root directory of the initramfs, below the root that was switched to.
    initial: OwnedFd,
    /// The directory of the files that are mounted over others.
    identity: OwnedFd,
    /// The writable disk's directory.
    writable: OwnedFd,
    /// The cgroup of all programs.
    pub cgroups: OwnedFd,
    /// The layers of builds.
    pub layers: Arc<Layers>,
    /// The kernel's `/proc`, reached without a path lookup in the root.
    pub proc: OwnedFd,
    /// A copy-on-write mount that waits for its place: its file system's tag, and its upper directory.
    prepared: Option<(String, Arc<OwnedFd>)>,
    /// There once the machine is furnished.
    furniture: OnceLock<Furniture>,
}

/// What makes the machine a certain sandbox's.
struct Furniture {
    /// Upper directories of the copy-on-write mounts, by the mounts' index.
    uppers: Vec<Option<Arc<OwnedFd>>>,
    /// Most processes and threads of one program with all it starts.
    process_limit: u32,
}

impl Layout {
    /// The upper directory of mount number `mount`, if that is copy-on-write.
    pub(crate) fn upper(&self, mount: u32) -> Option<Arc<OwnedFd>> {
        self.furniture.get()?.uppers.get(usize::try_from(mount).ok()?)?.clone()
    }

    /// The root directory of the initramfs.
    pub(crate) fn initial(&self) -> PathBuf {
        beneath(&self.initial, "")
    }

    /// Most processes and threads of one program with all it starts.
    pub(crate) fn process_limit(&self) -> u32 {
        self.furniture.get().map_or(ASSEMBLED_PROCESS_LIMIT, |furniture| furniture.process_limit)
    }
}

/// A directory as a path, without looking anything up in the root.
fn beneath(directory: &OwnedFd, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(path)
}

/// Puts the root file system together and changes to it.
///
/// # Errors
/// Says which step failed and why.
pub(crate) fn assemble(wish: &Assemble, file_systems: &BTreeSet<String>) -> Result<Layout, String> {
    let initial = open_directory("/")?;
    let lower = match &wish.root {
        Root::FileSystem { tag } => served(file_systems, tag)?,
        Root::Disk { serial } => mount_disk(serial, "/image", "erofs", MountFlags::RDONLY, "")?,
    };
    let Writable::Disk { serial } = &wish.writable;
    mount_disk(serial, WRITABLE, "ext4", MountFlags::NOATIME, "noinit_itable")?;
    let writable = open_directory(WRITABLE)?;
    make_directory(NEW_ROOT, 0o755)?;
    overlay(&[&lower], &writable, "root", Path::new(NEW_ROOT), 0o755, (0, 0))?;
    let trust = Trust::new(&wish.authorities);
    let bundle = lay_over(&trust, &lower, &writable)?;
    let root = open_directory(NEW_ROOT)?;
    make_standard_directories(&root, matches!(wish.root, Root::FileSystem { .. }))?;
    // Before the mounts: a project may lie below it, as removable disks do.
    mount_run(&root)?;
    let identity = mount_identity(&root)?;
    mount_system(&root)?;
    let cgroups = mount_cgroups(&root)?;
    let prepared = (!wish.prepare.is_empty()).then(|| prepare(&writable, &wish.prepare, file_systems));
    let prepared = prepared.transpose()?;
    let proc = open_directory("/proc")?;
    let image = open_directory(&lower)?;
    switch_root()?;
    if !bundle.is_empty() {
        write_file(Path::new(BUNDLE), 0o644, &bundle)?;
    }
    network::set_up(&wish.link)?;
    Ok(Layout {
        initial,
        identity,
        layers: Arc::new(Layers::new(writable.try_clone().map_err(say("reach the layers"))?, image, trust)),
        writable,
        cgroups,
        proc,
        prepared,
        furniture: OnceLock::new(),
    })
}

/// Puts the host's authorities between the new root's layers; returns the bundle of all.
fn lay_over(trust: &Trust, lower: &Path, writable: &OwnedFd) -> Result<Vec<u8>, String> {
    let root = open_directory(NEW_ROOT)?;
    let laid = trust.survey(&root, true);
    if !laid.is_empty() {
        make_directory(TRUST, 0o755)?;
        mount("trust", TRUST, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=755")
            .map_err(say("add the host's certificates"))?;
        laid.write(Path::new(TRUST), &root).map_err(say("add the host's certificates"))?;
        drop(root);
        rustix::mount::unmount(NEW_ROOT, rustix::mount::UnmountFlags::empty())
            .map_err(say("add the host's certificates"))?;
        overlay(&[Path::new(TRUST), lower], writable, "root", Path::new(NEW_ROOT), 0o755, (0, 0))?;
    }
    Ok(laid.bundle)
}

/// Mounts a copy-on-write layer over a file system that is served nothing yet: most of the work of mounting it, done once
/// for all that are restored.
fn prepare(
    writable: &OwnedFd,
    tag: &str,
    file_systems: &BTreeSet<String>,
) -> Result<(String, Arc<OwnedFd>), String> {
    make_directory(PREPARED, 0o755)?;
    let upper = overlay(&[&served(file_systems, tag)?], writable, tag, Path::new(PREPARED), 0o755, (0, 0))?;
    Ok((tag.to_owned(), Arc::new(upper)))
}

/// Mounts what the sandbox shares, and writes its files. The directories served to it are mounted already.
///
/// # Errors
/// Says which step failed and why.
pub(crate) fn furnish(
    layout: &Layout,
    wish: &Furnish,
    file_systems: &BTreeSet<String>,
) -> Result<(), String> {
    if layout.furniture.get().is_some() {
        return Err("the machine is furnished already".into());
    }
    let root = open_directory("/")?;
    if wish.read_only {
        mount_temporary(&root)?;
    }
    let mut uppers = Vec::new();
    for mount in &wish.mounts {
        let served = served(file_systems, &mount.tag)?;
        let lower = beneath(&layout.initial, served.to_str().unwrap_or_default().trim_start_matches('/'));
        uppers.push(place(layout, &root, mount, &lower)?);
    }
    for directory in &wish.directories {
        add_directory(directory)?;
    }
    for file in &wish.files {
        write_file(&path_of(&file.path)?, file.mode, &file.content)?;
    }
    if wish.read_only {
        seal()?;
    }
    let furniture = Furniture { uppers, process_limit: wish.process_limit };
    layout.furniture.set(furniture).map_err(|_| "the machine is furnished already".into())
}

/// Takes on an identity that no other machine has, and tells the programs that live through it.
///
/// # Errors
/// Says which step failed and why; nothing of the user's may run then.
pub(crate) fn identify(layout: &Layout, wish: &Identity) -> Result<(), String> {
    system::reseed(&wish.entropy).map_err(say("reseed the random pool"))?;
    set_clock(wish.unix_time_ns)?;
    rustix::system::sethostname(wish.hostname.as_bytes()).map_err(say("set the host name"))?;
    let directory = &layout.identity;
    rewrite(directory, "hostname", format!("{}\n", wish.hostname).as_bytes())?;
    rewrite(directory, "machine-id", format!("{}\n", wish.machine_id).as_bytes())?;
    rewrite(directory, "hosts", &wish.hosts)?;
    rewrite(directory, "resolv.conf", &wish.resolver)?;
    rewrite(directory, BOOT_ID, format!("{}\n", wish.boot_id).as_bytes())?;
    // Replaced by a rename: whoever watches the directory or the file is told, and nobody reads half of it.
    let draft = Path::new(OURS).join(".generation");
    fs::write(&draft, format!("{}\n", wish.generation)).map_err(say("tell the programs"))?;
    fs::rename(&draft, Path::new(OURS).join("generation")).map_err(say("tell the programs"))
}

/// Makes the files of an identity, empty, and mounts them where they belong.
fn mount_identity(root: &OwnedFd) -> Result<OwnedFd, String> {
    make_directory(IDENTITY, 0o755)?;
    for (name, target) in IDENTITY_FILES {
        let path = Path::new(target);
        let (Some(parent), Some(last)) = (path.parent(), path.file_name()) else { continue };
        let parent = make_path(root, parent)?;
        let target = beneath(&parent, "").join(last);
        // A link that the image brings would lead elsewhere.
        if !fs::symlink_metadata(&target).is_ok_and(|metadata| metadata.is_file()) {
            write_file(&target, 0o644, b"")?;
        }
        let ours = Path::new(IDENTITY).join(name);
        write_file(&ours, 0o644, b"")?;
        mount_bind(&ours, &target).map_err(say(format!("mount {}", path.display())))?;
    }
    let ours = Path::new(IDENTITY).join(BOOT_ID);
    write_file(&ours, 0o444, b"")?;
    mount_bind(&ours, "/proc/sys/kernel/random/boot_id").map_err(say("mount the boot's id"))?;
    let run = make_path(root, Path::new(OURS))?;
    fs::set_permissions(beneath(&run, ""), Permissions::from_mode(0o755)).map_err(say("prepare /run"))?;
    open_directory(IDENTITY)
}

/// Gives a file of the identity another content.
fn rewrite(directory: &OwnedFd, name: &str, content: &[u8]) -> Result<(), String> {
    let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, name, flags, Mode::empty());
    let mut file = File::from(file.map_err(say(format!("write {name}")))?);
    file.write_all(content).map_err(say(format!("write {name}")))
}

fn served(file_systems: &BTreeSet<String>, tag: &str) -> Result<PathBuf, String> {
    if file_systems.contains(tag) {
        Ok(fuse::mount_point(tag))
    } else {
        Err(format!("no file system {tag} is served"))
    }
}

/// Names the step in an error.
fn say<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> String {
    move |error| format!("cannot {what}: {error}")
}

fn path_of(bytes: &[u8]) -> Result<PathBuf, String> {
    let path = Path::new(std::ffi::OsStr::from_bytes(bytes));
    let plain = path.components().all(|part| !matches!(part, std::path::Component::ParentDir));
    if path.is_absolute() && plain {
        Ok(path.to_owned())
    } else {
        Err(format!("{} is no absolute path", path.display()))
    }
}

/// Sets the wall clock.
pub(crate) fn set_clock(unix_time_ns: u64) -> Result<(), String> {
    let time = rustix::time::Timespec {
        tv_sec: (unix_time_ns / 1_000_000_000).cast_signed(),
        tv_nsec: (unix_time_ns % 1_000_000_000).cast_signed(),
    };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, time).map_err(say("set the clock"))
}

/// Mounts the block device with this serial number at `target`.
fn mount_disk(
    serial: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> Result<PathBuf, String> {
    let device = find_disk(serial).ok_or_else(|| format!("there is no disk with serial number {serial}"))?;
    make_directory(target, 0o755)?;
    let options = CString::new(options).map_err(say("mount a disk"))?;
    mount(&device, target, kind, flags, &*options).map_err(say(format!("mount disk {serial} as {kind}")))?;
    Ok(target.into())
}

fn find_disk(serial: &str) -> Option<PathBuf> {
    fs::read_dir("/sys/block").ok()?.flatten().find_map(|disk| {
        let found = fs::read_to_string(disk.path().join("serial")).ok()?;
        (found.trim_end_matches(['\n', '\0']) == serial).then(|| Path::new("/dev").join(disk.file_name()))
    })
}

/// Mounts an overlay over `lower`, the uppermost first, at `target`, its upper layer in the writable disk's directory `name` with the mode
/// and owner that the merged root shall have. Returns the upper directory.
fn overlay(
    lower: &[&Path],
    writable: &OwnedFd,
    name: &str,
    target: &Path,
    mode: u32,
    owner: (u32, u32),
) -> Result<OwnedFd, String> {
    let base = beneath(writable, name);
    let (upper, work) = (base.join("upper"), base.join("work"));
    // A sandbox that was stopped brings its layer back with all that was done to it.
    if !upper.exists() {
        for directory in [&base, &upper, &work] {
            make_directory(directory, 0o755)?;
        }
        fs::set_permissions(&upper, Permissions::from_mode(mode))
            .map_err(say("prepare the writable layer"))?;
        std::os::unix::fs::chown(&upper, Some(owner.0), Some(owner.1))
            .map_err(say("prepare the writable layer"))?;
    }
    let lower: Vec<String> = lower.iter().map(|lower| lower.display().to_string()).collect();
    let (lower, shown, work) = (lower.join(":"), upper.display(), work.display());
    let options = format!("lowerdir={lower},upperdir={shown},workdir={work},{OVERLAY_OPTIONS}");
    let options = CString::new(options).map_err(say("mount an overlay"))?;
    mount("overlay", target, "overlay", MountFlags::empty(), &*options)
        .map_err(say(format!("mount the copy-on-write layer of {name}")))?;
    open_directory(&upper)
}

/// Puts a served file system at its target inside the root; returns its upper directory if it has one.
fn place(
    layout: &Layout,
    root: &OwnedFd,
    mount: &Mount,
    served: &Path,
) -> Result<Option<Arc<OwnedFd>>, String> {
    let target_path = path_of(&mount.target)?;
    let shown = target_path.display();
    let target = make_path(root, &target_path)?;
    let target = beneath(&target, "");
    match mount.mode {
        MountMode::CopyOnWrite => {
            let (mode, owner) = look_at(served).map_err(say(format!("look at {shown}")))?;
            match &layout.prepared {
                Some((tag, upper)) if *tag == mount.tag => {
                    let prepared = beneath(&layout.initial, PREPARED.trim_start_matches('/'));
                    // Through the mount, which would not notice a change of its upper layer.
                    fs::set_permissions(&prepared, Permissions::from_mode(mode))
                        .map_err(say(format!("prepare {shown}")))?;
                    std::os::unix::fs::chown(&prepared, Some(owner.0), Some(owner.1))
                        .map_err(say(format!("prepare {shown}")))?;
                    mount_move(prepared, &target).map_err(say(format!("mount {shown}")))?;
                    Ok(Some(upper.clone()))
                }
                _ => {
                    let upper = overlay(&[served], &layout.writable, &mount.tag, &target, mode, owner)?;
                    Ok(Some(Arc::new(upper)))
                }
            }
        }
        MountMode::ReadOnly | MountMode::ReadWrite => {
            mount_bind(served, &target).map_err(say(format!("mount {shown}")))?;
            Ok(None)
        }
    }
}

/// Permission bits and owner of a served root, as its server says now: the kernel may remember another one's answer.
fn look_at(served: &Path) -> Result<(u32, (u32, u32)), Errno> {
    let flags = rustix::fs::AtFlags::STATX_FORCE_SYNC;
    let wanted = rustix::fs::StatxFlags::BASIC_STATS;
    let found = rustix::fs::statx(rustix::fs::CWD, served, flags, wanted)?;
    Ok((u32::from(found.stx_mode) & 0o7777, (found.stx_uid, found.stx_gid)))
}

/// What every root has, whether its image brought it or not.
fn make_standard_directories(root: &OwnedFd, host: bool) -> Result<(), String> {
    for name in ["/proc", "/sys", "/dev", "/run"] {
        make_path(root, Path::new(name))?;
    }
    let shared: &[(&str, u32)] = &[("/tmp", 0o1777), ("/var/tmp", 0o1777), ("/root", 0o700)];
    let host_only: &[(&str, u32)] =
        &[("/home", 0o755), ("/mnt", 0o755), ("/srv", 0o755), ("/var/log", 0o755), ("/var/cache", 0o755)];
    for (name, mode) in shared.iter().chain(if host { host_only } else { &[] }) {
        if exists(root, name) && !host {
            continue;
        }
        let directory = make_path(root, Path::new(name))?;
        let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
        fs::set_permissions(path, Permissions::from_mode(*mode)).map_err(say(format!("prepare {name}")))?;
    }
    Ok(())
}

fn exists(root: &OwnedFd, path: &str) -> bool {
    openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT).is_ok()
}

/// Opens a directory of the new root, making what is missing; symlinks resolve inside that root.
fn make_path(root: &OwnedFd, path: &Path) -> Result<OwnedFd, String> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let failed = |error: Errno| format!("cannot make {}: {error}", path.display());
    let mut so_far = PathBuf::from("/");
    let mut parent = openat2(root, "/", flags, Mode::empty(), ResolveFlags::IN_ROOT).map_err(failed)?;
    for part in path.components().skip(1) {
        so_far.push(part);
        let next = match openat2(root, &so_far, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
            Err(Errno::NOENT) => {
                mkdirat(&parent, part.as_os_str(), Mode::from_raw_mode(0o755)).map_err(failed)?;
                openat2(root, &so_far, flags, Mode::empty(), ResolveFlags::IN_ROOT)
            }
            opened => opened,
        };
        parent = next.map_err(failed)?;
    }
    Ok(parent)
}

fn mount_run(root: &OwnedFd) -> Result<(), String> {
    let run = make_path(root, Path::new("/run"))?;
    let run = format!("/proc/self/fd/{}", run.as_raw_fd());
    mount("run", &run, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=755")
        .map_err(say("mount /run"))
}

/// Moves the kernel's file systems into the new root and adds those that programs expect.
fn mount_system(root: &OwnedFd) -> Result<(), String> {
    // devtmpfs brings nodes, not these.
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        let _ = std::os::unix::fs::symlink(target, Path::new("/dev").join(link));
    }
    for directory in ["/dev/pts", "/dev/shm"] {
        make_directory(directory, 0o755)?;
    }
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("devpts", "/dev/pts", "devpts", quiet, c"newinstance,gid=5,mode=620,ptmxmode=666")
        .map_err(say("mount /dev/pts"))?;
    mount("shm", "/dev/shm", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=1777")
        .map_err(say("mount /dev/shm"))?;
    for name in ["/dev", "/sys", "/proc"] {
        let target = make_path(root, Path::new(name))?;
        let path = format!("/proc/self/fd/{}", target.as_raw_fd());
        mount_move(name, &path).map_err(say(format!("move {name}")))?;
        if name == "/proc" {
            // The descriptors above are reached through it: the last to move, and again where it was.
            mount_bind(format!("{NEW_ROOT}/proc"), "/proc").map_err(say("reach /proc"))?;
        }
    }
    Ok(())
}

fn mount_cgroups(root: &OwnedFd) -> Result<OwnedFd, String> {
    let target = make_path(root, Path::new("/sys/fs/cgroup"))?;
    let path = format!("/proc/self/fd/{}", target.as_raw_fd());
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("cgroup2", &path, "cgroup2", flags, None).map_err(say("mount the cgroups"))?;
    let cgroups = make_path(root, Path::new("/sys/fs/cgroup"))?;
    // Reopened, for a descriptor of the directory below the mount would not see it.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let cgroups =
        rustix::fs::openat(&cgroups, ".", flags, Mode::empty()).map_err(say("reach the cgroups"))?;
    mkdirat(&cgroups, PROGRAMS, Mode::from_raw_mode(0o755)).map_err(say("make the programs' cgroup"))?;
    let programs =
        rustix::fs::openat(&cgroups, PROGRAMS, flags, Mode::empty()).map_err(say("reach the cgroups"))?;
    for group in [&cgroups, &programs] {
        cgroup::write(group, "cgroup.subtree_control", "+pids").map_err(say("bound the programs' number"))?;
    }
    Ok(programs)
}

/// Makes the new root the root of all threads.
fn switch_root() -> Result<(), String> {
    std::env::set_current_dir(NEW_ROOT).map_err(say("enter the new root"))?;
    mount_move(".", "/").map_err(say("switch to the new root"))?;
    rustix::process::chroot(".").map_err(say("switch to the new root"))?;
    std::env::set_current_dir("/").map_err(say("enter the new root"))
}

/// Places in memory for what is temporary, where nothing else can be written.
fn mount_temporary(root: &OwnedFd) -> Result<(), String> {
    for path in ["/tmp", "/var/tmp"] {
        let target = make_path(root, Path::new(path))?;
        let target = format!("/proc/self/fd/{}", target.as_raw_fd());
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("temporary", &target, "tmpfs", flags, c"mode=1777,size=50%")
            .map_err(say(format!("mount {path}")))?;
    }
    Ok(())
}

/// Makes the root read-only.
fn seal() -> Result<(), String> {
    rustix::mount::mount_remount("/", MountFlags::RDONLY | MountFlags::BIND, c"")
        .map_err(say("make the root read-only"))
}

fn add_directory(wish: &message::Directory) -> Result<(), String> {
    let path = path_of(&wish.path)?;
    if path.is_dir() {
        return adopt(&path, wish);
    }
    fs::create_dir_all(&path).map_err(say(format!("make {}", path.display())))?;
    adopt(&path, wish)
}

/// Gives a directory its owner, and its mode unless it is passed through by others.
fn adopt(path: &Path, wish: &message::Directory) -> Result<(), String> {
    std::os::unix::fs::chown(path, Some(wish.uid), Some(wish.gid))
        .map_err(say(format!("hand over {}", path.display())))?;
    fs::set_permissions(path, Permissions::from_mode(wish.mode))
        .map_err(say(format!("prepare {}", path.display())))
}

/// Writes a file in place of whatever was there; a symlink is replaced, not followed.
fn write_file(path: &Path, mode: u32, content: &[u8]) -> Result<(), String> {
    let what = || format!("write {}", path.display());
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(say(what()))?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(say(what())(error)),
        _ => {}
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let mut file: File = file.map_err(say(what()))?;
    file.write_all(content).map_err(say(what()))?;
    file.set_permissions(Permissions::from_mode(mode)).map_err(say(what()))
}

fn make_directory(path: impl AsRef<Path>, mode: u32) -> Result<(), String> {
    let path = path.as_ref();
    let shown = path.display();
    match fs::create_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(say(format!("make {shown}"))(error))
        }
        _ => fs::set_permissions(path, Permissions::from_mode(mode)).map_err(say(format!("prepare {shown}"))),
    }
}

fn open_directory(path: impl AsRef<Path>) -> Result<OwnedFd, String> {
    let path = path.as_ref();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(say(format!("open {}", path.display())))
}

/// Reads at most `limit` bytes of a file below `directory`.
pub(crate) fn read_below(directory: impl AsFd, path: &str, limit: usize) -> std::io::Result<Vec<u8>> {
    let file = rustix::fs::openat(directory, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(File::from(file), limit as u64), &mut content)?;
    Ok(content)
}
