//! What a command sees and how it ends.

use crate::host::{Host, is_root};

#[test]
fn a_command_runs_in_a_machine_of_its_own() {
    let host = Host::new();
    host.write("hello.py", "import os, sys\nprint('hello from', os.getcwd(), sys.version_info[0])\n");
    let script = "uname -r; hostname; id -u; echo $HOME; pwd; cat /proc/1/comm; ls /proc/[0-9]* -d | wc -l; \
                  echo \"$GREETING\"; python3 hello.py; date +%s; cat /etc/machine-id; cat /etc/hostname; \
                  test -w /tmp && test -w . && echo writable; ls -d /sys/class/net/*";
    let said = host.sh(&["-n", "my-box", "-e", "GREETING=good day"], script);
    let lines: Vec<&str> = said.expect(0).lines().collect();
    let host_kernel = rustix::system::uname().release().to_str().unwrap().to_owned();
    assert_ne!(lines[0], host_kernel);
    assert_eq!(lines[1], "my-box");
    assert_eq!(lines[2], rustix::process::geteuid().as_raw().to_string());
    assert_eq!(lines[3], host.home().to_str().unwrap());
    assert_eq!(lines[4], host.project().to_str().unwrap());
    assert_ne!(lines[5], "systemd");
    assert!(lines[6].parse::<u32>().unwrap() < 100, "more processes than a fresh machine has: {}", lines[6]);
    assert_eq!(lines[7], "good day");
    assert_eq!(lines[8], format!("hello from {} 3", host.project().display()));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(
        lines[9].parse::<u64>().unwrap().abs_diff(now) < 30,
        "the guest's clock says {}, the host's {now}",
        lines[9]
    );
    assert_eq!(lines[10].len(), 32);
    assert_ne!(Some(lines[10]), std::fs::read_to_string("/etc/machine-id").ok().as_deref().map(str::trim));
    assert_eq!(lines[11], "my-box");
    assert_eq!(lines[12], "writable");
    assert_eq!(lines[13..], ["/sys/class/net/eth0", "/sys/class/net/lo"]);
    assert_eq!(said.stderr, "");
}

#[test]
fn exit_codes_are_the_commands_own_or_tell_why_there_is_none() {
    let host = Host::new();
    let none = ["--workspace", "none"];
    host.sh(&none, "exit 42").expect(42);
    host.sh(&none, "kill -9 $$").expect(137);
    let said = host.agentkernel(&["run", "--workspace", "none", "--", "no-such-command"]);
    said.expect(127);
    assert!(said.stderr.contains("no-such-command") && said.stderr.contains("hint:"), "{}", said.stderr);
    let said = host.agentkernel(&["run", "--workspace", "none", "--", "/etc/passwd"]);
    said.expect(126);
    let said = host.agentkernel(&[
        "run",
        "--timeout",
        "2s",
        "--workspace",
        "none",
        "--",
        "sh",
        "-c",
        "sleep 600 & sleep 600",
    ]);
    said.expect(124);
    assert!(said.stderr.contains("--timeout"), "{}", said.stderr);
    host.agentkernel(&["run", "-w", "/no/such/place", "--workspace", "none", "--", "true"]).expect(125);
    host.agentkernel(&["run", "-u", "no-such-user", "--workspace", "none", "--", "true"]).expect(125);
}

#[test]
fn flags_shape_the_machine() {
    let host = Host::new();
    let flags = [
        "--vcpus",
        "3",
        "--memory",
        "384M",
        "--disk",
        "256M",
        "-u",
        "nobody",
        "-w",
        "/usr",
        "--workspace",
        "none",
    ];
    let said = host.sh(&flags, "nproc; grep MemTotal /proc/meminfo; df -m / | tail -1; id -un; pwd");
    let lines: Vec<&str> = said.expect(0).lines().collect();
    assert_eq!(lines[0], "3");
    let memory: u64 = lines[1].split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((300 << 10..384 << 10).contains(&memory), "{memory} KiB");
    let disk: u64 = lines[2].split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((200..=256).contains(&disk), "{disk} MiB");
    assert_eq!(lines[3], "nobody");
    assert_eq!(lines[4], "/usr");
}

#[test]
fn limits_that_are_reached_are_named_and_end_nothing_else() {
    let host = Host::new();
    let said = host.agentkernel(&[
        "run",
        "--memory",
        "192M",
        "--workspace",
        "none",
        "--",
        "python3",
        "-c",
        "x = bytearray(1 << 30)",
    ]);
    assert_ne!(said.code(), 0);
    let hog = "x = []\nwhile True: x.append(bytearray(b'x' * (8 << 20)))";
    let said =
        host.agentkernel(&["run", "--memory", "192M", "--workspace", "none", "--", "python3", "-c", hog]);
    assert_ne!(said.code(), 0);
    assert!(said.stderr.contains("--memory"), "{}", said.stderr);
    let fill = "dd if=/dev/zero of=/var/tmp/big bs=1M 2>&1 | grep -o 'No space left on device'; echo still here; \
                rm -f /var/tmp/big; dd if=/dev/zero of=/var/tmp/small bs=1M count=1 2>/dev/null && echo room again";
    let said = host.sh(&["--disk", "64M", "--workspace", "none", "-u", "root"], fill);
    assert_eq!(said.expect(0), "No space left on device\nstill here\nroom again\n");
}

#[test]
fn json_carries_everything() {
    let host = Host::new();
    host.write("a.txt", "old");
    let script = "echo out; echo err >&2; printf new > a.txt; printf '\\377' > b.bin; exit 3";
    let said = host.agentkernel(&["run", "--json", "--", "sh", "-c", script]);
    let value: serde_json::Value = serde_json::from_str(said.expect(3)).unwrap();
    assert_eq!(value["exit_code"], 3);
    assert_eq!(value["stdout"], "out\n");
    assert_eq!(value["stderr"], "err\n");
    assert_eq!(value["timed_out"], false);
    assert_eq!(value["changes"]["added"], 1);
    assert_eq!(value["changes"]["modified"], 1);
    assert_eq!(said.stderr, "");
    let said = host.agentkernel(&["run", "--json", "--workspace", "none", "--", "printf", "\\377"]);
    let value: serde_json::Value = serde_json::from_str(said.expect(0)).unwrap();
    assert_eq!(value["stdout"]["hex"], "ff");
}

#[test]
fn the_machine_is_explained_once_on_stderr() {
    let host = Host::new();
    let said = host.agentkernel(&["run", "--", "true"]);
    said.expect(0);
    assert_eq!(said.stderr.lines().count(), 1, "{}", said.stderr);
    assert!(said.stderr.contains("host image") && said.stderr.contains("copy-on-write"), "{}", said.stderr);
}

#[test]
fn root_in_the_guest_is_asked_for_or_inherited() {
    let host = Host::new();
    let said =
        host.sh(&["-u", "root", "--workspace", "none"], "id -u; touch /etc/made-by-root && echo may write");
    assert_eq!(said.expect(0), "0\nmay write\n");
    if !is_root() {
        let said =
            host.sh(&["--workspace", "none"], "id -u; touch /etc/made 2>/dev/null || echo may not write");
        assert!(said.expect(0).ends_with("may not write\n"));
    }
}
