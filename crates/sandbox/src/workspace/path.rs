//! Paths as a guest names them, made safe to use on the host.
//!
//! Every path of a change set passes [`RelativePath::parse`] once, at the border; everything behind it takes the
//! type instead of bytes and never checks again. The function is pure, so that it can be fuzzed by itself.

use std::borrow::Borrow;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest path in bytes, the kernel's `PATH_MAX`.
pub const PATH_BYTES_MAX: usize = 4096;
/// Longest name between two slashes in bytes, the kernel's `NAME_MAX`.
pub const NAME_BYTES_MAX: usize = 255;
/// Longest target of a symbolic link in bytes; the kernel keeps one byte for its terminator.
pub const TARGET_BYTES_MAX: usize = 4095;

/// A path below the workspace: at least one name, none of them `.` or `..`, no leading or doubled slash.
///
/// INVARIANT: ordering is by components, so everything below a directory follows it directly.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelativePath(PathBuf);

/// Why bytes are no path inside a workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// No bytes at all.
    #[error("path is empty")]
    Empty,
    /// It starts at the root of the file system.
    #[error("path is absolute")]
    Absolute,
    /// Longer than [`PATH_BYTES_MAX`].
    #[error("path has {length} bytes, at most {PATH_BYTES_MAX} are allowed")]
    TooLong {
        /// Bytes of the path.
        length: usize,
    },
    /// A zero byte ends a path for the kernel but not for us.
    #[error("path holds a zero byte")]
    ZeroByte,
    /// `//` or a slash at the end.
    #[error("path has an empty component")]
    EmptyComponent,
    /// `.` or `..`.
    #[error("path has a component that is a dot or two dots")]
    Dots,
    /// A name longer than [`NAME_BYTES_MAX`].
    #[error("path has a component of {length} bytes, at most {NAME_BYTES_MAX} are allowed")]
    NameTooLong {
        /// Bytes of the name.
        length: usize,
    },
}

impl RelativePath {
    /// Checks bytes that came from a guest.
    ///
    /// # Errors
    /// The first rule the bytes break.
    pub fn parse(bytes: &[u8]) -> Result<Self, PathError> {
        check(bytes)?;
        Ok(Self(PathBuf::from(OsStr::from_bytes(bytes))))
    }

    /// The path, relative to the workspace.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// The bytes as the guest sent them.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_os_str().as_bytes()
    }

    /// The last name.
    pub fn name(&self) -> &OsStr {
        // A checked path always ends in a name; the whole path stands in for the impossible.
        self.0.file_name().unwrap_or(self.0.as_os_str())
    }

    /// The directory it is in; `None` directly below the workspace.
    pub fn parent(&self) -> Option<&Path> {
        self.0.parent().filter(|parent| !parent.as_os_str().is_empty())
    }

    /// All directories above it, nearest first, without the workspace itself.
    pub fn ancestors(&self) -> impl Iterator<Item = &Path> {
        self.0.ancestors().skip(1).filter(|path| !path.as_os_str().is_empty())
    }

    /// The path of `name` in this directory.
    ///
    /// # Errors
    /// As [`RelativePath::parse`].
    pub fn join(&self, name: &OsStr) -> Result<Self, PathError> {
        let mut bytes = self.as_bytes().to_vec();
        bytes.push(b'/');
        bytes.extend_from_slice(name.as_bytes());
        Self::parse(&bytes)
    }
}

impl Borrow<Path> for RelativePath {
    fn borrow(&self) -> &Path {
        &self.0
    }
}

impl AsRef<Path> for RelativePath {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl TryFrom<&Path> for RelativePath {
    type Error = PathError;

    fn try_from(path: &Path) -> Result<Self, PathError> {
        Self::parse(path.as_os_str().as_bytes())
    }
}

fn check(bytes: &[u8]) -> Result<(), PathError> {
    match bytes {
        [] => return Err(PathError::Empty),
        [b'/', ..] => return Err(PathError::Absolute),
        _ if bytes.len() > PATH_BYTES_MAX => return Err(PathError::TooLong { length: bytes.len() }),
        _ if bytes.contains(&0) => return Err(PathError::ZeroByte),
        _ => {}
    }
    for component in bytes.split(|&byte| byte == b'/') {
        match component {
            [] => return Err(PathError::EmptyComponent),
            b"." | b".." => return Err(PathError::Dots),
            name if name.len() > NAME_BYTES_MAX => {
                return Err(PathError::NameTooLong { length: name.len() });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Bytes as JSON: text where they are UTF-8, else a list of numbers, so that every name survives a round trip.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Text<'a> {
    Utf8(std::borrow::Cow<'a, str>),
    Bytes(std::borrow::Cow<'a, [u8]>),
}

pub(super) mod os_text {
    //! `serde(with)` for operating-system strings, see [`Text`].
    use super::*;

    pub(in super::super) fn serialize<S: Serializer>(
        text: &impl AsRef<OsStr>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let bytes = text.as_ref().as_bytes();
        match std::str::from_utf8(bytes) {
            Ok(text) => Text::Utf8(text.into()).serialize(serializer),
            Err(_) => Text::Bytes(bytes.into()).serialize(serializer),
        }
    }

    pub(in super::super) fn deserialize<'de, T: From<OsString>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        let bytes = match Text::deserialize(deserializer)? {
            Text::Utf8(text) => text.into_owned().into_bytes(),
            Text::Bytes(bytes) => bytes.into_owned(),
        };
        Ok(T::from(OsString::from_vec(bytes)))
    }
}

impl Serialize for RelativePath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        os_text::serialize(&self.0.as_os_str(), serializer)
    }
}

impl<'de> Deserialize<'de> for RelativePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text: OsString = os_text::deserialize(deserializer)?;
        Self::parse(text.as_bytes()).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hostile_paths_are_refused() {
        let long_name = [b'n'; 256];
        let long_path = [b"ab/".as_slice(); 2000].concat();
        let table: [(&[u8], PathError); 11] = [
            (b"", PathError::Empty),
            (b"/etc/passwd", PathError::Absolute),
            (b"..", PathError::Dots),
            (b"../x", PathError::Dots),
            (b"a/../../x", PathError::Dots),
            (b"a/./b", PathError::Dots),
            (b"a//b", PathError::EmptyComponent),
            (b"a/", PathError::EmptyComponent),
            (b"a\0b", PathError::ZeroByte),
            (&long_name, PathError::NameTooLong { length: 256 }),
            (&long_path, PathError::TooLong { length: 6000 }),
        ];
        for (bytes, error) in table {
            assert_eq!(RelativePath::parse(bytes), Err(error));
        }
        for bytes in [b"a".as_slice(), b"...", b"a/..b/c.", b"new\nline", b"\xff\xfe/x", b"a\\b", b" "] {
            assert_eq!(RelativePath::parse(bytes).unwrap().as_bytes(), bytes);
        }
    }

    proptest! {
        #[test]
        fn a_parsed_path_stays_below_and_survives_json(bytes in prop::collection::vec(
            prop_oneof![Just(b'/'), Just(b'.'), any::<u8>()], 0..40)) {
            if let Ok(path) = RelativePath::parse(&bytes) {
                prop_assert!(path.as_path().components().all(|part| matches!(part, std::path::Component::Normal(_))));
                prop_assert_eq!(path.as_path().components().count(), bytes.split(|&byte| byte == b'/').count());
                let json = serde_json::to_string(&path).unwrap();
                prop_assert_eq!(serde_json::from_str::<RelativePath>(&json).unwrap(), path);
            }
        }
    }
}
