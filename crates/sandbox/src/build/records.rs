//! Records of what was built, one file an image, and the lock that keeps names and records together.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use agentkernel_image::Reference;
use serde::{Deserialize, Serialize};

use super::docker::Docker;
use super::{DOCKER, ENGINE_LABEL, check_name, name_of, reference_of};
use crate::images::format_size;
use crate::problem::{Problem, io, plain};
use crate::state::{Home, private_file, write_atomically};

/// Name of the directory of records.
const RECORDS: &str = "image-metadata";
/// Name of the file in it that is locked while names change.
const LOCK: &str = "lock";

/// An image that was built here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalImage {
    /// Its name.
    pub name: String,
    /// Digest of its configuration, `sha256:...`.
    pub image_id: String,
    /// Bytes of its layers, uncompressed.
    pub size_bytes: u64,
    /// When, RFC 3339.
    pub built_at: String,
    /// The Dockerfile.
    pub dockerfile: Option<String>,
    /// The build context.
    pub context: Option<String>,
    /// Labels of the image.
    #[serde(default)]
    pub labels: HashMap<String, String>,
}

impl LocalImage {
    /// Its size for people: base 1024, one decimal above bytes.
    pub fn format_size(&self) -> String {
        format_size(self.size_bytes)
    }

    /// Whether Docker built it.
    pub(super) fn is_dockers(&self) -> bool {
        self.labels.get(ENGINE_LABEL).is_some_and(|engine| engine == DOCKER)
    }

    /// What it is called in the store, and in Docker once it is loaded there.
    pub fn docker_ref(&self) -> String {
        reference_of(&self.name)
    }
}

/// Every record, by its file's name; one that cannot be read, or tells of another image than its file, is an error of its
/// own.
pub(super) fn all(home: &Home) -> Result<Vec<Result<LocalImage, Problem>>, Problem> {
    let directory = home.path().join(RECORDS);
    let entries = match std::fs::read_dir(&directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io(format!("read {}", directory.display())))?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(io(format!("read {}", directory.display())))?.path();
        if path.extension().is_some_and(|ending| ending == "json") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths.iter().filter_map(|path| read(path).transpose()).collect())
}

/// One record; `None` if it was removed meanwhile.
fn read(path: &Path) -> Result<Option<LocalImage>, Problem> {
    let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
    let damaged = |why: String| {
        let hint = match check_name(name) {
            Ok(()) => format!("agentkernel images rm {name}, and build it again"),
            Err(_) => "remove it, and build the image again".to_owned(),
        };
        plain("image-record", format!("the record {} is damaged: {why}", path.display()), Some(&hint))
    };
    let text = match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(|error| damaged(error.to_string()))?,
    };
    let record: LocalImage = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
    if record.name != name {
        return Err(damaged("it tells of another image".to_owned()));
    }
    Ok(Some(record))
}

/// What is wrong with records that cannot be read.
///
/// # Errors
/// If their directory cannot be read.
pub(crate) fn damaged_records(home: &Home) -> Result<Vec<Problem>, Problem> {
    Ok(all(home)?.into_iter().filter_map(Result::err).collect())
}

/// Held while an image's name and its record change: both tell of the same image then, whoever else builds it meanwhile.
pub(crate) fn alone(home: &Home) -> Result<File, Problem> {
    let directory = home.path().join(RECORDS);
    std::fs::create_dir_all(&directory).map_err(io(format!("make {}", directory.display())))?;
    let path = directory.join(LOCK);
    let opened = private_file().create(true).truncate(false).open(&path);
    let file = opened.map_err(io(format!("open {}", path.display())))?;
    // Whoever holds it only names an image; the dead hold nothing.
    loop {
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive) {
            Err(rustix::io::Errno::INTR) => {}
            locked => {
                locked.map_err(|error| io(format!("lock {}", path.display()))(error.into()))?;
                return Ok(file);
            }
        }
    }
}

/// Where the record of an image lies.
pub(super) fn path(home: &Home, name: &str) -> PathBuf {
    home.path().join(RECORDS).join(format!("{name}.json"))
}

/// Removes an image from Docker as well, if that built it.
///
/// # Errors
/// If Docker does not answer, or does not remove it.
pub(crate) fn remove_from_docker(home: &Home, full_name: &str) -> Result<(), Problem> {
    let familiar = full_name.parse::<Reference>().map(|reference| reference.familiar()).unwrap_or_default();
    let record = name_of(&familiar).and_then(|name| std::fs::read(path(home, name)).ok());
    match record.and_then(|text| serde_json::from_slice::<LocalImage>(&text).ok()) {
        Some(record) if record.is_dockers() => Docker(Path::new(DOCKER)).remove(&record.docker_ref()),
        _ => Ok(()),
    }
}

/// Forgets the record of an image that lost its name.
pub(crate) fn forget(home: &Home, full_name: &str) {
    let familiar = full_name.parse::<Reference>().map(|reference| reference.familiar()).unwrap_or_default();
    if let Some(name) = name_of(&familiar) {
        // What stays is told by `sync`.
        let _ = std::fs::remove_file(path(home, name));
    }
}

/// Forgets a record whose image is gone, damaged or not. True if there was one.
pub(crate) fn forget_record(home: &Home, name: &str) -> bool {
    check_name(name).is_ok() && std::fs::remove_file(path(home, name)).is_ok()
}

/// Writes a record, in place of a former one.
pub(super) fn keep(home: &Home, record: &LocalImage) -> Result<(), Problem> {
    let path = path(home, &record.name);
    let text =
        serde_json::to_vec_pretty(record).map_err(|error| plain("image-record", error.to_string(), None))?;
    write_atomically(&path, &text).map_err(io(format!("write {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_read_and_print_as_they_are_known() {
        let text = r#"{"name":"t","image_id":"sha256:00","size_bytes":104857600,"built_at":"2026-01-01T00:00:00Z",
            "dockerfile":null,"context":null}"#;
        let image: LocalImage = serde_json::from_str(text).unwrap();
        assert_eq!((image.format_size().as_str(), image.docker_ref().as_str()), ("100.0MB", "agentkernel-t"));
        assert!(image.labels.is_empty());
    }
}
