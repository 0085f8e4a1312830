//! What host and guest say to each other. The host opens every stream and sends one [`Request`] first.
//!
//! | request | then the host sends | and the guest answers |
//! |---|---|---|
//! | [`Request::FileSystem`] | FUSE replies, one a frame | FUSE requests, one a frame |
//! | [`Request::Configure`] | nothing | one [`Reply`] |
//! | [`Request::Exec`] | [`ExecInput`] | [`ExecOutput`], the last one `Exited` or `Failed` |
//! | [`Request::Changes`], [`Request::CopyOut`] | nothing | [`Entry`], the last one `End` or `Failed` |
//! | [`Request::LayerOut`] | nothing | [`LayerEntry`], the last one `End` or `Failed` |
//! | [`Request::LayerIn`] | [`LayerEntry`], the last one `End` | one [`Reply`], as soon as it fails or is done |
//! | [`Request::CopyIn`] | [`Entry`], the last one `End` | one [`Reply`], as soon as it fails or is done |
//! | [`Request::FileRead`] | nothing | [`FileReply`], the last one `Done` or `Failed` |
//! | [`Request::FileWrite`] | [`FileInput`], the last one `End` | one [`FileReply`], as soon as it fails or is done |
//! | [`Request::FileRemove`] | nothing | one [`FileReply`] |
//! | [`Request::Clock`] | nothing | one [`Reply`] |
//! | [`Request::Quiesce`] | nothing | one [`Reply`]; the stream's end ends the quiet |
//! | [`Request::Shutdown`] | nothing | one [`Reply`], then the machine ends |

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// Bytes of standard input the host may have sent beyond those reported by [`ExecOutput::StdinTaken`]. So the guest
/// always reads on, and a signal is never stuck behind input that the program does not take.
pub const STDIN_WINDOW: usize = 256 << 10;

/// First words of the host after connecting, in a record of their own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`crate::VERSION`] of the host.
    pub version: u32,
}

/// The guest's answer to [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloAnswer {
    /// [`crate::VERSION`] of the guest.
    pub version: u32,
    /// `uname -r` of the guest's kernel.
    pub kernel: String,
}

/// First message of each stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// From here on the stream carries FUSE messages of the file system `tag`. It is mounted with the first such stream;
    /// a later one, in a machine that was restored, goes on where the former ended.
    FileSystem {
        /// Name by which [`Assemble`] and [`Furnish`] refer to it: ASCII letters, digits and `-`.
        tag: String,
        /// Mount it read-only (the host refuses writes besides).
        read_only: bool,
    },
    /// Assemble the root file system, take on an identity, furnish the machine: what of it is to be done.
    Configure(Box<Configure>),
    /// Bring the machine into a state in which it can be saved: no request to the host's file servers is under way and
    /// none is begun. It lasts as long as this stream; in a machine that is restored the stream is gone.
    Quiesce {
        /// What becomes of the programs that run; nothing if it is not given, for the machine itself will stand still.
        programs: Option<Programs>,
    },
    /// Set the wall clock, nanoseconds since the epoch: the machine stood still.
    Clock {
        /// What it is now.
        unix_time_ns: u64,
    },
    /// Run a program.
    Exec(Box<Exec>),
    /// List what was changed in the copy-on-write mount with this index in [`Furnish::mounts`].
    Changes {
        /// Index in [`Furnish::mounts`].
        mount: u32,
        /// What keeps programs from changing what is being listed.
        programs: Programs,
    },
    /// Send a file or a directory with all that is in it. The first entry, with an empty path, is the thing itself;
    /// symbolic links are sent, not followed, but for the last name of a `path` that ends in `/`.
    CopyOut {
        /// Absolute path, looked up as the guest's programs would.
        path: ByteBuf,
    },
    /// Write what is sent: to `path`/`name` if `path` is a directory, else to `path`, whose parent must exist.
    CopyIn {
        /// Absolute path, looked up as the guest's programs would.
        path: ByteBuf,
        /// Name inside an existing directory; empty to put what the sent directory holds into the directory `path`.
        name: ByteBuf,
        /// Owner of what is made, as [`Exec::user`].
        user: String,
    },
    /// Send the content of one file, of at most [`FILE_LIMIT`] bytes.
    FileRead {
        /// Absolute path, looked up as the guest's programs would; a symbolic link is followed.
        path: ByteBuf,
    },
    /// Write one file of at most [`FILE_LIMIT`] bytes, whole or not at all, with the directories it is in. One that is there
    /// keeps its owner and permissions.
    FileWrite {
        /// As for [`Request::FileRead`].
        path: ByteBuf,
        /// Owner of what is made, as [`Exec::user`].
        user: String,
    },
    /// Remove one file, or a symbolic link; no directory.
    FileRemove {
        /// As for [`Request::FileRead`], but for the last name: a symbolic link is not followed.
        path: ByteBuf,
    },
    /// Send a layer of the writable disk, whole.
    LayerOut {
        /// Its number.
        layer: u32,
    },
    /// Make a layer of the writable disk of what is sent. One of that number is replaced.
    LayerIn {
        /// Its number.
        layer: u32,
    },
    /// End all processes, write everything to the disks, end the machine.
    Shutdown {
        /// Time between SIGTERM and SIGKILL, milliseconds.
        grace_ms: u32,
    },
}

/// Largest file that is read or written in one request, bytes.
pub const FILE_LIMIT: usize = 16 << 20;

/// Content for a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileInput {
    /// The next bytes.
    Data(ByteBuf),
    /// That was all.
    End,
}

/// What the guest says about a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileReply {
    /// The next bytes of its content.
    Data(ByteBuf),
    /// It is done.
    Done,
    /// It could not be done.
    Failed {
        /// Which kind.
        kind: FileFailure,
        /// What failed and why, lower case, no final period.
        message: String,
    },
}

/// Why a file cannot be read, written or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileFailure {
    /// There is none, or what should be a directory on the way to it is none.
    NotFound,
    /// It is a directory.
    Directory,
    /// It is a device node, a FIFO or a socket.
    Special,
    /// It is larger than [`FILE_LIMIT`].
    TooLarge,
    /// The disk is full.
    Full,
    /// The guest's kernel does not permit it: a read-only file system, for one.
    Refused,
    /// Anything else.
    Other,
}

/// What becomes of the programs while their changes are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Programs {
    /// All processes are ended first.
    End,
    /// They stand still meanwhile and go on afterwards.
    Freeze,
}

/// Answer to requests that have a single one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// It is done.
    Done,
    /// It could not be done.
    Failed {
        /// What failed and why, lower case, no final period.
        message: String,
    },
}

/// What a machine is told before it may run programs, in this order. A machine that was just booted is told all of it. A
/// template is assembled and then saved; what is restored of it gets an identity and is furnished. A fork gets a new
/// identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configure {
    /// Once in a machine's life.
    pub assemble: Option<Assemble>,
    /// After each start and each restore. If it fails no program runs.
    pub identity: Identity,
    /// Once in a machine's life.
    pub furnish: Option<Furnish>,
    /// The emulator has translated nothing yet: run a program that does nothing meanwhile, so that what the first one needs
    /// is translated by the time it comes.
    pub rehearse: bool,
}

/// The root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assemble {
    /// The lower layer of `/`.
    pub root: Root,
    /// Where writes go.
    pub writable: Writable,
    /// Tag of a file system that will be the lower layer of a copy-on-write mount, which is assembled ahead; empty for none.
    pub prepare: String,
    /// Authorities that the guest's programs trust besides those of its image: certificates, DER.
    pub authorities: Vec<ByteBuf>,
    /// How the network card is set up.
    pub link: Link,
}

/// The link between a machine and its host: two addresses, IPv4 alone, nobody else on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The guest's address.
    pub guest: [u8; 4],
    /// The host's: gateway and name server.
    pub host: [u8; 4],
    /// Length of their common prefix, bits.
    pub prefix: u8,
    /// Largest IP packet, bytes.
    pub mtu: u16,
}

/// What no two machines share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Host name, also written to `/etc/hostname`.
    pub hostname: String,
    /// Wall clock, nanoseconds since the epoch.
    pub unix_time_ns: u64,
    /// Fresh randomness of the host for the guest's pool; the pool is reseeded before any process runs.
    pub entropy: ByteBuf,
    /// Content of `/etc/machine-id`: 32 hexadecimal digits.
    pub machine_id: String,
    /// What `/proc/sys/kernel/random/boot_id` says: a UUID.
    pub boot_id: String,
    /// A word that changes with each restore, for programs that live through one: the content of
    /// `/run/agentkernel/generation`.
    pub generation: String,
    /// Content of `/etc/hosts`.
    pub hosts: ByteBuf,
    /// Content of `/etc/resolv.conf`.
    pub resolver: ByteBuf,
}

/// What makes the machine a certain sandbox's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Furnish {
    /// Nothing of the root can be changed once it is assembled; `/tmp` and `/var/tmp` are in memory then.
    pub read_only: bool,
    /// Most processes and threads of one [`Exec`] with all it starts.
    pub process_limit: u32,
    /// Mounts above the root, in this order.
    pub mounts: Vec<Mount>,
    /// Directories to make, with their missing parents (0755, root), after the mounts; an existing one is kept.
    pub directories: Vec<Directory>,
    /// Files to write after the directories, replacing what is there.
    pub files: Vec<File>,
}

/// The lower, read-only layer of the root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Root {
    /// A file system served by the host.
    FileSystem {
        /// Its tag.
        tag: String,
    },
    /// An EROFS image on a block device.
    Disk {
        /// Serial number of the device (`/sys/block/*/serial`).
        serial: String,
    },
}

/// Where the writes of the guest go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Writable {
    /// An ext4 file system on a block device.
    Disk {
        /// Serial number of the device (`/sys/block/*/serial`).
        serial: String,
    },
}

/// A directory of the host inside the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The served file system.
    pub tag: String,
    /// Absolute path in the guest; made if missing.
    pub target: ByteBuf,
    /// What becomes of writes.
    pub mode: MountMode,
}

/// What becomes of writes below a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountMode {
    /// They are refused.
    ReadOnly,
    /// They reach the host.
    ReadWrite,
    /// They stay in the guest's writable layer, listed by [`Request::Changes`].
    CopyOnWrite,
}

/// A directory to make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// Absolute path.
    pub path: ByteBuf,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A file to write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Absolute path.
    pub path: ByteBuf,
    /// Permission bits.
    pub mode: u32,
    /// The whole content.
    pub content: ByteBuf,
}

/// A program to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments; a program without `/` is searched in the `PATH` of `environment`.
    pub arguments: Vec<ByteBuf>,
    /// The whole environment; `HOME` and `USER` are added from the guest's `/etc/passwd` where missing.
    pub environment: Vec<(ByteBuf, ByteBuf)>,
    /// Working directory, absolute.
    pub directory: ByteBuf,
    /// `NAME|UID[:NAME|GID]` as in a Dockerfile's `USER`, resolved in the guest; empty for root.
    pub user: String,
    /// A terminal of this size instead of three pipes.
    pub terminal: Option<WindowSize>,
    /// Kill the whole process tree after this time, milliseconds.
    pub timeout_ms: Option<u64>,
    /// What asks it to end when the machine ends, it alone; without one, all that it started are sent SIGTERM with it.
    pub stop_signal: Option<u8>,
    /// A root of its own instead of the machine's: a build's step.
    pub root: Option<LayeredRoot>,
}

/// A root made of layers over the machine's image. Everything the program started has ended, and the root is taken apart,
/// before [`ExecOutput::Exited`] comes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayeredRoot {
    /// Numbers of the layers over the image, the lowest first.
    pub lower: Vec<u32>,
    /// Number of the layer that takes what is written; made if there is none.
    pub upper: u32,
    /// The machine's network; without it there is loopback alone, which no other program shares.
    pub network: bool,
    /// What is mounted besides `/proc`, `/sys` and `/dev`, in this order. Mount points that have to be made are gone
    /// afterwards.
    pub mounts: Vec<RootMount>,
}

/// Something mounted in a [`LayeredRoot`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootMount {
    /// Absolute path, looked up in that root.
    pub target: ByteBuf,
    /// What is there.
    pub source: RootSource,
    /// Writes are refused.
    pub read_only: bool,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RootSource {
    /// An empty file system in memory.
    Memory {
        /// Its size, bytes; half of the memory if it is not given.
        size: Option<u64>,
    },
    /// A directory or file of a layer.
    Layer {
        /// The layer's number; made if there is none.
        layer: u32,
        /// Relative to the layer; empty for all of it.
        path: ByteBuf,
    },
    /// A file in memory.
    File {
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// The whole content.
        content: ByteBuf,
    },
}

/// Size of a terminal, characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// What the host sends to a running program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecInput {
    /// Bytes for standard input, within [`STDIN_WINDOW`].
    Stdin(ByteBuf),
    /// Standard input has ended.
    StdinEnd,
    /// The terminal has a new size.
    Resize(WindowSize),
    /// Send this signal to the program's process group.
    Signal(i32),
    /// Kill the whole process tree.
    Kill,
}

/// What a running program sends back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecOutput {
    /// It runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// Bytes of standard output, or of the terminal.
    Stdout(ByteBuf),
    /// Bytes of standard error.
    Stderr(ByteBuf),
    /// So many bytes of standard input more were taken, or will never be.
    StdinTaken(u32),
    /// It ended; the last message.
    Exited(Exit),
    /// It could not be started; the last message.
    Failed {
        /// Which kind.
        kind: ExecFailure,
        /// What failed and why, lower case, no final period.
        message: String,
    },
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Code or signal.
    pub status: ExitStatus,
    /// The deadline killed it.
    pub timed_out: bool,
    /// The guest's kernel killed processes for want of memory while it ran.
    pub out_of_memory: bool,
}

/// Code or signal of an ended program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited with this code.
    Code(u8),
    /// This signal killed it.
    Signal(u8),
}

/// Why a program could not be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecFailure {
    /// There is no such program.
    NotFound,
    /// It is there but cannot be executed.
    NotExecutable,
    /// The user or group does not exist in the guest.
    UnknownUser,
    /// The working directory cannot be entered.
    Directory,
    /// Anything else, such as no memory for another process.
    Other,
}

/// One entry of a tree: of a copy-on-write mount's upper layer, or of what is copied. Parents come before children.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// The path of the lower layer is gone; only in a layer.
    Removed {
        /// Relative to the tree.
        path: ByteBuf,
    },
    /// A directory exists here, new or changed.
    Directory {
        /// Relative to the tree.
        path: ByteBuf,
        /// Permission bits.
        mode: u32,
        /// Nothing of the lower layer shows through; only in a layer.
        opaque: bool,
    },
    /// A regular file; [`Entry::Data`] with `size` bytes in all follow.
    File {
        /// Relative to the tree.
        path: ByteBuf,
        /// Permission bits.
        mode: u32,
        /// Bytes that follow.
        size: u64,
        /// Last modification, nanoseconds since the epoch.
        modified_ns: i64,
    },
    /// The next bytes of the last file.
    Data(ByteBuf),
    /// A symbolic link.
    Symlink {
        /// Relative to the tree.
        path: ByteBuf,
        /// Where it points, as stored.
        target: ByteBuf,
    },
    /// A device node, FIFO or socket, which never leaves the guest.
    Special {
        /// Relative to the tree.
        path: ByteBuf,
    },
    /// That was all.
    End,
    /// The listing could not be completed.
    Failed {
        /// What failed and why, lower case, no final period.
        message: String,
    },
}

/// One entry of an image's layer, with all that a file system keeps of it. Parents come before children.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LayerEntry {
    /// A file, directory or other object.
    Node {
        /// Relative to the layer; empty for its root.
        path: ByteBuf,
        /// Owner, mode, time, extended attributes.
        attributes: Attributes,
        /// What it is.
        kind: NodeKind,
    },
    /// The next bytes of the last file.
    Data(ByteBuf),
    /// Another name of an earlier entry that is no directory.
    HardLink {
        /// Relative to the layer.
        path: ByteBuf,
        /// The earlier name.
        target: ByteBuf,
    },
    /// What layers below have at the path is gone.
    Removed {
        /// Relative to the layer.
        path: ByteBuf,
    },
    /// Nothing of the layers below shows through the directory, an earlier entry.
    Opaque {
        /// Relative to the layer.
        path: ByteBuf,
    },
    /// That was all.
    End,
    /// It could not be completed.
    Failed {
        /// What failed and why, lower case, no final period.
        message: String,
    },
}

/// What a file system keeps of an object besides its content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// The twelve permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification, nanoseconds since the epoch.
    pub modified_ns: i64,
    /// Extended attributes by full name.
    pub xattrs: Vec<(ByteBuf, ByteBuf)>,
}

/// What an object is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeKind {
    /// A directory.
    Directory,
    /// A regular file; [`LayerEntry::Data`] with `size` bytes in all follow.
    File {
        /// Bytes that follow.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points, as stored.
        target: ByteBuf,
    },
    /// A character device, other than 0/0.
    CharacterDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A FIFO.
    Fifo,
}
