//! Values as people write them.

use std::path::PathBuf;
use std::time::Duration;

use agentkernel_sandbox::configuration::Profile;

/// Reads a size such as `512M`, `4G`, `1.5G` or `2048` (MiB) as MiB.
///
/// # Errors
/// Says what is wrong with the text.
pub(crate) fn size_mib(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let lower = lower.trim_end_matches("ib").trim_end_matches('b');
    let (number, factor) = match lower.chars().last() {
        Some('k') => (&lower[..lower.len() - 1], 1.0 / 1024.0),
        Some('m') => (&lower[..lower.len() - 1], 1.0),
        Some('g') => (&lower[..lower.len() - 1], 1024.0),
        Some('t') => (&lower[..lower.len() - 1], 1024.0 * 1024.0),
        _ => (lower, 1.0),
    };
    let number: f64 = number.parse().map_err(|_| "write a size such as 512M or 4G".to_owned())?;
    let mib = number * factor;
    if mib.is_finite() && (1.0..=(1u64 << 30) as f64).contains(&mib) {
        Ok(mib as u64)
    } else {
        Err("a size is between 1M and 1024T".into())
    }
}

/// Reads a time such as `30`, `1.5s`, `200ms`, `5m`, `1h`.
///
/// # Errors
/// Says what is wrong with the text.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
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

/// Reads a profile's name.
///
/// # Errors
/// Says which there are.
pub(crate) fn profile(text: &str) -> Result<Profile, String> {
    text.parse().map_err(|error: agentkernel_sandbox::configuration::UnknownProfile| error.to_string())
}

/// Reads a label: `K=V`, or `K` for one without a value.
///
/// # Errors
/// Says what is wrong with the text.
pub(crate) fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    if key.is_empty() || key.len() > 128 || value.len() > 1024 || text.chars().any(char::is_control) {
        return Err(
            "write a label such as team=web, at most 128 characters before the = and 1024 after it".into()
        );
    }
    Ok((key.to_owned(), value.to_owned()))
}

/// A mount as people write it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// A path, or the name of a volume.
    pub source: String,
    /// Absolute path in the guest.
    pub target: PathBuf,
    /// Writes are refused.
    pub read_only: bool,
}

/// Reads a mount: `SOURCE:TARGET`, with `:ro` or `:rw` behind it.
///
/// # Errors
/// Says what is wrong with the text.
pub(crate) fn mount(text: &str) -> Result<Mount, String> {
    let (rest, read_only) = match text.rsplit_once(':') {
        Some((rest, "ro")) => (rest, true),
        Some((rest, "rw")) => (rest, false),
        _ => (text, false),
    };
    match rest.rsplit_once(':') {
        Some((source, target)) if !source.is_empty() && target.starts_with('/') => {
            Ok(Mount { source: source.to_owned(), target: target.into(), read_only })
        }
        _ => Err("write SOURCE:TARGET, such as ./data:/data:ro or cache:/var/cache".into()),
    }
}

/// Bytes that a sequence of keys sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Keys(pub Vec<u8>);

/// Reads a sequence of keys: letters, or `ctrl-` and a letter or one of `@[\\]^_`, separated by commas.
///
/// # Errors
/// Says what is wrong with the text.
pub(crate) fn keys(text: &str) -> Result<Keys, String> {
    let wrong = || "write keys such as ctrl-p,ctrl-q or ctrl-]".to_owned();
    let key = |word: &str| match (word.strip_prefix("ctrl-"), word.as_bytes()) {
        (Some(letter), _) => match letter.as_bytes() {
            [byte @ (b'a'..=b'z' | b'@' | b'['..=b'_')] => Ok(byte.to_ascii_uppercase() - b'@'),
            _ => Err(wrong()),
        },
        (None, [byte @ b'!'..=b'~']) => Ok(*byte),
        _ => Err(wrong()),
    };
    let keys: Vec<u8> = text.split(',').map(key).collect::<Result<_, _>>()?;
    if keys.len() <= 8 { Ok(Keys(keys)) } else { Err(wrong()) }
}

/// Reads a signal's name, with or without SIG, or its number.
///
/// # Errors
/// Says what is wrong with the text.
pub(crate) fn signal(text: &str) -> Result<i32, String> {
    const NAMES: [(&str, i32); 14] = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ABRT", 6),
        ("KILL", 9),
        ("USR1", 10),
        ("SEGV", 11),
        ("USR2", 12),
        ("PIPE", 13),
        ("ALRM", 14),
        ("TERM", 15),
        ("CONT", 18),
        ("STOP", 19),
        ("TSTP", 20),
    ];
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let by_name = NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    let by_number = text.parse().ok().filter(|number| (1..=64).contains(number));
    by_name.or(by_number).ok_or_else(|| "write a signal such as TERM, INT or 9".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, mib) in
            [("512", 512), ("512M", 512), ("2g", 2048), ("1.5GiB", 1536), ("2048k", 2), ("64MB", 64)]
        {
            assert_eq!(size_mib(text), Ok(mib), "{text}");
        }
        for text in ["", "0", "-1", "4X", "é", "nan", "inf", "1e400", "1k", "M"] {
            assert!(size_mib(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations() {
        for (text, ms) in [("30", 30_000), ("1.5s", 1500), ("200ms", 200), ("5m", 300_000), ("1h", 3_600_000)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "0", "-1s", "5 m", "1y", "é", "inf", "1e30h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn mounts_keys_labels_and_signals() {
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
            assert_eq!(mount(text).ok(), expected, "{text}");
        }
        assert_eq!(keys("ctrl-p,ctrl-q"), Ok(Keys(vec![16, 17])));
        assert_eq!(keys("ctrl-],x"), Ok(Keys(vec![29, b'x'])));
        for text in ["", "ctrl-", "ctrl-P", "ctrl-1", "ab", "a,,b", "é"] {
            assert!(keys(text).is_err(), "{text}");
        }
        assert_eq!(label("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(label("=b").is_err());
        assert_eq!((signal("SIGterm"), signal("9"), signal("usr1")), (Ok(15), Ok(9), Ok(10)));
        assert!(signal("0").is_err() && signal("NOPE").is_err());
    }
}
