//! Images from Dockerfiles, kept by name: the face of the builder.
//!
//! ```text
//! HOME/image-metadata/NAME.json    what was built: a LocalImage
//! HOME/image-metadata/lock         held while a name and its record change
//! HOME/images                      the store, where it is called agentkernel-NAME
//! HOME/build-cache                 what steps made
//! ```

mod addresses;
mod docker;
mod fetch;
mod machine;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use agentkernel_build::cache::Cache;
use agentkernel_build::dockerfile::{BYTES_LIMIT, Dockerfile};
use agentkernel_build::executor::{Base, Executor, Failure};
use agentkernel_build::ignore::IgnoreFile;
use agentkernel_build::{BuildError, Context};
pub use agentkernel_build::{Event, OnEvent, Options};
use agentkernel_image::registry::{self, RegistryOptions};
use agentkernel_image::{Descriptor, Digest, Reference, RootFileSystem, StoreError, StoredImage, Writing};
use agentkernel_network::Policy;
pub use agentkernel_network::{InvalidRule, Mode as NetworkMode, Rule as NetworkRule};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use crate::client::{self, Life, Warmth};
use crate::images::{Images, format_size, store_problem};
use crate::launch;
use crate::problem::{Problem, io, plain, problem};
use crate::state::{Home, private_file, random_word, write_atomically};

use docker::Docker;
pub use fetch::Egress;
use machine::{BuildMachine, failure};

/// Name of the directory of records.
const RECORDS: &str = "image-metadata";
/// Name of the file in it that is locked while names change.
const LOCK: &str = "lock";
/// Name of the directory of what steps made.
const STEPS: &str = "build-cache";
/// Longest name.
const NAME_LIMIT: usize = 128;
/// What is put before a name where others than we see it.
const PREFIX: &str = "agentkernel-";
const MANAGED_LABEL: &str = "agentkernel.managed";
const NAME_LABEL: &str = "agentkernel.name";
/// Says that Docker built the image.
const ENGINE_LABEL: &str = "agentkernel.engine";
const DOCKER: &str = "docker";

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
    fn is_dockers(&self) -> bool {
        self.labels.get(ENGINE_LABEL).is_some_and(|engine| engine == DOCKER)
    }

    /// What it is called in the store, and in Docker once it is loaded there.
    pub fn docker_ref(&self) -> String {
        reference_of(&self.name)
    }
}

/// What builds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// Our own.
    #[default]
    Native,
    /// Docker, by its command line; the image is brought into the store afterwards.
    Docker,
}

/// What a build's machines are made of.
#[derive(Clone, Copy, Debug)]
pub struct Resources {
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Writable disk, MiB: what a stage may write in all.
    pub disk_mib: u64,
}

impl Default for Resources {
    fn default() -> Self {
        Self { vcpus: launch::default_vcpus(), memory_mib: 2048, disk_mib: 20 << 10 }
    }
}

/// Builds images and keeps them by name.
#[derive(Debug)]
pub struct ImageBuilder {
    home: Home,
    images: Images,
    records: BTreeMap<String, LocalImage>,
    /// The program with the hidden verbs: ours.
    program: PathBuf,
    /// What machines are made of.
    pub resources: Resources,
    /// How images that are not here are fetched.
    pub registry: RegistryOptions,
    /// What ADD may reach.
    pub egress: Egress,
}

/// One build.
#[derive(Clone, Debug, Default)]
pub struct BuildRequest {
    /// The image's name.
    pub name: String,
    /// The directory that COPY takes from.
    pub context: PathBuf,
    /// The Dockerfile; `Dockerfile` in the context if nothing is said.
    pub dockerfile: Option<PathBuf>,
    /// What builds.
    pub engine: Engine,
    /// Everything else.
    pub options: Options,
}

impl ImageBuilder {
    /// A builder for the state directory that the environment names, as the command line uses it. The running program has
    /// to be agentkernel's own; others use [`ImageBuilder::open`].
    ///
    /// # Errors
    /// If there is no such directory and none can be made.
    pub fn new() -> Result<Self, Problem> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let path =
            variable("AGENTKERNEL_HOME").or_else(|| variable("HOME").map(|home| home.join(".agentkernel")));
        let path =
            path.ok_or_else(|| plain("no-home", "no home directory is known", Some("set AGENTKERNEL_HOME")))?;
        let program = std::env::current_exe().map_err(io("find this program"))?;
        Self::open(&Home::open(&path)?, &program)
    }

    /// A builder for a state directory. `program` is agentkernel's, for the machines.
    ///
    /// # Errors
    /// If the records cannot be read. One that is damaged is an error, too: its image would seem to be gone.
    pub fn open(home: &Home, program: &Path) -> Result<Self, Problem> {
        let records =
            records(home)?.into_iter().map(|record| record.map(|record| (record.name.clone(), record)));
        let records = records.collect::<Result<_, _>>()?;
        Ok(Self {
            home: home.clone(),
            images: Images::open(home)?,
            records,
            program: program.to_owned(),
            resources: Resources::default(),
            registry: RegistryOptions::default(),
            egress: Egress::default(),
        })
    }

    /// Builds the Dockerfile in `context`, or another, and keeps the image as `name`, in place of a former one.
    ///
    /// # Errors
    /// What is wrong, and where; a former image of that name stays then.
    pub fn build(
        &mut self,
        name: &str,
        context: &Path,
        dockerfile: Option<&Path>,
    ) -> Result<LocalImage, Problem> {
        let request = BuildRequest {
            name: name.to_owned(),
            context: context.to_owned(),
            dockerfile: dockerfile.map(Path::to_owned),
            engine: Engine::Native,
            options: Options::default(),
        };
        self.build_with(&request, &mut |_| {})
    }

    /// As [`ImageBuilder::build`], with everything that can be said, and told what happens.
    ///
    /// # Errors
    /// As [`ImageBuilder::build`].
    pub fn build_with(
        &mut self,
        request: &BuildRequest,
        on_event: OnEvent<'_>,
    ) -> Result<LocalImage, Problem> {
        check_name(&request.name)?;
        let (path, text) = find_dockerfile(&request.context, request.dockerfile.as_deref())?;
        let reference: Reference =
            reference_of(&request.name).parse().map_err(|error: agentkernel_image::InvalidReference| {
                problem("image-name", &error, Some(error.hint()))
            })?;
        let mut options = request.options.clone();
        options.labels.insert(MANAGED_LABEL.into(), "true".into());
        options.labels.insert(NAME_LABEL.into(), request.name.clone());
        let (image, size_bytes, _alone) = match request.engine {
            Engine::Native => {
                let (writing, manifest) =
                    self.build_here(&request.context, &path, &text, &options, on_event)?;
                // The name last: who is killed before leaves the former image as it was.
                let alone = alone(&self.home)?;
                let image = writing.tag(manifest, &reference).map_err(store_problem)?;
                let size_bytes = self.uncompressed(&image)?;
                (image, size_bytes, alone)
            }
            Engine::Docker => {
                options.labels.insert(ENGINE_LABEL.into(), DOCKER.into());
                let docker = Docker(Path::new(DOCKER));
                let name = reference_of(&request.name);
                docker.build(self.home.path(), &name, &request.context, &path, &options, on_event)?;
                let alone = alone(&self.home)?;
                let (image, size_bytes) = docker.take(&self.images, &reference)?;
                (image, size_bytes, alone)
            }
        };
        let absolute =
            |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned()).display().to_string();
        let record = LocalImage {
            name: request.name.clone(),
            image_id: image.image_id.to_string(),
            size_bytes,
            built_at: humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string(),
            dockerfile: Some(absolute(&path)),
            context: Some(absolute(&request.context)),
            labels: image.config.labels.into_iter().collect(),
        };
        self.keep(&record)?;
        self.records.insert(record.name.clone(), record.clone());
        Ok(record)
    }

    /// Builds with our own engine: the manifest of an image that has no name yet, and what keeps it until it has one.
    fn build_here(
        &self,
        context: &Path,
        path: &Path,
        text: &[u8],
        options: &Options,
        on_event: OnEvent<'_>,
    ) -> Result<(Writing, Descriptor), Problem> {
        let shown = path.display().to_string();
        let dockerfile = Dockerfile::parse(text).map_err(|error| Problem {
            code: "dockerfile".into(),
            message: error.render(&shown),
            hint: error.hint,
        })?;
        let ignore = ignore_file(context, path)?;
        let source = Context::open(context, ignore).map_err(io(format!("read {}", context.display())))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(io("start the build"))?;
        let cache = Cache::open(&self.home.path().join(STEPS)).map_err(io("open the build cache"))?;
        let writing = self.images.store().writing().map_err(store_problem)?;
        let policy = self.egress.policy();
        let mut executor = Machines { builder: self, runtime: Rc::new(runtime), policy };
        let manifest = agentkernel_build::build(
            &dockerfile,
            &source,
            options,
            &writing,
            &cache,
            &mut executor,
            on_event,
        )
        .map_err(|error| build_problem(error, &shown))?;
        Ok((writing, manifest))
    }

    /// The image of that name.
    pub fn get(&self, name: &str) -> Option<&LocalImage> {
        self.records.get(name)
    }

    /// Whether there is an image of that name.
    pub fn exists(&self, name: &str) -> bool {
        self.records.contains_key(name)
    }

    /// All images, sorted by name.
    pub fn list(&self) -> Vec<&LocalImage> {
        self.records.values().collect()
    }

    /// Forgets an image and frees what nothing else needs.
    ///
    /// # Errors
    /// Code `image-not-found`.
    pub fn delete(&mut self, name: &str) -> Result<(), Problem> {
        let Some(record) = self.records.get(name) else {
            return Err(plain("image-not-found", format!("Image '{name}' not found"), None));
        };
        let reference = record.docker_ref();
        remove_from_docker(&self.home, &reference)?;
        match self.images.remove(&reference, true) {
            Err(problem) if problem.code != "image-not-found" => return Err(problem),
            _ => {}
        }
        self.forget(name)
    }

    /// What an image is called where images are looked up: a name of ours becomes its reference, anything else stays.
    pub fn resolve_image(&self, name: &str) -> String {
        self.records.get(name).map_or_else(|| name.to_owned(), LocalImage::docker_ref)
    }

    /// Forgets records whose image is gone; their names.
    ///
    /// # Errors
    /// If the store cannot be read: nothing is forgotten then.
    pub fn sync(&mut self) -> Result<Vec<String>, Problem> {
        let mut gone = Vec::new();
        for record in self.records.values() {
            let is_gone = match self.images.store().find(&record.docker_ref()) {
                Err(StoreError::NotFound { .. }) => true,
                found => found.map_err(store_problem).map(|_| false)?,
            };
            // One of Docker's is gone when Docker says so; if it does not answer, nobody knows.
            if is_gone || (record.is_dockers() && !Docker(Path::new(DOCKER)).has(&record.docker_ref())?) {
                gone.push(record.name.clone());
            }
        }
        for name in &gone {
            self.forget(name)?;
        }
        Ok(gone)
    }

    fn keep(&self, record: &LocalImage) -> Result<(), Problem> {
        let path = record_path(&self.home, &record.name);
        let text = serde_json::to_vec_pretty(record)
            .map_err(|error| plain("image-record", error.to_string(), None))?;
        write_atomically(&path, &text).map_err(io(format!("write {}", path.display())))
    }

    fn forget(&mut self, name: &str) -> Result<(), Problem> {
        let path = record_path(&self.home, name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io(format!("remove {}", path.display()))(error));
            }
            _ => {}
        }
        self.records.remove(name);
        Ok(())
    }

    /// Bytes of an image's layers once uncompressed.
    fn uncompressed(&self, image: &StoredImage) -> Result<u64, Problem> {
        let mut total = 0;
        for layer in &image.layers {
            // Those built here lie uncompressed; of others the registry says how large they are as they are sent.
            total += self.images.store().uncompressed_size(layer).map_err(store_problem)?;
        }
        Ok(total)
    }
}

/// What the image of that name is called in the store.
pub(crate) fn reference_of(name: &str) -> String {
    format!("{PREFIX}{name}")
}

/// The name that `build` gave to what the store calls so.
pub(crate) fn name_of(reference: &str) -> Option<&str> {
    reference.strip_prefix(PREFIX)?.strip_suffix(":latest").filter(|name| check_name(name).is_ok())
}

/// Every record, by its file's name; one that cannot be read, or tells of another image than its file, is an error of its
/// own.
fn records(home: &Home) -> Result<Vec<Result<LocalImage, Problem>>, Problem> {
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
    Ok(paths.iter().filter_map(|path| read_record(path).transpose()).collect())
}

/// One record; `None` if it was removed meanwhile.
fn read_record(path: &Path) -> Result<Option<LocalImage>, Problem> {
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
pub fn damaged_records(home: &Home) -> Result<Vec<Problem>, Problem> {
    Ok(records(home)?.into_iter().filter_map(Result::err).collect())
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
pub(crate) fn record_path(home: &Home, name: &str) -> PathBuf {
    home.path().join(RECORDS).join(format!("{name}.json"))
}

/// Removes an image from Docker as well, if that built it.
///
/// # Errors
/// If Docker does not answer, or does not remove it.
pub(crate) fn remove_from_docker(home: &Home, full_name: &str) -> Result<(), Problem> {
    let familiar = full_name.parse::<Reference>().map(|reference| reference.familiar()).unwrap_or_default();
    let record = name_of(&familiar).and_then(|name| std::fs::read(record_path(home, name)).ok());
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
        let _ = std::fs::remove_file(record_path(home, name));
    }
}

/// Forgets a record whose image is gone, damaged or not. True if there was one.
pub(crate) fn forget_record(home: &Home, name: &str) -> bool {
    check_name(name).is_ok() && std::fs::remove_file(record_path(home, name)).is_ok()
}

/// Layers that later builds may take from the cache.
pub(crate) fn cached_layers(home: &Home) -> std::collections::HashSet<Digest> {
    Cache::open(&home.path().join(STEPS)).and_then(|cache| cache.layers()).unwrap_or_default()
}

/// Forgets what earlier builds made.
///
/// # Errors
/// If it cannot be removed.
pub(crate) fn forget_steps(home: &Home) -> Result<(), Problem> {
    Cache::open(&home.path().join(STEPS)).and_then(|cache| cache.clear()).map_err(io("empty the build cache"))
}

/// What a build runs on.
struct Machines<'a> {
    builder: &'a ImageBuilder,
    runtime: Rc<Runtime>,
    /// What ADD may reach.
    policy: Policy,
}

impl Executor for Machines<'_> {
    type Machine = BuildMachine;

    fn image(&mut self, name: &str, on_event: OnEvent<'_>) -> Result<Base, Failure> {
        let store = self.builder.images.store();
        let resolved = self.builder.images.resolve(name);
        let image = match store.find(&resolved) {
            Err(StoreError::NotFound { .. }) => {
                let reference: Reference =
                    resolved.parse().map_err(|error: agentkernel_image::InvalidReference| Failure {
                        message: error.to_string(),
                        hint: Some(error.hint()),
                    })?;
                let (sender, mut receiver) = tokio::sync::mpsc::channel(1);
                // One that is not shown at once is followed by a later one.
                let tell = |transfer| sender.try_send(transfer).unwrap_or_default();
                let pull = registry::pull(store, &reference, &self.builder.registry, &tell);
                let pulled = self.runtime.block_on(async {
                    tokio::pin!(pull);
                    loop {
                        tokio::select! {
                            pulled = &mut pull => break pulled,
                            Some(transfer) = receiver.recv() => on_event(Event::Pull(name, transfer)),
                        }
                    }
                });
                pulled.map_err(|error| Failure { hint: error.hint(), ..Failure::new(chain(&error)) })?
            }
            found => found.map_err(|error| failure(store_problem(error)))?,
        };
        let document = store.read_blob(&image.image_id).map_err(|error| failure(store_problem(error)))?;
        let configuration = serde_json::from_slice(&document)
            .map_err(|error| Failure::new(format!("the configuration of {name} is damaged: {error}")))?;
        Ok(Base { configuration, layers: image.layers.into_iter().zip(image.diff_ids).collect() })
    }

    fn fetch(&mut self, address: &str, target: &mut File, on_event: OnEvent<'_>) -> Result<(), Failure> {
        let limits = fetch::Limits::default();
        self.runtime.block_on(fetch::fetch(&self.policy, &limits, address, target, on_event))
    }

    fn root_file_system(&mut self, layers: &[(Descriptor, Digest)]) -> Result<PathBuf, Failure> {
        let cache = self.builder.home.cache().join("images");
        RootFileSystem::of_layers(self.builder.images.store(), layers, &cache, &mut |_| {})
            .map_err(|error| Failure { hint: error.hint(), ..Failure::new(chain(&error)) })
    }

    fn start(&mut self, root_file_system: &Path) -> Result<BuildMachine, Failure> {
        let Resources { vcpus, memory_mib, disk_mib } = self.builder.resources;
        crate::setup::ensure_kernel(&self.builder.home, &mut |_| {}).map_err(failure)?;
        let name = format!("build-{}", &random_word()[..8]);
        let spec = launch::for_build(name, root_file_system, vcpus, memory_mib, disk_mib);
        let held = client::create(&self.builder.home, &spec, Life::Temporary, None).map_err(failure)?;
        let lease = self
            .runtime
            .block_on(client::start(held, &self.builder.program, Warmth::Warm))
            .map_err(failure)?;
        Ok(BuildMachine { lease: Some(lease), runtime: self.runtime.clone(), layer_limit: disk_mib << 20 })
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    problem("build", error, None).message
}

fn build_problem(error: BuildError, file: &str) -> Problem {
    let (code, message, hint) = match error {
        BuildError::At(error) => ("build", error.render(file), error.hint),
        BuildError::Run { at, .. } => ("build-step", at.render(file), at.hint),
        BuildError::Failure(failure) => ("build", failure.message, failure.hint),
    };
    Problem { code: code.into(), message, hint }
}

/// Checks an image's name.
///
/// # Errors
/// Says which rule is broken.
pub fn check_name(name: &str) -> Result<(), Problem> {
    let wrong = |message: &str, hint: String| Err(plain("image-name", message, Some(&hint)));
    if name.is_empty() {
        return wrong("Image name cannot be empty", "give it one: -t my-tools".into());
    }
    let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if !name.bytes().all(known) {
        let hint = match name.split_once(':') {
            Some((before, _)) if !before.is_empty() && before.bytes().all(known) => {
                format!("a built image has no tags: -t {}", before.to_ascii_lowercase())
            }
            _ => "such as my-tools".to_owned(),
        };
        return wrong(
            "Image name can only contain alphanumeric characters, hyphens, underscores, and dots",
            hint,
        );
    }
    if name.len() > NAME_LIMIT {
        return wrong("Image name is longer than 128 characters", "take a shorter one".into());
    }
    if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return wrong("Image name has upper-case letters", format!("-t {}", name.to_ascii_lowercase()));
    }
    if format!("{PREFIX}{name}").parse::<Reference>().is_err() || !name.as_bytes()[0].is_ascii_alphanumeric()
    {
        let hint = "begin and end with a letter or digit, with one separator between: my-tools".to_owned();
        return wrong("Image name has separators where there must be none", hint);
    }
    Ok(())
}

/// The Dockerfile's path and content.
fn find_dockerfile(context: &Path, given: Option<&Path>) -> Result<(PathBuf, Vec<u8>), Problem> {
    if !context.is_dir() {
        let message = format!("Build context '{}' does not exist", context.display());
        return Err(plain("build-context", message, Some("it is a directory; . is the current one")));
    }
    let path = match given {
        Some(path) if path.is_file() => path.to_owned(),
        // As for Docker, relative to here; but what is meant within the context is found as well.
        Some(path) if path.is_relative() && context.join(path).is_file() => context.join(path),
        Some(path) => {
            let message = format!("Dockerfile '{}' does not exist", path.display());
            return Err(plain("dockerfile", message, None));
        }
        None => {
            let found = ["Dockerfile", "Containerfile"]
                .iter()
                .map(|name| context.join(name))
                .find(|path| path.is_file());
            found.ok_or_else(|| {
                let message =
                    format!("No Dockerfile found in '{}'. Specify one with --dockerfile", context.display());
                plain("dockerfile", message, None)
            })?
        }
    };
    let text = read_bounded(&path)?;
    Ok((path, text))
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, Problem> {
    use std::io::Read;
    let what = || format!("read {}", path.display());
    let file = File::open(path).map_err(io(what()))?;
    let mut text = Vec::new();
    file.take(BYTES_LIMIT as u64 + 1).read_to_end(&mut text).map_err(io(what()))?;
    Ok(text)
}

/// The ignore file: that of the Dockerfile, else that of the context.
fn ignore_file(context: &Path, dockerfile: &Path) -> Result<IgnoreFile, Problem> {
    let mut own = dockerfile.as_os_str().to_owned();
    own.push(".dockerignore");
    let candidates = [PathBuf::from(own), context.join(".dockerignore")];
    let Some(path) = candidates.into_iter().find(|path| path.is_file()) else {
        return Ok(IgnoreFile::default());
    };
    IgnoreFile::parse(&read_bounded(&path)?).map_err(|error| {
        let message = format!("{}:{}: {}", path.display(), error.line, error.reason);
        plain("ignore-file", message, None)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "my-tools", "a.b_c-d", "x__y", &"n".repeat(128)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for (bad, message) in [
            ("", "Image name cannot be empty"),
            ("a/b", "Image name can only contain alphanumeric characters, hyphens, underscores, and dots"),
            ("ä", "Image name can only contain alphanumeric characters, hyphens, underscores, and dots"),
            (
                "name:tag",
                "Image name can only contain alphanumeric characters, hyphens, underscores, and dots",
            ),
            ("a/../b", "Image name can only contain alphanumeric characters, hyphens, underscores, and dots"),
            ("My", "Image name has upper-case letters"),
            ("-x", "Image name has separators where there must be none"),
            ("x-", "Image name has separators where there must be none"),
            ("a..b", "Image name has separators where there must be none"),
            (&"n".repeat(129), "Image name is longer than 128 characters"),
        ] {
            let problem = check_name(bad).unwrap_err();
            assert_eq!(problem.message, message, "{bad}");
            assert!(problem.hint.is_some());
        }
        assert_eq!(check_name("Tools:1").unwrap_err().hint.unwrap(), "a built image has no tags: -t tools");
    }

    #[test]
    fn records_read_and_print_as_they_are_known() {
        let text = r#"{"name":"t","image_id":"sha256:00","size_bytes":104857600,"built_at":"2026-01-01T00:00:00Z",
            "dockerfile":null,"context":null}"#;
        let image: LocalImage = serde_json::from_str(text).unwrap();
        assert_eq!((image.format_size().as_str(), image.docker_ref().as_str()), ("100.0MB", "agentkernel-t"));
        assert!(image.labels.is_empty());
    }
}
