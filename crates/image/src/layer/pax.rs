//! PAX extended headers: records of `LENGTH KEY=VALUE\n`, where the value may hold any byte, newlines included.

use std::collections::BTreeMap;

use super::LayerError;
use crate::limits::{SPARSE_EXTENTS, XATTR_VALUE_BYTES, XATTRS_BYTES};

/// What a PAX header says about the entry after it.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link_path: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) user: Option<u64>,
    pub(super) group: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse: PaxSparse,
}

/// GNU's sparse files in PAX form, versions 0.0, 0.1 and 1.0.
#[derive(Debug, Default)]
pub(super) struct PaxSparse {
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    pub(super) major: Option<u64>,
    /// Offsets and lengths in turn, from versions 0.0 and 0.1.
    pub(super) numbers: Vec<u64>,
}

impl Pax {
    /// Reads one header's content.
    pub(super) fn parse(mut data: &[u8]) -> Result<Self, LayerError> {
        let mut pax = Self::default();
        while !data.is_empty() && data[0] != 0 {
            let (key, value, rest) = record(data).ok_or_else(|| invalid("malformed record"))?;
            pax.set(key, value)?;
            data = rest;
        }
        Ok(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), LayerError> {
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link_path = Some(value.to_vec()),
            b"size" => self.size = Some(number(value)?),
            b"uid" => self.user = Some(number(value)?),
            b"gid" => self.group = Some(number(value)?),
            b"mtime" => self.mtime = Some(time(value).ok_or_else(|| invalid("malformed time"))?),
            b"GNU.sparse.name" => self.sparse.name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.real_size = Some(number(value)?),
            b"GNU.sparse.major" => self.sparse.major = Some(number(value)?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.sparse_number(value)?,
            b"GNU.sparse.map" => {
                self.sparse.numbers.clear();
                for part in value.split(|byte| *byte == b',').filter(|part| !part.is_empty()) {
                    self.sparse_number(part)?;
                }
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattr(name, value)?;
                }
            }
        }
        Ok(())
    }

    fn sparse_number(&mut self, text: &[u8]) -> Result<(), LayerError> {
        if self.sparse.numbers.len() >= 2 * SPARSE_EXTENTS {
            return Err(invalid("too many extents of a sparse file"));
        }
        self.sparse.numbers.push(number(text)?);
        Ok(())
    }

    fn xattr(&mut self, name: &[u8], value: &[u8]) -> Result<(), LayerError> {
        if name.is_empty() || name.len() > 255 || name.contains(&0) {
            return Err(invalid("bad name of an extended attribute"));
        }
        if value.len() > XATTR_VALUE_BYTES {
            return Err(invalid("an extended attribute is larger than 65535 bytes"));
        }
        self.xattrs.insert(name.to_vec(), value.to_vec());
        let total: usize = self.xattrs.iter().map(|(name, value)| name.len() + value.len() + 8).sum();
        if self.xattrs.len() > 1024 || total > XATTRS_BYTES {
            return Err(invalid("too many extended attributes"));
        }
        Ok(())
    }
}

/// Splits off one record: key, value and what follows.
fn record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = data.iter().take(20).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&data[..space]).ok()?.parse().ok()?;
    let body = data.get(space + 1..length)?;
    let body = body.strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    Some((&body[..equals], &body[equals + 1..], &data[length..]))
}

pub(super) fn number(text: &[u8]) -> Result<u64, LayerError> {
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| invalid("a field is not a number"))
}

/// Seconds and nanoseconds, rounded down as the kernel has it, from `-1.5` or `1700000000.123456789`.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds));
    }
    Some((seconds, nanoseconds))
}

fn invalid(reason: &'static str) -> LayerError {
    LayerError::invalid(b"PAX header", reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_may_hold_newlines_and_zeros() {
        let pax = Pax::parse(b"33 SCHILY.xattr.user.k=a\nb\n9 c=d\n14 path=hello\n").unwrap();
        assert_eq!(pax.xattrs[&b"user.k"[..]], b"a\nb\n9 c=d");
        assert_eq!(pax.path.as_deref(), Some(&b"hello"[..]));
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            &b"x"[..],
            b"5 a=b",
            b"99999999999999999999 a=b\n",
            b"3 a=b\n",
            b"0 a=b\n",
            b"9 size=x\n\n",
            b"-6 a=b\n",
        ] {
            assert!(Pax::parse(bad).is_err(), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn times_round_down() {
        assert_eq!(time(b"12"), Some((12, 0)));
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"12.1234567891"), Some((12, 123_456_789)));
        assert_eq!(time(b"-1.5"), Some((-2, 500_000_000)));
        assert_eq!(time(b"-0.25"), Some((-1, 750_000_000)));
        assert_eq!(time(b"1.-5"), None);
        assert_eq!(time(b""), None);
    }
}
