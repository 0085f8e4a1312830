//! Every act the jail denies, tried from inside it, and outside it as well, where it must succeed: a test whose act
//! could not work anywhere would prove nothing.
//!
//! Each act is tried behind the whole jail, and behind each wall alone that is to deny it. The program is its own runner,
//! because it is also the launcher of the jail, the program that is guarded, and itself again as an unprivileged user.
//! Needs root for both halves; started by another user it tries what that user can, and says so. QEMU must be installed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use agentkernel_machine::jail::{self, Argument, JailConfig, Limits, Wall};

#[path = "fixtures/acts.rs"]
mod acts;

use acts::{abstract_name, act, is_open, report};

const LIMIT: Duration = Duration::from_secs(30);
const NOBODY: u32 = 64_124;
/// How an act says that it was denied; any other code is a fault of the test.
const DENIED: u8 = 77;
const OPEN_FILES: u64 = 256;
const FILE_SIZE: u64 = 1 << 20;
/// What the driver gives QEMU.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
const SIGSYS: i32 = 31;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next().as_deref().and_then(|verb| verb.to_str()) {
        Some(jail::VERB) => jail::main(),
        Some("act") => report(act(&arguments.collect::<Vec<_>>())),
        Some("acts") => acts(Path::new(&arguments.next().expect("a place"))),
        Some("--list") => ExitCode::SUCCESS,
        _ => all(),
    }
}

fn say(line: &str) {
    let _ = writeln!(io::stderr(), "jail: {line}");
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

// ---- the walls ----

/// The jail without some of its walls.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Behind {
    /// All of it.
    Whole,
    /// What is left on a host whose users may make no namespaces.
    NoNamespaces,
    Namespaces,
    Landlock,
    OwnUid,
    NoNewPrivileges,
    SystemCalls,
    Limits,
}

const NAMESPACES: [Wall; 4] =
    [Wall::UserNamespace, Wall::NetworkNamespace, Wall::IpcNamespace, Wall::MountNamespace];
const OTHERS: [Wall; 6] = [
    Wall::OwnUid,
    Wall::NoCapabilities,
    Wall::NoNewPrivileges,
    Wall::Landlock,
    Wall::SystemCalls,
    Wall::ResourceLimits,
];

impl Behind {
    fn without(self) -> Vec<Wall> {
        let all = || NAMESPACES.into_iter().chain(OTHERS);
        let but = |kept: &[Wall]| all().filter(|wall| !kept.contains(wall)).collect();
        match self {
            Self::Whole => Vec::new(),
            Self::NoNamespaces => NAMESPACES.to_vec(),
            Self::Namespaces => but(&NAMESPACES),
            Self::Landlock => but(&[Wall::Landlock]),
            Self::OwnUid => but(&[Wall::OwnUid]),
            Self::NoNewPrivileges => but(&[Wall::NoNewPrivileges]),
            // Without privileges a filter needs no_new_privs.
            Self::SystemCalls => but(&[Wall::SystemCalls, Wall::NoNewPrivileges]),
            Self::Limits => but(&[Wall::ResourceLimits]),
        }
    }

    /// Whether this host offers what is to deny an act.
    fn is_offered(self, offers: &Offers, attempt: &Try) -> bool {
        match self {
            // Any of its walls will do.
            Self::Whole => {
                let mut walls = attempt.denied_by.iter().filter(|behind| **behind != Self::NoNamespaces);
                walls.clone().count() == 0 || walls.any(|behind| behind.is_offered(offers, attempt))
            }
            Self::Namespaces => offers.namespaces,
            Self::Landlock => offers.landlock >= attempt.landlock.max(1),
            // What an old landlock lets through the filter does not, but for files.
            Self::NoNamespaces => offers.landlock > 0,
            // Only root can take another uid.
            Self::OwnUid => is_root(),
            Self::NoNewPrivileges | Self::SystemCalls | Self::Limits => true,
        }
    }
}

/// What this host's kernel has.
struct Offers {
    /// Its landlock's version, 0 without.
    landlock: u32,
    namespaces: bool,
}

impl Offers {
    fn look() -> Self {
        let layers = runtime().block_on(jail::probe(&own())).expect("the jail is set up");
        let find = |wall| layers.iter().find(|layer| layer.wall == wall).expect("each wall is reported");
        let version =
            find(Wall::Landlock).detail.rsplit_once("ABI ").map(|(_, rest)| rest.trim_end_matches(')'));
        let namespaces = NAMESPACES[1..].iter().all(|wall| find(*wall).holds);
        let offers = Self { landlock: version.and_then(|text| text.parse().ok()).unwrap_or(0), namespaces };
        say(&format!("landlock {}, namespaces {}", offers.landlock, offers.namespaces));
        offers
    }
}

struct Try {
    words: Vec<String>,
    /// Whether it succeeds outside the jail: not so for what this user may not do anyhow.
    allowed: bool,
    /// Beside [`Behind::Whole`].
    denied_by: &'static [Behind],
    /// The version of landlock that can deny it.
    landlock: u32,
    /// Passed as descriptor 3.
    file: Option<PathBuf>,
    /// What it may read beside the program and its libraries.
    readable: Vec<PathBuf>,
}

impl Try {
    fn new(words: &[&str], denied_by: &'static [Behind]) -> Self {
        let words = words.iter().map(|&word| word.to_owned()).collect();
        Self { words, allowed: true, denied_by, landlock: 0, file: None, readable: Vec::new() }
    }

    fn landlock(self, version: u32) -> Self {
        Self { landlock: version, ..self }
    }

    fn allowed(self, allowed: bool) -> Self {
        Self { allowed, ..self }
    }
}

// ---- the host ----

/// What the acts are tried on. Goes with this value.
struct Host {
    place: PathBuf,
    state: PathBuf,
    secret: PathBuf,
    key: PathBuf,
    socket: PathBuf,
    tcp: TcpListener,
    abstract_name: String,
    sleeper: Child,
    _listeners: [UnixListener; 2],
    leak: OwnedFd,
}

impl Host {
    fn set_up(place: &Path) -> Self {
        let state = place.join(format!("state-{}", rustix::process::geteuid().as_raw()));
        let private = |path: &Path| fs::DirBuilder::new().mode(0o700).create(path).expect("a directory");
        let secret_file = |path: &Path| {
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).expect("a file");
            file.write_all(b"secret").expect("written");
        };
        private(&state);
        private(&state.join(".ssh"));
        let (secret, key, socket) =
            (state.join("secret"), state.join(".ssh/id_ed25519"), state.join("socket"));
        secret_file(&secret);
        secret_file(&key);
        let abstract_name = format!("agentkernel-test-{}", std::process::id());
        let name = abstract_name_of(&abstract_name);
        let listeners =
            [UnixListener::bind(&socket), UnixListener::bind_addr(&name)].map(|it| it.expect("bound"));
        // A descriptor that a careless parent leaves open across exec.
        let leak =
            rustix::io::fcntl_dupfd_cloexec(File::open("/dev/null").expect("opened"), 200).expect("a copy");
        rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).expect("inheritable");
        Self {
            place: place.to_owned(),
            state,
            secret,
            key,
            socket,
            tcp: TcpListener::bind("127.0.0.1:0").expect("bound"),
            abstract_name,
            sleeper: Command::new("sleep").arg("600").spawn().expect("sleep starts"),
            _listeners: listeners,
            leak,
        }
    }

    fn tries(&self) -> Vec<Try> {
        use Behind::{Landlock, Limits, Namespaces, NoNamespaces, NoNewPrivileges, OwnUid, SystemCalls};
        const FILES: &[Behind] = &[NoNamespaces, Namespaces, Landlock];
        const PRIVATE_FILES: &[Behind] = &[NoNamespaces, Namespaces, Landlock, OwnUid];
        const NETWORK: &[Behind] = &[NoNamespaces, Namespaces, Landlock, SystemCalls];
        // Landlock knows TCP only.
        const UDP: &[Behind] = &[NoNamespaces, Namespaces, SystemCalls];
        const PROCESSES: &[Behind] = &[NoNamespaces, Landlock, OwnUid, SystemCalls];
        let text = |path: &Path| path.to_str().expect("a plain path").to_owned();
        let sleeper = self.sleeper.id().to_string();
        let in_tmp = format!("/tmp/agentkernel-jail-{}", std::process::id());
        let mut tries = vec![
            Try::new(&["read", "/etc/shadow"], PRIVATE_FILES).allowed(is_root()),
            Try::new(&["read", &text(&self.secret)], PRIVATE_FILES),
            Try::new(&["read", &text(&self.key)], PRIVATE_FILES),
            Try::new(&["read", "/etc/passwd"], FILES),
            Try::new(&["create", &text(&self.state.join("new"))], PRIVATE_FILES),
            Try::new(&["create", &in_tmp], FILES),
            Try::new(&["create", &in_tmp.replacen("/tmp", "/dev/shm", 1)], FILES),
            Try::new(&["tcp", &self.tcp.local_addr().expect("an address").to_string()], NETWORK).landlock(4),
            Try::new(&["bind"], NETWORK).landlock(4),
            Try::new(&["abstract", &self.abstract_name], NETWORK).landlock(6),
            Try::new(&["unix", &text(&self.socket)], &[NoNamespaces, Namespaces, OwnUid, SystemCalls]),
            Try::new(&["udp", &self.tcp.local_addr().expect("an address").to_string()], UDP),
            Try::new(&["namespace"], &[NoNamespaces, SystemCalls]),
            Try::new(&["signal", &sleeper], PROCESSES).landlock(6),
            Try::new(&["ptrace", &sleeper], PROCESSES),
            Try::new(&["limit"], if is_root() { &[NoNamespaces] } else { &[NoNamespaces, Limits] }),
            Try::new(&["open", "/dev/zero"], FILES),
            Try::new(&["open", "/dev/mem"], FILES).allowed(is_root() && Path::new("/dev/mem").exists()),
            Try::new(&["open", "/dev/kmsg"], FILES).allowed(is_root()),
            Try::new(&["execute", "/usr/bin/id"], FILES),
            Try::new(&["descriptor", "200"], &[NoNamespaces, Namespaces, Landlock, Limits, NoNewPrivileges]),
        ];
        let grown = self.state.join("grown");
        fs::write(&grown, "").expect("a file");
        let mut grow = Try::new(&["grow", "3"], &[NoNamespaces, Limits]);
        grow.file = Some(grown);
        tries.push(grow);
        let set_uid = self.place.join("set-uid");
        match set_uid.exists() {
            true => {
                let words = ["execute", &text(&set_uid), "act", "root"];
                let mut gain = Try::new(&words, &[NoNamespaces, Namespaces, Landlock, NoNewPrivileges]);
                gain.readable = vec![set_uid];
                // Root has nothing to gain, unless it has given up its uid.
                if is_root() {
                    gain.denied_by = &[NoNamespaces];
                }
                tries.push(gain);
            }
            false => say("NOT TRIED: gaining privileges with a set-uid program, which root has to make"),
        }
        tries
    }
}

fn abstract_name_of(name: &str) -> std::os::unix::net::SocketAddr {
    abstract_name(name).expect("a name")
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.sleeper.kill();
        let _ = self.sleeper.wait();
        let _ = fs::remove_dir_all(&self.state);
        assert!(is_open(self.leak.as_raw_fd()).is_ok());
    }
}

// ---- trying ----

fn acts(place: &Path) -> ExitCode {
    let mut failures = 0;
    {
        let host = Host::set_up(place);
        let offers = Offers::look();
        for attempt in host.tries() {
            failures += attempt.everywhere(&offers);
        }
        failures += what_is_given_works(&host) + what_is_opened_is_read_only(&host);
        failures += qemu_cannot_spawn(&host);
    }
    failures += nothing_is_left();
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Try {
    /// The number of surprises.
    fn everywhere(&self, offers: &Offers) -> u32 {
        let name = self.words.join(" ");
        let mut failures = 0;
        let outside = self.outside();
        let expected = if self.allowed { Some(0) } else { Some(i32::from(DENIED)) };
        if outside != expected {
            say(&format!("FAILED: {name}: outside the jail: {outside:?} instead of {expected:?}"));
            failures += 1;
        }
        let behind = std::iter::once(Behind::Whole).chain(self.denied_by.iter().copied());
        let (behind, missing): (Vec<_>, Vec<_>) = behind.partition(|behind| behind.is_offered(offers, self));
        if !missing.is_empty() && missing != [Behind::OwnUid] {
            say(&format!("NOT TRIED: {name}: this host does not offer {missing:?}"));
        }
        for behind in &behind {
            let (code, words) = jailed(*behind, &self.words, self.file.as_deref(), &self.readable);
            if code != Some(i32::from(DENIED)) {
                say(&format!("FAILED: {name}: behind {behind:?}: {code:?} {words}"));
                failures += 1;
            }
        }
        say(&format!(
            "{name}: {} outside, denied behind {behind:?}",
            if self.allowed { "works" } else { "denied" }
        ));
        failures
    }

    fn outside(&self) -> Option<i32> {
        let mut words = self.words.clone();
        if let Some(file) = &self.file {
            words = vec![words[0].clone(), file.to_str().expect("a plain path").to_owned()];
        }
        let mut command = Command::new(own());
        command.arg("act").args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().expect("the act starts").code()
    }
}

fn own() -> PathBuf {
    std::env::current_exe().expect("our own path")
}

fn libraries() -> Vec<PathBuf> {
    let paths = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"].map(PathBuf::from);
    paths.into_iter().filter(|path| path.exists() && !path.is_symlink()).collect()
}

fn config(behind: Behind, program: PathBuf, arguments: Vec<Argument>) -> JailConfig {
    JailConfig {
        launcher: own(),
        program: Some(program),
        arguments,
        descriptors: Vec::new(),
        readable: libraries(),
        devices: vec![PathBuf::from("/dev/null")],
        identity: None,
        limits: Limits {
            file_size_bytes: FILE_SIZE,
            address_space_bytes: None,
            open_files: OPEN_FILES,
            processes: 64,
        },
        without: behind.without(),
        opened: None,
        resumed: None,
        watchers: None,
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn jailed(
    behind: Behind,
    words: &[String],
    file: Option<&Path>,
    readable: &[PathBuf],
) -> (Option<i32>, String) {
    let arguments =
        std::iter::once("act".to_owned()).chain(words.iter().cloned()).map(Argument::Text).collect();
    let mut config = config(behind, own(), arguments);
    config.readable.extend_from_slice(readable);
    config
        .descriptors
        .extend(file.map(|file| OpenOptions::new().write(true).open(file).expect("opened").into()));
    finish(config)
}

/// Runs what a configuration says to its end: exit code and last words.
fn finish(config: JailConfig) -> (Option<i32>, String) {
    runtime().block_on(async {
        let process = jail::spawn(config).await.expect("the jail is set up");
        let ended = tokio::time::timeout(LIMIT, process.wait()).await;
        process.kill();
        let ended = ended.expect("it ends");
        (ended.status.and_then(|status| status.code()), ended.errors)
    })
}

/// What the program opens for writing is readable to it, and no more.
fn what_is_opened_is_read_only(host: &Host) -> u32 {
    use Behind::{NoNamespaces, Whole};
    let given = host.state.join("memory");
    fs::write(&given, "given").expect("written");
    let mut failures = 0;
    for behind in [Whole, NoNamespaces] {
        let words = ["act", "memory"].map(|word| Argument::Text(word.to_owned()));
        let mut config = config(behind, own(), words.to_vec());
        config.opened = Some(File::open(&given).expect("opened"));
        let (code, words) = finish(config);
        if code != Some(0) {
            say(&format!("FAILED: what is opened, behind {behind:?}: {code:?} {words}"));
            failures += 1;
        }
    }
    assert_eq!(fs::read(&given).expect("read"), b"given", "it was changed");
    fs::remove_file(given).expect("removed");
    failures
}

/// The other half of the proof: the guarded program does run, and reads the file it is given.
fn what_is_given_works(host: &Host) -> u32 {
    use Behind::{Landlock, Limits, Namespaces, NoNamespaces, NoNewPrivileges, OwnUid, SystemCalls, Whole};
    let given = host.state.join("given");
    fs::write(&given, "given").expect("written");
    fs::set_permissions(&given, PermissionsExt::from_mode(0o644)).expect("readable");
    let mut failures = 0;
    for behind in [Whole, NoNamespaces, Namespaces, Landlock, OwnUid, NoNewPrivileges, SystemCalls, Limits] {
        let words = ["act", "read"].map(|word| Argument::Text(word.to_owned()));
        let arguments = words.into_iter().chain([Argument::Reopen(0)]).collect();
        let mut config = config(behind, own(), arguments);
        config.descriptors.push(File::open(&given).expect("opened").into());
        let (code, words) = finish(config);
        if code != Some(0) {
            say(&format!("FAILED: reading what is given, behind {behind:?}: {code:?} {words}"));
            failures += 1;
        }
    }
    say("read what is given: works behind each");
    failures + a_private_device_works(host)
}

/// A device that only root may use, for a machine that is not root: `/dev/kvm` where no udev gave it away.
fn a_private_device_works(host: &Host) -> u32 {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    let device = host.state.join("null");
    if mknodat(CWD, &device, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, makedev(1, 3)).is_err() {
        say("NOT TRIED: a device that only root may use, which root has to make");
        return 0;
    }
    let path = device.to_str().expect("a plain path").to_owned();
    let arguments = ["act".to_owned(), "open".to_owned(), path].map(Argument::Text).into();
    let mut config = config(Behind::Whole, own(), arguments);
    config.devices.push(device);
    let (code, words) = finish(config);
    if code == Some(0) {
        say("open a device that only root may use: works if it is given");
        return 0;
    }
    say(&format!("FAILED: a device that only root may use: {code:?} {words}"));
    1
}

/// QEMU's own filter, without any wall of ours: told to run a command, it dies; without the filter, it runs it.
fn qemu_cannot_spawn(host: &Host) -> u32 {
    let mut failures = 0;
    for (sandboxed, expected) in [(true, Some(SIGSYS)), (false, None)] {
        let made = host.state.join(format!("spawned-{sandboxed}"));
        let signal = spawn_from_qemu(sandboxed, &made);
        if signal != expected || made.exists() == sandboxed {
            say(&format!(
                "FAILED: spawning from QEMU, filter {sandboxed}: signal {signal:?}, {}",
                made.exists()
            ));
            failures += 1;
        }
    }
    say("spawn from QEMU: works without its filter, kills it with it");
    failures
}

/// The signal QEMU died of, if it did.
fn spawn_from_qemu(sandboxed: bool, made: &Path) -> Option<i32> {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    ours.set_read_timeout(Some(LIMIT)).expect("a limit");
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio"]);
    if sandboxed {
        qemu.args(["-sandbox", SANDBOX]);
    }
    let theirs_too = theirs.try_clone().expect("a handle");
    let mut qemu = qemu
        .stdin(OwnedFd::from(theirs))
        .stdout(OwnedFd::from(theirs_too))
        .stderr(Stdio::null())
        .spawn()
        .expect("QEMU starts");
    // What is still held here would keep the reader waiting after QEMU's end.
    let mut lines = BufReader::new(ours.try_clone().expect("a handle")).lines();
    let command = format!("exec:echo > {}; cat > /dev/null", made.display());
    let ask = |words: String| writeln!(&ours, "{words}");
    let _ = ask("{\"execute\":\"qmp_capabilities\"}".to_owned());
    let _ = ask(format!("{{\"execute\":\"migrate\",\"arguments\":{{\"uri\":\"{command}\"}}}}"));
    // The greeting and two answers, or its end.
    for _ in 0..3 {
        if !matches!(lines.next(), Some(Ok(_))) {
            break;
        }
    }
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    let status = loop {
        if let Some(status) = qemu.try_wait().expect("a status") {
            break Some(status);
        }
        if made.exists() || std::time::Instant::now() > deadline {
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    if status.is_none() {
        let _ = qemu.kill();
        let _ = qemu.wait();
    }
    status.and_then(|status| status.signal())
}

fn nothing_is_left() -> u32 {
    let name = format!("agentkernel-jail-{}", std::process::id());
    let files = ["/tmp", "/dev/shm"].map(|folder| Path::new(folder).join(&name));
    let children = format!("/proc/self/task/{}/children", std::process::id());
    let children = fs::read_to_string(children).unwrap_or_default();
    if files.iter().any(|file| file.exists()) || !children.trim().is_empty() {
        say(&format!("FAILED: left behind: {files:?} or processes {children}"));
        return 1;
    }
    0
}

// ---- as whom ----

fn all() -> ExitCode {
    let permissions = fs::Permissions::from_mode(0o755);
    let place =
        tempfile::Builder::new().permissions(permissions).tempdir_in("/var/tmp").expect("a directory");
    // Where any uid can execute it.
    let program = place.path().join("jail");
    fs::copy(own(), &program).expect("a copy");
    if !is_root() {
        return exit(Command::new(&program).arg("acts").arg(place.path()));
    }
    let set_uid = place.path().join("set-uid");
    fs::copy(own(), &set_uid).expect("a copy");
    fs::set_permissions(&set_uid, fs::Permissions::from_mode(0o4755)).expect("set-uid");
    say("as root");
    let as_root = exit(Command::new(&program).arg("acts").arg(place.path()));
    say("as an unprivileged user");
    std::os::unix::fs::chown(place.path(), Some(NOBODY), Some(NOBODY)).expect("handed over");
    let (uid, gid) = (NOBODY.to_string(), NOBODY.to_string());
    let mut other = Command::new("setpriv");
    other
        .args(["--reuid", &uid, "--regid", &gid, "--clear-groups"])
        .arg(&program)
        .arg("acts")
        .arg(place.path());
    let as_other = exit(other.current_dir("/"));
    let left: Vec<_> =
        fs::read_dir(place.path()).expect("the place").flatten().map(|it| it.file_name()).collect();
    assert_eq!(left.len(), 2, "left behind: {left:?}");
    if as_root == ExitCode::SUCCESS { as_other } else { as_root }
}

fn exit(command: &mut Command) -> ExitCode {
    let success = command.status().expect("it starts").success();
    if success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
