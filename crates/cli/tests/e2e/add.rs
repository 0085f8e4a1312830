//! `ADD` from addresses: what is fetched, what may be reached, and that nothing is left of what fails. No machine is needed.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};

use crate::build::assert_store_is_sound;
use crate::host::{Host, Said, finish, is_root, noise};
use crate::living_faults::Mounted;

/// Answers as bytes, by what was asked for.
type Answers = HashMap<String, Vec<u8>>;

/// A server on the loopback interface, which notes what it was asked for.
struct Server {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(answers: &[(&str, Vec<u8>)]) -> Self {
        let answers: Answers =
            answers.iter().map(|(path, answer)| ((*path).to_owned(), answer.clone())).collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self { address: listener.local_addr().unwrap(), asked: Arc::default() };
        let asked = server.asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = answer(stream, &answers, &asked);
            }
        });
        server
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// What was asked for since this was last called.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

fn answer(stream: TcpStream, answers: &Answers, asked: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let target = first.split(' ').nth(1).unwrap_or_default().to_owned();
    asked.lock().unwrap().push(target.clone());
    let missing = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec();
    let mut stream = stream;
    stream.write_all(answers.get(&target).unwrap_or(&missing))?;
    stream.shutdown(Shutdown::Write)
}

fn ok(body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

fn moved(target: &str) -> Vec<u8> {
    format!("HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        .into_bytes()
}

fn build(host: &Host, dockerfile: &str, flags: &[&str]) -> Said {
    host.write("Dockerfile", dockerfile);
    let mut arguments = vec!["build", "-t", "tools"];
    arguments.extend(flags);
    arguments.push(".");
    host.agentkernel(&arguments)
}

#[track_caller]
fn refused(host: &Host, dockerfile: &str, flags: &[&str], expected: &[&str]) {
    let said = build(host, dockerfile, flags);
    said.expect(1);
    for part in expected {
        assert!(said.stderr.contains(part), "{part}: {}", said.stderr);
    }
    assert!(!host.state().join("image-metadata/tools.json").exists());
    assert_nothing_is_kept(host);
}

/// No file of what was fetched, under whatever name.
fn assert_nothing_is_kept(host: &Host) {
    for directory in ["images/ingest", "images/blobs/sha256"] {
        let entries = fs::read_dir(host.state().join(directory)).into_iter().flatten().flatten();
        let left: Vec<_> = entries.map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// Files of the image, as `tar` lists them, and one's content.
fn files(host: &Host) -> String {
    let archive = host.path().join("tools.tar");
    host.agentkernel(&["images", "save", "tools", "-o", archive.to_str().unwrap()]).expect(0);
    let unpacked = host.path().join("unpacked");
    let _ = fs::remove_dir_all(&unpacked);
    fs::create_dir_all(&unpacked).unwrap();
    assert!(
        Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&unpacked).status().unwrap().success()
    );
    let manifest = fs::read(unpacked.join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let mut listing = String::new();
    for layer in manifest[0]["Layers"].as_array().unwrap() {
        let layer = unpacked.join(layer.as_str().unwrap());
        for flags in [["--numeric-owner", "-tvf"], ["--to-stdout", "-xf"]] {
            let output = Command::new("tar").args(flags).arg(&layer).output().unwrap();
            listing.push_str(&String::from_utf8_lossy(&output.stdout));
        }
    }
    listing
}

fn digest_of(content: &[u8]) -> String {
    let mut child = Command::new("sha256sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(content).unwrap();
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    child.wait().unwrap();
    format!("sha256:{}", &text[..64])
}

#[test]
fn what_is_fetched_becomes_a_file() {
    let host = Host::bare();
    let server = Server::start(&[
        ("/d/plain.txt?token=1", ok(b"fetched content\n")),
        ("/archive.tar.gz", ok(b"\x1f\x8b not unpacked\n")),
        ("/moved", moved("/d/plain.txt?token=1")),
    ]);
    let allow = server.address.to_string();
    host.write("local.txt", "local content\n");
    let text = format!(
        "FROM scratch\nADD {} /named\nADD {} local.txt /into/\nADD --chown=3:4 --chmod=640 {} /owned\n",
        server.url("/d/plain.txt?token=1"),
        server.url("/archive.tar.gz"),
        server.url("/moved"),
    );
    build(&host, &text, &["--allow", &allow]).expect(0);
    assert_eq!(server.asked().len(), 4);
    let found = files(&host);
    for part in [
        "-rw------- 0/0",
        "-rw-r----- 3/4",
        " into/archive.tar.gz",
        " into/local.txt",
        "not unpacked",
        "local content",
    ] {
        assert!(found.contains(part), "{part}: {found}");
    }
    assert_eq!(found.matches("fetched content").count(), 2, "{found}");
    assert_store_is_sound(&host);

    // An allow-list does as well, and without a network ADD of files goes on.
    build(&host, &text, &["--network", "none", "--allow", &allow]).expect(0);
    build(&host, "FROM scratch\nADD local.txt /\n", &["--network", "none"]).expect(0);
}

#[test]
fn what_may_be_reached_is_what_the_flags_say() {
    let host = Host::bare();
    let floored = TcpListener::bind("127.0.0.2:0").unwrap();
    floored.set_nonblocking(true).unwrap();
    let elsewhere = format!("http://{}/secret", floored.local_addr().unwrap());
    let server = Server::start(&[
        ("/f", ok(b"content")),
        ("/floor", moved(&elsewhere)),
        ("/metadata", moved("http://169.254.169.254/latest/meta-data/")),
    ]);
    let (allow, port) = (server.address.to_string(), server.address.port());
    let add = |url: &str| format!("FROM scratch\nADD {url} /f\n");
    let direct = add(&server.url("/f"));
    let flag = format!("--allow {allow}");
    refused(&host, &direct, &[], &["Dockerfile:2:5: ", "it is a loopback address", &flag]);
    let flag = "--allow example.org:80";
    let public = add("http://example.org/f");
    refused(&host, &public, &["--network", "none"], &["there is no network", "--network public", flag]);
    refused(&host, &public, &["--network", "none", "--allow", "example.com"], &["no rule allows it", flag]);
    let flag = format!("--allow {allow}");
    refused(&host, &direct, &["--allow", &allow, "--deny", "127.0.0.0/8"], &["denied by 127.0.0.0/8"]);
    refused(&host, &add(&format!("http://0x7f.1:{port}/f")), &[], &["it is a loopback address", &flag]);
    let by_name = add(&format!("http://localhost:{port}/f"));
    for flags in [&["--allow", "localhost"][..], &["--network", "none", "--allow", "localhost"]] {
        refused(&host, &by_name, flags, &["which localhost leads to", "it is a loopback address"]);
    }
    assert!(server.asked().is_empty(), "what is refused is not asked");

    let allowed = ["--allow", allow.as_str()];
    refused(&host, &add(&server.url("/floor")), &allowed, &["redirects to 127.0.0.2", "--allow 127.0.0.2:"]);
    refused(
        &host,
        &add(&server.url("/metadata")),
        &allowed,
        &["it is a metadata address", "--allow 169.254.169.254:80"],
    );
    assert!(floored.accept().is_err(), "nobody came");
    build(&host, &by_name, &allowed).expect(0);

    // Docker's builder would not keep to any of it.
    host.agentkernel(&["images", "rm", "tools"]).expect(0);
    host.agentkernel(&["images", "prune"]).expect(0);
    let said = build(&host, &direct, &["--engine", "docker", "--network", "none"]);
    said.expect(1);
    assert!(said.stderr.contains("Docker does not keep to --network"), "{}", said.stderr);
    let said = build(&host, &direct, &["--allow", "10.0.0.1/8"]);
    said.expect(2);
    assert!(said.stderr.contains("`10.0.0.1/8` is no rule: the range begins at 10.0.0.0"), "{}", said.stderr);

    // A proxy connects in our place: the rules hold all the same.
    let proxy = Server::start(&[("http://name.invalid/f", ok(b"by proxy"))]);
    let behind = |flags: &[&str]| {
        host.write("Dockerfile", add("http://name.invalid/f"));
        let mut command = host.command(&["build", "-t", "tools"]);
        command.args(flags).arg(".").env_remove("NO_PROXY").env_remove("no_proxy");
        command.env("http_proxy", format!("http://{}", proxy.address));
        finish(command, b"")
    };
    let said = behind(&["--deny", "*.invalid"]);
    said.expect(1);
    assert!(said.stderr.contains("denied by *.invalid") && proxy.asked().is_empty(), "{}", said.stderr);
    behind(&[]).expect(0);
    assert_eq!(proxy.asked(), ["http://name.invalid/f"]);
    assert!(files(&host).contains("by proxy"));
}

#[test]
fn checksums_hold_and_spare_the_way() {
    let host = Host::bare();
    let content = b"what it should be\n";
    let server = Server::start(&[("/f", ok(content)), ("/other", ok(b"something else\n"))]);
    let allow = server.address.to_string();
    let flags = ["--allow", allow.as_str()];
    let (right, other) = (digest_of(content), digest_of(b"something else\n"));
    let add = |path: &str| {
        format!("FROM scratch\nARG SUM={right}\nADD --checksum=$SUM \\\n  {} /f\n", server.url(path))
    };
    refused(&host, &add("/other"), &flags, &["Dockerfile:3:16: ", &right, &other]);
    server.asked();
    build(&host, &add("/f"), &flags).expect(0);
    assert_eq!(server.asked().len(), 1);
    let said = build(&host, &add("/f"), &flags);
    said.expect(0);
    assert!(said.stderr.contains("CACHED") && server.asked().is_empty(), "{}", said.stderr);
    assert!(files(&host).contains("what it should be"));

    // Without one it is asked for each time, and what is the same is not made again.
    let plain = format!("FROM scratch\nADD {} /f\n", server.url("/f"));
    build(&host, &plain, &flags).expect(0);
    let said = build(&host, &plain, &flags);
    said.expect(0);
    assert!(said.stderr.contains("CACHED"), "{}", said.stderr);
    assert_eq!(server.asked().len(), 2);
}

#[test]
fn servers_that_fail_leave_nothing() {
    let host = Host::bare();
    let cut = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\nConnection: close\r\n\r\nhalf of it".to_vec();
    let server = Server::start(&[("/cut", cut), ("/large", ok(&noise(16 << 20)))]);
    let allow = server.address.to_string();
    let flags = ["--allow", allow.as_str()];
    let add = |path: &str| format!("FROM scratch\nADD {} /f\n", server.url(path));
    refused(&host, &add("/cut"), &flags, &["Dockerfile:2:5: the connection to 127.0.0.1", "hint: try again"]);
    refused(&host, &add("/none"), &flags, &["answers 404 Not Found", "hint: check the address"]);
    refused(&host, &add("/none.git"), &flags, &["Dockerfile:2:5: ADD of the git repository"]);
    assert_eq!(server.asked(), ["/cut", "/none"]);
    if is_root() {
        let images = Mounted::tmpfs(&host.state().join("images"), "8m");
        refused(&host, &add("/large"), &flags, &["cannot keep what is fetched", "No space left"]);
        drop(images);
    }
    host.assert_nothing_is_left();
}
