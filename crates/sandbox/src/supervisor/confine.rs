//! The supervisor confines itself before it reads the guest's first byte.
//!
//! What is left to it: reading what the guest may read, writing its own directory (and the workspace where that is
//! shared read-write), no TCP, no new programs, no privileges but those that serving files needs. The network's thread is
//! the exception, the other way round: sockets of the internet's protocols, no file and no privilege at all. Threads share
//! their memory, so whoever takes one over may get the other to work for it; what no thread may do is out of reach. Layers
//! that the host's kernel lacks are left out; `doctor` says which hold.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

/// Newest landlock interface known here; older kernels get what they have.
const LANDLOCK: ABI = ABI::V6;
/// What the kernel calls a thread whose system calls are filtered.
const FILTER_MODE: u64 = 2;
/// How long a thread that is ending, or beginning, may be seen without a filter.
const THREADS_PATIENCE: Duration = Duration::from_secs(1);

/// What the supervisor needs to reach.
#[derive(Clone, Debug, Default)]
pub(super) struct Reach {
    /// Trees that are served read-only.
    pub read: Vec<PathBuf>,
    /// Trees that are served read-write.
    pub write: Vec<PathBuf>,
    /// The sandbox's own directory.
    pub own: PathBuf,
}

/// Confines this thread, and every thread and process started from it; and makes sure that no thread of this process is
/// left without a filter. Each confines itself, for they do not get the same: the network's makes sockets.
///
/// # Errors
/// A text for people. The caller must not go on: an unconfined supervisor is a silently weaker one.
pub(super) fn confine(reach: &Reach) -> Result<(), String> {
    let filters_before = Filtered::of("/proc/thread-self/status")?;
    privileges()?;
    filter(supervisor_filter())?;
    // Landlock closes /proc to this thread.
    let deadline = Instant::now() + THREADS_PATIENCE;
    while let Err(unfiltered) = all_filtered(&filters_before) {
        if Instant::now() > deadline {
            return Err(unfiltered);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    landlock(reach).map_err(|error| format!("landlock: {error}"))?;
    drop_capabilities(SERVING)
}

/// Confines this thread and every thread started from it: for those that watch the machine, and exist before the others.
///
/// # Errors
/// As for [`confine`].
pub(super) fn confine_thread(reach: &Reach) -> Result<(), String> {
    privileges()?;
    filter(supervisor_filter())?;
    landlock(reach).map_err(|error| format!("landlock: {error}"))?;
    drop_capabilities(SERVING)
}

/// Confines the network's thread: it makes sockets of the internet's protocols, and reaches nothing else, no file, no other
/// process, no other kind of socket. What it writes and listens on is open already.
///
/// # Errors
/// As for [`confine`].
pub(super) fn confine_network() -> Result<(), String> {
    privileges()?;
    network_landlock().map_err(|error| format!("landlock: {error}"))?;
    drop_capabilities(CapabilitySet::empty())?;
    filter(network_filter())
}

fn privileges() -> Result<(), String> {
    rustix::thread::set_no_new_privs(true).map_err(|error| format!("no_new_privs: {error}"))
}

/// How a thread is filtered, as the kernel says.
#[derive(Debug, PartialEq, Eq)]
struct Filtered {
    no_new_privileges: bool,
    mode: u64,
    /// How many filters it has; kernels before 5.9 do not say.
    filters: Option<u64>,
}

impl Filtered {
    fn of(path: impl AsRef<Path>) -> Result<Self, String> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let number = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.and_then(|value| value.trim().parse::<u64>().ok())
        };
        Self {
            no_new_privileges: number("NoNewPrivs") == Some(1),
            mode: number("Seccomp").unwrap_or(0),
            filters: number("Seccomp_filters"),
        }
    }

    /// Whether there is one more than `before`: a container's own filter is not ours.
    fn is_confined(&self, before: &Self) -> bool {
        let more = match (self.filters, before.filters) {
            (Some(now), Some(before)) => now > before,
            _ => true,
        };
        self.no_new_privileges && self.mode == FILTER_MODE && more
    }
}

/// Makes sure that every thread of this process is filtered.
fn all_filtered(before: &Filtered) -> Result<(), String> {
    let threads = std::fs::read_dir("/proc/self/task").map_err(|error| format!("threads: {error}"))?;
    for thread in threads {
        let path = thread.map_err(|error| format!("threads: {error}"))?.path();
        match Filtered::of(path.join("status")) {
            Ok(filtered) if filtered.is_confined(before) => {}
            // Ended meanwhile.
            Err(_) if !path.exists() => {}
            Ok(_) => {
                let name = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
                return Err(format!("the thread {} is not filtered", name.trim()));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn landlock(reach: &Reach) -> Result<(), RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::AbstractUnixSocket)?
        .create()?;
    // The root of the served view is listed, and so is the way down to a toolchain: names only, no content.
    rules = allow(rules, Path::new("/"), AccessFs::ReadDir.into())?;
    for path in &reach.read {
        rules = allow(rules, path, read)?;
    }
    for path in &reach.write {
        rules = allow(rules, path, AccessFs::from_all(LANDLOCK) & !AccessFs::Execute)?;
    }
    rules = allow(rules, &reach.own, AccessFs::from_all(LANDLOCK) & !AccessFs::Execute)?;
    if let Some(parent) = reach.own.parent() {
        // To remove its own, then empty, directory.
        rules = allow(rules, parent, AccessFs::RemoveDir.into())?;
    }
    rules = allow(rules, Path::new("/dev/null"), AccessFs::ReadFile | AccessFs::WriteFile)?;
    // Descriptors of files to serve are reopened through here; the target's own rule decides.
    rules = allow(rules, Path::new("/proc/self/fd"), AccessFs::ReadDir.into())?;
    rules.restrict_self()?;
    Ok(())
}

fn allow(
    rules: landlock::RulesetCreated,
    path: &Path,
    access: landlock::BitFlags<AccessFs>,
) -> Result<landlock::RulesetCreated, RulesetError> {
    let Ok(descriptor) = PathFd::new(path) else { return Ok(rules) };
    let access = if path.is_dir() { access } else { access & AccessFs::from_file(LANDLOCK) };
    rules.add_rule(PathBeneath::new(descriptor, access))
}

/// Nothing of the file system, and no process but this one; TCP is what it is for.
fn network_landlock() -> Result<(), RulesetError> {
    let rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?;
    rules.restrict_self()?;
    Ok(())
}

/// Denied in every thread: other processes, new programs, and what would undo a wall.
const DENIED: [i64; 13] = [
    libc::SYS_tkill,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_io_uring_setup,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_bpf,
    libc::SYS_userfaultfd,
];

/// Allowed for this process alone: a panic raises its own signal.
const OWN_PROCESS_ONLY: [i64; 4] =
    [libc::SYS_kill, libc::SYS_tgkill, libc::SYS_rt_sigqueueinfo, libc::SYS_rt_tgsigqueueinfo];

/// What the supervisor's other threads have no use for. Landlock denies neither sockets by path nor UDP (a session bus, a
/// container engine). The control socket is open already, and the machine is ended through a descriptor.
const DENIED_SERVING: [i64; 2] = [libc::SYS_socket, libc::SYS_connect];

/// What the network's thread has no use for, besides sockets of other families: files, which landlock denies as well, and
/// signals by descriptor.
const DENIED_NETWORK: [i64; 11] = [
    libc::SYS_socketpair,
    libc::SYS_listen,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_creat,
    libc::SYS_open_by_handle_at,
    libc::SYS_memfd_create,
    libc::SYS_pidfd_send_signal,
    libc::SYS_mount,
    libc::SYS_keyctl,
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn common_rules(denied: &[i64]) -> Result<Rules, BackendError> {
    let mut rules: Rules = DENIED.iter().chain(denied).map(|call| (*call, Vec::new())).collect();
    let other = differs(0, u64::from(std::process::id()))?;
    for call in OWN_PROCESS_ONLY {
        rules.insert(call, vec![SeccompRule::new(vec![other.clone()])?]);
    }
    Ok(rules)
}

fn differs(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, value)
}

fn supervisor_filter() -> Result<Rules, BackendError> {
    common_rules(&DENIED_SERVING)
}

/// Sockets are TCP and UDP, over IPv4 and IPv6.
fn network_filter() -> Result<Rules, BackendError> {
    let mut rules = common_rules(&DENIED_NETWORK)?;
    let among = |argument, values: &[i32]| {
        let differing = values.iter().map(|value| differs(argument, u64::from(value.unsigned_abs())));
        SeccompRule::new(differing.collect::<Result<_, _>>()?)
    };
    let families = among(0, &[libc::AF_INET, libc::AF_INET6])?;
    let protocols = among(2, &[0, libc::IPPROTO_TCP, libc::IPPROTO_UDP])?;
    rules.insert(libc::SYS_socket, vec![families, protocols]);
    Ok(rules)
}

/// Filters the system calls of this thread and of those it starts.
fn filter(rules: Result<Rules, BackendError>) -> Result<(), String> {
    let apply = || -> Result<(), seccompiler::Error> {
        let rules = rules?;
        let denied = SeccompAction::Errno(libc::EPERM.cast_unsigned());
        let filter =
            SeccompFilter::new(rules, SeccompAction::Allow, denied, std::env::consts::ARCH.try_into()?)?;
        let program: BpfProgram = filter.try_into()?;
        seccompiler::apply_filter(&program)
    };
    apply().map_err(|error| format!("system call filter: {error}"))
}

/// What serving a foreign user's workspace and ending the machine (which has a user id of its own) need.
const SERVING: CapabilitySet = CapabilitySet::DAC_OVERRIDE
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::KILL);

fn drop_capabilities(needed: CapabilitySet) -> Result<(), String> {
    let drop = || {
        let kept = rustix::thread::capabilities(None)?.permitted & needed;
        let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
        rustix::thread::set_capabilities(None, sets)
    };
    drop().map_err(|error: rustix::io::Errno| format!("capabilities: {error}"))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{ErrorKind, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_networks_thread_has_sockets_and_nothing_else() {
        let before = Filtered::of("/proc/thread-self/status").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        let mut record = File::create(&path).unwrap();
        let parent = rustix::process::getppid().unwrap();
        let thread = std::thread::spawn(move || {
            confine_network().unwrap();
            TcpStream::connect(address).unwrap();
            UdpSocket::bind("127.0.0.1:0").unwrap();
            record.write_all(b"written").unwrap();
            record.set_len(4).unwrap();
            let denied = |result: std::io::Result<()>, what: &str| {
                let error = result.expect_err(what);
                assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{what}: {error}");
            };
            let socket = |family, kind, protocol| {
                rustix::net::socket(family, kind, protocol).map(drop).map_err(Into::into)
            };
            use rustix::net::{AddressFamily, SocketType, ipproto};
            denied(UnixStream::connect("/run/x").map(drop), "a socket by path");
            denied(UnixStream::pair().map(drop), "a pair of sockets");
            denied(socket(AddressFamily::NETLINK, SocketType::RAW, None), "netlink");
            denied(socket(AddressFamily::PACKET, SocketType::DGRAM, None), "packets");
            denied(socket(AddressFamily::INET, SocketType::DGRAM, Some(ipproto::ICMP)), "ICMP");
            denied(TcpListener::bind("127.0.0.1:0").map(drop), "listening");
            denied(File::open("/dev/null").map(drop), "a file");
            denied(File::create(path.with_file_name("new")).map(drop), "a new file");
            denied(std::process::Command::new("/bin/true").status().map(drop), "a program");
            denied(rustix::process::test_kill_process(parent).map_err(Into::into), "a signal");
            let pidfd = rustix::process::pidfd_open(parent, rustix::process::PidfdFlags::empty());
            denied(pidfd.map(drop).map_err(Into::into), "another process");
            assert!(rustix::thread::capabilities(None).unwrap().permitted.is_empty());
            // What it starts gets the same.
            std::thread::spawn(move || denied(File::open("/dev/null").map(drop), "a file")).join().unwrap();
            path
        });
        let path = thread.join().expect("the network's thread");
        assert_eq!(std::fs::read(path).unwrap(), b"writ");
        // This thread is as it was, and found out.
        assert_eq!(Filtered::of("/proc/thread-self/status").unwrap(), before);
        assert!(all_filtered(&before).unwrap_err().contains("is not filtered"));
    }

    #[test]
    fn a_filter_of_somebody_elses_is_not_ours() {
        let status = |privileges, mode, filters: &str| {
            Filtered::parse(&format!("Name:\tx\nNoNewPrivs:\t{privileges}\nSeccomp:\t{mode}\n{filters}"))
        };
        let container = status(0, 2, "Seccomp_filters:\t1\n");
        assert!(status(1, 2, "Seccomp_filters:\t2\n").is_confined(&container));
        for other in [
            status(1, 2, "Seccomp_filters:\t1\n"),
            status(0, 2, "Seccomp_filters:\t2\n"),
            status(1, 0, "Seccomp_filters:\t2\n"),
            Filtered::parse(""),
        ] {
            assert!(!other.is_confined(&container), "{other:?}");
        }
        let old = status(0, 0, "");
        assert!(status(1, 2, "").is_confined(&old) && !old.is_confined(&old));
    }
}
