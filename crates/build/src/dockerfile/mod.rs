//! Dockerfiles, parsed: every instruction with its words as they were written, each word with its place.
//!
//! Flow: `lines` joins continued lines, drops comments, takes heredocs along and remembers where everything stood;
//! `parse` makes instructions of them; [`expand`] replaces variables, which happens only when an instruction is carried
//! out. The language is that of the Dockerfile reference (`docker/dockerfile` 1.x); what this product does not do is
//! parsed all the same, and refused by whoever carries it out.

mod error;
pub mod expand;
mod lines;
mod parse;

pub use error::DockerfileError;

/// Largest Dockerfile, bytes.
pub const BYTES_LIMIT: usize = 1 << 20;
/// Most instructions in one.
pub const INSTRUCTIONS_LIMIT: usize = 10_000;

/// Where something stands, counted from 1; columns are characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// The line.
    pub line: u32,
    /// The character in it.
    pub column: u32,
}

/// Some text and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    /// As written.
    pub text: String,
    /// Where.
    pub place: Place,
}

/// A whole Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dockerfile {
    /// What continues a line and takes a character's meaning away: a backslash or a backquote.
    pub escape: char,
    /// Arguments before the first stage: for `FROM` only.
    pub arguments: Vec<Instruction>,
    /// The stages, at least one.
    pub stages: Vec<Stage>,
    source: String,
}

impl Dockerfile {
    /// Parses `source`.
    ///
    /// # Errors
    /// The first thing that is wrong, and where.
    pub fn parse(source: &[u8]) -> Result<Self, DockerfileError> {
        parse::parse(source)
    }

    /// An error at a place of this file.
    pub fn error(&self, place: Place, message: impl Into<String>, hint: Option<String>) -> DockerfileError {
        DockerfileError::new(&self.source, place, message.into(), hint)
    }
}

/// A `FROM` and what follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// The image or earlier stage it begins with, unexpanded.
    pub image: Word,
    /// `--platform`, unexpanded.
    pub platform: Option<Word>,
    /// Its own name, lower case.
    pub name: Option<String>,
    /// Where the `FROM` stands.
    pub place: Place,
    /// The `FROM` on one line.
    pub text: String,
    /// What follows.
    pub instructions: Vec<Instruction>,
}

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instruction {
    /// What it asks for.
    pub kind: Kind,
    /// Where it begins.
    pub place: Place,
    /// All of it on one line, as a history shows it.
    pub text: String,
}

/// What instructions ask for. Words are unexpanded; those of `RUN`, `CMD`, `ENTRYPOINT`, `SHELL` and `HEALTHCHECK` are never
/// expanded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// `ADD`.
    Add(Transfer),
    /// `ARG`: names and defaults.
    Arg(Vec<(Word, Option<Word>)>),
    /// `CMD`.
    Cmd(Command),
    /// `COPY`.
    Copy(Transfer),
    /// `ENTRYPOINT`.
    Entrypoint(Command),
    /// `ENV`: names and values.
    Env(Vec<(Word, Word)>),
    /// `EXPOSE`: ports.
    Expose(Vec<Word>),
    /// `HEALTHCHECK`.
    Healthcheck(Healthcheck),
    /// `LABEL`: names and values.
    Label(Vec<(Word, Word)>),
    /// `MAINTAINER`.
    Maintainer(Word),
    /// `ONBUILD`: the instruction for those who build on this image, as written.
    Onbuild(Word),
    /// `RUN`.
    Run(Run),
    /// `SHELL`.
    Shell(Vec<String>),
    /// `STOPSIGNAL`.
    StopSignal(Word),
    /// `USER`.
    User(Word),
    /// `VOLUME`: paths.
    Volume(Vec<Word>),
    /// `WORKDIR`.
    Workdir(Word),
}

/// A command in one of its two forms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Given to a shell.
    Shell(String),
    /// Run as it is.
    Exec(Vec<String>),
}

/// `RUN`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The command; of a shell form with heredocs, the line alone.
    pub command: Command,
    /// Documents that follow the line.
    pub heredocs: Vec<Heredoc>,
    /// `--mount`, each with its place.
    pub mounts: Vec<Mount>,
    /// `--network`.
    pub network: Option<Word>,
    /// `--security`.
    pub security: Option<Word>,
}

/// A document within the Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heredoc {
    /// Its delimiter.
    pub name: String,
    /// How the line refers to it: `<<-"EOF"`.
    pub opening: String,
    /// Variables in it are replaced: the delimiter was not quoted.
    pub expand: bool,
    /// Leading tabs are taken away: `<<-`.
    pub strip: bool,
    /// Its lines as written.
    pub content: String,
    /// Where its reference stands.
    pub place: Place,
}

impl Heredoc {
    /// The content as it is meant: without leading tabs if they do not count.
    pub fn text(&self) -> String {
        if !self.strip {
            return self.content.clone();
        }
        self.content.split_inclusive('\n').map(|line| line.trim_start_matches('\t')).collect()
    }
}

/// `--mount` of `RUN`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Which kind.
    pub kind: MountKind,
    /// Where, unexpanded; a secret may have none.
    pub target: Option<Word>,
    /// Where the flag stands.
    pub place: Place,
}

/// Kinds of `--mount`. Texts are unexpanded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountKind {
    /// Files of the context, a stage or an image.
    Bind {
        /// The stage or image; the context if there is none.
        from: Option<Word>,
        /// What of it; all if there is none.
        source: Option<Word>,
        /// The step may write; nothing of it is kept.
        writable: bool,
    },
    /// A directory that later builds find again.
    Cache {
        /// Its name; the target if there is none.
        id: Option<Word>,
        /// Where its first content comes from.
        from: Option<Word>,
        /// What of that.
        source: Option<Word>,
        /// `shared`, `private` or `locked`.
        sharing: Sharing,
        /// Permission bits.
        mode: Option<u32>,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// The step may not write.
        read_only: bool,
    },
    /// Memory.
    Temporary {
        /// Bytes.
        size: Option<u64>,
    },
    /// Something that no layer may hold.
    Secret {
        /// Its name; the target's last component if there is none.
        id: Option<Word>,
        /// The variable that holds it, besides or instead of a file.
        variable: Option<String>,
        /// The build fails if it is not given.
        required: bool,
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// The agent's socket.
    Ssh,
}

/// Who may use a cache at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sharing {
    /// Several steps.
    Shared,
    /// One; another gets one of its own.
    Private,
    /// One; another waits.
    Locked,
}

/// `COPY` and `ADD`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// What, unexpanded.
    pub sources: Vec<TransferSource>,
    /// Where to, unexpanded.
    pub destination: Word,
    /// `--from`, unexpanded.
    pub from: Option<Word>,
    /// `--chown`, unexpanded.
    pub owner: Option<Word>,
    /// `--chmod`, unexpanded.
    pub mode: Option<Word>,
    /// `--link`.
    pub link: bool,
    /// `--parents`.
    pub parents: Option<Word>,
    /// `--exclude`, unexpanded.
    pub exclude: Vec<Word>,
    /// `--checksum`.
    pub checksum: Option<Word>,
    /// `--keep-git-dir`.
    pub keep_git_directory: Option<Word>,
    /// `--unpack`.
    pub unpack: Option<Word>,
}

/// One source of [`Transfer`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TransferSource {
    /// A path, pattern or address.
    Path(Word),
    /// A document, which becomes a file called as its delimiter.
    Document(Heredoc),
}

/// `HEALTHCHECK`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Healthcheck {
    /// The command; none takes away what the base image has.
    pub command: Option<Command>,
    /// Nanoseconds between two runs.
    pub interval: u64,
    /// Nanoseconds a run may take.
    pub timeout: u64,
    /// Nanoseconds after the start in which failures do not count.
    pub start_period: u64,
    /// Nanoseconds between two runs then.
    pub start_interval: u64,
    /// Failures in a row that count.
    pub retries: u32,
}
