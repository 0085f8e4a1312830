//! Carries a Dockerfile out: the stages that are needed, step by step, each from the cache or anew.
//!
//! ```text
//! stage ─► state: configuration, layers, key ─┬─ ENV, USER ...   change the configuration
//!                                             ├─ COPY, ADD       [`transfer`]: a layer made here, no machine needed;
//!                                             │                  [`remote`]: what ADD takes from addresses
//!                                             └─ RUN             [`run`]: a layer made in the stage's machine
//! ```
//! A stage's machine starts with its first RUN that is not in the cache, over the layers up to the last RUN that was; what
//! was copied since is sent there. A key is a digest of the layers below and of all that the step's outcome depends on.
//!
//! One file though it is long: it is that walk; what one kind of step needs has a file of its own.

mod names;
mod remote;
mod run;
mod transfer;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::time::{Duration, Instant, SystemTime};

use agentkernel_image::registry::Transfer;
use agentkernel_image::{
    Descriptor, Digest, FileSystem, LayerReader, LayerWriter, Platform, Store, Writing, signal_number,
};

use crate::cache::{Cache, Key, Record};
use crate::configuration::{Configuration, Empty, Healthcheck, History, Process};
use crate::dockerfile::expand::{ExpandError, Lexer};
use crate::dockerfile::{
    Command, Dockerfile, DockerfileError, Instruction, Kind, MountKind, Place, Stage, Word,
};
use crate::executor::{Base, Executor, Failure, Machine};
use crate::source::Context;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIGURATION: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Build arguments that need no ARG; they say where a network is, not what is built.
const PREDEFINED: [&str; 10] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "FTP_PROXY",
    "ftp_proxy",
    "NO_PROXY",
    "no_proxy",
    "ALL_PROXY",
    "all_proxy",
];
/// What to do about a stage that is wanted before it is built.
const ORDER: &str =
    "stages are built in their order, and none can need itself: put that stage before this one";
/// Time that layers bear where `SOURCE_DATE_EPOCH` says another.
const EPOCH: &str = "SOURCE_DATE_EPOCH";

/// What a build is told besides its Dockerfile.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The stage to build; the last one if nothing is said.
    pub target: Option<String>,
    /// Build arguments.
    pub arguments: BTreeMap<String, String>,
    /// Labels of the image.
    pub labels: BTreeMap<String, String>,
    /// Secrets by id.
    pub secrets: BTreeMap<String, Vec<u8>>,
    /// Take nothing from the cache.
    pub no_cache: bool,
}

/// What a build tells as it goes.
#[derive(Debug)]
pub enum Event<'a> {
    /// A step begins.
    Step {
        /// Name or number of the stage.
        stage: &'a str,
        /// Counted from 1 within the stage, its FROM included.
        step: usize,
        /// How many steps the stage has.
        steps: usize,
        /// The instruction.
        text: &'a str,
    },
    /// It was done before.
    Cached,
    /// It took so long.
    Done(Duration),
    /// Its program says something.
    Output(&'a [u8]),
    /// A base image is on its way.
    Pull(&'a str, Transfer),
    /// What is at an address is on its way.
    Fetch {
        /// The address.
        address: &'a str,
        /// Bytes that are there.
        bytes: u64,
        /// Bytes that are to come in all, if that is known.
        size: Option<u64>,
    },
    /// Something worth knowing.
    Note(String),
}

/// Why nothing was built.
#[derive(Debug)]
pub enum BuildError {
    /// Something at a place of the Dockerfile.
    At(DockerfileError),
    /// A program that failed.
    Run {
        /// Where, and what it ended with.
        at: DockerfileError,
        /// Its exit code.
        code: u8,
    },
    /// Something else.
    Failure(Failure),
}

impl fmt::Display for BuildError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(error) | Self::Run { at: error, .. } => error.fmt(formatter),
            Self::Failure(failure) => failure.fmt(formatter),
        }
    }
}

impl std::error::Error for BuildError {}

impl From<DockerfileError> for BuildError {
    fn from(error: DockerfileError) -> Self {
        Self::At(error)
    }
}

impl From<Failure> for BuildError {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

type Build<T> = Result<T, BuildError>;

/// Told of what happens.
pub type OnEvent<'a> = &'a mut dyn FnMut(Event<'_>);

/// A layer: as stored, and its digest once uncompressed.
type Layer = (Descriptor, Digest);

/// Builds `file` and returns the manifest of the image, which has no name yet. What was added to the store is kept there
/// while `writing` lives.
///
/// # Errors
/// What is wrong, and where; nothing is named then.
pub fn build<E: Executor>(
    file: &Dockerfile,
    context: &Context,
    options: &Options,
    writing: &Writing,
    cache: &Cache,
    executor: &mut E,
    on_event: OnEvent<'_>,
) -> Result<Descriptor, BuildError> {
    if let Some(text) = options.arguments.get(EPOCH).filter(|text| text.trim().parse::<i64>().is_err()) {
        let message = format!("SOURCE_DATE_EPOCH is `{text}`, which is no number of seconds");
        let hint = Some("such as the time of the last commit: git log -1 --format=%ct".to_owned());
        return Err(BuildError::Failure(Failure { message, hint }));
    }
    let mut solver = Solver {
        file,
        context,
        options,
        writing,
        cache,
        executor,
        on_event,
        meta: Vec::new(),
        stages: (0..file.stages.len()).map(|_| None).collect(),
        images: HashMap::new(),
        consumed: HashSet::new(),
        now: SystemTime::now(),
    };
    solver.solve()
}

struct Solver<'a, E: Executor> {
    file: &'a Dockerfile,
    context: &'a Context,
    options: &'a Options,
    writing: &'a Writing,
    cache: &'a Cache,
    executor: &'a mut E,
    on_event: OnEvent<'a>,
    /// Arguments before the first stage.
    meta: Vec<(String, Option<String>)>,
    stages: Vec<Option<State<E::Machine>>>,
    /// Images that `--from` names.
    images: HashMap<String, State<E::Machine>>,
    /// Build arguments that an ARG asked for.
    consumed: HashSet<String>,
    now: SystemTime,
}

/// How far a stage is.
struct State<M> {
    configuration: Configuration,
    layers: Vec<Layer>,
    /// How many of them are the base image's.
    base: usize,
    /// How many of them end with the last RUN, or the base image: the part that is worth a root file system of its own.
    settled: usize,
    key: Key,
    /// Arguments that have a value and that no later ENV sets. Stages that begin with this one have them as well.
    arguments: Vec<(String, String)>,
    files: Option<FileSystem>,
    machine: Option<run::Running<M>>,
}

impl<M> State<M> {
    fn of(base: Base) -> Self {
        let ids: Vec<String> = base.layers.iter().map(|(_, diff_id)| diff_id.to_string()).collect();
        Self {
            key: Key::begin().with("layers", ids.iter().map(String::as_bytes)),
            base: base.layers.len(),
            settled: base.layers.len(),
            configuration: base.configuration,
            layers: base.layers,
            arguments: Vec::new(),
            files: None,
            machine: None,
        }
    }

    /// What another stage begins with that is built on this one.
    fn child(&self) -> Self {
        Self {
            configuration: self.configuration.clone(),
            layers: self.layers.clone(),
            base: self.base,
            settled: self.settled,
            key: self.key,
            arguments: self.arguments.clone(),
            files: None,
            machine: None,
        }
    }

    fn process(&mut self) -> &mut Process {
        &mut self.configuration.config
    }

    /// A variable of the stage: of ENV and ARG the one that came last.
    fn variable(&self, name: &str) -> Option<String> {
        let argument = self.arguments.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        argument.or_else(|| self.configuration.config.get(name)).map(str::to_owned)
    }

    /// The root file system as it is now.
    fn files<E: Executor<Machine = M>>(
        &mut self,
        executor: &mut E,
        store: &Store,
    ) -> Result<&mut FileSystem, Failure> {
        let files = match self.files.take() {
            Some(files) => files,
            None => {
                let mut files = FileSystem::new();
                if self.base > 0 {
                    let path = executor.root_file_system(&self.layers[..self.base])?;
                    files.load(&path).map_err(|error| Failure::new(chain(&error)))?;
                }
                for (layer, _) in &self.layers[self.base..] {
                    files.add_layer(store, &layer.digest).map_err(|error| Failure::new(chain(&error)))?;
                }
                files
            }
        };
        Ok(self.files.insert(files))
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

impl<E: Executor> Solver<'_, E> {
    fn solve(&mut self) -> Build<Descriptor> {
        for instruction in &self.file.arguments {
            let Kind::Arg(arguments) = &instruction.kind else { continue };
            for (name, default) in arguments {
                let given = self.options.arguments.get(&name.text).cloned();
                let default = default.as_ref().map(|word| self.expand_meta(word)).transpose()?;
                self.consumed.insert(name.text.clone());
                self.meta.push((name.text.clone(), given.or(default)));
            }
        }
        let target = self.target()?;
        let needed = self.needed(target)?;
        for index in 0..=target {
            if needed.contains(&index) {
                let state = self.stage(index)?;
                self.stages[index] = Some(state);
            }
        }
        let unused: Vec<&str> = self.options.arguments.keys().map(String::as_str).collect();
        let unused: Vec<&str> = unused
            .into_iter()
            .filter(|name| !self.consumed.contains(*name) && !PREDEFINED.contains(name) && *name != EPOCH)
            .collect();
        if !unused.is_empty() {
            (self.on_event)(Event::Note(format!("no ARG asked for: {}", unused.join(", "))));
        }
        let state = self.stages[target].take().ok_or_else(|| Failure::new("the stage was not built"))?;
        self.finish(state)
    }

    /// Writes configuration and manifest.
    fn finish(&mut self, state: State<E::Machine>) -> Build<Descriptor> {
        let mut configuration = state.configuration;
        configuration.created = Some(self.created());
        configuration.rootfs.kind = "layers".into();
        configuration.rootfs.diff_ids = state.layers.iter().map(|(_, diff_id)| *diff_id).collect();
        let labels = self.options.labels.iter().map(|(key, value)| (key.clone(), value.clone()));
        configuration.config.labels.extend(labels);
        let json = |error: serde_json::Error| Failure::new(error.to_string());
        let stored = |error| Failure::new(chain(&error as &dyn std::error::Error));
        let bytes = serde_json::to_vec(&configuration).map_err(json)?;
        let config = self.writing.document(CONFIGURATION, &bytes).map_err(stored)?;
        let layers: Vec<_> = state.layers.into_iter().map(|(layer, _)| layer).collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers,
        });
        let bytes = serde_json::to_vec(&manifest).map_err(json)?;
        let mut descriptor = self.writing.document(MANIFEST, &bytes).map_err(stored)?;
        let platform = Platform { architecture: "amd64".into(), os: "linux".into(), ..Platform::default() };
        descriptor.platform = Some(platform);
        Ok(descriptor)
    }

    /// `SOURCE_DATE_EPOCH`, if the build was given one: seconds since 1970.
    fn epoch(&self) -> Option<i64> {
        self.options.arguments.get(EPOCH)?.trim().parse().ok()
    }

    /// Seconds since 1970 that what is made now bears.
    fn time(&self) -> i64 {
        let now =
            || self.now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs().cast_signed();
        self.epoch().unwrap_or_else(now)
    }

    fn created(&self) -> String {
        let seconds = u64::try_from(self.time()).unwrap_or(0);
        humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
    }

    fn target(&self) -> Build<usize> {
        let Some(target) = &self.options.target else { return Ok(self.file.stages.len() - 1) };
        self.stage_called(target, self.file.stages.len()).ok_or_else(|| {
            let names: Vec<&str> =
                self.file.stages.iter().filter_map(|stage| stage.name.as_deref()).collect();
            let hint = (!names.is_empty()).then(|| format!("there are {}", names.join(", ")));
            BuildError::Failure(Failure { message: format!("there is no stage called `{target}`"), hint })
        })
    }

    /// A stage before `limit` of that name or number.
    fn stage_called(&self, name: &str, limit: usize) -> Option<usize> {
        let lower = name.to_ascii_lowercase();
        let named = self.file.stages.iter().take(limit).position(|stage| stage.name.as_ref() == Some(&lower));
        named.or_else(|| name.parse().ok().filter(|number| *number < limit))
    }

    /// Stages that the target needs, itself included.
    fn needed(&self, target: usize) -> Build<HashSet<usize>> {
        let mut needed = HashSet::new();
        let mut pending = vec![target];
        while let Some(index) = pending.pop() {
            if !needed.insert(index) {
                continue;
            }
            let stage = &self.file.stages[index];
            pending.extend(self.stage_named(&self.expand_meta(&stage.image)?, index));
            for instruction in &stage.instructions {
                let words: Vec<&Word> = match &instruction.kind {
                    Kind::Copy(transfer) => transfer.from.iter().collect(),
                    Kind::Run(run) => run
                        .mounts
                        .iter()
                        .filter_map(|mount| match &mount.kind {
                            MountKind::Bind { from, .. } | MountKind::Cache { from, .. } => from.as_ref(),
                            _ => None,
                        })
                        .collect(),
                    _ => Vec::new(),
                };
                for word in words {
                    if self.stage_called(&word.text, index).is_none()
                        && self
                            .stage_called(&word.text, self.file.stages.len())
                            .is_some_and(|other| other >= index)
                        && word.text.parse::<usize>().is_err()
                    {
                        let message = format!("the stage `{}` is not built before this one", word.text);
                        let hint = Some(ORDER.to_owned());
                        return Err(self.file.error(word.place, message, hint).into());
                    }
                    pending.extend(self.stage_called(&word.text, index));
                }
            }
        }
        Ok(needed)
    }

    /// As [`Solver::stage_called`], for FROM, where a number is an image's name.
    fn stage_named(&self, name: &str, limit: usize) -> Option<usize> {
        let lower = name.to_ascii_lowercase();
        self.file.stages.iter().take(limit).position(|stage| stage.name.as_ref() == Some(&lower))
    }

    fn expand_meta(&self, word: &Word) -> Build<String> {
        let mut lookup = |name: &str| {
            let own = self.meta.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.clone());
            own.unwrap_or_else(|| platform_argument(name))
        };
        self.lexer().word(&word.text, &mut lookup).map_err(|error| self.unexpanded(word, &error))
    }

    fn lexer(&self) -> Lexer {
        Lexer::new(self.file.escape)
    }

    fn unexpanded(&self, word: &Word, error: &ExpandError) -> BuildError {
        self.file.error(word.place, error.to_string(), Some(error.hint())).into()
    }

    /// Replaces variables of the stage in a word.
    fn expand(&self, state: &State<E::Machine>, word: &Word) -> Build<String> {
        let mut lookup = |name: &str| state.variable(name);
        self.lexer().word(&word.text, &mut lookup).map_err(|error| self.unexpanded(word, &error))
    }

    /// As [`Solver::expand`], where white space of a variable makes several words.
    fn expand_words(&self, state: &State<E::Machine>, words: &[Word]) -> Build<Vec<(Place, String)>> {
        let mut all = Vec::new();
        for word in words {
            let mut lookup = |name: &str| state.variable(name);
            let expanded =
                self.lexer().words(&word.text, &mut lookup).map_err(|error| self.unexpanded(word, &error))?;
            all.extend(expanded.into_iter().map(|text| (word.place, text)));
        }
        Ok(all)
    }

    /// Builds one stage.
    fn stage(&mut self, index: usize) -> Build<State<E::Machine>> {
        let stage = &self.file.stages[index];
        let label = stage.name.clone().unwrap_or_else(|| format!("stage {index}"));
        let steps = stage.instructions.len() + 1;
        (self.on_event)(Event::Step { stage: &label, step: 1, steps, text: &stage.text });
        let begun = Instant::now();
        let mut state = self.from(stage, index)?;
        (self.on_event)(Event::Done(begun.elapsed()));
        let triggers = std::mem::take(&mut state.process().on_build);
        for trigger in &triggers {
            self.trigger(&mut state, stage, trigger)?;
        }
        for (number, instruction) in stage.instructions.iter().enumerate() {
            (self.on_event)(Event::Step { stage: &label, step: number + 2, steps, text: &instruction.text });
            let begun = Instant::now();
            let cached = self.step(&mut state, instruction)?;
            (self.on_event)(if cached { Event::Cached } else { Event::Done(begun.elapsed()) });
        }
        // Its machine is not needed any more; the files may be.
        state.machine = None;
        Ok(state)
    }

    fn from(&mut self, stage: &Stage, index: usize) -> Build<State<E::Machine>> {
        let name = self.expand_meta(&stage.image)?;
        if name.is_empty() {
            let hint = Some("give the argument a default, or a value with --build-arg".to_owned());
            return Err(self.file.error(stage.image.place, "the image's name is empty", hint).into());
        }
        if let Some(platform) = &stage.platform {
            let wanted = self.expand_meta(platform)?;
            if !matches!(wanted.as_str(), "linux/amd64" | "linux/amd64/v1" | "linux/x86_64" | "") {
                let message = format!("the platform {wanted} is not supported");
                return Err(self.file.error(platform.place, message, Some("linux/amd64 is".into())).into());
            }
        }
        if let Some(parent) = self.stage_named(&name, index) {
            let parent = self.stages[parent].as_ref().ok_or_else(|| Failure::new("a stage was not built"))?;
            return Ok(parent.child());
        }
        if name == "scratch" {
            return Ok(State::of(Base { configuration: Configuration::scratch(), layers: Vec::new() }));
        }
        self.executor
            .image(&name, &mut *self.on_event)
            .map(State::of)
            .map_err(|failure| self.at(stage.image.place, self.ordered(&name, index, failure)))
    }

    /// A base image that is not to be had, and is called as a later stage than `index`: that may be what was meant.
    fn ordered(&self, name: &str, index: usize, failure: Failure) -> Failure {
        if self.stage_named(name, self.file.stages.len()).is_none_or(|other| other <= index) {
            return failure;
        }
        let message =
            format!("the stage `{name}` is not built before this one, and as an image: {}", failure.message);
        Failure { message, hint: Some(ORDER.to_owned()) }
    }

    /// A failure at a place of the Dockerfile.
    fn at(&self, place: Place, failure: Failure) -> BuildError {
        self.file.error(place, failure.message, failure.hint).into()
    }

    fn refuse<T>(&self, place: Place, message: impl Into<String>, hint: Option<&str>) -> Build<T> {
        Err(self.file.error(place, message, hint.map(str::to_owned)).into())
    }

    /// Carries out what an image's ONBUILD asks of those who build on it.
    fn trigger(&mut self, state: &mut State<E::Machine>, stage: &Stage, text: &str) -> Build<()> {
        let here = |error: DockerfileError| {
            let message = format!("ONBUILD of the base image, `{text}`: {}", error.message);
            BuildError::At(self.file.error(stage.place, message, error.hint))
        };
        let file = Dockerfile::parse(format!("FROM scratch\n{text}\n").as_bytes()).map_err(here)?;
        let instructions = file.stages.into_iter().flat_map(|stage| stage.instructions);
        for mut instruction in instructions {
            instruction.place = stage.place;
            instruction.text = format!("ONBUILD {}", instruction.text);
            self.step(state, &instruction)?;
        }
        Ok(())
    }

    /// Carries out one instruction; true if it was done before.
    fn step(&mut self, state: &mut State<E::Machine>, instruction: &Instruction) -> Build<bool> {
        let before = state.layers.len();
        let cached = match &instruction.kind {
            Kind::Run(run) => self.run(state, instruction, run)?,
            Kind::Copy(transfer) => self.transfer(state, instruction, transfer, false)?,
            Kind::Add(transfer) => self.transfer(state, instruction, transfer, true)?,
            Kind::Workdir(word) => self.workdir(state, instruction, word)?,
            _ => {
                self.configure(state, instruction)?;
                false
            }
        };
        if matches!(instruction.kind, Kind::Arg(_)) {
            // It leaves nothing in the image.
            return Ok(cached);
        }
        let history = History {
            created: Some(self.created()),
            created_by: Some(instruction.text.clone()),
            empty_layer: state.layers.len() == before,
            ..History::default()
        };
        state.configuration.history.push(history);
        Ok(cached)
    }

    /// Instructions that change the configuration alone.
    fn configure(&mut self, state: &mut State<E::Machine>, instruction: &Instruction) -> Build<()> {
        match &instruction.kind {
            Kind::Arg(arguments) => {
                for (name, default) in arguments {
                    let default = default.as_ref().map(|word| self.expand(state, word)).transpose()?;
                    let name = name.text.clone();
                    let meta = || self.meta.iter().rev().find(|(key, _)| *key == name)?.1.clone();
                    let given = self.options.arguments.get(&name).cloned();
                    let value = given.or(default).or_else(meta).or_else(|| platform_argument(&name));
                    self.consumed.insert(name.clone());
                    if let Some(value) = value {
                        state.arguments.retain(|(other, _)| *other != name);
                        state.arguments.push((name, value));
                    }
                }
            }
            Kind::Env(pairs) => {
                // All of them see the environment as it was before.
                let mut assignments = Vec::new();
                for (name, value) in pairs {
                    assignments.push((self.expand(state, name)?, self.expand(state, value)?));
                }
                for (name, value) in assignments {
                    state.arguments.retain(|(other, _)| *other != name);
                    state.process().set(&name, &value);
                }
            }
            Kind::Label(pairs) => {
                for (name, value) in pairs {
                    let (name, value) = (self.expand(state, name)?, self.expand(state, value)?);
                    state.process().labels.insert(name, value);
                }
            }
            Kind::Expose(words) => {
                for (place, text) in self.expand_words(state, words)? {
                    for port in names::ports(&text).map_err(|failure| self.at(place, failure))? {
                        state.process().exposed_ports.insert(port, Empty {});
                    }
                }
            }
            Kind::Volume(words) => {
                for word in words {
                    let path = self.expand(state, word)?;
                    if path.is_empty() {
                        return self.refuse(word.place, "a volume needs a path", None);
                    }
                    state.process().volumes.insert(path, Empty {});
                }
            }
            Kind::User(word) => state.process().user = self.expand(state, word)?,
            Kind::StopSignal(word) => {
                let signal = self.expand(state, word)?;
                if signal_number(&signal).is_none() {
                    return self.refuse(
                        word.place,
                        format!("`{signal}` is no signal"),
                        Some("such as SIGTERM or 9"),
                    );
                }
                state.process().stop_signal = signal;
            }
            Kind::Cmd(command) => {
                let words = with_shell(state.process(), command);
                state.process().cmd = Some(words);
            }
            Kind::Entrypoint(command) => {
                let words = with_shell(state.process(), command);
                let process = state.process();
                process.entrypoint = (!words.is_empty()).then_some(words);
                // A CMD of the base image was for its entry point, unless this Dockerfile gave another.
                process.cmd = None;
            }
            Kind::Shell(words) => state.process().shell = Some(words.clone()),
            Kind::Maintainer(word) => state.configuration.author = Some(word.text.clone()),
            Kind::Onbuild(word) => state.process().on_build.push(word.text.clone()),
            Kind::Healthcheck(check) => {
                let test = match &check.command {
                    None => vec!["NONE".to_owned()],
                    Some(Command::Exec(words)) => {
                        std::iter::once("CMD".to_owned()).chain(words.clone()).collect()
                    }
                    Some(Command::Shell(text)) => vec!["CMD-SHELL".to_owned(), text.clone()],
                };
                state.process().healthcheck = Some(Healthcheck {
                    test,
                    interval: check.interval,
                    timeout: check.timeout,
                    start_period: check.start_period,
                    start_interval: check.start_interval,
                    retries: check.retries.into(),
                });
            }
            // Carried out elsewhere.
            Kind::Run(_) | Kind::Copy(_) | Kind::Add(_) | Kind::Workdir(_) => {}
        }
        Ok(())
    }

    /// Takes a step from the cache, or makes it and remembers it; true if it was there.
    fn cached(
        &mut self,
        state: &mut State<E::Machine>,
        key: Key,
        make: impl FnOnce(&mut Self, &mut State<E::Machine>) -> Build<Option<Layer>>,
    ) -> Build<bool> {
        let store = self.writing.store().clone();
        let known = if self.options.no_cache { None } else { self.cache.find(&key, &store) };
        let was_there = known.is_some();
        let layer = match known {
            Some(record) => record.layer,
            None => {
                let layer = make(self, state)?;
                let record = Record { layer: layer.clone() };
                let kept = self.cache.keep(&key, &record);
                kept.map_err(|error| Failure::new(format!("cannot write the build cache: {error}")))?;
                layer
            }
        };
        state.key = key;
        if let Some(layer) = layer {
            if let Some(files) = &mut state.files {
                let added = files.add_layer(&store, &layer.0.digest);
                added.map_err(|error| Failure::new(chain(&error)))?;
            }
            state.layers.push(layer);
        }
        Ok(was_there)
    }

    /// Writes a layer to the store; `None` if nothing was put into it.
    fn layer(
        &self,
        fill: impl FnOnce(&mut LayerWriter<agentkernel_image::BlobWriter>) -> Result<(), Failure>,
    ) -> Result<Option<Layer>, Failure> {
        let stored = |error: agentkernel_image::StoreError| Failure {
            hint: error.hint(),
            ..Failure::new(chain(&error))
        };
        let mut writer = LayerWriter::new(self.writing.blob().map_err(stored)?, self.epoch());
        fill(&mut writer)?;
        if writer.items() == 0 {
            return Ok(None);
        }
        let blob = writer.finish().map_err(|error| Failure::new(format!("cannot write a layer: {error}")))?;
        let (digest, size) = blob.finish(None).map_err(stored)?;
        let annotations = BTreeMap::new();
        let descriptor = Descriptor { media_type: LAYER.into(), digest, size, annotations, platform: None };
        Ok(Some((descriptor, digest)))
    }

    /// Reads a layer of the store.
    fn reader(&self, layer: &Layer) -> Result<LayerReader, Failure> {
        let file = self.writing.store().open_blob(&layer.0.digest);
        file.map(LayerReader::new).map_err(|error| Failure::new(chain(&error)))
    }
}

/// A command as the configuration has it: shell form with its shell.
fn with_shell(process: &Process, command: &Command) -> Vec<String> {
    match command {
        Command::Exec(words) => words.clone(),
        Command::Shell(text) if text.is_empty() => Vec::new(),
        Command::Shell(text) => shell(process).into_iter().chain([text.clone()]).collect(),
    }
}

fn shell(process: &Process) -> Vec<String> {
    process.shell.clone().unwrap_or_else(|| vec!["/bin/sh".to_owned(), "-c".to_owned()])
}

/// Arguments that say what is built for, and on what.
fn platform_argument(name: &str) -> Option<String> {
    let value = match name {
        "TARGETPLATFORM" | "BUILDPLATFORM" => "linux/amd64",
        "TARGETOS" | "BUILDOS" => "linux",
        "TARGETARCH" | "BUILDARCH" => "amd64",
        "TARGETVARIANT" | "BUILDVARIANT" => "",
        _ => return None,
    };
    Some(value.to_owned())
}
