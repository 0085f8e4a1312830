//! The state directory: what lies where, who holds it, and how the dead are swept away.
//!
//! ```text
//! ~/.agentkernel              0700; AGENTKERNEL_HOME names another
//! ├── version                 layout version, written once
//! ├── cache/                  kernel, initramfs, empty disks, root file systems: all can be made again
//! ├── last/                   change set of the last `run`
//! ├── sandboxes/              one directory a sandbox, see below
//! │   └── .lock               held shared while a sandbox is being made, exclusively while the dead are swept
//! └── trash/                  directories being removed
//!
//! sandboxes/NAME
//! ├── lock                    flock held by the supervisor and the machine's process: held means alive
//! ├── spec.json               what was asked for
//! ├── disk.ext4               writable layer, sparse
//! ├── console.log             what the guest's kernel printed, bounded
//! └── control.sock            where clients talk to the supervisor
//! ```
//! A sandbox directory is made under a temporary name with its lock already held, then renamed; it is removed by a
//! rename into `trash/` first. So whoever lists `sandboxes/` sees whole sandboxes only, and one whose lock is free is
//! dead: [`Home::sweep`] removes it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::problem::{Problem, io, plain};

const LAYOUT_VERSION: &str = "1";
const NEW_PREFIX: &str = ".new-";

/// The state directory.
#[derive(Clone, Debug)]
pub struct Home {
    path: PathBuf,
}

impl Home {
    /// Opens the state directory at `path`, making it if it is missing.
    ///
    /// # Errors
    /// If it cannot be made or written, belongs to someone else, or has a newer layout.
    pub fn open(path: &Path) -> Result<Self, Problem> {
        let what = || format!("make the state directory {}", path.display());
        make_directory(path).map_err(io(what()))?;
        let metadata = fs::metadata(path).map_err(io(what()))?;
        if metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(plain(
                "state-directory",
                format!("the state directory {} belongs to another user", path.display()),
                Some("set AGENTKERNEL_HOME to a directory of your own"),
            ));
        }
        let path = fs::canonicalize(path).map_err(io(what()))?;
        for name in ["cache", "sandboxes", "trash"] {
            make_directory(&path.join(name)).map_err(io(format!("make {}", path.join(name).display())))?;
        }
        let home = Self { path };
        home.check_version()?;
        Ok(home)
    }

    fn check_version(&self) -> Result<(), Problem> {
        let file = self.path.join("version");
        match fs::read_to_string(&file) {
            Ok(version) if version.trim() == LAYOUT_VERSION => Ok(()),
            Ok(version) => Err(plain(
                "state-version",
                format!(
                    "{} has layout {}, this program knows {LAYOUT_VERSION}",
                    self.path.display(),
                    version.trim()
                ),
                Some("upgrade agentkernel, or set AGENTKERNEL_HOME to another directory"),
            )),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                write_atomically(&file, format!("{LAYOUT_VERSION}\n").as_bytes())
                    .map_err(io(format!("write {}", file.display())))
            }
            Err(error) => Err(io(format!("read {}", file.display()))(error)),
        }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Things that can be made again.
    pub fn cache(&self) -> PathBuf {
        self.path.join("cache")
    }

    /// The change set of the last `run`.
    pub fn last(&self) -> PathBuf {
        self.path.join("last")
    }

    fn sandboxes(&self) -> PathBuf {
        self.path.join("sandboxes")
    }

    fn creation_lock(&self) -> Result<File, Problem> {
        let path = self.sandboxes().join(".lock");
        private_file()
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io(format!("open {}", path.display())))
    }

    /// Makes the directory of a sandbox called `name` with its lock held.
    ///
    /// # Errors
    /// Code `name-taken` if there is one already.
    pub fn create_sandbox(&self, name: &str) -> Result<HeldSandbox, Problem> {
        let creation = self.creation_lock()?;
        rustix::fs::flock(&creation, FlockOperation::LockShared)
            .map_err(crate::problem::os("lock the sandboxes"))?;
        let draft = self.sandboxes().join(format!("{NEW_PREFIX}{}", random_word()));
        let path = self.sandboxes().join(name);
        let make = || -> std::io::Result<File> {
            DirBuilder::new().mode(0o700).create(&draft)?;
            let lock = private_file().create_new(true).open(draft.join("lock"))?;
            rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            Ok(lock)
        };
        let lock = make().map_err(io(format!("make a sandbox in {}", self.sandboxes().display())))?;
        let sandbox = SandboxDirectory { path: path.clone(), home: self.clone() };
        match rustix::fs::renameat_with(
            rustix::fs::CWD,
            &draft,
            rustix::fs::CWD,
            &path,
            rustix::fs::RenameFlags::NOREPLACE,
        ) {
            Ok(()) => Ok(sandbox.with_lock(lock)),
            Err(error) => {
                let _ = fs::remove_dir_all(&draft);
                if error == rustix::io::Errno::EXIST {
                    return Err(plain(
                        "name-taken",
                        format!("there is a sandbox called {name} already"),
                        Some("choose another name with --name"),
                    ));
                }
                Err(crate::problem::os(format!("make {}", path.display()))(error))
            }
        }
    }

    /// Removes what dead processes left behind: temporary sandboxes nobody holds, half-made ones, trash.
    ///
    /// Errors are not the caller's business: the next sweep tries again.
    pub fn sweep(&self) {
        self.sweep_trash();
        let _ = crate::workspace::LastChanges::new(&self.path).sweep();
        let Ok(entries) = fs::read_dir(self.sandboxes()) else { return };
        // INVARIANT: with the creation lock held exclusively no sandbox is being made, so what looks dead stays dead.
        let creation = self
            .creation_lock()
            .ok()
            .filter(|lock| rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok());
        if creation.is_none() {
            return;
        }
        for entry in entries.flatten() {
            let name = entry.file_name();
            let half_made = name.as_encoded_bytes().starts_with(NEW_PREFIX.as_bytes());
            if name == ".lock" {
                continue;
            }
            let sandbox = SandboxDirectory { path: entry.path(), home: self.clone() };
            if half_made || sandbox.is_dead() {
                sandbox.remove();
            }
        }
    }

    fn sweep_trash(&self) {
        let Ok(entries) = fs::read_dir(self.path.join("trash")) else { return };
        for entry in entries.flatten() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// The directory of one sandbox.
#[derive(Clone, Debug)]
pub struct SandboxDirectory {
    path: PathBuf,
    home: Home,
}

/// A sandbox directory together with its lock.
#[derive(Debug)]
pub struct HeldSandbox {
    /// The directory.
    pub directory: SandboxDirectory,
    /// The lock; the sandbox is alive while any process has this open file description.
    pub lock: File,
}

impl SandboxDirectory {
    /// Refers to the directory of an existing sandbox by its path.
    ///
    /// # Errors
    /// If it does not lie in a state directory.
    pub fn open(path: PathBuf) -> Result<Self, Problem> {
        let home = path.parent().and_then(Path::parent).map(Path::to_owned);
        match home.filter(|_| path.is_absolute() && path.join("spec.json").is_file()) {
            Some(home) => Ok(Self { path, home: Home { path: home } }),
            None => Err(plain("usage", format!("{} is no sandbox's directory", path.display()), None)),
        }
    }

    fn with_lock(self, lock: File) -> HeldSandbox {
        HeldSandbox { directory: self, lock }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The state directory it belongs to.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// True if nobody holds the sandbox.
    pub fn is_dead(&self) -> bool {
        let lock = match OpenOptions::new().read(true).open(self.path.join("lock")) {
            Ok(lock) => lock,
            Err(error) => return error.kind() == ErrorKind::NotFound,
        };
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
    }

    /// Removes the sandbox from sight at once, then from the disk.
    pub fn remove(&self) {
        let target = self.home.path.join("trash").join(random_word());
        if fs::rename(&self.path, &target).is_ok() {
            let _ = fs::remove_dir_all(&target);
        }
    }
}

/// Options for files only their owner may read.
pub fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
    options
}

/// Writes `content` to `path` so that a crash leaves the old content or the new, never a mixture.
///
/// # Errors
/// Any of the steps.
pub fn write_atomically(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let draft = directory.join(format!("{NEW_PREFIX}{}", random_word()));
    let write = || {
        let mut file = private_file().create_new(true).open(&draft)?;
        std::io::Write::write_all(&mut file, content)?;
        file.sync_all()?;
        fs::rename(&draft, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&draft);
    })
}

fn make_directory(path: &Path) -> std::io::Result<()> {
    match DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

/// Sixteen random hexadecimal digits.
pub fn random_word() -> String {
    let mut bytes = [0; 8];
    fill_random(&mut bytes);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Fills `bytes` from the kernel's random pool.
pub fn fill_random(bytes: &mut [u8]) {
    let mut filled = 0;
    while filled < bytes.len() {
        // Only EINTR can come back once the pool is initialised, which it is long before any of us runs.
        if let Ok(count) =
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
        {
            filled += count;
        }
    }
}
