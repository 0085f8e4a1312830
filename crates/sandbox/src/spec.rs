//! What a sandbox was asked to be: plain data, kept in its directory, read by its supervisor at every start.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::path::{Path, PathBuf};

use agentkernel_network::{HOST, HOST_NAME};
use agentkernel_protocol::message::{Directory, Exec};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::configuration::{CommandPolicy, Profile};
use crate::network::NetworkSpec;
use crate::problem::{Problem, io, os, plain};
use crate::project::Workspace;
use crate::state::{fill_random, random_word, write_atomically};
use crate::text::Text;

const FILE_NAME: &str = "spec.json";

/// Everything a supervisor needs to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Name, also the host name in the guest.
    pub name: String,
    /// UUID version 7.
    pub uuid: String,
    /// When it was created, milliseconds since the epoch.
    pub created_unix_ms: u64,
    /// Where the root file system comes from.
    pub image: Image,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory, MiB; backed by the host only as it is used.
    pub memory_mib: u64,
    /// Size of the writable layer, MiB; sparse.
    pub disk_mib: u64,
    /// Nothing of the root file system can be changed.
    pub read_only_root: bool,
    /// Refuse to run without hardware virtualisation.
    pub require_hardware: bool,
    /// The profile whose settings hold where nothing else was said.
    pub profile: Profile,
    /// The shared project.
    pub workspace: Option<Workspace>,
    /// Other shared directories.
    pub mounts: Vec<HostMount>,
    /// How programs run unless they are told otherwise.
    pub defaults: Defaults,
    /// Which programs may be run.
    pub commands: CommandPolicy,
    /// Files of the configuration, written before the first program runs.
    pub files: Vec<SpecFile>,
    /// A shell script run once, when the sandbox is created.
    pub init_script: Option<String>,
    /// Words of the user's own.
    pub labels: BTreeMap<String, String>,
    /// Content of `/etc/machine-id`.
    pub machine_id: String,
    /// A PEM bundle of authorities that the user trusts besides the host's own; read at each start.
    #[serde(default)]
    pub certificates: Option<PathBuf>,
    /// What it may reach, and the ports that lead into it.
    #[serde(default)]
    pub network: NetworkSpec,
}

/// How programs run unless they are told otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defaults {
    /// Words before those of `run`'s own: the image's ENTRYPOINT.
    pub entrypoint: Vec<Text>,
    /// What follows those if `run` has none of its own: the image's CMD.
    #[serde(default)]
    pub arguments: Vec<Text>,
    /// Environment.
    pub environment: Vec<(Text, Text)>,
    /// Working directory.
    pub directory: PathBuf,
    /// User, as in a Dockerfile's `USER`.
    pub user: String,
    /// What asks `run`'s own program to end: the image's STOPSIGNAL.
    #[serde(default)]
    pub stop_signal: Option<u8>,
}

impl Defaults {
    /// A program as the guest is told to run it; `environment` is added to the defaults'.
    pub fn exec(&self, arguments: &[OsString], environment: &[(OsString, OsString)]) -> Exec {
        let mut variables = self.environment.clone();
        for (name, value) in environment {
            set(&mut variables, name, value);
        }
        Exec {
            arguments: arguments.iter().map(|word| Text::from(word).bytes()).collect(),
            environment: variables.iter().map(|(name, value)| (name.bytes(), value.bytes())).collect(),
            directory: Text::from(&self.directory).bytes(),
            user: self.user.clone(),
            terminal: None,
            timeout_ms: None,
            stop_signal: None,
            root: None,
        }
    }
}

/// Sets a variable, in place of a former value.
pub(crate) fn set(environment: &mut Vec<(Text, Text)>, name: &OsStr, value: &OsStr) {
    environment.retain(|(existing, _)| existing.0 != name);
    environment.push((Text::from(name), Text::from(value)));
}

/// A directory of the host, or a volume, in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMount {
    /// What is mounted.
    pub source: MountSource,
    /// Where, absolute.
    pub target: PathBuf,
    /// Writes are refused.
    pub read_only: bool,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountSource {
    /// A directory the user named.
    Host(PathBuf),
    /// A named volume.
    Volume(String),
    /// The user's home directory, without what looks like a credential.
    Home(PathBuf),
}

/// A file for the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecFile {
    /// Absolute path in the guest.
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
    /// The whole content.
    pub content: ByteBuf,
}

/// Where the root file system comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Image {
    /// The host's own toolchain, read-only.
    Host {
        /// Who runs programs there.
        user: HostUser,
        /// Directories under the home directory that `PATH` names.
        toolchains: Vec<PathBuf>,
    },
    /// A read-only EROFS image.
    Disk {
        /// The file, in the cache.
        path: PathBuf,
        /// What it was made of, for people.
        name: String,
    },
}

/// The host's user, as the `host` image shows them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostUser {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Home directory, absolute.
    pub home: PathBuf,
}

/// Largest file that is put into a guest by its configuration, bytes: it is kept in the spec.
const FILE_LIMIT: u64 = 1 << 20;

impl SpecFile {
    /// Reads `source` from beneath `directory` for the guest's `path`. The project is a stranger's: nothing outside of it
    /// is read, whatever its symbolic links say.
    ///
    /// # Errors
    /// If it is no regular file of at most 1 MiB beneath the directory.
    pub fn read(directory: &Path, source: &Path, path: &Path, mode: u32) -> Result<Self, Problem> {
        let what = || format!("read {}", directory.join(source).display());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let root =
            rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(os(what()))?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let file = openat2(&root, source, flags, Mode::empty(), resolve).map_err(os(what()))?;
        let file = std::fs::File::from(file);
        let metadata = file.metadata().map_err(io(what()))?;
        if !metadata.is_file() || metadata.len() > FILE_LIMIT {
            let message = format!("{} is no regular file of at most 1 MiB", directory.join(source).display());
            return Err(plain("files", message, Some("mount a directory with -v for more than that")));
        }
        let mut content = Vec::new();
        file.take(FILE_LIMIT).read_to_end(&mut content).map_err(io(what()))?;
        Ok(Self { path: path.to_owned(), mode, content: ByteBuf::from(content) })
    }
}

impl Spec {
    /// Writes the spec into its sandbox's directory.
    ///
    /// # Errors
    /// If the disk is full or read-only.
    pub fn save(&self, directory: &Path) -> Result<(), Problem> {
        let path = directory.join(FILE_NAME);
        let text = serde_json::to_vec_pretty(self).map_err(|error| plain("spec", error.to_string(), None))?;
        write_atomically(&path, &text).map_err(io(format!("write {}", path.display())))
    }

    /// Reads the spec of a sandbox.
    ///
    /// # Errors
    /// If it is missing or no spec; `not-found` if the directory is gone.
    pub fn load(directory: &Path) -> Result<Self, Problem> {
        let path = directory.join(FILE_NAME);
        let text = std::fs::read(&path).map_err(|error| {
            if error.kind() == std::io::ErrorKind::NotFound && !directory.exists() {
                let name = directory.file_name().unwrap_or_default().display();
                return plain("not-found", format!("{name} was just removed"), None);
            }
            io(format!("read {}", path.display()))(error)
        })?;
        serde_json::from_slice(&text)
            .map_err(|error| plain("spec", format!("{} is damaged: {error}", path.display()), None))
    }

    /// Directories the guest must have besides what its image and mounts bring.
    pub fn directories(&self) -> Vec<Directory> {
        match &self.image {
            // A home that is shared is there already, and is the host's.
            Image::Host { user, .. } if self.mounts.iter().any(|mount| mount.target == user.home) => {
                Vec::new()
            }
            Image::Host { user, .. } => {
                let path = ByteBuf::from(user.home.as_os_str().as_encoded_bytes());
                vec![Directory { path, mode: 0o700, uid: user.uid, gid: user.gid }]
            }
            Image::Disk { .. } => Vec::new(),
        }
    }

    /// Content of `/etc/hosts`.
    pub fn hosts(&self) -> String {
        let name = &self.name;
        format!(
            "127.0.0.1\tlocalhost\n127.0.1.1\t{name}\n::1\tlocalhost ip6-localhost ip6-loopback\n{HOST}\t{HOST_NAME}\n"
        )
    }

    /// Content of `/etc/resolv.conf`.
    pub fn resolver(&self) -> String {
        format!("nameserver {HOST}\n")
    }

    /// Most processes and threads of one program with all it starts: what the guest's memory can hold, about.
    pub fn process_limit(&self) -> u32 {
        u32::try_from(self.memory_mib.saturating_mul(2)).unwrap_or(u32::MAX).clamp(256, 32_000)
    }
}

/// A fresh `/etc/machine-id`: 32 hexadecimal digits.
pub fn fresh_machine_id() -> String {
    format!("{}{}", random_word(), random_word())
}

/// A fresh UUID version 7 (RFC 9562).
pub fn new_uuid(unix_ms: u64) -> String {
    let mut bytes = [0; 16];
    fill_random(&mut bytes);
    bytes[..6].copy_from_slice(&unix_ms.to_be_bytes()[2..]);
    bytes[6] = 0x70 | (bytes[6] & 0x0f);
    bytes[8] = 0x80 | (bytes[8] & 0x3f);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Checks a sandbox name: ASCII letters, digits, `-`, `_`; 1 to 63 of them; alphanumeric at both ends.
///
/// # Errors
/// Says which rule is broken.
pub fn check_name(name: &str) -> Result<(), Problem> {
    let bytes = name.as_bytes();
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let good = bytes.len() <= 63
        && ends(bytes.first())
        && ends(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    if good {
        return Ok(());
    }
    let hint = "use 1 to 63 ASCII letters, digits, - and _, with a letter or digit at both ends";
    Err(plain("name-invalid", format!("{name:?} is not a sandbox name"), Some(hint)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "A-1", "x_y", &"n".repeat(63)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "_", "a/b", "..", "a b", "é", "a\n", &"n".repeat(64)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn uuids_are_version_7_and_tell_the_time() {
        let uuid = new_uuid(0x0123_4567_89ab);
        assert!(uuid.starts_with("01234567-89ab-7"), "{uuid}");
        assert!(matches!(uuid.as_bytes()[19], b'8' | b'9' | b'a' | b'b'), "{uuid}");
        assert_ne!(new_uuid(0), new_uuid(0));
    }
}
