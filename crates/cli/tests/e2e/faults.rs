//! Whatever dies, nothing is left: no process, no socket, no directory; and whoever is left says what happened.

use std::fs;

use rustix::process::Signal;

use crate::host::{Host, Running, is_root, signal};

fn started(host: &Host) -> Running {
    let script = "echo ready; sleep 600 & sleep 600";
    let mut run = Running::start(host.command(&["run", "-q", "--", "sh", "-c", script]));
    assert_eq!(run.line(), "ready\n");
    assert_eq!(host.sandboxes().len(), 1);
    run
}

#[test]
fn the_client_is_killed() {
    let host = Host::new();
    let run = started(&host);
    signal(run.child.id(), Signal::KILL);
    assert_eq!(run.end().0, 1009);
    host.assert_nothing_is_left();

    // While the machine boots, too.
    let run = Running::start(host.command(&["run", "-q", "--", "true"]));
    host.wait_for_process("qemu");
    signal(run.child.id(), Signal::KILL);
    run.end();
    host.assert_nothing_is_left();
}

#[test]
fn the_supervisor_is_killed() {
    let host = Host::new();
    let run = started(&host);
    signal(host.supervisor(), Signal::KILL);
    let (code, _, stderr) = run.end();
    assert_eq!(code, 125);
    assert!(stderr.contains("supervisor was killed"), "{stderr}");
    host.assert_nothing_is_left();
}

#[test]
fn client_and_supervisor_are_killed_and_the_next_command_sweeps() {
    let host = Host::new();
    let run = started(&host);
    let supervisor = host.supervisor();
    signal(run.child.id(), Signal::STOP);
    signal(supervisor, Signal::KILL);
    signal(run.child.id(), Signal::KILL);
    run.end();
    assert_eq!(host.sandboxes().len(), 1);
    // What a process that died while making a sandbox leaves.
    fs::create_dir(host.state().join("sandboxes/.new-half")).unwrap();
    fs::create_dir(host.state().join("trash/old")).unwrap();
    host.agentkernel(&["run", "-q", "--workspace", "none", "--", "true"]).expect(0);
    host.assert_nothing_is_left();
}

#[test]
fn the_machine_is_killed() {
    let host = Host::new();
    let run = started(&host);
    let machine = host.wait_for_process("qemu");
    if is_root() {
        let owner = fs::metadata(format!("/proc/{machine}")).unwrap();
        assert_ne!(std::os::unix::fs::MetadataExt::uid(&owner), 0, "the machine runs as root");
    }
    signal(machine, Signal::KILL);
    let (code, _, stderr) = run.end();
    assert_eq!(code, 125);
    assert!(stderr.contains("the machine ended"), "{stderr}");
    host.assert_nothing_is_left();
}

#[test]
fn the_guests_kernel_panics() {
    let host = Host::new();
    let script = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 600";
    let said = host.sh(&["-u", "root", "--workspace", "none"], script);
    said.expect(125);
    assert!(said.stderr.contains("panic") && said.stderr.contains("sysrq"), "{}", said.stderr);
}

#[test]
fn guest_root_destroys_the_agent() {
    let host = Host::new();
    // Overwrites the agent's memory; if the kernel forbids that, kills it by the debugger.
    let script = "
import re, os
for line in open('/proc/1/maps'):
    start, end = (int(part, 16) for part in line.split()[0].split('-'))
    if 'w' in line.split()[1] and '[v' not in line:
        with open('/proc/1/mem', 'r+b', buffering=0) as memory:
            memory.seek(start)
            try: memory.write(b'\\xff' * (end - start))
            except OSError: pass
import time; time.sleep(600)";
    let said =
        host.agentkernel(&["run", "-q", "-u", "root", "--workspace", "none", "--", "python3", "-c", script]);
    said.expect(125);
    assert!(said.stderr.contains("error:"), "{}", said.stderr);
}

#[test]
fn guest_root_writes_garbage_on_the_agents_port() {
    let host = Host::new();
    let script = "
import os, glob, time
# The agent holds the port open; its own descriptor is within root's reach.
for fd in os.listdir('/proc/1/fd'):
    path = '/proc/1/fd/' + fd
    try: target = os.readlink(path)
    except OSError: continue
    if 'vport' in target:
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        pidfd = libc.syscall(434, 1, 0)
        mine = libc.syscall(438, pidfd, int(fd), 0)
        if mine >= 0:
            for _ in range(64):
                try: os.write(mine, os.urandom(65536))
                except BlockingIOError: time.sleep(0.01)
time.sleep(600)";
    let said =
        host.agentkernel(&["run", "-q", "-u", "root", "--workspace", "none", "--", "python3", "-c", script]);
    said.expect(125);
    assert!(said.stderr.contains("error:"), "{}", said.stderr);
}
