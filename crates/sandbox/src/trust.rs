//! The certificate authorities that guests trust: those of the host's own bundle, and of one the user named.
//!
//! Networks of companies sign what passes them with an authority that only their hosts know. So every guest is told of
//! the host's, in memory, when its root is assembled; `guest::trust` lays them over what its image brings.
//!
//! Only certificates pass: a bundle may hold the key of a server beside them.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Error, ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::setup::{Finding, Status};

/// Where distributions have the bundle, the first one that is there counts. The links on the way are the system's own.
const BUNDLES: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/var/lib/ca-certificates/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// Largest bundle, bytes; usual ones have a quarter of a MiB.
const BUNDLE_LIMIT: u64 = 4 << 20;
/// Largest certificate, bytes.
const CERTIFICATE_LIMIT: usize = 64 << 10;
/// Most bytes of all certificates of a guest, of the 8 MiB that a message may have.
const ALL_LIMIT: usize = 4 << 20;
/// Most certificates of a guest.
const COUNT_LIMIT: usize = 4096;

const BEGIN: &[u8] = b"-----BEGIN ";
const END: &[u8] = b"-----END ";
const LABELS: [&[u8]; 2] = [b"CERTIFICATE-----", b"X509 CERTIFICATE-----"];

/// What guests are told to trust.
#[derive(Debug, Default)]
pub(crate) struct Authorities {
    /// Certificates, DER, each once.
    pub certificates: Vec<ByteBuf>,
    /// The files they are from.
    pub sources: Vec<PathBuf>,
    /// What could not be used, and why.
    pub warnings: Vec<String>,
}

/// What tells whether the bundles are the same as before: the files and their state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State(Vec<(PathBuf, u64, u64, u64, i64, i64)>);

/// The files there are: the system's first, then the one that was `named` unless it is the same.
fn files(named: Option<&Path>) -> Vec<PathBuf> {
    let system = BUNDLES.iter().map(Path::new).find(|path| path.is_file());
    let same = |one: &Path, other: &Path| one.canonicalize().ok() == other.canonicalize().ok();
    let named = named.filter(|named| !system.is_some_and(|system| same(system, named)));
    system.into_iter().chain(named).map(Path::to_owned).collect()
}

impl State {
    /// The state of the bundles now.
    pub(crate) fn now(named: Option<&Path>) -> Self {
        let state = |path: PathBuf| {
            let found = std::fs::metadata(&path).ok()?;
            let changed = found.ctime().wrapping_mul(1_000_000_000).wrapping_add(found.ctime_nsec());
            let modified = found.mtime().wrapping_mul(1_000_000_000).wrapping_add(found.mtime_nsec());
            Some((path, found.dev(), found.ino(), found.len(), modified, changed))
        };
        Self(files(named).into_iter().filter_map(state).collect())
    }
}

impl Authorities {
    /// Reads the host's bundle, and the one that was `named`. What cannot be used is told in the warnings: a guest
    /// without it is as safe, it only refuses more.
    pub(crate) fn read(named: Option<&Path>) -> Self {
        let mut all = Self::default();
        let (mut seen, mut bytes) = (BTreeSet::new(), 0);
        for path in files(named) {
            let shown = path.display();
            let content = match read_bundle(&path) {
                Ok(content) => content,
                Err(error) => {
                    all.warnings.push(format!("the certificates in {shown} cannot be read: {error}"));
                    continue;
                }
            };
            let Pem { certificates, refused } = certificates(&content);
            if refused > 0 {
                all.warnings
                    .push(format!("{refused} blocks in {shown} are no certificates and were left out"));
            }
            if certificates.is_empty() {
                all.warnings.push(format!("there is no certificate in {shown}"));
                continue;
            }
            for certificate in certificates {
                if seen.contains(&certificate) {
                    continue;
                }
                bytes += certificate.len();
                if bytes > ALL_LIMIT || seen.len() >= COUNT_LIMIT {
                    all.warnings.push(format!("{shown} has more certificates than a guest is given"));
                    break;
                }
                seen.insert(certificate.clone());
                all.certificates.push(ByteBuf::from(certificate));
            }
            all.sources.push(path);
        }
        all
    }
}

fn read_bundle(path: &Path) -> Result<Vec<u8>, Error> {
    // A FIFO is not waited for.
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > BUNDLE_LIMIT {
        return Err(Error::new(ErrorKind::InvalidData, "it is no regular file of at most 4 MiB"));
    }
    let mut content = Vec::new();
    file.take(BUNDLE_LIMIT).read_to_end(&mut content)?;
    Ok(content)
}

/// What is in a PEM file.
#[derive(Debug, Default, PartialEq, Eq)]
struct Pem {
    /// Certificates, DER.
    certificates: Vec<Vec<u8>>,
    /// Blocks that are called certificates and hold none.
    refused: usize,
}

/// Takes the certificates out of a PEM file and nothing else.
fn certificates(text: &[u8]) -> Pem {
    let mut found = Pem::default();
    // Without padding, as some programs write it, it means the same.
    let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let decoder = GeneralPurpose::new(&STANDARD, config);
    let mut block: Option<Vec<u8>> = None;
    for line in text.split(|byte| matches!(byte, b'\n' | b'\r')).map(<[u8]>::trim_ascii) {
        if let Some(label) = line.strip_prefix(BEGIN) {
            block = LABELS.contains(&label).then(Vec::new);
        } else if line.starts_with(END) {
            let Some(encoded) = block.take() else { continue };
            match decoder.decode(encoded) {
                Ok(decoded) if is_certificate(&decoded) => found.certificates.push(decoded),
                _ => found.refused += 1,
            }
        } else if let Some(block) = &mut block
            && block.len() <= 2 * CERTIFICATE_LIMIT
        {
            block.extend(line.iter().filter(|byte| !byte.is_ascii_whitespace()));
        }
    }
    found
}

/// Whether it has the outer form of an X.509 certificate (RFC 5280, 4.1): a sequence of a sequence, a sequence and a bit
/// string, and nothing after that. No form of private key has it.
fn is_certificate(der: &[u8]) -> bool {
    const SEQUENCE: u8 = 0x30;
    const BIT_STRING: u8 = 0x03;
    let form = || {
        let (outer, rest) = element(SEQUENCE, der)?;
        let (_, signed) = element(SEQUENCE, outer)?;
        let (_, algorithm) = element(SEQUENCE, signed)?;
        let (_, signature) = element(BIT_STRING, algorithm)?;
        Some(rest.is_empty() && signature.is_empty())
    };
    der.len() <= CERTIFICATE_LIMIT && form().unwrap_or(false)
}

/// The content of a DER element with this tag, and what follows it.
fn element(tag: u8, der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (first, rest) = der.split_first()?;
    let (length, rest) = rest.split_first()?;
    let (length, rest) = match length {
        0..=0x7f => (usize::from(*length), rest),
        0x81..=0x83 => {
            let (digits, rest) = rest.split_at_checked(usize::from(length - 0x80))?;
            (digits.iter().fold(0, |sum, digit| sum << 8 | usize::from(*digit)), rest)
        }
        _ => return None,
    };
    (*first == tag).then(|| rest.split_at_checked(length)).flatten()
}

/// Which authorities guests trust, for people.
pub fn finding(named: Option<&Path>) -> Finding {
    let Authorities { certificates, sources, warnings } = Authorities::read(named);
    let sources: Vec<String> = sources.iter().map(|path| path.display().to_string()).collect();
    let mut detail = match certificates.len() {
        0 => "none of the host's: guests trust what their images bring".to_owned(),
        count => {
            format!("guests trust the {count} authorities of {}, and their image's", sources.join(" and "))
        }
    };
    for warning in &warnings {
        detail.push_str("; ");
        detail.push_str(warning);
    }
    let (status, remedy) = match (certificates.is_empty(), warnings.is_empty()) {
        (false, true) => (Status::Ok, None),
        (true, true) => (Status::Warning, Some("install ca-certificates, or set SSL_CERT_FILE to a bundle")),
        (_, false) => (Status::Warning, Some("set SSL_CERT_FILE to a readable PEM bundle, or unset it")),
    };
    Finding { name: "certificates".to_owned(), status, detail, remedy: remedy.map(str::to_owned) }
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose;
    use proptest::prelude::*;

    use super::*;

    /// An element as DER has it.
    fn der(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = content.len();
        let header = match length {
            0..0x80 => vec![tag, length as u8],
            0x80..0x100 => vec![tag, 0x81, length as u8],
            _ => vec![tag, 0x82, (length >> 8) as u8, length as u8],
        };
        [header, content.to_vec()].concat()
    }

    /// Something with the form of a certificate.
    fn certificate(body: &[u8]) -> Vec<u8> {
        der(0x30, &[der(0x30, body), der(0x30, b"algorithm"), der(0x03, b"\0signature")].concat())
    }

    fn pem(label: &str, content: &[u8], newline: &str) -> String {
        let text = general_purpose::STANDARD.encode(content);
        let lines: Vec<&str> =
            (0..text.len()).step_by(64).map(|at| &text[at..text.len().min(at + 64)]).collect();
        format!(
            "-----BEGIN {label}-----{newline}{}{newline}-----END {label}-----{newline}",
            lines.join(newline)
        )
    }

    #[test]
    fn only_certificates_pass() {
        let (one, other) = (certificate(b"one"), certificate(&[7; 300]));
        // PKCS #8: a version first. Encrypted: two elements only.
        let key = der(0x30, &[der(0x02, b"\0"), der(0x30, b"rsa"), der(0x04, b"secret")].concat());
        let encrypted = der(0x30, &[der(0x30, b"how"), der(0x04, b"secret")].concat());
        let text = [
            "# A comment\n".to_owned(),
            pem("CERTIFICATE", &one, "\n"),
            pem("PRIVATE KEY", &key, "\n"),
            pem("CERTIFICATE", &key, "\n"),
            pem("CERTIFICATE", &encrypted, "\n"),
            pem("CERTIFICATE", &[one.clone(), b"more".to_vec()].concat(), "\n"),
            pem("X509 CERTIFICATE", &other, "\r\n"),
            pem("TRUSTED CERTIFICATE", &one, "\n"),
            "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n".to_owned(),
            "-----BEGIN CERTIFICATE-----\nAAAA\n".to_owned(),
            pem("RSA PRIVATE KEY", &key, "\n"),
        ]
        .concat();
        let found = certificates(text.as_bytes());
        assert_eq!(found, Pem { certificates: vec![one, other], refused: 4 });
    }

    #[test]
    fn a_named_bundle_is_added_and_its_trouble_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bundle.pem");
        let without = Authorities::read(None);
        let told = |path: &Path| {
            let all = Authorities::read(Some(path));
            (all.certificates.len() - without.certificates.len(), all.warnings.len() - without.warnings.len())
        };
        assert_eq!(told(&path), (0, 1));
        let state = State::now(Some(&path));
        let mine = pem("CERTIFICATE", &certificate(b"mine"), "\n");
        std::fs::write(&path, mine.repeat(2)).unwrap();
        assert_eq!(told(&path), (1, 0));
        assert_ne!(State::now(Some(&path)), state);
        std::fs::write(&path, "nothing").unwrap();
        assert_eq!(told(&path), (0, 1));
        assert_eq!(told(directory.path()), (0, 1));
    }

    proptest! {
        #[test]
        fn whatever_a_file_holds_nothing_else_passes(text in prop::collection::vec(any::<u8>(), 0..2000)) {
            for certificate in certificates(&text).certificates {
                prop_assert!(is_certificate(&certificate));
            }
        }

        #[test]
        fn damaged_blocks_are_no_certificates(body in prop::collection::vec(any::<u8>(), 0..400), at in any::<prop::sample::Index>(), byte: u8) {
            let good = certificate(&body);
            let found = certificates(pem("CERTIFICATE", &good, "\n").as_bytes());
            prop_assert_eq!(found.certificates, vec![good.clone()]);
            let mut text = pem("CERTIFICATE", &good, "\n").into_bytes();
            let at = at.index(text.len());
            text[at] = byte;
            for certificate in certificates(&text).certificates {
                prop_assert!(is_certificate(&certificate));
            }
            prop_assert!(!is_certificate(&good[..good.len() - 1]));
        }
    }
}
