//! Each act the jail denies, tried from inside it, and tried outside with success.
//!
//! This program is three things: the runner, the launcher whose verb enters the jail, and the probe that runs inside and
//! writes what it could do to a pipe. Run by root it tries everything again as an unprivileged user.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use agentkernel_machine::jail::{self, Argument, JailConfig, Limits, Wall};

const NOBODY: &str = "64124";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some(jail::VERB) => jail::main(),
        Some("probe") => probe(&arguments.collect::<Vec<_>>()),
        Some("all") => all(&PathBuf::from(arguments.next().expect("a directory"))),
        Some("supervisor") => supervisor(&PathBuf::from(arguments.next().expect("a directory"))),
        Some("--list") => ExitCode::SUCCESS,
        _ => everyone(),
    }
}

fn say(line: &str) {
    let _ = writeln!(io::stderr(), "jail: {line}");
}

fn everyone() -> ExitCode {
    let own = std::env::current_exe().expect("our own path");
    let place = tempfile::Builder::new()
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir_in("/var/tmp")
        .expect("a directory");
    let program = place.path().join("jail");
    fs::copy(&own, &program).expect("a copy of this program");
    let state = place.path().join("state");
    fs::create_dir(&state).expect("a state directory");
    if rustix::process::geteuid().is_root() {
        let setuid = place.path().join("id-setuid");
        fs::copy("/usr/bin/id", &setuid).expect("a copy of id");
        fs::set_permissions(&setuid, fs::Permissions::from_mode(0o4755)).expect("set-uid");
    }
    let mut ok = run(Command::new(&program).arg("all").arg(&state));
    if rustix::process::geteuid().is_root() {
        say("again, as an unprivileged user");
        fs::remove_dir_all(&state).expect("removed");
        fs::create_dir(&state).expect("a state directory");
        assert!(run(Command::new("chown").arg(NOBODY).arg(&state)));
        let mut command = Command::new("setpriv");
        command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]).arg(&program);
        ok &= run(command.arg("all").arg(&state).env("HOME", &state));
    }
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(command: &mut Command) -> bool {
    command.current_dir("/").status().expect("the command starts").success()
}

/// What the probe tries, and whether it came through.
type Results = BTreeMap<String, bool>;

/// What there is to reach, kept alive while the probe tries.
struct World {
    state: PathBuf,
    tcp: TcpListener,
    _abstract: UnixListener,
    _pathname: UnixListener,
    victim: Child,
    name: String,
}

impl World {
    fn new(state: &Path) -> Self {
        let secret = state.join("secret");
        fs::write(&secret, "secret").expect("a secret");
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).expect("private");
        fs::create_dir_all(state.join(".ssh")).expect("a directory");
        fs::write(state.join(".ssh/id"), "key").expect("a key");
        let name = format!("agentkernel-jail-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        Self {
            state: state.to_owned(),
            tcp: TcpListener::bind("127.0.0.1:0").expect("a listener"),
            _abstract: UnixListener::bind_addr(&address).expect("an abstract listener"),
            _pathname: UnixListener::bind(state.join("socket")).expect("a listener"),
            victim: Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().expect("a victim"),
            name,
        }
    }

    fn arguments(&self) -> Vec<String> {
        vec![
            "probe".to_owned(),
            self.state.display().to_string(),
            self.tcp.local_addr().expect("an address").port().to_string(),
            self.name.clone(),
            self.victim.id().to_string(),
        ]
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.victim.kill();
        let _ = self.victim.wait();
        for name in ["secret", "socket", "written"] {
            let _ = fs::remove_file(self.state.join(name));
        }
        let _ = fs::remove_dir_all(self.state.join(".ssh"));
    }
}

/// Runs as the guarded program: tries everything, writes the results to descriptor 3.
fn probe(arguments: &[String]) -> ExitCode {
    let [state, port, name, victim] = arguments else { return ExitCode::from(2) };
    let state = Path::new(state);
    let mut results = Results::new();
    let mut note = |what: &str, came_through: bool| {
        results.insert(what.to_owned(), came_through);
    };
    let victim = victim.parse().ok().and_then(rustix::process::Pid::from_raw).expect("a process");

    note("read shadow", fs::read("/etc/shadow").is_ok());
    note("read passwd", fs::read("/etc/passwd").is_ok());
    note("read ssh key", fs::read(state.join(".ssh/id")).is_ok());
    note("read 0600 file", fs::read(state.join("secret")).is_ok());
    note("list state", fs::read_dir(state).is_ok());
    note("write state", fs::write(state.join("written"), "x").is_ok());
    let scratch = format!("/tmp/agentkernel-jail-test-{}", std::process::id());
    note("write tmp", fs::write(&scratch, "x").is_ok());
    let _ = fs::remove_file(&scratch);
    note("connect tcp", TcpStream::connect(("127.0.0.1", port.parse().expect("a port"))).is_ok());
    note("bind tcp", TcpListener::bind("127.0.0.1:0").is_ok());
    let address = SocketAddr::from_abstract_name(name).expect("a name");
    note("connect abstract socket", UnixStream::connect_addr(&address).is_ok());
    note("connect socket file", UnixStream::connect(state.join("socket")).is_ok());
    note("signal", rustix::process::test_kill_process(victim).is_ok());
    note(
        "open memory of process",
        OpenOptions::new().read(true).open(format!("/proc/{}/mem", arguments[3])).is_ok(),
    );
    note("see environment of process", fs::read(format!("/proc/{}/environ", arguments[3])).is_ok());
    note("trace process", trace(victim));
    note("raise limit", raise_limit());
    note("dump core", rustix::process::getrlimit(rustix::process::Resource::Core).maximum != Some(0));
    note(
        "open device",
        ["/dev/mem", "/dev/kmsg", "/dev/tty0", "/dev/fuse", "/dev/net/tun", "/dev/zero"]
            .iter()
            .any(|path| File::open(path).is_ok()),
    );
    note("open /dev/null", OpenOptions::new().write(true).open("/dev/null").is_ok());
    // The first step of mounting, which needs the same right and changes nothing: outside it succeeds for root.
    note("mount", rustix::mount::fsopen("tmpfs", rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC).is_ok());
    note(
        "run a program of the host",
        Command::new("/usr/bin/true").status().is_ok_and(|status| status.success()),
    );
    note("gain privileges", gains_privileges(state));
    note("see environment", std::env::vars_os().next().is_some());
    note("see other descriptors", sees_descriptors());

    // SAFETY: the runner passes a pipe as this descriptor; nothing else owns it.
    let mut out = unsafe { File::from_raw_fd(jail::FIRST_DESCRIPTOR) };
    let _ = out.write_all(&serde_json::to_vec(&results).expect("results"));
    ExitCode::SUCCESS
}

fn trace(victim: rustix::process::Pid) -> bool {
    const PTRACE: i64 = 101;
    const SEIZE: usize = 0x4206;
    unsafe extern "C" {
        fn syscall(number: i64, ...) -> i64;
    }
    // SAFETY: PTRACE_SEIZE takes no pointer; the victim is our own child process, and this probe ends soon.
    unsafe { syscall(PTRACE, SEIZE, victim.as_raw_nonzero().get() as usize, 0_usize, 0_usize) == 0 }
}

fn raise_limit() -> bool {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let more = getrlimit(Resource::Nofile).maximum.map(|most| most + 1);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: more, maximum: more }).is_ok();
    // Outside only root may raise it, and lowering is no proof: then the control is having more than the jail allows.
    raised || more.is_none_or(|more| more > 129)
}

/// Runs the set-uid program that root put beside the state directory; without root there is none, and only the flag is
/// looked at.
fn gains_privileges(state: &Path) -> bool {
    let program = state.with_file_name("id-setuid");
    match Command::new(program).arg("-u").output() {
        Ok(output) => output.stdout == b"0\n",
        Err(_) => !rustix::thread::no_new_privs().unwrap_or(false),
    }
}

fn sees_descriptors() -> bool {
    (jail::FIRST_DESCRIPTOR + 1..200).any(|number| {
        // SAFETY: only asked for its flags; a number that is not open is an error.
        let descriptor = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
        rustix::io::fcntl_getfd(descriptor).is_ok()
    })
}

fn outside(world: &World) -> Results {
    let (reader, writer) = io::pipe().expect("a pipe");
    let own = std::env::current_exe().expect("our own path");
    // Descriptor 3 without unsafe code: a shell moves its standard output there.
    let script = "exec 3>&1 1>/dev/null; exec \"$0\" \"$@\"";
    let mut child = Command::new("sh");
    child.args(["-c", script]).arg(own).args(world.arguments()).env("VISIBLE", "1").stdout(writer);
    let mut child = child.spawn().expect("the probe starts");
    drop_command_and_read(reader, || assert!(child.wait().expect("the probe ends").success()))
}

fn drop_command_and_read(mut reader: io::PipeReader, wait: impl FnOnce()) -> Results {
    wait();
    let mut bytes = vec![0; 64 << 10];
    let count = reader.read(&mut bytes).expect("results");
    serde_json::from_slice(&bytes[..count]).expect("results")
}

fn config(
    program: PathBuf,
    arguments: Vec<String>,
    descriptors: Vec<OwnedFd>,
    without: Vec<Wall>,
) -> JailConfig {
    let readable = ["/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/lib", "/lib64"].map(PathBuf::from);
    JailConfig {
        launcher: std::env::current_exe().expect("our own path"),
        program: Some(program),
        arguments: arguments.into_iter().map(Argument::Text).collect(),
        descriptors,
        readable: readable.into_iter().filter(|path| path.exists() && !path.is_symlink()).collect(),
        devices: vec![PathBuf::from("/dev/null")],
        identity: None,
        limits: Limits {
            file_size_bytes: 1 << 20,
            address_space_bytes: None,
            open_files: 128,
            processes: 32,
        },
        without,
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn inside(world: &World, without: &[Wall]) -> Results {
    let (reader, writer) = io::pipe().expect("a pipe");
    let own = std::env::current_exe().expect("our own path");
    let mut config = config(own, world.arguments(), vec![writer.into()], without.to_vec());
    let setuid = world.state.with_file_name("id-setuid");
    config.readable.extend(setuid.exists().then_some(setuid));
    runtime().block_on(async {
        let jailed = jail::spawn(config).await.expect("the jail is entered");
        for layer in jailed.layers() {
            assert_eq!(layer.holds, !without.contains(&layer.wall), "{layer:?}");
        }
        let ended = jailed.wait().await;
        assert!(ended.status.is_some_and(|status| status.success()), "{ended:?}");
    });
    drop_command_and_read(reader, || {})
}

/// What even root may not do from inside, whichever of the walls is left out.
const DENIED: &[&str] = &[
    "read shadow",
    "read passwd",
    "read ssh key",
    "read 0600 file",
    "list state",
    "write state",
    "write tmp",
    "connect tcp",
    "bind tcp",
    "connect abstract socket",
    "connect socket file",
    "signal",
    "open memory of process",
    "see environment of process",
    "trace process",
    "raise limit",
    "dump core",
    "open device",
    "mount",
    "run a program of the host",
    "gain privileges",
    "see environment",
    "see other descriptors",
];

fn all(state: &Path) -> ExitCode {
    let root = rustix::process::geteuid().is_root();
    let control = outside(&World::new(state));
    let unprivileged = ["read shadow", "mount"];
    for act in DENIED {
        let rootless = !root && unprivileged.contains(act);
        let possible = control.get(*act).copied();
        // What this host or user cannot do outside either proves nothing inside; these few must be possible.
        let optional = ["see other descriptors", "open device", "mount"].contains(act);
        assert!(
            possible == Some(true) || rootless || optional,
            "{act} is not possible outside: {possible:?}"
        );
    }
    // All walls; then each of the two that a host may lack left out, so that the other is seen to hold alone.
    let namespaces = [Wall::NetworkNamespace, Wall::IpcNamespace, Wall::MountNamespace];
    let arrangements: [(&str, &[Wall], &[&str]); 3] = [
        ("all walls", &[], &[]),
        // Before ABI 9 landlock says nothing about socket files, and a network namespace lets bind what nobody reaches.
        ("without namespaces", &namespaces, &["connect socket file"]),
        ("without landlock", &[Wall::Landlock], &["bind tcp", "signal", "trace process"]),
    ];
    for (name, without, excepted) in arrangements {
        let results = inside(&World::new(state), without);
        let through: Vec<_> = DENIED
            .iter()
            .filter(|act| results.get(**act) != Some(&false) && !excepted.contains(act))
            .collect();
        assert!(through.is_empty(), "{name}: came through: {through:?}");
        assert_eq!(results.get("open /dev/null"), Some(&true), "{name}: what is allowed works");
        say(&format!("{name}: {} acts denied", DENIED.len() - excepted.len()));
    }
    limits_hold(state);
    dies_with_its_supervisor(state);
    assert_eq!(fs::read_dir(state).expect("the state directory").count(), 0, "something is left");
    ExitCode::SUCCESS
}

/// A program that fails to start is an error with its reason, and no process.
fn limits_hold(state: &Path) {
    let program = state.join("not-a-program");
    fs::write(&program, "nothing").expect("written");
    let error = runtime().block_on(jail::spawn(config(program.clone(), Vec::new(), Vec::new(), Vec::new())));
    let error = error.expect_err("it is no program").to_string();
    assert!(error.contains("start"), "{error}");
    fs::remove_file(program).expect("removed");
}

/// Waits inside, with a pipe whose end tells of its death.
fn supervisor(state: &Path) -> ExitCode {
    let own = std::env::current_exe().expect("our own path");
    let sleep = config(PathBuf::from("/usr/bin/sleep"), vec!["600".to_owned()], Vec::new(), Vec::new());
    let _ = (own, state);
    runtime().block_on(async {
        let jailed = jail::spawn(sleep).await.expect("the jail is entered");
        let _ = writeln!(io::stdout(), "{}", jailed.pid());
        jailed.wait().await;
    });
    ExitCode::SUCCESS
}

fn dies_with_its_supervisor(state: &Path) {
    let own = std::env::current_exe().expect("our own path");
    let mut supervisor =
        Command::new(own).arg("supervisor").arg(state).stdout(Stdio::piped()).spawn().expect("a supervisor");
    let mut line = String::new();
    let mut output = io::BufReader::new(supervisor.stdout.take().expect("piped"));
    io::BufRead::read_line(&mut output, &mut line).expect("a line");
    let process = PathBuf::from(format!("/proc/{}", line.trim()));
    assert!(process.exists(), "nothing runs in the jail");
    supervisor.kill().expect("killed");
    supervisor.wait().expect("ended");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while process.exists() {
        assert!(std::time::Instant::now() < deadline, "the jailed process outlives its supervisor");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
