//! Forks: what lives on in them, what must differ, and what becomes of them when somebody dies.

use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::host::{Host, finish, signal};
use crate::living::exec;

/// Counts in the background, in the sandbox's memory and on its disk.
const COUNTER: &str =
    "i=0; while :; do i=$((i+1)); echo $i > /var/tmp/new; mv /var/tmp/new /var/tmp/count; sleep 0.05; done";

fn create(host: &Host, name: &str, flags: &[&str]) {
    let words: Vec<&str> = ["create", name, "-q", "--memory", "512M"].iter().chain(flags).copied().collect();
    host.agentkernel(&words).expect(0);
}

fn count(host: &Host, name: &str) -> u64 {
    exec(host, name, "until cat /var/tmp/count 2>/dev/null; do sleep 0.05; done").trim().parse().unwrap()
}

fn info(host: &Host, name: &str) -> Value {
    serde_json::from_str(host.agentkernel(&["info", name, "--json"]).expect(0)).unwrap()
}

#[test]
fn siblings_differ_where_they_must() {
    let host = Host::new();
    let said = host.agentkernel(&["doctor", "--fork-check", "--json"]);
    let checks: Vec<Value> = serde_json::from_str(said.expect(0)).unwrap();
    let names: Vec<&str> = checks.iter().map(|check| check["name"].as_str().unwrap()).collect();
    for name in [
        "boot-id",
        "clock",
        "generation",
        "getrandom",
        "hostname",
        "machine-id",
        "python-random",
        "python-ssl",
        "python-uuid",
        "urandom",
    ] {
        assert!(names.contains(&name), "{name} was not looked at: {names:?}");
    }
    assert!(checks.iter().all(|check| check["passed"] == true), "{checks:?}");
}

#[test]
fn children_go_on_from_where_the_parent_is() {
    let host = Host::new();
    host.write("file.txt", "of the host\n");
    create(&host, "dev", &["--ttl", "1h", "-l", "team=red", "-v", "shared:/shared", "-e", "WORD=said"]);
    host.agentkernel(&["exec", "-d", "dev", "--", "sh", "-c", COUNTER]).expect(0);
    exec(
        &host,
        "dev",
        "echo changed > file.txt; echo root > /root/x; sha256sum /usr/bin/python3 > /var/tmp/sum",
    );
    let before = count(&host, "dev");
    let said = host.agentkernel(&["fork", "dev", "--as", "a"]);
    assert_eq!(said.expect(0), "a\n");
    assert!(said.stderr.contains("stood still for"), "{}", said.stderr);
    // Its program runs on, its files are there, and what the host serves is served.
    let first = count(&host, "a");
    assert!(first >= before, "{first} < {before}");
    std::thread::sleep(Duration::from_millis(300));
    assert!(count(&host, "a") > first, "the program in the child stands still");
    assert_eq!(
        exec(&host, "a", "cat file.txt /root/x; sha256sum -c --quiet /var/tmp/sum"),
        "changed\nroot\n"
    );
    let said = host.agentkernel(&["exec", "a", "--", "sh", "-c", "echo $WORD; hostname; cat /etc/hostname"]);
    assert_eq!(said.expect(0), "said\na\na\n");
    // What one writes the other does not see, but for what they share.
    exec(&host, "a", "echo other > file.txt; echo child > /shared/x");
    assert_eq!(exec(&host, "dev", "cat file.txt /shared/x"), "changed\nchild\n");
    let (dev, a) = (info(&host, "dev"), info(&host, "a"));
    for same in ["labels", "mounts", "image", "memory_mb", "workspace", "profile"] {
        assert_eq!(dev[same], a[same], "{same}");
    }
    assert_ne!(dev["uuid"], a["uuid"]);
    let deadline =
        |name: &str| std::fs::read(host.state().join("sandboxes").join(name).join("deadline.json")).unwrap();
    assert_eq!(deadline("dev"), deadline("a"));
    // Reviewed as any other's; what was read before the fork has its base.
    assert!(host.agentkernel(&["diff", "a"]).expect(0).contains("+other"));
    host.agentkernel(&["apply", "a"]).expect(0);
    assert_eq!(host.read("file.txt"), "other\n");
    // It stops and starts like any other: its disk is its own.
    host.agentkernel(&["stop", "a"]).expect(0);
    host.agentkernel(&["start", "a"]).expect(0);
    assert_eq!(exec(&host, "a", "cat /root/x"), "root\n");
    // A fork of a fork of a fork, and many at once.
    host.agentkernel(&["fork", "dev", "--as", "b"]).expect(0);
    host.agentkernel(&["fork", "b", "--as", "c"]).expect(0);
    let forked = host.agentkernel(&["fork", "c", "--count", "3", "--as", "d", "--json"]);
    let forked: Vec<Value> = serde_json::from_str(forked.expect(0)).unwrap();
    assert_eq!(
        forked.iter().map(|child| child["name"].as_str().unwrap()).collect::<Vec<_>>(),
        ["d-1", "d-2", "d-3"]
    );
    assert!(count(&host, "d-2") >= before);
    // The parents go, the children stay.
    host.agentkernel(&["rm", "--force", "dev", "b", "c"]).expect(0);
    assert_eq!(exec(&host, "d-3", "cat /root/x; python3 -c 'print(1)'"), "root\n1\n");
    // Nothing but their disks is left of what they began with.
    let saved = host.state().join("sandboxes/d-3/saved");
    assert!(!saved.exists());
    host.agentkernel(&["rm", "--force", "--all"]).expect(0);
    host.agentkernel(&["volume", "rm", "shared"]).expect(0);
}

#[test]
fn what_cannot_be_forked_is_refused_and_loses_nothing() {
    let host = Host::new();
    create(&host, "dev", &["--workspace", "none"]);
    let refused = |arguments: &[&str], word: &str| {
        let said = host.agentkernel(arguments);
        assert_ne!(said.code(), 0, "{arguments:?}");
        assert!(said.stderr.contains(word), "{arguments:?}: {}", said.stderr);
    };
    refused(&["fork", "nobody", "--as", "x"], "there is no sandbox called nobody");
    refused(&["fork", "dev", "--as", "dev"], "already");
    refused(&["fork", "dev", "--as", "-x"], "x");
    refused(&["fork", "dev", "--as", "a/b"], "is not a sandbox name");
    refused(&["fork", "dev", "--count", "0", "--as", "x"], "0");
    // One name of many is taken: none is made.
    create(&host, "x-2", &["--no-start", "--workspace", "none"]);
    refused(&["fork", "dev", "--count", "3", "--as", "x"], "x-2 already");
    refused(&["fork", "x-2", "--as", "y"], "not running");
    assert_eq!(host.agentkernel(&["list", "-q"]).expect(0), "dev\nx-2\n");
    assert_eq!(exec(&host, "dev", "echo alive"), "alive\n");
    host.agentkernel(&["rm", "--force", "--all"]).expect(0);
}

#[test]
fn a_paused_sandbox_stands_still_and_is_told_the_time() {
    let host = Host::new();
    create(&host, "dev", &["--workspace", "none"]);
    host.agentkernel(&["exec", "-d", "dev", "--", "sh", "-c", COUNTER]).expect(0);
    count(&host, "dev");
    host.agentkernel(&["pause", "dev"]).expect(0);
    assert_eq!(info(&host, "dev")["status"], "paused");
    let said = host.agentkernel(&["exec", "dev", "--", "true"]);
    assert_eq!(said.expect(125), "");
    assert!(said.stderr.contains("agentkernel resume dev"), "{}", said.stderr);
    // A fork of it runs.
    host.agentkernel(&["fork", "dev", "--as", "child"]).expect(0);
    let forked = count(&host, "child");
    assert_eq!(info(&host, "dev")["status"], "paused");
    std::thread::sleep(Duration::from_secs(2));
    host.agentkernel(&["resume", "dev"]).expect(0);
    host.agentkernel(&["resume", "dev"]).expect(0);
    let now = count(&host, "dev");
    assert!(now < forked + 40, "it ran while it was paused: {now}, {forked} in its fork");
    let clock: i64 = exec(&host, "dev", "date +%s").trim().parse().unwrap();
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let apart = i64::try_from(time.as_secs()).unwrap() - clock;
    assert!(apart.abs() <= 1, "its clock is {apart} s behind");
    host.agentkernel(&["pause", "dev"]).expect(0);
    host.agentkernel(&["stop", "dev"]).expect(0);
    host.agentkernel(&["rm", "--force", "--all"]).expect(0);
}

/// Guards that the parent goes on whoever dies, and that nothing half-made is left.
#[test]
fn forks_whose_makers_are_killed() {
    let host = Host::new();
    create(&host, "dev", &["--workspace", "none"]);
    host.agentkernel(&["exec", "-d", "dev", "--", "sh", "-c", COUNTER]).expect(0);
    count(&host, "dev");
    for milliseconds in [5, 20, 40, 80, 150, 300] {
        let name = format!("k-{milliseconds}");
        let mut command = host.command(&["fork", "dev", "--as", &name]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        signal(child.id(), Signal::KILL);
        child.wait().unwrap();
        let before = count(&host, "dev");
        let deadline = Instant::now() + Duration::from_secs(20);
        while count(&host, "dev") <= before {
            assert!(Instant::now() < deadline, "the parent stands still after {milliseconds} ms");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    // Whatever was made is whole, or goes.
    let deadline = Instant::now() + Duration::from_secs(20);
    host.agentkernel(&["gc"]).expect(0);
    for name in host.agentkernel(&["list", "-q"]).expect(0).lines().filter(|name| name.starts_with("k-")) {
        while info(&host, name)["status"] == "starting" {
            assert!(Instant::now() < deadline, "{name} starts for ever");
            std::thread::sleep(Duration::from_millis(50));
        }
        host.agentkernel(&["start", name]).expect(0);
        exec(&host, name, "true");
    }
    // The parent's own supervisor dies while it is forked: the child lives, or there is none.
    let parent = info(&host, "dev")["supervisor_pid"].as_u64().unwrap();
    let mut child = host.command(&["fork", "dev", "--as", "last"]).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(60));
    signal(u32::try_from(parent).unwrap(), Signal::KILL);
    let forked = crate::host::wait(&mut child).success();
    let said = finish(host.command(&["exec", "last", "--", "true"]), b"");
    assert_eq!(said.code() == 0, forked, "{}", said.stderr);
    host.agentkernel(&["start", "dev"]).expect(0);
    exec(&host, "dev", "true");
    host.agentkernel(&["rm", "--force", "--all"]).expect(0);
    host.assert_nothing_is_left();
}

#[test]
fn twenty_forks_at_once() {
    let host = Host::new();
    let flags = ["--memory", "256M", "--vcpus", "1", "--workspace", "none"];
    host.agentkernel(&["create", "dev", "-q"].iter().chain(&flags).collect::<Vec<_>>()).expect(0);
    exec(&host, "dev", "echo here > /root/x");
    let forking: Vec<_> = (0..20)
        .map(|number| {
            let name = format!("f-{number}");
            let mut command = host.command(&["fork", "dev", "-q", "--as", &name]);
            command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for child in forking {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let mut ids: Vec<String> =
        (0..20).map(|number| exec(&host, &format!("f-{number}"), "cat /root/x /etc/machine-id")).collect();
    assert!(ids.iter().all(|text| text.starts_with("here\n")));
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 20);
    host.agentkernel(&["rm", "--force", "--all"]).expect(0);
}

/// The library call underneath best-of-N, as a program would make it.
#[test]
fn attempts_are_forked_run_and_judged() {
    use agentkernel_protocol::message::Exec;
    use agentkernel_sandbox::fork;
    use agentkernel_sandbox::state::Home;
    use serde_bytes::ByteBuf;

    let host = Host::new();
    host.write("answer.txt", "unknown\n");
    create(&host, "dev", &[]);
    let project = host.project();
    let attempt = |script: &str| Exec {
        arguments: ["/bin/sh", "-c", script].map(ByteBuf::from).to_vec(),
        environment: vec![(ByteBuf::from("PATH"), ByteBuf::from("/usr/bin:/bin"))],
        directory: ByteBuf::from(project.as_os_str().as_encoded_bytes()),
        user: String::new(),
        terminal: None,
        timeout_ms: Some(60_000),
        stop_signal: None,
        root: None,
    };
    let programs = vec![
        ("wrong".to_owned(), attempt("echo 41 > answer.txt; echo tried; exit 3")),
        ("right".to_owned(), attempt("echo 42 > answer.txt; echo note > more.txt; echo found >&2")),
        ("missing".to_owned(), Exec { arguments: vec![ByteBuf::from("/nowhere")], ..attempt("") }),
    ];
    let home = Home::open(&host.state()).unwrap();
    let parent = home.find("dev").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let trials = runtime.block_on(fork::trial(&parent, programs, &crate::host::program())).unwrap();
    let names: Vec<String> = trials.iter().map(|trial| trial.sandbox.name()).collect();
    assert_eq!(names, ["wrong", "right", "missing"]);
    assert_eq!((&trials[0].code, trials[0].stdout.as_slice()), (&Ok(3), &b"tried\n"[..]));
    assert_eq!((&trials[1].code, trials[1].stderr.as_slice()), (&Ok(0), &b"found\n"[..]));
    assert!(trials[2].code.as_ref().is_err_and(|why| why.contains("not found")), "{:?}", trials[2].code);
    let changed = |index: usize| trials[index].changes.as_ref().unwrap().summary().total();
    assert_eq!((changed(0), changed(1), changed(2)), (1, 2, 0));
    // The winner is taken, by the same means as any other sandbox.
    host.agentkernel(&["apply", "right"]).expect(0);
    assert_eq!((host.read("answer.txt"), host.read("more.txt")), ("42\n".to_owned(), "note\n".to_owned()));
    host.agentkernel(&["rm", "--force", "--all"]).expect(0);
}
