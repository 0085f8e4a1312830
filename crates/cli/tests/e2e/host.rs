//! The host of one test: a state directory, a home, a project; and the assertion that nothing is left.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longest life of one command, whatever the machine: emulation on a busy host included.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);

/// Longest life of one test's world. Whatever waits for ever then loses what it waits for, and fails with a reason.
const LIFE: Duration = Duration::from_secs(900);

/// The program under test.
pub(crate) fn program() -> PathBuf {
    std::env::var_os("AGENTKERNEL_TEST_PROGRAM")
        .map_or_else(|| env!("CARGO_BIN_EXE_agentkernel").into(), PathBuf::from)
}

/// Where tests may write: the build's own directory, or one made for this user.
pub(crate) fn scratch() -> PathBuf {
    std::env::var_os("AGENTKERNEL_TEST_SCRATCH")
        .map_or_else(|| env!("CARGO_TARGET_TMPDIR").into(), PathBuf::from)
}

/// `PATH` of all commands.
pub(crate) const PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin";

/// A state directory with kernel, initramfs and the template of the `host` image, prepared once by the program itself and
/// shared by all tests.
fn prepared() -> &'static Path {
    static PREPARED: OnceLock<PathBuf> = OnceLock::new();
    PREPARED.get_or_init(|| {
        let state = scratch().join("prepared");
        // The toolchains of a home directory are part of what a template is of; those of tests have none.
        let home = scratch().join("prepared-home");
        fs::create_dir_all(&home).unwrap();
        for arguments in [&["setup", "--warm", "host"][..], &["gc"]] {
            let mut command = Command::new(program());
            command.args(arguments).env("AGENTKERNEL_HOME", &state).env("HOME", &home).env("PATH", PATH);
            command.current_dir(&home);
            prepare(&format!("{arguments:?}"), command);
        }
        state
    })
}

/// A cache with kernel and initramfs.
pub(crate) fn prepared_cache() -> PathBuf {
    prepared().join("cache")
}

/// Links the files of the prepared templates into a state directory: they are the same files, as a template's must be.
fn link_templates(state: &Path) {
    let templates = state.join("templates");
    fs::create_dir_all(&templates).unwrap();
    for template in fs::read_dir(prepared().join("templates")).unwrap().flatten() {
        if !template.file_type().unwrap().is_dir() {
            continue;
        }
        let target = templates.join(template.file_name());
        fs::create_dir(&target).unwrap();
        for file in fs::read_dir(template.path()).unwrap().flatten() {
            fs::hard_link(file.path(), target.join(file.file_name())).unwrap();
        }
    }
}

/// One test's world.
pub(crate) struct Host {
    directory: TempDir,
    /// Open as long as it lives.
    _life: SyncSender<()>,
}

/// What a command said.
#[derive(Debug)]
pub(crate) struct Said {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Said {
    pub(crate) fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 1000 + self.status.signal().unwrap_or(0))
    }

    /// Asserts the exit code and returns standard output.
    #[track_caller]
    pub(crate) fn expect(&self, code: i32) -> &str {
        assert_eq!(
            self.code(),
            code,
            "stdout: {:?}\nstderr: {}",
            String::from_utf8_lossy(&self.stdout),
            self.stderr
        );
        std::str::from_utf8(&self.stdout).unwrap_or("")
    }
}

impl Said {
    /// Standard output, whatever the exit code.
    pub(crate) fn expect_any(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Host {
    /// A world whose kernel and template are ready.
    pub(crate) fn new() -> Self {
        let host = Self::without_templates();
        link_templates(&host.state());
        host
    }

    /// A world whose kernel is ready.
    pub(crate) fn without_templates() -> Self {
        let host = Self::bare();
        fs::create_dir_all(host.state()).unwrap();
        set_mode(&host.state(), 0o700);
        copy_tree(&prepared_cache(), &host.state().join("cache"));
        host
    }

    /// A world in which nothing was set up.
    pub(crate) fn bare() -> Self {
        fs::create_dir_all(scratch()).unwrap();
        let directory = tempfile::Builder::new().prefix("host-").tempdir_in(scratch()).unwrap();
        let life = watch(directory.path());
        let host = Self { directory, _life: life };
        fs::create_dir_all(host.project()).unwrap();
        fs::create_dir_all(host.home()).unwrap();
        host
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The state directory.
    pub(crate) fn state(&self) -> PathBuf {
        self.path().join("state")
    }

    /// The user's home directory.
    pub(crate) fn home(&self) -> PathBuf {
        self.path().join("home")
    }

    /// The project commands are typed in.
    pub(crate) fn project(&self) -> PathBuf {
        self.path().join("home/project")
    }

    /// Writes a file of the project.
    pub(crate) fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.project().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// Reads a file of the project.
    #[track_caller]
    pub(crate) fn read(&self, path: &str) -> String {
        fs::read_to_string(self.project().join(path)).unwrap()
    }

    /// The program in this world, ready to be given more.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(program());
        command
            .args(arguments)
            .current_dir(self.project())
            .env("AGENTKERNEL_HOME", self.state())
            .env("HOME", self.home())
            .env("PATH", PATH)
            .env_remove("NO_COLOR")
            .stdin(Stdio::null());
        command
    }

    /// Runs the program to its end.
    #[track_caller]
    pub(crate) fn agentkernel<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Said {
        finish(self.command(arguments), b"")
    }

    /// `run -q FLAGS -- sh -c SCRIPT`.
    #[track_caller]
    pub(crate) fn sh(&self, flags: &[&str], script: &str) -> Said {
        let mut arguments = vec!["run", "-q"];
        arguments.extend(flags);
        arguments.extend(["--", "sh", "-c", script]);
        self.agentkernel(&arguments)
    }

    /// Directories of sandboxes that exist now.
    pub(crate) fn sandboxes(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.state().join("sandboxes")) else { return Vec::new() };
        entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
    }

    /// Asserts that nothing of this world's sandboxes is left, waiting a moment for what is just ending.
    #[track_caller]
    pub(crate) fn assert_nothing_is_left(&self) {
        let deadline = Instant::now() + Duration::from_secs(15);
        loop {
            let processes = self.processes();
            let trash = fs::read_dir(self.state().join("trash")).map_or(0, Iterator::count);
            let drafts = count_drafts(&self.state());
            if processes.is_empty() && self.sandboxes().is_empty() && trash == 0 && drafts == 0 {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "left behind: processes {processes:?}, sandboxes {:?}, {trash} in the trash, {drafts} drafts",
                self.sandboxes()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Processes with something of the state directory open, or named in their arguments: `(pid, program)`.
    pub(crate) fn processes(&self) -> Vec<(u32, String)> {
        processes(&self.state())
    }

    /// Waits until a process with this name works in this world.
    #[track_caller]
    pub(crate) fn wait_for_process(&self, name: &str) -> u32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some((pid, _)) = self.processes().into_iter().find(|(_, found)| found.starts_with(name)) {
                return pid;
            }
            assert!(Instant::now() < deadline, "no process {name}; there are {:?}", self.processes());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The supervisor of this world's only sandbox.
    #[track_caller]
    pub(crate) fn supervisor(&self) -> u32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for (pid, _) in self.processes() {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                if line.split(|byte| *byte == 0).nth(1) == Some(b"__supervise") {
                    return pid;
                }
            }
            assert!(Instant::now() < deadline, "no supervisor; there are {:?}", self.processes());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Processes with something of `directory` open, or named in their arguments: `(pid, program)`.
fn processes(directory: &Path) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if pid == std::process::id() {
            continue;
        }
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default().trim().to_owned();
        let command_line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let named = String::from_utf8_lossy(&command_line).contains(directory.to_str().unwrap());
        let descriptors = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
        let open = || {
            descriptors
                .map(|fd| fs::read_link(fd.path()))
                .any(|link| link.is_ok_and(|link| link.starts_with(directory)))
        };
        if named || open() {
            found.push((pid, name));
        }
    }
    found
}

/// Ends a world that lives too long, and says what was going on in it.
fn watch(directory: &Path) -> SyncSender<()> {
    let (life, end) = sync_channel(1);
    let directory = directory.to_owned();
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    std::thread::spawn(move || {
        for _ in 0..2 {
            match end.recv_timeout(LIFE) {
                Err(RecvTimeoutError::Timeout) => end_world(&test, &directory),
                _ => return,
            }
        }
        // What it waits for is nothing of its own: no other test would be heard of either.
        std::process::abort();
    });
    life
}

fn end_world(test: &str, directory: &Path) {
    let mut said = format!("{test} has lived longer than {} s\n", LIFE.as_secs());
    let found = processes(directory);
    for (pid, _) in &found {
        let file = |name: &str| {
            let bytes = fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\0', " ")
        };
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let waits = tasks.map(|task| fs::read_to_string(task.path().join("wchan")).unwrap_or_default());
        let waits = waits.collect::<Vec<_>>().join(" ");
        said += &format!("{pid} {} | {}| {waits}\n", file("cmdline"), file("stat"));
    }
    for sandbox in fs::read_dir(directory.join("state/sandboxes")).into_iter().flatten().flatten() {
        let record = fs::read(sandbox.path().join("record")).unwrap_or_default();
        let end = String::from_utf8_lossy(&record[record.len().saturating_sub(4096)..]).into_owned();
        said += &format!("{}: {end}\n", sandbox.path().display());
    }
    // Past what the harness keeps until a test ends.
    let _ = std::io::stderr().write_all(said.as_bytes());
    for (pid, _) in found {
        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
        let _ = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Nothing of a failed test may disturb the others.
            let _ = self.command(&["rm", "--all", "--force"]).output();
        } else {
            self.assert_nothing_is_left();
        }
    }
}

/// A running program whose output is read as it comes.
pub(crate) struct Running {
    pub child: Child,
    /// Its output, until somebody closes that.
    pub lines: Option<std::io::BufReader<std::process::ChildStdout>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Of a test that failed; who was waited for is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    #[track_caller]
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = std::io::BufReader::new(child.stdout.take().unwrap());
        Self { child, lines: Some(lines) }
    }

    /// The next line of output, with its end.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        std::io::BufRead::read_line(self.lines.as_mut().unwrap(), &mut line).unwrap();
        line
    }

    /// Waits for the end; returns the exit code and the rest of both streams.
    #[track_caller]
    pub(crate) fn end(mut self) -> (i32, String, String) {
        let mut errors = self.child.stderr.take().unwrap();
        let stderr = std::thread::spawn(move || {
            let mut text = Vec::new();
            errors.read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        });
        let mut rest = Vec::new();
        self.lines.take().unwrap().read_to_end(&mut rest).unwrap();
        let status = wait(&mut self.child);
        let code = status.code().unwrap_or_else(|| 1000 + status.signal().unwrap_or(0));
        (code, String::from_utf8_lossy(&rest).into_owned(), stderr.join().unwrap())
    }
}

/// Runs `command` with `input` to its end.
#[track_caller]
pub(crate) fn finish(command: Command, input: &[u8]) -> Said {
    finish_within(PATIENCE, command, input)
}

/// Prepares what all tests share; it is downloaded or compiled, and may take as long as a test.
#[track_caller]
pub(crate) fn prepare(what: &str, mut command: Command) {
    command.stdin(Stdio::null());
    let said = finish_within(LIFE, command, b"");
    assert!(said.status.success(), "{what}: {}", said.stderr);
}

#[track_caller]
fn finish_within(patience: Duration, mut command: Command, input: &[u8]) -> Said {
    if !input.is_empty() {
        command.stdin(Stdio::piped());
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let stdin = child.stdin.take();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if let Some(mut stdin) = stdin {
                // A program that ends early takes no more input.
                let _ = stdin.write_all(input);
            }
        });
        let stderr = scope.spawn(move || {
            let mut text = Vec::new();
            stderr.read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        });
        let stdout = scope.spawn(move || {
            let mut bytes = Vec::new();
            stdout.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let status = wait_within(patience, &mut child);
        Said { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
    })
}

/// Waits for `child`, not for ever.
#[track_caller]
pub(crate) fn wait(child: &mut Child) -> ExitStatus {
    wait_within(PATIENCE, child)
}

#[track_caller]
fn wait_within(patience: Duration, child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("a command ran longer than {} s", patience.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a signal.
#[track_caller]
pub(crate) fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Bytes that do not compress, always the same.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub(crate) fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn count_drafts(state: &Path) -> usize {
    let count = |directory: PathBuf| {
        let Ok(entries) = fs::read_dir(directory) else { return 0 };
        entries.flatten().filter(|entry| entry.file_name().to_string_lossy().contains("new-")).count()
    };
    count(state.to_owned()) + count(state.join("templates")) + count(state.join("snapshots"))
}

/// Copies a tree of files, but for empty disks: they are large and sparse, and made again.
pub(crate) fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    set_mode(to, 0o700);
    for entry in fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.file_name().to_string_lossy().starts_with("ext4-") {
            continue;
        }
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}
