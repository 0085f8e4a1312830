//! A terminal at both ends: size, resize, Ctrl-C, and everything restored.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

use crate::host::{Host, wait};

pub(crate) struct Terminal {
    near: File,
    far: OwnedFd,
    seen: String,
}

impl Terminal {
    pub(crate) fn open() -> Self {
        let near = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&near).unwrap();
        unlockpt(&near).unwrap();
        rustix::io::ioctl_fionbio(&near, true).unwrap();
        let path = ptsname(&near, Vec::new()).unwrap();
        let far = File::options().read(true).write(true).open(path.to_str().unwrap()).unwrap().into();
        Self { near: near.into(), far, seen: String::new() }
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.near, size).unwrap();
    }

    /// Starts `run -- sh -c SCRIPT`.
    fn run(&self, host: &Host, script: &str) -> Child {
        self.start(host, &["run", "-q", "--workspace", "none", "--", "sh", "-c", script])
    }

    pub(crate) fn type_in(&mut self, keys: &[u8]) {
        self.near.write_all(keys).unwrap();
    }

    /// Starts the program as the leader of a session on this terminal.
    pub(crate) fn start(&self, host: &Host, arguments: &[&str]) -> Child {
        let mut command = std::process::Command::new("setsid");
        let run = host.command(arguments);
        command.arg("--ctty").arg(run.get_program()).args(run.get_args());
        for (name, value) in run.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let far = || Stdio::from(self.far.try_clone().unwrap());
        command.current_dir(host.project()).stdin(far()).stdout(far()).stderr(far());
        command.spawn().unwrap()
    }

    /// Reads until `word` was seen.
    #[track_caller]
    pub(crate) fn expect(&mut self, word: &str) {
        let deadline = Instant::now() + Duration::from_secs(120);
        let mut buffer = [0; 4096];
        while !self.seen.contains(word) {
            assert!(Instant::now() < deadline, "no {word:?} in {:?}", self.seen);
            match self.near.read(&mut buffer) {
                Ok(count) => self.seen.push_str(&String::from_utf8_lossy(&buffer[..count])),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => panic!("{error}"),
            }
        }
        let end = self.seen.find(word).unwrap() + word.len();
        self.seen.drain(..end);
    }
}

#[test]
fn size_resize_interrupt_and_restoration() {
    let host = Host::new();
    let mut terminal = Terminal::open();
    terminal.resize(30, 100);
    let before = format!("{:?}", tcgetattr(&terminal.far).unwrap());
    let script = "test -t 0 && test -t 1 && stty size; trap 'stty size; echo resized' WINCH; \
                  trap 'echo interrupted; exit 3' INT; echo waiting; while :; do sleep 0.2; done";
    let mut child = terminal.run(&host, script);
    terminal.expect("30 100");
    terminal.expect("waiting");
    terminal.resize(50, 132);
    terminal.expect("50 132");
    terminal.expect("resized");
    terminal.near.write_all(b"\x03").unwrap();
    terminal.expect("interrupted");
    assert_eq!(wait(&mut child).code(), Some(3));
    assert_eq!(format!("{:?}", tcgetattr(&terminal.far).unwrap()), before);
}

#[test]
fn an_interactive_shell_ends_with_the_end_of_input() {
    let host = Host::new();
    let mut terminal = Terminal::open();
    let mut child = terminal.run(&host, "exec sh -i");
    terminal.near.write_all(b"echo $((40 + 2))\n").unwrap();
    terminal.expect("42\r\n");
    terminal.near.write_all(b"exit 6\n").unwrap();
    assert_eq!(wait(&mut child).code(), Some(6));
}
