//! What a sandbox was asked to be: plain data, kept in its directory, read by its supervisor.

use std::path::{Path, PathBuf};

use agentkernel_protocol::message::{Directory, File};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::problem::{Problem, io, plain};
use crate::project::Workspace;
use crate::state::{SandboxDirectory, fill_random, random_word, write_atomically};

/// Everything a supervisor needs to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Name, also the host name in the guest.
    pub name: String,
    /// UUID version 7, which tells the time of creation.
    pub uuid: String,
    /// Where the root file system comes from.
    pub image: Image,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory, MiB; backed by the host only as it is used.
    pub memory_mib: u64,
    /// Size of the writable layer, MiB; sparse.
    pub disk_mib: u64,
    /// The shared project.
    pub workspace: Option<Workspace>,
    /// Path of the program whose hidden verbs start supervisors and jails.
    pub program: PathBuf,
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

impl Spec {
    /// Writes the spec into its sandbox's directory.
    ///
    /// # Errors
    /// If the disk is full or read-only.
    pub fn save(&self, directory: &SandboxDirectory) -> Result<(), Problem> {
        let path = directory.path().join("spec.json");
        let text = serde_json::to_vec_pretty(self).map_err(|error| plain("spec", error.to_string(), None))?;
        write_atomically(&path, &text).map_err(io(format!("write {}", path.display())))
    }

    /// Reads the spec of a sandbox.
    ///
    /// # Errors
    /// If it is missing or no spec.
    pub fn load(directory: &Path) -> Result<Self, Problem> {
        let path = directory.join("spec.json");
        let text = std::fs::read(&path).map_err(io(format!("read {}", path.display())))?;
        serde_json::from_slice(&text)
            .map_err(|error| plain("spec", format!("{} is damaged: {error}", path.display()), None))
    }

    /// Directories the guest must have besides what its image and mounts bring.
    pub fn directories(&self) -> Vec<Directory> {
        match &self.image {
            Image::Host { user, .. } => {
                let path = ByteBuf::from(user.home.as_os_str().as_encoded_bytes());
                vec![Directory { path, mode: 0o700, uid: user.uid, gid: user.gid }]
            }
            Image::Disk { .. } => Vec::new(),
        }
    }

    /// Files of `/etc` that are ours whatever the image holds.
    pub fn files(&self) -> Vec<File> {
        let file = |path: &str, content: String| File {
            path: ByteBuf::from(path),
            mode: 0o644,
            content: ByteBuf::from(content),
        };
        vec![
            file(
                "/etc/hosts",
                format!(
                    "127.0.0.1\tlocalhost\n127.0.1.1\t{}\n::1\tlocalhost ip6-localhost ip6-loopback\n",
                    self.name
                ),
            ),
            file("/etc/resolv.conf", "# this sandbox has no network\n".into()),
        ]
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
