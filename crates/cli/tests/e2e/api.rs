//! The HTTP API: what clients begin and leave, what they may not, and how a server ends.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::clients::{Server, script, sources};
use crate::host::{Host, PATIENCE, finish, is_root, set_mode, signal};

/// A request whose answer may come later, or never be read.
struct Asked(TcpStream);

impl Asked {
    #[track_caller]
    fn new(url: &str, method: &str, path: &str, headers: &str, body: &Value) -> Self {
        let mut stream = TcpStream::connect(url.strip_prefix("http://").unwrap()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let length = body.len();
        let kind = "content-type: application/json\r\nconnection: close\r\nhost: localhost";
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\n{kind}\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
        )
        .unwrap();
        Self(stream)
    }

    /// Reads until `text` has come.
    #[track_caller]
    fn wait_for(&mut self, text: &str) {
        let (mut seen, mut piece) = (Vec::new(), [0; 4096]);
        // A stream of events is never silent for long.
        let deadline = Instant::now() + PATIENCE;
        while !String::from_utf8_lossy(&seen).contains(text) {
            let count = self.0.read(&mut piece).unwrap();
            let is_over = count == 0 || Instant::now() > deadline;
            assert!(!is_over, "{text} did not come: {}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&piece[..count]);
        }
    }

    /// Head and body of the answer.
    fn answer(mut self) -> (String, String) {
        let mut text = Vec::new();
        self.0.read_to_end(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        (head.to_owned(), body.to_owned())
    }
}

/// Status and body of an answer.
#[track_caller]
fn ask(server: &Server, method: &str, path: &str, body: &Value) -> (u16, Value) {
    ask_with(server, "", method, path, body)
}

#[track_caller]
fn ask_with(server: &Server, headers: &str, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let (head, body) = Asked::new(&server.url, method, path, headers, body).answer();
    let status = head.split(' ').nth(1).unwrap_or_else(|| panic!("{head:?}")).parse().unwrap();
    (status, serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {head}\n{body}")))
}

/// The data of an answer that must be one.
#[track_caller]
fn data(server: &Server, method: &str, path: &str, body: &Value) -> Value {
    let (status, answer) = ask(server, method, path, body);
    assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
    answer["data"].clone()
}

/// The code of an answer that must be an error of this status.
#[track_caller]
fn refused(server: &Server, status: u16, method: &str, path: &str, body: &Value) -> String {
    let (found, answer) = ask(server, method, path, body);
    assert_eq!(found, status, "{method} {path} {body}: {answer}");
    answer["code"].as_str().unwrap().to_owned()
}

#[track_caller]
fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn small(name: &str) -> Value {
    json!({ "name": name })
}

#[test]
fn what_no_client_should_send_is_refused() {
    let host = Host::new();
    fs::write(host.path().join("only-on-the-host"), "secret").unwrap();
    let only = host.path().join("only-on-the-host").display().to_string();
    let private = [host.state(), host.home(), host.project()].map(|path| path.display().to_string());
    for key in ["", "a-key-of-the-tests"] {
        let flags: &[&str] = if key.is_empty() { &[] } else { &["--api-key", key] };
        let server = Server::start(&host, flags);
        let mut arguments = vec![server.url.as_str(), key, &only];
        arguments.extend(private.iter().map(String::as_str));
        server.client(&host, script("hostile.py", &arguments));
        let said = server.end();
        assert!(said.lines().count() < 100 && !said.contains("panicked"), "{said}");
    }
    host.assert_nothing_is_left();
}

#[test]
fn what_a_client_leaves_is_ended() {
    let host = Host::new();
    let server = Server::start(&host, &[]);
    let forever = json!({ "command": ["sh", "-c", "echo up; sleep 1000 & sleep 1000"] });
    // Before it began, while it runs, and while it is followed.
    let many = json!({ "commands": [forever, forever] });
    for (path, body, moment) in [
        ("/run", &forever, 0),
        ("/run", &forever, 3000),
        ("/run/stream", &forever, 1),
        ("/batch/run", &many, 3000),
    ] {
        let mut asked = Asked::new(&server.url, "POST", path, "", body);
        match moment {
            1 => asked.wait_for("up\\n"),
            milliseconds => thread::sleep(Duration::from_millis(milliseconds)),
        }
        drop(asked);
        wait_until("the sandbox of a client that is gone is there", || host.sandboxes().is_empty());
    }
    data(&server, "POST", "/sandboxes", &small("dev"));
    let look = json!({ "command": ["sh", "-c", "ps ax | grep -c '[s]leep 1000'"] });
    let count = || data(&server, "POST", "/sandboxes/dev/exec", &look)["stdout"].clone();
    let asked = Asked::new(&server.url, "POST", "/sandboxes/dev/exec", "", &forever);
    wait_until("the command does not run", || count() == "3\n");
    drop(asked);
    wait_until("the command of a client that is gone runs on", || count() == "0\n");
    data(&server, "DELETE", "/sandboxes/dev", &Value::Null);
    server.end();
    host.assert_nothing_is_left();
}

/// What a client does not read costs the server no memory, and what nobody could read is left out.
#[test]
fn a_client_that_does_not_read_is_waited_for() {
    let host = Host::new();
    let server = Server::start(&host, &[]);
    let memory = || {
        let status = fs::read_to_string(format!("/proc/{}/status", server.running.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
    };
    let endless = json!({ "command": ["sh", "-c", "echo up; exec yes"] });
    let mut asked = Asked::new(&server.url, "POST", "/run/stream", "", &endless);
    asked.wait_for("up\\n");
    let before = memory();
    thread::sleep(Duration::from_secs(3));
    let after = memory();
    assert!(after < before + 32, "{before} MiB, later {after} MiB");
    drop(asked);
    wait_until("the sandbox of a client that is gone is there", || host.sandboxes().is_empty());

    let much =
        json!({ "command": ["sh", "-c", "echo begin; head -c 20000000 /dev/zero | tr '\\0' x; echo end"] });
    let told = data(&server, "POST", "/run", &much);
    assert_eq!(told["exit_code"], 0, "{}", told["error"]);
    let (output, all) = (told["stdout"].as_str().unwrap(), 20_000_000 + 6 + 4);
    assert!(output.starts_with("begin\nxxx") && output.ends_with("xxxend\n"));
    assert_eq!(told["omitted_bytes"], all - (8 << 20), "8 MiB are kept");
    assert!(output.len() < (8 << 20) + 100, "{} bytes", output.len());
    server.end();
    host.assert_nothing_is_left();
}

#[test]
fn many_at_once_are_answered_and_too_many_told_to_wait() {
    let host = Host::new();
    let server = Server::start(&host, &[]);
    let urls = &server.url;
    thread::scope(|scope| {
        for number in 0..32 {
            scope.spawn(move || {
                let body = json!({ "command": ["echo", number.to_string()] });
                let (head, answer) = Asked::new(urls, "POST", "/run", "", &body).answer();
                assert!(head.starts_with("HTTP/1.1 200"), "{head}");
                let answer: Value = serde_json::from_str(&answer).unwrap();
                assert_eq!(answer["data"]["stdout"], format!("{number}\n"));
            });
        }
    });
    server.end();
    let server = Server::start(&host, &["--runs", "1", "--queue", "2", "--sandboxes", "1"]);
    let forever = json!({ "command": ["sleep", "1000"] });
    let waiting: Vec<Asked> = (0..3).map(|_| Asked::new(&server.url, "POST", "/run", "", &forever)).collect();
    wait_until("three do not wait", || data(&server, "GET", "/status", &Value::Null)["runs"] == 3);
    let (status, answer) = ask(&server, "POST", "/run", &forever);
    assert_eq!((status, &answer["code"]), (429, &json!("busy")), "{answer}");
    assert_eq!(refused(&server, 429, "POST", "/run/stream", &forever), "busy");
    assert!(answer["error"].as_str().unwrap().contains("1 commands run and 2 wait already"), "{answer}");
    drop(waiting);
    wait_until("places stay taken", || data(&server, "GET", "/status", &Value::Null)["runs"] == 0);
    assert_eq!(data(&server, "POST", "/run", &json!({ "command": ["true"] }))["exit_code"], 0);
    data(&server, "POST", "/sandboxes", &small("one"));
    for (path, body) in [("/sandboxes", small("two")), ("/sandboxes/one/fork", json!({ "as": "two" }))] {
        assert_eq!(refused(&server, 429, "POST", path, &body), "too-many");
    }
    data(&server, "POST", "/snapshots", &json!({ "sandbox": "one", "name": "then" }));
    let restore = "/snapshots/then/restore";
    assert_eq!(refused(&server, 429, "POST", restore, &json!({ "as": "two" })), "too-many");
    data(&server, "POST", restore, &Value::Null);
    data(&server, "DELETE", "/snapshots/then", &Value::Null);
    data(&server, "POST", "/sandboxes/one/stop", &Value::Null);
    data(&server, "POST", "/sandboxes/one/start", &Value::Null);
    data(&server, "DELETE", "/sandboxes/one", &Value::Null);
    server.end();
    host.assert_nothing_is_left();
}

#[test]
fn nothing_of_the_host_without_a_grant() {
    let host = Host::new();
    let outside = host.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "of the host\n").unwrap();
    let volume = format!("{}:/outside", outside.display());
    host.agentkernel(&["create", "theirs", "-q", "--memory", "512M", "--profile", "permissive"]).expect(0);
    let server = Server::start(&host, &[]);
    for more in [
        json!({ "profile": "permissive" }),
        json!({ "workspace": "rw" }),
        json!({ "volumes": [volume] }),
        json!({ "volumes": ["~:/x"] }),
        json!({ "image": outside }),
        json!({ "image": "./image.tar" }),
        json!({ "allow": ["127.0.0.1"] }),
        json!({ "network": "none", "allow": ["10.0.0.0/8:80"] }),
    ] {
        let mut body = json!({ "command": ["true"] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert_eq!(refused(&server, 403, "POST", "/run", &body), "not-granted");
    }
    let body = json!({ "name": "open", "ports": ["0.0.0.0:0:80"] });
    assert_eq!(refused(&server, 403, "POST", "/sandboxes", &body), "not-granted");
    // What the command line made with more than that is seen, and not used.
    assert_eq!(data(&server, "GET", "/sandboxes/theirs", &Value::Null)["profile"], "permissive");
    for (method, path, body) in [
        ("POST", "exec", json!({ "command": ["true"] })),
        ("POST", "exec/detach", json!({ "command": ["true"] })),
        ("POST", "fork", json!({ "as": "mine" })),
        ("GET", "files/etc/hostname", Value::Null),
        ("GET", "diff", Value::Null),
    ] {
        let path = format!("/sandboxes/theirs/{path}");
        assert_eq!(refused(&server, 403, method, &path, &body), "not-granted", "{path}");
    }
    let body = json!({ "sandbox": "theirs" });
    assert_eq!(refused(&server, 403, "POST", "/snapshots", &body), "not-granted");
    // What could run on the host by itself is not taken by naming it.
    data(&server, "POST", "/sandboxes", &small("mine"));
    let body = json!({ "command": ["sh", "-c", "echo 'touch /tmp/x' > .envrc"] });
    data(&server, "POST", "/sandboxes/mine/exec", &body);
    let report = data(&server, "POST", "/sandboxes/mine/apply", &json!({ "paths": [".envrc"] }));
    assert!(report["complete"] == false && !host.project().join(".envrc").exists(), "{report}");
    data(&server, "DELETE", "/sandboxes/mine", &Value::Null);
    // A stream says why nothing comes.
    let body = json!({ "command": ["true"], "workspace": "none", "apply": true });
    let mut asked = Asked::new(&server.url, "POST", "/run/stream", "", &body);
    asked.wait_for("event: error");
    server.end();

    let server = Server::start(&host, &["--allow-host-access"]);
    let body = json!({ "command": ["cat", "/outside/file"], "volumes": [volume] });
    assert_eq!(data(&server, "POST", "/run", &body)["stdout"], "of the host\n");
    let body = json!({ "command": ["sh", "-c", "echo written > by-a-client"], "workspace": "rw" });
    data(&server, "POST", "/run", &body);
    assert_eq!(host.read("by-a-client"), "written\n");
    let body = json!({ "command": ["true"] });
    assert_eq!(data(&server, "POST", "/sandboxes/theirs/exec", &body)["exit_code"], 0);
    server.end();
    host.agentkernel(&["rm", "--force", "theirs"]).expect(0);

    let said = host.agentkernel(&["serve", "--host", "0.0.0.0", "--port", "0"]);
    assert!(said.code() == 1 && said.stderr.contains("--api-key-file"), "{}", said.stderr);
    let said = host.agentkernel(&["serve", "--port", "0", "--profile", "permissive"]);
    assert!(said.code() == 1 && said.stderr.contains("--allow-host-access"), "{}", said.stderr);
    // A stranger's key opens nothing: it is asked for besides what holds without one.
    host.write("agentkernel.toml", "[api]\napi_key = \"known-to-others\"\n");
    let server = Server::start(&host, &[]);
    assert_eq!(refused(&server, 401, "GET", "/sandboxes", &Value::Null), "unauthorized");
    let key = "x-api-key: known-to-others\r\n";
    assert_eq!(ask_with(&server, key, "GET", "/sandboxes", &Value::Null).0, 200);
    let origin = "x-api-key: known-to-others\r\norigin: http://evil.example\r\n";
    assert_eq!(ask_with(&server, origin, "GET", "/sandboxes", &Value::Null).0, 403);
    server.end();
    host.assert_nothing_is_left();
}

#[test]
fn only_its_own_user_is_served_without_a_key() {
    let host = Host::new();
    let server = Server::start(&host, &[]);
    let socket = host.state().join("serve.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: any\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with(r#"{"success":true,"data":"ok"}"#), "{answer}");
    // Only root can be somebody else; the run of these tests as root tries it.
    if is_root() {
        let mut command = Command::new("runuser");
        command.args(["-u", "nobody", "--", "curl", "-s"]).arg(format!("{}/health", server.url));
        let said = finish(command, b"").expect_any();
        assert!(said.contains("only its own user is served"), "{said}");
    }
    server.end();
    assert!(!socket.exists());
    let key = host.path().join("keys");
    fs::write(&key, "first\n\nsecond\n").unwrap();
    set_mode(&key, 0o600);
    let server = Server::start(&host, &["--api-key-file", key.to_str().unwrap()]);
    for (key, status) in [("first", 200), ("second", 200), ("third", 401)] {
        let header = format!("authorization: Bearer {key}\r\n");
        assert_eq!(ask_with(&server, &header, "GET", "/sandboxes", &Value::Null).0, status, "{key}");
    }
    assert_eq!(ask(&server, "GET", "/health", &Value::Null).0, 200, "whoever watches over it needs no key");
    server.end();
    host.assert_nothing_is_left();
}

#[test]
fn a_request_that_is_sent_again_is_not_done_again() {
    let host = Host::new();
    let server = Server::start(&host, &[]);
    let create = |key: &str, body: &Value| {
        ask_with(&server, &format!("idempotency-key: {key}\r\n"), "POST", "/sandboxes", body)
    };
    // The client is gone before the answer: what it began goes on.
    let header = "idempotency-key: one\r\n";
    drop(Asked::new(&server.url, "POST", "/sandboxes", header, &small("dev")));
    let (status, first) = create("one", &small("dev"));
    assert_eq!(status, 201, "{first}");
    assert_eq!(create("one", &small("dev")), (201, first.clone()));
    assert_eq!(data(&server, "GET", "/sandboxes", &Value::Null), json!([first["data"]]));
    let (status, answer) = create("one", &small("other"));
    assert_eq!((status, &answer["code"]), (422, &json!("idempotency-key-reused")));
    let (status, answer) = create("two", &small("dev"));
    assert_eq!((status, &answer["code"]), (409, &json!("name-taken")));
    // What failed may be tried again.
    data(&server, "DELETE", "/sandboxes/dev", &Value::Null);
    assert_eq!(create("two", &small("dev")).0, 201);
    data(&server, "DELETE", "/sandboxes/dev", &Value::Null);
    let twice: Vec<Value> = (0..2)
        .map(|_| {
            let body = json!({ "command": ["cat", "/proc/sys/kernel/random/uuid"] });
            ask_with(&server, "idempotency-key: three\r\n", "POST", "/run", &body).1
        })
        .collect();
    assert_eq!(twice[0], twice[1]);
    // Several at once: one is done, the others wait for it, also with the client that began it gone.
    let body = json!({ "command": ["sh", "-c", "sleep 2; cat /proc/sys/kernel/random/uuid"] });
    let header = "idempotency-key: four\r\n";
    let begun = Asked::new(&server.url, "POST", "/run", header, &body);
    wait_until("it does not begin", || host.sandboxes().len() == 1);
    drop(begun);
    let waiting: Vec<Asked> =
        (0..3).map(|_| Asked::new(&server.url, "POST", "/run", header, &body)).collect();
    let answers: Vec<_> = waiting.into_iter().map(Asked::answer).collect();
    for (head, told) in &answers {
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("idempotency-replayed: true"), "{head}");
        assert_eq!(*told, answers[0].1);
    }
    server.end();
    host.assert_nothing_is_left();
}

#[test]
fn sandboxes_outlive_the_server_and_temporary_ones_do_not() {
    let host = Host::new();
    let server = Server::start(&host, &[]);
    data(&server, "POST", "/sandboxes", &small("dev"));
    let mut events = Asked::new(&server.url, "GET", "/events", "", &Value::Null);
    // From its answer on nothing is missed.
    events.wait_for("200 OK");
    let body = json!({ "command": ["sh", "-c", "echo up; sleep 1000"] });
    let mut run = Asked::new(&server.url, "POST", "/run/stream", "", &body);
    run.wait_for("up\\n");
    events.wait_for("event: started");
    server.end();
    wait_until("a temporary sandbox is left", || host.sandboxes().len() == 1);
    host.agentkernel(&["exec", "-q", "dev", "--", "true"]).expect(0);

    // Killed at any instant, it harms no sandbox, and what was its own goes.
    let server = Server::start(&host, &[]);
    let mut run = Asked::new(&server.url, "POST", "/run/stream", "", &body);
    run.wait_for("up\\n");
    signal(server.running.child.id(), Signal::KILL);
    let _ = server.running.end();
    wait_until("a temporary sandbox is left", || host.sandboxes().len() == 1);
    let server = Server::start(&host, &[]);
    assert_eq!(data(&server, "GET", "/sandboxes/dev", &Value::Null)["status"], "running");
    data(&server, "DELETE", "/sandboxes/dev", &Value::Null);
    server.end();
    host.assert_nothing_is_left();
}

#[test]
fn a_terminal_over_a_websocket() {
    let host = Host::new();
    let server = Server::start(&host, &[]);
    data(&server, "POST", "/sandboxes", &small("dev"));
    server.client(&host, script("terminal.py", &[&server.url]));
    data(&server, "DELETE", "/sandboxes/dev", &Value::Null);
    server.end();
    host.assert_nothing_is_left();
}

/// Every command of docs/api.md does what the page says.
#[test]
fn the_page_about_the_api_is_right() {
    let host = Host::new();
    let server = Server::start(&host, &["--allow-host-access"]);
    host.write("hello.txt", "hello\n");
    let page = sources().join("../../docs/api.md");
    server.client(&host, script("page.py", &[page.to_str().unwrap(), &server.url]));
    server.end();
    host.assert_nothing_is_left();
}
