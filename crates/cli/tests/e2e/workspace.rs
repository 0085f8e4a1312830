//! The project in a sandbox: what the guest sees of it, what becomes of its changes.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};

use crate::host::{Host, set_mode};

#[test]
fn changes_are_kept_apart_until_they_are_applied() {
    let host = Host::new();
    host.write("edit.txt", "one\n");
    host.write("gone.txt", "bye\n");
    host.write("same.txt", "same\n");
    host.write("dir/inner.txt", "inner\n");
    host.write("tool.sh", "#!/bin/sh\n");
    let script = "echo two >> edit.txt; rm gone.txt; touch same.txt; mkdir -p new/deep; echo n > new/deep/file; \
                  ln -s edit.txt link; chmod 755 tool.sh; mv dir moved";
    let said = host.agentkernel(&["run", "--", "sh", "-c", script]);
    said.expect(0);
    assert!(said.stderr.contains("agentkernel apply --last"), "{}", said.stderr);
    assert_eq!(host.read("edit.txt"), "one\n");
    assert!(host.project().join("gone.txt").exists() && !host.project().join("new").exists());

    let before = fs::metadata(host.project().join("same.txt")).unwrap().mtime_nsec();
    let said = host.agentkernel(&["apply", "--last", "--dry-run"]);
    said.expect(0);
    assert_eq!(host.read("edit.txt"), "one\n");
    let said = host.agentkernel(&["apply", "--last", "--json"]);
    let report: serde_json::Value = serde_json::from_str(said.expect(0)).unwrap();
    assert_eq!(report["conflicts"], serde_json::json!([]));
    assert_eq!(report["remaining"], 0);
    assert_eq!(host.read("edit.txt"), "one\ntwo\n");
    assert!(!host.project().join("gone.txt").exists());
    assert_eq!(host.read("new/deep/file"), "n\n");
    assert_eq!(fs::read_link(host.project().join("link")).unwrap(), OsStr::new("edit.txt"));
    assert_eq!(fs::metadata(host.project().join("tool.sh")).unwrap().mode() & 0o777, 0o755);
    assert_eq!(host.read("moved/inner.txt"), "inner\n");
    assert!(!host.project().join("dir").exists());
    assert_eq!(fs::metadata(host.project().join("same.txt")).unwrap().mtime_nsec(), before);

    let said = host.agentkernel(&["apply", "--last"]);
    said.expect(1);
    assert!(said.stderr.contains("hint:"), "{}", said.stderr);
}

#[test]
fn apply_takes_success_at_once_and_keeps_failures() {
    let host = Host::new();
    host.sh(&["--apply"], "echo made > made.txt").expect(0);
    assert_eq!(host.read("made.txt"), "made\n");
    host.sh(&["--apply"], "echo half > half.txt; exit 9").expect(9);
    assert!(!host.project().join("half.txt").exists());
    host.agentkernel(&["apply", "--last"]).expect(0);
    assert_eq!(host.read("half.txt"), "half\n");
}

#[test]
fn a_file_that_changed_meanwhile_is_a_conflict_and_stays_as_it_is() {
    let host = Host::new();
    host.write("shared.txt", "base\n");
    host.write("other.txt", "base\n");
    let script =
        "cat shared.txt >/dev/null; echo guest > shared.txt; echo guest > other.txt; echo seen; sleep 1";
    let mut run =
        crate::host::Running::start(host.command(&["run", "--apply", "--json", "--", "sh", "-c", script]));
    // Not before the machine is up: the conflict must come from a change during the run.
    host.wait_for_process("qemu");
    std::thread::sleep(std::time::Duration::from_millis(200));
    let changed = host.project().join("shared.txt");
    // The guest has seen the file when its base was recorded; wait for the end of the run otherwise.
    let code = loop {
        if let Some(status) = run.child.try_wait().unwrap() {
            break status.code();
        }
        fs::write(&changed, format!("host {:?}\n", std::time::Instant::now())).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
    };
    assert_eq!(code, Some(125));
    let mut text = String::new();
    std::io::Read::read_to_string(run.lines.as_mut().unwrap(), &mut text).unwrap();
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["exit_code"], 125);
    assert_eq!(report["applied"]["conflicts"][0]["path"], "shared.txt");
    assert!(host.read("shared.txt").starts_with("host "));
    assert_eq!(host.read("other.txt"), "guest\n");
    let said = host.agentkernel(&["apply", "--last"]);
    said.expect(1);
    assert!(said.stderr.contains("conflict shared.txt"), "{}", said.stderr);
}

#[test]
fn what_could_run_on_the_host_is_held_back_and_symlinks_are_never_followed() {
    let host = Host::new();
    fs::create_dir_all(host.project().join(".git/hooks")).unwrap();
    fs::create_dir_all(host.path().join("outside")).unwrap();
    fs::write(host.path().join("outside/victim"), "untouched").unwrap();
    host.write("plain/file", "x");
    let outside = host.path().join("outside");
    let script = format!(
        "printf '#!/bin/sh\\n' > .git/hooks/pre-commit; chmod +x .git/hooks/pre-commit; echo x > .envrc; \
         rm -r plain; ln -s {0} plain; mkdir trap; echo evil > trap/victim; echo fine > fine.txt",
        outside.display()
    );
    host.agentkernel(&["run", "-q", "--apply", "--", "sh", "-c", &script]).expect(125);
    assert_eq!(host.read("fine.txt"), "fine\n");
    assert!(!host.project().join(".git/hooks/pre-commit").exists());
    assert!(!host.project().join(".envrc").exists());
    // The host's side turns a directory into a way out before the rest is applied.
    let said = host.sh(&[], "echo evil > trap/victim");
    said.expect(0);
    fs::remove_dir_all(host.project().join("trap")).unwrap();
    symlink(&outside, host.project().join("trap")).unwrap();
    host.agentkernel(&["apply", "--last"]).expect(1);
    assert_eq!(fs::read_to_string(outside.join("victim")).unwrap(), "untouched");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);

    // Named one by one, held-back paths are taken.
    host.agentkernel(&["run", "-q", "--", "sh", "-c", "echo 'export A=1' > .envrc"]).expect(0);
    host.agentkernel(&["apply", "--last"]).expect(1);
    host.agentkernel(&["apply", "--last", ".envrc"]).expect(0);
    assert_eq!(host.read(".envrc"), "export A=1\n");
}

#[test]
fn modes_decide_what_becomes_of_writes() {
    let host = Host::new();
    host.write("file", "host\n");
    fs::create_dir_all(host.project().join(".git/hooks")).unwrap();
    host.sh(&["--workspace", "ro"], "cat file; echo x > file 2>/dev/null || echo refused").expect(0);
    assert_eq!(host.read("file"), "host\n");
    let script = "echo guest > file; mkdir -p a/b; echo deep > a/b/c; mv a/b/c moved; rm -r a; ln -s file link; \
                  printf 1234567890 > short; truncate -s 4 short; \
                  echo evil > .git/hooks/post-checkout 2>/dev/null || echo guarded";
    assert_eq!(host.sh(&["--workspace", "rw"], script).expect(0), "guarded\n");
    assert_eq!(host.read("file"), "guest\n");
    assert_eq!(host.read("moved"), "deep\n");
    assert_eq!(host.read("short"), "1234");
    assert!(!host.project().join("a").exists() && host.project().join("link").is_symlink());
    assert_eq!(fs::read_dir(host.project().join(".git/hooks")).unwrap().count(), 0);
    let said = host.sh(&["--workspace", "none"], "pwd; ls -A");
    assert!(!said.expect(0).contains("project"));
    host.agentkernel(&["run", "--apply", "--workspace", "rw", "--", "true"]).expect(125);
}

#[test]
fn odd_names_and_files_survive_the_round_trip() {
    let host = Host::new();
    let odd: Vec<OsString> = vec![
        OsStr::from_bytes(b"new\nline").to_owned(),
        OsStr::from_bytes(b"not-utf8-\xff\xfe").to_owned(),
        OsStr::from_bytes(&[b'n'; 255]).to_owned(),
        "-rf".into(),
        " leading and trailing ".into(),
        "quote'\"$(x)`".into(),
    ];
    for name in &odd {
        fs::write(host.project().join(name), name.as_bytes()).unwrap();
    }
    symlink("loop", host.project().join("loop")).unwrap();
    symlink("/etc/passwd", host.project().join("absolute")).unwrap();
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        host.project().join("fifo"),
        rustix::fs::Mode::from_raw_mode(0o644),
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(host.project().join("s")).unwrap();
    host.write("unreadable", "secret");
    set_mode(&host.project().join("unreadable"), 0);
    fs::create_dir(host.project().join("closed")).unwrap();
    set_mode(&host.project().join("closed"), 0o000);
    host.write("check.py", include_bytes!("check_names.py"));
    let said = host.agentkernel(&["run", "-q", "--apply", "--", "python3", "check.py"]);
    assert_eq!(said.expect(0), "6 odd names, loop is ELOOP\n");
    for name in &odd {
        let mut expected = name.as_bytes().to_vec();
        expected.extend(b" changed");
        assert_eq!(fs::read(host.project().join(name)).unwrap(), expected, "{name:?}");
    }
    set_mode(&host.project().join("closed"), 0o755);
}

#[test]
fn secrets_of_the_project_stay_on_the_host() {
    let host = Host::new();
    host.write(".env", "TOKEN=1");
    host.write("sub/.env.local", "TOKEN=2");
    host.write("key.pem", "-----BEGIN PRIVATE KEY-----");
    host.write("private/data", "mine");
    host.write(".env.example", "TOKEN=");
    host.write(".agentkernelignore", "private/\n");
    let said = host.sh(&[], "find . -type f | sort; cat .env 2>/dev/null || echo hidden; echo x > .env");
    assert_eq!(said.expect(0), "./.agentkernelignore\n./.env.example\nhidden\n");
    let said = host.agentkernel(&["apply", "--last"]);
    said.expect(1);
    assert_eq!(host.read(".env"), "TOKEN=1", "{}", said.stderr);
}

#[test]
fn homes_and_the_root_are_never_a_workspace() {
    let host = Host::new();
    for (directory, flags) in [(host.home(), ["-q"]), ("/".into(), ["-q"])] {
        fs::write(host.home().join("private.txt"), "x").unwrap();
        let mut command = host.command(&["run"]);
        command.args(flags).args(["--", "sh", "-c", "pwd; cat private.txt 2>/dev/null || echo not there"]);
        command.current_dir(directory);
        let said = crate::host::finish(command, b"");
        assert!(said.expect(0).ends_with("not there\n"));
    }
    let mut command = host.command(&["run", "--", "true"]);
    command.current_dir(host.home());
    let said = crate::host::finish(command, b"");
    said.expect(0);
    assert!(
        said.stderr.contains("no workspace") && said.stderr.contains("home directory"),
        "{}",
        said.stderr
    );
}
