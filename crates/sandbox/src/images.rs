//! Images as users know them: by name, in the local store, with what uses them.

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use agentkernel_image::registry::{self, OnTransfer, RegistryError, RegistryOptions};
use agentkernel_image::{
    Digest, PreparedImage, Progress, Pruned, Reference, RootFileSystem, Store, StoreError, StoredImage,
    split_reference,
};
use serde::Serialize;
use serde_json::Value;

use crate::problem::{Problem, io, plain, problem};
use crate::spec::{Image, Spec};
use crate::state::Home;

/// The images of a state directory.
#[derive(Clone, Debug)]
pub struct Images {
    home: Home,
    store: Store,
}

/// One name of the store.
#[derive(Clone, Debug, Serialize)]
pub struct ImageInfo {
    /// The name, without what is understood.
    pub name: String,
    /// Digest of the configuration.
    pub image_id: Option<String>,
    /// Digest of the manifest.
    pub digest: Option<String>,
    /// When its maker says that it was made, RFC 3339.
    pub created: Option<String>,
    /// Bytes of its layers as stored.
    pub size_bytes: u64,
    /// Labels of its configuration.
    pub labels: BTreeMap<String, String>,
    /// Sandboxes made from it.
    pub used_by: Vec<String>,
    /// Why it cannot be used, if so.
    pub problem: Option<String>,
}

/// All that `images inspect` says.
#[derive(Clone, Debug, Serialize)]
pub struct ImageDetails {
    /// As `images list` has it.
    #[serde(flatten)]
    pub info: ImageInfo,
    /// All its names.
    pub names: Vec<String>,
    /// Digests of the layers as stored, lowest first.
    pub layers: Vec<String>,
    /// The configuration document.
    pub configuration: Value,
}

/// Host and port of a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryPlace(String);

impl RegistryPlace {
    /// Whether it is an address, or this machine: no registry that is everybody's is named so.
    pub fn is_private(&self) -> bool {
        let host = match self.0.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
            _ => &self.0,
        };
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let numeric = bare.rsplit('.').next().is_some_and(|last| {
            last.bytes().all(|byte| byte.is_ascii_digit()) || last.to_ascii_lowercase().starts_with("0x")
        });
        numeric || bare.contains(':') || !bare.contains('.')
    }
}

/// What `images prune` removed, or would remove.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PrunedImages {
    /// Of the store.
    #[serde(flatten)]
    pub blobs: Pruned,
    /// Root file systems that neither a name nor a sandbox needs.
    pub root_file_systems: usize,
    /// Their bytes on the disk.
    pub root_file_system_bytes: u64,
}

impl Images {
    /// Opens the store of a state directory.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(home: &Home) -> Result<Self, Problem> {
        let store = Store::open(&home.path().join("images")).map_err(store_problem)?;
        Ok(Self { home: home.clone(), store })
    }

    /// What a name that `build` gave is called in the store; any other stays as it is.
    pub fn resolve(&self, name: &str) -> String {
        let bare = name.strip_suffix(":latest").unwrap_or(name);
        let reference = crate::build::reference_of(bare);
        let is_built = crate::build::check_name(bare).is_ok() && self.store.find(&reference).is_ok();
        if is_built { reference } else { name.to_owned() }
    }

    /// The image that a name or id means.
    fn find(&self, name: &str) -> Result<StoredImage, Problem> {
        self.store.find(&self.resolve(name)).map_err(store_problem)
    }

    /// The store itself.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Every name, sorted.
    ///
    /// # Errors
    /// If the store or the sandboxes cannot be listed.
    pub fn list(&self) -> Result<Vec<ImageInfo>, Problem> {
        let users = self.users()?;
        let listed = self.store.list().map_err(store_problem)?.into_iter();
        Ok(listed
            .map(|listed| match listed.image {
                Ok(image) => self.info(&image, &users),
                Err(error) => ImageInfo {
                    name: familiar(&listed.name),
                    image_id: None,
                    digest: None,
                    created: None,
                    size_bytes: 0,
                    labels: BTreeMap::new(),
                    used_by: Vec::new(),
                    problem: Some(store_problem(error).message),
                },
            })
            .collect())
    }

    /// Everything about an image.
    ///
    /// # Errors
    /// Code `image-not-found`, or if it is damaged.
    pub fn inspect(&self, name: &str) -> Result<ImageDetails, Problem> {
        let image = self.find(name)?;
        let document = self.store.read_blob(&image.image_id).map_err(store_problem)?;
        let configuration = serde_json::from_slice(&document).map_err(|error| {
            plain("image", format!("the configuration of {name} is damaged: {error}"), None)
        })?;
        let all = self.store.list().map_err(store_problem)?.into_iter();
        let same = all.filter_map(|listed| listed.image.ok()).filter(|other| other.digest == image.digest);
        Ok(ImageDetails {
            info: self.info(&image, &self.users()?),
            names: same.map(|other| familiar(&other.name)).collect(),
            layers: image.layers.iter().map(|layer| layer.digest.to_string()).collect(),
            configuration,
        })
    }

    /// Brings images of a layout or an archive in; the names they have now.
    ///
    /// # Errors
    /// If one of them is damaged or has no name; nothing is named then.
    pub fn load(
        &self,
        source: &str,
        name: Option<&str>,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Vec<String>, Problem> {
        let reference = name.map(parse).transpose()?;
        let (path, tag) = split_reference(source);
        let loaded = self
            .store
            .load(&path, tag.as_deref(), reference.as_ref(), &mut |step| progress(&describe("loading", step)))
            .map_err(store_problem)?;
        Ok(loaded.iter().map(|image| familiar(&image.name)).collect())
    }

    /// Writes images as an archive that this program and Docker load.
    ///
    /// # Errors
    /// Code `image-not-found`; if `output` takes no more.
    pub fn save(&self, names: &[String], output: impl Write) -> Result<(), Problem> {
        let images = names.iter().map(|name| self.find(name)).collect::<Result<Vec<_>, _>>();
        self.store.save(&images?, output).map_err(store_problem)
    }

    /// A file without a name on the store's disk, for an archive that comes as a stream.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn scratch(&self) -> Result<std::fs::File, Problem> {
        self.store.writing().and_then(|writing| writing.scratch()).map_err(store_problem)
    }

    /// Gives an image another name.
    ///
    /// # Errors
    /// Code `image-not-found`, or if the new name is none.
    pub fn tag(&self, existing: &str, name: &str) -> Result<(), Problem> {
        let reference = parse(name)?;
        let image = self.find(existing)?;
        self.store.tag(&image, &reference).map_err(store_problem)
    }

    /// Fetches an image from its registry; its name.
    ///
    /// # Errors
    /// If there is no such image, the registry cannot be reached or does not want us, or the disk is full.
    pub async fn pull(
        &self,
        name: &str,
        options: &RegistryOptions,
        on_transfer: OnTransfer<'_>,
    ) -> Result<String, Problem> {
        let reference = parse(name)?;
        let pulled = registry::pull(&self.store, &reference, options, on_transfer).await;
        Ok(familiar(&pulled.map_err(|error| registry_problem(&error))?.name))
    }

    /// Sends an image to a registry, under its own name or another; the digest of its manifest there.
    ///
    /// # Errors
    /// Code `image-not-found`, or if the registry cannot be reached or does not want it.
    pub async fn push(
        &self,
        name: &str,
        to: Option<&str>,
        options: &RegistryOptions,
        on_transfer: OnTransfer<'_>,
    ) -> Result<String, Problem> {
        let image = self.find(name)?;
        let reference = parse(to.unwrap_or(&image.name))?;
        let pushed = registry::push(&self.store, &image, &reference, options, on_transfer).await;
        Ok(pushed.map_err(|error| registry_problem(&error))?.to_string())
    }

    /// Whether `reference` is to be had without a registry: it is in the store, or a path.
    pub fn is_here(&self, reference: &str) -> bool {
        is_path(reference) || self.find(reference).is_ok() || split_reference(reference).0.exists()
    }

    /// Whether `reference` would be read of a file or directory of the host.
    pub fn is_file(&self, reference: &str) -> bool {
        is_path(reference) || (self.find(reference).is_err() && split_reference(reference).0.exists())
    }

    /// Whether `reference` can be asked for at a registry.
    ///
    /// # Errors
    /// Code `image-name`: it is no name of an image.
    pub fn check(&self, reference: &str) -> Result<(), Problem> {
        parse(reference).map(drop)
    }

    /// What is wrong with records of built images that cannot be read.
    ///
    /// # Errors
    /// If their directory cannot be read.
    pub fn damaged_records(&self) -> Result<Vec<Problem>, Problem> {
        crate::build::damaged_records(&self.home)
    }

    /// Where `reference` would be asked for.
    ///
    /// # Errors
    /// Code `image-name`: it is no name of an image.
    pub fn registry(&self, reference: &str) -> Result<RegistryPlace, Problem> {
        parse(reference).map(|reference| RegistryPlace(reference.registry))
    }

    /// A name of the store that looks like `name`, which is none.
    pub fn nearest(&self, name: &str) -> Option<String> {
        match self.store.find(name) {
            Err(StoreError::NotFound { nearest, .. }) => nearest,
            _ => None,
        }
    }

    /// Takes a name away and frees what nothing needs any more.
    ///
    /// # Errors
    /// Code `image-not-found`; `image-in-use` if it is the last name of what a sandbox was made from, unless `force`.
    pub fn remove(&self, name: &str, force: bool) -> Result<(), Problem> {
        let image = match self.find(name) {
            // A record without its image, which nothing else would take away if it cannot be read.
            Err(problem) if problem.code == "image-not-found" => {
                return if crate::build::forget_record(&self.home, name) { Ok(()) } else { Err(problem) };
            }
            found => found?,
        };
        let names = self.store.list().map_err(store_problem)?;
        let same = names.iter().filter_map(|listed| listed.image.as_ref().ok());
        let is_last = same.filter(|other| other.diff_ids == image.diff_ids).count() == 1;
        let used_by = self.info(&image, &self.users()?).used_by;
        if is_last && !force && !used_by.is_empty() {
            return Err(Problem {
                code: "image-in-use".to_owned(),
                message: format!("image {name} is used by {}", used_by.join(", ")),
                hint: Some(format!(
                    "agentkernel rm {} first; or --force, and they keep what they have",
                    used_by.join(" ")
                )),
            });
        }
        // With force, one that Docker built stays there if it does not answer.
        match crate::build::remove_from_docker(&self.home, &image.name) {
            Err(problem) if !force => return Err(problem),
            Err(problem) => tracing::debug!(problem = problem.message, "the image stays in Docker"),
            Ok(()) => {}
        }
        let alone = crate::build::alone(&self.home)?;
        self.store.untag(&parse(&image.name)?).map_err(store_problem)?;
        crate::build::forget(&self.home, &image.name);
        drop(alone);
        let kept = crate::build::cached_layers(&self.home);
        match self.prune_keeping(&kept, false) {
            // Left for the next one: a build or a pull is under way, or another image is damaged.
            Ok(_) => Ok(()),
            Err(problem) => {
                tracing::debug!(problem = problem.message, "blobs stay until the next prune");
                Ok(())
            }
        }
    }

    /// Frees what neither a name nor a sandbox needs, what earlier builds left included.
    ///
    /// # Errors
    /// Code `store-busy` while images are built or pulled; if an image is damaged.
    pub fn prune(&self, dry_run: bool) -> Result<PrunedImages, Problem> {
        let pruned = self.prune_keeping(&HashSet::new(), dry_run)?;
        if !dry_run {
            crate::build::forget_steps(&self.home)?;
        }
        Ok(pruned)
    }

    fn prune_keeping(&self, keep: &HashSet<Digest>, dry_run: bool) -> Result<PrunedImages, Problem> {
        let blobs = self.store.prune(keep, dry_run).map_err(store_problem)?;
        let mut keep: HashSet<PathBuf> = self.users()?.into_keys().collect();
        for listed in self.store.list().map_err(store_problem)? {
            keep.extend(listed.image.ok().map(|image| self.root_file_system(&image)));
        }
        let (root_file_systems, root_file_system_bytes) =
            RootFileSystem::prune(&self.root_file_systems(), &keep, dry_run)
                .map_err(|error| problem("image", &error, error.hint()))?;
        Ok(PrunedImages { blobs, root_file_systems, root_file_system_bytes })
    }

    /// Bytes that the store and the root file systems made from it take on the disk.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn disk_bytes(&self) -> Result<(u64, u64), Problem> {
        let blobs = self.store.disk_bytes().map_err(store_problem)?;
        let unpacked = RootFileSystem::disk_bytes(&self.root_file_systems())
            .map_err(io(format!("read {}", self.root_file_systems().display())))?;
        Ok((blobs, unpacked))
    }

    /// Makes the root file system of `reference` ready: a name of the store, or a layout or archive on the disk.
    ///
    /// # Errors
    /// Code `image-not-found`, or if the image is damaged.
    pub(crate) fn prepare(
        &self,
        reference: &str,
        progress: &mut dyn FnMut(&str),
    ) -> Result<PreparedImage, Problem> {
        let cache = self.root_file_systems();
        let mut tell = |step| progress(&describe("unpacking", step));
        let failed = |error: agentkernel_image::ImageError| problem("image", &error, error.hint());
        // What says of itself that it is a path is one; a name beats a file that happens to be called so.
        let not_found = match is_path(reference) {
            true => None,
            false => match self.store.find(&self.resolve(reference)) {
                Ok(image) => {
                    let mut prepared =
                        RootFileSystem::prepare(self.store.path(), Some(&image.name), &cache, &mut tell)
                            .map_err(failed)?;
                    prepared.name = familiar(&image.name);
                    return Ok(prepared);
                }
                Err(error @ (StoreError::NotFound { .. } | StoreError::Reference(_))) => Some(error),
                Err(error) => return Err(store_problem(error)),
            },
        };
        let (path, tag) = split_reference(reference);
        match not_found {
            Some(error) if !path.exists() => Err(store_problem(error)),
            _ => RootFileSystem::prepare(&path, tag.as_deref(), &cache, &mut tell).map_err(failed),
        }
    }

    /// Where root file systems lie.
    fn root_file_systems(&self) -> PathBuf {
        self.home.cache().join("images")
    }

    fn root_file_system(&self, image: &StoredImage) -> PathBuf {
        RootFileSystem::path(&self.root_file_systems(), &image.diff_ids)
    }

    /// Root file systems, and the sandboxes made from them.
    fn users(&self) -> Result<BTreeMap<PathBuf, Vec<String>>, Problem> {
        let mut users = BTreeMap::<PathBuf, Vec<String>>::new();
        for sandbox in self.home.list()? {
            if let Ok(Spec { image: Image::Disk { path, .. }, name, .. }) = Spec::load(sandbox.path()) {
                users.entry(path).or_default().push(name);
            }
        }
        Ok(users)
    }

    fn info(&self, image: &StoredImage, users: &BTreeMap<PathBuf, Vec<String>>) -> ImageInfo {
        ImageInfo {
            name: familiar(&image.name),
            image_id: Some(image.image_id.to_string()),
            digest: Some(image.digest.to_string()),
            created: image.created.clone(),
            size_bytes: image.size_bytes,
            labels: image.config.labels.clone(),
            used_by: users.get(&self.root_file_system(image)).cloned().unwrap_or_default(),
            problem: None,
        }
    }
}

/// Whether a reference can only be meant as a path.
fn is_path(reference: &str) -> bool {
    reference.starts_with(['/', '.', '~']) || reference.ends_with(".tar")
}

fn registry_problem(error: &RegistryError) -> Problem {
    let code = match error {
        RegistryError::NotFound { .. } => "image-not-found",
        _ => "registry",
    };
    problem(code, error, error.hint())
}

fn parse(name: &str) -> Result<Reference, Problem> {
    name.parse().map_err(|error: agentkernel_image::InvalidReference| {
        problem("image-name", &error, Some(error.hint()))
    })
}

/// A full name as people know it; one that `build` gave is shown as it was given.
fn familiar(name: &str) -> String {
    let familiar =
        name.parse::<Reference>().map_or_else(|_| name.to_owned(), |reference| reference.familiar());
    match crate::build::name_of(&familiar) {
        Some(built) => built.to_owned(),
        None => familiar,
    }
}

/// A failure of the store, with a code that programs know it by.
pub(crate) fn store_problem(error: StoreError) -> Problem {
    let code = match &error {
        StoreError::NotFound { .. } => "image-not-found",
        StoreError::Ambiguous { .. } | StoreError::Reference(_) => "image-name",
        StoreError::Busy { .. } => "store-busy",
        _ => "image",
    };
    let hint = error.hint();
    problem(code, &error, hint)
}

fn describe(what: &str, step: Progress) -> String {
    let mib = |bytes: u64| bytes >> 20;
    format!(
        "{what} layer {} of {}: {} of {} MiB",
        step.layer,
        step.layers,
        mib(step.bytes),
        mib(step.total_bytes)
    )
}

/// A number of bytes as image tools print it: base 1024, one decimal above bytes.
pub fn format_size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KB", "MB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{bytes}B") } else { format!("{value:.1}{unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1}GB")
}

/// Opens `-` or a new file for an archive.
///
/// # Errors
/// If the file cannot be made.
pub fn archive_output(path: &Path) -> Result<Box<dyn Write>, Problem> {
    if path == Path::new("-") {
        return Ok(Box::new(std::io::stdout().lock()));
    }
    let file = std::fs::File::create(path).map_err(io(format!("write {}", path.display())))?;
    Ok(Box::new(std::io::BufWriter::with_capacity(1 << 20, file)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (bytes, text) in [
            (0, "0B"),
            (512, "512B"),
            (1023, "1023B"),
            (1024, "1.0KB"),
            (104_857_600, "100.0MB"),
            (1_610_612_736, "1.5GB"),
            (5 << 40, "5120.0GB"),
        ] {
            assert_eq!(format_size(bytes), text);
        }
    }

    #[test]
    fn addresses_and_this_machine_are_private() {
        for (place, private) in [
            ("registry.example", false),
            ("registry.example:5000", false),
            ("127.0.0.1:5000", true),
            ("10.1", true),
            ("0x7f.0.0.0x1", true),
            ("2130706433", true),
            ("[::1]:5000", true),
            ("localhost:5000", true),
            ("localhost", true),
        ] {
            assert_eq!(RegistryPlace(place.into()).is_private(), private, "{place}");
        }
    }
}
