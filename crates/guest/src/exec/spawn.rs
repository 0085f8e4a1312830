//! Starts one process: everything is prepared before, and the child makes plain system calls only.
//!
//! The child shares this process's memory until its exec, on a stack of its own, while the thread that started it waits:
//! nothing is copied that the exec would throw away. INVARIANT: the child neither allocates nor takes locks, and has no
//! signal handlers; the waiting thread holds no lock that the runtime's thread could want, for that thread may have to
//! answer the child's look-ups.
//!
//! The child reports the step that failed through a pipe that the exec closes, so the parent knows at once and exactly.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{Error, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use agentkernel_protocol::message::{Exec, ExecFailure, WindowSize};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, grantpt, openpt, unlockpt};
use tokio::sync::oneshot;

use super::cgroup::Cgroup;
use super::reaper::Reaper;
use super::streams::{Output, Stdin, Which};
use crate::layers::root::StepRoot;
use crate::network;
use crate::trust::{BUNDLE, STEP_BUNDLE, Trust, VARIABLES};
use crate::user::{self, User};

/// Files a program may have open without asking, and at most.
static OPEN_FILES: libc::rlimit64 = libc::rlimit64 { rlim_cur: 1024, rlim_max: 1 << 20 };
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// `CLONE_CLEAR_SIGHAND` of `linux/sched.h`.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
/// `CLONE_INTO_CGROUP` of `linux/sched.h`.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// Bytes of the child's stack, of which it needs a few hundred.
const STACK: usize = 64 << 10;

/// `struct clone_args` of `linux/sched.h`, version 2.
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// A program that runs.
pub(super) struct Spawned {
    pub pid: u32,
    pub status: oneshot::Receiver<i32>,
    pub stdin: Stdin,
    pub outputs: Vec<Output>,
}

/// Why one does not.
#[derive(Debug)]
pub(super) struct Failure {
    pub kind: ExecFailure,
    pub message: String,
}

impl Failure {
    pub(super) fn other(what: &str, error: &dyn std::fmt::Display) -> Self {
        Self { kind: ExecFailure::Other, message: format!("cannot {what}: {error}") }
    }
}

/// Starts what `wish` describes, inside `cgroup`, in a root of its own if there is one.
pub(super) fn spawn(
    reaper: &Reaper,
    wish: &Exec,
    cgroup: &Cgroup,
    root: Option<&StepRoot>,
    trust: &Trust,
) -> Result<Spawned, Failure> {
    let user = match root.map(StepRoot::open).transpose() {
        Ok(directory) => user::resolve(&wish.user, directory.as_ref()),
        Err(error) => Err(error.to_string()),
    }
    .map_err(|message| Failure { kind: ExecFailure::UnknownUser, message })?;
    let program =
        wish.arguments.first().map(|name| String::from_utf8_lossy(name).into_owned()).unwrap_or_default();
    let plan = Plan::new(wish, &user, root, trust)?;
    let (child, streams) = match wish.terminal {
        Some(size) => terminal(size, &user),
        None => pipes(&user),
    }
    .map_err(|error| Failure::other("make the program's streams", &error))?;
    let (report, reporter) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|error| Failure::other("make a pipe", &error))?;
    let (pid, status) = reaper
        .register(|| plan.fork(&child, cgroup, &reporter))
        .map_err(|error| Failure::other("start another process", &error))?;
    drop((child, reporter));
    let mut answer = [0; 5];
    match File::from(report).read_exact(&mut answer) {
        // Closed without a word: the program runs.
        Err(_) => {
            let Streams { stdin, outputs } = streams;
            Ok(Spawned { pid: pid.cast_unsigned(), status, stdin, outputs })
        }
        Ok(()) => {
            let [step, errno @ ..] = answer;
            Err(explain(step, i32::from_le_bytes(errno), &program, wish))
        }
    }
}

/// Steps of the child, as it reports them.
const STEP_EXEC: u8 = 1;
const STEP_DIRECTORY: u8 = 2;
const STEP_OTHER: u8 = 3;

fn explain(step: u8, errno: i32, program: &str, wish: &Exec) -> Failure {
    let error = rustix::io::Errno::from_raw_os_error(errno);
    let why = Error::from(error).kind().to_string();
    let (kind, what) = match (step, errno) {
        (STEP_EXEC, libc::ENOENT | libc::ENOTDIR) => {
            (ExecFailure::NotFound, format!("{program}: command not found"))
        }
        (STEP_EXEC, libc::EACCES | libc::EPERM | libc::ENOEXEC | libc::EISDIR) => {
            (ExecFailure::NotExecutable, format!("{program}: cannot be executed: {why}"))
        }
        (STEP_EXEC, _) => (ExecFailure::Other, format!("{program}: {why}")),
        (STEP_DIRECTORY, _) => {
            let directory = String::from_utf8_lossy(&wish.directory).into_owned();
            (ExecFailure::Directory, format!("the working directory {directory} cannot be entered: {why}"))
        }
        (_, libc::ENOMEM) => (ExecFailure::Other, "the guest has no memory for another process".to_owned()),
        _ => (ExecFailure::Other, format!("the program cannot be set up: {why}")),
    };
    Failure { kind, message: what }
}

/// What the parent keeps of the program's streams.
struct Streams {
    stdin: Stdin,
    outputs: Vec<Output>,
}

/// The child's standard streams, and whether the first is to be its terminal.
struct ChildStreams {
    descriptors: [OwnedFd; 3],
    terminal: bool,
}

fn pipes(user: &User) -> Result<(ChildStreams, Streams), Error> {
    let (stdin, stdin_near) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stdout_near, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr_near, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    // The program may open its own streams by name: `/dev/stdout`.
    for stream in [&stdin, &stdout, &stderr] {
        give(stream, user)?;
    }
    let outputs = vec![Output::pipe(stdout_near, Which::Stdout)?, Output::pipe(stderr_near, Which::Stderr)?];
    let child = ChildStreams { descriptors: [stdin, stdout, stderr], terminal: false };
    Ok((child, Streams { stdin: Stdin::pipe(stdin_near)?, outputs }))
}

fn give(stream: &OwnedFd, user: &User) -> Result<(), Error> {
    let (uid, gid) = (rustix::fs::Uid::from_raw(user.uid), rustix::fs::Gid::from_raw(user.gid));
    Ok(rustix::fs::fchown(stream, Some(uid), Some(gid))?)
}

fn terminal(size: WindowSize, user: &User) -> Result<(ChildStreams, Streams), Error> {
    let near = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&near)?;
    unlockpt(&near)?;
    let path = rustix::pty::ptsname(&near, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let far = rustix::fs::open(&*path, flags, Mode::empty())?;
    give(&far, user)?;
    let descriptors = [far.try_clone()?, far.try_clone()?, far];
    let output = Output::terminal(near.try_clone()?)?;
    let stdin = Stdin::terminal(near)?;
    stdin.resize(size);
    Ok((ChildStreams { descriptors, terminal: true }, Streams { stdin, outputs: vec![output] }))
}

/// Everything the child needs, ready before the fork: it may not allocate.
struct Plan {
    /// Where the program may be, in the order of the search.
    candidates: Vec<CString>,
    arguments: Pointers,
    /// The same for `/bin/sh`, which runs a script without a first line; its second word is filled in.
    shell: Vec<CString>,
    environment: Pointers,
    directory: CString,
    /// What becomes the root of a mount namespace of its own.
    root: Option<CString>,
    /// It gets a network of its own that leads nowhere.
    isolated: bool,
    uid: u32,
    gid: u32,
    groups: Vec<libc::gid_t>,
}

/// Strings and the null-terminated array that points to them.
struct Pointers {
    _strings: Vec<CString>,
    array: Vec<*const libc::c_char>,
}

impl Pointers {
    fn new(strings: Vec<CString>) -> Self {
        let array = strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect();
        Self { _strings: strings, array }
    }
}

impl Plan {
    fn new(wish: &Exec, user: &User, root: Option<&StepRoot>, trust: &Trust) -> Result<Self, Failure> {
        let text = |bytes: &[u8]| {
            CString::new(bytes).map_err(|error| Failure::other("pass a word with a zero byte", &error))
        };
        let arguments = wish.arguments.iter().map(|word| text(word)).collect::<Result<Vec<_>, _>>()?;
        let bundle = if root.is_some() { STEP_BUNDLE } else { BUNDLE };
        let environment = environment(wish, user, Some(bundle).filter(|_| !trust.is_empty()));
        let path =
            environment.iter().find_map(|pair| pair.strip_prefix(b"PATH=")).unwrap_or(DEFAULT_PATH).to_vec();
        let name = wish.arguments.first().map_or(&b""[..], |name| name);
        let candidates =
            candidates(name, &path).iter().map(|path| text(path)).collect::<Result<Vec<_>, _>>()?;
        let environment = environment.iter().map(|pair| text(pair)).collect::<Result<Vec<_>, _>>()?;
        let mut shell = vec![c"sh".to_owned(), c"".to_owned()];
        shell.extend(arguments.iter().skip(1).cloned());
        Ok(Self {
            candidates,
            arguments: Pointers::new(arguments),
            shell,
            environment: Pointers::new(environment),
            directory: text(if wish.directory.is_empty() { b"/" } else { &wish.directory })?,
            root: root.map(|root| text(root.path().as_os_str().as_encoded_bytes())).transpose()?,
            isolated: wish.root.as_ref().is_some_and(|root| !root.network),
            uid: user.uid,
            gid: user.gid,
            groups: user.groups.clone(),
        })
    }

    fn fork(&self, streams: &ChildStreams, cgroup: &Cgroup, reporter: &OwnedFd) -> Result<i32, Error> {
        // The shell's words for each candidate, should it be a script without a first line.
        let shells: Vec<Vec<*const libc::c_char>> = self
            .candidates
            .iter()
            .map(|candidate| {
                let mut words: Vec<_> = self.shell.iter().map(|word| word.as_ptr()).collect();
                words[1] = candidate.as_ptr();
                words.push(std::ptr::null());
                words
            })
            .collect();
        let mut stack: Vec<u128> = Vec::with_capacity(STACK / size_of::<u128>());
        let flags = CLONE_INTO_CGROUP
            | CLONE_CLEAR_SIGHAND
            | (libc::CLONE_VM | libc::CLONE_VFORK).cast_unsigned() as u64;
        let arguments = CloneArguments {
            flags,
            exit_signal: libc::SIGCHLD as u64,
            stack: stack.as_mut_ptr() as u64,
            stack_size: STACK as u64,
            // Into the cgroup at once: to move there afterwards would wait for every processor of the machine.
            cgroup: cgroup.directory().as_raw_fd() as u64,
            ..CloneArguments::default()
        };
        let mut birth = Birth { plan: self, streams, reporter: reporter.as_raw_fd(), shells: &shells };
        // SAFETY: the stack is large enough, aligned, and lives until the child has let go of this memory; so does all that
        // `birth` refers to, because this thread stands still until then.
        let pid = unsafe { clone_into(&arguments, born, (&raw mut birth).cast()) };
        drop(stack);
        match pid {
            error @ ..0 => Err(Error::from_raw_os_error(i32::try_from(-error).unwrap_or(libc::EIO))),
            pid => i32::try_from(pid).map_err(Error::other),
        }
    }

    /// The child's life until its exec.
    fn child(&self, streams: &ChildStreams, reporter: i32, shells: &[Vec<*const libc::c_char>]) -> ! {
        let (step, errno) = match self.enter(streams) {
            Err(failure) => failure,
            Ok(()) => (STEP_EXEC, self.exec(shells)),
        };
        let [e0, e1, e2, e3] = errno.to_le_bytes();
        let report = [step, e0, e1, e2, e3];
        // SAFETY: plain system calls on a local buffer; `_exit` runs nothing of the parent's.
        unsafe {
            libc::write(reporter, report.as_ptr().cast(), report.len());
            libc::_exit(127)
        }
    }

    /// Becomes what the program shall be: streams, session, limits, user, directory.
    fn enter(&self, streams: &ChildStreams) -> Result<(), (u8, i32)> {
        let other = |result: i64| if result < 0 { Err((STEP_OTHER, last_errno())) } else { Ok(()) };
        let [stdin, stdout, stderr] = &streams.descriptors;
        // SAFETY: plain system calls on valid descriptors, numbers, and memory that outlives them.
        unsafe {
            other(i64::from(libc::setsid()))?;
            for (target, source) in [stdin, stdout, stderr].into_iter().enumerate() {
                // None of the sources is 0, 1 or 2: the agent keeps those on /dev/console.
                other(i64::from(libc::dup2(source.as_raw_fd(), target as i32)))?;
            }
            if streams.terminal {
                other(i64::from(libc::ioctl(0, libc::TIOCSCTTY, 0)))?;
            }
            let score = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if score >= 0 {
                libc::write(score, b"0".as_ptr().cast(), 1);
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            other(i64::from(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())))?;
            // Rust ignores SIGPIPE in its own processes; handlers go with the exec, an ignored signal would not.
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            libc::umask(0o022);
            other(i64::from(libc::setrlimit64(libc::RLIMIT_NOFILE, &raw const OPEN_FILES)))?;
            if self.isolated {
                other(i64::from(libc::unshare(libc::CLONE_NEWNET)))?;
                network::loopback_up().map_err(|errno| (STEP_OTHER, errno.raw_os_error()))?;
            }
            if let Some(root) = &self.root {
                other(i64::from(libc::unshare(libc::CLONE_NEWNS)))?;
                other(i64::from(libc::chdir(root.as_ptr())))?;
                let (here, there) = (c".".as_ptr(), c"/".as_ptr());
                let none = std::ptr::null();
                other(i64::from(libc::mount(here, there, none, libc::MS_MOVE, none.cast())))?;
                other(i64::from(libc::chroot(here)))?;
            }
            // Past the library: its own calls change the ids of all threads it believes in, which are the parent's, and
            // wait for ever for one that was just being made at the fork.
            other(libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr()))?;
            other(libc::syscall(libc::SYS_setresgid, self.gid, self.gid, self.gid))?;
            other(libc::syscall(libc::SYS_setresuid, self.uid, self.uid, self.uid))?;
            if libc::chdir(self.directory.as_ptr()) != 0 {
                return Err((STEP_DIRECTORY, last_errno()));
            }
        }
        Ok(())
    }

    /// Tries the candidates in order; returns the errno that says most about why none was run.
    fn exec(&self, shells: &[Vec<*const libc::c_char>]) -> i32 {
        let mut worst = libc::ENOENT;
        for (candidate, shell) in self.candidates.iter().zip(shells) {
            // SAFETY: all pointers are to strings of `self`, the arrays end with a null pointer.
            unsafe {
                libc::execve(
                    candidate.as_ptr(),
                    self.arguments.array.as_ptr(),
                    self.environment.array.as_ptr(),
                );
                if last_errno() == libc::ENOEXEC {
                    libc::execve(c"/bin/sh".as_ptr(), shell.as_ptr(), self.environment.array.as_ptr());
                    return libc::ENOEXEC;
                }
            }
            match last_errno() {
                libc::ENOENT | libc::ENOTDIR => {}
                // Perhaps a later directory has one that may be run.
                libc::EACCES => worst = libc::EACCES,
                errno => return errno,
            }
        }
        worst
    }
}

/// What the child is given.
struct Birth<'a> {
    plan: &'a Plan,
    streams: &'a ChildStreams,
    reporter: i32,
    shells: &'a [Vec<*const libc::c_char>],
}

/// Where the child begins.
extern "C" fn born(birth: *mut libc::c_void) -> ! {
    // SAFETY: what `Plan::fork` points to, while it waits.
    let birth = unsafe { &*birth.cast::<Birth<'_>>() };
    birth.plan.child(birth.streams, birth.reporter, birth.shells)
}

/// `clone3` whose child runs `function` on the stack in `arguments` and never returns; its process id, or a negative errno.
///
/// # Safety
/// The stack must be aligned to 16 bytes and live until the child's exec or end. With `CLONE_VFORK` this returns only then.
unsafe fn clone_into(
    arguments: &CloneArguments,
    function: extern "C" fn(*mut libc::c_void) -> !,
    argument: *mut libc::c_void,
) -> i64 {
    let result: i64;
    // SAFETY: the child finds the registers as they were and a new stack; it has no frame to return to and does not.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, {argument}",
            "call {function}",
            "ud2",
            "2:",
            argument = in(reg) argument,
            function = in(reg) function,
            inout("rax") libc::SYS_clone3 => result,
            in("rdi") std::ptr::from_ref(arguments),
            in("rsi") size_of::<CloneArguments>(),
            out("rcx") _,
            out("r11") _,
        );
    }
    result
}

fn last_errno() -> i32 {
    // SAFETY: the address of this thread's errno is always valid.
    unsafe { *libc::__errno_location() }
}

/// The program's environment, with what its user implies, and the bundle of certificates, where it is missing.
fn environment(wish: &Exec, user: &User, bundle: Option<&str>) -> Vec<Vec<u8>> {
    let mut pairs: Vec<Vec<u8>> = wish
        .environment
        .iter()
        .map(|(name, value)| [name.as_slice(), b"=", value.as_slice()].concat())
        .collect();
    let home = user.home.clone().unwrap_or_else(|| "/".to_owned());
    let name = user.name.clone().unwrap_or_else(|| user.uid.to_string());
    let user = [("HOME", home), ("USER", name.clone()), ("LOGNAME", name)];
    let bundle = bundle.into_iter().flat_map(|path| VARIABLES.map(|variable| (variable, path.to_owned())));
    for (variable, value) in user.into_iter().chain(bundle) {
        let prefix = format!("{variable}=");
        if !pairs.iter().any(|pair| pair.starts_with(prefix.as_bytes())) {
            pairs.push(format!("{prefix}{value}").into_bytes());
        }
    }
    pairs
}

/// Where a program of this name may lie: itself if it has a slash, else in the directories of `path`.
fn candidates(name: &[u8], path: &[u8]) -> Vec<Vec<u8>> {
    use std::os::unix::ffi::OsStrExt;
    if name.is_empty() || name.contains(&b'/') {
        return vec![name.to_vec()];
    }
    path.split(|byte| *byte == b':')
        .map(|directory| {
            let directory = if directory.is_empty() { b".".as_slice() } else { directory };
            let path =
                Path::new(std::ffi::OsStr::from_bytes(directory)).join(std::ffi::OsStr::from_bytes(name));
            path.into_os_string().into_encoded_bytes()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_searched_as_execvp_does() {
        assert_eq!(candidates(b"./x", b"/bin"), [b"./x".to_vec()]);
        assert_eq!(candidates(b"ls", b"/bin:/usr/bin"), [b"/bin/ls".to_vec(), b"/usr/bin/ls".to_vec()]);
        assert_eq!(candidates(b"ls", b":/bin"), [b"./ls".to_vec(), b"/bin/ls".to_vec()]);
        assert_eq!(candidates(b"", b"/bin"), [Vec::<u8>::new()]);
    }
}
