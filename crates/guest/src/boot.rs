//! From the kernel's first call to an open port.

use std::fs::{self, File, OpenOptions};
use std::io::{Error, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};

/// How long the kernel may take to show the port after its driver was loaded.
const PORT_PATIENCE: Duration = Duration::from_secs(20);

/// What the agent starts with.
pub(crate) struct Booted {
    pub port: File,
    pub kernel: String,
}

/// Mounts what the kernel offers, loads the modules, opens the port.
pub(crate) fn boot() -> Result<Booted, Error> {
    for (kind, target, flags) in [
        ("proc", "/proc", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC),
        ("sysfs", "/sys", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC),
        ("devtmpfs", "/dev", MountFlags::NOSUID),
    ] {
        // There already in kernels that mount it themselves.
        let _ = fs::create_dir(target);
        match mount(kind, target, kind, flags, None) {
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(described(&format!("mount {target}"), error.into())),
        }
    }
    occupy_standard_streams();
    load_modules();
    let port = open_port()?;
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    Ok(Booted { port, kernel })
}

/// Makes sure that descriptors 0, 1 and 2 are taken: no pipe of a program may get one of them.
fn occupy_standard_streams() {
    while let Ok(null) = OpenOptions::new().read(true).write(true).open("/dev/null") {
        let number = std::os::fd::AsRawFd::as_raw_fd(&null);
        if number > 2 {
            return;
        }
        std::mem::forget(null);
    }
}

/// Loads the initramfs's modules in the order of their names, and frees the memory of their files.
fn load_modules() {
    let Ok(entries) = fs::read_dir("/modules") else { return };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let loaded = File::open(&path).and_then(|file| Ok(rustix::system::finit_module(&file, c"", 0)?));
        match loaded {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => log(&format!("module {}: {error}", path.display())),
        }
        let _ = fs::remove_file(&path);
    }
}

/// Finds the port by its name: its number depends on what else is plugged.
fn open_port() -> Result<File, Error> {
    let deadline = Instant::now() + PORT_PATIENCE;
    loop {
        if let Some(device) = find_port() {
            return OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&device)
                .map_err(|error| described(&format!("open {}", device.display()), error));
        }
        if Instant::now() > deadline {
            return Err(Error::new(ErrorKind::NotFound, "the machine has no agent's port"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn find_port() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    ports.flatten().find_map(|port| {
        let name = fs::read_to_string(port.path().join("name")).ok()?;
        let device = PathBuf::from("/dev").join(port.file_name());
        (name.trim() == agentkernel_protocol::PORT_NAME && device.exists()).then_some(device)
    })
}

/// An error that says what was being done.
pub(crate) fn described(what: &str, error: Error) -> Error {
    Error::new(error.kind(), format!("cannot {what}: {error}"))
}

/// Writes a line to the kernel's log and so to the console.
pub(crate) fn log(text: &str) {
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // Level 2, "critical": shown even on a quiet console.
        let _ = log.write_all(format!("<2>agentkernel: {text}\n").as_bytes());
    }
}
