//! `agentkernel build`.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agentkernel_sandbox::build::{BuildRequest, Egress, Engine, Event, ImageBuilder, NetworkMode, Options};
use agentkernel_sandbox::configuration::BuildDefaults;
use agentkernel_sandbox::options::configuration;
use agentkernel_sandbox::project::CONFIGURATION_FILE;
use agentkernel_sandbox::{Problem, io, plain};

use super::images;
use crate::arguments::{BuildArguments, BuildEngine, BuildProgress, Network};
use crate::{environment, ui};

/// Largest secret, bytes.
const SECRET_LIMIT: u64 = 500 << 10;
/// Seconds since 1970 that everything built bears: reproducible-builds.org.
const EPOCH: &str = "SOURCE_DATE_EPOCH";
/// Most bytes of a step's output that are kept to be shown if it fails.
const KEPT: usize = 64 << 10;

pub(super) fn build(arguments: &BuildArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    home.sweep();
    let mut builder = ImageBuilder::open(&home, &environment::program()?)?;
    builder.registry = images::options(false)?;
    if let Some(memory_mib) = arguments.memory {
        builder.resources.memory_mib = memory_mib;
    }
    if let Some(vcpus) = arguments.vcpus {
        builder.resources.vcpus = vcpus;
    }
    builder.egress = egress(arguments)?;
    builder.certificates = environment::certificates();
    let defaults = Defaults::of(arguments)?;
    let request = BuildRequest {
        name: arguments.tag.clone(),
        context: arguments.context.clone().or(defaults.context).unwrap_or_else(|| ".".into()),
        dockerfile: arguments.dockerfile.clone().or(defaults.dockerfile),
        engine: match arguments.engine {
            BuildEngine::Native => Engine::Native,
            BuildEngine::Docker => Engine::Docker,
        },
        options: Options {
            target: arguments.target.clone().or(defaults.build.target),
            arguments: defaults
                .build
                .arguments
                .into_iter()
                .chain(build_arguments(&arguments.build_arg)?)
                .collect(),
            labels: arguments.label.iter().cloned().collect(),
            secrets: arguments.secret.iter().map(|text| secret(text)).collect::<Result<_, _>>()?,
            no_cache: arguments.no_cache || defaults.build.no_cache,
        },
    };
    let brief = arguments.progress == BuildProgress::Auto && std::io::stderr().is_terminal();
    let mut view =
        View { quiet: arguments.quiet, brief, status: ui::Status::new(brief), kept: Vec::new(), pull: None };
    let image = builder.build_with(&request, &mut |event| view.show(event)).inspect_err(|_| view.failed())?;
    view.status.clear();
    if arguments.json {
        ui::json(&image);
    } else {
        ui::data(&format!("{}\n", image.name));
        if !arguments.quiet {
            ui::note(&format!(
                "built {}, {}: agentkernel run --image {} -- ...",
                image.name,
                image.format_size(),
                image.name
            ));
        }
    }
    Ok(0)
}

/// What ADD may reach. It is said by flags alone: a project may be a stranger's.
fn egress(arguments: &BuildArguments) -> Result<Egress, Problem> {
    let is_said = arguments.network.is_some() || !arguments.allow.is_empty() || !arguments.deny.is_empty();
    if is_said && arguments.engine == BuildEngine::Docker {
        let message = "Docker does not keep to --network, --allow and --deny";
        return Err(plain("build-network", message, Some("leave out --engine docker, or these")));
    }
    let mode = match arguments.network {
        Some(Network::None) => NetworkMode::None,
        Some(Network::Public) | None => NetworkMode::Public,
    };
    Ok(Egress { mode, allow: arguments.allow.clone(), deny: arguments.deny.clone() })
}

/// What the configuration of the directory that is built says.
struct Defaults {
    build: BuildDefaults,
    context: Option<PathBuf>,
    dockerfile: Option<PathBuf>,
}

impl Defaults {
    fn of(arguments: &BuildArguments) -> Result<Self, Problem> {
        let current = environment::current_directory()?;
        let place = match &arguments.context {
            Some(context) => current.join(context),
            None => current,
        };
        // A context that is not there is the builder's to complain about.
        let place = place.canonicalize().unwrap_or(place);
        let (configuration, directory) = configuration(None, &place, &environment::user()?.home)?;
        let build = configuration.build;
        let beneath =
            |path: &Option<PathBuf>| path.as_deref().map(|path| inside(&directory, path)).transpose();
        Ok(Self { context: beneath(&build.context)?, dockerfile: beneath(&build.dockerfile)?, build })
    }
}

/// A path that a project names, which may be a stranger's: its links must not lead out of the project.
fn inside(directory: &Path, path: &Path) -> Result<PathBuf, Problem> {
    let real = |path: &Path| path.canonicalize().map_err(io(format!("find {}", path.display())));
    let whole = directory.join(path);
    if real(&whole)?.starts_with(real(directory)?) {
        return Ok(whole);
    }
    let message =
        format!("{CONFIGURATION_FILE} names {}, which leads out of {}", path.display(), directory.display());
    Err(plain("configuration", message, Some("name it with a flag if that is meant")))
}

/// Shows what happens: on a terminal the running step and its last line, elsewhere everything.
struct View {
    quiet: bool,
    brief: bool,
    status: ui::Status,
    /// What the running step said, if it was not shown.
    kept: Vec<u8>,
    /// How far the base image is.
    pull: Option<images::Bars>,
}

impl View {
    fn show(&mut self, event: Event<'_>) {
        if self.quiet {
            if let Event::Output(bytes) = event {
                self.keep(bytes);
            }
            return;
        }
        if !matches!(event, Event::Pull(..))
            && let Some(bars) = self.pull.take()
        {
            bars.clear();
        }
        match event {
            Event::Step { stage, step, steps, text } => {
                self.kept.clear();
                self.status.clear();
                ui::raw(format!("[{} {step}/{steps}] {}\n", ui::line(stage), ui::line(text)).as_bytes());
            }
            Event::Cached => drop(ui::raw(format!("  {}\n", ui::paint("CACHED", "32")).as_bytes())),
            Event::Done(time) if time >= Duration::from_millis(100) => {
                self.status.clear();
                ui::raw(format!("  {:.1}s\n", time.as_secs_f64()).as_bytes());
            }
            Event::Done(_) => self.status.clear(),
            Event::Pull(name, transfer) => {
                let bars = self.pull.get_or_insert_with(|| {
                    ui::note(&format!("image {} is not here: pulling it", ui::line(name)));
                    images::Bars::new(self.brief, "pulling")
                });
                bars.show(transfer);
            }
            Event::Fetch { address, bytes, size } => {
                let of = size.map_or_else(String::new, |size| format!(" of {}", ui::size(size)));
                self.status.say(&format!("  {}{of} from {}", ui::size(bytes), ui::line(address)));
            }
            Event::Output(bytes) if self.brief => {
                self.keep(bytes);
                let text = String::from_utf8_lossy(bytes);
                if let Some(last) = text.lines().rev().find(|line| !line.trim().is_empty()) {
                    self.status.say(&format!("  {}", last.trim()));
                }
            }
            // A step's words are a stranger's: they must not write to a terminal.
            Event::Output(bytes) => {
                let clean: Vec<u8> = bytes
                    .iter()
                    .copied()
                    .filter(|byte| !byte.is_ascii_control() || matches!(byte, b'\n' | b'\t'))
                    .collect();
                ui::raw(&clean);
            }
            Event::Note(text) => {
                self.status.clear();
                ui::note(&text);
            }
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.kept.extend_from_slice(bytes);
        if self.kept.len() > 2 * KEPT {
            self.kept.drain(..self.kept.len() - KEPT);
        }
    }

    /// Shows what the failed step said.
    fn failed(&mut self) {
        self.status.clear();
        let text = String::from_utf8_lossy(&self.kept);
        for line in text.lines() {
            ui::raw(format!("  {}\n", ui::line(line)).as_bytes());
        }
    }
}

fn nameless<T>(text: &str) -> Result<T, Problem> {
    let hint = Some("--build-arg NAME=VALUE, or NAME for the value of that variable");
    Err(plain("build-arg", format!("the build argument `{text}` has no name"), hint))
}

fn build_arguments(given: &[String]) -> Result<BTreeMap<String, String>, Problem> {
    let mut arguments = BTreeMap::new();
    // What makes builds reproducible is said by this variable everywhere.
    if let Ok(seconds) = std::env::var(EPOCH) {
        arguments.insert(EPOCH.to_owned(), seconds);
    }
    for text in given {
        match text.split_once('=') {
            Some(("", _)) => return nameless(text),
            None if text.is_empty() => return nameless(text),
            Some((name, value)) => drop(arguments.insert(name.to_owned(), value.to_owned())),
            // As for Docker: a variable that is not set gives nothing.
            None => {
                if let Ok(value) = std::env::var(text) {
                    arguments.insert(text.clone(), value);
                }
            }
        }
    }
    Ok(arguments)
}

/// `id=NAME,src=FILE` or `id=NAME,env=VARIABLE`.
fn secret(text: &str) -> Result<(String, Vec<u8>), Problem> {
    let wrong = |message: String| {
        plain("secret", message, Some("--secret id=token,src=token.txt, or id=token,env=TOKEN"))
    };
    let (mut id, mut source, mut variable) = (None, None, None);
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("id", value)) => id = Some(value),
            Some(("src" | "source", value)) => source = Some(value),
            Some(("env", value)) => variable = Some(value),
            Some(("type", "file" | "env")) => {}
            _ => return Err(wrong(format!("`{part}` says nothing of a secret"))),
        }
    }
    let id = id.filter(|id| !id.is_empty()).ok_or_else(|| wrong("a secret needs an id".into()))?;
    let content = match (source, variable) {
        (Some(path), None) => {
            use std::io::Read;
            let mut content = Vec::new();
            let file = std::fs::File::open(Path::new(path)).map_err(io(format!("read the secret {path}")))?;
            file.take(SECRET_LIMIT + 1)
                .read_to_end(&mut content)
                .map_err(io(format!("read the secret {path}")))?;
            content
        }
        (None, variable) => {
            let name = variable.unwrap_or(id);
            let value =
                std::env::var_os(name).ok_or_else(|| wrong(format!("there is no variable {name}")))?;
            value.into_encoded_bytes()
        }
        (Some(_), Some(_)) => return Err(wrong("a secret comes from a file or a variable".into())),
    };
    if content.len() as u64 > SECRET_LIMIT {
        return Err(wrong(format!("the secret {id} is larger than 500 KiB")));
    }
    Ok((id.to_owned(), content))
}
