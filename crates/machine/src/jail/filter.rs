//! The system calls the guarded program never gets.
//!
//! What landlock can deny depends on its version: Debian 12's knows neither TCP nor signals, none knows UDP or sockets
//! with a path. A list of what is denied, and not of what is allowed, because the allowed calls are QEMU's and its
//! libraries' affair: QEMU adds a filter of its own (`-sandbox`). A denied call fails with EPERM.

use std::collections::BTreeMap;

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

/// Puts the filter in place. Last of all walls: setting the others up takes calls that it denies.
pub(super) fn system_calls(walls: &mut Walls) {
    walls.build(Wall::SystemCalls, || {
        let filter = program(std::process::id()).map_err(|error| format!("make the filter: {error}"))?;
        seccompiler::apply_filter(&filter)
            .map_err(|error| -> Failure { format!("apply the filter: {error}") })?;
        Ok(format!("{} denied", DENIED.len() + OWN_PROCESS_ONLY.len()))
    });
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
