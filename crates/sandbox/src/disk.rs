//! The writable layer of a sandbox: a sparse ext4 image, made once per size and copied for each sandbox.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use agentkernel_machine::memory::copy_sparsely;

use crate::problem::{Problem, io, plain};
use crate::spec::{Image, Spec};
use crate::state::{private_file, random_word};

/// Name of the writable layer in a sandbox's directory.
pub(crate) const FILE_NAME: &str = "disk.ext4";
/// Bytes of disk for each inode: an agent's `node_modules` has many small files, a full table costs start-up time.
const BYTES_PER_INODE: u32 = 32 << 10;
/// Smallest disk that holds the file system's own structures with some use left, MiB.
pub(crate) const SMALLEST_MIB: u64 = 64;

/// What a disk of a machine is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The writable layer.
    Writable,
    /// An image's root, read-only.
    Image,
}

/// Opens the disks of the sandbox in `directory`, in the order in which its machine has them.
///
/// # Errors
/// If one cannot be opened.
pub(crate) fn all(spec: &Spec, directory: &Path) -> Result<Vec<(File, Kind)>, Problem> {
    let writable = directory.join(FILE_NAME);
    let file = private_file().open(&writable).map_err(io(format!("open {}", writable.display())))?;
    let mut disks = vec![(file, Kind::Writable)];
    if let Image::Disk { path, .. } = &spec.image {
        let file = File::open(path).map_err(io(format!("open {}", path.display())))?;
        disks.push((file, Kind::Image));
    }
    Ok(disks)
}

/// Puts a fresh writable layer of `size_mib` MiB at `target`, which must not exist.
///
/// # Errors
/// If `mke2fs` is missing or fails, or the disk is full.
pub(crate) fn create(cache: &Path, size_mib: u64, target: &Path) -> Result<File, Problem> {
    copy(&template(cache, size_mib)?, target)
}

/// Puts a copy of the writable layer `source` at `target`, which must not exist.
///
/// # Errors
/// If the disk is full.
pub(crate) fn copy(source: &Path, target: &Path) -> Result<File, Problem> {
    let what = || format!("write the disk {}", target.display());
    let source = File::open(source).map_err(io(format!("read {}", source.display())))?;
    let file = private_file().create_new(true).open(target).map_err(io(what()))?;
    match copy_sparsely(&source, &file) {
        Ok(()) => Ok(file),
        Err(error) => {
            let _ = fs::remove_file(target);
            Err(io(what())(error))
        }
    }
}

/// Finds or makes the empty file system of this size.
fn template(cache: &Path, size_mib: u64) -> Result<PathBuf, Problem> {
    let path = cache.join(format!("ext4-{size_mib}.img"));
    if path.exists() {
        return Ok(path);
    }
    let draft = cache.join(format!(".new-{}", random_word()));
    let made = make(&draft, size_mib).and_then(|()| fs::rename(&draft, &path).map_err(io("name a new disk")));
    if made.is_err() {
        let _ = fs::remove_file(&draft);
    }
    made.map(|()| path)
}

fn make(path: &Path, size_mib: u64) -> Result<(), Problem> {
    let file = private_file().create_new(true).open(path).map_err(io("make a disk"))?;
    file.set_len(size_mib << 20).map_err(io("make a disk"))?;
    let program =
        ["/usr/sbin/mke2fs", "/sbin/mke2fs", "/usr/bin/mke2fs"].iter().find(|path| Path::new(path).exists());
    let Some(program) = program else {
        let hint = "apt-get install e2fsprogs";
        return Err(plain(
            "mke2fs-missing",
            "mke2fs, which makes the sandboxes' disks, is not installed",
            Some(hint),
        ));
    };
    let journal_mib = (size_mib / 64).clamp(4, 16);
    let output = Command::new(program)
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-i", &BYTES_PER_INODE.to_string()])
        .args(["-J", &format!("size={journal_mib}")])
        .args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"])
        .arg(path)
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .map_err(io(format!("run {program}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(plain("mke2fs-failed", format!("mke2fs failed ({}): {}", output.status, said.trim()), None))
}
