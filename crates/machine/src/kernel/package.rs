//! The distribution's kernel package, downloaded and unpacked without being installed, and without root.
//!
//! The names users know are metapackages of a kilobyte; the kernel is in what they depend on. `apt-get download` checks
//! what it fetched against the signed package lists.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::Progress;
use super::command::{Finished, run};
use crate::atomic;

/// Debian's, then Ubuntu's.
const METAPACKAGES: &[&str] = &["linux-image-amd64", "linux-image-virtual", "linux-image-generic"];
const QUERY_LIMIT: Duration = Duration::from_secs(60);
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(900);
const UNPACK_LIMIT: Duration = Duration::from_secs(300);

/// Why the package could not be had.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// This is neither Debian nor Ubuntu.
    #[error("{program} is not installed: kernels are fetched on Debian and Ubuntu only")]
    NoPackageManager {
        /// The command that was not found.
        program: &'static str,
    },
    /// No package list has a kernel.
    #[error("the package lists have no kernel package")]
    NotListed,
    /// The mirror no longer has the version the list names.
    #[error("the package lists are older than the mirror: {reason}")]
    StaleLists {
        /// What apt said.
        reason: String,
    },
    /// A package tool failed.
    #[error("{program} failed: {reason}")]
    Failed {
        /// Which.
        program: &'static str,
        /// What it said last.
        reason: String,
    },
    /// A package tool could not be run, or took too long.
    #[error("cannot run {program}")]
    Run {
        /// Which.
        program: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The download's directory cannot be made.
    #[error("cannot use {}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The package holds no kernel with modules.
    #[error("the package {package} holds no kernel with modules")]
    NoKernel {
        /// Its name.
        package: String,
    },
}

impl PackageError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotListed | Self::StaleLists { .. } => {
                Some("sudo apt-get update, then agentkernel setup".to_owned())
            }
            Self::NoPackageManager { .. } | Self::NoKernel { .. } => {
                Some("set kernel.path in the configuration to a kernel (vmlinuz)".to_owned())
            }
            Self::Failed { .. } | Self::Run { .. } | Self::Directory { .. } => None,
        }
    }
}

/// An unpacked package; its directory goes with this value.
pub(crate) struct Unpacked {
    directory: PathBuf,
    name: String,
}

impl Unpacked {
    pub(crate) fn root(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Unpacked {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Downloads and unpacks the distribution's kernel into a private directory of `store`.
pub(crate) fn fetch(store: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Unpacked, PackageError> {
    progress(Progress::Resolving);
    let packages = resolve(&mut dependencies)?;
    let directory = atomic::sibling(&store.join("package"));
    let using = |source| PackageError::Directory { path: directory.clone(), source };
    fs::create_dir(&directory).map_err(using)?;
    let name = packages.first().cloned().unwrap_or_default();
    let unpacked = Unpacked { directory: directory.clone(), name };

    progress(Progress::Downloading { packages: packages.clone() });
    let mut apt = Command::new("apt-get");
    apt.current_dir(&directory)
        .args(["download", "-q", "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30"])
        // As root apt would want to download as a user who cannot enter our directory.
        .args(["-o", "APT::Sandbox::User=root", "--"])
        .args(&packages);
    let finished = finish("apt-get", &mut apt, DOWNLOAD_LIMIT)?;
    if !finished.status.success() {
        return Err(download_error(&finished));
    }
    for entry in fs::read_dir(&directory).map_err(using)?.flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|end| end != "deb") {
            continue;
        }
        progress(Progress::Unpacking { what: entry.file_name().to_string_lossy().into_owned() });
        let finished =
            finish("dpkg-deb", Command::new("dpkg-deb").arg("-x").arg(&path).arg(&directory), UNPACK_LIMIT)?;
        if !finished.status.success() {
            return Err(PackageError::Failed { program: "dpkg-deb", reason: last_line(&finished.errors) });
        }
        fs::remove_file(&path).map_err(using)?;
    }
    Ok(unpacked)
}

fn finish(program: &'static str, command: &mut Command, limit: Duration) -> Result<Finished, PackageError> {
    run(command, limit).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => PackageError::NoPackageManager { program },
        _ => PackageError::Run { program, source },
    })
}

/// What a package depends on, as the lists say; empty if they do not know it.
fn dependencies(package: &str) -> Result<Vec<String>, PackageError> {
    let finished = finish("apt-cache", Command::new("apt-cache").args(["depends", package]), QUERY_LIMIT)?;
    Ok(parse_dependencies(&finished.output))
}

fn parse_dependencies(output: &str) -> Vec<String> {
    let lines =
        output.lines().filter_map(|line| line.trim_start_matches([' ', '|']).strip_prefix("Depends: "));
    // A package's name may start no option and lead nowhere.
    let valid = |name: &&str| {
        name.starts_with(|first: char| first.is_ascii_alphanumeric())
            && name.chars().all(|character| character.is_ascii_alphanumeric() || "+-.".contains(character))
    };
    lines.map(str::trim).filter(valid).map(str::to_owned).collect()
}

type Query<'a> = &'a mut dyn FnMut(&str) -> Result<Vec<String>, PackageError>;

/// The package with the kernel and, where the distribution splits them off, the one with its modules.
fn resolve(query: Query<'_>) -> Result<Vec<String>, PackageError> {
    for metapackage in METAPACKAGES {
        let image = query(metapackage)?.into_iter().find(|name| name.starts_with("linux-image-"));
        if let Some(image) = image {
            let modules = query(&image)?.into_iter().find(|name| name.starts_with("linux-modules-"));
            return Ok([image].into_iter().chain(modules).collect());
        }
    }
    Err(PackageError::NotListed)
}

fn download_error(finished: &Finished) -> PackageError {
    let reason = last_line(&finished.errors);
    let stale = ["404", "Unable to locate", "Can't find a source", "no longer", "Hash Sum mismatch"];
    if stale.iter().any(|sign| finished.errors.contains(sign)) {
        return PackageError::StaleLists { reason };
    }
    PackageError::Failed { program: "apt-get", reason }
}

fn last_line(text: &str) -> String {
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    line.trim().chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = "linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n";
    const UBUNTU: &str = "linux-image-6.8.0-1-generic\n  Depends: kmod\n |Depends: <fuse>\n  Depends: linux-modules-6.8.0-1-generic\n";

    #[test]
    fn a_metapackage_leads_to_the_kernel_and_its_modules() {
        let mut debian =
            |name: &str| Ok(parse_dependencies(if name == "linux-image-amd64" { DEBIAN } else { "" }));
        assert_eq!(resolve(&mut debian).expect("resolves"), ["linux-image-6.1.0-56-amd64"]);

        let mut ubuntu = |name: &str| {
            Ok(parse_dependencies(match name {
                "linux-image-virtual" => "  Depends: linux-image-6.8.0-1-generic\n",
                "linux-image-6.8.0-1-generic" => UBUNTU,
                _ => "",
            }))
        };
        let expected = ["linux-image-6.8.0-1-generic", "linux-modules-6.8.0-1-generic"];
        assert_eq!(resolve(&mut ubuntu).expect("resolves"), expected);
        assert!(matches!(resolve(&mut |_| Ok(Vec::new())), Err(PackageError::NotListed)));
    }
}
