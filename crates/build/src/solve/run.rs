//! RUN: a program in the stage's machine.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;

use agentkernel_image::{LayerItem, LayerReader, LayerWriter, Metadata, NodeKind};

use super::{Build, BuildError, Event, Executor, Failure, Layer, Machine, PREDEFINED, Solver, State, shell};
use crate::cache::{Key, Record};
use crate::configuration::DEFAULT_PATH;
use crate::dockerfile::{Command, Instruction, Mount, MountKind, Run, Word};
use crate::executor::{LayerSource, LayerTarget, Step, StepMount, StepSource};
use crate::ignore::IgnoreFile;
use crate::source::{self, Item, Selection, Tree};

/// Most layers that lie over a machine's root file system: what mount(2) takes as options is one page.
const LAYERS_LIMIT: usize = 60;
/// Where a document that is a program itself is mounted.
const SCRIPT: &str = "/dev/agentkernel-script";
/// Longest end of a program's output that an error repeats, bytes.
const TAIL: usize = 2 << 10;

/// A stage's machine.
pub(super) struct Running<M> {
    machine: M,
    /// How many of the stage's layers its root file system has.
    settled: usize,
    /// Numbers of the layers after those.
    numbers: Vec<u32>,
    next: u32,
}

/// What is mounted for one step, besides its layers.
struct Mounts {
    mounts: Vec<StepMount>,
    environment: Vec<(String, String)>,
    /// Caches to be kept afterwards: number of the layer, key of the record.
    caches: Vec<(u32, Key, File)>,
}

impl<E: Executor> Solver<'_, E> {
    /// RUN; true if it was done before.
    pub(super) fn run(
        &mut self,
        state: &mut State<E::Machine>,
        instruction: &Instruction,
        run: &Run,
    ) -> Build<bool> {
        if let Some(security) = &run.security {
            return self.refuse(security.place, "--security is not supported", None);
        }
        let network = match run.network.as_ref().map(|word| (word.place, word.text.as_str())) {
            None | Some((_, "default")) => true,
            Some((_, "none")) => false,
            Some((place, "host")) => {
                let hint = Some("a build has no business on the host's network");
                return self.refuse(place, "--network=host is not supported", hint);
            }
            Some((place, other)) => {
                let message = format!("`{other}` is no network");
                return self.refuse(place, message, Some("there are default and none"));
            }
        };
        let (arguments, script) = command(state, run);
        let environment = environment(state);
        let process = &state.configuration.config;
        let directory =
            if process.working_dir.is_empty() { "/".to_owned() } else { process.working_dir.clone() };
        let user = process.user.clone();
        let mut key = state.key.with("RUN", arguments.iter().map(String::as_bytes));
        let pairs: Vec<String> = environment.iter().map(|(name, value)| format!("{name}={value}")).collect();
        key = key.with("environment", pairs.iter().map(String::as_bytes));
        key = key.with(
            "as",
            [directory.as_bytes(), user.as_bytes(), script.as_deref().unwrap_or_default().as_bytes()],
        );
        if !network {
            key = key.with("network", [&b"none"[..]]);
        }
        for mount in &run.mounts {
            key = self.mount_key(state, key, mount)?;
        }
        self.cached(state, key, |solver, state| {
            solver.execute(
                state,
                instruction,
                run,
                Program { arguments, environment, directory, user, script, network },
            )
        })
        .inspect(|_| {
            state.settled = state.layers.len();
        })
    }

    /// Runs the program and takes the layer it made.
    fn execute(
        &mut self,
        state: &mut State<E::Machine>,
        instruction: &Instruction,
        run: &Run,
        program: Program,
    ) -> Build<Option<Layer>> {
        let at = |solver: &Self, failure: Failure| solver.at(instruction.place, failure);
        self.ready(state).map_err(|failure| at(self, failure))?;
        let mut mounts = self.mounts(state, run)?;
        let Program { arguments, mut environment, directory, user, script, network } = program;
        environment.append(&mut mounts.environment);
        // Where a network is changes nothing of what is built.
        for name in PREDEFINED {
            if let Some(value) = self.options.arguments.get(name) {
                environment.push((name.to_owned(), value.clone()));
            }
        }
        if let Some(script) = script {
            let source = StepSource::File { mode: 0o755, uid: 0, gid: 0, content: script.into_bytes() };
            mounts.mounts.push(StepMount { target: SCRIPT.into(), source, read_only: true });
        }
        let running = state.machine.as_mut().ok_or_else(|| Failure::new("the stage has no machine"))?;
        let upper = running.number();
        let lower = running.numbers.clone();
        let step =
            Step { arguments, environment, directory, user, lower, upper, network, mounts: mounts.mounts };
        let mut tail = Vec::new();
        let on_event = &mut self.on_event;
        let end = running.machine.run(&step, &mut |bytes| {
            on_event(Event::Output(bytes));
            tail.extend_from_slice(bytes);
            if tail.len() > 2 * TAIL {
                tail.drain(..tail.len() - TAIL);
            }
        });
        let end = end.map_err(|failure| at(self, failure))?;
        for (number, key, lock) in mounts.caches {
            self.keep_cache(state, number, &key)?;
            drop(lock);
        }
        if end.code != 0 {
            let message = match end.out_of_memory {
                true => {
                    format!("the command ended with exit code {}: the machine ran out of memory", end.code)
                }
                false => format!("the command ended with exit code {}", end.code),
            };
            let tail = String::from_utf8_lossy(&tail[tail.len().saturating_sub(TAIL)..]).into_owned();
            let said = tail.trim_end();
            let hint = match (end.out_of_memory, said.is_empty()) {
                (true, _) => Some("give the build more memory: --memory 4G".to_owned()),
                (false, true) => None,
                (false, false) => Some(format!("it said last: {}", said.lines().last().unwrap_or_default())),
            };
            let error = self.file.error(instruction.place, message, hint);
            return Err(BuildError::Run { at: error, code: end.code });
        }
        let running = state.machine.as_mut().ok_or_else(|| Failure::new("the stage has no machine"))?;
        let machine = &mut running.machine;
        let layer = self.layer(|writer| machine.take_layer(upper, &mut Target(writer)));
        let layer = layer.map_err(|failure| self.at(instruction.place, failure))?;
        if layer.is_some() {
            running.numbers.push(upper);
        }
        Ok(layer)
    }

    /// Sees to it that the stage has a machine with all its layers.
    fn ready(&mut self, state: &mut State<E::Machine>) -> Result<(), Failure> {
        let over = state.machine.as_ref().map_or(0, |running| state.layers.len() - running.settled);
        if over > LAYERS_LIMIT {
            // Another one, over a root file system of what was built so far.
            state.machine = None;
        }
        if state.machine.is_none() {
            let many = state.layers.len() - state.settled > LAYERS_LIMIT;
            let settled = if many { state.layers.len() } else { state.settled };
            let root = self.executor.root_file_system(&state.layers[..settled])?;
            let machine = self.executor.start(&root)?;
            state.machine = Some(Running { machine, settled, numbers: Vec::new(), next: 1 });
        }
        let Some(running) = &mut state.machine else { return Ok(()) };
        while running.settled + running.numbers.len() < state.layers.len() {
            let layer = &state.layers[running.settled + running.numbers.len()];
            let number = running.number();
            running.machine.put_layer(number, &mut Stored(self.reader(layer)?))?;
            running.numbers.push(number);
        }
        Ok(())
    }

    /// What a mount adds to a step's key: what it shows, but not the content of caches and secrets.
    fn mount_key(&mut self, state: &mut State<E::Machine>, key: Key, mount: &Mount) -> Build<Key> {
        let target =
            mount.target.as_ref().map(|word| self.expand(state, word)).transpose()?.unwrap_or_default();
        let named = |solver: &Self, state: &State<E::Machine>, word: &Option<Word>| {
            word.as_ref().map(|word| solver.expand(state, word)).transpose().map(Option::unwrap_or_default)
        };
        let (kind, content) = match &mount.kind {
            MountKind::Ssh => return self.refuse(mount.place, "a mount of type ssh is not supported", None),
            MountKind::Bind { from, source, writable } => {
                let content =
                    self.selected(state, mount, from.as_ref(), source.as_ref(), |tree, selection| {
                        source::digest(tree, std::slice::from_ref(selection))
                    })?;
                (format!("bind {writable}"), content.to_string())
            }
            MountKind::Cache { id, mode, uid, gid, read_only, .. } => {
                (format!("cache {mode:?} {uid} {gid} {read_only}"), named(self, state, id)?)
            }
            MountKind::Secret { id, variable, mode, uid, gid, .. } => {
                (format!("secret {variable:?} {mode} {uid} {gid}"), named(self, state, id)?)
            }
            MountKind::Temporary { size } => (format!("tmpfs {size:?}"), String::new()),
        };
        Ok(key.with("mount", [target.as_bytes(), kind.as_bytes(), content.as_bytes()]))
    }

    /// What a mount shows of the context, a stage or an image, given to `use_it`.
    fn selected<T>(
        &mut self,
        state: &mut State<E::Machine>,
        mount: &Mount,
        from: Option<&Word>,
        source: Option<&Word>,
        use_it: impl FnOnce(&Tree<'_>, &Selection) -> Result<T, Failure>,
    ) -> Build<T> {
        let path = source.map(|word| self.expand(state, word)).transpose()?.unwrap_or_default();
        let pick = |tree: &Tree<'_>| -> Result<T, Failure> {
            let selections = tree.select(&path, &IgnoreFile::default())?;
            let selection = selections.first().ok_or_else(|| Failure::new("there is nothing to mount"))?;
            use_it(tree, selection)
        };
        match from {
            None => pick(&Tree::Context(self.context)).map_err(|failure| self.at(mount.place, failure)),
            Some(word) => {
                let (place, other) = self.take_source(word)?;
                let picked = match &other.files {
                    Some(files) => pick(&Tree::FileSystem(files)),
                    None => Err(Failure::new("a stage's files were not read")),
                };
                self.put_back(place, other);
                picked.map_err(|failure| self.at(mount.place, failure))
            }
        }
    }

    fn mounts(&mut self, state: &mut State<E::Machine>, run: &Run) -> Build<Mounts> {
        let mut all = Mounts { mounts: Vec::new(), environment: Vec::new(), caches: Vec::new() };
        for mount in &run.mounts {
            let target = mount.target.as_ref().map(|word| self.expand(state, word)).transpose()?;
            let target = target.map(|target| match target.starts_with('/') {
                true => target,
                false => format!("{}/{target}", state.configuration.config.working_dir),
            });
            match &mount.kind {
                MountKind::Temporary { size } => {
                    let source = StepSource::Memory(*size);
                    all.mounts.push(StepMount {
                        target: target.unwrap_or_default(),
                        source,
                        read_only: false,
                    });
                }
                MountKind::Secret { id, variable, required, mode, uid, gid } => {
                    let name = match (id, &target) {
                        (Some(id), _) => self.expand(state, id)?,
                        (None, Some(target)) => target.rsplit('/').next().unwrap_or_default().to_owned(),
                        (None, None) => return self.refuse(mount.place, "a secret needs an id", None),
                    };
                    let Some(content) = self.options.secrets.get(&name).cloned() else {
                        if *required {
                            let hint = format!("--secret id={name},src=FILE");
                            return self.refuse(
                                mount.place,
                                format!("the secret `{name}` was not given"),
                                Some(&hint),
                            );
                        }
                        continue;
                    };
                    if let Some(variable) = variable {
                        all.environment
                            .push((variable.clone(), String::from_utf8_lossy(&content).into_owned()));
                    }
                    if variable.is_none() || target.is_some() {
                        let target = target.unwrap_or_else(|| format!("/run/secrets/{name}"));
                        let source = StepSource::File { mode: *mode, uid: *uid, gid: *gid, content };
                        all.mounts.push(StepMount { target, source, read_only: true });
                    }
                }
                MountKind::Bind { from, source, writable } => {
                    let number = number_of(state)?;
                    let mut running = state.machine.take();
                    let put =
                        self.selected(state, mount, from.as_ref(), source.as_ref(), |tree, selection| {
                            let is_directory = selection.is_directory();
                            if let Some(running) = &mut running {
                                running.machine.put_layer(number, &mut Selected::new(tree, selection))?;
                            }
                            Ok(is_directory)
                        });
                    state.machine = running;
                    let path = if put? { Vec::new() } else { SINGLE.to_vec() };
                    let source = StepSource::Layer { layer: number, path };
                    let target = target.unwrap_or_default();
                    all.mounts.push(StepMount { target, source, read_only: !writable });
                }
                MountKind::Cache { id, from, source, mode, uid, gid, read_only, .. } => {
                    let target = target.unwrap_or_default();
                    let id = id.as_ref().map(|id| self.expand(state, id)).transpose()?;
                    let id = id.unwrap_or_else(|| target.clone());
                    let key = Key::begin().with("cache mount", [id.as_bytes()]);
                    // One step at a time, whatever its sharing: what two wrote could not be put together.
                    let lock = self
                        .cache
                        .lock(&key)
                        .map_err(|error| Failure::new(format!("cannot lock a cache: {error}")))?;
                    let number = number_of(state)?;
                    let mut running = state.machine.take();
                    let store = self.writing.store().clone();
                    let put =
                        match (self.cache.find(&key, &store).and_then(|record| record.layer), &mut running) {
                            (Some(layer), Some(running)) => {
                                let reader = self.reader(&layer);
                                reader
                                    .and_then(|reader| running.machine.put_layer(number, &mut Stored(reader)))
                                    .map_err(Into::into)
                            }
                            (None, Some(running)) if from.is_some() => self.selected(
                                state,
                                mount,
                                from.as_ref(),
                                source.as_ref(),
                                |tree, selection| {
                                    running.machine.put_layer(number, &mut Selected::new(tree, selection))
                                },
                            ),
                            (None, Some(running)) => {
                                let metadata = Metadata {
                                    mode: mode.map_or(0o755, |mode| (mode & 0o7777) as u16),
                                    user: *uid,
                                    group: *gid,
                                    ..Metadata::default()
                                };
                                running
                                    .machine
                                    .put_layer(number, &mut Empty(Some(metadata)))
                                    .map_err(Into::into)
                            }
                            _ => Ok(()),
                        };
                    state.machine = running;
                    put?;
                    let source = StepSource::Layer { layer: number, path: Vec::new() };
                    all.mounts.push(StepMount { target, source, read_only: *read_only });
                    if !read_only {
                        all.caches.push((number, key, lock));
                    }
                }
                MountKind::Ssh => {
                    return self.refuse(mount.place, "a mount of type ssh is not supported", None);
                }
            }
        }
        Ok(all)
    }

    /// Keeps what a cache holds now for later builds.
    fn keep_cache(&mut self, state: &mut State<E::Machine>, number: u32, key: &Key) -> Result<(), Failure> {
        let Some(running) = &mut state.machine else { return Ok(()) };
        let machine = &mut running.machine;
        let layer = self.layer(|writer| machine.take_layer(number, &mut Target(writer)))?;
        self.cache
            .keep(key, &Record { layer })
            .map_err(|error| Failure::new(format!("cannot keep a cache: {error}")))
    }
}

impl<M> Running<M> {
    fn number(&mut self) -> u32 {
        let number = self.next;
        self.next += 1;
        number
    }
}

fn number_of<M>(state: &mut State<M>) -> Result<u32, Failure> {
    let running = state.machine.as_mut();
    running.map(Running::number).ok_or_else(|| Failure::new("the stage has no machine"))
}

/// A program, ready to be run.
struct Program {
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    directory: String,
    user: String,
    /// A document that is a program of its own.
    script: Option<String>,
    /// Whether it has the machine's network.
    network: bool,
}

/// The words of a RUN, and the script if its document is one.
fn command<M>(state: &State<M>, run: &Run) -> (Vec<String>, Option<String>) {
    let text = match &run.command {
        Command::Exec(words) => return (words.clone(), None),
        Command::Shell(text) => text,
    };
    let with_shell = |text: String| shell(&state.configuration.config).into_iter().chain([text]).collect();
    match run.heredocs.as_slice() {
        [] => (with_shell(text.clone()), None),
        [only] if text.trim() == only.opening => {
            let script = only.text();
            if script.starts_with("#!") {
                return (vec![SCRIPT.to_owned()], Some(script));
            }
            (with_shell(script), None)
        }
        all => {
            // The shell reads the documents itself.
            let mut whole = format!("{text}\n");
            for heredoc in all {
                whole.push_str(&heredoc.content);
                whole.push_str(&heredoc.name);
                whole.push('\n');
            }
            (with_shell(whole), None)
        }
    }
}

/// Variables of a step, as [`State::variable`] has them.
fn environment<M>(state: &State<M>) -> Vec<(String, String)> {
    let set = state.configuration.config.env.iter().filter_map(|pair| pair.split_once('='));
    let mut variables: BTreeMap<String, String> =
        set.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    variables.extend(state.arguments.iter().cloned());
    variables.entry("PATH".into()).or_insert_with(|| DEFAULT_PATH.into());
    variables.into_iter().collect()
}

/// A layer of the store.
struct Stored(LayerReader);

impl LayerSource for Stored {
    fn next_item(&mut self) -> io::Result<Option<LayerItem>> {
        self.0.next_item().map_err(io::Error::other)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(io::Error::other)
    }
}

/// A directory with nothing in it.
struct Empty(Option<Metadata>);

impl LayerSource for Empty {
    fn next_item(&mut self) -> io::Result<Option<LayerItem>> {
        let root = |metadata| LayerItem::Node { path: Vec::new(), metadata, kind: NodeKind::Directory };
        Ok(self.0.take().map(root))
    }

    fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }
}

/// Name of a single file that is mounted.
const SINGLE: &[u8] = b"file";

/// Files that were selected, as a layer.
struct Selected<'a> {
    tree: &'a Tree<'a>,
    items: std::slice::Iter<'a, Item>,
    single: bool,
    links: BTreeMap<u64, Vec<u8>>,
    current: Option<Box<dyn io::Read + 'a>>,
}

impl<'a> Selected<'a> {
    fn new(tree: &'a Tree<'a>, selection: &'a Selection) -> Self {
        let single = !selection.is_directory();
        Self { tree, items: selection.items.iter(), single, links: BTreeMap::new(), current: None }
    }
}

impl LayerSource for Selected<'_> {
    fn next_item(&mut self) -> io::Result<Option<LayerItem>> {
        let Some(item) = self.items.next() else { return Ok(None) };
        let path = if self.single { SINGLE.to_vec() } else { item.path.clone() };
        if let Some(link) = item.link {
            if let Some(target) = self.links.get(&link) {
                return Ok(Some(LayerItem::HardLink { path, target: target.clone() }));
            }
            self.links.insert(link, path.clone());
        }
        self.current = match item.kind {
            NodeKind::File(_) => Some(self.tree.open(item).map_err(io::Error::other)?),
            _ => None,
        };
        Ok(Some(LayerItem::Node { path, metadata: item.metadata.clone(), kind: item.kind.clone() }))
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.current.as_mut().map_or(Ok(0), |reader| reader.read(buffer))
    }
}

/// Takes a layer into the store.
struct Target<'a, W>(&'a mut LayerWriter<W>);

impl<W: io::Write> LayerTarget for Target<'_, W> {
    fn item(&mut self, item: LayerItem) -> io::Result<()> {
        self.0.item(&item)
    }

    fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.data(bytes)
    }
}
