//! The guest's kernel: found or fetched once by `agentkernel setup`, then loaded by every run without reading it.
//!
//! ```text
//! <cache>/kernel/current.json                     the record: what is used, from where, sizes and hashes
//!               <release>-<hash>/vmlinux          the kernel as it is booted
//!               <release>-<hash>/<module>.ko      unpacked, in the record's order
//!               initramfs-<key>.cpio              one per (kernel, modules, guest agent)
//! ```
//! [`prepare`] writes all of it under temporary names and renames; whoever reads sees one kernel or the other.

pub(crate) mod command;
pub(crate) mod decompress;
mod image;
mod modules;
mod package;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use decompress::DecompressError;
pub use image::ImageError;
pub use modules::ModulesError;
pub use package::PackageError;

use crate::{atomic, initramfs};

/// Raised with every change of what a kernel has to have.
const RECORD_VERSION: u32 = 2;
const RECORD_LIMIT: u64 = 1 << 20;
const CONFIG_LIMIT: u64 = 4 << 20;

/// Where to look for a kernel, and where to keep it.
#[derive(Debug, Clone)]
pub struct KernelOptions {
    /// The program's cache directory; a folder `kernel` is made in it.
    pub cache: PathBuf,
    /// `kernel.path` of the configuration: a bzImage or an ELF kernel. Nothing else is considered then.
    pub configured: Option<PathBuf>,
    /// Fetch nothing from the network.
    pub offline: bool,
}

/// A kernel ready to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// What QEMU's `-kernel` gets: an ELF kernel with a PVH entry, or a bzImage where unpacking it was not possible.
    pub vmlinux: PathBuf,
    /// The initramfs with this program's guest agent.
    pub initramfs: PathBuf,
    /// As `uname -r` says it in the guest.
    pub release: String,
    /// The hash of `vmlinux`, in hexadecimal, as recorded when it was written.
    pub sha256: String,
    /// Where it came from, in words: a path or a package.
    pub origin: String,
}

/// What [`prepare`] is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Asking the package manager which package has the kernel.
    Resolving,
    /// Downloading packages (about 70 MB).
    Downloading {
        /// Their names.
        packages: Vec<String>,
    },
    /// Unpacking what was downloaded or found.
    Unpacking {
        /// What it is.
        what: String,
    },
}

/// Why there is no kernel to boot.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Nothing has been prepared yet.
    #[error("no guest kernel has been set up")]
    Missing,
    /// The record and what lies beside it do not agree.
    #[error("the guest kernel in the cache is not usable: {} {problem}", path.display())]
    Corrupt {
        /// The file that is wrong.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// `kernel.path` names another kernel than the one that was prepared, or that file has changed.
    #[error("the guest kernel was set up from another file than kernel.path names now")]
    Stale,
    /// A file cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// `read`, `write`, …
        action: &'static str,
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is no kernel that can be booted.
    #[error("cannot boot {}", path.display())]
    Image {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        source: ImageError,
    },
    /// The kernel lacks modules the guest needs.
    #[error("cannot gather the kernel's modules")]
    Modules {
        /// Which ones.
        #[from]
        source: ModulesError,
    },
    /// The distribution's package could not be had.
    #[error("cannot fetch a guest kernel")]
    Package {
        /// Why.
        #[from]
        source: PackageError,
    },
    /// Nothing on this host can serve, and fetching was not allowed.
    #[error("this host has no readable kernel in /boot and fetching one is switched off")]
    Offline,
}

impl KernelError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Missing | Self::Corrupt { .. } | Self::Stale => Some("agentkernel setup".to_owned()),
            Self::Package { source } => source.hint(),
            Self::Image { source: ImageError::NoPvh, .. } => {
                Some("point kernel.path at the bzImage (vmlinuz) of this kernel".to_owned())
            }
            Self::Offline => Some("set kernel.path in the configuration to a kernel (vmlinuz)".to_owned()),
            Self::File { .. } | Self::Image { .. } | Self::Modules { .. } => None,
        }
    }

    fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { action, path: path.to_owned(), source }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    version: u32,
    release: String,
    origin: String,
    /// The configured file this was made from, to see when that changes.
    configured: Option<Stamp>,
    directory: String,
    kernel: Piece,
    /// What the kernel's file looked like when its content was last compared with the hash.
    #[serde(default)]
    seen: Option<Seen>,
    modules: Vec<Piece>,
}

/// Changes with any write to a file, and with its replacement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    inode: u64,
    changed: (i64, i64),
}

impl Seen {
    fn of(path: &Path) -> Option<Self> {
        let data = fs::metadata(path).ok()?;
        Some(Self { inode: data.ino(), changed: (data.ctime(), data.ctime_nsec()) })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Piece {
    name: String,
    size: u64,
    sha256: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    path: PathBuf,
    size: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> io::Result<Self> {
        let data = fs::metadata(path)?;
        Ok(Self { path: path.to_owned(), size: data.len(), modified: (data.mtime(), data.mtime_nsec()) })
    }
}

impl Piece {
    fn of(name: &str, bytes: &[u8]) -> Self {
        Self { name: name.to_owned(), size: bytes.len() as u64, sha256: atomic::sha256(bytes) }
    }
}

/// A kernel on the host's disk, before it is taken into the cache.
struct Found {
    file: PathBuf,
    /// Its `/lib/modules/<release>`; `None`: everything needed is built in.
    modules: Option<PathBuf>,
    /// Its build configuration, if it lies beside.
    config: Option<PathBuf>,
    origin: String,
}

fn store(cache: &Path) -> PathBuf {
    cache.join("kernel")
}

/// The kernel that was prepared. Its content is compared with the recorded hash only if its file was touched since the
/// last time; otherwise record, presence and sizes are checked. With `configured` it must
/// have been made from that file as it is now; without, whatever was set up last is taken.
///
/// # Errors
/// [`KernelError`] with the hint `agentkernel setup` where the cache has no such kernel.
pub fn load(cache: &Path, configured: Option<&Path>) -> Result<Kernel, KernelError> {
    load_with(cache, configured, initramfs::GUEST, initramfs::GUEST_SHA256)
}

/// [`load`] with another program as PID 1; `init_key` names it in the cache.
///
/// # Errors
/// As [`load`].
#[doc(hidden)]
pub fn load_with(
    cache: &Path,
    configured: Option<&Path>,
    init: &[u8],
    init_key: &str,
) -> Result<Kernel, KernelError> {
    let store = store(cache);
    let record = read_record(&store)?;
    match (configured, &record.configured) {
        // Nothing in particular is asked for: what was set up last serves.
        (None, _) => {}
        (Some(path), Some(stamp)) if Stamp::of(path).is_ok_and(|now| now == *stamp) => {}
        _ => return Err(KernelError::Stale),
    }
    let directory = store.join(&record.directory);
    let record = check_kernel(&store, &directory.join("vmlinux"), record)?;
    let initramfs = ensure_initramfs(&store, &record, init, init_key)?;
    Ok(Kernel {
        vmlinux: directory.join("vmlinux"),
        initramfs,
        release: record.release,
        sha256: record.kernel.sha256,
        origin: record.origin,
    })
}

fn read_record(store: &Path) -> Result<Record, KernelError> {
    let path = store.join("current.json");
    let bytes = match atomic::read(&path, RECORD_LIMIT) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(KernelError::Missing),
        Err(source) => return Err(KernelError::File { action: "read", path, source }),
    };
    let corrupt = |problem| KernelError::Corrupt { path: path.clone(), problem };
    let record: Record =
        serde_json::from_slice(&bytes).map_err(|_| corrupt("is not a record of this program"))?;
    if record.version != RECORD_VERSION {
        return Err(corrupt("was written by another version"));
    }
    // Names become paths, so they may not lead anywhere else.
    let wrong = |name: &String| name.is_empty() || name.starts_with('.') || name.contains('/');
    if record.modules.iter().map(|piece| &piece.name).chain([&record.directory]).any(wrong) {
        return Err(corrupt("holds a name that is none"));
    }
    Ok(record)
}

fn check_kernel(store: &Path, path: &Path, record: Record) -> Result<Record, KernelError> {
    check_size(path, record.kernel.size)?;
    let seen = Seen::of(path);
    if seen.is_some() && seen == record.seen {
        return Ok(record);
    }
    check_content(path, &record.kernel)?;
    let record = Record { seen, ..record };
    // Only saves time: where it cannot be written (a read-only cache), the next load hashes again.
    let _ = write_record(store, &record);
    Ok(record)
}

fn check_content(path: &Path, piece: &Piece) -> Result<(), KernelError> {
    let bytes = atomic::read(path, piece.size).map_err(KernelError::file("read", path))?;
    if atomic::sha256(&bytes) == piece.sha256 {
        return Ok(());
    }
    Err(KernelError::Corrupt { path: path.to_owned(), problem: "is not what was recorded" })
}

fn write_record(store: &Path, record: &Record) -> Result<(), KernelError> {
    let path = store.join("current.json");
    let text = serde_json::to_vec_pretty(record).map_err(|error| KernelError::File {
        action: "write",
        path: path.clone(),
        source: error.into(),
    })?;
    atomic::write(&path, &text).map_err(KernelError::file("write", &path))
}

fn check_size(path: &Path, size: u64) -> Result<(), KernelError> {
    let corrupt = |problem| KernelError::Corrupt { path: path.to_owned(), problem };
    match fs::metadata(path) {
        Ok(data) if data.is_file() && data.len() == size => Ok(()),
        Ok(_) => Err(corrupt("has another size than recorded")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(corrupt("is missing")),
        Err(source) => Err(KernelError::File { action: "read", path: path.to_owned(), source }),
    }
}

/// The initramfs of this kernel and this guest agent; made where it is not there yet (another version of the program).
fn ensure_initramfs(store: &Path, record: &Record, init: &[u8], key: &str) -> Result<PathBuf, KernelError> {
    let modules: String =
        record.modules.iter().map(|piece| format!("{} {}\n", piece.name, piece.sha256)).collect();
    let key = atomic::sha256(format!("{}\n{modules}{key}", record.kernel.sha256).as_bytes());
    let path = store.join(format!("initramfs-{}.cpio", &key[..16]));
    let lengths = record.modules.iter().map(|piece| (piece.name.as_str(), piece.size as usize));
    let size = initramfs::size(init.len(), lengths) as u64;
    if fs::metadata(&path).is_ok_and(|data| data.is_file() && data.len() == size) {
        return Ok(path);
    }
    let mut contents = Vec::new();
    for piece in &record.modules {
        let file = store.join(&record.directory).join(format!("{}.ko", piece.name));
        let bytes = atomic::read(&file, piece.size).unwrap_or_default();
        if atomic::sha256(&bytes) != piece.sha256 {
            return Err(KernelError::Corrupt { path: file, problem: "is not what was recorded" });
        }
        contents.push((piece.name.as_str(), bytes));
    }
    let archive = initramfs::build(init, contents.iter().map(|(name, bytes)| (*name, bytes.as_slice())));
    atomic::write(&path, &archive).map_err(KernelError::file("write", &path))?;
    Ok(path)
}

/// Finds or fetches a kernel, unpacks it and its modules into the cache, and records it. Does nothing if the cache
/// already has the right one.
///
/// Looks at `kernel.path`; else the cache; else a readable `/boot/vmlinuz-*` with its `/lib/modules`; else the
/// distribution's package, unpacked without being installed. Needs no root. May take minutes (download).
///
/// # Errors
/// [`KernelError`]; [`KernelError::hint`] says what a user can do.
pub fn prepare(options: &KernelOptions, progress: &mut dyn FnMut(Progress)) -> Result<Kernel, KernelError> {
    let store = store(&options.cache);
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(&store).map_err(KernelError::file("create", &store))?;
    atomic::sweep(&store);

    if let Some(path) = &options.configured {
        if let Ok(kernel) = verified(options) {
            return Ok(kernel);
        }
        take(&store, &configured_kernel(path), Some(path), progress)?;
        return load(&options.cache, Some(path));
    }
    if let Ok(kernel) = verified(options) {
        return Ok(kernel);
    }
    for found in boot_kernels(Path::new("/boot"), Path::new("/lib/modules")) {
        match take(&store, &found, None, progress) {
            Ok(()) => return load(&options.cache, None),
            Err(error) => tracing::info!(kernel = %found.file.display(), %error, "kernel passed over"),
        }
    }
    if options.offline {
        return Err(KernelError::Offline);
    }
    let unpacked = package::fetch(&store, progress)?;
    let found = package_kernel(unpacked.root(), unpacked.name())?;
    take(&store, &found, None, progress)?;
    drop(unpacked);
    load(&options.cache, None)
}

/// [`load`], and the hash in any case: setup is where a damaged cache is found out and mended.
fn verified(options: &KernelOptions) -> Result<Kernel, KernelError> {
    let kernel = load(&options.cache, options.configured.as_deref())?;
    check_content(&kernel.vmlinux, &read_record(&store(&options.cache))?.kernel)?;
    Ok(kernel)
}

/// `kernel.path`, with modules beside it (`../lib/modules/<release>` of a package's tree) or on the host.
fn configured_kernel(path: &Path) -> Found {
    Found { file: path.to_owned(), modules: None, config: None, origin: path.display().to_string() }
}

/// The host's own kernels, newest first, as far as this user may read them and their modules.
fn boot_kernels(boot: &Path, modules: &Path) -> Vec<Found> {
    let Ok(entries) = fs::read_dir(boot) else { return Vec::new() };
    let mut found: Vec<(std::time::SystemTime, Found)> = Vec::new();
    for entry in entries.flatten() {
        let file = entry.path();
        let Some(release) =
            entry.file_name().to_str().and_then(|name| name.strip_prefix("vmlinuz-")).map(str::to_owned)
        else {
            continue;
        };
        let modules = modules.join(&release);
        if File::open(&file).is_err() || !modules.join("kernel").is_dir() {
            continue;
        }
        let time = entry.metadata().and_then(|data| data.modified()).unwrap_or(std::time::UNIX_EPOCH);
        let origin = file.display().to_string();
        let config = Some(boot.join(format!("config-{release}")));
        found.push((time, Found { file, modules: Some(modules), config, origin }));
    }
    found.sort_by_key(|(time, _)| std::cmp::Reverse(*time));
    found.into_iter().map(|(_, found)| found).collect()
}

/// The kernel in a package's unpacked tree, whose modules lie under `lib` or `usr/lib`.
fn package_kernel(root: &Path, name: &str) -> Result<Found, KernelError> {
    let modules = ["lib/modules", "usr/lib/modules"].map(|folder| root.join(folder));
    let found = modules.iter().flat_map(|modules| boot_kernels(&root.join("boot"), modules)).next();
    let mut found = found.ok_or_else(|| PackageError::NoKernel { package: name.to_owned() })?;
    found.origin = format!("package {name}");
    Ok(found)
}

/// Reads a found kernel and its modules and makes them the cache's current ones.
fn take(
    store: &Path,
    found: &Found,
    configured: Option<&Path>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), KernelError> {
    progress(Progress::Unpacking { what: found.origin.clone() });
    let stamp = configured.map(Stamp::of).transpose().map_err(KernelError::file("read", &found.file))?;
    let file = atomic::read(&found.file, image::KERNEL_LIMIT as u64)
        .map_err(KernelError::file("read", &found.file))?;
    let boot =
        image::parse(&file).map_err(|source| KernelError::Image { path: found.file.clone(), source })?;
    if let Some(note) = &boot.note {
        tracing::warn!(kernel = %found.file.display(), note, "the kernel starts more slowly: it unpacks itself");
    }
    let modules = match found.modules.clone().or_else(|| modules_beside(&found.file, &boot.release)) {
        Some(directory) => {
            let strip = !signatures_enforced(found.config.as_deref());
            modules::Library::open(&directory, strip)?.gather(modules::ROOTS)?
        }
        None => Vec::new(),
    };
    let kernel = boot.unpacked.unwrap_or(file);
    install(store, boot.release, found.origin.clone(), stamp, &kernel, &modules)
}

fn modules_beside(kernel: &Path, release: &str) -> Option<PathBuf> {
    let parent = kernel.parent()?;
    let beside =
        [parent.join("../lib/modules"), parent.join("../usr/lib/modules"), parent.join("lib/modules")];
    let host = PathBuf::from("/lib/modules");
    beside
        .into_iter()
        .chain([host])
        .map(|folder| folder.join(release))
        .find(|folder| folder.join("kernel").is_dir())
}

/// Unknown counts as enforced: a module with a signature loads everywhere.
fn signatures_enforced(config: Option<&Path>) -> bool {
    let text = config.and_then(|path| atomic::read(path, CONFIG_LIMIT).ok()).unwrap_or_default();
    let mut lines = text.split(|byte| *byte == b'\n').peekable();
    text.is_empty() || lines.any(|line| line == b"CONFIG_MODULE_SIG_FORCE=y")
}

fn install(
    store: &Path,
    release: String,
    origin: String,
    configured: Option<Stamp>,
    kernel: &[u8],
    modules: &[modules::Module],
) -> Result<(), KernelError> {
    let piece = Piece::of("vmlinux", kernel);
    let directory = format!("{release}-{}", &piece.sha256[..12]);
    let place = store.join(&directory);
    let temporary = atomic::sibling(&place);
    let written = write_directory(&temporary, kernel, modules);
    if written.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    written.map_err(KernelError::file("write", &temporary))?;
    replace_directory(&temporary, &place).map_err(KernelError::file("write", &place))?;

    let modules = modules.iter().map(|module| Piece::of(&module.name, &module.bytes)).collect();
    let seen = Seen::of(&place.join("vmlinux"));
    let version = RECORD_VERSION;
    write_record(
        store,
        &Record { version, release, origin, configured, directory, kernel: piece, seen, modules },
    )
}

fn write_directory(directory: &Path, kernel: &[u8], modules: &[modules::Module]) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o755).create(directory)?;
    atomic::write_new(&directory.join("vmlinux"), kernel)?;
    for module in modules {
        atomic::write_new(&directory.join(format!("{}.ko", module.name)), &module.bytes)?;
    }
    File::open(directory)?.sync_all()
}

/// A directory of that name holds the same kernel, or a damaged copy of it: it makes way. Machines that run from it
/// hold its files open.
fn replace_directory(new: &Path, place: &Path) -> io::Result<()> {
    let old = atomic::sibling(place);
    match fs::rename(place, &old) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    fs::rename(new, place)?;
    let _ = fs::remove_dir_all(&old);
    atomic::sync_parent(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(result: Result<Kernel, KernelError>) -> &'static str {
        match result {
            Err(KernelError::Corrupt { problem, .. }) => problem,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn damage_is_told_and_mended() {
        let home = tempfile::tempdir().expect("a directory");
        let file = home.path().join("vmlinux");
        let mut elf = image::tests::elf_with_note(18);
        elf.extend(b"Linux version 6.1.0-test (x)");
        fs::write(&file, &elf).expect("written");
        let cache = home.path().join("cache");
        let options = KernelOptions { cache: cache.clone(), configured: Some(file.clone()), offline: true };
        assert!(matches!(load(&cache, None), Err(KernelError::Missing)));

        let kernel = prepare(&options, &mut |_| ()).expect("prepared");
        assert_eq!(kernel.release, "6.1.0-test");
        assert_eq!(load(&cache, Some(&file)).expect("loads"), kernel);
        assert_eq!(load(&cache, None).expect("loads"), kernel);
        let other = home.path().join("other");
        assert!(matches!(load(&cache, Some(&other)), Err(KernelError::Stale)));

        fs::write(&kernel.vmlinux, vec![0; elf.len()]).expect("overwritten");
        assert_eq!(cause(load(&cache, None)), "is not what was recorded");
        fs::write(&kernel.vmlinux, b"short").expect("overwritten");
        assert_eq!(cause(load(&cache, None)), "has another size than recorded");
        fs::remove_file(&kernel.vmlinux).expect("removed");
        assert_eq!(cause(load(&cache, None)), "is missing");
        prepare(&options, &mut |_| ()).expect("mended");
        assert_eq!(load(&cache, None).expect("loads"), kernel);

        fs::write(cache.join("kernel/current.json"), "{").expect("overwritten");
        assert_eq!(cause(load(&cache, None)), "is not a record of this program");
        fs::write(&file, "no kernel").expect("overwritten");
        assert!(matches!(prepare(&options, &mut |_| ()), Err(KernelError::Image { .. })));
    }
}
