//! Machines that really start: through the jail, with a distribution's kernel, under whatever this host accelerates with.
//!
//! Needs QEMU, and the network at the first run (the kernel's package). It is its own runner, because it is also the
//! program that the jail is entered through, and because it runs itself again as an unprivileged user.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use agentkernel_machine::accelerator;
use agentkernel_machine::findings::{self, Status};
use agentkernel_machine::kernel::{self, Kernel, KernelOptions};
use agentkernel_machine::qemu::{self, Disk, DiskDurability, MachineConfig, NetworkCard, QemuMachine};
use agentkernel_machine::{ExitReason, Machine, jail};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// A start takes 2 s, and 20 on a host that is itself emulated.
const READY: Duration = Duration::from_secs(180);
const NOBODY: &str = "64123";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some(jail::VERB) => jail::main(),
        Some("machines") => machines(Path::new(&arguments.next().expect("a cache"))),
        Some("orphan") => orphan(Path::new(&arguments.next().expect("a cache"))),
        // cargo's own flags, and filters, do not concern a single test.
        Some("--list") => ExitCode::SUCCESS,
        _ => all(),
    }
}

fn all() -> ExitCode {
    let cache = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("boot");
    let options = KernelOptions { cache: cache.clone(), configured: None, offline: false };
    let kernel = kernel::prepare(&options, &mut |progress| say(&format!("{progress:?}"))).expect("a kernel");
    say(&format!("{} from {}", kernel.release, kernel.origin));
    load_with_init(&cache);
    let own = std::env::current_exe().expect("our own path");
    let mut status = run(Command::new(&own).arg("machines").arg(&cache));
    if rustix::process::geteuid().is_root() {
        // As a user who can read neither this build nor its cache: a copy of both.
        let place =
            tempfile::Builder::new().permissions(mode(0o755)).tempdir_in("/var/tmp").expect("a directory");
        let copied = run(Command::new("cp").arg("-r").arg(&own).arg(&cache).arg(place.path()))
            && run(Command::new("chown").args(["-R", NOBODY]).arg(place.path()));
        assert!(copied, "cannot copy the test for another user");
        let program = place.path().join(own.file_name().expect("a name"));
        let switch = ["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--no-new-privs"];
        say("again, as an unprivileged user");
        let mut command = Command::new("setpriv");
        command.args(switch).arg(program).arg("machines").arg(place.path().join("boot"));
        status &= run(command.env("HOME", "/nonexistent").current_dir(place.path()));
    }
    if status { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn mode(mode: u32) -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(mode)
}

fn run(command: &mut Command) -> bool {
    command.status().expect("the command starts").success()
}

fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "boot: {line}");
}

/// The kernel with the test's own PID 1, compiled here.
fn load_with_init(cache: &Path) -> Kernel {
    let program = cache.join("init");
    if !program.exists() || std::env::args().len() == 1 {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/init.rs");
        let mut rustc = Command::new("rustc");
        rustc.args([
            "--edition",
            "2024",
            "-C",
            "target-feature=+crt-static",
            "-C",
            "strip=symbols",
            "-O",
            "-o",
        ]);
        assert!(run(rustc.arg(&program).arg(source)), "the test's init compiles");
    }
    let init = fs::read(&program).expect("the test's init");
    let key = format!("test-{}", init.len());
    kernel::load_with(cache, None, &init, &key).expect("a kernel")
}

fn config(kernel: Kernel, disks: Vec<Disk>) -> MachineConfig {
    MachineConfig {
        kernel,
        restore: None,
        accelerator: accelerator::detect().accelerator,
        vcpus: 2,
        memory_mib: 256,
        disks,
        network: None,
        launcher: std::env::current_exe().expect("our own path"),
        machine_uid: None,
        inherit: Vec::new(),
        console_log: None,
        kernel_arguments: Vec::new(),
        watchers: None,
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

fn machines(cache: &Path) -> ExitCode {
    let kernel = load_with_init(cache);
    let before = qemus();
    nothing_fails(cache);
    runtime().block_on(async {
        talks_and_ends(kernel.clone()).await;
        panics_with_a_word(kernel.clone()).await;
        is_killed_and_paused(kernel.clone()).await;
        exchanges_frames(kernel.clone()).await;
        refuses_too_much(kernel.clone()).await;
    });
    dies_with_its_supervisor(cache);
    assert_eq!(qemus(), before, "a machine's process is left");
    ExitCode::SUCCESS
}

/// What `doctor` would say of a host on which the rest of this test passes.
fn nothing_fails(cache: &Path) {
    let own = std::env::current_exe().expect("our own path");
    let start = Instant::now();
    let found = findings::findings(cache, &own);
    say(&format!("{} findings after {} ms", found.len(), start.elapsed().as_millis()));
    for finding in &found {
        say(&format!("{:?} {}: {} {:?}", finding.status, finding.name, finding.detail, finding.remedy));
        assert!(finding.status < Status::Failure, "{finding:?}");
    }
    for name in ["accelerator", "kvm access", "qemu", "kernel", "jail: landlock", "disk", "memory"] {
        assert!(found.iter().any(|finding| finding.name == name), "no finding {name}");
    }
}

struct Agent {
    stream: BufReader<UnixStream>,
}

impl Agent {
    async fn ready(machine: &QemuMachine) -> Self {
        let mut agent = Self { stream: BufReader::new(machine.take_stream().expect("the stream")) };
        assert!(machine.take_stream().is_none(), "the stream is given once");
        let line = tokio::time::timeout(READY, agent.line()).await;
        let console = || String::from_utf8_lossy(&machine.console()).into_owned();
        let line = line.unwrap_or_else(|_| panic!("not ready; {:?}\n{}", machine.explain(), console()));
        if line.is_empty() {
            panic!("ended: {:?}\n{}", machine.stop(READY).await, console());
        }
        assert_eq!(line, "ready []", "{}", console());
        agent
    }

    async fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.expect("a line");
        line.trim_end().to_owned()
    }

    async fn say(&mut self, words: &str) {
        self.stream.write_all(words.as_bytes()).await.expect("written");
    }

    async fn ask(&mut self, words: &str) -> String {
        self.say(words).await;
        tokio::time::timeout(READY, self.line()).await.expect("an answer")
    }
}

async fn talks_and_ends(kernel: Kernel) {
    let start = Instant::now();
    let disk = |content: &[u8], read_only, serial: &str| {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(content).expect("written");
        file.set_len(1 << 20).expect("sized");
        let kept = file.try_clone().expect("a handle");
        (Disk { file, read_only, serial: serial.to_owned(), durability: DiskDurability::Scratch }, kept)
    };
    let (image, image_file) = disk(b"image...", true, "image");
    let (upper, upper_file) = disk(b"upper...", false, "upper");
    let mut config = config(kernel, vec![image, upper]);
    let logged = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let log = logged.clone();
    config.console_log = Some(Box::new(move |bytes: &[u8]| {
        log.fetch_add(bytes.len(), std::sync::atomic::Ordering::Relaxed);
    }));
    let machine = qemu::start(config).await.expect("starts");
    let mut agent = Agent::ready(&machine).await;
    say(&format!(
        "ready after {} ms; {:?}",
        start.elapsed().as_millis(),
        machine.metrics().expect("metrics")
    ));
    for layer in machine.layers() {
        say(&format!("{:18} {:5} {}", layer.wall.name(), layer.holds, layer.detail));
    }
    assert_eq!(agent.ask("hello").await, "hello");
    assert_eq!(agent.ask("disks").await, "image 1 image... false;upper 0 upper... true");
    assert_eq!(agent.ask("shout").await, "shouted");
    agent.say("quit").await;
    let exit = tokio::time::timeout(READY, machine.wait()).await.expect("ends");
    assert_eq!(exit.reason, ExitReason::Guest, "{exit:?}");
    assert!(machine.metrics().is_err());
    let start = |file: &File| {
        let mut bytes = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0).expect("read");
        String::from_utf8_lossy(&bytes).into_owned()
    };
    assert_eq!((start(&image_file), start(&upper_file)), ("image...".to_owned(), "written!".to_owned()));
    let kept = machine.console().len();
    assert!((200 << 10..=257 << 10).contains(&kept), "the console was drained and is bounded: {kept}");
    assert!(logged.load(std::sync::atomic::Ordering::Relaxed) >= kept - 100, "every byte was handed on");
}

async fn panics_with_a_word(kernel: Kernel) {
    let machine = qemu::start(config(kernel, Vec::new())).await.expect("starts");
    let mut agent = Agent::ready(&machine).await;
    agent.say("panic").await;
    let exit = tokio::time::timeout(READY, machine.wait()).await.expect("ends");
    assert_eq!(exit.reason, ExitReason::Panic, "{exit:?}");
    assert!(exit.explanation.expect("an explanation").contains("Kernel panic - not syncing"));
}

async fn is_killed_and_paused(kernel: Kernel) {
    let machine = qemu::start(config(kernel, Vec::new())).await.expect("starts");
    let mut agent = Agent::ready(&machine).await;
    machine.pause().await.expect("pauses");
    agent.say("hello").await;
    let silent = tokio::time::timeout(Duration::from_millis(300), agent.line()).await;
    assert!(silent.is_err(), "a paused machine answers: {silent:?}");
    machine.resume().await.expect("resumes");
    assert_eq!(tokio::time::timeout(READY, agent.line()).await.expect("an answer"), "hello");
    let exit = machine.stop(Duration::from_millis(50)).await;
    assert_eq!(exit.reason, ExitReason::Killed);
    assert!(machine.pause().await.is_err());
}

/// Frames go both ways, as long as may be; and a machine whose network is gone lives on and does not spin.
async fn exchanges_frames(kernel: Kernel) {
    const ADDRESS: [u8; 6] = [2, 0x61, 0x6b, 0, 0, 2];
    const MTU: u16 = 16_384;
    let (ours, cable) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    ours.set_nonblocking(true).expect("not blocking");
    let mut ours = UnixStream::from_std(ours).expect("a stream");
    let disks = (0..16).map(|index| Disk {
        file: tempfile::tempfile().and_then(|file| file.set_len(1 << 20).map(|()| file)).expect("a file"),
        read_only: false,
        serial: format!("disk{index}"),
        durability: DiskDurability::Scratch,
    });
    let card = NetworkCard { cable, address: ADDRESS, mtu: MTU };
    let machine = qemu::start(MachineConfig { network: Some(card), ..config(kernel, disks.collect()) }).await;
    let machine = machine.expect("starts");
    let mut agent = Agent::ready(&machine).await;
    assert_eq!(agent.ask("disks").await.split(';').count(), 16, "the card leaves room for all disks");
    assert_eq!(agent.ask("card").await, "02:61:6b:00:00:02 16384 0");
    // A card that comes up asks for its neighbours over IPv6.
    let mut frame = async || {
        let length = ours.read_u32().await.expect("a length");
        assert!((14..=u32::from(MTU) + 14).contains(&length), "{length}");
        let mut frame = vec![0; length as usize];
        ours.read_exact(&mut frame).await.expect("a frame");
        frame
    };
    let frame = tokio::time::timeout(READY, frame()).await.expect("a frame in time");
    assert_eq!(frame[6..12], ADDRESS);
    let before: u64 = agent.ask("received").await.parse().expect("a number");
    let mut longest = vec![0; usize::from(MTU) + 14];
    longest[..6].copy_from_slice(&ADDRESS);
    ours.write_u32(u32::from(MTU) + 14).await.expect("written");
    ours.write_all(&longest).await.expect("written");
    let begun = Instant::now();
    while agent.ask("received").await.parse::<u64>().expect("a number") < before + u64::from(MTU) {
        assert!(begun.elapsed() < READY, "a frame does not arrive");
    }
    drop(ours);
    assert_eq!(agent.ask("card").await, "02:61:6b:00:00:02 16384 0");
    let used = machine.metrics().expect("metrics").cpu_time;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let used = machine.metrics().expect("metrics").cpu_time - used;
    assert!(used < Duration::from_secs(1), "an idle machine without a network used {used:?}");
    assert_eq!(agent.ask("hello").await, "hello");
    machine.kill();
}

async fn refuses_too_much(kernel: Kernel) {
    let mut config = config(kernel, Vec::new());
    config.memory_mib = u32::MAX;
    let error = qemu::start(config).await.expect_err("there is not that much memory");
    assert!(matches!(error, qemu::StartError::TooLittleMemory { .. }), "{error}");
}

/// A supervisor that waits to be killed.
fn orphan(cache: &Path) -> ExitCode {
    let kernel = load_with_init(cache);
    runtime().block_on(async {
        let machine = qemu::start(config(kernel, Vec::new())).await.expect("starts");
        let _agent = Agent::ready(&machine).await;
        let _ = writeln!(std::io::stdout(), "ready");
        machine.wait().await;
    });
    ExitCode::SUCCESS
}

fn dies_with_its_supervisor(cache: &Path) {
    let own = std::env::current_exe().expect("our own path");
    let mut supervisor =
        Command::new(own).arg("orphan").arg(cache).stdout(Stdio::piped()).spawn().expect("a supervisor");
    let mut line = String::new();
    let mut output = std::io::BufReader::new(supervisor.stdout.take().expect("piped"));
    std::io::BufRead::read_line(&mut output, &mut line).expect("a line");
    assert_eq!(line, "ready\n");
    let children = qemus();
    assert!(!children.is_empty(), "no machine's process is seen");
    supervisor.kill().expect("killed");
    supervisor.wait().expect("ended");
    let deadline = Instant::now() + Duration::from_secs(5);
    while qemus().iter().any(|pid| children.contains(pid)) {
        assert!(Instant::now() < deadline, "the machine outlives its supervisor");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Machines started through this very program: their console is on a socket, so they are told by the port's name and by
/// being ours or a child of ours.
fn qemus() -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let is_machine =
            command.windows(qemu::AGENT_PORT.len()).any(|window| window == qemu::AGENT_PORT.as_bytes());
        if is_machine && descends_from_us(pid) {
            found.push(pid);
        }
    }
    found
}

fn descends_from_us(mut pid: u32) -> bool {
    while pid > 1 {
        if pid == std::process::id() {
            return true;
        }
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent =
            stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(1)?.parse().ok());
        pid = parent.unwrap_or(0);
    }
    false
}
