//! Warm starts: templates are made once, used, and never trusted when something about them changed.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::host::{Host, Running, copy_tree, is_root, signal};
use crate::living::exec;
use crate::living_faults::Mounted;

/// Directories of the templates there are.
fn templates(host: &Host) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(host.state().join("templates")) else { return Vec::new() };
    let mut all: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    all.sort();
    all
}

fn inode(path: PathBuf) -> u64 {
    fs::metadata(path).unwrap().ino()
}

/// A shell in a small machine: what makes a template of another size than the shared one.
const SMALL: [&str; 6] = ["--memory", "256M", "--vcpus", "1", "--workspace", "none"];

#[test]
fn the_first_of_its_kind_makes_a_template_and_cold_ones_need_none() {
    let host = Host::without_templates();
    host.sh(&["--cold", "--workspace", "none"], "true").expect(0);
    assert_eq!(templates(&host), Vec::<PathBuf>::new());
    // Two at once: one makes it, both run.
    let start = || {
        let words = ["run", "-q"].into_iter().chain(SMALL).chain(["--", "cat", "/etc/machine-id"]);
        Running::start(host.command(&words.collect::<Vec<_>>()))
    };
    let (one, other) = (start(), start());
    let ((code, first, errors), (other_code, second, _)) = (one.end(), other.end());
    assert_eq!((code, other_code), (0, 0), "{errors}");
    assert_ne!(first, second, "two sandboxes of one template are not the same machine");
    let all = templates(&host);
    assert_eq!(all.len(), 1);
    let made = inode(all[0].join("memory"));
    // The next one uses it: a program that was never loaded before works, writes go to a disk of its own.
    let said = host.sh(
        &SMALL,
        "echo kept > /var/tmp/x && tr a-z A-Z < /var/tmp/x && cat /proc/sys/kernel/random/boot_id",
    );
    assert!(said.expect(0).starts_with("KEPT\n"), "{:?}", said.expect_any());
    host.sh(&SMALL, "test ! -e /var/tmp/x").expect(0);
    assert_eq!(inode(templates(&host)[0].join("memory")), made, "it was made again");
    let found = host.agentkernel(&["doctor", "--json"]);
    assert!(found.expect_any().contains("host (1 CPUs, 256M"), "{}", found.expect_any());
}

#[test]
fn a_template_that_was_touched_is_made_again() {
    let host = Host::new();
    host.sh(&SMALL, "true").expect(0);
    let directory = || {
        templates(&host)
            .into_iter()
            .find(|path| fs::metadata(path.join("memory")).is_ok_and(|data| data.len() == 256 << 20))
    };
    type Damage = (&'static str, fn(PathBuf));
    let damage: [Damage; 5] = [
        ("a changed memory", |path| {
            let memory = File::options().write(true).open(path.join("memory")).unwrap();
            memory.set_modified(SystemTime::now() - Duration::from_secs(1000)).unwrap();
        }),
        ("half of what its devices held", |path| {
            let devices = File::options().write(true).open(path.join("devices")).unwrap();
            devices.set_len(1000).unwrap();
        }),
        ("half of its process", |path| {
            let process = File::options().write(true).open(path.join("process")).unwrap();
            process.set_len(1 << 20).unwrap();
        }),
        ("no record", |path| fs::remove_file(path.join("machine.json")).unwrap()),
        ("another boot of the host", |path| {
            let about = fs::read_to_string(path.join("about.json")).unwrap();
            let host_boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
            let other = about.replace(host_boot.trim(), "01234567-0000-0000-0000-000000000000");
            assert_ne!(about, other);
            fs::write(path.join("about.json"), other).unwrap();
        }),
    ];
    for (what, damage) in damage {
        let path = directory().expect("a template");
        let before = inode(path.join("memory"));
        damage(path);
        assert_eq!(host.sh(&SMALL, "echo fine").expect(0), "fine\n", "{what}");
        assert_ne!(inode(directory().expect("a template").join("memory")), before, "{what}");
    }
    // Damage that nothing tells of: a process that does not go on is not used again, the rest of the template is.
    let path = directory().expect("a template");
    let before = inode(path.join("memory"));
    let damage = |file: PathBuf, at: u64| {
        let written = fs::metadata(&file).unwrap().modified().unwrap();
        let file = File::options().write(true).open(&file).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 4096], at).unwrap();
        file.set_modified(written).unwrap();
    };
    let process = path.join("process");
    damage(process.clone(), fs::metadata(&process).unwrap().len() - 4096);
    for _ in 0..2 {
        assert_eq!(host.sh(&SMALL, "echo fine").expect(0), "fine\n");
        assert!(!process.exists());
    }
    assert_eq!(inode(directory().expect("a template").join("memory")), before);
    // Then the machine does not come up, another is booted, and the next one is made.
    damage(path.join("devices"), 0);
    for _ in 0..2 {
        assert_eq!(host.sh(&SMALL, "echo fine").expect(0), "fine\n");
    }
    assert_ne!(inode(directory().expect("a template").join("memory")), before);
    // What is not used any more goes.
    let path = directory().expect("a template");
    fs::remove_file(path.join("machine.json")).unwrap();
    assert!(host.agentkernel(&["gc", "--dry-run"]).expect(0).contains("templates 1\n"));
    host.agentkernel(&["gc"]).expect(0);
    assert_eq!(directory(), None);
}

/// Guards that the emulator's translations are there from the first moment, and that its walls are.
#[test]
fn a_machine_goes_on_as_the_process_that_was_saved() {
    let host = Host::new();
    let process = |name: &str| {
        let info = host.agentkernel(&["info", name, "--json"]);
        let info: serde_json::Value = serde_json::from_str(info.expect(0)).unwrap();
        let directory = PathBuf::from(format!("/proc/{}", info["machine_pid"]));
        let status = fs::read_to_string(directory.join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("no {name}: {status}")).trim().to_owned()
        };
        let program = fs::read_link(directory.join("exe")).unwrap();
        assert_eq!(
            (field("NoNewPrivs"), field("Seccomp"), field("CapEff")),
            ("1".into(), "2".into(), format!("{:016x}", 0))
        );
        (
            program.file_name().unwrap().to_owned(),
            field("Name"),
            field("Seccomp_filters").parse::<u32>().unwrap(),
        )
    };
    host.agentkernel(&["create", "dev"]).expect(0);
    let (program, name, filters) = process("dev");
    // What the supervisor says of it, if it did not.
    let record = fs::read_to_string(host.state().join("sandboxes/dev/record")).unwrap_or_default();
    let saved = templates(&host).iter().map(|path| path.join("process").exists()).collect::<Vec<_>>();
    assert_eq!(
        (program.to_str(), name.as_str()),
        (Some("agentkernel"), "qemu-system-x86"),
        "{saved:?} {record}"
    );
    // Ours, and those in place of QEMU's own.
    assert_eq!(filters, 5);
    assert_eq!(exec(&host, "dev", "echo kept > /root/x; sync; python3 -c 'print(6 * 7)'"), "42\n");
    // Saved in its turn, and booted again.
    host.agentkernel(&["fork", "dev", "--as", "child"]).expect(0);
    assert_eq!(exec(&host, "child", "cat /root/x"), "kept\n");
    host.agentkernel(&["stop", "dev"]).expect(0);
    host.agentkernel(&["start", "dev"]).expect(0);
    assert_eq!(process("dev").0.to_str(), Some("qemu-system-x86_64"));
    assert_eq!(exec(&host, "dev", "cat /root/x"), "kept\n");
    host.agentkernel(&["rm", "--force", "dev", "child"]).expect(0);
}

/// Guards that a clone lives by the memory it has mapped, and not by the template's name.
#[test]
fn a_template_is_deleted_while_it_is_used() {
    let host = Host::new();
    host.agentkernel(&["create", "dev"]).expect(0);
    fs::remove_dir_all(host.state().join("templates")).unwrap();
    assert_eq!(exec(&host, "dev", "python3 -c 'print(6 * 7)'"), "42\n");
    host.agentkernel(&["fork", "dev", "--as", "child"]).expect(0);
    assert_eq!(exec(&host, "child", "python3 -c 'print(6 * 7)'"), "42\n");
    host.agentkernel(&["rm", "--force", "dev", "child"]).expect(0);
}

/// Only root can make a disk that is full for the program alone; the run of these tests as root tries it.
#[test]
fn the_disk_is_full_while_a_template_is_saved() {
    if !is_root() {
        return;
    }
    let host = Host::without_templates();
    let kept = host.path().join("kept");
    fs::rename(host.state().join("cache"), &kept).unwrap();
    // Room for the kernel and a sandbox, not for a machine's memory.
    let mounted = Mounted::tmpfs(&host.state(), "110m");
    copy_tree(&kept, &host.state().join("cache"));
    assert_eq!(host.sh(&SMALL, "echo cold").expect(0), "cold\n");
    assert_eq!(templates(&host), Vec::<PathBuf>::new());
    host.assert_nothing_is_left();
    drop(mounted);
    fs::remove_dir_all(&kept).unwrap();
}

#[test]
fn whoever_makes_a_template_is_killed() {
    let host = Host::without_templates();
    let words = ["run", "-q"].into_iter().chain(SMALL).chain(["--", "true"]).collect::<Vec<_>>();
    let running = Running::start(host.command(&words));
    host.wait_for_process("qemu-system");
    signal(running.child.id(), rustix::process::Signal::KILL);
    let _ = running.end();
    // The next one finds neither a lock nor a half-made one in its way.
    host.sh(&SMALL, "true").expect(0);
    assert_eq!(templates(&host).len(), 1);
    host.assert_nothing_is_left();
}

#[test]
fn templates_are_made_ahead() {
    let host = Host::without_templates();
    let context = host.project().join("image");
    fs::create_dir_all(context.join("bin")).unwrap();
    fs::copy("/bin/busybox", context.join("bin/busybox")).unwrap();
    std::os::unix::fs::symlink("busybox", context.join("bin/sh")).unwrap();
    fs::write(context.join("Dockerfile"), "FROM scratch\nCOPY bin /bin\n").unwrap();
    host.agentkernel(&["build", "-q", "-t", "tools", "image"]).expect(0);
    host.agentkernel(&["setup", "--warm", "host", "tools"]).expect(0);
    assert_eq!(templates(&host).len(), 2);
    let made: Vec<u64> = templates(&host).into_iter().map(|path| inode(path.join("memory"))).collect();
    host.sh(&[], "true").expect(0);
    let said = host.sh(&["--image", "tools", "--workspace", "none"], "echo $0");
    assert_eq!(said.expect(0), "sh\n");
    let now: Vec<u64> = templates(&host).into_iter().map(|path| inode(path.join("memory"))).collect();
    assert_eq!(made, now);
    let said = host.agentkernel(&["setup", "--warm", "./nowhere.tar"]);
    said.expect(1);
    assert!(said.stderr.contains("nowhere.tar"), "{}", said.stderr);
}

/// Guards the promise that no machine can change what others begin with, whatever it does to the descriptor it was given.
#[test]
fn a_machine_holds_its_template_for_reading_only() {
    let host = Host::new();
    host.agentkernel(&["create", "dev", "--workspace", "none"]).expect(0);
    let info = host.agentkernel(&["info", "dev", "--json"]);
    let info: serde_json::Value = serde_json::from_str(info.expect(0)).unwrap();
    let pid = info["machine_pid"].as_u64().unwrap();
    let memories: Vec<u64> = templates(&host).into_iter().map(|path| inode(path.join("memory"))).collect();
    let mut seen = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap().flatten() {
        let number = entry.file_name();
        let file = PathBuf::from(format!("/proc/{pid}/fd")).join(&number);
        if !fs::metadata(&file).is_ok_and(|data| data.is_file() && memories.contains(&data.ino())) {
            continue;
        }
        seen += 1;
        let information = fs::read_to_string(entry.path()).unwrap();
        let flags = information.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        // The last octal digit has the access mode.
        assert_eq!(u32::from_str_radix(flags, 8).unwrap() & 3, 0, "{information}");
    }
    assert_eq!(seen, 1, "the machine does not hold its template");
    let status = Command::new("grep").args(["-q", "rw-s.*memory$"]).arg(format!("/proc/{pid}/maps")).status();
    assert!(!status.unwrap().success(), "the template is mapped shared");
    host.agentkernel(&["rm", "--force", "dev"]).expect(0);
}
