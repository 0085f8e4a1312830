//! The JSON documents of an image, OCI and Docker v2: only the fields that matter here.
//!
//! Types of our own, because the specification's crate costs half a minute of compiling; unknown fields are ignored,
//! as the specification asks, and `null` stands for "absent", as Docker writes it.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::digest::Digest;

/// What an image says about the process to run, as in its configuration's `config` object.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct ImageConfig {
    /// The program that arguments are given to; empty if none is set.
    #[serde(deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    /// The default arguments, replaced by those of the user.
    #[serde(deserialize_with = "or_default")]
    pub cmd: Vec<String>,
    /// The environment, each `NAME=value`.
    #[serde(deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// Where the process starts; `None` means `/`.
    #[serde(deserialize_with = "non_empty")]
    pub working_dir: Option<String>,
    /// `user`, `uid`, `user:group` or any mixture with ids; `None` means root.
    #[serde(deserialize_with = "non_empty")]
    pub user: Option<String>,
    /// The signal that asks the process to end, by name or number; `None` means `SIGTERM`.
    #[serde(deserialize_with = "non_empty")]
    pub stop_signal: Option<String>,
    /// Free text by name.
    #[serde(deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
    /// Ports the image listens on, each `80/tcp`.
    #[serde(deserialize_with = "keys")]
    pub exposed_ports: Vec<String>,
    /// Paths the image declares as volumes.
    #[serde(deserialize_with = "keys")]
    pub volumes: Vec<String>,
}

/// A pointer to a blob: OCI image specification, `descriptor.md`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the blob is.
    #[serde(default)]
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its size, bytes.
    pub size: u64,
    /// Free text by name.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// The system it is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

/// The system a manifest is for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Platform {
    /// As Go calls it: `amd64`.
    pub architecture: String,
    /// As Go calls it: `linux`.
    pub os: String,
    /// Of the architecture, such as `v8`; usually empty.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

/// An image index or a Docker manifest list.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Index {
    pub(crate) schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) media_type: Option<String>,
    pub(crate) manifests: Vec<Descriptor>,
    /// Present only in a document that tries to be two things at once.
    #[serde(default, skip_serializing)]
    pub(crate) layers: Option<serde::de::IgnoredAny>,
}

/// An image manifest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    pub(crate) schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) media_type: Option<String>,
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
    /// Present only in a document that tries to be two things at once.
    #[serde(default, skip_serializing)]
    pub(crate) manifests: Option<serde::de::IgnoredAny>,
}

/// An image configuration.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ConfigFile {
    pub(crate) architecture: String,
    pub(crate) os: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) created: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) config: ImageConfig,
    pub(crate) rootfs: RootFs,
}

/// The layers' digests once uncompressed, lowest first.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct RootFs {
    #[serde(deserialize_with = "or_default")]
    pub(crate) diff_ids: Vec<Digest>,
}

/// One image of a `docker save` archive.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct DockerImage {
    pub(crate) config: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) repo_tags: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) layers: Vec<String>,
}

fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

fn non_empty<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(from)?.filter(|text| !text.is_empty()))
}

fn keys<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let map: Option<BTreeMap<String, serde::de::IgnoredAny>> = Option::deserialize(from)?;
    Ok(map.unwrap_or_default().into_keys().collect())
}

/// The number of the signal that `text` means: a name, with or without `SIG`, in any case, or a number. `None` if there is
/// no such signal.
pub fn signal_number(text: &str) -> Option<u8> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
        "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
        "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    // The first two real-time signals are the C library's own.
    const FIRST: u8 = 34;
    const LAST: u8 = 64;
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |rest: &str, sign: char| match rest {
        "" => Some(0),
        rest => rest.strip_prefix(sign)?.parse::<u8>().ok().filter(|offset| *offset <= LAST - FIRST),
    };
    if let Ok(number) = text.parse::<u8>() {
        return Some(number).filter(|number| (1..=LAST).contains(number));
    }
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return offset(rest, '+').map(|offset| FIRST + offset);
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return offset(rest, '-').map(|offset| LAST - offset);
    }
    NAMES.iter().zip(1..).find(|(known, _)| **known == name).map(|(_, number)| number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_and_absent_fields_mean_the_same() {
        let text = r#"{"architecture":"amd64","os":"linux","config":{"Env":null,"Cmd":["sh"],"Entrypoint":null,
            "User":"","WorkingDir":"/w","ExposedPorts":{"80/tcp":{}},"Labels":null,"OnBuild":null,"Unknown":3},
            "rootfs":{"type":"layers","diff_ids":null}}"#;
        let file: ConfigFile = serde_json::from_str(text).unwrap();
        let expected = ImageConfig {
            cmd: vec!["sh".into()],
            working_dir: Some("/w".into()),
            exposed_ports: vec!["80/tcp".into()],
            ..ImageConfig::default()
        };
        assert_eq!(file.config, expected);
        let bare: ConfigFile = serde_json::from_str(r#"{"config":null}"#).unwrap();
        assert_eq!(bare.config, ImageConfig::default());
    }

    #[test]
    fn signals() {
        for (text, number) in [
            ("SIGTERM", Some(15)),
            ("quit", Some(3)),
            ("SIGWINCH", Some(28)),
            ("SYS", Some(31)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-1", Some(63)),
            ("RTMAX", Some(64)),
            ("RTMIN-1", None),
            ("RTMIN+31", None),
            ("0", None),
            ("65", None),
            ("SIGFOO", None),
            ("", None),
        ] {
            assert_eq!(signal_number(text), number, "{text}");
        }
    }
}
