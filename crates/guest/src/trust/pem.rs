//! Bundles of certificates as text (RFC 7468).

use std::collections::BTreeSet;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";
/// First line of what is added to a bundle.
const OURS: &str = "# agentkernel: what follows are authorities that the host of this sandbox trusts";

/// The certificates of a bundle, DER. What is damaged is none of them.
pub(super) fn certificates(text: &[u8]) -> BTreeSet<Vec<u8>> {
    let mut all = BTreeSet::new();
    let mut block: Option<Vec<u8>> = None;
    for line in text.split(|byte| matches!(byte, b'\n' | b'\r')).map(<[u8]>::trim_ascii) {
        if line == BEGIN.as_bytes() {
            block = Some(Vec::new());
        } else if line == END.as_bytes() {
            all.extend(block.take().and_then(|encoded| STANDARD.decode(encoded).ok()));
        } else if let Some(block) = &mut block {
            block.extend(line);
        }
    }
    all
}

/// A certificate as text.
pub(super) fn block(der: &[u8]) -> String {
    let encoded = STANDARD.encode(der);
    let mut text = format!("{BEGIN}\n");
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text + END + "\n"
}

/// What is added to a bundle so that it has these as well; nothing for none.
pub(super) fn appendix(certificates: &[&[u8]]) -> Vec<u8> {
    if certificates.is_empty() {
        return Vec::new();
    }
    let blocks: String = certificates.iter().map(|der| block(der)).collect();
    // It begins with a newline, for the last line of the bundle may not be ended.
    format!("\n{OURS}\n{blocks}").into_bytes()
}

/// A bundle without what was added to it; `None` if it is not there.
pub(super) fn without(text: &[u8], appendix: &[u8]) -> Option<Vec<u8>> {
    let at = text.windows(appendix.len().max(1)).position(|window| window == appendix)?;
    let (before, after) = (&text[..at], &text[at + appendix.len()..]);
    // What follows a line that was not ended does not become part of it.
    let is_glued = before.last().is_some_and(|byte| *byte != b'\n') && !after.is_empty();
    let newline: &[u8] = if is_glued { b"\n" } else { b"" };
    Some([before, newline, after].concat())
}
