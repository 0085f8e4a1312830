//! Saved machines: what templates, snapshots and forks are made of.
//!
//! ```text
//! DIRECTORY
//! ├── machine.json    what it was when it was saved; written last
//! ├── memory          the guest's memory, sparse; mapped privately by whoever is restored of it
//! ├── devices         what the machine's devices held
//! ├── process         of a template: the machine's process, for others to go on as
//! ├── files-TAG       what the guest knew of each file system it was served
//! └── disk.ext4       the writable layer at that moment; not in a sandbox's own, which has it as its disk
//! ```
//! A sandbox that is to go on from one has a file `restore.json` in its directory, which names it. The supervisor takes
//! that order away before it carries it out, so that a sandbox is restored once: whatever becomes of it then, its next
//! start boots from its disk.
//!
//! Saving is shared work: the supervisor quiets the guest, stops the machine and gives what devices and file servers hold;
//! the client, which is not confined, copies memory and disk meanwhile ([`save`]). The machine stands still only for what
//! can change.

use std::fs::{self, File};
use std::io::Read;
use std::net::SocketAddrV4;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agentkernel_machine::accelerator::{self, Accelerator};
use agentkernel_machine::kernel::{self, Kernel};
use agentkernel_machine::memory::{Capture, copy_sparsely};
use agentkernel_machine::qemu;
use agentkernel_network::Flow;
use agentkernel_protocol::control::Connection;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::client::Sandbox;
use crate::disk;
use crate::files::table;
use crate::problem::{Problem, io, plain, problem};
use crate::spec::Spec;
use crate::state::{Home, SandboxDirectory, private_file, random_word, replace};

const RECORD: &str = "machine.json";
const MEMORY: &str = "memory";
const DEVICES: &str = "devices";
const PROCESS: &str = "process";
const ORDER: &str = "restore.json";
/// Name of the directory of a saved machine that is a sandbox's own.
pub(crate) const OWN: &str = "saved";
/// Most bytes of what devices hold.
const DEVICES_LIMIT: u64 = 64 << 20;
/// Most connections that are remembered: those of a network, and those that it has not reset yet.
const FLOWS_LIMIT: usize = 2048;
/// Most bytes of a record or an order.
const RECORD_LIMIT: u64 = 1 << 20;

/// What must be the same for a saved machine to go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fingerprint {
    /// Version of this program.
    pub program: String,
    /// Version of the conversation with the agent.
    pub protocol: u32,
    /// What runs the machine: path, size, time of the last change.
    pub emulator: String,
    /// Hash of the guest's kernel.
    pub kernel: String,
    /// The initramfs, which has the agent; its name tells its content.
    pub agent: String,
    /// How processors are run.
    pub accelerator: String,
    /// The host's processor, whose features the guest's kernel has adapted to.
    pub processor: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Size of the writable layer, MiB.
    pub disk_mib: u64,
}

impl Fingerprint {
    /// That of a machine of `spec` that would be started now.
    ///
    /// # Errors
    /// If there is no kernel yet.
    pub(crate) fn now(home: &Home, spec: &Spec) -> Result<Self, Problem> {
        let kernel =
            kernel::load(&home.cache(), None).map_err(|error| problem("kernel", &error, error.hint()))?;
        Ok(Self::of(&kernel, spec))
    }

    /// That of a machine of `spec` with this kernel.
    pub(crate) fn of(kernel: &Kernel, spec: &Spec) -> Self {
        Self::sized(kernel, spec.vcpus, spec.memory_mib, spec.disk_mib)
    }

    /// That of a machine of such a size.
    pub(crate) fn sized(kernel: &Kernel, vcpus: u32, memory_mib: u64, disk_mib: u64) -> Self {
        let emulator = qemu::find().unwrap_or_default();
        let stamp =
            fs::metadata(&emulator).map(|data| (data.len(), data.mtime(), data.ino())).unwrap_or_default();
        Self {
            program: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: agentkernel_protocol::VERSION,
            emulator: format!("{} {stamp:?}", emulator.display()),
            kernel: kernel.sha256.clone(),
            agent: kernel.initramfs.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            accelerator: accelerator::detect().accelerator.name().to_owned(),
            processor: processor(),
            vcpus,
            memory_mib,
            disk_mib,
        }
    }

    /// The first thing in which `other` is different, for people.
    pub(crate) fn difference(&self, other: &Self) -> Option<&'static str> {
        let differs = [
            (self.program != other.program || self.agent != other.agent, "another version of agentkernel"),
            (self.protocol != other.protocol, "another version of the agent's protocol"),
            (self.emulator != other.emulator, "another QEMU"),
            (self.kernel != other.kernel, "another guest kernel"),
            (self.accelerator != other.accelerator, "another accelerator"),
            (self.processor != other.processor, "another processor"),
            (self.vcpus != other.vcpus, "another number of processors"),
            (self.memory_mib != other.memory_mib, "another size of memory"),
            (self.disk_mib != other.disk_mib, "another size of disk"),
        ];
        differs.into_iter().find_map(|(differs, what)| differs.then_some(what))
    }
}

/// The host's processor: its name and what it can do.
fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    let flags = agentkernel_image::Digest::of(line("flags").as_bytes()).hex();
    format!("{} {}", line("model name").rsplit(": ").next().unwrap_or_default(), &flags[..16])
}

/// What a file was when it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    size: u64,
    inode: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(file: &File) -> std::io::Result<Self> {
        file.metadata().map(|data| Self::new(&data))
    }

    fn new(data: &fs::Metadata) -> Self {
        Self { size: data.len(), inode: data.ino(), modified: (data.mtime(), data.mtime_nsec()) }
    }
}

/// What is written of a saved machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// What it was saved of.
    pub fingerprint: Fingerprint,
    /// The epoch of its conversation with the host; the next one must be higher.
    pub epoch: u32,
    /// When, milliseconds since the epoch.
    pub saved_unix_ms: u64,
    /// Tags of its file systems.
    file_systems: Vec<String>,
    /// Its TCP connections, which nobody carries on: whoever goes on from here is told so.
    #[serde(default)]
    flows: Vec<Flow>,
    memory: Stamp,
    devices: Stamp,
    /// None where it could not be saved, or did not go on.
    #[serde(default)]
    process: Option<SavedProcess>,
    tables: Vec<Stamp>,
    /// None where the writable layer has gone to the sandbox that goes on.
    disk: Option<Stamp>,
}

/// A machine's process that was saved.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct SavedProcess {
    file: Stamp,
    /// The emulator and its libraries, whose code is in it.
    code: Vec<(PathBuf, Stamp)>,
}

impl SavedProcess {
    fn new(file: &File, code: &[PathBuf]) -> std::io::Result<Self> {
        let code = code.iter().map(|path| match fs::metadata(path) {
            Ok(data) => Ok((path.clone(), Stamp::new(&data))),
            Err(error) => Err(std::io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        });
        Ok(Self { file: Stamp::of(file)?, code: code.collect::<std::io::Result<_>>()? })
    }
}

/// A directory with a saved machine that is whole.
#[derive(Clone, Debug)]
pub(crate) struct SavedMachine {
    pub directory: PathBuf,
    pub record: Record,
}

impl SavedMachine {
    /// Opens one, and sees that nobody touched its files.
    ///
    /// # Errors
    /// Code `saved-damaged` if it is not whole.
    pub(crate) fn open(directory: &Path) -> Result<Self, Problem> {
        let damaged = |what: &str| {
            let message = format!("the saved machine in {} is damaged: {what}", directory.display());
            plain("saved-damaged", message, None)
        };
        let record = read_limited(&directory.join(RECORD), RECORD_LIMIT);
        let record = record.map_err(|error| damaged(&format!("{RECORD}: {error}")))?;
        let record: Record =
            serde_json::from_slice(&record).map_err(|error| damaged(&format!("{RECORD}: {error}")))?;
        let check = |name: &str, stamp: &Stamp| match open_plain(&directory.join(name)) {
            Ok(file) if Stamp::of(&file).is_ok_and(|now| now == *stamp) => Ok(()),
            Ok(_) => Err(damaged(&format!("{name} was changed"))),
            Err(error) => Err(damaged(&format!("{name}: {error}"))),
        };
        check(MEMORY, &record.memory)?;
        check(DEVICES, &record.devices)?;
        record.process.as_ref().map_or(Ok(()), |process| check(PROCESS, &process.file))?;
        record.disk.as_ref().map_or(Ok(()), |stamp| check(disk::FILE_NAME, stamp))?;
        if record.tables.len() != record.file_systems.len() {
            return Err(damaged("its file systems do not agree"));
        }
        for (tag, stamp) in record.file_systems.iter().zip(&record.tables) {
            if !tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
                return Err(damaged("a file system's name is none"));
            }
            check(&table_name(tag), stamp)?;
        }
        if record.memory.size != record.fingerprint.memory_mib << 20 {
            return Err(damaged("its memory has another size"));
        }
        Ok(Self { directory: directory.to_owned(), record })
    }

    /// Whether the emulator and its libraries are those whose code was saved with its process, if it was.
    pub(crate) fn has_current_code(&self) -> bool {
        let code = self.record.process.iter().flat_map(|process| &process.code);
        code.into_iter().all(|(path, stamp)| fs::metadata(path).is_ok_and(|data| Stamp::new(&data) == *stamp))
    }

    /// The table of a file system.
    pub(crate) fn table(&self, tag: &str) -> Result<Vec<u8>, Problem> {
        let path = self.directory.join(table_name(tag));
        read_limited(&path, table::BYTES_LIMIT).map_err(io(format!("read {}", path.display())))
    }

    /// Makes `target` a saved machine like this one, for a sandbox that goes on from it: the memory is shared; the writable
    /// layer is copied to `disk`.
    pub(crate) fn duplicate(&self, target: &Path, disk: &Path) -> Result<(), Problem> {
        let what = || format!("copy a saved machine to {}", target.display());
        if !target.exists() {
            fs::create_dir(target).map_err(io(what()))?;
        }
        let mut record = Record { process: None, ..self.record.clone() };
        if fs::hard_link(self.directory.join(MEMORY), target.join(MEMORY)).is_err() {
            // Another file system, or one without links.
            let source = open_plain(&self.directory.join(MEMORY)).map_err(io(what()))?;
            let copy = private_file().create_new(true).open(target.join(MEMORY)).map_err(io(what()))?;
            copy_sparsely(&source, &copy).map_err(io(what()))?;
            record.memory = Stamp::of(&copy).map_err(io(what()))?;
        }
        let plain_copy = |name: &str| -> Result<Stamp, Problem> {
            fs::copy(self.directory.join(name), target.join(name)).map_err(io(what()))?;
            Stamp::of(&open_plain(&target.join(name)).map_err(io(what()))?).map_err(io(what()))
        };
        record.devices = plain_copy(DEVICES)?;
        for (index, tag) in self.record.file_systems.iter().enumerate() {
            record.tables[index] = plain_copy(&table_name(tag))?;
        }
        disk::copy(&self.directory.join(disk::FILE_NAME), disk)?;
        record.disk = None;
        write_record(target, &record)
    }
}

/// Sees to it that nobody tries again to go on as the process of the machine in `directory`.
pub(crate) fn forget_process(directory: &Path) {
    let Ok(saved) = SavedMachine::open(directory) else { return };
    if write_record(directory, &Record { process: None, ..saved.record }).is_ok() {
        let _ = fs::remove_file(directory.join(PROCESS));
    }
}

fn write_record(directory: &Path, record: &Record) -> Result<(), Problem> {
    let path = directory.join(RECORD);
    let text = serde_json::to_vec_pretty(record).map_err(|error| plain("saved", error.to_string(), None))?;
    replace(&path, &text).map_err(io(format!("write {}", path.display())))
}

fn table_name(tag: &str) -> String {
    format!("files-{tag}")
}

/// Bytes that the files of a directory take.
pub(crate) fn directory_bytes(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|data| data.blocks() * 512).sum()
}

fn open_plain(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let file =
        File::options().read(true).custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(std::io::ErrorKind::InvalidInput.into()) }
}

fn read_limited(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    let file = open_plain(path)?;
    if file.metadata()?.len() > limit {
        return Err(std::io::ErrorKind::FileTooLarge.into());
    }
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A directory for what is being saved. It goes when dropped; if this process is killed, with the next sweep.
#[derive(Debug)]
pub(crate) struct Draft {
    path: PathBuf,
    /// Held as long as it is being filled.
    _lock: File,
}

/// Names of drafts begin so.
const DRAFT_PREFIX: &str = ".new-";
/// Held while a draft is being filled.
const DRAFT_LOCK: &str = "draft.lock";

impl Draft {
    /// Makes one in `parent`.
    pub(crate) fn new(parent: &Path) -> Result<Self, Problem> {
        let path = parent.join(format!("{DRAFT_PREFIX}{}", random_word()));
        let make = || {
            let _shared = lock_directory(parent, FlockOperation::LockShared)?;
            fs::create_dir(&path)?;
            let lock = private_file().create_new(true).open(path.join(DRAFT_LOCK))?;
            rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            Ok(lock)
        };
        let lock = make().map_err(io(format!("make {}", path.display())))?;
        Ok(Self { path, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its lasting name, at which there must be nothing: `name-taken` if another was first.
    pub(crate) fn keep(self, target: &Path) -> Result<(), Problem> {
        let keep = || -> std::io::Result<()> {
            let parent = self.path.parent().unwrap_or(Path::new("."));
            let _shared = lock_directory(parent, FlockOperation::LockShared)?;
            fs::remove_file(self.path.join(DRAFT_LOCK))?;
            let (cwd, flags) = (rustix::fs::CWD, rustix::fs::RenameFlags::NOREPLACE);
            Ok(rustix::fs::renameat_with(cwd, &self.path, cwd, target, flags)?)
        };
        keep().map_err(|error| {
            if error.kind() == std::io::ErrorKind::AlreadyExists {
                let name = target.file_name().unwrap_or_default().display();
                return plain("name-taken", format!("there is one called {name} already"), None);
            }
            io(format!("name {}", target.display()))(error)
        })
    }
}

/// Held shared while a draft has no lock of its own: when it is made, and when it is named.
fn lock_directory(directory: &Path, operation: FlockOperation) -> std::io::Result<File> {
    let lock = File::open(directory)?;
    rustix::fs::flock(&lock, operation)?;
    Ok(lock)
}

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes drafts in `parent` that nobody fills any more; returns their number.
pub(crate) fn sweep_drafts(parent: &Path, dry_run: bool) -> usize {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let mut drafts =
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(DRAFT_PREFIX)).peekable();
    if drafts.peek().is_none() {
        return 0;
    }
    // Somebody is making or naming one, which has no lock of its own yet: the next sweep looks.
    let Ok(_exclusive) = lock_directory(parent, FlockOperation::NonBlockingLockExclusive) else { return 0 };
    let is_free = |draft: &fs::DirEntry| match File::open(draft.path().join(DRAFT_LOCK)) {
        Ok(lock) => rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok(),
        // Whoever made it did not get further.
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    };
    let free = drafts.filter(is_free).inspect(|draft| {
        if !dry_run {
            let _ = fs::remove_dir_all(draft.path());
        }
    });
    free.count()
}

/// Writes everything in a saved machine's directory to the disk.
pub(crate) fn sync(directory: &Path) -> Result<(), Problem> {
    let what = || format!("write {} to the disk", directory.display());
    for entry in fs::read_dir(directory).map_err(io(what()))?.flatten() {
        File::open(entry.path()).and_then(|file| file.sync_all()).map_err(io(what()))?;
    }
    File::open(directory).and_then(|file| file.sync_all()).map_err(io(what()))
}

/// How a sandbox goes on from a saved machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum From {
    /// From a template: it is furnished, and boots as if there was none if that fails.
    Template,
    /// From another sandbox, whose programs run on.
    Sandbox,
}

/// An order to the supervisor.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Order {
    directory: PathBuf,
    from: From,
}

/// Has the sandbox go on from the machine saved in `directory` when it is started next.
pub(crate) fn order(sandbox: &Path, directory: &Path, from: From) -> Result<(), Problem> {
    let order = Order { directory: directory.to_owned(), from };
    let text = serde_json::to_vec(&order).map_err(|error| plain("saved", error.to_string(), None))?;
    replace(&sandbox.join(ORDER), &text).map_err(io("order a restore"))
}

/// A saved machine in the supervisor's hands.
pub(crate) struct Restore {
    pub from: From,
    /// Where it was.
    pub directory: PathBuf,
    pub machine: qemu::Restore,
    pub epoch: u32,
    pub tables: Vec<(String, Vec<u8>)>,
    /// Of the machine that was saved.
    pub fingerprint: Fingerprint,
    /// TCP connections it had.
    pub flows: Vec<Flow>,
}

impl Restore {
    /// Takes the order of the sandbox in `sandbox` away and opens what it names; `None` if there is none.
    ///
    /// # Errors
    /// If the saved machine is damaged.
    pub(crate) fn take(sandbox: &SandboxDirectory) -> Result<Option<Self>, Problem> {
        let path = sandbox.path().join(ORDER);
        let text = match read_limited(&path, RECORD_LIMIT) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(format!("read {}", path.display()))(error)),
        };
        fs::remove_file(&path).map_err(io("take an order to restore"))?;
        let order: Order =
            serde_json::from_slice(&text).map_err(|error| plain("restore", error.to_string(), None))?;
        let restored = Self::open(&order);
        if order.directory.starts_with(sandbox.path()) {
            // Its own: what is needed of it is open now.
            let _ = fs::remove_dir_all(&order.directory);
        }
        restored.map(Some)
    }

    /// Splits it, if the machine can go on as a process that was saved: that way, and the longer one.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub(crate) fn ways(self) -> Result<(Self, Option<Self>), Problem> {
        if self.machine.process.is_none() {
            return Ok((self, None));
        }
        let memory = self.machine.memory.try_clone().map_err(io("restore"))?;
        let machine = qemu::Restore { memory, devices: self.machine.devices.clone(), process: None };
        let longer = Self {
            machine,
            directory: self.directory.clone(),
            tables: self.tables.clone(),
            fingerprint: self.fingerprint.clone(),
            flows: self.flows.clone(),
            ..self
        };
        Ok((self, Some(longer)))
    }

    fn open(order: &Order) -> Result<Self, Problem> {
        let saved = SavedMachine::open(&order.directory)?;
        let memory = saved.directory.join(MEMORY);
        let devices = saved.directory.join(DEVICES);
        let process = saved.record.process.as_ref().map(|_| saved.directory.join(PROCESS));
        // Gone meanwhile, if it did not go on elsewhere.
        let process = process.and_then(|path| open_plain(&path).ok());
        let tables = saved.record.file_systems.iter();
        Ok(Self {
            from: order.from,
            directory: order.directory.clone(),
            machine: qemu::Restore {
                memory: open_plain(&memory).map_err(io(format!("open {}", memory.display())))?,
                devices: read_limited(&devices, DEVICES_LIMIT)
                    .map_err(io(format!("read {}", devices.display())))?,
                process,
            },
            epoch: saved.record.epoch,
            tables: tables.map(|tag| Ok((tag.clone(), saved.table(tag)?))).collect::<Result<_, Problem>>()?,
            fingerprint: saved.record.fingerprint,
            flows: saved.record.flows,
        })
    }
}

fn flow(connection: &Connection) -> Flow {
    let remote = SocketAddrV4::new(connection.address.into(), connection.port);
    Flow { guest_port: connection.guest_port, remote }
}

/// Saves the machine of a live sandbox into `directory`, which must be empty; returns how long it stood still.
///
/// # Errors
/// If it does not come to rest, cannot be looked into, or the disk is full. The sandbox goes on in any case.
pub(crate) async fn save(sandbox: &Sandbox, directory: &Path) -> Result<(SavedMachine, Duration), Problem> {
    save_with(sandbox, directory, false).await
}

/// The same with the machine's process, if that can be: it stands still for longer then.
///
/// # Errors
/// As [`save`].
pub(crate) async fn save_process(sandbox: &Sandbox, directory: &Path) -> Result<SavedMachine, Problem> {
    save_with(sandbox, directory, true).await.map(|(saved, _)| saved)
}

async fn save_with(
    sandbox: &Sandbox,
    directory: &Path,
    with_process: bool,
) -> Result<(SavedMachine, Duration), Problem> {
    let from = sandbox.directory();
    let spec = Spec::load(from.path())?;
    let fingerprint = Fingerprint::now(from.home(), &spec)?;
    let name = from.name();
    let machine = from.live().and_then(|live| live.machine);
    let machine = machine.ok_or_else(|| plain("not-running", format!("{name} has no machine"), None))?;
    let what = || format!("save {name}");
    let lock = File::open(from.path().join("lock")).map_err(io(what()))?;
    let capture = Capture::open(machine, &lock, spec.memory_mib << 20)
        .map_err(io(format!("look into the machine of {name}")))?;
    let create = |file: &str| private_file().create_new(true).open(directory.join(file)).map_err(io(what()));
    let memory = create(MEMORY)?;
    capture.prepare(&memory).map_err(io(what()))?;
    let disk_source = from.path().join(disk::FILE_NAME);
    let mut stop = sandbox.save().await?;
    let stopped = Instant::now();
    let saved = stop.saved();
    // While it stands still, and on a thread of its own: the machine's end would be noticed here.
    // With hardware virtualisation the kernel has a part of the machine, and there is nothing to translate.
    let is_emulated = fingerprint.accelerator == Accelerator::Tcg.name();
    let process = if with_process && is_emulated { Some(create(PROCESS)?) } else { None };
    let (copied, disk_copy, process) = {
        let memory = memory.try_clone().map_err(io(what()))?;
        let target = directory.join(disk::FILE_NAME);
        let disks = disk::all(&spec, from.path())?;
        tokio::task::spawn_blocking(move || {
            let process = process.map(|file| {
                let disks = disks.into_iter().map(|(file, _)| file).collect();
                let code = qemu::save_process(&capture, disks, vec![lock], &file);
                let saved = code.and_then(|code| SavedProcess::new(&file, &code));
                // What is left of it may be what the rest of the machine has no room for.
                saved.inspect_err(|_| drop(file.set_len(0)))
            });
            (capture.finish(&memory), disk::copy(&disk_source, &target), process)
        })
        .await
        .map_err(|error| plain("save", error.to_string(), None))?
    };
    copied.map_err(io(what()))?;
    let disk_copy = disk_copy?;
    let process = process.and_then(|process| match process {
        Ok(process) => Some(process),
        Err(error) => {
            // It only saves time.
            tracing::info!("the machine's process was not saved: {error}");
            let _ = fs::remove_file(directory.join(PROCESS));
            None
        }
    });
    let mut tables = Vec::new();
    for (tag, length) in &saved.file_systems {
        let mut file = create(&table_name(tag))?;
        stop.copy(*length, &mut file).await?;
        tables.push(Stamp::of(&file).map_err(io(what()))?);
    }
    drop(stop);
    let still = stopped.elapsed();
    let mut devices = create(DEVICES)?;
    std::io::Write::write_all(&mut devices, &saved.devices).map_err(io(what()))?;
    let record = Record {
        fingerprint,
        epoch: saved.epoch,
        saved_unix_ms: crate::deadline::unix_ms(),
        file_systems: saved.file_systems.iter().map(|(tag, _)| tag.clone()).collect(),
        flows: saved.connections.iter().take(FLOWS_LIMIT).map(flow).collect(),
        memory: Stamp::of(&memory).map_err(io(what()))?,
        devices: Stamp::of(&devices).map_err(io(what()))?,
        process,
        tables,
        disk: Some(Stamp::of(&disk_copy).map_err(io(what()))?),
    };
    write_record(directory, &record)?;
    Ok((SavedMachine { directory: directory.to_owned(), record }, still))
}
