//! Assembles the root file system and gives the machine its identity.
//!
//! ```text
//! initramfs /            /served/TAG   served file systems, as mounted by `fuse`
//!                        /image        EROFS image, if the root is one
//!                        /writable     ext4: root/{upper,work}, mount-N/{upper,work}
//! new root  /            overlay(lower = served or image, upper = writable/root)
//!           TARGET       served file system, or overlay(lower = served, upper = writable/mount-N)
//!           /proc ...    moved from the initramfs
//! ```
//! Runs once, on a thread that may wait for the host's file servers.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agentkernel_protocol::message::{self, Configure, Mount, MountMode, Root, Writable};
use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};

use crate::exec::cgroup;
use crate::layers::Layers;
use crate::{fuse, system};

/// Name of the cgroup of all programs.
const PROGRAMS: &str = "programs";
const NEW_ROOT: &str = "/root-to-be";
const WRITABLE: &str = "/writable";
/// Nothing that Docker's overlays do not do either: a directory's rename is `EXDEV`, and upper layers need no index.
pub(crate) const OVERLAY_OPTIONS: &str = "redirect_dir=off,metacopy=off,index=off";

/// What stays reachable after the root was switched.
pub(crate) struct Layout {
    /// Upper directories of the copy-on-write mounts, by the mounts' index.
    uppers: Vec<Option<Arc<OwnedFd>>>,
    /// The cgroup of all programs.
    pub cgroups: OwnedFd,
    /// Most processes and threads of one program with all it starts.
    pub process_limit: u32,
    /// The layers of builds.
    pub layers: Arc<Layers>,
    /// The kernel's `/proc`, reached without a path lookup in the root.
    pub proc: OwnedFd,
}

impl Layout {
    /// The upper directory of mount number `mount`, if that is copy-on-write.
    pub(crate) fn upper(&self, mount: u32) -> Option<Arc<OwnedFd>> {
        self.uppers.get(usize::try_from(mount).ok()?)?.clone()
    }
}

/// Carries out the host's wish.
///
/// # Errors
/// Says which step failed and why.
pub(crate) fn configure(wish: &Configure, file_systems: &BTreeSet<String>) -> Result<Layout, String> {
    system::reseed(&wish.entropy).map_err(say("reseed the random pool"))?;
    set_clock(wish.unix_time_ns)?;
    let served = |tag: &str| -> Result<PathBuf, String> {
        if file_systems.contains(tag) {
            Ok(fuse::mount_point(tag))
        } else {
            Err(format!("no file system {tag} is served"))
        }
    };
    let lower = match &wish.root {
        Root::FileSystem { tag } => served(tag)?,
        Root::Disk { serial } => mount_disk(serial, "/image", "erofs", MountFlags::RDONLY, "")?,
    };
    let Writable::Disk { serial } = &wish.writable;
    mount_disk(serial, WRITABLE, "ext4", MountFlags::NOATIME, "noinit_itable")?;
    make_directory(NEW_ROOT, 0o755)?;
    overlay(&lower, "root", Path::new(NEW_ROOT), 0o755, (0, 0))?;
    let root = open_directory(NEW_ROOT)?;
    make_standard_directories(&root, matches!(wish.root, Root::FileSystem { .. }))?;
    // Before the mounts: a project may lie below it, as removable disks do.
    mount_run(&root)?;
    if wish.read_only {
        mount_temporary(&root)?;
    }
    let mut uppers = Vec::new();
    for (index, mount) in wish.mounts.iter().enumerate() {
        uppers.push(place(&root, index, mount, &served(&mount.tag)?)?);
    }
    mount_system(&root)?;
    let layout = Layout {
        uppers,
        cgroups: mount_cgroups(&root)?,
        process_limit: wish.process_limit,
        layers: Arc::new(Layers::new(open_directory(WRITABLE)?, open_directory(&lower)?)),
        proc: open_directory("/proc")?,
    };
    switch_root()?;
    identify(wish)?;
    for directory in &wish.directories {
        add_directory(directory)?;
    }
    for file in &wish.files {
        write_file(&path_of(&file.path)?, file.mode, &file.content)?;
    }
    if wish.read_only {
        seal()?;
    }
    Ok(layout)
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

fn set_clock(unix_time_ns: u64) -> Result<(), String> {
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

/// Mounts an overlay over `lower` at `target`, its upper layer in the writable disk's directory `name` with the mode
/// and owner that the merged root shall have. Returns the upper directory.
fn overlay(lower: &Path, name: &str, target: &Path, mode: u32, owner: (u32, u32)) -> Result<OwnedFd, String> {
    let upper = format!("{WRITABLE}/{name}/upper");
    let work = format!("{WRITABLE}/{name}/work");
    // A sandbox that was stopped brings its layer back with all that was done to it.
    if !Path::new(&upper).exists() {
        for directory in [&format!("{WRITABLE}/{name}"), &upper, &work] {
            make_directory(directory, 0o755)?;
        }
        fs::set_permissions(&upper, Permissions::from_mode(mode))
            .map_err(say("prepare the writable layer"))?;
        std::os::unix::fs::chown(&upper, Some(owner.0), Some(owner.1))
            .map_err(say("prepare the writable layer"))?;
    }
    let options = format!("lowerdir={},upperdir={upper},workdir={work},{OVERLAY_OPTIONS}", lower.display());
    let options = CString::new(options).map_err(say("mount an overlay"))?;
    mount("overlay", target, "overlay", MountFlags::empty(), &*options)
        .map_err(say(format!("mount the copy-on-write layer of {name}")))?;
    open_directory(&upper)
}

/// Puts a served file system at its target inside the new root; returns its upper directory if it has one.
fn place(root: &OwnedFd, index: usize, mount: &Mount, served: &Path) -> Result<Option<Arc<OwnedFd>>, String> {
    let target_path = path_of(&mount.target)?;
    let target = make_path(root, &target_path)?;
    let target = PathBuf::from(format!("/proc/self/fd/{}", target.as_raw_fd()));
    match mount.mode {
        MountMode::CopyOnWrite => {
            let metadata = fs::metadata(served).map_err(say(format!("look at {}", target_path.display())))?;
            let owner = (metadata.uid(), metadata.gid());
            let upper = overlay(served, &format!("mount-{index}"), &target, metadata.mode() & 0o7777, owner)?;
            Ok(Some(Arc::new(upper)))
        }
        MountMode::ReadOnly | MountMode::ReadWrite => {
            mount_bind(served, &target).map_err(say(format!("mount {}", target_path.display())))?;
            Ok(None)
        }
    }
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

fn identify(wish: &Configure) -> Result<(), String> {
    rustix::system::sethostname(wish.hostname.as_bytes()).map_err(say("set the host name"))?;
    write_file(Path::new("/etc/hostname"), 0o644, format!("{}\n", wish.hostname).as_bytes())?;
    write_file(Path::new("/etc/machine-id"), 0o444, format!("{}\n", wish.machine_id).as_bytes())?;
    system::loopback_up().map_err(say("bring the loopback interface up"))
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

fn make_directory(path: &str, mode: u32) -> Result<(), String> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(say(format!("make {path}"))(error))
        }
        _ => fs::set_permissions(path, Permissions::from_mode(mode)).map_err(say(format!("prepare {path}"))),
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
