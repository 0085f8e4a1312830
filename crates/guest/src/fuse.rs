//! File systems of the host: mounts each and relays its requests.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use agentkernel_protocol::frame::{self, FILE_SYSTEM_LIMIT, FrameError};
use agentkernel_protocol::mux::Stream;
use rustix::mount::{MountFlags, mount};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::spawn_blocking;

use crate::boot::described;
use crate::system;

/// Largest read the kernel asks for, bytes; the host's INIT answer may say less.
const MAX_READ: u32 = 1 << 20;

/// Where a served file system is mounted, in the initramfs, until `configure` puts it in its place.
pub(crate) fn mount_point(tag: &str) -> PathBuf {
    PathBuf::from("/served").join(tag)
}

/// Requests that nobody answers: FORGET and BATCH_FORGET of `linux/fuse.h`.
const UNANSWERED: [u32; 2] = [2, 42];

/// The file systems served so far, by their tags.
#[derive(Default)]
pub(crate) struct FileSystems {
    mounted: RefCell<BTreeMap<String, Rc<Mounted>>>,
    traffic: Rc<Traffic>,
}

/// A mounted file system. It outlives the stream to its server: a restored machine goes on with another stream.
struct Mounted {
    device: AsyncFd<File>,
    /// Counts the streams it was given; only the latest may take requests.
    stream: Cell<u64>,
}

/// What is under way between the kernel and the host's servers.
#[derive(Default)]
struct Traffic {
    /// Requests that were taken and not answered.
    outstanding: Cell<usize>,
    /// How many want that no request is taken.
    holds: Cell<usize>,
    /// Told of every change of these, and of each mount.
    changed: Notify,
}

/// While it lives no request is taken from the kernel.
pub(crate) struct Quiet(Rc<Traffic>);

impl Quiet {
    /// Waits until all that was taken is answered.
    pub(crate) async fn wait(&self) {
        self.0.until(|traffic| traffic.outstanding.get() == 0).await;
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        self.0.holds.set(self.0.holds.get() - 1);
        self.0.changed.notify_waiters();
    }
}

impl Traffic {
    async fn until(&self, condition: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            if condition(self) {
                return;
            }
            changed.await;
        }
    }

    fn taken(&self) {
        self.outstanding.set(self.outstanding.get() + 1);
    }

    fn answered(&self) {
        self.outstanding.set(self.outstanding.get().saturating_sub(1));
        self.changed.notify_waiters();
    }
}

impl FileSystems {
    /// Tags of the file systems that are mounted.
    pub(crate) fn tags(&self) -> BTreeSet<String> {
        self.mounted.borrow().keys().cloned().collect()
    }

    /// Waits until all of these are mounted: each comes over a stream of its own.
    pub(crate) async fn present(&self, tags: &[&str]) {
        let all = || tags.iter().all(|tag| self.mounted.borrow().contains_key(*tag));
        self.traffic.until(|_| all()).await;
    }

    /// From now on no request is taken from the kernel: those who make one wait.
    pub(crate) fn quiet(&self) -> Quiet {
        self.traffic.holds.set(self.traffic.holds.get() + 1);
        Quiet(self.traffic.clone())
    }

    /// Mounts the file system if it is not mounted yet, below `initial` (the initramfs, where that is not the root any
    /// more), and relays until the host ends the stream.
    pub(crate) async fn serve(
        &self,
        tag: &str,
        read_only: bool,
        initial: Option<PathBuf>,
        stream: Stream,
    ) -> Result<(), Error> {
        let mounted = self.mount(tag, read_only, initial).await?;
        let number = mounted.stream.get() + 1;
        mounted.stream.set(number);
        let (mut reader, mut writer) = tokio::io::split(stream);
        let traffic = &self.traffic;
        let requests = async {
            let mut buffer = vec![0; FILE_SYSTEM_LIMIT];
            loop {
                let Some(count) = take(&mounted, number, traffic, &mut buffer).await? else { return Ok(()) };
                frame::write_bytes(&mut writer, &buffer[..count]).await.map_err(broken)?;
            }
        };
        let replies = async {
            loop {
                let reply = frame::read_bytes(&mut reader, FILE_SYSTEM_LIMIT).await.map_err(broken)?;
                // Writes to the device never block. One that is refused answers a request that was interrupted.
                let _ = mounted.device.get_ref().write(&reply);
                // What has no number is a notice, and answers nothing.
                if reply.get(8..16).is_some_and(|unique| unique != [0; 8]) {
                    traffic.answered();
                }
            }
        };
        let requests: Endless<'_> = Box::pin(requests);
        let replies: Endless<'_> = Box::pin(replies);
        // The replies first: they tell that the stream is broken before a request is taken for it.
        match either(replies, requests).await {
            // As a restored machine begins.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            result => result,
        }
    }

    async fn mount(
        &self,
        tag: &str,
        read_only: bool,
        initial: Option<PathBuf>,
    ) -> Result<Rc<Mounted>, Error> {
        if let Some(mounted) = self.mounted.borrow().get(tag) {
            return Ok(mounted.clone());
        }
        let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if tag.is_empty() || tag.len() > 32 || !tag.bytes().all(good) {
            return Err(Error::new(ErrorKind::InvalidInput, "the tag is malformed"));
        }
        let name = tag.to_owned();
        // Looking a path up in the root may need another of the file systems served here.
        let device = spawn_blocking(move || open_and_mount(&name, read_only, initial.as_deref())).await;
        let device = system::register(device.map_err(Error::other)??)?;
        let mounted = Rc::new(Mounted { device, stream: Cell::new(0) });
        self.mounted.borrow_mut().insert(tag.into(), mounted.clone());
        self.traffic.changed.notify_waiters();
        Ok(mounted)
    }
}

type Endless<'a> = std::pin::Pin<Box<dyn Future<Output = Result<(), Error>> + 'a>>;

/// Runs both until one ends.
async fn either(mut first: Endless<'_>, mut second: Endless<'_>) -> Result<(), Error> {
    std::future::poll_fn(|context| match first.as_mut().poll(context) {
        std::task::Poll::Pending => second.as_mut().poll(context),
        done => done,
    })
    .await
}

fn broken(error: FrameError) -> Error {
    Error::new(ErrorKind::BrokenPipe, error)
}

/// One request of the kernel; `None` once another stream has taken over.
async fn take(
    mounted: &Mounted,
    number: u64,
    traffic: &Traffic,
    buffer: &mut [u8],
) -> Result<Option<usize>, Error> {
    loop {
        traffic.until(|traffic| traffic.holds.get() == 0).await;
        let mut guard = mounted.device.readable().await?;
        if mounted.stream.get() != number {
            return Ok(None);
        }
        if traffic.holds.get() > 0 {
            continue;
        }
        match guard.try_io(|device| device.get_ref().read(buffer)) {
            Ok(Ok(count)) => {
                let opcode = buffer.get(4..8).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
                if !opcode.is_some_and(|opcode| UNANSWERED.contains(&opcode)) {
                    traffic.taken();
                }
                return Ok(Some(count));
            }
            // The request was withdrawn before it was read.
            Ok(Err(error)) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

fn open_and_mount(tag: &str, read_only: bool, initial: Option<&Path>) -> Result<File, Error> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/fuse")
        .map_err(|error| described("open /dev/fuse", error))?;
    let target = mount_point(tag);
    let target = match initial {
        Some(initial) => initial.join(target.strip_prefix("/").unwrap_or(&target)),
        None => target,
    };
    fs::create_dir_all(&target).map_err(|error| described("make a mount point", error))?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={MAX_READ}",
        device.as_raw_fd()
    );
    let options = std::ffi::CString::new(options).map_err(Error::other)?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    if read_only {
        flags |= MountFlags::RDONLY;
    }
    mount(tag, &target, "fuse", flags, &*options).map_err(|error| described("mount", error.into()))?;
    Ok(device)
}
