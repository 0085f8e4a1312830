//! File systems of the host: mounts each and relays its requests.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::rc::Rc;

use agentkernel_protocol::frame::{self, FILE_SYSTEM_LIMIT, FrameError};
use agentkernel_protocol::mux::Stream;
use rustix::mount::{MountFlags, mount};
use tokio::io::unix::AsyncFd;

use crate::boot::described;
use crate::system;

/// Largest read the kernel asks for, bytes; the host's INIT answer may say less.
const MAX_READ: u32 = 1 << 20;

/// Where a served file system is mounted until `configure` puts it in its place. Lies in the initramfs, so the
/// runtime's thread may touch it before the root is switched.
pub(crate) fn mount_point(tag: &str) -> PathBuf {
    PathBuf::from("/served").join(tag)
}

/// The file systems served so far.
#[derive(Default)]
pub(crate) struct FileSystems {
    tags: RefCell<BTreeSet<String>>,
}

impl FileSystems {
    /// Tags of the file systems that are mounted.
    pub(crate) fn tags(&self) -> BTreeSet<String> {
        self.tags.borrow().clone()
    }

    /// Mounts the file system and relays until the host ends the stream; then whoever uses it gets errors, not silence.
    pub(crate) async fn serve(&self, tag: &str, read_only: bool, stream: Stream) -> Result<(), Error> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if tag.is_empty()
            || tag.len() > 32
            || !tag.bytes().all(good)
            || !self.tags.borrow_mut().insert(tag.into())
        {
            return Err(Error::new(ErrorKind::InvalidInput, "the tag is malformed or in use"));
        }
        let device = open_and_mount(tag, read_only)?;
        let device = Rc::new(system::register(device)?);
        let (mut reader, mut writer) = tokio::io::split(stream);
        let requests = async {
            let mut buffer = vec![0; FILE_SYSTEM_LIMIT];
            loop {
                let count = read(&device, &mut buffer).await?;
                frame::write_bytes(&mut writer, &buffer[..count]).await.map_err(broken)?;
            }
        };
        let replies = async {
            loop {
                let reply = frame::read_bytes(&mut reader, FILE_SYSTEM_LIMIT).await.map_err(broken)?;
                // Writes to the device never block. One that is refused answers a request that was interrupted.
                let _ = device.get_ref().write(&reply);
            }
        };
        let requests: std::pin::Pin<Box<dyn Future<Output = Result<(), Error>>>> = Box::pin(requests);
        let replies: std::pin::Pin<Box<dyn Future<Output = Result<(), Error>>>> = Box::pin(replies);
        either(requests, replies).await
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

/// One request of the kernel.
async fn read(device: &AsyncFd<File>, buffer: &mut [u8]) -> Result<usize, Error> {
    loop {
        let mut guard = device.readable().await?;
        match guard.try_io(|device| device.get_ref().read(buffer)) {
            Ok(Ok(count)) => return Ok(count),
            // The request was withdrawn before it was read.
            Ok(Err(error)) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

fn open_and_mount(tag: &str, read_only: bool) -> Result<File, Error> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/fuse")
        .map_err(|error| described("open /dev/fuse", error))?;
    let target = mount_point(tag);
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
