//! Names in a tar, made into components of the tree.
//!
//! INVARIANT: no component is empty, `.`, `..`, holds a `/` or NUL, or is longer than [`NAME_BYTES`].

use super::LayerError;
use super::error::printable;
use crate::limits::{NAME_BYTES, PATH_BYTES};

/// Splits a name: a leading `/` and `.` are dropped, `..` takes back one component and may not leave the root. The
/// root itself has no component.
pub(crate) fn components(name: &[u8]) -> Result<Vec<&[u8]>, LayerError> {
    if name.len() > PATH_BYTES {
        return Err(LayerError::invalid(name, "the name is longer than 4095 bytes"));
    }
    if name.is_empty() {
        return Err(LayerError::invalid(name, "the name is empty"));
    }
    if name.contains(&0) {
        return Err(LayerError::invalid(name, "the name contains a zero byte"));
    }
    let mut parts = Vec::new();
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop().ok_or_else(|| LayerError::Escapes { entry: printable(name) })?;
            }
            part if part.len() > NAME_BYTES => {
                return Err(LayerError::invalid(name, "a component is longer than 255 bytes"));
            }
            part => parts.push(part),
        }
    }
    Ok(parts)
}

/// What a layer entry's last component asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Marker<'a> {
    /// An ordinary entry.
    None,
    /// `.wh.NAME`: the lower layers' NAME is gone.
    Whiteout(&'a [u8]),
    /// `.wh..wh..opq`: all that lower layers hold in this directory is gone.
    Opaque,
    /// Other `.wh..wh.` names are an old storage driver's own notes.
    Ignored,
}

/// Reads the marker in a last component.
pub(crate) fn marker(name: &[u8]) -> Option<Marker<'_>> {
    let Some(rest) = name.strip_prefix(b".wh.") else { return Some(Marker::None) };
    match rest {
        b".wh..opq" => Some(Marker::Opaque),
        _ if rest.starts_with(b".wh.") => Some(Marker::Ignored),
        b"" | b"." | b".." => None,
        _ => Some(Marker::Whiteout(rest)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_normalised_or_refused() {
        let good: &[(&[u8], &[&[u8]])] = &[
            (b"./", &[]),
            (b"/", &[]),
            (b"a/b", &[b"a", b"b"]),
            (b"./a//b/", &[b"a", b"b"]),
            (b"/etc/passwd", &[b"etc", b"passwd"]),
            (b"a/../b", &[b"b"]),
            (b"a/b/../../c/.", &[b"c"]),
            (b"..a/...", &[b"..a", b"..."]),
        ];
        for (name, expected) in good {
            assert_eq!(components(name).unwrap(), *expected, "{}", name.escape_ascii());
        }
        for name in [&b".."[..], b"../x", b"/../x", b"a/../../x", b"./.."] {
            assert!(matches!(components(name), Err(LayerError::Escapes { .. })), "{}", name.escape_ascii());
        }
        let long = [b'x'; 256];
        let deep = b"a/".repeat(2100);
        for name in [&b""[..], b"a\0b", &long, &deep] {
            assert!(matches!(components(name), Err(LayerError::InvalidEntry { .. })));
        }
    }

    #[test]
    fn markers() {
        assert_eq!(marker(b"x.wh."), Some(Marker::None));
        assert_eq!(marker(b".wh.x"), Some(Marker::Whiteout(b"x")));
        assert_eq!(marker(b".wh..wh..opq"), Some(Marker::Opaque));
        assert_eq!(marker(b".wh..wh.plnk"), Some(Marker::Ignored));
        for bad in [&b".wh."[..], b".wh..", b".wh..."] {
            assert_eq!(marker(bad), None);
        }
    }
}
