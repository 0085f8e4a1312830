//! Snapshots: taken of sandboxes that run and that rest, restored in place and as others, refused where they do not fit.

use std::fs;

use serde_json::Value;

use crate::host::Host;
use crate::living::exec;

fn create(host: &Host, name: &str, flags: &[&str]) {
    let words: Vec<&str> = ["create", name, "-q", "--memory", "512M"].iter().chain(flags).copied().collect();
    host.agentkernel(&words).expect(0);
}

#[test]
fn a_sandbox_is_as_it_was() {
    let host = Host::new();
    host.write("file.txt", "of the host\n");
    create(&host, "dev", &[]);
    // Memory, processes, disk and workspace.
    exec(
        &host,
        "dev",
        "echo before > file.txt; echo before > /root/x; mkdir -p /tmp/memory; mount -t tmpfs t /tmp/memory; echo kept > /tmp/memory/x",
    );
    host.agentkernel(&["exec", "-d", "dev", "--", "sleep", "1000"]).expect(0);
    let id = exec(&host, "dev", "cat /etc/machine-id");
    let said = host.agentkernel(&["snapshot", "take", "dev", "s", "--json"]);
    let taken: Value = serde_json::from_str(said.expect(0)).unwrap();
    assert_eq!((taken["sandbox"].as_str(), taken["memory"].as_bool()), (Some("dev"), Some(true)));
    exec(&host, "dev", "echo after > file.txt; rm /root/x; umount /tmp/memory; pkill sleep");
    // In place: everything is as it was, and it is the same sandbox.
    let uuid = |name| -> String {
        let info: Value =
            serde_json::from_str(host.agentkernel(&["info", name, "--json"]).expect(0)).unwrap();
        info["uuid"].as_str().unwrap().to_owned()
    };
    let before = uuid("dev");
    assert_eq!(host.agentkernel(&["snapshot", "restore", "s"]).expect(0), "dev\n");
    assert_eq!(
        exec(&host, "dev", "cat file.txt /root/x /tmp/memory/x; pgrep -c sleep"),
        "before\nbefore\nkept\n1\n"
    );
    assert_eq!((exec(&host, "dev", "cat /etc/machine-id"), uuid("dev")), (id.clone(), before));
    assert!(host.agentkernel(&["diff", "dev"]).expect(0).contains("+before"));
    // As another one, with an identity of its own; also once the first is gone.
    host.agentkernel(&["rm", "--force", "dev"]).expect(0);
    host.agentkernel(&["snapshot", "restore", "s", "--as", "other"]).expect(0);
    assert_eq!(exec(&host, "other", "cat /root/x /tmp/memory/x; hostname"), "before\nkept\nother\n");
    assert_ne!(exec(&host, "other", "cat /etc/machine-id"), id);
    let said = host.agentkernel(&["snapshot", "restore", "s", "--as", "other"]);
    said.expect(1);
    assert!(said.stderr.contains("there is a sandbox called other already"), "{}", said.stderr);
    // Its disk alone: as after a power cut.
    host.agentkernel(&["snapshot", "restore", "s", "--disk-only", "--as", "third"]).expect(0);
    host.agentkernel(&["start", "third"]).expect(0);
    assert_eq!(exec(&host, "third", "ls /tmp; pgrep -c sleep || true").lines().last(), Some("0"));
    let listed = host.agentkernel(&["snapshot", "list"]);
    assert!(listed.expect(0).contains("memory and disk"), "{}", listed.expect_any());
    let said = host.agentkernel(&["snapshot", "take", "other", "s"]);
    said.expect(1);
    assert!(said.stderr.contains("there is a snapshot called s already"), "{}", said.stderr);
    // What it was restored into stays.
    host.agentkernel(&["snapshot", "rm", "s"]).expect(0);
    assert_eq!(exec(&host, "other", "cat /root/x"), "before\n");
    host.agentkernel(&["snapshot", "restore", "s"]).expect(1);
    host.agentkernel(&["rm", "--force", "--all"]).expect(0);
}

#[test]
fn a_stopped_sandbox_and_machines_that_do_not_fit() {
    let host = Host::new();
    create(&host, "dev", &["--workspace", "none"]);
    exec(&host, "dev", "echo one > /root/x");
    host.agentkernel(&["stop", "dev"]).expect(0);
    let said = host.agentkernel(&["snapshot", "take", "dev", "rest"]);
    said.expect(0);
    assert!(said.stderr.contains("is stopped: its disk"), "{}", said.stderr);
    host.agentkernel(&["start", "dev"]).expect(0);
    exec(&host, "dev", "echo two > /root/x; sync");
    host.agentkernel(&["snapshot", "take", "dev", "live"]).expect(0);
    host.agentkernel(&["snapshot", "restore", "rest"]).expect(0);
    assert!(host.agentkernel(&["list"]).expect(0).contains("stopped"));
    host.agentkernel(&["start", "dev"]).expect(0);
    assert_eq!(exec(&host, "dev", "cat /root/x"), "one\n");
    // Of another kernel: refused, typed, and nothing was given up.
    let record = host.state().join("snapshots/live/machine.json");
    let text = fs::read_to_string(&record).unwrap();
    let fingerprint: Value = serde_json::from_str(&text).unwrap();
    let kernel = fingerprint["fingerprint"]["kernel"].as_str().unwrap();
    fs::write(&record, text.replace(kernel, &"0".repeat(64))).unwrap();
    let said = host.agentkernel(&["snapshot", "restore", "live"]);
    said.expect(1);
    assert!(said.stderr.contains("another guest kernel"), "{}", said.stderr);
    assert!(said.stderr.contains("--disk-only"), "{}", said.stderr);
    assert_eq!(exec(&host, "dev", "cat /root/x"), "one\n");
    host.agentkernel(&["snapshot", "restore", "live", "--disk-only"]).expect(0);
    host.agentkernel(&["start", "dev"]).expect(0);
    assert_eq!(exec(&host, "dev", "cat /root/x"), "two\n");
    // Damaged: refused as well.
    fs::write(&record, text).unwrap();
    fs::File::options()
        .write(true)
        .open(host.state().join("snapshots/live/memory"))
        .unwrap()
        .set_len(1)
        .unwrap();
    let said = host.agentkernel(&["snapshot", "restore", "live", "--as", "other"]);
    said.expect(1);
    assert!(said.stderr.contains("is damaged"), "{}", said.stderr);
    for name in ["-x", "a/b", "..", ""] {
        assert_ne!(host.agentkernel(&["snapshot", "take", "dev", "--", name]).code(), 0, "{name}");
        assert_ne!(host.agentkernel(&["snapshot", "rm", "--", name]).code(), 0, "{name}");
    }
    host.agentkernel(&["rm", "--force", "--all"]).expect(0);
    host.agentkernel(&["snapshot", "rm", "rest", "live"]).expect(0);
}

/// Guards that disk and memory are of one moment: what was synced is whole, and the file system is sound.
#[test]
fn a_snapshot_under_heavy_writes() {
    let host = Host::new();
    create(&host, "dev", &["--workspace", "none"]);
    let writer = "mkdir -p /data; i=0; while :; do i=$((i+1)); head -c 200000 /dev/urandom > /data/$i; \
        sync /data/$i; sha256sum /data/$i >> /data/sums; sync /data/sums; [ $i -lt 400 ] || i=0; done";
    host.agentkernel(&["exec", "-d", "-u", "root", "dev", "--", "sh", "-c", writer]).expect(0);
    exec(&host, "dev", "until [ $(wc -l < /data/sums 2>/dev/null || echo 0) -ge 20 ]; do sleep 0.1; done");
    host.agentkernel(&["snapshot", "take", "dev", "busy"]).expect(0);
    host.agentkernel(&["rm", "--force", "dev"]).expect(0);
    // With its memory: the writer goes on, and everything it had written is right.
    host.agentkernel(&["snapshot", "restore", "busy", "--as", "live"]).expect(0);
    let check = "head -n -1 /data/sums > /tmp/sums; sort -k2 -u /tmp/sums > /dev/null; sha256sum -c --quiet /tmp/sums && wc -l < /tmp/sums";
    let lines: u32 = exec(&host, "live", check).trim().parse().unwrap();
    assert!(lines >= 19, "{lines}");
    // Its disk alone, as after a power cut: what was synced is there.
    host.agentkernel(&["snapshot", "restore", "busy", "--disk-only", "--as", "cut"]).expect(0);
    host.agentkernel(&["start", "cut"]).expect(0);
    let lines: u32 = exec(&host, "cut", check).trim().parse().unwrap();
    assert!(lines >= 18, "{lines}");
    host.agentkernel(&["rm", "--force", "--all"]).expect(0);
    host.agentkernel(&["snapshot", "rm", "busy"]).expect(0);
}
