//! The network of sandboxes: what is reached, what is not, and that nothing is lost on the way.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::host::{Host, Said, finish, is_root, noise};

/// Says of each target `HOST PORT` what became of a connection, and whether that took too long.
const PROBE: &str = r"import socket, sys, time
for target in sys.argv[1:]:
    host, port = target.split()
    start = time.monotonic()
    try:
        stream = socket.create_connection((host, int(port)), 20)
        said = stream.recv(100).decode() or 'nothing'
    except OSError:
        said = 'no'
    print(said + (' but slowly' if time.monotonic() - start > 2 else ''))
";

fn python(host: &Host, name: &str, script: &str, arguments: &[&str]) -> Said {
    host.agentkernel(&[&["exec", "-q", name, "--", "python3", "-c", script][..], arguments].concat())
}

fn audit(host: &Host, name: &str) -> Vec<Value> {
    let said = host.agentkernel(&["audit", name, "--json"]);
    said.expect(0).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Serves each connection on a thread of its own, as long as the test runs. Returns the port.
fn serve(each: impl Fn(TcpStream) + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let each = Arc::new(each);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let each = Arc::clone(&each);
            std::thread::spawn(move || each(stream));
        }
    });
    port
}

/// Gives back what it reads.
fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

/// Guards that much and many arrive whole, that what is saved and forked has a network from its first byte while the
/// connections of before are reset, and that the record says what was moved.
#[test]
fn much_and_many_arrive_and_forks_begin_anew() {
    const MIB: usize = 200;
    const MANY: &str = r"import socket, sys
streams = [socket.create_connection(('192.0.0.1', int(sys.argv[1])), 60) for _ in range(100)]
for number, stream in enumerate(streams):
    stream.sendall(b'%04d' % number * 500)
for number, stream in enumerate(streams):
    data = b''
    while len(data) < 2000:
        data += stream.recv(4096) or sys.exit('lost')
    assert data == b'%04d' % number * 500
print(len(streams))
";
    const DOWNLOAD: &str = r"import hashlib, socket, sys
stream, digest, length = socket.create_connection(('192.0.0.1', int(sys.argv[1])), 60), hashlib.sha256(), 0
while data := stream.recv(1 << 18):
    digest.update(data)
    length += len(data)
print(length, digest.hexdigest())
";
    // Writes what becomes of a connection on which nothing comes.
    const HOLD: &str = r"import os, socket, sys
stream = socket.create_connection(('192.0.0.1', int(sys.argv[1])))
stream.sendall(b'x'), stream.recv(1)
open('/var/tmp/held', 'w').close()
try: said = 'read %r' % stream.recv(1)
except OSError as error: said = error.strerror
with open('/var/tmp/new', 'w') as file: file.write(said)
os.rename('/var/tmp/new', '/var/tmp/became')
";
    let host = Host::new();
    let block = Arc::new(noise(1 << 20));
    let mut sum = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = sum.stdin.take().unwrap();
    for _ in 0..MIB {
        input.write_all(&block).unwrap();
    }
    drop(input);
    let sum = String::from_utf8(sum.wait_with_output().unwrap().stdout).unwrap()[..64].to_owned();
    let echoes = serve(echo).to_string();
    let blocks = serve(move |mut stream| {
        for _ in 0..MIB {
            stream.write_all(&block).unwrap();
        }
    })
    .to_string();
    let allow = format!("127.0.0.1:{echoes}");
    let also = format!("127.0.0.1:{blocks}");
    let create = ["create", "dev", "-q", "--workspace", "none", "--memory", "512M", "--no-network"];
    host.agentkernel(&[&create[..], &["--allow", &allow, "--allow", &also, "-P", "0:5353/udp"]].concat())
        .expect(0);
    assert_eq!(python(&host, "dev", MANY, &[&echoes]).expect(0), "100\n");
    let said = python(&host, "dev", DOWNLOAD, &[&blocks]);
    assert_eq!(said.expect(0), format!("{} {sum}\n", MIB << 20));
    // Of the record.
    python(&host, "dev", PROBE, &["192.0.2.1 81"]).expect(0);
    let entries = audit(&host, "dev");
    let number = |port: &str| port.parse::<u16>().unwrap();
    let count = |verdict: &str, port: u16| {
        entries.iter().filter(|entry| entry["verdict"] == verdict && entry["port"] == port).count()
    };
    assert_eq!(count("allowed", number(&echoes)), 100);
    assert_eq!(count("refused", 81), 1);
    let ended = entries.iter().find(|entry| entry["verdict"] == "ended" && entry["port"] == number(&blocks));
    assert!(ended.unwrap()["received"].as_u64().unwrap() >= (MIB as u64) << 20, "{ended:?}");
    // Datagrams through a published port.
    const DATAGRAMS: &str = r"import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('', 5353))
while True:
    data, peer = s.recvfrom(2000)
    s.sendto(data[::-1], peer)
";
    let detached = |script: &str, argument: &str| {
        host.agentkernel(&["exec", "-d", "dev", "--", "python3", "-c", script, argument]).expect(0).to_owned()
    };
    detached(DATAGRAMS, "");
    let info: Value = serde_json::from_str(host.agentkernel(&["info", "dev", "--json"]).expect(0)).unwrap();
    let published = info["ports"][0].as_str().unwrap().split(':').nth(1).unwrap().to_owned();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut buffer = [0; 100];
    loop {
        socket.send_to(b"abc", format!("127.0.0.1:{published}")).unwrap();
        if let Ok(length) = socket.recv(&mut buffer) {
            assert_eq!(&buffer[..length], b"cba");
            break;
        }
        assert!(Instant::now() < deadline, "no datagram came back");
    }
    // A fork, and a snapshot that is restored.
    detached(HOLD, &echoes);
    let shell = |name: &str, script: &str| {
        host.agentkernel(&["exec", name, "--", "sh", "-c", script]).expect(0).to_owned()
    };
    shell("dev", "until test -e /var/tmp/held; do sleep 0.05; done");
    host.agentkernel(&["fork", "dev", "--as", "child"]).expect(0);
    assert_eq!(python(&host, "child", MANY, &[&echoes]).expect(0), "100\n");
    let became =
        "i=0; until cat /var/tmp/became 2>/dev/null || test $i = 100; do i=$((i+1)); sleep 0.05; done";
    assert_eq!(shell("child", became), "Connection reset by peer");
    assert_eq!(shell("dev", "test -e /var/tmp/became || echo lives"), "lives\n");
    host.agentkernel(&["snapshot", "take", "dev", "kept"]).expect(0);
    assert_eq!(shell("dev", "test -e /var/tmp/became || echo lives"), "lives\n");
    host.agentkernel(&["snapshot", "restore", "kept", "--as", "again"]).expect(0);
    assert_eq!(python(&host, "again", MANY, &[&echoes]).expect(0), "100\n");
    assert_eq!(shell("again", became), "Connection reset by peer");
    host.agentkernel(&["rm", "--force", "--all"]).expect(0);
    host.agentkernel(&["snapshot", "rm", "kept"]).expect(0);
}

/// Without a network there is a card, and every question is answered at once.
#[test]
fn without_a_network_everything_is_refused_at_once() {
    const REFUSED: &str = r"import socket, time
def quick(what, error, call):
    start = time.monotonic()
    try: call()
    except OSError as e: assert isinstance(e, error), (what, e)
    else: raise SystemExit(what + ' came through')
    assert time.monotonic() - start < 2, what + ' was slow'
def udp():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(20)
    s.connect(('192.0.2.1', 4000))
    s.send(b'x')
    s.recv(10)
quick('tcp', ConnectionRefusedError, lambda: socket.create_connection(('192.0.2.1', 80), 20))
quick('host', ConnectionRefusedError, lambda: socket.create_connection(('192.0.0.1', 80), 20))
quick('udp', ConnectionRefusedError, udp)
quick('dns', socket.gaierror, lambda: socket.getaddrinfo('a.example', 80))
print([name for _, name in socket.if_nameindex() if name == 'eth0'])
";
    let host = Host::new();
    let arguments = ["run", "-q", "--network", "none", "--workspace", "none", "--", "python3", "-c", REFUSED];
    assert_eq!(host.agentkernel(&arguments).expect(0), "['eth0']\n");
    // The same that is refused is reached where it may be.
    let port = serve(|mut stream| stream.write_all(b"reached").unwrap());
    let (rule, target) = (format!("127.0.0.1:{port}"), format!("host.agentkernel.internal {port}"));
    let run = ["run", "-q", "--network", "none", "--allow", &rule, "--", "python3", "-c", PROBE, &target];
    assert_eq!(host.agentkernel(&run).expect(0), "reached\n");
}

/// An image that brings nothing but busybox has the same network.
#[test]
fn a_small_image_fetches_from_this_machine() {
    let host = Host::new();
    crate::build::base(&host);
    let port = serve(|mut stream| {
        let mut request = [0; 4096];
        assert!(stream.read(&mut request).unwrap() > 0);
        stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhere\n").unwrap();
    });
    let script = format!("busybox wget -q -O - http://host.agentkernel.internal:{port}/ || echo no");
    let run =
        |flags: &[&str]| host.sh(&[&["--image", "base", "--workspace", "none"], flags].concat(), &script);
    assert_eq!(run(&["--allow", &format!("127.0.0.1:{port}")]).expect(0), "here\n");
    assert_eq!(run(&[]).expect(0), "no\n");
}

/// A project's file has the rules; one that is none is named with its place.
#[test]
fn the_projects_file_has_rules() {
    let host = Host::new();
    host.write(
        "agentkernel.toml",
        "[network]\nmode = \"none\"\nallow = [\"a.example:80\"]\ndeny = [\"a.example\"]\nports = [\"0:8000\"]\n",
    );
    let said = host.agentkernel(&["run", "--", "python3", "-c", PROBE, "a.example 80", "192.0.2.1 80"]);
    assert_eq!(said.expect(0), "no\nno\n");
    assert!(said.stderr.contains("leads to port 8000"), "{}", said.stderr);
    assert!(said.stderr.contains("--allow 192.0.2.1:80"), "{}", said.stderr);
    // What is denied is not told to be allowed.
    assert!(!said.stderr.contains("--allow a.example"), "{}", said.stderr);
    host.write("agentkernel.toml", "[network]\nallow = [\n  \"fine.example\",\n  \"*bad*.example\",\n]\n");
    let said = host.agentkernel(&["run", "--", "true"]);
    assert_ne!(said.code(), 0);
    for word in ["agentkernel.toml", "*bad*.example", "hint:"] {
        assert!(said.stderr.contains(word), "{word}: {}", said.stderr);
    }
    assert!(said.stderr.contains(":4") || said.stderr.contains("line 4"), "{}", said.stderr);
}

/// A proxy of the caller's environment is gone through, but for what `NO_PROXY` names; the policy is asked all the same.
#[test]
fn the_callers_proxy_is_used() {
    let host = Host::new();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    let proxy = serve(move |mut stream| {
        let mut lines = BufReader::new(stream.try_clone().unwrap());
        let mut first = String::new();
        lines.read_line(&mut first).unwrap();
        let mut line = String::new();
        while lines.read_line(&mut line).unwrap() > 2 {
            line.clear();
        }
        seen.lock().unwrap().push(first.trim().to_owned());
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nby proxy").unwrap();
    });
    let direct = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&direct);
    let server = serve(move |mut stream| {
        counted.fetch_add(1, Ordering::Relaxed);
        stream.write_all(b"direct").unwrap();
    });
    let rule = format!("127.0.0.1:{server}");
    let targets = ["192.0.2.7 443".to_owned(), "10.1.2.3 443".to_owned(), format!("192.0.0.1 {server}")];
    let run = ["run", "-q", "--workspace", "none", "--allow", &rule, "--", "python3", "-c", PROBE];
    let mut command = host.command(&[&run[..], &targets.each_ref().map(String::as_str)].concat());
    command.env("HTTPS_PROXY", format!("http://127.0.0.1:{proxy}")).env("NO_PROXY", "localhost,127.0.0.1");
    assert_eq!(finish(command, b"").expect(0), "by proxy\nno\ndirect\n");
    assert_eq!(*asked.lock().unwrap(), ["CONNECT 192.0.2.7:443 HTTP/1.1"]);
    assert_eq!(direct.load(Ordering::Relaxed), 1);
}

/// Package managers work as they are configured here, under their defaults.
#[test]
fn package_managers_fetch() {
    let host = Host::new();
    let registry = Command::new("npm").args(["config", "get", "registry"]).output().unwrap();
    let registry = String::from_utf8(registry.stdout).unwrap();
    let index = Command::new("pip").args(["config", "get", "global.index-url"]).output().unwrap();
    let index = String::from_utf8(index.stdout).unwrap();
    let mut create: Vec<String> =
        ["create", "dev", "-q", "-e"].iter().map(|word| (*word).to_owned()).collect();
    create.push(format!("npm_config_registry={}", registry.trim()));
    // pip has its own default, as npm names its.
    if !index.trim().is_empty() {
        create.extend(["-e".to_owned(), format!("PIP_INDEX_URL={}", index.trim())]);
    }
    host.agentkernel(&create).expect(0);
    let exec = |words: &[&str]| host.agentkernel(&[&["exec", "dev", "--"], words].concat());
    let said =
        exec(&["pip", "download", "--no-deps", "--no-cache-dir", "-q", "-d", "/var/tmp/six", "six==1.16.0"]);
    said.expect(0);
    let said = exec(&[
        "sh",
        "-c",
        "cd /var/tmp/six && python3 -c 'import sys; sys.path.append(\"six-1.16.0-py2.py3-none-any.whl\"); \
                                   import six; print(six.__version__)'",
    ]);
    assert_eq!(said.expect(0), "1.16.0\n");
    assert_eq!(exec(&["npm", "view", "is-number@7.0.0", "version"]).expect(0).trim(), "7.0.0");
    host.agentkernel(&["rm", "--force", "dev"]).expect(0);
}

/// Namespaces in which this machine, a name server and servers on addresses of the floor are.
struct World {
    child: Child,
    directory: PathBuf,
}

impl World {
    fn new(host: &Host) -> Self {
        let directory = host.path().join("world");
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("network.py"), include_str!("network.py")).unwrap();
        std::fs::write(directory.join("hosts"), "203.0.113.7 moving.zone\n").unwrap();
        let mut child = Command::new("unshare")
            .args(["--net", "--mount", "python3"])
            .arg(directory.join("network.py"))
            .arg("here")
            .arg(&directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self { child, directory }
    }

    fn agentkernel(&self, host: &Host, arguments: &[&str]) -> Said {
        let inner = host.command(arguments);
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.child.id().to_string(), "--net", "--mount"])
            .arg(format!("--wd={}", host.project().display()))
            .arg(inner.get_program())
            .args(inner.get_args())
            .stdin(Stdio::null());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        finish(command, b"")
    }

    /// What `moving.zone` leads to from now on.
    fn moves(&self, address: Ipv4Addr) {
        std::fs::write(self.directory.join("hosts"), format!("{address} moving.zone\n")).unwrap();
        let pid = std::fs::read_to_string(self.directory.join("pid")).unwrap().trim().parse().unwrap();
        crate::host::signal(pid, rustix::process::Signal::HUP);
        std::thread::sleep(Duration::from_millis(300));
    }

    fn queries(&self) -> String {
        std::fs::read_to_string(self.directory.join("queries")).unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Addresses of the floor that really answer are refused in every spelling and by every name, and each is reached with
/// a rule; an allow-list holds by name.
#[test]
fn the_floor_and_allow_lists_hold_where_everything_answers() {
    if !is_root() {
        // Not with the macro: what that says is kept back when a test passes.
        let _ = std::io::stderr()
            .write_all(b"not run as this user: the namespaces of the test of the floor are root's\n");
        return;
    }
    let host = Host::new();
    let world = World::new(&host);
    let create = |name: &str, flags: &[&str]| {
        world
            .agentkernel(
                &host,
                &[&["create", name, "-q", "--workspace", "none", "--memory", "512M"], flags].concat(),
            )
            .expect(0);
    };
    let probe = |name: &str, targets: &[&str]| {
        let targets: Vec<String> = targets.iter().map(|target| format!("{target} 80")).collect();
        let words: Vec<&str> = targets.iter().map(String::as_str).collect();
        let said = python(&host, name, PROBE, &words);
        said.expect(0).lines().map(str::to_owned).collect::<Vec<_>>()
    };
    create("public", &[]);
    let floor = ["169.254.169.254", "10.0.0.1", "192.168.7.1", "100.64.0.9", "203.0.113.2"];
    let spelled = [
        "2852039166",
        "0xa9fea9fe",
        "0251.0376.0251.0376",
        "0xa9.254.43518",
        "::ffff:169.254.169.254",
        "10.1",
        "meta.zone",
        "inner.zone",
        "192.0.0.1",
        "host.agentkernel.internal",
    ];
    for target in floor.iter().chain(&spelled) {
        assert_eq!(probe("public", &[target]), ["no"], "{target}");
    }
    let good = ["203.0.113.7", "good.zone", "alias.zone", "moving.zone", "3405803783"];
    assert_eq!(probe("public", &good), ["203.0.113.7"; 5]);
    // Who owns a name may lead it elsewhere at any time.
    world.moves(Ipv4Addr::new(10, 0, 0, 1));
    assert_eq!(probe("public", &["moving.zone"]), ["no"]);
    world.moves(Ipv4Addr::new(203, 0, 113, 7));
    host.agentkernel(&["rm", "--force", "public"]).expect(0);

    let mut flags: Vec<&str> = floor.iter().flat_map(|address| ["--allow", address]).collect();
    flags.extend(["--allow", "127.0.0.1:80", "--deny", "*.denied"]);
    create("open", &flags);
    assert_eq!(probe("open", &floor), floor);
    let metadata = ["169.254.169.254"; 6];
    assert_eq!(probe("open", &[&spelled[..5], &["meta.zone"]].concat()), metadata);
    assert_eq!(
        probe("open", &["10.1", "inner.zone", "192.0.0.1", "host.agentkernel.internal"]),
        ["10.0.0.1", "10.0.0.1", "127.0.0.1", "127.0.0.1"]
    );
    assert_eq!(probe("open", &["secret.denied", "alias.zone", "good.zone"]), ["no", "no", "203.0.113.7"]);
    host.agentkernel(&["rm", "--force", "open"]).expect(0);

    create("list", &["--no-network", "--allow", "good.zone", "--allow", "moving.zone"]);
    // An address is reached once its name was asked for, and no earlier.
    assert_eq!(probe("list", &["203.0.113.7", "good.zone"]), ["no", "203.0.113.7"]);
    let before = world.queries();
    let hidden = ["c2VjcmV0.other.example", "other.example", "x.good.zone.other.example", "a.good.zone"];
    assert_eq!(probe("list", &hidden), ["no"; 4]);
    let asked = world.queries()[before.len()..].to_owned();
    assert!(!asked.contains("other.example") && !asked.contains("a.good.zone"), "{asked}");
    world.moves(Ipv4Addr::new(10, 0, 0, 1));
    assert_eq!(probe("list", &["moving.zone", "10.0.0.1"]), ["no", "no"]);
    assert!(world.queries().contains("good.zone"));
    host.agentkernel(&["rm", "--force", "list"]).expect(0);
}
