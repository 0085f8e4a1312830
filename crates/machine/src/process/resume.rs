//! Going on: this process becomes the one that was saved. It has one thread, and nothing of its own that it needs again.
//!
//! What this program has mapped stays where it is, beside what is mapped anew: nothing leads there any more. It may be that
//! the host has put it where something of the saved process belongs (once in some hundred times); that is found out before
//! anything is replaced.
#![allow(unsafe_code)]

use std::arch::global_asm;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Error, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::MEMORY;
use super::format::{Action, Content, Descriptor, KernelMapping, Kind, Mapping, Process, Thread};
use crate::memory;

/// Where descriptors wait for their places; above every place, below the limit of 256.
const WAITING: RawFd = 160;
/// No descriptor has this number.
const LIMIT: RawFd = 256;
/// `sw_reserved` of the legacy floating-point area and what it says (`asm/sigcontext.h`).
const RESERVED: usize = 464;
const MAGIC: (u32, u32) = (0x4650_5853, 0x4650_5845);
/// The first bytes of the extended state say, from here, what it has.
const HEADER: usize = 512;
/// The component of tiles, which a program must ask for and an emulator does not.
const TILES: u64 = 1 << 18;
/// Bytes of the extended state up to that component.
const EXTENDED_LIMIT: usize = 2816;
/// `UC_FP_XSTATE`, `UC_SIGCONTEXT_SS` and `UC_STRICT_RESTORE_SS` (`asm/ucontext.h`).
const FRAME_FLAGS: u64 = 7;
/// Segment selectors of a 64-bit program.
const CODE_SEGMENT: u64 = 0x33;
const STACK_SEGMENT: u64 = 0x2b;
/// Bytes of `struct robust_list_head` and of the kernel's `sigset_t`.
const ROBUST_HEAD: u64 = 24;
const SET: u64 = 8;
/// What `rseq` leaves where it is not registered (`RSEQ_CPU_ID_REGISTRATION_FAILED`): the C library then asks in another way.
const NOT_REGISTERED: u32 = (-2_i32).cast_unsigned();

/// What the kernel has mapped into this process. Read before the jail takes `/proc` away.
pub(crate) struct Room {
    kernel_mappings: Vec<KernelMapping>,
}

impl Room {
    pub(crate) fn look() -> io::Result<Self> {
        let text = memory::read_limited("/proc/self/maps")?;
        let areas = text.lines().filter_map(memory::parse_area);
        let ours = areas.filter(|(_, name)| name.starts_with("[v") && *name != "[vsyscall]");
        let kernel_mappings = ours.map(|(area, name)| KernelMapping {
            name: name.to_owned(),
            start: area.start,
            length: area.end - area.start,
        });
        Ok(Self { kernel_mappings: kernel_mappings.collect() })
    }
}

/// Becomes the process in `image`, with `passed` as its descriptors of those names. All others are closed, but for the first
/// three; `report`, whose end says that it has become the other, last.
///
/// # Errors
/// If that cannot be; only its end is left for this process then.
pub(crate) fn resume(
    room: &Room,
    image: &File,
    passed: &BTreeMap<&str, &OwnedFd>,
    report: &OwnedFd,
) -> io::Result<std::convert::Infallible> {
    let process = Process::read(image)?;
    let memory = passed.get(MEMORY).ok_or_else(|| invalid("it has no memory"))?;
    for mapping in &process.mappings {
        map(mapping, image.as_raw_fd(), memory.as_raw_fd())?;
    }
    let blocks = process.threads.iter().map(Block::new).collect::<io::Result<Vec<_>>>()?;
    for thread in &process.threads {
        forget_sequence(thread, &process.mappings)?;
        check_address(thread.id_address, 4, &process.mappings)?;
    }
    move_kernel_mappings(room, &process.kernel_mappings)?;
    // From here on nothing asks the time, which the C library does in the code that was moved.
    place_descriptors(&process.descriptors, passed, report)?;
    // SAFETY: every pointer is of a value that lives through its call; no other thread exists, and no code of this program
    // runs after the last call, so nothing notices that its signals and its thread's variables are another's.
    unsafe {
        // As if it had been executed: whoever saves the machine looks into it.
        if libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) < 0 {
            return Err(named("let others look into it"));
        }
        let _ = libc::prctl(libc::PR_SET_TIMERSLACK, process.timer_slack_ns, 0, 0, 0);
        block_signals()?;
        for action in &process.actions {
            act(action)?;
        }
        let (main, others) = process.threads.split_first().zip(blocks.split_first()).map_or_else(
            || Err(invalid("it has no thread")),
            |((main, others), (block, blocks))| Ok(((main, block), others.iter().zip(blocks))),
        )?;
        for (thread, block) in others {
            start(thread, block)?;
        }
        name(&main.0.name);
        libc::close(report.as_raw_fd());
        agentkernel_become(main.1.start, main.0.registers.thread_base, main.0.id_address)
    }
}

fn invalid(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidData, format!("a saved process: {what}"))
}

fn named(what: impl std::fmt::Display) -> Error {
    let error = Error::last_os_error();
    Error::new(error.kind(), format!("{what}: {error}"))
}

fn map(mapping: &Mapping, image: RawFd, memory: RawFd) -> io::Result<()> {
    let place = libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE;
    let (flags, file, offset) = match mapping.content {
        Content::Empty => (place | libc::MAP_ANONYMOUS, -1, 0),
        Content::Pages(offset) => (place, image, offset),
        Content::Memory(offset) => (place, memory, offset),
    };
    let length = usize::try_from(mapping.length).map_err(invalid)?;
    let offset = offset.try_into().map_err(invalid)?;
    let start = mapping.start as *mut libc::c_void;
    // SAFETY: nothing is mapped there, or the call fails.
    let mapped = unsafe { libc::mmap(start, length, mapping.protection, flags, file, offset) };
    if mapped == libc::MAP_FAILED {
        return Err(named(format!("map {length} bytes at {:x}", mapping.start)));
    }
    if mapped != start {
        return Err(Error::new(ErrorKind::Unsupported, "this kernel does not map where it is told to"));
    }
    Ok(())
}

/// The kernel's code is where the saved process knows it.
fn move_kernel_mappings(room: &Room, wanted: &[KernelMapping]) -> io::Result<()> {
    if room.kernel_mappings.len() != wanted.len() {
        return Err(invalid("this is another kernel"));
    }
    for (ours, theirs) in room.kernel_mappings.iter().zip(wanted) {
        if (&ours.name, ours.length) != (&theirs.name, theirs.length) {
            return Err(invalid("this is another kernel"));
        }
        let (start, length, protection) = (theirs.start, theirs.length, libc::PROT_NONE);
        map(&Mapping { start, length, protection, content: Content::Empty }, -1, -1)?;
        let length = usize::try_from(ours.length).map_err(invalid)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the kernel's own mapping is moved to where nothing but the mapping just made is.
        let moved = unsafe {
            libc::mremap(ours.start as *mut _, length, length, flags, theirs.start as *mut libc::c_void)
        };
        if moved == libc::MAP_FAILED {
            return Err(named(format!("move {}", ours.name)));
        }
    }
    Ok(())
}

/// Whether something writable of the saved process is there.
fn check_address(address: u64, length: u64, mappings: &[Mapping]) -> io::Result<()> {
    let within = |mapping: &&Mapping| {
        mapping.start <= address
            && address.saturating_add(length) <= mapping.start + mapping.length
            && mapping.protection & libc::PROT_WRITE != 0
    };
    mappings.iter().find(within).map(drop).ok_or_else(|| invalid(format!("{address:x} is not its own")))
}

/// Its threads are not told by the kernel any more on which processor they are.
fn forget_sequence(thread: &Thread, mappings: &[Mapping]) -> io::Result<()> {
    if thread.sequence_address == 0 {
        return Ok(());
    }
    check_address(thread.sequence_address, 8, mappings)?;
    let words = thread.sequence_address as *mut u32;
    // SAFETY: it was just mapped there, writable; `struct rseq` begins with two words, `cpu_id_start` and `cpu_id`.
    unsafe {
        words.write_unaligned(0);
        words.add(1).write_unaligned(NOT_REGISTERED);
    }
    Ok(())
}

/// Makes its descriptors, each at its number.
fn place_descriptors(
    wanted: &[Descriptor],
    passed: &BTreeMap<&str, &OwnedFd>,
    report: &OwnedFd,
) -> io::Result<()> {
    // Those that are passed make room first.
    let mut waiting = BTreeMap::new();
    for (name, descriptor) in passed {
        waiting.insert(*name, rustix::io::fcntl_dupfd_cloexec(descriptor, WAITING)?);
    }
    let mut polls = Vec::new();
    for descriptor in wanted {
        if !(3..WAITING).contains(&descriptor.number) || descriptor.number == report.as_raw_fd() {
            return Err(invalid(format!("descriptor {}", descriptor.number)));
        }
        // SAFETY: each call only makes a descriptor.
        let made = unsafe {
            match &descriptor.kind {
                Kind::Passed(name) => {
                    let file = waiting.get(name.as_str()).ok_or_else(|| invalid(format!("no {name}")))?;
                    if descriptor.flags & libc::O_NONBLOCK != 0 {
                        libc::fcntl(file.as_raw_fd(), libc::F_SETFL, descriptor.flags & libc::O_NONBLOCK);
                    }
                    libc::fcntl(file.as_raw_fd(), libc::F_DUPFD, WAITING)
                }
                Kind::Event { count } => {
                    let descriptor = libc::eventfd(0, descriptor.flags & libc::O_NONBLOCK);
                    if descriptor >= 0 && *count > 0 {
                        libc::write(descriptor, (&raw const *count).cast(), size_of::<u64>());
                    }
                    descriptor
                }
                Kind::Signals { mask } => {
                    let flags = descriptor.flags & libc::O_NONBLOCK;
                    let made = libc::syscall(libc::SYS_signalfd4, -1, &raw const *mask, SET, flags);
                    made.try_into().unwrap_or(-1)
                }
                Kind::Poll { interests } => {
                    polls.push((descriptor.number, interests));
                    libc::epoll_create1(0)
                }
            }
        };
        if made < 0 {
            return Err(named(format!("make descriptor {}", descriptor.number)));
        }
        let close_on_exec = descriptor.flags & libc::O_CLOEXEC;
        // SAFETY: whatever was there is not needed any more: `waiting` has what is.
        let placed = unsafe {
            if made == descriptor.number {
                let flag = if close_on_exec == 0 { 0 } else { libc::FD_CLOEXEC };
                libc::fcntl(made, libc::F_SETFD, flag)
            } else {
                let placed = libc::dup3(made, descriptor.number, close_on_exec);
                libc::close(made);
                placed
            }
        };
        if placed < 0 {
            return Err(named(format!("place descriptor {}", descriptor.number)));
        }
    }
    let is_kept = |number: &RawFd| {
        *number == report.as_raw_fd() || wanted.iter().any(|descriptor| descriptor.number == *number)
    };
    for number in (3..LIMIT).filter(|number| !is_kept(number)) {
        // SAFETY: whoever owns it never uses it again: this program ends here.
        unsafe { libc::close(number) };
    }
    std::mem::forget(waiting);
    for (number, interests) in polls {
        for interest in interests {
            let mut event = libc::epoll_event { events: interest.events, u64: interest.data };
            // SAFETY: the event lives through the call.
            let added =
                unsafe { libc::epoll_ctl(number, libc::EPOLL_CTL_ADD, interest.descriptor, &raw mut event) };
            if added < 0 {
                return Err(named(format!("wait for descriptor {}", interest.descriptor)));
            }
        }
    }
    Ok(())
}

/// # Safety
/// Whoever calls must not rely on a signal any more.
unsafe fn block_signals() -> io::Result<()> {
    let all = u64::MAX;
    // SAFETY: the set is as long as is said.
    let result =
        unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, 0, SET) };
    if result < 0 { Err(named("block signals")) } else { Ok(()) }
}

/// # Safety
/// As [`block_signals`].
unsafe fn act(action: &Action) -> io::Result<()> {
    let kernel = [action.handler, action.flags, action.restorer, action.mask];
    // SAFETY: the four words are the kernel's `struct sigaction`.
    let result = unsafe { libc::syscall(libc::SYS_rt_sigaction, action.signal, kernel.as_ptr(), 0, SET) };
    if result < 0 { Err(named(format!("act on signal {}", action.signal))) } else { Ok(()) }
}

/// # Safety
/// The thread's addresses must be those of its own memory.
unsafe fn start(thread: &Thread, block: &Block) -> io::Result<()> {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM
        | libc::CLONE_SETTLS
        | libc::CLONE_PARENT_SETTID
        | libc::CLONE_CHILD_CLEARTID;
    name(&thread.name);
    // SAFETY: the new thread goes where its block leads, on a stack of its own.
    let result = unsafe {
        agentkernel_start(
            u64::from(flags.unsigned_abs()),
            block.start,
            thread.id_address,
            thread.id_address,
            thread.registers.thread_base,
        )
    };
    if result < 0 {
        let error = Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EIO));
        return Err(Error::new(error.kind(), format!("start a thread: {error}")));
    }
    Ok(())
}

/// Names this thread, and those it starts after that.
fn name(name: &str) {
    let mut bytes = [0_u8; 16];
    for (to, from) in bytes[..15].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: the name ends with a zero.
    let _ = unsafe { libc::prctl(libc::PR_SET_NAME, bytes.as_ptr()) };
}

/// What a thread takes up: where its robust mutexes are, then a frame as the kernel leaves on the stack for a signal's
/// handler, whose end gives it all its registers.
struct Block {
    /// Its address. It is never freed: threads go on from it.
    start: u64,
}

impl Block {
    fn new(thread: &Thread) -> io::Result<Self> {
        let mut words = vec![thread.robust_list];
        // struct ucontext: flags, link, an alternate stack that is disabled.
        words.extend([FRAME_FLAGS, 0, 0, u64::from(libc::SS_DISABLE.unsigned_abs()), 0]);
        words.extend(thread.registers.general);
        words.push(CODE_SEGMENT | STACK_SEGMENT << 48);
        // error, trap, old mask, fault address, and where the floating-point state is.
        words.extend([0, 0, 0, 0, 0]);
        let pointer = words.len() - 1;
        words.extend([0; 8]);
        words.push(thread.blocked);
        // The kernel wants to see a `siginfo` behind it.
        words.extend([0; 16]);
        let extended = extended(&thread.extended)?;
        // On a boundary of 64 bytes.
        let begin = words.len().next_multiple_of(8);
        words.resize(begin, 0);
        let length = (words.len() * 8 + extended.len()).next_multiple_of(4096);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: memory that nobody else has.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(named("map a thread's registers"));
        }
        words[pointer] = start.addr() as u64 + begin as u64 * 8;
        // SAFETY: the memory just mapped is long enough for both.
        unsafe {
            let to = start.cast::<u8>();
            to.copy_from_nonoverlapping(words.as_ptr().cast(), words.len() * 8);
            to.add(begin * 8).copy_from_nonoverlapping(extended.as_ptr(), extended.len());
        }
        Ok(Self { start: start.addr() as u64 })
    }
}

/// The extended state as a signal's frame has it.
fn extended(saved: &[u8]) -> io::Result<Vec<u8>> {
    let mut bytes = saved[..saved.len().min(EXTENDED_LIMIT)].to_vec();
    let size = bytes.len();
    if size < HEADER + 64 {
        return Err(invalid("its floating-point state is too short"));
    }
    let features = u64::from_ne_bytes(bytes[HEADER..HEADER + 8].try_into().map_err(invalid)?) & !TILES;
    bytes[HEADER..HEADER + 8].copy_from_slice(&features.to_ne_bytes());
    let size_word = u32::try_from(size).map_err(invalid)?;
    bytes[RESERVED..HEADER].fill(0);
    bytes[RESERVED..RESERVED + 4].copy_from_slice(&MAGIC.0.to_ne_bytes());
    bytes[RESERVED + 4..RESERVED + 8].copy_from_slice(&(size_word + 4).to_ne_bytes());
    bytes[RESERVED + 8..RESERVED + 16].copy_from_slice(&(!TILES).to_ne_bytes());
    bytes[RESERVED + 16..RESERVED + 20].copy_from_slice(&size_word.to_ne_bytes());
    bytes.extend_from_slice(&MAGIC.1.to_ne_bytes());
    Ok(bytes)
}

unsafe extern "C" {
    /// `clone`; the new thread, whose stack is its block, takes up what is there. The id of the thread, or an error.
    fn agentkernel_start(flags: u64, block: u64, id: u64, cleared: u64, base: u64) -> i64;
    /// The same for the thread that calls.
    fn agentkernel_become(block: u64, base: u64, cleared: u64) -> !;
}

global_asm!(
    ".globl agentkernel_start",
    ".globl agentkernel_become",
    "agentkernel_start:",
    "mov r10, rcx",
    "mov eax, 56", // clone
    "syscall",
    "test rax, rax",
    "jz 2f",
    "ret",
    "2:",
    "mov rdi, [rsp]",
    "mov esi, {robust_head}",
    "mov eax, 273", // set_robust_list
    "syscall",
    "add rsp, 8",
    "mov eax, 15", // rt_sigreturn
    "syscall",
    "ud2",
    "agentkernel_become:",
    "mov rsp, rdi",
    "mov r12, rdx",
    "mov edi, 0x1002", // ARCH_SET_FS
    "mov eax, 158", // arch_prctl
    "syscall",
    "mov rdi, r12",
    "mov eax, 218", // set_tid_address
    "syscall",
    "mov [r12], eax",
    "jmp 2b",
    robust_head = const ROBUST_HEAD,
);
