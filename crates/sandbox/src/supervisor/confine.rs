//! The supervisor confines itself before it reads the guest's first byte.
//!
//! What is left to it: reading what the guest may read, writing its own directory (and the workspace where that is
//! shared read-write), no TCP, no new programs, no privileges but those that serving files needs. Layers that the
//! host's kernel lacks are left out; `doctor` says which hold.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// Newest landlock interface known here; older kernels get what they have.
const LANDLOCK: ABI = ABI::V6;

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

/// Confines this thread and every thread and process started from it, and filters the system calls of all threads.
///
/// # Errors
/// A text for people. The caller must not go on: an unconfined supervisor is a silently weaker one.
pub(super) fn confine(reach: &Reach) -> Result<(), String> {
    confine_thread(reach)?;
    filter_system_calls().map_err(|error| format!("system call filter: {error}"))
}

/// Confines this thread and every thread started from it, but for the filter: for those that exist before the others.
///
/// # Errors
/// As for [`confine`].
pub(super) fn confine_thread(reach: &Reach) -> Result<(), String> {
    rustix::thread::set_no_new_privs(true).map_err(|error| format!("no_new_privs: {error}"))?;
    landlock(reach).map_err(|error| format!("landlock: {error}"))?;
    drop_capabilities().map_err(|error| format!("capabilities: {error}"))
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

/// Denies what landlock does not: sockets by path or UDP (a session bus, a container engine), and signals to others. The
/// control socket is open already, and the machine is ended through a descriptor. Holds for all threads, also for those
/// that watch the machine and were started before.
fn filter_system_calls() -> Result<(), seccompiler::Error> {
    let denied = [
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_pidfd_open,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_io_uring_setup,
        libc::SYS_execve,
        libc::SYS_execveat,
    ];
    let filter = SeccompFilter::new(
        denied.into_iter().map(|call| (call, Vec::new())).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM.cast_unsigned()),
        std::env::consts::ARCH.try_into()?,
    )?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter_all_threads(&program)
}

/// Keeps what serving a foreign user's workspace and ending the machine (which has a user id of its own) need.
fn drop_capabilities() -> rustix::io::Result<()> {
    let held = rustix::thread::capabilities(None)?;
    let needed = CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::DAC_READ_SEARCH
        | CapabilitySet::CHOWN
        | CapabilitySet::FOWNER
        | CapabilitySet::KILL;
    let kept = held.permitted & needed;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)
}
