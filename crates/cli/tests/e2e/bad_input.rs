//! Things that are missing, broken or too small: a clear error with a remedy, and nothing lost.

use std::fs;
use std::os::unix::fs::symlink;

use crate::host::{Host, finish, is_root, set_mode};

#[test]
fn mistakes_on_the_command_line() {
    let host = Host::bare();
    for (arguments, code, word) in [
        (vec!["run"], 125, "COMMAND"),
        (vec!["run", "--no-such-flag", "--", "true"], 125, "--no-such-flag"),
        (vec!["run", "--memory", "lots", "--", "true"], 125, "512M"),
        (vec!["run", "--memory", "16M", "--", "true"], 125, "--memory"),
        (vec!["run", "--disk", "1M", "--", "true"], 125, "--disk"),
        (vec!["run", "--name", "a/b", "--", "true"], 125, "name"),
        (vec!["run", "--timeout", "soon", "--", "true"], 125, "90s"),
        (vec!["run", "--network", "sometimes", "--", "true"], 125, "public"),
        (vec!["run", "--no-network", "--network", "public", "--", "true"], 125, "--no-network"),
        (vec!["run", "--allow", "https://a.example", "--", "true"], 125, "leave out what stands before"),
        (vec!["create", "x", "--deny", "10.0.0.1/8"], 2, "write 10.0.0.0/8"),
        (vec!["create", "x", "-P", "80"], 2, "0:80 picks a free one"),
        (vec!["create", "x", "-P", "::1:80:80"], 2, "brackets"),
        (vec!["create", "x", "-P", "8080:80", "-P", "8080:81"], 1, "cannot both"),
        (vec!["audit", "nobody"], 1, "nobody"),
        (vec!["apply"], 2, "--last"),
        (vec!["aply"], 2, "apply"),
        (vec!["create", "a", "--name", "b"], 1, "twice"),
        (vec!["create", "x", "--profile", "modrate"], 2, "moderate"),
        (vec!["create", "x", "-v", "/a"], 2, "SOURCE:TARGET"),
        (vec!["create", "x", "-v", "/nowhere:/data"], 1, "/nowhere"),
        (vec!["create", "x", "-v", "cache:/proc"], 1, "/proc"),
        (vec!["exec", "nobody", "--", "true"], 125, "nobody"),
        (vec!["exec", "nobody"], 125, "COMMAND"),
        (vec!["attach"], 125, "NAME"),
        (vec!["cp", "a", "b"], 1, "NAME:PATH"),
        (vec!["sandbox", "stop", "nobody"], 1, "nobody"),
        (vec!["extend", "nobody"], 2, "--by"),
        (vec!["__supervise", "/nowhere"], 1, ""),
    ] {
        let said = host.agentkernel(&arguments);
        said.expect(code);
        assert!(said.stderr.contains(word), "{arguments:?}: {}", said.stderr);
    }
    host.agentkernel(&["apply", "--last"]).expect(1);
    let said = host.agentkernel(&["completions", "bash"]);
    assert!(said.expect(0).contains("agentkernel"));
    for verb in [
        "run",
        "create",
        "start",
        "stop",
        "rm",
        "list",
        "info",
        "stats",
        "exec",
        "attach",
        "exec-list",
        "exec-logs",
        "exec-kill",
        "logs",
        "audit",
        "cp",
        "diff",
        "apply",
        "extend",
        "gc",
        "sandbox",
        "volume",
        "init",
        "setup",
        "doctor",
        "benchmark",
        "completions",
    ] {
        host.agentkernel(&[verb, "--help"]).expect(0);
    }
}

#[test]
fn qemu_is_missing() {
    let host = Host::new();
    // Everything the host has, but no QEMU.
    let bin = host.path().join("bin");
    fs::create_dir(&bin).unwrap();
    for name in ["true", "sh", "mke2fs"] {
        let real = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"].iter().map(|path| format!("{path}/{name}"));
        let real = real.into_iter().find(|path| fs::exists(path).unwrap()).unwrap();
        symlink(real, bin.join(name)).unwrap();
    }
    let mut command = host.command(&["run", "--workspace", "none", "--", "true"]);
    command.env("PATH", &bin);
    let said = finish(command, b"");
    said.expect(125);
    assert!(said.stderr.contains("qemu-system-x86"), "{}", said.stderr);
    assert!(said.stderr.contains("apt-get install"), "{}", said.stderr);
}

#[test]
fn the_kernel_is_missing_or_corrupt() {
    let host = Host::new();
    let kernels = host.state().join("cache/kernel");
    let record = kernels.join("current.json");
    let good = fs::read(&record).unwrap();
    fs::write(&record, "{").unwrap();
    let said = host.agentkernel(&["run", "--workspace", "none", "--", "true"]);
    said.expect(125);
    assert!(said.stderr.contains("agentkernel setup"), "{}", said.stderr);
    fs::write(&record, &good).unwrap();

    // The right size, but garbage: only the boot can tell.
    let vmlinux = find(&kernels, "vmlinux");
    let length = fs::metadata(&vmlinux).unwrap().len();
    fs::remove_file(&vmlinux).unwrap();
    let file = fs::File::create(&vmlinux).unwrap();
    file.set_len(length).unwrap();
    let said = host.agentkernel(&["run", "--workspace", "none", "--", "true"]);
    said.expect(125);
    assert!(said.stderr.contains("error:"), "{}", said.stderr);

    fs::remove_file(&vmlinux).unwrap();
    let said = host.agentkernel(&["run", "--workspace", "none", "--", "true"]);
    said.expect(125);
    assert!(said.stderr.contains("agentkernel setup"), "{}", said.stderr);
    let said = host.agentkernel(&["setup", "--kernel", "/etc/passwd"]);
    said.expect(1);
    assert!(said.stderr.contains("/etc/passwd"), "{}", said.stderr);
}

fn find(directory: &std::path::Path, name: &str) -> std::path::PathBuf {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            if path.join(name).exists() {
                return path.join(name);
            }
        } else if entry.file_name() == name {
            return path;
        }
    }
    panic!("no {name} in {}", directory.display());
}

#[test]
fn more_memory_than_the_host_has() {
    let host = Host::new();
    let said = host.agentkernel(&["run", "--memory", "900G", "--workspace", "none", "--", "true"]);
    said.expect(125);
    assert!(said.stderr.contains("memory") && said.stderr.contains("hint:"), "{}", said.stderr);
}

#[test]
fn the_state_directory_is_unusable() {
    let host = Host::bare();
    fs::create_dir_all(host.state()).unwrap();
    fs::write(host.state().join("version"), "99\n").unwrap();
    let said = host.agentkernel(&["run", "--", "true"]);
    said.expect(125);
    assert!(said.stderr.contains("upgrade"), "{}", said.stderr);
    let mut command = host.command(&["doctor"]);
    command.env("AGENTKERNEL_HOME", "relative");
    finish(command, b"").expect(1);
    if !is_root() {
        let closed = host.path().join("closed");
        fs::create_dir(&closed).unwrap();
        set_mode(&closed, 0o500);
        let mut command = host.command(&["run", "--", "true"]);
        command.env("AGENTKERNEL_HOME", closed.join("state"));
        let said = finish(command, b"");
        said.expect(125);
        assert!(said.stderr.contains("state directory"), "{}", said.stderr);
    }
}

#[test]
fn a_name_in_use_is_refused() {
    let host = Host::new();
    let script = "echo ready; sleep 600";
    let mut run =
        crate::host::Running::start(host.command(&["run", "-q", "-n", "box", "--", "sh", "-c", script]));
    assert_eq!(run.line(), "ready\n");
    let said = host.agentkernel(&["run", "-n", "box", "--", "true"]);
    said.expect(125);
    assert!(said.stderr.contains("already") && said.stderr.contains("--name"), "{}", said.stderr);
    crate::host::signal(run.child.id(), rustix::process::Signal::TERM);
    run.end();
}

#[test]
fn doctor_says_what_it_found_and_never_hangs() {
    let host = Host::new();
    let said = host.agentkernel(&["doctor", "--json"]);
    let findings: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    let findings = findings.as_array().unwrap();
    for word in ["accelerator", "qemu", "kernel", "landlock", "disk", "memory"] {
        assert!(
            findings.iter().any(|finding| finding["name"].as_str().unwrap().to_lowercase().contains(word)),
            "nothing about {word}: {findings:#?}"
        );
    }
    assert!(
        findings.iter().all(|finding| finding["status"] == "ok" || finding["remedy"].is_string()),
        "{findings:#?}"
    );
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    if !is_root() {
        // Only root can make a small file system to fill; the same test runs as root in the same suite.
        return;
    }
    let host = Host::bare();
    let small = host.path().join("state");
    fs::create_dir_all(&small).unwrap();
    let status = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=160m,mode=0700", "small"])
        .arg(&small)
        .status()
        .unwrap();
    assert!(status.success());
    let outcome = std::panic::catch_unwind(|| {
        crate::host::copy_tree(&crate::host::prepared_cache(), &small.join("cache"));
        // No room for a sandbox.
        let filler = small.join("filler");
        let file = fs::File::create(&filler).unwrap();
        let _ = std::io::copy(&mut std::io::Read::take(std::io::repeat(1), 1 << 30), &mut &file);
        let said = host.agentkernel(&["run", "--workspace", "none", "--", "true"]);
        said.expect(125);
        assert!(said.stderr.contains("No space left") || said.stderr.contains("disk"), "{}", said.stderr);
        drop(file);
        fs::remove_file(&filler).unwrap();
        host.agentkernel(&["run", "-q", "--workspace", "none", "--", "true"]).expect(0);
        // The disk of the host fills up under a running guest: the command fails, the machine lives.
        let script = "dd if=/dev/zero of=/var/tmp/big bs=1M count=400 2>/dev/null; sync; echo over";
        let said =
            host.agentkernel(&["run", "-q", "-u", "root", "--workspace", "none", "--", "sh", "-c", script]);
        assert!(said.code() == 0 || said.code() == 125, "{said:?}");
        host.assert_nothing_is_left();
    });
    let _ = std::process::Command::new("umount").arg("-l").arg(&small).status();
    outcome.unwrap();
}
