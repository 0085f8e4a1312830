//! Values as people write them.

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

/// Reads a profile's name.
///
/// # Errors
/// Says which there are.
pub(crate) fn profile(text: &str) -> Result<Profile, String> {
    text.parse().map_err(|error: agentkernel_sandbox::configuration::UnknownProfile| error.to_string())
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
    fn keys_and_signals() {
        assert_eq!(keys("ctrl-p,ctrl-q"), Ok(Keys(vec![16, 17])));
        assert_eq!(keys("ctrl-],x"), Ok(Keys(vec![29, b'x'])));
        for text in ["", "ctrl-", "ctrl-P", "ctrl-1", "ab", "a,,b", "é"] {
            assert!(keys(text).is_err(), "{text}");
        }
        assert_eq!((signal("SIGterm"), signal("9"), signal("usr1")), (Ok(15), Ok(9), Ok(10)));
        assert!(signal("0").is_err() && signal("NOPE").is_err());
    }
}
