//! The state directory: what lies where, who holds it, and how what the dead left is put right.
//!
//! ```text
//! ~/.agentkernel              0700; AGENTKERNEL_HOME names another
//! ├── version                 layout version
//! ├── cache/                  kernel, initramfs, empty disks, root file systems: all can be made again
//! ├── last/                   change set of the last `run`
//! ├── volumes/NAME/           named volumes: plain directories
//! ├── templates/KEY/          booted machines that others begin with
//! ├── snapshots/NAME/         machines that people saved
//! ├── sandboxes/              one directory a sandbox, see below
//! │   └── .lock               held shared while a sandbox is being made, exclusively while the dead are swept
//! └── trash/                  directories being removed
//!
//! sandboxes/NAME
//! ├── lock                    flock held by the supervisor and the machine's process: held means alive
//! ├── spec.json               what was asked for
//! ├── deadline.json           when its time to live is up, if it has one; `reaper` is held by who waits for that
//! ├── temporary               there in a sandbox of `run`: dead, it is nobody's
//! ├── template                there in one whose machine becomes a template; nobody sees it
//! ├── restore.json            the saved machine it goes on from when it is started next
//! ├── saved/                  a saved machine that is its own
//! ├── live.json               what the supervisor says of itself while it lives
//! ├── control.sock            where clients talk to the supervisor
//! ├── disk.ext4               writable layer, sparse
//! ├── bases                   what the workspace's paths were when the guest first saw them
//! ├── changes/                change set, while one is reviewed
//! ├── record*, console*       what happened, bounded
//! └── executions/ID/          detached programs: what they are, what they said, how they ended
//! ```
//! The states of a sandbox, and what tells them apart:
//!
//! ```text
//!              create              start, exec...           guest configured
//!   (nothing) ────────► stopped ──────────────► starting ────────────────► running ◄──► paused
//!        ▲               ▲   ▲   lock is held       │                         │
//!        │ rm, TTL       │   └──────────────────────┤ fails                   │ stop, TTL
//!        └───────────────┤       live.json goes     ▼                         ▼
//!                        │   lock is let go      stopping ◄───────────────────┘
//!                        │                          │
//!                        │ repair                   │ killed at any instant, machine died
//!                        └────────── dead ◄─────────┘ lock is free and live.json is there
//! ```
//! A sandbox directory is made under a temporary name with its lock held, and renamed when it is whole; it is removed by
//! a rename into `trash/` first. So whoever lists `sandboxes/` sees whole sandboxes only. One whose lock is free and that
//! has a `live.json` died: any process may repair it, holding its lock meanwhile ([`SandboxDirectory::repair`]). One that
//! was temporary is removed instead. The disk needs no repair of ours: its file system's journal does that at the next
//! start.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::deadline::{self, Clocks};
use crate::problem::{Problem, io, os, plain, printable};
use crate::record::Record;
use crate::spec::{Spec, check_name};
use crate::supervisor::CONTROL_SOCKET;

/// The layout this program writes. Layout 1 had temporary sandboxes only: those are swept, and nothing else differs.
const LAYOUT_VERSION: u32 = 2;
const NEW_PREFIX: &str = ".new-";
const LIVE: &str = "live.json";
/// Name of the file that marks a sandbox of `run`.
pub(crate) const TEMPORARY: &str = "temporary";
/// Name of the file that marks a sandbox whose machine becomes a template.
pub(crate) const TEMPLATE: &str = "template";
/// Names of such sandboxes begin so.
pub(crate) const TEMPLATE_PREFIX: &str = "template-";

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
        for name in ["cache", "sandboxes", "snapshots", "templates", "trash", "volumes"] {
            make_directory(&path.join(name)).map_err(io(format!("make {}", path.join(name).display())))?;
        }
        let home = Self { path };
        home.check_version()?;
        Ok(home)
    }

    fn check_version(&self) -> Result<(), Problem> {
        let file = self.path.join("version");
        let found = match fs::read_to_string(&file) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(io(format!("read {}", file.display()))(error)),
        };
        match found.as_deref().map(|text| text.trim().parse::<u32>()) {
            Some(Ok(LAYOUT_VERSION)) => Ok(()),
            Some(Ok(version)) if version > LAYOUT_VERSION => Err(plain(
                "state-version",
                format!(
                    "{} has layout {version}, this program knows {LAYOUT_VERSION}: a newer agentkernel made it",
                    self.path.display(),
                ),
                Some("upgrade agentkernel, or set AGENTKERNEL_HOME to another directory"),
            )),
            Some(Err(_)) => Err(plain(
                "state-version",
                format!("{} does not hold a layout's number", file.display()),
                Some("set AGENTKERNEL_HOME to another directory, or put the state directory right"),
            )),
            Some(Ok(_)) | None => write_atomically(&file, format!("{LAYOUT_VERSION}\n").as_bytes())
                .map_err(io(format!("write {}", file.display()))),
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

    /// Machines that were booted once, for others to begin with.
    pub(crate) fn templates(&self) -> PathBuf {
        self.path.join("templates")
    }

    /// Machines that people saved.
    pub(crate) fn snapshots(&self) -> PathBuf {
        self.path.join("snapshots")
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

    /// Makes the directory of a sandbox called `name` with its lock held. `fill` puts what belongs there into the
    /// directory while it still has a temporary name.
    ///
    /// # Errors
    /// Code `name-taken` if there is one already; those of `fill`.
    pub fn create_sandbox(
        &self,
        name: &str,
        fill: impl FnOnce(&Path) -> Result<(), Problem>,
    ) -> Result<HeldSandbox, Problem> {
        let path = self.sandboxes().join(name);
        let taken = || {
            plain(
                "name-taken",
                format!("there is a sandbox called {name} already"),
                Some("choose another with --name, or remove that one: agentkernel rm NAME"),
            )
        };
        if path.exists() {
            return Err(taken());
        }
        let creation = self.creation_lock()?;
        rustix::fs::flock(&creation, FlockOperation::LockShared).map_err(os("lock the sandboxes"))?;
        let draft = self.sandboxes().join(format!("{NEW_PREFIX}{}", random_word()));
        let make = || -> std::io::Result<File> {
            DirBuilder::new().mode(0o700).create(&draft)?;
            let lock = private_file().create_new(true).open(draft.join("lock"))?;
            rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            Ok(lock)
        };
        let made = make().map_err(io(format!("make a sandbox in {}", self.sandboxes().display())));
        let made = made.and_then(|lock| fill(&draft).map(|()| lock)).and_then(|lock| {
            let (cwd, flags) = (rustix::fs::CWD, rustix::fs::RenameFlags::NOREPLACE);
            match rustix::fs::renameat_with(cwd, &draft, cwd, &path, flags) {
                Ok(()) => Ok(lock),
                Err(rustix::io::Errno::EXIST) => Err(taken()),
                Err(error) => Err(os(format!("make {}", path.display()))(error)),
            }
        });
        match made {
            Ok(lock) => Ok(HeldSandbox { directory: SandboxDirectory { path, home: self.clone() }, lock }),
            Err(problem) => {
                let _ = fs::remove_dir_all(&draft);
                Err(problem)
            }
        }
    }

    /// All sandboxes, by name.
    ///
    /// # Errors
    /// If the state directory cannot be read.
    pub fn list(&self) -> Result<Vec<SandboxDirectory>, Problem> {
        let what = || format!("list {}", self.sandboxes().display());
        let mut names = Vec::new();
        for entry in fs::read_dir(self.sandboxes()).map_err(io(what()))? {
            let name = entry.map_err(io(what()))?.file_name();
            if !name.as_encoded_bytes().starts_with(b".") {
                names.push(name);
            }
        }
        names.sort();
        let directory = |name| SandboxDirectory { path: self.sandboxes().join(name), home: self.clone() };
        Ok(names.into_iter().map(directory).filter(|sandbox| !sandbox.is_template()).collect())
    }

    /// The sandbox called `name`, or the one with that UUID.
    ///
    /// # Errors
    /// Code `not-found`, with the names it might have meant.
    pub fn find(&self, name: &str) -> Result<SandboxDirectory, Problem> {
        if check_name(name).is_ok() {
            let sandbox = SandboxDirectory { path: self.sandboxes().join(name), home: self.clone() };
            if sandbox.path.is_dir() && !sandbox.is_template() {
                return Ok(sandbox);
            }
        }
        let all = self.list()?;
        if let Some(sandbox) = all.iter().find(|sandbox| {
            name.len() == 36 && Spec::load(sandbox.path()).is_ok_and(|spec| spec.uuid == name)
        }) {
            return Ok(sandbox.clone());
        }
        let near =
            all.iter().map(SandboxDirectory::name).map(|other| (strsim::jaro_winkler(name, &other), other));
        let near =
            near.filter(|(likeness, _)| *likeness > 0.75).max_by(|one, other| one.0.total_cmp(&other.0));
        let hint = match near {
            Some((_, near)) => format!("did you mean {near}?"),
            None if all.is_empty() => "there are none yet: agentkernel create NAME".to_owned(),
            None => "agentkernel list shows those there are".to_owned(),
        };
        Err(Problem {
            code: "not-found".to_owned(),
            message: format!("there is no sandbox called {}", printable(name)),
            hint: Some(hint),
        })
    }

    /// Puts right what dead processes left behind: removes temporary sandboxes nobody holds, half-made ones, those whose
    /// time is up, and trash; repairs the others.
    ///
    /// Errors are not the caller's business: the next sweep tries again.
    pub fn sweep(&self) {
        self.sweep_trash();
        for directory in [self.snapshots(), self.templates()] {
            crate::saved::sweep_drafts(&directory, false);
        }
        let _ = crate::workspace::repair(&self.last());
        let _ = crate::workspace::LastChanges::new(&self.path).sweep();
        let Ok(entries) = fs::read_dir(self.sandboxes()) else { return };
        // INVARIANT: with the creation lock held exclusively no sandbox is being made, so what looks dead stays dead.
        let creation = self
            .creation_lock()
            .ok()
            .filter(|lock| rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok());
        for entry in entries.flatten() {
            let name = entry.file_name();
            let sandbox = SandboxDirectory { path: entry.path(), home: self.clone() };
            if name.as_encoded_bytes().starts_with(NEW_PREFIX.as_bytes()) {
                if creation.is_some() {
                    sandbox.discard();
                }
            } else if !name.as_encoded_bytes().starts_with(b".") {
                sandbox.repair();
            }
        }
    }

    /// Leftovers of interrupted work: half-made sandboxes and trash.
    pub(crate) fn leftovers(&self) -> usize {
        let count = |directory: &Path, prefix: &str| {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            entries
                .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes()))
                .count()
        };
        let drafts: usize = [self.snapshots(), self.templates()]
            .iter()
            .map(|directory| crate::saved::sweep_drafts(directory, true))
            .sum();
        count(&self.sandboxes(), NEW_PREFIX) + count(&self.path.join("trash"), "") + drafts
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

/// What a supervisor says of itself and its machine in `live.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Live {
    /// Version of its control protocol.
    pub protocol: u32,
    /// Version of its program.
    pub program: String,
    /// What it is about.
    pub phase: Phase,
    /// Its process id.
    pub supervisor: u32,
    /// Process id of the machine, once there is one.
    pub machine: Option<u32>,
    /// How the machine's processors are run, once there is one.
    pub accelerator: Option<String>,
    /// When it was started, milliseconds since the epoch.
    pub started_unix_ms: u64,
}

/// What a sandbox is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The machine boots.
    Starting,
    /// Programs can run.
    Running,
    /// The machine's processors are stopped.
    Paused,
    /// The machine is being ended.
    Stopping,
    /// No machine; everything else is there.
    Stopped,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.pad(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        })
    }
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

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The sandbox's name.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The state directory it belongs to.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// True if nobody holds the sandbox.
    pub fn is_dead(&self) -> bool {
        match File::open(self.path.join("lock")) {
            Ok(lock) => rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared).is_ok(),
            Err(error) => error.kind() == ErrorKind::NotFound,
        }
    }

    /// What the supervisor says, if one lives. One that has just been started says nothing yet.
    pub fn live(&self) -> Option<Live> {
        if self.is_dead() { None } else { self.read_live() }
    }

    /// What the sandbox is about.
    pub fn phase(&self) -> Phase {
        match (self.is_dead(), self.read_live()) {
            (true, _) => Phase::Stopped,
            (false, Some(live)) => live.phase,
            (false, None) => Phase::Starting,
        }
    }

    fn read_live(&self) -> Option<Live> {
        serde_json::from_slice(&fs::read(self.path.join(LIVE)).ok()?).ok()
    }

    /// Writes `live.json`.
    ///
    /// # Errors
    /// If the disk is full or read-only.
    pub fn write_live(&self, live: &Live) -> std::io::Result<()> {
        // Not synced: after a crash of the host nobody lives.
        let draft = self.path.join("live.json.new");
        fs::write(&draft, serde_json::to_vec(live)?)?;
        fs::rename(&draft, self.path.join(LIVE))
    }

    /// True for a sandbox of `run`.
    pub fn is_temporary(&self) -> bool {
        self.path.join(TEMPORARY).exists()
    }

    /// True for one whose machine becomes a template.
    pub(crate) fn is_template(&self) -> bool {
        let name = self.path.file_name().unwrap_or_default().as_encoded_bytes();
        name.starts_with(TEMPLATE_PREFIX.as_bytes()) && self.path.join(TEMPLATE).exists()
    }

    fn lock_file(&self) -> std::io::Result<File> {
        OpenOptions::new().read(true).write(true).open(self.path.join("lock"))
    }

    /// Takes the sandbox if nobody holds it, after putting right what its last holder left; `None` if it is held.
    ///
    /// # Errors
    /// If the lock cannot be opened; code `not-found` if the sandbox is gone.
    pub fn hold(&self) -> Result<Option<HeldSandbox>, Problem> {
        let lock = self.lock_file().map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                plain("not-found", format!("there is no sandbox called {}", self.name()), None)
            }
            _ => io(format!("lock {}", self.path.display()))(error),
        })?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(None);
        }
        // The directory may have been removed, and another made, between opening and locking.
        let same = |path: &Path| {
            let (ours, theirs) = (lock.metadata().ok()?, fs::metadata(path).ok()?);
            (ours.ino() == theirs.ino() && ours.dev() == theirs.dev()).then_some(())
        };
        if same(&self.path.join("lock")).is_none() {
            return Err(plain("not-found", format!("there is no sandbox called {}", self.name()), None));
        }
        let held = HeldSandbox { directory: self.clone(), lock };
        held.tidy();
        Ok(Some(held))
    }

    /// As [`hold`](Self::hold), waiting a moment for a holder that is just letting go: processes between fork and exec
    /// have copies of each other's locks.
    ///
    /// # Errors
    /// As for [`hold`](Self::hold).
    pub fn hold_soon(&self, patience: Duration) -> Result<Option<HeldSandbox>, Problem> {
        let deadline = Instant::now() + patience;
        loop {
            match self.hold()? {
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
                outcome => return Ok(outcome),
            }
        }
    }

    /// Whether its last holder died without putting the directory in order.
    pub(crate) fn died(&self) -> bool {
        self.path.join(LIVE).exists() && self.is_dead()
    }

    /// Puts right what a dead holder left; removes the sandbox if it was temporary or its time is up. Does nothing to
    /// one that is held.
    pub fn repair(&self) {
        let (died, temporary) = (self.path.join(LIVE).exists(), self.is_temporary());
        let expired = || deadline::read(&self.path).is_some_and(|deadline| deadline.is_over(&Clocks::now()));
        let broken = !self.path.join("lock").exists();
        if !(died || temporary || broken || expired()) {
            return;
        }
        if broken {
            // A removal from inside that was cut short.
            self.discard();
        } else if let Ok(Some(held)) = self.hold()
            && (temporary || expired())
        {
            held.remove();
        }
    }

    /// Removes the directory from sight at once, then from the disk. A confined supervisor, which must not reach the
    /// trash, removes it where it is.
    fn discard(&self) {
        let target = self.home.path.join("trash").join(random_word());
        match fs::rename(&self.path, &target) {
            Ok(()) => drop(fs::remove_dir_all(&target)),
            Err(_) => self.remove_in_place(),
        }
    }

    /// Removes the directory's files, then the directory. Whatever fails is left to the next sweep.
    pub(crate) fn remove_in_place(&self) {
        let Ok(entries) = fs::read_dir(&self.path) else { return };
        for entry in entries.flatten() {
            // The lock goes last: as long as there is one, and held, nobody else touches the directory.
            if entry.file_name() == "lock" {
                continue;
            }
            let path = entry.path();
            let removed = match entry.file_type() {
                Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
                _ => fs::remove_file(&path),
            };
            if let Err(error) = removed {
                tracing::warn!("cannot remove {}: {error}", path.display());
            }
        }
        let _ = fs::remove_file(self.path.join("lock"));
        if let Err(error) = fs::remove_dir(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

impl HeldSandbox {
    /// Removes the sandbox from sight at once, then from the disk.
    pub fn remove(self) {
        self.directory.discard();
    }

    /// Puts right what a dead holder left.
    fn tidy(&self) {
        let directory = &self.directory;
        for name in [CONTROL_SOCKET, "live.json.new"] {
            let _ = fs::remove_file(directory.path.join(name));
        }
        let _ = crate::workspace::repair(&directory.path.join(crate::collect::DIRECTORY));
        crate::collect::tidy(&directory.path);
        if directory.path.join(LIVE).exists() {
            crate::executions::mark_lost(&directory.path);
            Record::open(&directory.path).say("repaired", "the sandbox had died without being stopped");
            let _ = fs::remove_file(directory.path.join(LIVE));
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

/// As [`write_atomically`], but for what a crash of the host may lose.
///
/// # Errors
/// Any of the steps.
pub(crate) fn replace(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let draft = directory.join(format!("{NEW_PREFIX}{}", random_word()));
    let write = || {
        let mut file = private_file().create_new(true).open(&draft)?;
        std::io::Write::write_all(&mut file, content)?;
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
