//! Detached programs as they lie in a sandbox's directory: what they are, what they said, how they ended.
//!
//! ```text
//! executions/ID/execution.json   what it is and how it ended
//! executions/ID/output           what it said: a rotating log of chunks, see [`Chunk`]
//! ```
//! The supervisor writes, clients read; so output and exit code outlive the program, the machine and the supervisor.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use agentkernel_protocol::message::{Exec, ExecFailure, ExecOutput, Exit, ExitStatus};
use serde::{Deserialize, Serialize};

use crate::deadline::{rfc3339, unix_ms};
use crate::problem::{Problem, io, plain, printable};
use crate::record::{LogReader, RotatingLog};
use crate::state::{Home, SandboxDirectory, random_word, write_atomically};

const DIRECTORY: &str = "executions";
const FILE_NAME: &str = "execution.json";
const OUTPUT: &str = "output";
/// Half of what is kept of a program's output, bytes.
const OUTPUT_HALF: u64 = 8 << 20;
/// Ended programs that are remembered in a sandbox.
const KEPT: usize = 256;

/// One detached program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Execution {
    /// Unique among all sandboxes.
    pub id: String,
    /// Name of its sandbox.
    pub sandbox: String,
    /// Program and arguments, as far as they are text.
    pub command: Vec<String>,
    /// Its process id in the guest, once it runs.
    #[serde(default)]
    pub pid: Option<u32>,
    /// Whether it has a terminal, and so may be attached to.
    pub terminal: bool,
    /// When it was started, RFC 3339.
    pub started_at: String,
    /// What became of it.
    pub state: State,
    /// Its exit code as `run` would give it: 124 after a timeout, 128+N for signal N.
    pub exit_code: Option<u8>,
    /// What else is to be said about its end.
    pub note: Option<String>,
    /// When it ended, RFC 3339.
    pub ended_at: Option<String>,
}

/// What became of a detached program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It runs.
    Running,
    /// It ended by itself, by a signal or by its deadline.
    Exited,
    /// It could not be started.
    Failed,
    /// Its sandbox was stopped or died under it.
    Lost,
}

impl std::fmt::Display for State {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.pad(match self {
            Self::Running => "running",
            Self::Exited => "exited",
            Self::Failed => "failed",
            Self::Lost => "lost",
        })
    }
}

/// The exit code for an end, as `run` gives it.
pub fn exit_code(exit: &Exit) -> u8 {
    match exit {
        Exit { timed_out: true, .. } => 124,
        Exit { status: ExitStatus::Code(code), .. } => *code,
        Exit { status: ExitStatus::Signal(signal), .. } => 128u8.saturating_add(*signal),
    }
}

/// The exit code for a program that could not be started, as `run` gives it.
pub fn failure_code(kind: ExecFailure) -> u8 {
    match kind {
        ExecFailure::NotFound => 127,
        ExecFailure::NotExecutable => 126,
        ExecFailure::UnknownUser | ExecFailure::Directory | ExecFailure::Other => 125,
    }
}

impl Execution {
    fn directory(sandbox: &Path, id: &str) -> PathBuf {
        sandbox.join(DIRECTORY).join(id)
    }

    fn save(&self, sandbox: &Path) -> Result<(), Problem> {
        let path = Self::directory(sandbox, &self.id).join(FILE_NAME);
        let text = serde_json::to_vec(self).map_err(|error| plain("execution", error.to_string(), None))?;
        write_atomically(&path, &text).map_err(io(format!("write {}", path.display())))
    }

    fn load(directory: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(directory.join(FILE_NAME)).ok()?).ok()
    }
}

/// A detached program's files while it runs.
pub(crate) struct Journal {
    sandbox: PathBuf,
    execution: Execution,
    output: RotatingLog,
}

impl Journal {
    /// Makes the files of a new program.
    pub(crate) fn begin(sandbox: &Path, name: &str, exec: &Exec) -> Result<Self, Problem> {
        forget_old(sandbox);
        let id = random_word();
        let directory = Execution::directory(sandbox, &id);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(io(format!("make {}", directory.display())))?;
        let text = |bytes: &serde_bytes::ByteBuf| String::from_utf8_lossy(bytes).into_owned();
        let execution = Execution {
            id,
            sandbox: name.to_owned(),
            command: exec.arguments.iter().map(text).collect(),
            pid: None,
            terminal: exec.terminal.is_some(),
            started_at: rfc3339(unix_ms()),
            state: State::Running,
            exit_code: None,
            note: None,
            ended_at: None,
        };
        execution.save(sandbox)?;
        let output = RotatingLog::new(directory.join(OUTPUT), OUTPUT_HALF);
        Ok(Self { sandbox: sandbox.to_owned(), execution, output })
    }

    pub(crate) fn id(&self) -> &str {
        &self.execution.id
    }

    /// Keeps what the program said, and how it ended.
    pub(crate) fn take(&mut self, output: &ExecOutput) {
        match output {
            ExecOutput::Stdout(bytes) => self.output.append(&chunk(false, bytes)),
            ExecOutput::Stderr(bytes) => self.output.append(&chunk(true, bytes)),
            ExecOutput::Exited(exit) => {
                let note = match exit {
                    Exit { timed_out: true, .. } => Some("its time was up"),
                    Exit { out_of_memory: true, .. } => {
                        Some("the guest ran out of memory: create the sandbox with more --memory")
                    }
                    _ => None,
                };
                self.end(State::Exited, Some(exit_code(exit)), note.map(str::to_owned));
            }
            ExecOutput::Failed { kind, message } => {
                self.end(State::Failed, Some(failure_code(*kind)), Some(printable(message)));
            }
            ExecOutput::Started { pid } => {
                self.execution.pid = Some(*pid);
                self.save();
            }
            ExecOutput::StdinTaken(_) => {}
        }
    }

    /// Notes that the sandbox ended first.
    pub(crate) fn lost(&mut self) {
        if self.execution.state == State::Running {
            self.end(State::Lost, None, Some("the sandbox ended while it ran".to_owned()));
        }
    }

    fn end(&mut self, state: State, exit_code: Option<u8>, note: Option<String>) {
        self.execution.state = state;
        self.execution.exit_code = exit_code;
        self.execution.note = note;
        self.execution.ended_at = Some(rfc3339(unix_ms()));
        self.save();
    }

    fn save(&self) {
        if let Err(problem) = self.execution.save(&self.sandbox) {
            tracing::warn!("{}", problem.message);
        }
    }
}

/// A chunk of output in the log: stream (0 or 1), length (32 bits, little-endian), bytes.
fn chunk(error: bool, bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes();
    [&[u8::from(error)], length.as_slice(), bytes].concat()
}

/// A piece of a detached program's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Standard error rather than standard output.
    pub error: bool,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Reads a detached program's output, also while it is being written.
#[derive(Debug)]
pub struct OutputReader {
    log: LogReader,
    rest: Vec<u8>,
}

impl OutputReader {
    /// From the oldest byte that is kept.
    pub fn new(sandbox: &SandboxDirectory, id: &str) -> Self {
        let path = Execution::directory(sandbox.path(), id).join(OUTPUT);
        Self { log: LogReader::new(path, OUTPUT_HALF), rest: Vec::new() }
    }

    /// What came since the last call.
    ///
    /// # Errors
    /// If the files cannot be read.
    pub fn read(&mut self) -> std::io::Result<Vec<Chunk>> {
        self.rest.extend(self.log.read()?);
        let mut chunks = Vec::new();
        let mut at = 0;
        while let Some(([stream, length @ ..], after)) = self.rest[at..].split_first_chunk::<5>() {
            let length = u32::from_le_bytes(*length) as usize;
            let Some(bytes) = after.get(..length) else { break };
            chunks.push(Chunk { error: *stream == 1, bytes: bytes.to_vec() });
            at += 5 + length;
        }
        self.rest.drain(..at);
        Ok(chunks)
    }
}

/// The detached programs of a sandbox, oldest first.
pub fn list(sandbox: &SandboxDirectory) -> Vec<Execution> {
    let mut all = load_all(sandbox.path());
    if sandbox.is_dead() {
        for execution in all.iter_mut().filter(|execution| execution.state == State::Running) {
            execution.state = State::Lost;
        }
    }
    all
}

fn load_all(sandbox: &Path) -> Vec<Execution> {
    let entries = fs::read_dir(sandbox.join(DIRECTORY)).into_iter().flatten().flatten();
    let mut all: Vec<Execution> = entries.filter_map(|entry| Execution::load(&entry.path())).collect();
    all.sort_by(|one, other| (&one.started_at, &one.id).cmp(&(&other.started_at, &other.id)));
    all
}

/// Finds a detached program and its sandbox by its id, or by an unambiguous beginning of it.
///
/// # Errors
/// Code `not-found`.
pub fn find(home: &Home, id: &str) -> Result<(SandboxDirectory, Execution), Problem> {
    let mut found = Vec::new();
    if !id.is_empty() {
        for sandbox in home.list()? {
            let executions = list(&sandbox).into_iter().filter(|execution| execution.id.starts_with(id));
            found.extend(executions.map(|execution| (sandbox.clone(), execution)));
        }
    }
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(plain(
            "not-found",
            format!("there is no detached command {}", printable(id)),
            Some("agentkernel exec-list shows those there are"),
        )),
        _ => Err(plain("ambiguous", format!("several detached commands begin with {}", printable(id)), None)),
    }
}

/// Marks programs lost whose sandbox died under them.
pub(crate) fn mark_lost(sandbox: &Path) {
    for mut execution in load_all(sandbox).into_iter().filter(|execution| execution.state == State::Running) {
        execution.state = State::Lost;
        execution.note = Some("the sandbox died while it ran".to_owned());
        execution.ended_at = Some(rfc3339(unix_ms()));
        let _ = execution.save(sandbox);
    }
}

fn forget_old(sandbox: &Path) {
    let ended: Vec<Execution> =
        load_all(sandbox).into_iter().filter(|execution| execution.state != State::Running).collect();
    for execution in ended.iter().take(ended.len().saturating_sub(KEPT - 1)) {
        let _ = fs::remove_dir_all(Execution::directory(sandbox, &execution.id));
    }
}
