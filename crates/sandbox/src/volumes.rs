//! Named volumes: directories of the state directory that outlive the sandboxes they are mounted in.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::deadline::rfc3339;
use crate::problem::{Problem, io, plain};
use crate::spec::{MountSource, Spec, check_name};
use crate::state::{Home, random_word};

/// A named volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Its directory on the host.
    pub path: PathBuf,
    /// When it was made or its own entries last changed, RFC 3339.
    pub modified_at: String,
    /// Bytes its files take on the host's disk.
    pub size_bytes: u64,
    /// Sandboxes that mount it.
    pub used_by: Vec<String>,
}

impl Home {
    fn volumes(&self) -> PathBuf {
        self.path().join("volumes")
    }

    /// The directory of an existing volume.
    pub(crate) fn volume(&self, name: &str) -> Result<PathBuf, Problem> {
        check_volume_name(name)?;
        let path = self.volumes().join(name);
        if path.is_dir() {
            return Ok(path);
        }
        let hint = "agentkernel volume list shows those there are, agentkernel volume create NAME makes one";
        Err(plain("not-found", format!("there is no volume called {name}"), Some(hint)))
    }

    /// Makes a volume; true if there was none of that name.
    ///
    /// # Errors
    /// If the name is none, or the disk is full or read-only.
    pub fn create_volume(&self, name: &str) -> Result<bool, Problem> {
        check_volume_name(name)?;
        let path = self.volumes().join(name);
        let what = || format!("make the volume {}", path.display());
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => {
                // Whoever the guest's programs run as may use it; who reaches it here is up to the state directory.
                fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).map_err(io(what()))?;
                Ok(true)
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(io(what())(error)),
        }
    }

    /// All volumes, by name. Their sizes are counted only if `measured`.
    ///
    /// # Errors
    /// If the state directory cannot be read.
    pub fn list_volumes(&self, measured: bool) -> Result<Vec<Volume>, Problem> {
        let what = || format!("list {}", self.volumes().display());
        let specs: Vec<Spec> =
            self.list()?.iter().filter_map(|sandbox| Spec::load(sandbox.path()).ok()).collect();
        let mut volumes = Vec::new();
        for entry in fs::read_dir(self.volumes()).map_err(io(what()))? {
            let entry = entry.map_err(io(what()))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if check_volume_name(&name).is_err() {
                continue;
            }
            let modified = entry.metadata().and_then(|metadata| metadata.modified()).map_err(io(what()))?;
            let since = modified.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            let uses = |spec: &&Spec| {
                spec.mounts.iter().any(|mount| mount.source == MountSource::Volume(name.clone()))
            };
            volumes.push(Volume {
                modified_at: rfc3339(u64::try_from(since.as_millis()).unwrap_or_default()),
                size_bytes: if measured { disk_usage(&entry.path()) } else { 0 },
                used_by: specs.iter().filter(uses).map(|spec| spec.name.clone()).collect(),
                path: entry.path(),
                name,
            });
        }
        volumes.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(volumes)
    }

    /// Removes a volume and all that is in it.
    ///
    /// # Errors
    /// Code `in-use` if a sandbox mounts it, `not-found` if there is none.
    pub fn remove_volume(&self, name: &str) -> Result<(), Problem> {
        let path = self.volume(name)?;
        let users = self.list_volumes(false)?.into_iter().find(|volume| volume.name == name);
        if let Some(user) = users.as_ref().and_then(|volume| volume.used_by.first()) {
            let hint = Some("remove the sandboxes that mount it first: agentkernel rm NAME");
            return Err(plain("in-use", format!("the volume {name} is mounted in {user}"), hint));
        }
        let trash = self.path().join("trash").join(random_word());
        fs::rename(&path, &trash).map_err(io(format!("remove {}", path.display())))?;
        fs::remove_dir_all(&trash).map_err(io(format!("remove {}", trash.display())))
    }
}

fn check_volume_name(name: &str) -> Result<(), Problem> {
    check_name(name)
        .map_err(|problem| Problem { message: format!("{name:?} is not a volume name"), ..problem })
}

/// Bytes on disk of a directory's files, symlinks not followed.
pub fn disk_usage(directory: &Path) -> u64 {
    let mut pending = vec![directory.to_owned()];
    let mut bytes = 0;
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            bytes += metadata.blocks() * 512;
            if metadata.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    bytes
}
