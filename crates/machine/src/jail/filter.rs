//! The system calls the guarded program never gets.
//!
//! What landlock can deny depends on its version: Debian 12's knows neither TCP nor signals, none knows UDP or sockets
//! with a path. A list of what is denied, and not of what is allowed, because the allowed calls are QEMU's and its
//! libraries' affair: QEMU adds a filter of its own (`-sandbox`). A denied call fails with EPERM.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use super::Wall;
use super::enter::{Failure, Walls};

/// Denied whatever their arguments.
const DENIED: &[i64] = &[
    // Sockets: the program's own arrive as descriptors.
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    // Other processes: their memory, descriptors and signals.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    libc::SYS_tkill,
    // Namespaces and mounts: a user namespace would give capabilities back.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_mount_setattr,
    // Parts of the kernel with a long history of holes and no use here.
    libc::SYS_add_key,
    libc::SYS_keyctl,
    libc::SYS_request_key,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_open_by_handle_at,
    libc::SYS_kexec_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
];

/// Allowed for the process itself, which signals its threads; its id stays the same when it becomes the program.
const OWN_PROCESS_ONLY: &[i64] =
    &[libc::SYS_kill, libc::SYS_tgkill, libc::SYS_rt_sigqueueinfo, libc::SYS_rt_tgsigqueueinfo];

/// Calls of the ABI that is called x32 have this bit in their number, and the architecture of all others.
const OTHER_ABI: u32 = 0x4000_0000;

/// Puts the filter in place. Last of all walls: setting the others up takes calls that it denies.
pub(super) fn system_calls(walls: &mut Walls) {
    walls.build(Wall::SystemCalls, || {
        let filter = program(std::process::id()).map_err(|error| format!("make the filter: {error}"))?;
        for filter in [filter, one_abi()] {
            seccompiler::apply_filter(&filter)
                .map_err(|error| -> Failure { format!("apply the filter: {error}") })?;
        }
        Ok(format!("{} denied", DENIED.len() + OWN_PROCESS_ONLY.len()))
    });
}

/// Denies what the other filter would not know by its number.
fn one_abi() -> BpfProgram {
    let statement = |code: u32, jf: u8, k: u32| seccompiler::sock_filter { code: code as u16, jt: 0, jf, k };
    vec![
        // The number comes first in `struct seccomp_data`.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 1, OTHER_ABI),
        statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs()),
        statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

/// Denied to a process that goes on as another: it has its program, and that one's own filter (QEMU's `-sandbox`) does not
/// come with it.
const NO_PROGRAMS: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_setpgid,
    libc::SYS_setsid,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setaffinity,
    libc::SYS_uselib,
    libc::SYS_ustat,
    libc::SYS_sysfs,
    libc::SYS__sysctl,
    libc::SYS_personality,
    libc::SYS_modify_ldt,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_syslog,
];

/// Puts that filter in place.
pub(super) fn no_programs() -> io::Result<()> {
    let apply = |filter: Result<SeccompFilter, seccompiler::BackendError>| {
        let program: BpfProgram = filter.and_then(TryInto::try_into).map_err(io::Error::other)?;
        seccompiler::apply_filter(&program).map_err(io::Error::other)
    };
    let threads = u64::from(libc::CLONE_THREAD.unsigned_abs());
    let process = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(threads), 0)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(io::Error::other)?;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        NO_PROGRAMS.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_clone, vec![process]);
    let denied = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    apply(SeccompFilter::new(rules, SeccompAction::Allow, denied, TargetArch::x86_64))?;
    // The kernel's end of the heap is not where the saved process has its own. This is what a heap that cannot grow answers, and
    // that one's memory then comes from elsewhere.
    let rules = BTreeMap::from([(libc::SYS_brk, Vec::new())]);
    apply(SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(0), TargetArch::x86_64))?;
    // Its arguments lie in memory, where a filter does not see them: the C library takes the older call then.
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let unknown = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    apply(SeccompFilter::new(rules, SeccompAction::Allow, unknown, TargetArch::x86_64))
}

fn program(own: u32) -> Result<BpfProgram, seccompiler::BackendError> {
    let other = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, u64::from(own))?;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = DENIED.iter().map(|call| (*call, Vec::new())).collect();
    for call in OWN_PROCESS_ONLY {
        rules.insert(*call, vec![SeccompRule::new(vec![other.clone()])?]);
    }
    let denied = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, denied, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::thread;

    #[test]
    fn without_programs_there_are_threads_and_nothing_else() {
        // A filter holds for the thread that puts it in place.
        let confined = thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).expect("no_new_privs");
            super::no_programs().expect("the filter");
            let started = Command::new("/bin/true").spawn().map(drop);
            let other = thread::spawn(|| 1).join().ok();
            // The call itself: the C library's function has all threads make it, and these are not of one mind.
            // SAFETY: it changes nothing.
            #[allow(unsafe_code)]
            let identity = unsafe { libc::syscall(libc::SYS_setuid, libc::getuid()) };
            // SAFETY: the kernel answers, and changes nothing.
            #[allow(unsafe_code)]
            let heap = unsafe { libc::syscall(libc::SYS_brk, 0) };
            let memory = vec![1_u8; 8 << 20].len();
            (started.map_err(|error| error.kind()), other, identity, heap, memory)
        });
        let (started, other, identity, heap, memory) = confined.join().expect("the thread");
        assert_eq!((heap, memory), (0, 8 << 20));
        assert_eq!(started, Err(std::io::ErrorKind::PermissionDenied));
        assert_eq!((other, identity), (Some(1), -1));
    }
}
