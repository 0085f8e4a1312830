//! Images from Dockerfiles, kept by name: the face of the builder.
//!
//! ```text
//! HOME/image-metadata/NAME.json    what was built: a LocalImage
//! HOME/image-metadata/lock         held while a name and its record change
//! HOME/images                      the store, where it is called agentkernel-NAME
//! HOME/build-cache                 what steps made
//! ```

pub(crate) mod addresses;
mod docker;
mod fetch;
mod machine;
mod records;

use std::collections::BTreeMap;
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
use tokio::runtime::Runtime;

use crate::client::{self, Life, Warmth};
use crate::images::{Images, store_problem};
use crate::launch;
use crate::problem::{Problem, io, plain, problem};
use crate::state::{Home, random_word};

use docker::Docker;
pub use fetch::Egress;
use machine::{BuildMachine, failure};
pub use records::LocalImage;
pub(crate) use records::{alone, damaged_records, forget, forget_record, remove_from_docker};

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
    /// What ADD and RUN may reach.
    pub egress: Egress,
    /// A PEM bundle of authorities that RUN steps trust besides the host's own; nothing of either becomes part of an
    /// image.
    pub certificates: Option<PathBuf>,
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
            records::all(home)?.into_iter().map(|record| record.map(|record| (record.name.clone(), record)));
        let records = records.collect::<Result<_, _>>()?;
        Ok(Self {
            home: home.clone(),
            images: Images::open(home)?,
            records,
            program: program.to_owned(),
            resources: Resources::default(),
            registry: RegistryOptions::default(),
            egress: Egress::default(),
            certificates: None,
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
        records::keep(&self.home, &record)?;
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
        self.images.resolve(name)
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

    fn forget(&mut self, name: &str) -> Result<(), Problem> {
        let path = records::path(&self.home, name);
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
        let network = self.builder.egress.network();
        let mut spec = launch::for_build(name, root_file_system, vcpus, memory_mib, disk_mib, network);
        spec.certificates.clone_from(&self.builder.certificates);
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
mod tests;
