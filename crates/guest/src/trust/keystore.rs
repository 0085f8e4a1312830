//! Java's stores of certificates. JKS is read and written: every Java reads it, whatever the file was before. PKCS #12 is
//! read where nothing in it is encrypted, as Java 18 and later bring it.
//!
//! ```text
//! feedfeed  version  count  entry ...  SHA-1 of password, "Mighty Aphrodite" and all before
//! entry     1  alias  date  key  chain           what Java calls a private key
//!           2  alias  date  "X.509"  certificate
//! ```

use std::collections::BTreeSet;

use sha1::{Digest, Sha1};

const MAGIC: u32 = 0xfeed_feed;
const VERSION: u32 = 2;
const KEY: u32 = 1;
const CERTIFICATE: u32 = 2;
const HASH: usize = 20;
/// The password that all have.
const PASSWORD: &str = "changeit";
/// Names of what is added begin so. Java has them in small letters.
const OURS: &str = "agentkernel-host-";
/// Most entries.
const ENTRIES_LIMIT: u32 = 16 << 10;

/// The type of a certificate in PKCS #12: x509Certificate, 1.2.840.113549.1.9.22.1.
const X509: &[u8] = b"\x06\x0a\x2a\x86\x48\x86\xf7\x0d\x01\x09\x16\x01";
/// What shows that it has more than certificates, or more than can be read: encryptedData, envelopedData, and the bags of
/// keys.
const MORE: [&[u8]; 4] = [
    b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x06",
    b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x03",
    b"\x06\x0b\x2a\x86\x48\x86\xf7\x0d\x01\x0c\x0a\x01\x01",
    b"\x06\x0b\x2a\x86\x48\x86\xf7\x0d\x01\x0c\x0a\x01\x02",
];

/// A store, as entries of JKS.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Store {
    entries: Vec<Entry>,
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    alias: Vec<u8>,
    /// All of it, as the file has it.
    bytes: Vec<u8>,
    /// DER; nothing of a private key's.
    certificate: Option<Vec<u8>>,
}

/// What is left of a file.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn word(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_be_bytes)
    }

    /// Bytes whose number is told before, in four bytes.
    fn long(&mut self) -> Option<&'a [u8]> {
        let count = usize::try_from(self.word()?).ok()?;
        self.take(count)
    }

    /// The same, in two bytes.
    fn short(&mut self) -> Option<&'a [u8]> {
        let count = self.take(2)?.try_into().ok().map(u16::from_be_bytes)?;
        self.take(usize::from(count))
    }
}

impl Store {
    /// Reads a store; `None` if it is none, or holds what could not be written again.
    pub(super) fn read(content: &[u8]) -> Option<Self> {
        if content.starts_with(&MAGIC.to_be_bytes()) {
            Self::read_jks(content)
        } else {
            Self::read_pkcs12(content)
        }
    }

    fn read_jks(content: &[u8]) -> Option<Self> {
        let (body, hash) = content.split_at_checked(content.len().checked_sub(HASH)?)?;
        // With another password it could not be closed again as it was.
        if closing(body) != hash {
            return None;
        }
        let mut rest = Rest(body);
        let (magic, version, count) = (rest.word()?, rest.word()?, rest.word()?);
        if magic != MAGIC || version != VERSION || count > ENTRIES_LIMIT {
            return None;
        }
        let mut store = Self::default();
        for _ in 0..count {
            let before = rest.0;
            let kind = rest.word()?;
            let alias = rest.short()?.to_vec();
            rest.take(8)?;
            let mut certificate = None;
            match kind {
                CERTIFICATE => {
                    rest.short()?;
                    certificate = Some(rest.long()?.to_vec());
                }
                KEY => {
                    rest.long()?;
                    for _ in 0..rest.word()? {
                        rest.short()?;
                        rest.long()?;
                    }
                }
                _ => return None,
            }
            let bytes = before.get(..before.len() - rest.0.len())?.to_vec();
            store.entries.push(Entry { alias, bytes, certificate });
        }
        rest.0.is_empty().then_some(store)
    }

    fn read_pkcs12(content: &[u8]) -> Option<Self> {
        let has = |what: &[u8]| content.windows(what.len()).any(|window| window == what);
        if content.first() != Some(&0x30) || MORE.iter().any(|more| has(more)) {
            return None;
        }
        let mut store = Self::default();
        let mut rest = content;
        while let Some(at) = rest.windows(X509.len()).position(|window| window == X509) {
            rest = &rest[at + X509.len()..];
            // [0] EXPLICIT OCTET STRING.
            let (tagged, after) = element(0xa0, rest)?;
            let (certificate, _) = element(0x04, tagged)?;
            rest = after;
            let number = store.entries.len() + 1;
            store.entries.push(Entry::new(format!("certificate-{number}"), certificate)?);
        }
        (!store.entries.is_empty()).then_some(store)
    }

    /// Its certificates, DER.
    pub(super) fn certificates(&self) -> BTreeSet<Vec<u8>> {
        self.entries.iter().filter_map(|entry| entry.certificate.clone()).collect()
    }

    /// The file that has these as well.
    pub(super) fn with(&self, added: &[&[u8]]) -> Vec<u8> {
        let ours = added.iter().enumerate();
        let ours: Vec<_> =
            ours.filter_map(|(index, der)| Entry::new(format!("{OURS}{:03}", index + 1), der)).collect();
        write(self.entries.iter().chain(&ours))
    }

    /// The file without what [`Self::with`] added; `None` if nothing of it is there.
    pub(super) fn without_ours(&self) -> Option<Vec<u8>> {
        let is_ours = |entry: &&Entry| entry.alias.starts_with(OURS.as_bytes());
        self.entries.iter().any(|entry| is_ours(&entry)).then(|| {
            let others: Vec<_> = self.entries.iter().filter(|entry| !is_ours(entry)).collect();
            write(others)
        })
    }
}

impl Entry {
    fn new(alias: String, der: &[u8]) -> Option<Self> {
        const TYPE: &[u8] = b"X.509";
        let mut bytes = CERTIFICATE.to_be_bytes().to_vec();
        for (text, date) in [(alias.as_bytes(), Some(0_u64)), (TYPE, None)] {
            bytes.extend(u16::try_from(text.len()).ok()?.to_be_bytes());
            bytes.extend(text);
            bytes.extend(date.map(u64::to_be_bytes).into_iter().flatten());
        }
        bytes.extend(u32::try_from(der.len()).ok()?.to_be_bytes());
        bytes.extend(der);
        Some(Self { alias: alias.into_bytes(), bytes, certificate: Some(der.to_vec()) })
    }
}

fn write<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Vec<u8> {
    let entries: Vec<_> = entries.into_iter().collect();
    let mut bytes: Vec<u8> =
        [MAGIC, VERSION, entries.len() as u32].into_iter().flat_map(u32::to_be_bytes).collect();
    for entry in entries {
        bytes.extend(&entry.bytes);
    }
    let hash = closing(&bytes);
    bytes.extend(hash);
    bytes
}

/// The hash at the end of a store. It protects nothing: its key is public.
fn closing(body: &[u8]) -> [u8; HASH] {
    let password: Vec<u8> = PASSWORD.encode_utf16().flat_map(u16::to_be_bytes).collect();
    Sha1::new().chain_update(password).chain_update("Mighty Aphrodite").chain_update(body).finalize().into()
}

/// The content of a DER element with this tag, and what follows it.
fn element(tag: u8, der: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut rest = Rest(der);
    if *rest.take(1)?.first()? != tag {
        return None;
    }
    let length = match *rest.take(1)?.first()? {
        short @ 0..=0x7f => usize::from(short),
        long @ 0x81..=0x83 => {
            let digits = rest.take(usize::from(long - 0x80))?;
            digits.iter().fold(0, |sum, digit| sum << 8 | usize::from(*digit))
        }
        _ => return None,
    };
    Some((rest.take(length)?, rest.0))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn stores_are_written_as_they_are_read() {
        let empty = Store::read(&write([])).unwrap();
        let file = empty.with(&[b"one", b"other"]);
        let store = Store::read(&file).unwrap();
        assert_eq!(store.certificates(), BTreeSet::from([b"one".to_vec(), b"other".to_vec()]));
        assert_eq!(store.without_ours().unwrap(), write([]));
        assert_eq!(empty.without_ours(), None);
        // An entry with a key stays as it is.
        let mut key = KEY.to_be_bytes().to_vec();
        key.extend(b"\x00\x02my\0\0\0\0\0\0\0\x07\0\0\0\x03key\0\0\0\x01\0\x05X.509\0\0\0\x02ab");
        let entry = Entry { alias: b"my".to_vec(), bytes: key, certificate: None };
        let mine = write([&entry]);
        let store = Store::read(&mine).unwrap();
        assert_eq!(store.entries, [entry]);
        let file = store.with(&[b"one"]);
        assert_eq!(Store::read(&file).unwrap().without_ours().unwrap(), mine);
        // Another password, or damage.
        let mut other = mine;
        *other.last_mut().unwrap() ^= 1;
        assert_eq!(Store::read(&other), None);
    }

    /// With Java's own program.
    #[test]
    fn keytool_agrees() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        let keytool = |arguments: &[&str]| {
            let output = Command::new("keytool")
                .args(arguments)
                .args(["-storepass", "changeit", "-keystore"])
                .arg(&path)
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
            output.stdout
        };
        let make = ["-genkeypair", "-alias", "a", "-dname", "CN=a", "-keyalg", "EC", "-keypass", "changeit"];
        keytool(&[&make[..], &["-storetype", "JKS"]].concat());
        let certificate = keytool(&["-exportcert", "-alias", "a"]);
        let store = Store::read(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(store.certificates(), BTreeSet::new());
        std::fs::write(&path, store.with(&[&certificate])).unwrap();
        assert_eq!(keytool(&["-exportcert", "-alias", "agentkernel-host-001"]), certificate);
        keytool(&["-delete", "-alias", "a"]);
        let store = Store::read(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(store.certificates(), BTreeSet::from([certificate.clone()]));
        // As Java 18 and later have theirs.
        std::fs::remove_file(&path).unwrap();
        let file = directory.path().join("certificate");
        std::fs::write(&file, &certificate).unwrap();
        let plain = [
            "-J-Dkeystore.pkcs12.certProtectionAlgorithm=NONE",
            "-J-Dkeystore.pkcs12.macAlgorithm=NONE",
            "-importcert",
            "-noprompt",
            "-alias",
            "b",
            "-storetype",
            "PKCS12",
            "-file",
        ];
        keytool(&[&plain[..], &[file.to_str().unwrap()]].concat());
        let store = Store::read(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(store.certificates(), BTreeSet::from([certificate]));
        // One with a key stays as it is.
        std::fs::remove_file(&path).unwrap();
        keytool(&[&make[..], &["-storetype", "PKCS12"]].concat());
        assert_eq!(Store::read(&std::fs::read(&path).unwrap()), None);
    }

    proptest! {
        #[test]
        fn what_was_added_can_be_taken_out(
            own in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..6),
            added in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..6),
        ) {
            let own: Vec<Entry> =
                own.iter().enumerate().map(|(at, der)| Entry::new(format!("own-{at}"), der).unwrap()).collect();
            let file = write(&own);
            let added: Vec<&[u8]> = added.iter().map(Vec::as_slice).collect();
            let more = Store::read(&file).unwrap().with(&added);
            prop_assert_eq!(Store::read(&more).unwrap().without_ours(), Some(file));
        }

        /// Whatever an image has there, nothing panics.
        #[test]
        fn files_of_all_kinds_are_read(
            body in prop::collection::vec(any::<u8>(), 0..200), count in 0_u32..5, form in 0..3,
        ) {
            let content = match form {
                0 => body,
                1 => {
                    let head = [MAGIC, VERSION, count].into_iter().flat_map(u32::to_be_bytes);
                    let all: Vec<u8> = head.chain(body).collect();
                    let hash = closing(&all);
                    [all, hash.to_vec()].concat()
                }
                _ => [b"\x30", X509, body.as_slice()].concat(),
            };
            let _ = Store::read(&content);
        }
    }
}
