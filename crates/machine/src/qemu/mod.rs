//! The driver for QEMU: `microvm` machines of Debian's `qemu-system-x86_64`, 7.2 and later.
//!
//! Everything the process needs reaches it as an open descriptor: QMP, the agent's stream and the console as socket
//! pairs, disks as descriptor sets, kernel and initramfs as files it may open again. So no socket is left in a file
//! system, and its uid needs no right to any directory.
//!
//! ```text
//! start ── descriptors, command line ──> jail::spawn ──> qemu
//!   ├─ task: QMP lines in, answers and events out
//!   └─ task: console drained into a bounded buffer and log
//! ```

mod arguments;
mod clock;
mod qmp;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::OFlags;
use tokio::net::UnixStream;

use crate::accelerator::Accelerator;
pub use crate::console::ConsoleLog;
use crate::console::{self, Console};
use crate::jail::{self, Ended, JailConfig, JailError, Jailed, Layer, Limits};
use crate::kernel::Kernel;
use crate::machine::{Capabilities, Exit, ExitReason, Machine, MachineError, Metrics, Work, process_metrics};
use crate::memory::Capture;
use crate::process;
use qmp::Qmp;

pub use arguments::AGENT_PORT;

/// The program this driver runs.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// `microvm` has 24 virtio transports; the port and the network card take two.
const DISK_LIMIT: usize = 16;
const CPU_LIMIT: u32 = 64;
/// Most that the devices of a machine hold, in bytes; 100 KiB are usual.
const DEVICES_LIMIT: u64 = 64 << 20;
/// What a machine needs beside its guest's memory: QEMU itself and its translated code.
pub(crate) const OVERHEAD_MIB: u64 = 192;
/// How long a process that hung up may take to end by itself.
const LAST_MOMENT: Duration = Duration::from_millis(200);
/// QEMU's libraries, stacks and allocator arenas: address space, not memory.
const ADDRESS_SPACE_MIB: u64 = 6144;

/// What kind of machine is asked for.
pub struct MachineConfig {
    /// What it boots.
    pub kernel: Kernel,
    /// A saved machine that it goes on from instead of booting. Everything else here must be as it was when that was saved.
    pub restore: Option<Restore>,
    /// How its processors are run.
    pub accelerator: Accelerator,
    /// Its processors, at least one.
    pub vcpus: u32,
    /// Its memory; taken from the host only as it is used.
    pub memory_mib: u32,
    /// Its disks, found in the guest by their serials.
    pub disks: Vec<Disk>,
    /// Its network card, the guest's `eth0`; `None`: it has none.
    pub network: Option<NetworkCard>,
    /// The program whose verb [`jail::VERB`] calls [`jail::main`]: our own.
    pub launcher: PathBuf,
    /// The uid of the machine's process when we are root; `None`: one that is drawn by lot.
    pub machine_uid: Option<u32>,
    /// Descriptors that the machine's process holds open as long as it lives (locks).
    pub inherit: Vec<OwnedFd>,
    /// What is handed the console's bytes as they come.
    pub console_log: Option<ConsoleLog>,
    /// What is appended to the kernel's command line.
    pub kernel_arguments: Vec<String>,
    /// What the threads that watch the machine's process do to confine themselves once it runs.
    pub watchers: Option<jail::Confinement>,
}

/// A saved machine.
#[derive(Debug)]
pub struct Restore {
    /// Its memory, of exactly the machine's size. It is mapped privately, and nothing that the machine's process does can
    /// change it.
    pub memory: File,
    /// What [`Machine::save`] gave.
    pub devices: Vec<u8>,
    /// What [`save_process`] wrote of a machine with scratch disks: the machine goes on as that process, and the devices are
    /// in it.
    pub process: Option<File>,
}

/// A network card.
#[derive(Debug)]
pub struct NetworkCard {
    /// The machine's end of its cable, a stream: each Ethernet frame follows its length as four bytes, big-endian. If the
    /// other end is closed the machine goes on, and nothing that the guest sends arrives anywhere.
    pub cable: StdUnixStream,
    /// Its Ethernet address.
    pub address: [u8; 6],
    /// Largest IP packet that it takes and brings, bytes.
    pub mtu: u16,
}

/// A disk of a machine.
#[derive(Debug)]
pub struct Disk {
    /// Its content, raw. Opened read-write unless it is read-only.
    pub file: File,
    /// The guest cannot write to it.
    pub read_only: bool,
    /// How the guest finds it: 1 to 20 ASCII letters, digits, `-` and `_`.
    pub serial: String,
    /// What a flush of the guest means.
    pub durability: DiskDurability,
}

/// What a guest's flush does on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskDurability {
    /// Nothing: the disk does not outlive a crash of the host. For what is thrown away.
    Scratch,
    /// The file is synced.
    Durable,
}

/// Why a machine was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There is no QEMU.
    #[error("{PROGRAM} is not installed")]
    NotInstalled,
    /// The host has too little memory for it.
    #[error("the machine needs {needed_mib} MiB of memory and the host has {available_mib} MiB left")]
    TooLittleMemory {
        /// What it needs, QEMU included.
        needed_mib: u64,
        /// What the host has.
        available_mib: u64,
    },
    /// The configuration cannot be.
    #[error("there is no machine with {what}")]
    Config {
        /// What is wrong.
        what: String,
    },
    /// The accelerator was asked for and is not there.
    #[error("hardware virtualisation was asked for: {reason}")]
    NoHardware {
        /// Why not.
        reason: String,
    },
    /// A file of the machine cannot be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No descriptors or memory for the sockets.
    #[error("cannot make the machine's sockets")]
    Sockets {
        /// What the system said.
        source: io::Error,
    },
    /// A saved process does not go on.
    #[error("the saved process does not go on ({exit})")]
    Resume {
        /// How it ended.
        exit: Exit,
        /// What it said.
        source: MachineError,
    },
    /// The process did not start.
    #[error("cannot start the machine's process")]
    Jail {
        /// Why.
        #[from]
        source: JailError,
    },
}

impl StartError {
    /// Whether it is the machine's process that gave up, and not the host that has not got what it takes.
    #[must_use]
    pub fn is_of_process(&self) -> bool {
        matches!(self, Self::Resume { .. } | Self::Jail { source: JailError::Setup { .. } })
    }

    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotInstalled => Some("sudo apt-get install qemu-system-x86".to_owned()),
            Self::TooLittleMemory { .. } => Some("ask for less with --memory".to_owned()),
            Self::NoHardware { .. } => Some("agentkernel doctor".to_owned()),
            Self::Open { .. } => Some("agentkernel setup".to_owned()),
            Self::Config { .. } | Self::Sockets { .. } | Self::Resume { .. } | Self::Jail { .. } => None,
        }
    }
}

/// Where QEMU is, as `PATH` says.
#[must_use]
pub fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(PROGRAM)).find(|program| is_program(program))
}

fn is_program(path: &Path) -> bool {
    path.is_absolute() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok() && path.is_file()
}

/// A machine that QEMU runs.
#[derive(Debug)]
pub struct QemuMachine {
    process: Jailed,
    qmp: Qmp,
    stream: Mutex<Option<UnixStream>>,
    console: Arc<Mutex<Console>>,
    killed: AtomicBool,
    hardware: bool,
    devices: Arc<Devices>,
}

/// Starts a machine. Returns as soon as its process runs; whether the guest comes up is seen on the stream, and
/// [`Machine::explain`] tells why not. Needs a tokio runtime with I/O and time.
///
/// # Errors
/// [`StartError`]; nothing runs then and nothing is left behind.
pub async fn start(config: MachineConfig) -> Result<QemuMachine, StartError> {
    let clock = clock::Measurement::begin();
    check(&config)?;
    let program = find().ok_or(StartError::NotInstalled)?;
    let sockets = |source| StartError::Sockets { source };
    let (qmp, qmp_end) = pair().map_err(sockets)?;
    let (stream, stream_end) = pair().map_err(sockets)?;
    let (serial, serial_end) = pair().map_err(sockets)?;

    let devices = Devices::new().map_err(sockets)?;
    let ends = Ends {
        sockets: [qmp_end.into(), stream_end.into(), serial_end.into()],
        devices: devices.write.try_clone().map_err(sockets)?.into(),
    };
    let hardware = config.accelerator == Accelerator::Kvm;
    let durable =
        config.disks.iter().enumerate().filter(|(_, disk)| disk.durability == DiskDurability::Durable);
    let durable: Vec<(usize, bool)> = durable.map(|(index, disk)| (index, disk.read_only)).collect();
    let (jail, log) = match config.restore {
        Some(Restore { process: Some(_), .. }) => resumed(config, ends)?,
        _ => executed(config, ends, program, clock).await?,
    };
    let is_resumed = jail.resumed.is_some();
    let process = jail::spawn(jail).await?;
    let console = Arc::new(Mutex::new(Console::new(log)));
    tokio::spawn(console::drain(serial, Arc::clone(&console)));
    let machine = QemuMachine {
        process,
        qmp: Qmp::connect(qmp, is_resumed),
        stream: Mutex::new(Some(stream)),
        console,
        killed: AtomicBool::new(false),
        hardware,
        devices: Arc::new(devices),
    };
    if is_resumed && let Err(source) = machine.go_on(&durable).await {
        // Whoever starts another on the same disks must not find this one at work.
        let exit = machine.stop(LAST_MOMENT).await;
        return Err(StartError::Resume { exit, source });
    }
    Ok(machine)
}

/// The ends of a machine's process.
struct Ends {
    sockets: [OwnedFd; 3],
    devices: OwnedFd,
}

/// A process that executes QEMU, which boots or loads a saved machine.
async fn executed(
    config: MachineConfig,
    ends: Ends,
    program: PathBuf,
    clock: clock::Measurement,
) -> Result<(JailConfig, Option<ConsoleLog>), StartError> {
    let limits = limits(&config);
    let mut plan = arguments::Plan::new(&config);
    let [qmp, stream, serial] = ends.sockets;
    plan.sockets(qmp, stream, serial);
    if let Some(card) = config.network {
        plan.network(card);
    }
    plan.devices(ends.devices);
    let opened = match config.restore {
        Some(restore) => {
            let devices = anonymous("restored", &restore.devices);
            plan.restore(devices.map_err(|source| StartError::Sockets { source })?.into());
            Some(restore.memory)
        }
        None => {
            let (kernel, initramfs) = (open(&config.kernel.vmlinux)?, open(&config.kernel.initramfs)?);
            plan.boot(kernel.into(), initramfs.into(), clock.finish(config.accelerator).await);
            None
        }
    };
    plan.disks(config.disks.into_iter().map(least_access).collect::<Result<_, _>>()?);
    let (arguments, descriptors) = plan.finish(config.inherit);
    let jail = JailConfig {
        readable: arguments::readable(&program),
        program: Some(program),
        launcher: config.launcher,
        arguments,
        descriptors,
        devices: arguments::devices(config.accelerator),
        identity: config.machine_uid,
        limits,
        without: Vec::new(),
        opened,
        resumed: None,
        watchers: config.watchers,
    };
    Ok((jail, config.console_log))
}

/// A process that goes on as one that was saved.
fn resumed(config: MachineConfig, ends: Ends) -> Result<(JailConfig, Option<ConsoleLog>), StartError> {
    let limits = limits(&config);
    let mut passed: Vec<(String, OwnedFd)> = Vec::new();
    let mut pass = |name: &str, descriptor: OwnedFd| passed.push((name.to_owned(), descriptor));
    for (name, socket) in arguments::SOCKETS.into_iter().zip(ends.sockets) {
        pass(name, socket);
    }
    if let Some(card) = config.network {
        pass(arguments::NETWORK, card.cable.into());
    }
    pass(arguments::DEVICES, ends.devices);
    if let Some(Restore { memory, process: Some(process), .. }) = config.restore {
        pass(process::MEMORY, memory.into());
        pass(jail::IMAGE, process.into());
    }
    for (index, disk) in config.disks.into_iter().enumerate() {
        pass(&format!("{}{index}", arguments::DISK), least_access(disk)?.file.into());
    }
    for (index, held) in config.inherit.into_iter().enumerate() {
        pass(&format!("{}{index}", arguments::HELD), held);
    }
    let (names, descriptors) = passed.into_iter().unzip();
    let jail = JailConfig {
        readable: Vec::new(),
        program: None,
        launcher: config.launcher,
        arguments: Vec::new(),
        descriptors,
        devices: arguments::devices(config.accelerator),
        identity: config.machine_uid,
        limits,
        without: Vec::new(),
        opened: None,
        resumed: Some(names),
        watchers: config.watchers,
    };
    Ok((jail, config.console_log))
}

/// Saves the process of a machine that stands still, for others to go on as ([`Restore::process`]). `memory` is that of the
/// machine, `disks` and `held` are the files it was given as [`MachineConfig::disks`] and [`MachineConfig::inherit`]. Returns
/// where QEMU and its libraries are, whose code is saved with it.
///
/// # Errors
/// If the process may not be looked into or cannot be saved, or the disk is full. The machine is none the worse for it.
pub fn save_process(
    memory: &Capture,
    disks: Vec<File>,
    held: Vec<File>,
    target: &File,
) -> io::Result<Vec<PathBuf>> {
    let sockets = arguments::SOCKETS.into_iter().chain([arguments::NETWORK]);
    let sockets: Vec<(i32, &str)> = (jail::FIRST_DESCRIPTOR..).zip(sockets).collect();
    let number = |name: &'static str| move |(index, file)| (format!("{name}{index}"), file);
    let disks = disks.into_iter().enumerate().map(number(arguments::DISK));
    let held = held.into_iter().enumerate().map(number(arguments::HELD));
    let files: Vec<(String, File)> = disks.chain(held).collect();
    process::capture(memory, &sockets, &files, target)
}

/// Where QEMU writes the state of its devices: a file in memory that it can only write.
#[derive(Debug)]
struct Devices {
    read: File,
    /// The same open file as QEMU's: its position is set here before each writing.
    write: File,
}

impl Devices {
    fn new() -> io::Result<Self> {
        let read = anonymous("devices", b"")?;
        let write = File::options().write(true).open(format!("/proc/self/fd/{}", read.as_raw_fd()))?;
        Ok(Self { read, write })
    }

    fn clear(&self) -> io::Result<()> {
        self.write.set_len(0)?;
        rustix::fs::seek(&self.write, rustix::fs::SeekFrom::Start(0))?;
        Ok(())
    }

    fn content(&self) -> io::Result<Vec<u8>> {
        let length = self.read.metadata()?.len();
        if length == 0 || length > DEVICES_LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{length} bytes of state")));
        }
        let mut content = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        std::os::unix::fs::FileExt::read_exact_at(&self.read, &mut content, 0)?;
        Ok(content)
    }
}

/// A file that lies in memory only.
fn anonymous(name: &str, content: &[u8]) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?);
    io::Write::write_all(&mut file, content)?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    Ok(file)
}

fn check(config: &MachineConfig) -> Result<(), StartError> {
    let refuse = |what: String| Err(StartError::Config { what });
    if !(1..=CPU_LIMIT).contains(&config.vcpus) {
        return refuse(format!("{} processors (1 to {CPU_LIMIT})", config.vcpus));
    }
    if config.memory_mib < 64 {
        return refuse(format!("{} MiB of memory (at least 64)", config.memory_mib));
    }
    if config.disks.len() > DISK_LIMIT {
        return refuse(format!("{} disks (at most {DISK_LIMIT})", config.disks.len()));
    }
    for disk in &config.disks {
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if !(1..=20).contains(&disk.serial.len()) || !disk.serial.bytes().all(valid) {
            return refuse(format!("a disk of the serial {:?}", disk.serial));
        }
    }
    let needed_mib = u64::from(config.memory_mib) + OVERHEAD_MIB;
    match available_memory_mib() {
        Some(available_mib) if available_mib < needed_mib => {
            Err(StartError::TooLittleMemory { needed_mib, available_mib })
        }
        _ => Ok(()),
    }
}

/// A descriptor with no more rights than the disk has: the guest's wall is QEMU, QEMU's is the kernel. (And QEMU takes
/// no descriptor whose mode is another than the one it would open a file with.)
fn least_access(disk: Disk) -> Result<Disk, StartError> {
    let link = PathBuf::from(format!("/proc/self/fd/{}", disk.file.as_raw_fd()));
    let flags = rustix::fs::fcntl_getfl(&disk.file)
        .map_err(|error| StartError::Open { path: link.clone(), source: error.into() })?;
    match (disk.read_only, flags & OFlags::RWMODE) {
        (true, OFlags::RDONLY) | (false, OFlags::RDWR) => Ok(disk),
        (true, _) => Ok(Disk { file: open(&link)?, ..disk }),
        (false, _) => {
            Err(StartError::Config { what: format!("a disk {} that cannot be written", disk.serial) })
        }
    }
}

/// What the host could give without swapping, in MiB.
pub(crate) fn available_memory_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib >> 10)
}

fn limits(config: &MachineConfig) -> Limits {
    let largest = config.disks.iter().filter(|disk| !disk.read_only);
    let largest = largest.filter_map(|disk| disk.file.metadata().ok()).map(|data| data.len()).max();
    Limits {
        // The memory is a file, too.
        file_size_bytes: largest.unwrap_or(0).max(u64::from(config.memory_mib) << 20),
        address_space_bytes: Some((u64::from(config.memory_mib) + ADDRESS_SPACE_MIB) << 20),
        open_files: 256,
        processes: 128 + u64::from(config.vcpus),
    }
}

fn open(path: &Path) -> Result<File, StartError> {
    File::open(path).map_err(|source| StartError::Open { path: path.to_owned(), source })
}

fn pair() -> io::Result<(UnixStream, StdUnixStream)> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs))
}

impl QemuMachine {
    /// Has a process go on that was saved while it stood still, and with scratch disks: those that are durable become so.
    async fn go_on(&self, durable: &[(usize, bool)]) -> Result<(), MachineError> {
        if !durable.is_empty() {
            let options = arguments::flushed(durable);
            self.qmp.execute_with("blockdev-reopen", &options, "have its disk written back").await?;
        }
        self.resume().await
    }

    fn exit(&self, ended: &Ended) -> Exit {
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        let status = ended.status;
        let reason = match status.map(|status| (status.code(), status.signal())) {
            _ if console.has_panicked() => ExitReason::Panic,
            Some((Some(0), _)) => ExitReason::Guest,
            Some((_, Some(9))) if self.killed.load(Ordering::Relaxed) => ExitReason::Killed,
            Some((_, Some(signal))) => ExitReason::Signal { signal },
            Some((Some(code), _)) => ExitReason::Failed { code },
            _ => ExitReason::Unknown,
        };
        let words = ended.errors.lines().rev().find(|line| !line.trim().is_empty()).map(console::printable);
        let explanation = match reason {
            ExitReason::Failed { .. } | ExitReason::Signal { .. } => words.or_else(|| console.explain()),
            _ => console.explain().or(words),
        };
        Exit { reason, explanation }
    }
}

impl Machine for QemuMachine {
    fn capabilities(&self) -> Capabilities {
        Capabilities { pause: true, save: true, own_kernel: true, hardware: self.hardware }
    }

    fn take_stream(&self) -> Option<UnixStream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn pause(&self) -> Work<'_, Result<(), MachineError>> {
        Box::pin(self.qmp.execute("stop", "pause"))
    }

    fn resume(&self) -> Work<'_, Result<(), MachineError>> {
        Box::pin(self.qmp.execute("cont", "resume"))
    }

    fn save(&self) -> Work<'_, Result<Vec<u8>, MachineError>> {
        Box::pin(async move {
            let failed = |error: io::Error| MachineError::NoAnswer { reason: format!("its state: {error}") };
            self.devices.clear().map_err(failed)?;
            // `live` keeps the disks in use: the machine goes on.
            let arguments = serde_json::json!({ "filename": arguments::DEVICES_SET, "live": true });
            self.qmp.execute_with("xen-save-devices-state", &arguments, "save its devices").await?;
            self.devices.content().map_err(failed)
        })
    }

    fn wait(&self) -> Work<'_, Exit> {
        Box::pin(async {
            let ended = self.process.wait().await;
            // The console's last bytes may still be on their way to its task.
            tokio::time::sleep(Duration::from_millis(1)).await;
            self.exit(&ended)
        })
    }

    fn stop(&self, deadline: Duration) -> Work<'_, Exit> {
        Box::pin(async move {
            if tokio::time::timeout(deadline, self.process.wait()).await.is_err() {
                self.kill();
            }
            self.wait().await
        })
    }

    fn kill(&self) {
        if !self.process.has_ended() {
            self.killed.store(true, Ordering::Relaxed);
            self.process.kill();
        }
    }

    fn process(&self) -> u32 {
        self.process.pid()
    }

    fn metrics(&self) -> Result<Metrics, MachineError> {
        if self.process.has_ended() {
            return Err(MachineError::Ended);
        }
        process_metrics(self.process.pid()).ok_or(MachineError::Ended)
    }

    fn explain(&self) -> Option<String> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).explain()
    }

    fn console(&self) -> Vec<u8> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).text()
    }

    fn layers(&self) -> &[Layer] {
        self.process.layers()
    }
}

impl Drop for QemuMachine {
    fn drop(&mut self) {
        self.process.kill();
    }
}
