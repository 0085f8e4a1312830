//! Standard streams: apart, complete, with an end, and never in each other's way.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

use crate::host::{Host, Running, finish, signal};

#[test]
fn stdout_and_stderr_are_apart_and_stdin_ends() {
    let host = Host::new();
    let mut command =
        host.command(&["run", "-q", "--workspace", "none", "--", "sh", "-c", "cat; echo done >&2"]);
    command.stdin(Stdio::piped());
    let input: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
    let said = finish(command, &input);
    assert_eq!(said.code(), 0, "{}", said.stderr);
    assert!(said.stdout == input, "{} bytes came back of {}", said.stdout.len(), input.len());
    assert_eq!(said.stderr, "done\n");
}

#[test]
fn a_gibibyte_of_output_arrives_whole_in_little_memory() {
    let host = Host::new();
    let script = "import sys,os\nblock = bytes(range(256)) * 4096\nfor i in range(1024): sys.stdout.buffer.write(block)";
    let mut command = host.command(&["run", "-q", "--workspace", "none", "--", "python3", "-c", script]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut buffer = vec![0; 1 << 20];
    stdout.read_exact(&mut buffer[..1]).unwrap();
    let supervisor = host.supervisor();
    let idle = (peak_kib(child.id()), peak_kib(supervisor));
    // A reader that dawdles: what is on its way must wait in the guest.
    std::thread::sleep(Duration::from_secs(2));
    let mut total = 1u64;
    let mut expected = 1u8;
    let mut peak = (0, 0);
    loop {
        let count = stdout.read(&mut buffer).unwrap();
        if count == 0 {
            break;
        }
        for byte in &buffer[..count] {
            assert_eq!(*byte, expected, "after {total} bytes");
            expected = expected.wrapping_add(1);
        }
        total += count as u64;
        if total < (1 << 30) - (64 << 20) {
            peak = (peak_kib(child.id()), peak_kib(supervisor));
        }
    }
    assert_eq!(total, 1 << 30);
    assert!(crate::host::wait(&mut child).success());
    let grown = peak.0.saturating_sub(idle.0) + peak.1.saturating_sub(idle.1);
    assert!(grown < 64 << 10, "the host's processes grew by {grown} KiB, from {idle:?} to {peak:?}");
}

fn peak_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

#[test]
fn a_reader_that_goes_away_ends_the_command_as_a_pipe_would() {
    let host = Host::new();
    let mut run = Running::start(host.command(&["run", "-q", "--workspace", "none", "--", "yes"]));
    assert_eq!(run.line(), "y\n");
    drop(run.lines.take());
    let status = crate::host::wait(&mut run.child);
    assert_eq!(status.code(), Some(128 + 13));
}

#[test]
fn the_first_interrupt_reaches_the_command_and_the_second_ends_everything() {
    let host = Host::new();
    let script = "trap 'echo caught; exit 7' INT; echo ready; while :; do sleep 0.1; done";
    let mut run =
        Running::start(host.command(&["run", "-q", "--workspace", "none", "--", "sh", "-c", script]));
    assert_eq!(run.line(), "ready\n");
    signal(run.child.id(), rustix::process::Signal::INT);
    assert_eq!(run.line(), "caught\n");
    assert_eq!(run.end().0, 7);

    // A command that ignores it, with more input than it will ever read.
    let script = "trap '' INT; echo ready; sleep 600";
    let mut command = host.command(&["run", "-q", "--workspace", "none", "--", "sh", "-c", script]);
    command.stdin(Stdio::piped());
    let mut run = Running::start(command);
    assert_eq!(run.line(), "ready\n");
    let mut stdin = run.child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || while stdin.write_all(&[0; 4096]).is_ok() {});
    std::thread::sleep(Duration::from_millis(500));
    signal(run.child.id(), rustix::process::Signal::INT);
    std::thread::sleep(Duration::from_millis(300));
    signal(run.child.id(), rustix::process::Signal::INT);
    assert_eq!(run.end().0, 130);
    writer.join().unwrap();
    host.assert_nothing_is_left();
}

#[test]
fn background_children_do_not_hold_the_end_back() {
    let host = Host::new();
    let said = host.sh(&["--workspace", "none"], "sleep 600 & echo started; exit 5");
    assert_eq!(said.expect(5), "started\n");
}
