//! Programs in a live sandbox: many at once, detached, attached to, and every end reported.

use std::io::{Read, Write};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::host::{Host, wait};
use crate::living::exec;
use crate::terminal::Terminal;

/// Starts `exec -d NAME -- sh -c SCRIPT`; its id.
#[track_caller]
fn detached(host: &Host, script: &str) -> String {
    host.agentkernel(&["exec", "-d", "dev", "--", "sh", "-c", script]).expect(0).trim().to_owned()
}

#[track_caller]
fn state(host: &Host, id: &str) -> (String, Option<u64>) {
    let list = host.agentkernel(&["exec-list", "--json"]);
    let list: serde_json::Value = serde_json::from_str(list.expect(0)).unwrap();
    let found = list.as_array().unwrap().iter().find(|execution| execution["id"] == id).unwrap();
    (found["state"].as_str().unwrap().to_owned(), found["exit_code"].as_u64())
}

#[test]
fn detached_commands_run_on_and_their_ends_are_kept() {
    let host = Host::new();
    host.agentkernel(&["create", "dev", "--workspace", "none"]).expect(0);
    let script = "for i in 1 2 3; do echo out $i; echo err $i >&2; sleep 0.2; done; exit 7";
    let ends = detached(&host, script);
    let followed = host.agentkernel(&["exec-logs", "--follow", &ends[..6]]);
    assert_eq!(followed.expect(7), "out 1\nout 2\nout 3\n");
    assert_eq!(followed.stderr, "err 1\nerr 2\nerr 3\n");
    let killed = detached(&host, "sleep 600 & sleep 600");
    let told = detached(&host, "trap 'echo told; exit 5' TERM; echo ready; while :; do sleep 0.1; done");
    let missing = host.agentkernel(&["exec", "-d", "dev", "--", "no-such-program"]);
    let missing = missing.expect(0).trim().to_owned();
    let left = detached(&host, "echo before; sleep 600");
    host.agentkernel(&["exec-kill", &killed]).expect(0);
    let deadline = Instant::now() + Duration::from_secs(30);
    while host.agentkernel(&["exec-logs", &told]).expect(0) != "ready\n" {
        assert!(Instant::now() < deadline);
    }
    host.agentkernel(&["exec-kill", "--signal", "TERM", &told]).expect(0);
    assert_eq!(host.agentkernel(&["exec-logs", "--follow", &told]).expect(5), "ready\ntold\n");
    host.agentkernel(&["exec-logs", "--follow", &killed]).expect(137);
    assert_eq!(state(&host, &killed), ("exited".into(), Some(137)));
    host.agentkernel(&["exec-logs", "--follow", &missing]).expect(127);
    assert_eq!(state(&host, &missing), ("failed".into(), Some(127)));
    assert_eq!(state(&host, &left), ("running".into(), None));
    assert_eq!(exec(&host, "dev", "ps ax | grep -c 'sleep 60[0]'"), "2\n");
    let said = host.agentkernel(&["exec-kill", &killed]);
    said.expect(1);
    assert!(said.stderr.contains("does not run"), "{}", said.stderr);

    host.agentkernel(&["stop", "dev"]).expect(0);
    assert_eq!(host.agentkernel(&["exec-logs", &left]).expect(0), "before\n");
    assert_eq!(state(&host, &ends), ("exited".into(), Some(7)));
    let (what, code) = state(&host, &left);
    assert!(what == "lost" || (what == "exited" && code == Some(143)), "{what} {code:?}");
    host.agentkernel(&["exec-logs", "no-such-id"]).expect(1);
    host.agentkernel(&["rm", "dev"]).expect(0);
}

#[test]
fn a_shell_is_let_go_and_returned_to() {
    let host = Host::new();
    host.agentkernel(&["create", "dev", "--workspace", "none"]).expect(0);
    let mut terminal = Terminal::open();
    terminal.resize(30, 100);
    let mut child = terminal.start(&host, &["attach", "dev"]);
    terminal.type_in(b"stty size; N=kept\n");
    terminal.expect("30 100");
    terminal.type_in(b"\x10\x11");
    assert_eq!(wait(&mut child).code(), Some(0));
    terminal.expect("let go of");

    let mut other = Terminal::open();
    other.resize(50, 132);
    let mut child = other.start(&host, &["attach", "dev"]);
    // What was seen before is shown again, and the shell is the same, at the new size.
    other.expect("30 100");
    other.type_in(b"echo $N$N; stty size\n");
    other.expect("keptkept");
    other.expect("50 132");
    // Another terminal takes over; the first one is let go.
    let mut third = terminal.start(&host, &["attach", "dev"]);
    assert_eq!(wait(&mut child).code(), Some(0));
    other.expect("took over");
    terminal.expect("50 132");
    terminal.type_in(b"exit 9\n");
    assert_eq!(wait(&mut third).code(), Some(9));
    let mut fresh = terminal.start(&host, &["attach", "dev"]);
    terminal.type_in(b"echo new$N; exit\n");
    terminal.expect("new\r\n");
    assert_eq!(wait(&mut fresh).code(), Some(0));
    host.agentkernel(&["rm", "-f", "dev"]).expect(0);
}

#[test]
fn a_hundred_at_once_of_which_ten_never_read() {
    let host = Host::new();
    host.agentkernel(&["create", "dev", "--workspace", "none"]).expect(0);
    let start = |script: &str| {
        let mut command = host.command(&["exec", "-q", "dev", "--", "sh", "-c", script]);
        command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut silent: Vec<_> =
        (0..10).map(|_| start("while :; do echo nobody reads this line of output; done")).collect();
    std::thread::sleep(Duration::from_secs(1));
    let mut readers: Vec<_> =
        (0..90).map(|number| (number, start(&format!("echo {number}; exit {}", number % 7)))).collect();
    for (number, child) in &mut readers {
        let mut said = String::new();
        child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(said, format!("{number}\n"));
        assert_eq!(wait(child).code(), Some(*number % 7));
    }
    for child in &mut silent {
        assert!(child.try_wait().unwrap().is_none(), "one that nobody reads goes on");
        child.kill().unwrap();
        child.wait().unwrap();
    }
    // Their programs go with them.
    let deadline = Instant::now() + Duration::from_secs(30);
    while exec(&host, "dev", "ps ax | grep -c 'nobody read[s]' || true") != "0\n" {
        assert!(Instant::now() < deadline, "programs outlive their clients");
        std::thread::sleep(Duration::from_millis(200));
    }
    host.agentkernel(&["rm", "-f", "dev"]).expect(0);
}

#[test]
fn five_hundred_exit_codes_arrive() {
    let host = Host::new();
    host.agentkernel(&["create", "dev", "--workspace", "none"]).expect(0);
    let next = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= 500 {
                        return;
                    }
                    let code = i32::try_from(number % 256).unwrap();
                    let script = format!("exit {code}");
                    host.agentkernel(&["exec", "-q", "dev", "--", "sh", "-c", &script]).expect(code);
                }
            });
        }
    });
    host.agentkernel(&["rm", "-f", "dev"]).expect(0);
}

#[test]
fn a_gibibyte_through_exec_is_whole() {
    let host = Host::new();
    host.agentkernel(&["create", "dev", "--workspace", "none"]).expect(0);
    let script =
        "import sys\nblock = bytes(range(256)) * 4096\nfor i in range(1024): sys.stdout.buffer.write(block)";
    let mut child =
        host.command(&["exec", "dev", "--", "python3", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let (mut total, mut buffer) = (0u64, vec![0; 1 << 20]);
    loop {
        let count = stdout.read(&mut buffer).unwrap();
        if count == 0 {
            break;
        }
        for (at, byte) in buffer[..count].iter().enumerate() {
            assert_eq!(u64::from(*byte), (total + at as u64) % 256);
        }
        total += count as u64;
    }
    assert_eq!(total, 1 << 30);
    assert!(wait(&mut child).success());
    let mut command = host.command(&["exec", "dev", "--", "sha256sum"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for _ in 0..64 {
        stdin.write_all(&vec![7; 1 << 20]).unwrap();
    }
    drop(stdin);
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.starts_with("08fc7f5f33ae0938ae102cce12411f3cb1771056331da72a62fddaeedfa633cb"), "{said}");
    assert!(wait(&mut child).success());
    host.agentkernel(&["rm", "-f", "dev"]).expect(0);
}
