//! What a sandbox's network refused, as it is told; and ports of this machine that lead into one.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::host::Host;

/// Answers each connection with its host name.
const SERVER: &str = "import socket\ns = socket.create_server(('', 8000))\nwhile True:\n c = s.accept()[0]\n \
                      c.sendall(socket.gethostname().encode())\n c.close()";

/// What the port says; the server behind it may still be starting.
fn said_by(port: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let mut text = String::new();
        let read = TcpStream::connect(format!("127.0.0.1:{port}")).and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            stream.write_all(b"?")?;
            stream.read_to_string(&mut text)
        });
        if read.is_ok() && !text.is_empty() {
            return text;
        }
        assert!(Instant::now() < deadline, "{read:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn ports(host: &Host, name: &str) -> Vec<String> {
    let said = host.agentkernel(&["info", "--json", name]);
    let info: serde_json::Value = serde_json::from_str(said.expect(0)).unwrap();
    info["ports"].as_array().unwrap().iter().map(|port| port.as_str().unwrap().to_owned()).collect()
}

fn number(port: &str) -> &str {
    port.split(':').nth(1).unwrap()
}

#[test]
fn published_ports_lead_into_the_sandbox_and_stay() {
    let host = Host::new();
    let said = host.agentkernel(&["create", "web", "-P", "0:8000", "--workspace", "none"]);
    said.expect(0);
    let first = ports(&host, "web");
    let port = number(&first[0]);
    assert!(said.stderr.contains(&format!("127.0.0.1:{port} leads to port 8000 of web")), "{}", said.stderr);
    let serve =
        |name| host.agentkernel(&["exec", "-d", name, "--", "python3", "-c", SERVER]).expect(0).to_owned();
    serve("web");
    assert_eq!(said_by(port), "web");
    // Whoever wants the same port is told whose it is, and leaves nothing.
    let same = format!("{port}:80");
    for arguments in [&["create", "other", "-P", &same][..], &["run", "-P", &same, "--", "true"]] {
        let said = host.agentkernel(arguments);
        assert_ne!(said.code(), 0);
        for word in [port, "sandbox web has that port", "agentkernel stop web"] {
            assert!(said.stderr.contains(word), "{word}: {}", said.stderr);
        }
    }
    assert_eq!(host.sandboxes().len(), 1);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap().port().to_string();
    let said = host.agentkernel(&["run", "-P", &format!("{taken}:80"), "--", "true"]);
    said.expect(125);
    assert!(said.stderr.contains(&taken) && said.stderr.contains("0:80"), "{}", said.stderr);
    // A fork's server runs on, behind a port of its own.
    host.agentkernel(&["fork", "web", "--as", "copy"]).expect(0);
    let forked = ports(&host, "copy");
    assert_ne!(forked, first);
    assert_eq!((said_by(number(&forked[0])), said_by(port)), ("copy".to_owned(), "web".to_owned()));
    host.agentkernel(&["rm", "--force", "copy"]).expect(0);
    host.agentkernel(&["stop", "web"]).expect(0);
    TcpStream::connect(format!("127.0.0.1:{port}")).unwrap_err();
    host.agentkernel(&["start", "web"]).expect(0);
    assert_eq!(ports(&host, "web"), first);
    serve("web");
    assert_eq!(said_by(port), "web");
    host.agentkernel(&["rm", "--force", "web"]).expect(0);
    host.assert_nothing_is_left();
}

#[test]
fn what_is_refused_is_told_with_the_flag_that_lets_it_through() {
    const CONNECT: &str = "import socket, sys\nfor target in sys.argv[1:]:\n try:\n  \
                           socket.create_connection((target.split(':')[0], int(target.split(':')[1])), 5)\n  \
                           print('connected')\n except OSError: print('no')";
    let host = Host::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = format!("127.0.0.1:{}", listener.local_addr().unwrap().port());
    let inside = own.replace("127.0.0.1", "host.agentkernel.internal");
    let run = |flags: &[&str], targets: &[&str]| {
        let fixed = ["run", "--workspace", "none"];
        let arguments = [&fixed, flags, &["--", "python3", "-c", CONNECT], targets].concat();
        host.agentkernel(&arguments)
    };
    let said = run(&["--no-network"], &["a.example:80", "192.0.2.1:80"]);
    assert_eq!(said.expect(0), "no\nno\n");
    for line in [
        "a.example: there is no network",
        "--network public, or this alone: --allow a.example",
        "--allow 192.0.2.1:80",
    ] {
        assert!(said.stderr.contains(line), "{line}: {}", said.stderr);
    }
    // What is said does help.
    let said = run(&[], &[&inside]);
    assert_eq!(said.expect(0), "no\n");
    let flag = format!("--allow {own}");
    assert!(said.stderr.contains(&flag), "{}", said.stderr);
    let said = run(&["--allow", &own], &[&inside]);
    assert_eq!(said.expect(0), "connected\n");
    assert!(!said.stderr.contains("refused"), "{}", said.stderr);
    assert_eq!(run(&["-q", "--no-network"], &["a.example:80"]).stderr, "");
    let said = run(&["--json", "--no-network"], &["192.0.2.1:80"]);
    let outcome: serde_json::Value = serde_json::from_str(said.expect(0)).unwrap();
    assert_eq!(outcome["refusals"][0]["allow"], "192.0.2.1:80");
    // A sandbox that lives tells each command its own, and keeps all.
    host.agentkernel(&["create", "dev", "--no-network", "--workspace", "none"]).expect(0);
    let exec =
        |target: &str| host.agentkernel(&["exec", "dev", "--", "python3", "-c", CONNECT, target]).stderr;
    assert!(exec("192.0.2.1:80").contains("--allow 192.0.2.1:80"));
    let second = exec("192.0.2.2:80");
    assert!(second.contains("192.0.2.2:80") && !second.contains("192.0.2.1"), "{second}");
    host.agentkernel(&["stop", "dev"]).expect(0);
    let said = host.agentkernel(&["audit", "dev", "--refused", "--json"]);
    let allows = said.expect(0).lines().map(|line| {
        let entry: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(entry["time"].as_str().unwrap().ends_with('Z'), "{line}");
        entry["allow"].as_str().unwrap().to_owned()
    });
    assert_eq!(allows.collect::<Vec<_>>(), ["192.0.2.1:80", "192.0.2.2:80"]);
    let logs = host.agentkernel(&["logs", "dev"]).expect(0).to_owned();
    let places = ["started", "refused   the network policy refuses 192.0.2.2:80", "stopped"];
    let found: Vec<_> = places.iter().map(|word| logs.find(word).unwrap()).collect();
    assert!(found.is_sorted(), "{}", logs);
    host.agentkernel(&["rm", "dev"]).expect(0);
    host.assert_nothing_is_left();
}
