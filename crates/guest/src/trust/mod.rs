//! The host's certificate authorities, for every program of the guest, beside those of its image.
//!
//! ```text
//! overlay   upper     what programs write, as ever
//!           ours      in memory: the image's bundles and Java's stores, each with the host's authorities besides
//!           lower     the image
//! ```
//! So programs that install certificates write as they always do, and what they write is theirs: nothing of the host
//! gets into the writable layer unless a program puts it there. A program that adds to a bundle, or copies one, writes what
//! it saw; in a build's step that is taken out again ([`Laid::take_out`]).
//!
//! Besides there is one file with all authorities, which variables name for programs that bring a bundle of their own.
//!
//! The image is hostile: its links lead nowhere out of it, its files are bounded, and one that is not understood stays as
//! it is.

mod keystore;
mod pem;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io::{Error, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, openat2};
use serde_bytes::ByteBuf;

use crate::boot::log;
use crate::layers::timestamps;
use crate::tree;

/// The file with all authorities, in the root of sandboxes. It lives as long as the machine, as all of `/run`.
pub(crate) const BUNDLE: &str = "/run/agentkernel/certificates.pem";
/// The same in the root of a build's step: a directory made for it would be found in the layer.
pub(crate) const STEP_BUNDLE: &str = "/dev/agentkernel-certificates.pem";

/// Variables that name it. Those that the image or the user set stay.
pub(crate) const VARIABLES: [&str; 6] = [
    "SSL_CERT_FILE",
    "NODE_EXTRA_CA_CERTS",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
];

/// Where distributions have their bundles; often one file by several names.
const BUNDLES: [&str; 9] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/tls/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/var/lib/ca-certificates/ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/etc/ssl/certs/ca-bundle.crt",
    "/usr/lib/ssl/cert.pem",
];
/// Where distributions and vendors have Java's store.
const KEYSTORES: [&str; 4] = [
    "/etc/ssl/certs/java/cacerts",
    "/etc/pki/ca-trust/extracted/java/cacerts",
    "/var/lib/ca-certificates/java-cacerts",
    "/opt/java/openjdk/lib/security/cacerts",
];
/// Directories with one of Java in each entry, and where its store is there.
const JAVAS: [&str; 5] = ["/usr/lib/jvm", "/usr/lib64/jvm", "/usr/java", "/usr/local", "/opt"];
const IN_JAVA: [&str; 2] = ["lib/security/cacerts", "jre/lib/security/cacerts"];
/// Most entries of such a directory that are looked at.
const ENTRIES_LIMIT: usize = 64;
/// Where programs that write a bundle anew (`update-ca-certificates`, `update-ca-trust`) find what a system has besides:
/// the directory that has to be there, and the one below it.
const ANCHORS: [(&str, &str); 3] = [
    ("/usr/local/share", "ca-certificates"),
    ("/etc/pki/ca-trust/source/anchors", ""),
    ("/etc/pki/trust/anchors", ""),
];

/// Largest bundle or store of an image, bytes.
const FILE_LIMIT: u64 = 8 << 20;
/// How much longer than a bundle a copy may be to be looked at, bytes.
const ADDED_LIMIT: usize = 1 << 20;

/// The host's authorities: certificates, DER.
pub(crate) struct Trust {
    authorities: Vec<ByteBuf>,
}

/// What is to lie over a root.
#[derive(Default)]
pub(crate) struct Laid {
    files: Vec<LaidFile>,
    /// All authorities, PEM.
    pub(crate) bundle: Vec<u8>,
}

struct LaidFile {
    /// Relative to the root, no link on the way.
    path: PathBuf,
    /// The root's own file, whose owner, mode and time it has.
    model: Option<Stat>,
    content: Vec<u8>,
    kind: Kind,
}

enum Kind {
    /// What was added to the bundle.
    Bundle(Vec<u8>),
    Keystore,
    Anchor,
}

/// An object of a root.
struct Found {
    /// Relative to the root, no link on the way.
    path: PathBuf,
    handle: OwnedFd,
    stat: Stat,
}

impl Trust {
    pub(crate) fn new(authorities: &[ByteBuf]) -> Self {
        Self { authorities: authorities.to_vec() }
    }

    /// The host has none to tell of.
    pub(crate) fn is_empty(&self) -> bool {
        self.authorities.is_empty()
    }

    /// Looks at a root, and says what is to lie over it; `anchors` for programs that write its bundle anew.
    pub(crate) fn survey(&self, root: &OwnedFd, anchors: bool) -> Laid {
        let mut laid = Laid::default();
        if self.is_empty() {
            return laid;
        }
        let mut seen = BTreeSet::new();
        let mut missing: Option<Vec<&[u8]>> = None;
        for found in BUNDLES.iter().filter_map(|path| find(root, Path::new(path), FileType::RegularFile)) {
            if !seen.insert(found.path.clone()) {
                continue;
            }
            let Some(mut content) = found.read() else { continue };
            let known = pem::certificates(&content);
            let added = self.besides(&known);
            let appendix = pem::appendix(&added);
            content.extend(&appendix);
            if missing.is_none() {
                laid.bundle.clone_from(&content);
                missing = Some(added);
            }
            if !appendix.is_empty() {
                laid.add(found, content, Kind::Bundle(appendix));
            }
        }
        let missing = missing.unwrap_or_else(|| {
            let all = self.besides(&BTreeSet::new());
            laid.bundle = pem::appendix(&all);
            all
        });
        for found in keystores(root) {
            if !seen.insert(found.path.clone()) {
                continue;
            }
            let Some(content) = found.read() else { continue };
            let Some(store) = keystore::Store::read(&content) else {
                log(&format!("{} is no store of Java's that can be added to", found.path.display()));
                continue;
            };
            let added = self.besides(&store.certificates());
            if !added.is_empty() {
                laid.add(found, store.with(&added), Kind::Keystore);
            }
        }
        if anchors {
            laid.add_anchors(root, &missing);
        }
        laid
    }

    /// Those that are not `known`.
    fn besides(&self, known: &BTreeSet<Vec<u8>>) -> Vec<&[u8]> {
        let new = self.authorities.iter().filter(|authority| !known.contains(authority.as_slice()));
        new.map(|authority| authority.as_slice()).collect()
    }
}

impl Laid {
    /// The root is as it has to be.
    pub(crate) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    fn add(&mut self, found: Found, content: Vec<u8>, kind: Kind) {
        self.files.push(LaidFile { path: found.path, model: Some(found.stat), content, kind });
    }

    fn add_anchors(&mut self, root: &OwnedFd, authorities: &[&[u8]]) {
        for (directory, below) in ANCHORS {
            let Some(found) = find(root, Path::new(directory), FileType::Directory) else { continue };
            for (index, authority) in authorities.iter().enumerate() {
                let path = found.path.join(below).join(format!("agentkernel-host-{:03}.crt", index + 1));
                let content = pem::block(authority).into_bytes();
                self.files.push(LaidFile { path, model: None, content, kind: Kind::Anchor });
            }
        }
    }

    /// Writes the files into `directory`, which is to lie over `root`, in directories like those of the root.
    pub(crate) fn write(&self, directory: &Path, root: &OwnedFd) -> Result<(), Error> {
        let mut made: Vec<(PathBuf, Option<Stat>)> = Vec::new();
        for file in &self.files {
            let mut ancestors: Vec<&Path> = file.path.ancestors().skip(1).collect();
            ancestors.pop();
            for ancestor in ancestors.into_iter().rev() {
                let target = directory.join(ancestor);
                if target.is_dir() {
                    continue;
                }
                std::fs::create_dir(&target)?;
                let stat = rustix::fs::statat(root, ancestor, AtFlags::SYMLINK_NOFOLLOW).ok();
                let is_directory = |stat: &Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
                made.push((target, stat.filter(is_directory)));
            }
            let target = directory.join(&file.path);
            std::fs::write(&target, &file.content)?;
            imitate(&target, file.model.as_ref(), 0o644)?;
        }
        // Last, for what is made in a directory changes its time.
        made.iter().rev().try_for_each(|(path, model)| imitate(path, model.as_ref(), 0o755))
    }

    /// Takes what was added out of the files that programs wrote, and so are in `upper` now: those in place of ours, and
    /// copies elsewhere. One that cannot be changed is removed.
    pub(crate) fn take_out(&self, upper: &OwnedFd) -> Result<(), Error> {
        let root = rustix::fs::openat(upper, ".", tree::directory_flags(), Mode::empty())?;
        tree::walk(root, &mut |parent, name, path| {
            let stat = tree::stat(parent, name)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => return tree::open_directory(parent, name).map(Some),
                FileType::RegularFile => {}
                _ => return Ok(None),
            }
            let path = Path::new(OsStr::from_bytes(path));
            for file in self.files.iter().filter(|file| file.may_be(path, &stat)) {
                if let Err(error) = file.take_out(parent, name, &stat) {
                    log(&format!("{} is left out of the layer: {error}", path.display()));
                    rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
                    break;
                }
            }
            Ok(None)
        })
    }
}

impl LaidFile {
    /// Whether what lies at `path` of a layer may have what was added to this one. Copies are told by their size, or as
    /// much as people add to one: a layer is not read for it.
    fn may_be(&self, path: &Path, stat: &Stat) -> bool {
        let size = usize::try_from(stat.st_size).unwrap_or(usize::MAX);
        let sizes = self.content.len()..self.content.len() + ADDED_LIMIT;
        path == self.path || sizes.contains(&size)
    }

    fn take_out(&self, parent: &OwnedFd, name: &OsStr, stat: &Stat) -> Result<(), Error> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let mut file = File::from(rustix::fs::openat(parent, name, flags, Mode::empty())?);
        let mut content = Vec::new();
        (&file).take(2 * FILE_LIMIT).read_to_end(&mut content)?;
        let rest = match &self.kind {
            Kind::Bundle(appendix) => pem::without(&content, appendix),
            Kind::Keystore => keystore::Store::read(&content).and_then(|store| store.without_ours()),
            Kind::Anchor => None,
        };
        let Some(rest) = rest else { return Ok(()) };
        file.rewind()?;
        file.write_all(&rest)?;
        file.set_len(rest.len() as u64)?;
        Ok(rustix::fs::futimens(&file, &timestamps(tree::modified_ns(stat)))?)
    }
}

impl Found {
    /// The content; nothing if it cannot be read, or is too long to be a bundle.
    fn read(&self) -> Option<Vec<u8>> {
        let limit = FILE_LIMIT;
        if u64::try_from(self.stat.st_size).ok()? > limit {
            return None;
        }
        let file = File::open(handle_path(self.handle.as_fd())).ok()?;
        let mut content = Vec::new();
        file.take(limit).read_to_end(&mut content).ok()?;
        Some(content)
    }
}

/// A handle as a path, without looking anything up in the root.
fn handle_path(handle: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", handle.as_raw_fd()))
}

/// Finds an object of this kind, all links resolved inside the root.
fn find(root: &OwnedFd, path: &Path, kind: FileType) -> Option<Found> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let handle = openat2(root, path, flags, Mode::empty(), resolve).ok()?;
    let stat = rustix::fs::fstat(&handle).ok()?;
    if FileType::from_raw_mode(stat.st_mode) != kind {
        return None;
    }
    let base = std::fs::read_link(handle_path(root.as_fd())).ok()?;
    let real = std::fs::read_link(handle_path(handle.as_fd())).ok()?;
    let path = real.strip_prefix(base).ok()?.to_owned();
    Some(Found { path, handle, stat })
}

/// Java's stores of a root.
fn keystores(root: &OwnedFd) -> Vec<Found> {
    let mut paths: Vec<PathBuf> = KEYSTORES.iter().map(PathBuf::from).collect();
    for directory in JAVAS {
        let Some(found) = find(root, Path::new(directory), FileType::Directory) else { continue };
        let Ok(entries) = std::fs::read_dir(handle_path(found.handle.as_fd())) else { continue };
        let mut names: Vec<_> =
            entries.flatten().take(ENTRIES_LIMIT).map(|entry| entry.file_name()).collect();
        names.sort_by(|one, other| one.as_bytes().cmp(other.as_bytes()));
        for name in names {
            paths.extend(IN_JAVA.iter().map(|store| Path::new(directory).join(&name).join(store)));
        }
    }
    paths.iter().filter_map(|path| find(root, path, FileType::RegularFile)).collect()
}

/// Gives what is at `path` the owner, mode and time of `model`, or just the mode.
fn imitate(path: &Path, model: Option<&Stat>, mode: u32) -> Result<(), Error> {
    let Some(model) = model else { return std::fs::set_permissions(path, Permissions::from_mode(mode)) };
    std::os::unix::fs::chown(path, Some(model.st_uid), Some(model.st_gid))?;
    std::fs::set_permissions(path, Permissions::from_mode(model.st_mode & 0o7777))?;
    let times = timestamps(tree::modified_ns(model));
    Ok(rustix::fs::utimensat(rustix::fs::CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

#[cfg(test)]
mod tests;
