//! The clients that others publish, as they are: they are installed from the registries that this machine is told of, in
//! the versions that `tests/clients` names, once for all tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use rustix::process::Signal;

use crate::host::{Host, Running, Said, finish, prepare, scratch, signal};

/// Where the scripts and the lists of what they need are.
pub(crate) fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/clients").canonicalize().unwrap()
}

/// Whether a directory was made of what `list` says now; it is emptied if not.
fn is_made(directory: &Path, list: &Path) -> bool {
    if fs::read(directory.join("made-of")).is_ok_and(|of| of == fs::read(list).unwrap()) {
        return true;
    }
    let _ = fs::remove_dir_all(directory);
    fs::create_dir_all(directory).unwrap();
    false
}

fn made(directory: &Path, list: &Path) {
    fs::copy(list, directory.join("made-of")).unwrap();
}

/// Python with the packages of `requirements.txt`.
pub(crate) fn python() -> &'static Path {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let (directory, list) = (scratch().join("clients-python"), sources().join("requirements.txt"));
        if !is_made(&directory, &list) {
            let mut venv = Command::new("python3");
            venv.args(["-m", "venv"]).arg(&directory);
            prepare("a virtual environment", venv);
            let mut pip = Command::new(directory.join("bin/pip"));
            pip.args(["install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r"]).arg(&list);
            prepare("packages of Python", pip);
            made(&directory, &list);
        }
        directory.join("bin/python")
    })
}

/// A directory with the scripts of `node` and the packages that they need.
pub(crate) fn node() -> &'static Path {
    static NODE: OnceLock<PathBuf> = OnceLock::new();
    NODE.get_or_init(|| {
        let (directory, source) = (scratch().join("clients-node"), sources().join("node"));
        let list = source.join("package-lock.json");
        let has_packages = is_made(&directory, &list);
        for entry in fs::read_dir(&source).unwrap().flatten() {
            if entry.file_type().unwrap().is_file() {
                fs::copy(entry.path(), directory.join(entry.file_name())).unwrap();
            }
        }
        if !has_packages {
            let mut npm = Command::new("npm");
            npm.args(["ci", "--silent", "--no-audit", "--no-fund"]).current_dir(&directory);
            prepare("packages of Node", npm);
            made(&directory, &list);
        }
        directory
    })
}

/// The program of `rust`.
pub(crate) fn rust() -> &'static Path {
    static RUST: OnceLock<PathBuf> = OnceLock::new();
    RUST.get_or_init(|| {
        let target = scratch().join("clients-rust");
        let mut cargo = Command::new(env!("CARGO"));
        cargo
            .args(["build", "--quiet", "--locked", "--manifest-path"])
            .arg(sources().join("rust/Cargo.toml"));
        // What this build was told is not for that one.
        for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER"] {
            cargo.env_remove(name);
        }
        cargo.arg("--target-dir").arg(&target);
        prepare("the client in Rust", cargo);
        target.join("debug/agentkernel-clients")
    })
}

/// A server of this world.
pub(crate) struct Server {
    pub running: Running,
    pub url: String,
}

impl Server {
    #[track_caller]
    pub(crate) fn start(host: &Host, flags: &[&str]) -> Self {
        let mut running = Running::start(host.command(&[&["serve", "--port", "0"], flags].concat()));
        let url = running.line().trim().to_owned();
        assert!(url.starts_with("http://"), "{url:?}: {:?}", running.end());
        Self { running, url }
    }

    /// Ends it in order; what it said on stderr.
    #[track_caller]
    pub(crate) fn end(self) -> String {
        signal(self.running.child.id(), Signal::TERM);
        let (code, _, said) = self.running.end();
        assert_eq!(code, 0, "{said}");
        said
    }

    /// Runs a client's program to its end, in the project.
    #[track_caller]
    pub(crate) fn client(&self, host: &Host, mut command: Command) -> Said {
        command.current_dir(host.project());
        let said = finish(command, b"");
        assert_eq!(said.code(), 0, "{}\n{}", said.expect_any(), said.stderr);
        said
    }
}

/// `python SCRIPT ARGUMENTS`.
pub(crate) fn script(name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(python());
    command.arg(sources().join("python").join(name)).args(arguments);
    command
}

const KEY: &str = "a-key-of-the-tests";

/// The libraries that are published for this API work as they are.
#[test]
fn published_libraries_need_no_change() {
    let host = Host::new();
    let server = Server::start(&host, &["--api-key", KEY]);
    let mut node_client = Command::new("node");
    node_client.arg(node().join("sdk.mjs")).args([&server.url, KEY]);
    let mut rust_client = Command::new(rust());
    rust_client.args([&server.url, KEY]);
    for client in [script("sdk.py", &[&server.url, KEY]), node_client, rust_client] {
        assert!(server.client(&host, client).expect(0).ends_with("ok\n"));
    }
    server.end();
    host.assert_nothing_is_left();
}

/// What the server says of itself is what it does, whatever it is asked.
#[test]
fn the_description_is_kept() {
    let host = Host::new();
    let server = Server::start(&host, &["--api-key", KEY]);
    let mut command = script("described.py", &[&server.url, KEY]);
    command.env("HOME", host.home());
    server.client(&host, command);
    assert!(!server.end().contains("panicked"));
    host.agentkernel(&["rm", "--force", "--all"]);
    host.assert_nothing_is_left();
}
