//! Values as people write them.

use std::time::Duration;

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
}
