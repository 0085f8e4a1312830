//! Sandboxes that live: what is put into one stays until it is removed.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::host::Host;

/// What `--json` printed.
#[track_caller]
fn json(host: &Host, arguments: &[&str]) -> Value {
    serde_json::from_str(host.agentkernel(arguments).expect(0)).unwrap()
}

/// `exec -u root NAME -- sh -c SCRIPT`, which must succeed; its output.
#[track_caller]
pub(crate) fn exec(host: &Host, name: &str, script: &str) -> String {
    host.agentkernel(&["exec", "-u", "root", name, "--", "sh", "-c", script]).expect(0).to_owned()
}

/// Waits until a sandbox is gone, with no command typed.
#[track_caller]
fn wait_until_gone(host: &Host, name: &str) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while host.state().join("sandboxes").join(name).exists() {
        assert!(Instant::now() < deadline, "{name} is still there");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn everything_stays_over_stop_and_start() {
    let host = Host::new();
    let data = host.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("given"), "given\n").unwrap();
    let volume = format!("{}:/data:ro", data.display());
    let flags = [
        "create",
        "dev",
        "-e",
        "COLOUR=red",
        "-l",
        "team=web",
        "-w",
        "/tmp",
        "-v",
        &volume,
        "-v",
        "cache:/cache",
    ];
    assert_eq!(host.agentkernel(&flags).expect(0), "dev\n");
    let about = "cat /etc/machine-id; hostname; echo $COLOUR; pwd; id -u; cat /data/given";
    let before = exec(&host, "dev", about);
    exec(
        &host,
        "dev",
        "echo kept > /root-of-it; mkdir -p /var/kept; echo v > /cache/v; echo m > /tmp/m; cd; echo h > home",
    );
    let refused = host.agentkernel(&["exec", "dev", "--", "touch", "/data/x"]);
    refused.expect(1);
    assert!(refused.stderr.contains("Read-only"), "{}", refused.stderr);

    let info = json(&host, &["info", "dev", "--json"]);
    assert_eq!((&info["status"], &info["labels"]["team"]), (&"running".into(), &"web".into()));
    assert_eq!(json(&host, &["list", "--json", "--label", "team=web"]).as_array().unwrap().len(), 1);
    assert_eq!(json(&host, &["list", "--json", "--label", "team=ops"]), Value::Array(Vec::new()));
    let stats = &json(&host, &["stats", "--json"])[0];
    assert!(stats["machine_memory_bytes"].as_u64().unwrap() > 10 << 20, "{stats}");

    host.agentkernel(&["stop", "dev"]).expect(0);
    assert_eq!(json(&host, &["info", info["uuid"].as_str().unwrap(), "--json"])["status"], "stopped");
    assert!(host.processes().is_empty(), "{:?}", host.processes());
    let said = host.agentkernel(&["exec", "dev", "--", "true"]);
    said.expect(125);
    assert!(
        said.stderr.contains("not running") && said.stderr.contains("agentkernel start dev"),
        "{}",
        said.stderr
    );
    // Told to stop again, or started twice: what was asked for is so.
    host.agentkernel(&["stop", "dev"]).expect(0);
    host.agentkernel(&["start", "dev"]).expect(0);
    host.agentkernel(&["start", "dev"]).expect(0);
    assert_eq!(exec(&host, "dev", about), before);
    let kept = exec(&host, "dev", "cat /root-of-it /cache/v /tmp/m ~/home; ls -d /var/kept");
    assert_eq!(kept, "kept\nv\nm\nh\n/var/kept\n");
    let events: Vec<String> = host
        .agentkernel(&["logs", "dev", "--json"])
        .expect(0)
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["event"].as_str().unwrap().to_owned())
        .filter(|event| event != "console")
        .collect();
    assert_eq!(events, ["created", "started", "stopped", "started"]);

    let said = host.agentkernel(&["rm", "dev"]);
    said.expect(1);
    assert!(said.stderr.contains("--force"), "{}", said.stderr);
    let said = host.agentkernel(&["info", "dex"]);
    said.expect(1);
    assert!(said.stderr.contains("did you mean dev?"), "{}", said.stderr);
    let said = host.agentkernel(&["volume", "rm", "cache"]);
    said.expect(1);
    assert!(said.stderr.contains("mounted in dev"), "{}", said.stderr);
    host.agentkernel(&["sandbox", "rm", "--force", "dev"]).expect(0);

    // The volume outlives it, and is another's.
    let said = host.agentkernel(&["run", "-q", "-v", "cache:/elsewhere", "--", "cat", "/elsewhere/v"]);
    assert_eq!(said.expect(0), "v\n");
    let volume = json(&host, &["volume", "info", "cache", "--json"]);
    assert!(volume["size_bytes"].as_u64().unwrap() > 0, "{volume}");
    host.agentkernel(&["volume", "rm", "cache"]).expect(0);
}

#[test]
fn changes_are_reviewed_and_taken_from_a_live_and_from_a_stopped_sandbox() {
    let host = Host::new();
    host.write("edit.txt", "one\ntwo\n");
    host.write("old.txt", "to be moved\nwith its lines\n");
    host.write("conflict.txt", "mine\n");
    host.agentkernel(&["create", "dev"]).expect(0);
    let script = "echo three >> edit.txt; mv old.txt new.txt; echo theirs > conflict.txt; mkdir .husky; \
                  echo x > .husky/pre-commit; head -c 99 /dev/zero > binary; sleep 300 & echo";
    exec(&host, "dev", script);
    host.write("conflict.txt", "changed meanwhile\n");
    let diff = host.agentkernel(&["diff", "dev"]);
    let diff = diff.expect(0);
    for part in
        ["@@ -1,2 +1,3 @@\n one\n two\n+three\n", "rename from old.txt\nrename to new.txt\n", "Binary files"]
    {
        assert!(diff.contains(part), "{part:?} is not in {diff}");
    }
    assert_eq!(host.agentkernel(&["diff", "dev", "--name-only", "edit.txt"]).expect(0), "edit.txt\n");
    assert!(host.agentkernel(&["diff", "dev", "--stat"]).expect(0).contains("old.txt => new.txt"));
    let report = json(&host, &["diff", "dev", "--json"]);
    let of =
        |path: &str| report["files"].as_array().unwrap().iter().find(|file| file["path"] == path).unwrap();
    assert!(of("conflict.txt")["conflict"].is_string() && of(".husky/pre-commit")["held_back"].is_string());
    assert_eq!(host.read("edit.txt"), "one\ntwo\n");

    host.agentkernel(&["apply", "dev", "--dry-run", "--exclude", "conflict.txt"]).expect(1);
    assert_eq!(host.read("edit.txt"), "one\ntwo\n");
    let said = host.agentkernel(&["apply", "dev"]);
    said.expect(1);
    for part in ["R old.txt -> new.txt", "M edit.txt", "conflict conflict.txt", "held back .husky/pre-commit"]
    {
        assert!(said.stderr.contains(part), "{part:?} is not in {}", said.stderr);
    }
    assert_eq!(
        (host.read("edit.txt"), host.read("conflict.txt")),
        ("one\ntwo\nthree\n".into(), "changed meanwhile\n".into())
    );
    assert!(!host.project().join("old.txt").exists() && !host.project().join(".husky/pre-commit").exists());
    let said = host.agentkernel(&["diff", "dev", "--name-only"]);
    assert_eq!(said.expect(0), ".husky/pre-commit\nconflict.txt\n");

    // What was taken is the base of what comes next, also over a stop; a review wakes the sandbox and lets it rest again.
    exec(&host, "dev", "echo four >> edit.txt");
    host.agentkernel(&["stop", "dev"]).expect(0);
    assert!(host.agentkernel(&["diff", "dev", "edit.txt"]).expect(0).contains("+four"));
    host.agentkernel(&["apply", "dev", "edit.txt"]).expect(0);
    assert_eq!(host.read("edit.txt"), "one\ntwo\nthree\nfour\n");
    assert_eq!(json(&host, &["info", "dev", "--json"])["status"], "stopped");
    // What the host did in the meantime is still seen as such.
    host.write("edit.txt", "the host's own\n");
    host.agentkernel(&["start", "dev"]).expect(0);
    exec(&host, "dev", "echo five >> edit.txt");
    host.agentkernel(&["apply", "dev", "edit.txt"]).expect(1);
    assert_eq!(host.read("edit.txt"), "the host's own\n");
    host.agentkernel(&["rm", "-f", "dev"]).expect(0);
}

#[test]
fn a_sandbox_past_its_time_goes_by_itself() {
    let host = Host::new();
    host.agentkernel(&["create", "resting", "--no-start", "--ttl", "3s", "--workspace", "none"]).expect(0);
    host.agentkernel(&["create", "longer", "--no-start", "--ttl", "3s", "--workspace", "none"]).expect(0);
    host.agentkernel(&["extend", "longer", "--by", "1h"]).expect(0);
    wait_until_gone(&host, "resting");
    let left = json(&host, &["info", "longer", "--json"])["ttl"].as_u64().unwrap();
    assert!((3500..=3603).contains(&left), "{left}");
    // Their time runs from the start: it has to be longer than two boots on a busy machine.
    host.agentkernel(&["create", "live", "--ttl", "90s", "--workspace", "none"]).expect(0);
    // One that is stopped in time goes in time as well.
    host.agentkernel(&["create", "stopped", "--ttl", "90s", "--workspace", "none"]).expect(0);
    host.agentkernel(&["stop", "stopped"]).expect(0);
    exec(&host, "live", "true");
    wait_until_gone(&host, "live");
    wait_until_gone(&host, "stopped");
    let said = host.agentkernel(&["extend", "longer", "--forever"]);
    assert_eq!(said.expect(0), "never\n");
    let said = host.agentkernel(&["extend", "longer", "--by", "1m"]);
    said.expect(1);
    assert!(said.stderr.contains("no deadline"), "{}", said.stderr);
    host.agentkernel(&["rm", "longer"]).expect(0);
}

#[test]
fn limits_hold_and_the_sandbox_goes_on() {
    let host = Host::new();
    let flags =
        ["create", "small", "--disk", "64M", "--memory", "192M", "--vcpus", "1", "--workspace", "none"];
    host.agentkernel(&flags).expect(0);
    assert_eq!(exec(&host, "small", "nproc; free -m | awk '/Mem/ {print ($2 < 192)}'"), "1\n1\n");
    let full =
        host.agentkernel(&["exec", "-u", "root", "small", "--", "dd", "if=/dev/zero", "of=/fill", "bs=1M"]);
    full.expect(1);
    assert!(full.stderr.contains("No space left"), "{}", full.stderr);
    exec(&host, "small", "rm /fill; echo fine > /after");

    let fork_bomb = "i=0; while [ $i -lt 2000 ]; do sleep 600 & i=$((i+1)); done; echo all";
    let bomb = host.agentkernel(&["exec", "-d", "small", "--", "sh", "-c", fork_bomb]);
    let id = bomb.expect(0).trim();
    let deadline = Instant::now() + Duration::from_secs(200);
    while !host.agentkernel(&["exec-logs", id]).stderr.contains("fork") {
        assert!(Instant::now() < deadline, "{:?}", host.agentkernel(&["exec-list"]));
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(exec(&host, "small", "echo still here"), "still here\n");
    // The shell may have given up by itself already.
    host.agentkernel(&["exec-kill", id]);

    let hog = "x = []\nwhile True: x.append(bytearray(1 << 20))";
    let hog = host.agentkernel(&["exec", "small", "--", "python3", "-c", hog]);
    assert!(hog.code() == 137 || hog.code() == 1, "{hog:?}");
    assert!(hog.stderr.contains("out of memory") && hog.stderr.contains("--memory"), "{}", hog.stderr);
    assert_eq!(exec(&host, "small", "cat /after"), "fine\n");
    host.agentkernel(&["rm", "-f", "small"]).expect(0);
}

#[test]
fn profiles_hold_over_stop_and_start() {
    let host = Host::new();
    host.write("in-project", "x");
    fs::write(host.home().join("plain"), "plain").unwrap();
    fs::write(host.home().join(".netrc"), "secret").unwrap();
    host.agentkernel(&["create", "shut", "--profile", "restrictive"]).expect(0);
    for _ in 0..2 {
        let said = exec(
            &host,
            "shut",
            "touch /x /etc/x 2>&1 | grep -c Read-only; echo t > /tmp/t && cat /tmp/t; \
                         free -m | awk '/Mem/ {print ($2 < 256)}'",
        );
        assert_eq!(said, "2\nt\n1\n");
        let seen = host.agentkernel(&["exec", "shut", "--", "ls", host.project().to_str().unwrap()]);
        assert!(!seen.expect(2).contains("in-project"));
        host.agentkernel(&["stop", "shut"]).expect(0);
        host.agentkernel(&["start", "shut"]).expect(0);
    }
    host.agentkernel(&["rm", "-f", "shut"]).expect(0);

    let mut create = host.command(&["create", "open", "--profile", "permissive"]);
    create.env("LC_ALL", "C.UTF-8");
    crate::host::finish(create, b"").expect(0);
    assert_eq!(
        exec(
            &host,
            "open",
            "cat ~/plain; echo; ls -A ~ | grep -c netrc; echo w > direct; echo $LC_ALL; touch ~/x || echo no"
        ),
        "plain\n0\nC.UTF-8\nno\n"
    );
    assert_eq!(host.read("direct"), "w\n");
    host.agentkernel(&["rm", "-f", "open"]).expect(0);
}

#[test]
fn a_configuration_is_kept_with_the_sandbox() {
    let host = Host::new();
    host.write("settings.json", "{}\n");
    host.write(
        "agentkernel.toml",
        "[sandbox]\nname = \"conf\"\ninit_script = \"echo once >> ~/init; cat /etc/app/settings.json\"\n\
         [resources]\nmemory_mb = 300\n[security.commands]\nblock = [\"git push\"]\n\
         [[files]]\nsource = \"settings.json\"\ndest = \"/etc/app/settings.json\"\nmode = \"0604\"\n[env]\nGREETING = \"hi\"\n",
    );
    let said = host.agentkernel(&["create", "-e", "GREETING=hello", "-e", "MORE=1"]);
    assert_eq!(said.expect(0), "conf\n");
    assert!(said.stderr.contains("{}"), "the init script's words are shown: {}", said.stderr);
    host.agentkernel(&["stop", "conf"]).expect(0);
    // Whatever becomes of the file now.
    host.write("agentkernel.toml", "[sandbox]\nmemry = 1\n");
    host.agentkernel(&["start", "conf"]).expect(0);
    let said = exec(&host, "conf", "cat ~/init; stat -c %a /etc/app/settings.json; echo $GREETING $MORE");
    assert_eq!(said, "once\n604\nhello 1\n");
    let blocked = host.agentkernel(&["exec", "conf", "--", "/usr/bin/git", "push", "-f"]);
    blocked.expect(125);
    assert!(blocked.stderr.contains("blocks `git push`"), "{}", blocked.stderr);
    host.agentkernel(&["rm", "-f", "conf"]).expect(0);

    let said = host.agentkernel(&["run", "--", "true"]);
    said.expect(125);
    assert!(
        said.stderr.contains("agentkernel.toml:2:1") && said.stderr.contains("sandbox.memry"),
        "{}",
        said.stderr
    );
    // A cloned project does not open doors by itself.
    host.write("agentkernel.toml", "[security]\nprofile = \"permissive\"\n");
    let said = host.agentkernel(&["run", "--", "true"]);
    said.expect(125);
    assert!(said.stderr.contains("--profile permissive"), "{}", said.stderr);
    // An init script that fails leaves nothing.
    host.write("agentkernel.toml", "[sandbox]\ninit_script = \"exit 3\"\n");
    let said = host.agentkernel(&["create", "never"]);
    said.expect(1);
    assert!(said.stderr.contains("exit code 3"), "{}", said.stderr);
    assert!(host.sandboxes().is_empty());
    fs::remove_file(host.project().join("agentkernel.toml")).unwrap();
    host.agentkernel(&["init"]).expect(0);
    host.agentkernel(&["init"]).expect(1);
    host.agentkernel(&["create", "--no-start", "from-template"]).expect(0);
    host.agentkernel(&["rm", "from-template"]).expect(0);
}

#[test]
fn files_are_copied_both_ways_and_stay_in_their_place() {
    let host = Host::new();
    host.write("tree/deep/file", "content\n");
    host.write("tree/tool", "#!/bin/sh\n");
    crate::host::set_mode(&host.project().join("tree/tool"), 0o755);
    std::os::unix::fs::symlink("deep/file", host.project().join("tree/link")).unwrap();
    host.agentkernel(&["create", "dev", "--workspace", "none"]).expect(0);
    host.agentkernel(&["cp", "tree", "dev:/opt"]).expect(0);
    host.agentkernel(&["cp", "tree/.", "dev:/srv/"]).expect(0);
    let said =
        exec(&host, "dev", "cat /opt/tree/link /srv/deep/file; test -x /opt/tree/tool; readlink /srv/link");
    assert_eq!(said, "content\ncontent\ndeep/file\n");
    host.agentkernel(&["cp", "dev:/opt/tree", "back"]).expect(0);
    assert_eq!(host.read("back/deep/file"), "content\n");
    assert!(fs::symlink_metadata(host.project().join("back/link")).unwrap().is_symlink());
    let tar = host.agentkernel(&["cp", "dev:/opt/tree", "-"]);
    tar.expect(0);
    let mut into = host.command(&["cp", "-", "dev:/var/tmp"]);
    into.stdin(std::process::Stdio::piped());
    crate::host::finish(into, &tar.stdout).expect(0);
    assert_eq!(exec(&host, "dev", "cat /var/tmp/tree/deep/file"), "content\n");
    // A name of the guest's that leads to the host stays the guest's.
    exec(
        &host,
        "dev",
        "ln -s / /opt/trap; mkdir /opt/evil; ln -s ../../.. /opt/evil/up; chmod u+s /bin/true 2>/dev/null; \
                        cp /bin/true /opt/evil/suid; chmod 6755 /opt/evil/suid",
    );
    host.agentkernel(&["cp", "tree/tool", "dev:/opt/trap/marker"]).expect(0);
    assert!(!std::path::Path::new("/marker").exists());
    assert_eq!(exec(&host, "dev", "cat /marker"), "#!/bin/sh\n");
    host.agentkernel(&["cp", "dev:/opt/evil", "evil"]).expect(0);
    let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(host.project().join("evil/suid")).unwrap());
    assert_eq!(mode & 0o7777, 0o755);
    for (arguments, word) in [
        (["cp", "dev:/nowhere", "x"], "No such file"),
        (["cp", "tree/tool", "dev:/no/such/place"], "No such file"),
        (["cp", "tree", "dev:/etc/passwd/x"], "Not a directory"),
        (["cp", "nothing", "dev:/"], "nothing"),
    ] {
        let said = host.agentkernel(&arguments);
        said.expect(1);
        assert!(said.stderr.contains(word), "{arguments:?}: {}", said.stderr);
    }
    // A full guest says so and keeps nothing of the file.
    host.agentkernel(&["rm", "-f", "dev"]).expect(0);
    host.agentkernel(&["create", "small", "--disk", "64M", "--workspace", "none"]).expect(0);
    host.write("big", vec![1; 80 << 20]);
    let said = host.agentkernel(&["cp", "big", "small:/var/big"]);
    said.expect(1);
    assert!(said.stderr.contains("No space left"), "{}", said.stderr);
    assert_eq!(exec(&host, "small", "ls -A /var | grep -c -e big -e .copy- || true"), "0\n");
    host.agentkernel(&["rm", "-f", "small"]).expect(0);
}

#[test]
fn the_state_directory_is_never_mounted() {
    let host = Host::new();
    let said = host.agentkernel(&["create", "x", "-v", &format!("{}:/state", host.state().display())]);
    said.expect(1);
    assert!(said.stderr.contains("agentkernel's own state"), "{}", said.stderr);
    let above = format!("{}:/above", host.path().display());
    let said = host.agentkernel(&["run", "-q", "--workspace", "none", "-v", &above, "--", "ls", "/above"]);
    assert_eq!(said.expect(0), "home\n");
    let said = host.agentkernel(&[
        "run",
        "-q",
        "--keep",
        "-n",
        "kept",
        "--workspace",
        "none",
        "--",
        "touch",
        "/tmp/made",
    ]);
    said.expect(0);
    exec(&host, "kept", "ls /tmp/made");
    host.agentkernel(&["rm", "-f", "kept"]).expect(0);
}
