//! Saving: looks at a process that waits, through `ptrace` and `/proc`, and has it go on.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Error, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::format::{
    Action, Content, Descriptor, Interest, KernelMapping, Kind, Mapping, Process, Registers, Thread,
};
use crate::memory::{self, CHUNK, Capture, OwnPages};

/// How often all threads are looked for at rest.
const ATTEMPTS: usize = 100;
/// Most threads: one for each processor, those of the disks, and some.
const THREADS_LIMIT: usize = 256;
/// How long a thread may take to stop; it waits anyhow.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most bytes of pages that are saved: an emulator has some 200 MiB of its own, half of them translations.
const PAGES_LIMIT: u64 = 1 << 30;
/// Below the stack pointer, and below what the ABI lets a function use there: 128 bytes.
const SCRATCH: u64 = 1024;
/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// How far a stack may grow, bytes: the usual limit.
const STACK: u64 = 8 << 20;
/// `_NSIG` of the kernel.
const SIGNALS: i32 = 64;
/// Bytes of the kernel's `sigset_t`.
const SET: u64 = 8;
/// The kernel's results that say that a call is to be made again (`linux/errno.h`): `ERESTARTSYS` to `ERESTART_RESTARTBLOCK`.
const AGAIN: std::ops::RangeInclusive<i64> = -516..=-512;

/// Saves the process of a machine, which must stand still in its system calls, into `target`, an empty file. `machine` has its
/// guest's memory, which is not saved. `passed` has names for its descriptors by number, `files` for those of files, all of
/// which it must hold open. Returns the paths of the programs and libraries whose content is
/// saved with it.
///
/// # Errors
/// If the process may not be looked into or is not of the kind that can be saved, or the disk is full. It goes on in any
/// case.
pub(crate) fn capture(
    machine: &Capture,
    passed: &[(i32, &str)],
    files: &[(String, File)],
    target: &File,
) -> io::Result<Vec<PathBuf>> {
    save(machine.process(), machine.base(), &|| machine.has_ended(), (passed, files), target)
}

/// What a process's descriptors are called: by number, by file.
type Names<'a> = (&'a [(i32, &'a str)], &'a [(String, File)]);

fn save(
    id: u32,
    memory: &File,
    has_ended: &dyn Fn() -> bool,
    names: Names<'_>,
    target: &File,
) -> io::Result<Vec<PathBuf>> {
    let id = i32::try_from(id).map_err(|_| Error::from(ErrorKind::InvalidInput))?;
    let stopped = Stopped::at_rest(id)?;
    // Its number could be another's by now.
    if has_ended() {
        return Err(unusual("it has ended"));
    }
    let source = File::open(format!("/proc/{id}/mem"))?;
    let main = stopped.threads.first().ok_or_else(|| unusual("no thread"))?;
    let actions = actions(main, &source)?;
    let threads =
        stopped.threads.iter().map(|thread| describe(thread, id, &source)).collect::<io::Result<_>>()?;
    let descriptors = descriptors(id, memory, names)?;
    let Mapped { mappings, kernel_mappings, files, end } = mappings(id, memory, &source, target)?;
    let slack = fs::read_to_string(format!("/proc/{id}/timerslack_ns")).ok();
    let timer_slack_ns = slack.and_then(|slack| slack.trim().parse().ok()).unwrap_or(50_000);
    drop(stopped);
    Process { mappings, kernel_mappings, threads, descriptors, actions, timer_slack_ns }
        .write(target, end)?;
    Ok(files.into_iter().collect())
}

fn unusual(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Unsupported, format!("the process cannot be saved: {what}"))
}

/// All threads of a process, standing. They go on when this is dropped.
struct Stopped {
    threads: Vec<Tracee>,
}

impl Stopped {
    /// All in their system calls. One that has just answered may not be back there yet.
    fn at_rest(process: i32) -> io::Result<Self> {
        for _ in 0..ATTEMPTS {
            let stopped = Self::all_of(process)?;
            if stopped.threads.iter().all(Tracee::waits) {
                return Ok(stopped);
            }
            drop(stopped);
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(unusual("it does not come to rest"))
    }

    fn all_of(process: i32) -> io::Result<Self> {
        let mut stopped = Self { threads: Vec::new() };
        // Until no new one is seen: a thread that has not stopped yet may start another.
        loop {
            let before = stopped.threads.len();
            let mut ids: Vec<i32> = fs::read_dir(format!("/proc/{process}/task"))?
                .flatten()
                .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
                .collect();
            ids.sort_by_key(|id| (*id != process, *id));
            for id in ids {
                if stopped.threads.len() >= THREADS_LIMIT {
                    return Err(unusual("it has too many threads"));
                }
                if stopped.threads.iter().all(|thread| thread.id != id) {
                    stopped.threads.push(Tracee::stop(id)?);
                }
            }
            if stopped.threads.len() == before {
                return Ok(stopped);
            }
        }
    }
}

/// A thread that stands still.
struct Tracee {
    id: i32,
    registers: libc::user_regs_struct,
    /// The signals it has blocked: each step of it unblocks one.
    blocked: u64,
}

impl Drop for Tracee {
    fn drop(&mut self) {
        let _ = set_registers(self.id, &self.registers);
        let blocked = (&raw const self.blocked).addr();
        let _ = request(libc::PTRACE_SETSIGMASK, self.id, SET as usize, blocked);
        let _ = request(libc::PTRACE_DETACH, self.id, 0, 0);
    }
}

impl Tracee {
    fn stop(id: i32) -> io::Result<Self> {
        request(libc::PTRACE_SEIZE, id, 0, 0)?;
        let stop = || -> io::Result<(libc::user_regs_struct, u64)> {
            request(libc::PTRACE_INTERRUPT, id, 0, 0)?;
            wait(id)?;
            let mut blocked = 0_u64;
            request(libc::PTRACE_GETSIGMASK, id, SET as usize, (&raw mut blocked).addr())?;
            Ok((registers(id)?, blocked))
        };
        match stop() {
            Ok((registers, blocked)) => Ok(Self { id, registers, blocked }),
            Err(error) => {
                let _ = request(libc::PTRACE_DETACH, id, 0, 0);
                Err(error)
            }
        }
    }

    /// Whether it waits in a system call. One whose call has just ended, or never waits, may hold a mutex, and those that
    /// know their owner know the thread's id, which is another in the process that goes on.
    fn waits(&self) -> bool {
        self.registers.orig_rax.cast_signed() >= 0 && AGAIN.contains(&self.registers.rax.cast_signed())
    }

    /// Has it make a system call.
    fn call(&self, memory: &File, number: i64, arguments: [u64; 4]) -> io::Result<u64> {
        let at = self.registers.rip.wrapping_sub(SYSCALL.len() as u64);
        let mut instruction = [0; 2];
        memory.read_exact_at(&mut instruction, at)?;
        if !self.waits() || instruction != SYSCALL {
            return Err(unusual("a thread is not at rest"));
        }
        let registers = libc::user_regs_struct {
            rip: at,
            rax: number.cast_unsigned(),
            // No call that is to be made again.
            orig_rax: u64::MAX,
            rdi: arguments[0],
            rsi: arguments[1],
            rdx: arguments[2],
            r10: arguments[3],
            ..self.registers
        };
        set_registers(self.id, &registers)?;
        request(libc::PTRACE_SINGLESTEP, self.id, 0, 0)?;
        let status = wait(self.id)?;
        let after = self::registers(self.id)?;
        // A signal that came between stops it as well, before the call.
        if status >> 8 != libc::SIGTRAP || after.rip != self.registers.rip {
            return Err(unusual("it was interrupted"));
        }
        let result = after.rax.cast_signed();
        if (-4095..0).contains(&result) {
            return Err(Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EIO)));
        }
        Ok(result.cast_unsigned())
    }

    /// Where it can be given something, or give it.
    fn scratch(&self) -> u64 {
        self.registers.rsp.wrapping_sub(SCRATCH) & !15
    }
}

fn describe(thread: &Tracee, process: i32, memory: &File) -> io::Result<Thread> {
    let mut regs = thread.registers;
    // The call is made again, as the kernel would have it.
    regs.rax = regs.orig_rax;
    regs.rip = regs.rip.wrapping_sub(SYSCALL.len() as u64);
    const PR_GET_TID_ADDRESS: u64 = 40;
    let at = thread.scratch();
    thread.call(memory, libc::SYS_prctl, [PR_GET_TID_ADDRESS, at, 0, 0])?;
    let mut id_address = [0; 8];
    memory.read_exact_at(&mut id_address, at)?;
    let (mut robust_list, mut length) = (0_u64, 0_u64);
    // SAFETY: both are written as the call defines.
    let result =
        unsafe { libc::syscall(libc::SYS_get_robust_list, thread.id, &raw mut robust_list, &raw mut length) };
    if result != 0 {
        return Err(Error::last_os_error());
    }
    let mut sequence = RseqConfiguration::default();
    let size = size_of::<RseqConfiguration>();
    request(libc::PTRACE_GET_RSEQ_CONFIGURATION, thread.id, size, (&raw mut sequence).addr())?;
    let name = fs::read_to_string(format!("/proc/{process}/task/{}/comm", thread.id))?;
    Ok(Thread {
        name: name.trim_end().to_owned(),
        registers: Registers {
            general: [
                regs.r8,
                regs.r9,
                regs.r10,
                regs.r11,
                regs.r12,
                regs.r13,
                regs.r14,
                regs.r15,
                regs.rdi,
                regs.rsi,
                regs.rbp,
                regs.rbx,
                regs.rdx,
                regs.rax,
                regs.rcx,
                regs.rsp,
                regs.rip,
                regs.eflags,
            ],
            thread_base: regs.fs_base,
        },
        extended: extended(thread.id)?,
        blocked: thread.blocked,
        robust_list,
        id_address: u64::from_ne_bytes(id_address),
        sequence_address: sequence.address,
    })
}

/// `struct ptrace_rseq_configuration` of `linux/ptrace.h`.
#[derive(Default)]
#[repr(C)]
struct RseqConfiguration {
    address: u64,
    size: u32,
    signature: u32,
    flags: u32,
    padding: u32,
}

/// What the process does on each signal.
fn actions(thread: &Tracee, memory: &File) -> io::Result<Vec<Action>> {
    let at = thread.scratch();
    let ask = |signal: i32| -> io::Result<Action> {
        let number = u64::from(signal.unsigned_abs());
        thread.call(memory, libc::SYS_rt_sigaction, [number, 0, at, SET])?;
        let mut bytes = [0; 32];
        memory.read_exact_at(&mut bytes, at)?;
        let word = |index: usize| bytes[index * 8..].first_chunk().copied().map_or(0, u64::from_ne_bytes);
        Ok(Action { signal, handler: word(0), flags: word(1), restorer: word(2), mask: word(3) })
    };
    let settable = |signal: &i32| ![libc::SIGKILL, libc::SIGSTOP].contains(signal);
    (1..=SIGNALS).filter(settable).map(ask).collect()
}

/// Its open descriptors.
fn descriptors(process: i32, memory: &File, (passed, files): Names<'_>) -> io::Result<Vec<Descriptor>> {
    let identity = |data: &fs::Metadata| (data.dev(), data.ino());
    let memory = identity(&memory.metadata()?);
    let mut known = vec![(memory, super::MEMORY)];
    for (name, file) in files {
        known.push((identity(&file.metadata()?), name));
    }
    let mut numbers: Vec<i32> = fs::read_dir(format!("/proc/{process}/fd"))?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    let mut all = Vec::new();
    for number in numbers {
        let path = format!("/proc/{process}/fd/{number}");
        let link = fs::read_link(&path)?.to_string_lossy().into_owned();
        let text = memory::read_limited(&format!("/proc/{process}/fdinfo/{number}"))?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(str::trim)
        };
        let flags = field("flags").and_then(|flags| i32::from_str_radix(flags, 8).ok());
        let flags = flags.ok_or_else(|| unusual(format!("descriptor {number}")))?;
        let hexadecimal = |name: &str| field(name).and_then(|word| u64::from_str_radix(word, 16).ok());
        let kind = match link.as_str() {
            // The jail's own: nothing, nothing, and where words of trouble go.
            _ if number <= 2 => continue,
            "anon_inode:[eventfd]" => hexadecimal("eventfd-count").map(|count| Kind::Event { count }),
            "anon_inode:[signalfd]" => hexadecimal("sigmask").map(|mask| Kind::Signals { mask }),
            "anon_inode:[eventpoll]" => Some(Kind::Poll { interests: interests(&text)? }),
            _ => {
                let data = fs::metadata(&path)?;
                let named = passed.iter().find(|(passed, _)| *passed == number).map(|(_, name)| *name);
                let known = known.iter().find(|(file, _)| *file == identity(&data)).map(|(_, name)| *name);
                // A file in memory is passed by its own name.
                let own = || link.strip_prefix("/memfd:")?.strip_suffix(" (deleted)");
                let name = named.or(known).or_else(own);
                match name {
                    Some(name) => Some(Kind::Passed(name.to_owned())),
                    // Read once, at the start.
                    None if data.is_file() => continue,
                    None => None,
                }
            }
        };
        let kind = kind.ok_or_else(|| unusual(format!("descriptor {number} is {link}")))?;
        all.push(Descriptor { number, flags, kind });
    }
    let has = |name: &String| all.iter().any(|held| matches!(&held.kind, Kind::Passed(held) if held == name));
    match files.iter().find(|(name, _)| !has(name)) {
        Some((name, _)) => Err(unusual(format!("it does not hold its {name}"))),
        None => Ok(all),
    }
}

/// Lines `tfd: 7 events: 19 data: 7f00 ...` of `/proc/PID/fdinfo/N`.
fn interests(text: &str) -> io::Result<Vec<Interest>> {
    let lines = text.lines().filter(|line| line.starts_with("tfd:"));
    let interest = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let mut after = |name: &str| words.find(|word| *word == name).and_then(|_| words.next());
        let descriptor = after("tfd:")?.parse().ok()?;
        let events = u32::from_str_radix(after("events:")?, 16).ok()?;
        let data = u64::from_str_radix(after("data:")?, 16).ok()?;
        Some(Interest { descriptor, events, data })
    };
    lines.map(|line| interest(line).ok_or_else(|| unusual(format!("epoll: {line}")))).collect()
}

/// An address space.
struct Mapped {
    mappings: Vec<Mapping>,
    kernel_mappings: Vec<KernelMapping>,
    files: BTreeSet<PathBuf>,
    /// Where its pages end in the file.
    end: u64,
}

/// Its address space, whose pages are written to `target`.
fn mappings(process: i32, memory: &File, source: &File, target: &File) -> io::Result<Mapped> {
    let memory = memory.metadata()?;
    let pages = OwnPages::open(process.unsigned_abs())?;
    let text = memory::read_limited(&format!("/proc/{process}/maps"))?;
    let (mut mappings, mut kernel_mappings, mut end) = (Vec::new(), Vec::new(), 0);
    let (mut files, mut written) = (BTreeSet::new(), 0);
    let mut buffer = vec![0; CHUNK];
    for line in text.lines() {
        let (area, name) = memory::parse_area(line).ok_or_else(|| unusual(format!("mapping {line}")))?;
        let (start, length) = (area.start, area.end - area.start);
        if name == "[vsyscall]" {
            continue;
        }
        if name.starts_with("[v") {
            kernel_mappings.push(KernelMapping { name: name.to_owned(), start, length });
            continue;
        }
        let add = |mappings: &mut Vec<Mapping>, content| {
            mappings.push(Mapping { start, length, protection: area.protection, content });
        };
        // The same number may be a file's elsewhere.
        if area.inode == memory.ino() && name.starts_with("/memfd:") && length <= memory.len() {
            add(&mut mappings, Content::Memory(area.offset));
            continue;
        }
        if area.is_shared {
            return Err(unusual(format!("it shares memory: {line}")));
        }
        if name == "[stack]" {
            // What it could still grow by.
            mappings.push(Mapping {
                start: start.checked_sub(STACK).ok_or_else(|| unusual("its stack"))?,
                length: STACK,
                protection: area.protection,
                content: Content::Empty,
            });
        }
        // Of a file everything: what was not read yet may be, and the file is not looked for again.
        let runs = if area.protection == libc::PROT_NONE {
            Vec::new()
        } else if area.inode != 0 {
            if area.protection & libc::PROT_EXEC != 0 {
                files.insert(PathBuf::from(name));
            }
            std::iter::once(start..area.end).collect()
        } else {
            pages.runs(start..area.end)?
        };
        if runs.is_empty() {
            add(&mut mappings, Content::Empty);
            continue;
        }
        written += runs.iter().map(|run| run.end - run.start).sum::<u64>();
        if written > PAGES_LIMIT {
            return Err(unusual("it has grown too large"));
        }
        for run in runs {
            memory::copy_range(source, run.clone(), target, end + (run.start - start), &mut buffer)?;
        }
        add(&mut mappings, Content::Pages(end));
        end += length;
    }
    // The last pages may be a hole.
    target.set_len(end)?;
    Ok(Mapped { mappings, kernel_mappings, files, end })
}

fn registers(thread: i32) -> io::Result<libc::user_regs_struct> {
    // SAFETY: all-zero bytes are valid registers.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, thread, 0, (&raw mut registers).addr())?;
    Ok(registers)
}

fn set_registers(thread: i32, registers: &libc::user_regs_struct) -> io::Result<()> {
    request(libc::PTRACE_SETREGS, thread, 0, std::ptr::from_ref(registers).addr())
}

/// Floating point and vectors.
fn extended(thread: i32) -> io::Result<Vec<u8>> {
    const NT_X86_XSTATE: usize = 0x202;
    let mut bytes = vec![0_u8; 64 << 10];
    let mut area = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    request(libc::PTRACE_GETREGSET, thread, NT_X86_XSTATE, (&raw mut area).addr())?;
    bytes.truncate(area.iov_len);
    Ok(bytes)
}

fn request(request: libc::c_uint, thread: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: each caller gives what the request is defined with; it lives through the call.
    match unsafe { libc::ptrace(request, thread, address, data) } {
        -1 => Err(Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Waits until a thread has stopped; how.
fn wait(thread: i32) -> io::Result<i32> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut status = 0;
        // SAFETY: the status is written as the call defines.
        match unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL | libc::WNOHANG) } {
            0 if Instant::now() > deadline => return Err(ErrorKind::TimedOut.into()),
            0 => std::thread::sleep(Duration::from_micros(20)),
            -1 => match Error::last_os_error() {
                error if error.kind() == ErrorKind::Interrupted => {}
                error => return Err(error),
            },
            _ if libc::WIFSTOPPED(status) => return Ok(status),
            _ => return Err(unusual("it has ended")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interests_are_read() {
        let text =
            "pos:\t0\nflags:\t02\ntfd:       15 events:       1b data: 7f5500000010  pos:0 ino:3f1 sdev:e\n";
        let expected = Interest { descriptor: 15, events: 0x1b, data: 0x7f55_0000_0010 };
        assert_eq!(interests(text).unwrap(), [expected]);
        assert!(interests("tfd: 15 events: zz data: 0").is_err());
        assert_eq!(interests("pos: 0").unwrap(), []);
    }

    /// One that is in system calls all the time, and waits in none, is not saved in the middle of one.
    #[test]
    fn a_process_that_never_waits_is_refused() {
        let mut command = std::process::Command::new("/bin/dd");
        command.args(["if=/dev/zero", "of=/dev/null", "bs=1"]).stderr(std::process::Stdio::null());
        let mut child = command.spawn().unwrap();
        let works =
            || fs::read_link(format!("/proc/{}/fd/1", child.id())).is_ok_and(|to| to.ends_with("null"));
        while !works() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let file = tempfile::tempfile().unwrap();
        let saved = save(child.id(), &file, &|| false, (&[], &[]), &file);
        assert!(saved.unwrap_err().to_string().ends_with("it does not come to rest"));
        // It goes on.
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Saved, a process goes on as if nothing had been.
    #[test]
    fn a_process_is_saved_and_goes_on() {
        let memory = tempfile::tempfile().unwrap();
        let mut command = std::process::Command::new("/bin/cat");
        command.env_clear().stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        // Whoever runs the tests may have left some open.
        // SAFETY: a system call, and nothing else.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut command, || {
                libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
                Ok(())
            });
        }
        let mut child = command.spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        let mut output = child.stdout.take().unwrap();
        let mut byte = [0];
        let mut echo = || {
            io::Write::write_all(&mut input, b"x").unwrap();
            io::Read::read_exact(&mut output, &mut byte).unwrap();
            assert_eq!(&byte, b"x");
        };
        echo();
        // Until it waits for more.
        let reads =
            || fs::read_to_string(format!("/proc/{}/syscall", child.id())).unwrap().starts_with("0 0x0 ");
        while !reads() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let target = tempfile::tempfile().unwrap();
        let files = save(child.id(), &memory, &|| false, (&[], &[]), &target).unwrap();
        echo();
        assert!(files.iter().any(|path| path.ends_with("cat")), "{files:?}");
        let saved = Process::read(&target).unwrap();
        assert_eq!((saved.threads.len(), saved.threads[0].name.as_str()), (1, "cat"));
        assert_eq!(saved.actions.len(), 62);
        // It is where it asks for more: the instruction before, and the call's number in its place.
        let registers = saved.threads[0].registers.general;
        assert_eq!(registers[13].cast_signed(), libc::SYS_read);
        let code = saved
            .mappings
            .iter()
            .find(|mapping| (mapping.start..mapping.start + mapping.length).contains(&registers[16]));
        let Some(Mapping { start, content: Content::Pages(at), .. }) = code else { panic!("{code:?}") };
        let mut instruction = [0; 2];
        target.read_exact_at(&mut instruction, at + (registers[16] - start)).unwrap();
        assert_eq!(instruction, SYSCALL);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
