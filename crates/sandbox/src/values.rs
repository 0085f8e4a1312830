//! Values as people write them, in flags and in the API's requests alike.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::problem::{Problem, plain};
use crate::spec::{HostMount, MountSource};

/// Reads a time such as `30`, `1.5s`, `200ms`, `5m`, `1h`.
///
/// # Errors
/// Says what is wrong with the text.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|character: char| character.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return Err("write a time such as 30, 90s, 5m or 1h".into()),
    };
    let number: f64 = number.parse().map_err(|_| "write a time such as 30, 90s, 5m or 1h".to_owned())?;
    match Duration::try_from_secs_f64(number * factor) {
        Ok(duration) if !duration.is_zero() && duration < Duration::from_secs(365 * 86400) => Ok(duration),
        _ => Err("a time is longer than nothing and shorter than a year".into()),
    }
}

/// Reads a label: `K=V`, or `K` for one without a value.
///
/// # Errors
/// Says what is wrong with the text.
pub fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    if key.is_empty() || key.len() > 128 || value.len() > 1024 || text.chars().any(char::is_control) {
        return Err(
            "write a label such as team=web, at most 128 characters before the = and 1024 after it".into()
        );
    }
    Ok((key.to_owned(), value.to_owned()))
}

/// A mount as people write it: `SOURCE:TARGET`, with `:ro` or `:rw` behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// A path, or the name of a volume.
    pub source: String,
    /// Absolute path in the guest.
    pub target: PathBuf,
    /// Writes are refused.
    pub read_only: bool,
}

impl FromStr for Mount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (rest, read_only) = match text.rsplit_once(':') {
            Some((rest, "ro")) => (rest, true),
            Some((rest, "rw")) => (rest, false),
            _ => (text, false),
        };
        match rest.rsplit_once(':') {
            Some((source, target)) if !source.is_empty() && target.starts_with('/') => {
                Ok(Self { source: source.to_owned(), target: target.into(), read_only })
            }
            _ => Err("write SOURCE:TARGET, such as ./data:/data:ro or cache:/var/cache".into()),
        }
    }
}

impl Mount {
    /// Whether the source is a path of the host: it has a slash or is `.`, `..` or `~`. Else it names a volume.
    pub fn is_path(&self) -> bool {
        self.source.contains('/') || matches!(self.source.as_str(), "." | ".." | "~")
    }

    /// The mount itself; `~` is `home`.
    ///
    /// # Errors
    /// Code `mount-source` if the path is not there.
    pub fn resolve(&self, home: &Path) -> Result<HostMount, Problem> {
        let source = if self.is_path() {
            let path = match self.source.strip_prefix('~') {
                Some(rest) => home.join(rest.trim_start_matches('/')),
                None => PathBuf::from(&self.source),
            };
            let missing =
                |error| plain("mount-source", format!("cannot mount {}: {error}", path.display()), None);
            MountSource::Host(path.canonicalize().map_err(missing)?)
        } else {
            MountSource::Volume(self.source.clone())
        };
        Ok(HostMount { source, target: self.target.clone(), read_only: self.read_only })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_and_labels() {
        let mounts = [
            ("./a:/b", Some(("./a", "/b", false))),
            ("/a:b:/c:ro", Some(("/a:b", "/c", true))),
            ("cache:/var:rw", Some(("cache", "/var", false))),
            ("/a", None),
            (":/b", None),
            ("/a:b", None),
            ("/a:ro", None),
        ];
        for (text, expected) in mounts {
            let expected = expected.map(|(source, target, read_only)| Mount {
                source: source.into(),
                target: target.into(),
                read_only,
            });
            assert_eq!(text.parse().ok(), expected, "{text}");
        }
        assert_eq!(label("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(label("=b").is_err());
    }

    #[test]
    fn times() {
        for (text, ms) in [("30", 30_000), ("1.5s", 1500), ("200ms", 200), ("5m", 300_000), ("1h", 3_600_000)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "0", "-1s", "5 m", "1y", "é", "inf", "1e30h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
