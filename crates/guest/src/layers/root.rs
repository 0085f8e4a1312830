//! A root of its own for one program: layers over the machine's image, what it needs of the kernel, its mounts.
//!
//! It is assembled in the agent's tree, below `/run`, where the program's own mount namespace takes it for its root.

use std::ffi::{CString, OsString};
use std::fs::Permissions;
use std::io::Error;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use agentkernel_protocol::message::{LayeredRoot, RootMount, RootSource};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_remount, unmount,
};

use serde_bytes::ByteBuf;

use super::{Layers, timestamps};
use crate::configure::OVERLAY_OPTIONS;
use crate::tree;
use crate::trust::{Laid, STEP_BUNDLE};

/// Files of the machine that stand in for those of every root.
const IDENTITY: [&str; 2] = ["/etc/hosts", "/etc/resolv.conf"];
/// Longest options that mount(2) takes: one page with its final zero byte.
const OPTIONS_BYTES: usize = 4095;

/// An assembled root; taken apart when dropped.
pub(crate) struct StepRoot {
    path: PathBuf,
    /// Mounted on it, in this order.
    mounted: Vec<PathBuf>,
    /// Mount points that were made: the directory each is in, and its name there.
    stubs: Vec<(OwnedFd, OsString)>,
    /// What lies over the layers below its own, and in which directory.
    laid: Laid,
    over: PathBuf,
    /// Its own layer.
    upper: Option<OwnedFd>,
    /// Layers' times that making mount points changed: directories and their former times.
    touched: Vec<(OwnedFd, i64)>,
}

impl StepRoot {
    /// Puts a root together.
    ///
    /// # Errors
    /// Says which step failed and why; nothing is left mounted.
    pub(crate) fn assemble(layers: &Layers, wish: &LayeredRoot) -> Result<Self, String> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = PathBuf::from(format!("/run/root-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&path).map_err(say("make a root's directory"))?;
        let over = path.with_extension("over");
        let mut root = Self {
            path,
            mounted: Vec::new(),
            stubs: Vec::new(),
            laid: Laid::default(),
            over,
            upper: None,
            touched: Vec::new(),
        };
        root.overlay(layers, wish)?;
        for name in ["/proc", "/sys", "/dev"] {
            let target = root.mount_point(Path::new(name), FileType::Directory)?;
            mount_bind_recursive(name, &target).map_err(say(format!("mount {name}")))?;
            root.mounted.push(target);
        }
        for name in IDENTITY {
            let target = root.mount_point(Path::new(name), FileType::RegularFile)?;
            mount_bind(name, &target).map_err(say(format!("mount {name}")))?;
            root.mounted.push(target);
        }
        if !root.laid.bundle.is_empty() {
            let content = ByteBuf::from(std::mem::take(&mut root.laid.bundle));
            let source = RootSource::File { mode: 0o644, uid: 0, gid: 0, content };
            root.place(layers, &RootMount { target: ByteBuf::from(STEP_BUNDLE), source, read_only: true })?;
        }
        for mount in &wish.mounts {
            root.place(layers, mount)?;
        }
        Ok(root)
    }

    /// Where it is in the agent's tree.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The root directory.
    pub(crate) fn open(&self) -> Result<OwnedFd, Errno> {
        rustix::fs::open(&self.path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    }

    fn overlay(&mut self, layers: &Layers, wish: &LayeredRoot) -> Result<(), String> {
        let made = say("prepare the layers");
        let is_new = !layers.exists(wish.upper);
        let prepare = || -> Result<(OwnedFd, OwnedFd, Vec<OwnedFd>), Error> {
            let lower = wish
                .lower
                .iter()
                .rev()
                .map(|layer| layers.directory(*layer, "upper"))
                .collect::<Result<_, _>>()?;
            Ok((layers.directory(wish.upper, "upper")?, layers.directory(wish.upper, "work")?, lower))
        };
        let (upper, work, lower) = prepare().map_err(made)?;
        let below = lower.first().unwrap_or(&layers.image);
        if is_new {
            // The upper layer's root is the merged root: it looks as it did.
            adopt(&upper, below).map_err(say("prepare the writable layer"))?;
        }
        let descriptor = |directory: &OwnedFd| format!("/proc/self/fd/{}", directory.as_raw_fd());
        let mut below: Vec<_> = lower.iter().chain([&layers.image]).map(descriptor).collect();
        self.mount(&below, &descriptor(&upper), &descriptor(&work))?;
        self.mounted.push(self.path.clone());
        let merged = self.open().map_err(say("look at the root"))?;
        self.laid = layers.trust.survey(&merged, false);
        if self.laid.is_empty() {
            return Ok(());
        }
        std::fs::create_dir(&self.over)
            .and_then(|()| self.laid.write(&self.over, &merged))
            .map_err(say("add the host's certificates"))?;
        drop(merged);
        unmount(&self.path, UnmountFlags::empty()).map_err(say("add the host's certificates"))?;
        self.mounted.clear();
        below.insert(0, self.over.display().to_string());
        self.mount(&below, &descriptor(&upper), &descriptor(&work))?;
        self.mounted.push(self.path.clone());
        self.upper = Some(upper);
        Ok(())
    }

    /// Mounts the layers, the uppermost first.
    fn mount(&self, below: &[String], upper: &str, work: &str) -> Result<(), String> {
        let options =
            format!("lowerdir={},upperdir={upper},workdir={work},{OVERLAY_OPTIONS}", below.join(":"));
        if options.len() > OPTIONS_BYTES {
            return Err(format!("{} layers are more than can be mounted", below.len()));
        }
        let options = CString::new(options).map_err(say("mount the layers"))?;
        mount("overlay", &self.path, "overlay", MountFlags::empty(), &*options)
            .map_err(say("mount the layers"))
    }

    fn place(&mut self, layers: &Layers, wish: &RootMount) -> Result<(), String> {
        let path = Path::new(std::ffi::OsStr::from_bytes(&wish.target));
        let what = format!("mount {}", path.display());
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        let target = match &wish.source {
            RootSource::Memory { size } => {
                let options = match size {
                    Some(size) => format!("mode=1777,size={size}"),
                    None => "mode=1777".to_owned(),
                };
                let options = CString::new(options).map_err(say(&what))?;
                let target = self.mount_point(path, FileType::Directory)?;
                mount("memory", &target, "tmpfs", flags, &*options).map_err(say(&what))?;
                target
            }
            RootSource::Layer { layer, path: inside } => {
                let source = open_in(layers, *layer, inside).map_err(say(&what))?;
                let stat = rustix::fs::fstat(&source).map_err(say(&what))?;
                let target = self.mount_point(path, FileType::from_raw_mode(stat.st_mode))?;
                mount_bind(format!("/proc/self/fd/{}", source.as_raw_fd()), &target).map_err(say(&what))?;
                target
            }
            RootSource::File { mode, uid, gid, content } => {
                let source = PathBuf::from(format!("{}-file-{}", self.path.display(), self.mounted.len()));
                let written = std::fs::write(&source, content)
                    .and_then(|()| std::os::unix::fs::chown(&source, Some(*uid), Some(*gid)))
                    .and_then(|()| std::fs::set_permissions(&source, Permissions::from_mode(*mode)));
                let mounted = written.map_err(say(&what)).and_then(|()| {
                    let target = self.mount_point(path, FileType::RegularFile)?;
                    mount_bind(&source, &target).map_err(say(&what))?;
                    Ok(target)
                });
                // The mount keeps it.
                let _ = std::fs::remove_file(&source);
                mounted?
            }
        };
        self.mounted.push(target.clone());
        if wish.read_only {
            mount_remount(&target, MountFlags::RDONLY | MountFlags::BIND, c"").map_err(say(&what))?;
        }
        Ok(())
    }

    /// A path of the root to mount at, made if it is not there; symbolic links resolve inside the root. Returned as the
    /// agent knows it.
    fn mount_point(&mut self, path: &Path, kind: FileType) -> Result<PathBuf, String> {
        let failed = |error: Errno| format!("cannot make {}: {}", path.display(), Error::from(error));
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let root = self.open().map_err(failed)?;
        let mut so_far = PathBuf::from("/");
        let mut parent = openat2(&root, "/", flags, Mode::empty(), ResolveFlags::IN_ROOT).map_err(failed)?;
        let parts: Vec<_> = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        for (index, part) in parts.iter().enumerate() {
            so_far.push(part);
            let name = part.as_os_str();
            let next = match openat2(&root, &so_far, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
                Err(Errno::NOENT) => {
                    let before = rustix::fs::fstat(&parent).map_err(failed)?;
                    if kind == FileType::Directory || index + 1 < parts.len() {
                        rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)).map_err(failed)?;
                    } else {
                        let mode = Mode::from_raw_mode(0o644);
                        rustix::fs::mknodat(&parent, name, FileType::RegularFile, mode, 0).map_err(failed)?;
                    }
                    let keep = parent.try_clone().map_err(|error| error.to_string())?;
                    self.touched.push((
                        parent.try_clone().map_err(|error| error.to_string())?,
                        tree::modified_ns(&before),
                    ));
                    self.stubs.push((keep, name.to_owned()));
                    openat2(&root, &so_far, flags, Mode::empty(), ResolveFlags::IN_ROOT)
                }
                opened => opened,
            };
            parent = next.map_err(failed)?;
        }
        // Its name in the agent's tree, all links resolved: what is mounted there is found again to be unmounted.
        std::fs::read_link(format!("/proc/self/fd/{}", parent.as_raw_fd())).map_err(say("find a mount point"))
    }
}

impl Drop for StepRoot {
    fn drop(&mut self) {
        while let Some(path) = self.mounted.pop() {
            if path == self.path {
                // Only now: the overlay has to see it, and nothing may be mounted there.
                for (parent, name) in self.stubs.drain(..).rev() {
                    // What a program put in its place stays.
                    let is_empty =
                        rustix::fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| {
                            FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
                                && stat.st_size == 0
                        });
                    let flags = if is_empty { AtFlags::empty() } else { AtFlags::REMOVEDIR };
                    let _ = rustix::fs::unlinkat(&parent, &name, flags);
                }
                for (directory, modified_ns) in self.touched.drain(..).rev() {
                    let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
                    let _ = rustix::fs::utimensat(
                        rustix::fs::CWD,
                        path,
                        &timestamps(modified_ns),
                        AtFlags::empty(),
                    );
                }
            }
            let _ = unmount(&path, UnmountFlags::DETACH);
        }
        // Only now: nothing may change a layer that is mounted.
        if let Some(upper) = &self.upper {
            if let Err(error) = self.laid.take_out(upper) {
                crate::boot::log(&format!("a layer could not be searched for certificates: {error}"));
            }
            let _ = std::fs::remove_dir_all(&self.over);
        }
        let _ = std::fs::remove_dir(&self.path);
    }
}

/// Gives `directory` the owner and mode of `model`.
fn adopt(directory: &OwnedFd, model: &OwnedFd) -> Result<(), Errno> {
    let stat = rustix::fs::statat(model, "", AtFlags::EMPTY_PATH)?;
    let owner = (rustix::fs::Uid::from_raw(stat.st_uid), rustix::fs::Gid::from_raw(stat.st_gid));
    rustix::fs::fchown(directory, Some(owner.0), Some(owner.1))?;
    rustix::fs::fchmod(directory, Mode::from_raw_mode(stat.st_mode & 0o7777))
}

/// Opens what is mounted of a layer, whose links lead nowhere out of it.
fn open_in(layers: &Layers, layer: u32, path: &[u8]) -> Result<OwnedFd, Error> {
    let base = layers.directory(layer, "upper")?;
    let path = if path.is_empty() { b"." } else { path };
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(openat2(&base, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)?)
}

/// Names the step in an error.
fn say<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> String {
    move |error| format!("cannot {what}: {error}")
}
