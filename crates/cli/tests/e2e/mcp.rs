//! The MCP server, over stdio and over HTTP, with the official clients; and with peers that are none.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::clients::{Server, node, python, script, sources};
use crate::host::{Host, PATH, finish, program, signal, wait};

const KEY: &str = "a-key-of-the-tests";

/// A client that starts the server itself.
#[track_caller]
fn with_stdio(host: &Host, mut client: Command) {
    client.arg("stdio").arg(program()).current_dir(host.project());
    client.env("AGENTKERNEL_HOME", host.state()).env("HOME", host.home()).env("PATH", PATH);
    let said = finish(client, b"");
    assert!(said.expect(0).ends_with("ok\n"), "{said:?}");
    host.assert_nothing_is_left();
}

/// A client of a server that runs.
#[track_caller]
fn with_http(host: &Host, mut client: Command) {
    let server = Server::start(host, &["--api-key", KEY]);
    client.args(["http", &format!("{}/mcp", server.url), KEY]);
    assert!(server.client(host, client).expect(0).ends_with("ok\n"));
    server.end();
    host.assert_nothing_is_left();
}

fn node_client() -> Command {
    let mut command = Command::new("node");
    command.arg(node().join("mcp.mjs"));
    command
}

#[test]
fn the_python_client_over_stdio() {
    with_stdio(&Host::new(), script("mcp_client.py", &[]));
}

#[test]
fn the_python_client_over_http() {
    with_http(&Host::new(), script("mcp_client.py", &[]));
}

#[test]
fn the_node_client_over_stdio() {
    with_stdio(&Host::new(), node_client());
}

#[test]
fn the_node_client_over_http() {
    with_http(&Host::new(), node_client());
}

#[test]
fn the_example_does_what_it_says() {
    let host = Host::new();
    let mut example = Command::new(python());
    example.arg(sources().join("../../examples/agent-loop.py")).arg(program()).current_dir(host.project());
    example.env("AGENTKERNEL_HOME", host.state()).env("HOME", host.home()).env("PATH", PATH);
    let said = finish(example, b"");
    let told = said.expect(0);
    for step in
        ["exit code 1", "exit code 0", "+    return sum(numbers) / len(numbers)", "applied: average.py"]
    {
        assert!(told.contains(step), "{step:?} is missing:\n{told}\n{}", said.stderr);
    }
    host.assert_nothing_is_left();
}

/// A peer that writes what it likes to `agentkernel mcp`.
struct Peer {
    server: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Peer {
    #[track_caller]
    fn new(host: &Host) -> Self {
        let mut command = host.command(&["mcp"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut server = command.spawn().unwrap();
        let (to, from) = (server.stdin.take().unwrap(), BufReader::new(server.stdout.take().unwrap()));
        let mut peer = Self { server, to, from };
        let client = json!({ "name": "tests", "version": "1" });
        let hello = json!({ "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": client });
        peer.ask(1, "initialize", hello);
        assert_eq!(peer.answer(1)["result"]["serverInfo"]["name"], "agentkernel");
        peer.say(br#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#);
        peer
    }

    fn say(&mut self, line: &[u8]) {
        self.to.write_all(line).unwrap();
        self.to.write_all(b"\n").unwrap();
    }

    fn ask(&mut self, id: u32, method: &str, params: Value) {
        let request = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params });
        self.say(request.to_string().as_bytes());
    }

    /// Calls a tool and does not wait.
    fn call(&mut self, id: u32, tool: &str, arguments: Value) {
        self.ask(id, "tools/call", json!({ "name": tool, "arguments": arguments }));
    }

    #[track_caller]
    fn answer(&mut self, id: u32) -> Value {
        loop {
            let mut line = String::new();
            assert!(self.from.read_line(&mut line).unwrap() > 0, "it hung up");
            // Nothing but messages is on standard output.
            let message: Value = serde_json::from_str(&line).unwrap();
            if message["id"] == id {
                return message;
            }
        }
    }

    /// One whose command runs in a temporary sandbox, and another in one that lives.
    #[track_caller]
    fn busy(host: &Host) -> Self {
        let mut peer = Self::new(host);
        peer.call(2, "sandbox_create", json!({ "name": "lives", "memory_mb": 512 }));
        assert_ne!(peer.answer(2)["result"]["isError"], true);
        peer.call(3, "sandbox_exec", json!({ "name": "lives", "command": ["sh", "-c", "sleep 1001; true"] }));
        peer.call(4, "sandbox_run", json!({ "command": ["sleep", "1000"] }));
        let deadline = Instant::now() + Duration::from_secs(60);
        while host.sandboxes().len() < 2 || sleepers(host) == 0 {
            assert!(Instant::now() < deadline, "{:?}", host.sandboxes());
            std::thread::sleep(Duration::from_millis(50));
        }
        peer
    }
}

/// Commands of that kind in the sandbox that lives.
fn sleepers(host: &Host) -> usize {
    let script = "ps ax | grep -c '[s]leep 1001' || true";
    let said = host.agentkernel(&["exec", "lives", "--", "sh", "-c", script]);
    said.expect(0).trim().parse().unwrap()
}

/// What a peer began that is gone is ended; what lives, lives.
#[track_caller]
fn only_what_lives_is_left(host: &Host, server_is_dead: bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while host.sandboxes().len() > 1 || sleepers(host) > 0 {
        let left = (host.sandboxes(), host.processes());
        assert!(Instant::now() < deadline, "{left:?}, {} commands", sleepers(host));
        if server_is_dead {
            // Killed before it had started a supervisor, it leaves a directory to whoever sweeps next.
            host.agentkernel(&["gc"]).expect(0);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    host.agentkernel(&["rm", "--force", "lives"]).expect(0);
    host.assert_nothing_is_left();
}

#[test]
fn a_peer_that_dies_leaves_nothing_behind() {
    let host = Host::new();
    let Peer { mut server, to, from } = Peer::busy(&host);
    // As the kernel closes them for one that was killed.
    drop((to, from));
    assert!(wait(&mut server).success());
    only_what_lives_is_left(&host, false);
}

#[test]
fn a_server_that_dies_leaves_nothing_behind() {
    let host = Host::new();
    for death in [Signal::KILL, Signal::TERM] {
        let mut peer = Peer::busy(&host);
        signal(peer.server.id(), death);
        wait(&mut peer.server);
        only_what_lives_is_left(&host, true);
    }
}

#[test]
fn copies_that_nobody_waits_for_are_not_left_half_made() {
    let host = Host::new();
    host.agentkernel(&["create", "base", "--memory", "512M"]).expect(0);
    host.agentkernel(&["snapshot", "take", "base", "then"]).expect(0);
    for after in [50, 100, 200] {
        let mut peer = Peer::new(&host);
        peer.call(2, "sandbox_fork", json!({ "name": "base", "as": "copy", "count": 3 }));
        peer.call(3, "snapshot_restore", json!({ "name": "then", "as": "again" }));
        std::thread::sleep(Duration::from_millis(after));
        for id in [2, 3] {
            let params = json!({ "requestId": id });
            let cancel = json!({ "jsonrpc": "2.0", "method": "notifications/cancelled", "params": params });
            peer.say(cancel.to_string().as_bytes());
        }
        drop((peer.to, peer.from));
        assert!(wait(&mut peer.server).success());
        // Whatever was done before it was given up is whole.
        let list: Value = serde_json::from_str(host.agentkernel(&["list", "--json"]).expect(0)).unwrap();
        for sandbox in list.as_array().unwrap() {
            assert_eq!(sandbox["status"], "running", "after {after} ms: {list}");
            if sandbox["name"] != "base" {
                host.agentkernel(&["rm", "--force", sandbox["name"].as_str().unwrap()]).expect(0);
            }
        }
    }
    host.agentkernel(&["snapshot", "rm", "then"]).expect(0);
    host.agentkernel(&["rm", "--force", "base"]).expect(0);
    host.assert_nothing_is_left();
}

#[test]
fn garbage_does_no_harm() {
    let host = Host::new();
    let mut peer = Peer::new(&host);
    for line in [b"garbage".as_slice(), b"\xff\xfe\0", b"{\"jsonrpc\":", b"[]", &[b'['; 100_000]] {
        peer.say(line);
    }
    peer.call(5, "sandbox_run", json!({ "command": ["sh", "-c", "echo still; exit 4"] }));
    let answer = peer.answer(5);
    assert_eq!(answer["result"]["structuredContent"]["exit_code"], 4, "{answer}");
    // What a command says is never more than a piece of a message.
    let noise = "echo '{\"jsonrpc\":\"2.0\",\"id\":6,\"result\":{}}'; printf '\\n\\n\\0\\377'";
    peer.call(6, "sandbox_run", json!({ "command": ["sh", "-c", noise] }));
    let answer = peer.answer(6);
    assert!(answer["result"]["structuredContent"]["stdout"].as_str().unwrap().starts_with("{\"jsonrpc\""));
    drop((peer.to, peer.from));
    assert!(wait(&mut peer.server).success());
    host.assert_nothing_is_left();
}

#[test]
fn a_peer_over_http_that_dies_leaves_nothing_behind() {
    let host = Host::new();
    let server = Server::start(&host, &[]);
    let address = server.url.strip_prefix("http://").unwrap();
    let post = |session: &str, body: &Value| {
        let (body, mut stream) = (body.to_string(), TcpStream::connect(address).unwrap());
        let head = format!(
            "POST /mcp HTTP/1.1\r\nHost: {address}\r\n{session}Content-Type: application/json\r\n\
            Accept: application/json, text/event-stream\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        BufReader::new(stream)
    };
    let find = |answer: &mut BufReader<TcpStream>, word: &str| {
        answer.lines().map(Result::unwrap).find(|line| line.contains(word)).unwrap()
    };
    let client = json!({ "name": "tests", "version": "1" });
    let hello = json!({ "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
        "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": client } });
    let session = find(&mut post("", &hello), "mcp-session-id") + "\r\n";
    let ready = json!({ "jsonrpc": "2.0", "method": "notifications/initialized" });
    find(&mut post(&session, &ready), "202");
    let work = json!({ "jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {
        "name": "sandbox_run", "arguments": { "command": ["sh", "-c", "echo up; sleep 1000"] },
        "_meta": { "progressToken": "told" } } });
    let mut answer = post(&session, &work);
    find(&mut answer, "\"up\"");
    assert_eq!(host.sandboxes().len(), 1);
    drop(answer);
    let deadline = Instant::now() + Duration::from_secs(30);
    while !host.sandboxes().is_empty() {
        assert!(Instant::now() < deadline, "its sandbox is still there");
        std::thread::sleep(Duration::from_millis(50));
    }
    // The session is there for one that comes back.
    let list = json!({ "jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {
        "name": "sandbox_list", "arguments": {} } });
    find(&mut post(&session, &list), "\"sandboxes\":[]");
    server.end();
    host.assert_nothing_is_left();
}

/// One request, as it is; the head of the answer.
fn raw(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn strangers_do_not_come_in_over_http() {
    let host = Host::bare();
    let body = json!({ "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
        "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": { "name": "x", "version": "1" } } });
    let body = body.to_string();
    let request = |server: &str, extra: &str| {
        let length = body.len();
        let head = "POST /mcp HTTP/1.1\r\nConnection: close\r\nContent-Type: application/json\r\n\
            Accept: application/json, text/event-stream\r\n";
        raw(server, &format!("{head}Content-Length: {length}\r\n{extra}\r\n{body}"))
    };
    let with_key = Server::start(&host, &["--api-key", KEY]);
    let address = with_key.url.strip_prefix("http://").unwrap().to_owned();
    let own = format!("Host: {address}\r\n");
    assert!(request(&address, &own).starts_with("HTTP/1.1 401"));
    assert!(request(&address, &format!("{own}Authorization: Bearer {KEY}x\r\n")).starts_with("HTTP/1.1 401"));
    let answer = request(&address, &format!("{own}Authorization: Bearer {KEY}\r\n"));
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"agentkernel\""), "{answer}");
    with_key.end();
    let keyless = Server::start(&host, &[]);
    let address = keyless.url.strip_prefix("http://").unwrap().to_owned();
    assert!(request(&address, &format!("Host: {address}\r\n")).starts_with("HTTP/1.1 200"));
    // A page of a stranger's, whose name leads here; and one that says whose it is.
    assert!(request(&address, "Host: stranger.example\r\n").starts_with("HTTP/1.1 403"));
    let page = format!("Host: {address}\r\nOrigin: https://stranger.example\r\n");
    assert!(request(&address, &page).starts_with("HTTP/1.1 403"));
    keyless.end();
}
