//! Whatever is killed, and whenever: a sandbox is there whole or not at all, can be started again, and leaves nothing.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::host::{Host, Running, copy_tree, is_root, prepared_cache, signal, wait};
use crate::living::exec;

fn quiet(mut command: Command) -> Child {
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Runs a command and kills it after so long.
fn killed_after(host: &Host, arguments: &[&str], time: Duration) {
    let mut child = quiet(host.command(arguments));
    std::thread::sleep(time);
    // It may be done already: that is one of the instants.
    let _ = child.kill();
    wait(&mut child);
}

/// Whatever state a sandbox was left in: it can be used or made, and it can be removed.
#[track_caller]
fn assert_usable_and_remove(host: &Host, name: &str) {
    let there = !host.agentkernel(&["info", name]).expect_any().is_empty();
    if !there {
        host.agentkernel(&["create", name, "--workspace", "none"]).expect(0);
    }
    host.agentkernel(&["start", name]).expect(0);
    assert_eq!(exec(host, name, "echo fine"), "fine\n");
    host.agentkernel(&["rm", "--force", name]).expect(0);
    // The machine of a template that was being made goes with the next sweep.
    host.agentkernel(&["gc"]).expect(0);
    host.assert_nothing_is_left();
}

#[test]
fn one_name_is_claimed_by_two_at_the_same_instant() {
    let host = Host::new();
    for round in 0..8 {
        let create =
            || Running::start(host.command(&["create", "same", "--no-start", "--workspace", "none"]));
        let both = [create(), create()];
        let [(first, _, said), (second, _, other)] = both.map(Running::end);
        assert_eq!([first, second].iter().filter(|code| **code == 0).count(), 1, "{round}: {said} {other}");
        let loser = if first == 0 { other } else { said };
        assert!(loser.contains("already"), "{loser}");
        host.agentkernel(&["rm", "same"]).expect(0);
    }
}

#[test]
fn supervisor_and_machine_are_killed_during_an_exec() {
    let host = Host::new();
    host.agentkernel(&["create", "dev", "--workspace", "none"]).expect(0);
    exec(&host, "dev", "echo kept > /kept; sync");
    for (victim, word) in [("__supervise", "supervisor was killed"), ("qemu", "the machine ended")] {
        let mut run =
            Running::start(host.command(&["exec", "-q", "dev", "--", "sh", "-c", "echo ready; sleep 600"]));
        assert_eq!(run.line(), "ready\n");
        let pid = if victim == "qemu" { host.wait_for_process("qemu") } else { host.supervisor() };
        signal(pid, Signal::KILL);
        let (code, _, stderr) = run.end();
        assert_eq!(code, 125, "{stderr}");
        assert!(stderr.contains(word) && stderr.contains("agentkernel start dev"), "{stderr}");
        let deadline = Instant::now() + Duration::from_secs(15);
        while !host.processes().is_empty() {
            assert!(Instant::now() < deadline, "{:?}", host.processes());
            std::thread::sleep(Duration::from_millis(50));
        }
        host.agentkernel(&["start", "dev"]).expect(0);
        assert_eq!(exec(&host, "dev", "cat /kept"), "kept\n");
    }
    host.agentkernel(&["rm", "-f", "dev"]).expect(0);
}

#[test]
fn the_client_is_killed_at_any_step_of_making_a_sandbox() {
    let host = Host::new();
    for step in 0..16 {
        let arguments = ["create", "dev", "--no-start", "--workspace", "none", "-q"];
        killed_after(&host, &arguments, Duration::from_millis(step * 4));
        if !host.agentkernel(&["info", "dev"]).expect_any().is_empty() {
            host.agentkernel(&["rm", "dev"]).expect(0);
        }
        host.agentkernel(&arguments).expect(0);
        host.agentkernel(&["rm", "dev"]).expect(0);
    }
    host.assert_nothing_is_left();
    // And while its machine boots.
    for milliseconds in [100, 900, 2500] {
        killed_after(
            &host,
            &["create", "dev", "--workspace", "none", "-q"],
            Duration::from_millis(milliseconds),
        );
        assert_usable_and_remove(&host, "dev");
    }
}

#[test]
fn clients_and_supervisors_are_killed_at_any_step_of_start_stop_and_removal() {
    let host = Host::new();
    host.agentkernel(&["create", "dev", "--workspace", "none"]).expect(0);
    exec(&host, "dev", "echo kept > /kept");
    for milliseconds in [5, 60, 300] {
        killed_after(&host, &["stop", "dev"], Duration::from_millis(milliseconds));
        // Told once, it stops whoever asked; told too late, it runs on.
        host.agentkernel(&["stop", "dev"]).expect(0);
        killed_after(&host, &["start", "dev"], Duration::from_millis(milliseconds * 8));
        host.agentkernel(&["start", "dev"]).expect(0);
        assert_eq!(exec(&host, "dev", "cat /kept"), "kept\n");
    }
    for milliseconds in [0, 30, 90] {
        let mut stop = quiet(host.command(&["stop", "dev"]));
        std::thread::sleep(Duration::from_millis(milliseconds));
        for (pid, _) in host.processes().into_iter().filter(|(_, name)| name.starts_with("agentkernel")) {
            if pid != stop.id() {
                let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
        wait(&mut stop);
        let mut start = quiet(host.command(&["start", "dev"]));
        std::thread::sleep(Duration::from_millis(milliseconds * 10));
        signal(host.supervisor(), Signal::KILL);
        wait(&mut start);
        host.agentkernel(&["start", "dev"]).expect(0);
        assert_eq!(exec(&host, "dev", "cat /kept"), "kept\n");
    }
    // A start while it stops waits for that, and brings it back.
    let mut stop = quiet(host.command(&["stop", "dev"]));
    std::thread::sleep(Duration::from_millis(25));
    host.agentkernel(&["start", "dev"]).expect(0);
    wait(&mut stop);
    host.agentkernel(&["start", "dev"]).expect(0);
    assert_eq!(exec(&host, "dev", "cat /kept"), "kept\n");
    // Two at once, each told that it is so.
    host.agentkernel(&["stop", "dev"]).expect(0);
    for verb in ["start", "stop"] {
        let mut both = [quiet(host.command(&[verb, "dev"])), quiet(host.command(&[verb, "dev"]))];
        for child in &mut both {
            assert_eq!(wait(child).code(), Some(0), "two at once: {verb}");
        }
    }
    host.agentkernel(&["start", "dev"]).expect(0);
    killed_after(&host, &["rm", "--force", "dev"], Duration::from_millis(8));
    assert_usable_and_remove(&host, "dev");
}

#[test]
fn an_apply_is_killed_and_the_next_one_takes_the_rest() {
    let host = Host::new();
    host.agentkernel(&["create", "dev"]).expect(0);
    exec(&host, "dev", "for i in $(seq 300); do echo $i > f$i; done");
    for milliseconds in [150, 250, 400] {
        killed_after(&host, &["apply", "dev"], Duration::from_millis(milliseconds));
    }
    host.agentkernel(&["apply", "dev"]).expect(0);
    for number in 1..=300 {
        assert_eq!(host.read(&format!("f{number}")), format!("{number}\n"));
    }
    let strays = fs::read_dir(host.project()).unwrap().flatten();
    let strays =
        strays.filter(|entry| entry.file_name().to_string_lossy().starts_with(".agentkernel-")).count();
    assert_eq!(strays, 0);
    assert_eq!(host.agentkernel(&["diff", "dev", "--name-only"]).expect(0), "");
    host.agentkernel(&["rm", "-f", "dev"]).expect(0);
}

#[test]
fn versions_meet_on_one_state_directory() {
    let host = Host::new();
    fs::write(host.state().join("version"), "99\n").unwrap();
    let said = host.agentkernel(&["list"]);
    said.expect(1);
    assert!(said.stderr.contains("upgrade agentkernel"), "{}", said.stderr);
    // The layout before this one had nothing that is not in this one.
    fs::write(host.state().join("version"), "1\n").unwrap();
    host.agentkernel(&["list"]).expect(0);
    assert_eq!(fs::read_to_string(host.state().join("version")).unwrap(), "2\n");

    host.agentkernel(&["create", "dev", "--workspace", "none"]).expect(0);
    let live = host.state().join("sandboxes/dev/live.json");
    let text = fs::read_to_string(&live).unwrap();
    fs::write(&live, text.replace("\"protocol\":", "\"protocol\":7")).unwrap();
    let said = host.agentkernel(&["exec", "dev", "--", "true"]);
    said.expect(125);
    assert!(
        said.stderr.contains("was started by agentkernel") && said.stderr.contains("--force"),
        "{}",
        said.stderr
    );
    host.agentkernel(&["stop", "dev"]).expect(1);
    host.agentkernel(&["stop", "--force", "dev"]).expect(0);
    host.agentkernel(&["start", "dev"]).expect(0);
    host.agentkernel(&["exec", "dev", "--", "true"]).expect(0);
    host.agentkernel(&["rm", "-f", "dev"]).expect(0);
}

#[test]
fn a_state_directory_with_a_path_longer_than_a_sockets() {
    let host = Host::new();
    let deep = host.path().join("d".repeat(90)).join("e".repeat(90)).join("state");
    fs::create_dir_all(&deep).unwrap();
    copy_tree(&prepared_cache(), &deep.join("cache"));
    let run = |arguments: &[&str]| {
        let mut command = host.command(arguments);
        command.env("AGENTKERNEL_HOME", &deep);
        crate::host::finish(command, b"")
    };
    run(&["create", "dev", "--workspace", "none"]).expect(0);
    assert_eq!(run(&["exec", "dev", "--", "echo", "far"]).expect(0), "far\n");
    run(&["stop", "dev"]).expect(0);
    run(&["rm", "dev"]).expect(0);
    assert_eq!(
        fs::read_dir(deep.join("sandboxes"))
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_name() != ".lock")
            .count(),
        0
    );
}

/// A file system of its own at a directory of the host, gone with this value. Needs root.
pub(crate) struct Mounted(std::path::PathBuf);

impl Mounted {
    pub(crate) fn tmpfs(at: &std::path::Path, size: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        let options = format!("size={size},mode=700");
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(at).status();
        assert!(status.unwrap().success());
        Self(at.to_owned())
    }

    fn remount(&self, options: &str) {
        let status = Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.0).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn the_state_directory_cannot_be_written() {
    let host = Host::new();
    let create = |name| ["create", name, "--no-start", "--workspace", "none"];
    let mounted = is_root().then(|| {
        let kept = host.path().join("kept");
        fs::rename(host.state().join("cache"), &kept).unwrap();
        let mounted = Mounted::tmpfs(&host.state(), "400m");
        copy_tree(&kept, &host.state().join("cache"));
        mounted
    });
    host.agentkernel(&create("dev")).expect(0);
    match &mounted {
        Some(mounted) => mounted.remount("ro"),
        None => [host.state().join("sandboxes"), host.state()]
            .iter()
            .for_each(|path| crate::host::set_mode(path, 0o500)),
    }
    let said = host.agentkernel(&["list", "-q"]);
    assert_eq!(said.expect(0), "dev\n");
    let said = host.agentkernel(&create("other"));
    said.expect(1);
    assert!(said.stderr.contains("error: cannot"), "{}", said.stderr);
    assert!(!is_root() || said.stderr.contains("AGENTKERNEL_HOME"), "{}", said.stderr);
    match &mounted {
        Some(mounted) => mounted.remount("rw"),
        None => [host.state(), host.state().join("sandboxes")]
            .iter()
            .for_each(|path| crate::host::set_mode(path, 0o700)),
    }
    host.agentkernel(&["rm", "dev"]).expect(0);
    host.assert_nothing_is_left();
    drop(mounted);
}

/// Only root can make a disk that is full for the program alone; the run of these tests as root tries it.
#[test]
fn the_hosts_disk_is_full_during_stop_and_apply() {
    if !is_root() {
        return;
    }
    let host = Host::new();
    let cache = host.path().join("kept");
    fs::rename(host.state().join("cache"), &cache).unwrap();
    let state = Mounted::tmpfs(&host.state(), "400m");
    copy_tree(&cache, &host.state().join("cache"));
    let project = Mounted::tmpfs(&host.project(), "4m");
    host.write("big.txt", "small\n");
    host.agentkernel(&["create", "dev"]).expect(0);
    exec(
        &host,
        "dev",
        "echo kept > /kept; sync; head -c 3000000 /dev/urandom > big.txt; head -c 3000000 /dev/urandom > more",
    );
    let said = host.agentkernel(&["apply", "dev"]);
    said.expect(1);
    assert!(
        said.stderr.contains("No space left") || said.stderr.contains("storage space"),
        "{}",
        said.stderr
    );
    let big = fs::metadata(host.project().join("big.txt")).unwrap().len();
    assert!(big == 6 || big == 3_000_000, "{big}: old or new, nothing between");

    let fill = host.state().join("fill");
    let _ = Command::new("dd")
        .args(["if=/dev/zero", "bs=64k"])
        .arg(format!("of={}", fill.display()))
        .stderr(Stdio::null())
        .status();
    // The guest's writes fail, and it may say so; the sandbox still ends, and says nothing wrong.
    host.agentkernel(&["exec", "-q", "dev", "--", "sh", "-c", "head -c 50000000 /dev/urandom > /lost; sync"]);
    let said = host.agentkernel(&["stop", "dev"]);
    assert!(said.code() == 0 || said.stderr.contains("error:"), "{said:?}");
    fs::remove_file(&fill).unwrap();
    host.agentkernel(&["stop", "dev"]).expect(0);
    host.agentkernel(&["start", "dev"]).expect(0);
    assert_eq!(exec(&host, "dev", "cat /kept"), "kept\n");
    host.agentkernel(&["rm", "-f", "dev"]).expect(0);
    host.assert_nothing_is_left();
    drop((state, project));
}
