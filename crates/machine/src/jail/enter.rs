//! The jailed side: receives its orders, confines itself, becomes the guarded program.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::process::{Gid, Pid, Signal, Uid, getppid, set_parent_process_death_signal};
use rustix::thread::UnshareFlags;

use super::{
    Argument, FIRST_DESCRIPTOR, IMAGE, Layer, Orders, Report, Wall, filter, message, opening, restrict, root,
};

use crate::process::{Room, resume};

/// Above every descriptor that is passed on.
const REPORT_DESCRIPTOR: i32 = 128;

/// Why the jail could not be entered, in words for the supervisor.
pub(super) type Failure = String;

/// Names what was being done when the system refused.
pub(super) fn doing<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Failure {
    let what = what.into();
    move |error| format!("{what}: {}", error.into())
}

/// The verb [`super::VERB`]. Returns only if the guarded program was not started.
///
/// Must be called by a process that has done nothing else yet: one thread, no descriptor of its own.
#[must_use]
pub fn main() -> ExitCode {
    if close_others().is_err() {
        return ExitCode::FAILURE;
    }
    // The directories of the new root must be open to the uid that will live in it, whatever the caller's mask.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let stdin = io::stdin();
    let received = message::receive::<Orders>(&stdin);
    // Whoever calls this verb by hand has no socket there.
    let Ok(Some((orders, descriptors))) = received else { return ExitCode::from(2) };
    let Ok(report) = fcntl_dupfd_cloexec(&stdin, REPORT_DESCRIPTOR) else { return ExitCode::FAILURE };
    let mut walls = Walls { layers: Vec::new(), without: orders.without.clone() };
    match run(&orders, descriptors, &mut walls, &report) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            let _ = message::send(&report, &Report::Failed(reason), &[]);
            ExitCode::FAILURE
        }
    }
}

/// Which walls stand so far.
pub(super) struct Walls {
    layers: Vec<Layer>,
    without: Vec<Wall>,
}

impl Walls {
    /// Builds a wall that a host may not offer, and notes how it went.
    pub(super) fn build(&mut self, wall: Wall, build: impl FnOnce() -> Result<String, Failure>) -> bool {
        let built = if self.without.contains(&wall) { Err("left out".to_owned()) } else { build() };
        let holds = built.is_ok();
        let detail = built.unwrap_or_else(|reason| reason);
        self.layers.push(Layer { wall, holds, detail });
        holds
    }

    fn stands(&self, wall: Wall) -> bool {
        self.layers.iter().any(|layer| layer.wall == wall && layer.holds)
    }

    /// For a wall that is built in two steps.
    fn forget(&mut self, wall: Wall) {
        self.layers.retain(|layer| layer.wall != wall);
    }
}

/// Whoever started us may have left descriptors open across exec; none may reach the guarded program.
#[allow(unsafe_code)]
fn close_others() -> io::Result<()> {
    let entries = fs::read_dir("/proc/self/fd")?.flatten();
    let listed: Vec<i32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    // The one of the directory that was just read is closed already.
    let is_open = |descriptor: &i32| fs::read_link(format!("/proc/self/fd/{descriptor}")).is_ok();
    for descriptor in listed.into_iter().filter(|descriptor| *descriptor > 2).filter(is_open) {
        // SAFETY: it is open, and this process has opened nothing itself yet (see `main`), so no value of ours owns it.
        unsafe { rustix::io::close(descriptor) };
    }
    Ok(())
}

fn run(
    orders: &Orders,
    descriptors: Vec<OwnedFd>,
    walls: &mut Walls,
    report: &OwnedFd,
) -> Result<(), Failure> {
    for (descriptor, number) in descriptors.iter().zip(FIRST_DESCRIPTOR..) {
        if descriptor.as_raw_fd() != number {
            return Err(format!("descriptor {number} arrived as {}", descriptor.as_raw_fd()));
        }
    }
    let null =
        OpenOptions::new().read(true).write(true).open("/dev/null").map_err(doing("open /dev/null"))?;
    rustix::stdio::dup2_stdin(&null).map_err(doing("detach standard input"))?;
    let room = orders.resumed.as_ref().map(|_| Room::look()).transpose().map_err(doing("look at itself"))?;

    enter_namespaces(orders, walls);
    let mut prepared = None;
    if walls.stands(Wall::MountNamespace) {
        walls.forget(Wall::MountNamespace);
        walls.build(Wall::MountNamespace, || {
            prepared = Some(root::prepare(orders, &descriptors)?);
            Ok("only the machine's own files exist".to_owned())
        });
    }
    let new_root = prepared.is_some();
    if let Some(prepared) = prepared {
        prepared.enter()?;
    }
    // INVARIANT: from here on no path of the host is opened; the program's own are the same inside and outside.
    restrict::limits(orders, walls);
    change_identity(orders, walls);
    restrict::capabilities(walls);
    walls.build(Wall::NoNewPrivileges, || {
        rustix::thread::set_no_new_privs(true).map_err(doing("set no_new_privs"))?;
        Ok("set-uid programs gain nothing".to_owned())
    });
    watch_parent(orders, walls)?;
    let paths = reopened_paths(orders, new_root);
    restrict::landlock(orders, &descriptors, &paths, new_root, walls)?;

    filter::system_calls(walls);
    if orders.asks {
        let listener = opening::listen().map_err(doing("filter the call that opens the memory"))?;
        message::send(report, &Report::Asks, &[listener.as_fd()]).map_err(doing("report"))?;
    }

    message::send(report, &Report::Layers(walls.layers.clone()), &[]).map_err(doing("report"))?;
    if let (Some(names), Some(room)) = (&orders.resumed, room) {
        filter::no_programs().map_err(doing("deny it programs"))?;
        let passed = names.iter().map(String::as_str).zip(&descriptors).collect::<BTreeMap<_, _>>();
        let image = passed.get(IMAGE).ok_or("no process is passed")?;
        let image = File::from(image.try_clone().map_err(doing("open the saved process"))?);
        return match resume(&room, &image, &passed, report) {
            Ok(never) => match never {},
            Err(error) => Err(format!("go on as a saved process: {error}")),
        };
    }
    let Some(program) = &orders.program else { return Ok(()) };
    for descriptor in &descriptors {
        fcntl_setfd(descriptor, FdFlags::empty()).map_err(doing("keep a descriptor"))?;
    }
    Err(doing(format!("start {}", program.display()))(execute(program, orders, &paths)))
}

/// Where the guarded program finds each file it opens again, by descriptor index.
fn reopened_paths(orders: &Orders, new_root: bool) -> Vec<(usize, PathBuf)> {
    let path = |index: &usize| match new_root {
        true => Path::new("/").join(root::reopened_name(*index)),
        false => PathBuf::from(format!("/proc/self/fd/{}", FIRST_DESCRIPTOR as usize + index)),
    };
    orders.reopened.iter().map(|(index, _)| (*index, path(index))).collect()
}

fn execute(program: &Path, orders: &Orders, paths: &[(usize, PathBuf)]) -> io::Error {
    let mut command = Command::new(program);
    command.env_clear();
    for argument in &orders.arguments {
        match argument {
            Argument::Text(text) => command.arg(text),
            Argument::Reopen(index) => match paths.iter().find(|(known, _)| known == index) {
                Some((_, path)) => command.arg(path),
                None => {
                    return io::Error::new(io::ErrorKind::InvalidInput, "an argument names no descriptor");
                }
            },
        };
    }
    command.exec()
}

fn unshare(flags: UnshareFlags, what: &str) -> Result<String, Failure> {
    #[allow(unsafe_code)]
    // SAFETY: the process has one thread, and neither its descriptor table nor its working directory is unshared.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(doing("unshare"))?;
    Ok(what.to_owned())
}

fn enter_namespaces(orders: &Orders, walls: &mut Walls) {
    if orders.identity.is_none() {
        let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
        let entered = walls.build(Wall::UserNamespace, || {
            unshare(UnshareFlags::NEWUSER, "")?;
            map_own_ids(uid, gid).map_err(doing("map the user's own ids"))?;
            Ok("the user's own ids, nothing else".to_owned())
        });
        if !entered {
            let detail = || Err("needs the user namespace".to_owned());
            for wall in [Wall::NetworkNamespace, Wall::IpcNamespace, Wall::MountNamespace] {
                walls.build(wall, detail);
            }
            return;
        }
    }
    walls.build(Wall::NetworkNamespace, || unshare(UnshareFlags::NEWNET, "no interface that is up"));
    walls.build(Wall::IpcNamespace, || unshare(UnshareFlags::NEWIPC, "no queue or segment of others"));
    walls.build(Wall::MountNamespace, || unshare(UnshareFlags::NEWNS, ""));
}

fn map_own_ids(uid: Uid, gid: Gid) -> io::Result<()> {
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{0} {0} 1", uid.as_raw()))?;
    fs::write("/proc/self/gid_map", format!("{0} {0} 1", gid.as_raw()))
}

/// Root gives itself away: the process gets a uid that nobody has, and no group but, where needed, that of `/dev/kvm`.
fn change_identity(orders: &Orders, walls: &mut Walls) {
    let Some(identity) = orders.identity else { return };
    walls.build(Wall::OwnUid, || {
        let groups: Vec<Gid> = orders.devices.iter().filter_map(|device| device_group(device)).collect();
        rustix::thread::set_thread_groups(&groups).map_err(doing("set the groups"))?;
        let (uid, gid) = (Uid::from_raw(identity), Gid::from_raw(identity));
        rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(doing("set the group id"))?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(doing("set the user id"))?;
        Ok(format!("uid {identity}"))
    });
}

/// The group through which a device may be used, unless everybody may, or it is root's.
fn device_group(device: &Path) -> Option<Gid> {
    let data = fs::symlink_metadata(device).ok()?;
    (data.mode() & 0o006 != 0o006 && data.mode() & 0o060 == 0o060 && data.gid() != 0)
        .then(|| Gid::from_raw(data.gid()))
}

/// Asks for death with the supervisor. After the change of uid, for that clears the request.
fn watch_parent(orders: &Orders, walls: &mut Walls) -> Result<(), Failure> {
    walls.build(Wall::ParentDeath, || {
        set_parent_process_death_signal(Some(Signal::KILL)).map_err(doing("ask for a signal"))?;
        Ok("killed when the supervisor ends".to_owned())
    });
    // It may have ended before the request was made.
    if getppid() != Pid::from_raw(orders.parent) {
        return Err("the supervisor is gone".to_owned());
    }
    Ok(())
}

/// Opens `path` without following any symbolic link on the way.
pub(super) fn open_without_links(path: &Path) -> io::Result<OwnedFd> {
    use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?)
}

/// Whether two descriptors are of the same file.
pub(super) fn same_file(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<bool> {
    let (one, other) = (rustix::fs::fstat(one)?, rustix::fs::fstat(other)?);
    Ok((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
}

/// Whether a descriptor is of a directory.
pub(super) fn is_directory(descriptor: &OwnedFd) -> io::Result<bool> {
    let mode = rustix::fs::fstat(descriptor)?.st_mode;
    Ok(rustix::fs::FileType::from_raw_mode(mode).is_dir())
}

/// A file made in the new root, to mount on.
pub(super) fn touch(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).open(path)
}
