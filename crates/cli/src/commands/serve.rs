//! `agentkernel serve`.

use std::io::Read;
use std::net::SocketAddr;
use std::path::Path;

use agentkernel_sandbox::configuration::{ApiKey, ApiKeySource, Profile};
use agentkernel_sandbox::options::{self, Surroundings};
use agentkernel_sandbox::state::Home;
use agentkernel_sandbox::{Problem, io, plain};
use agentkernel_server::engine::{Engine, Grants, Limits, Settings};
use agentkernel_server::http::{self, Keys, Place};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::images;
use crate::arguments::{GrantArguments, ServeArguments};
use crate::{environment, ui};

/// Name of the unix socket in the state directory.
const SOCKET: &str = "serve.sock";
/// Variable with an API key.
const KEY_VARIABLE: &str = "AGENTKERNEL_API_KEY";
/// Largest file of keys, bytes.
const KEY_FILE: u64 = 64 << 10;

pub(super) fn serve(arguments: &ServeArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    let surroundings = environment::surroundings()?;
    let keys = keys(arguments, &surroundings)?;
    let limits = Limits {
        runs: arguments.runs.map_or_else(default_runs, usize::from),
        queue: usize::from(arguments.queue),
        sandboxes: usize::from(arguments.sandboxes),
    };
    let settings = settings(&home, surroundings, &arguments.grants, limits)?;
    let runtime = runtime()?;
    let served = runtime.block_on(run(arguments, &home, settings, keys));
    runtime.shutdown_background();
    served.map(|()| 0)
}

/// Temporary sandboxes at once, where nothing is said.
pub(super) fn default_runs() -> usize {
    (std::thread::available_parallelism().map_or(1, usize::from) * 4).max(8)
}

/// A runtime with threads: what one request waits for keeps no other.
pub(super) fn runtime() -> Result<tokio::runtime::Runtime, Problem> {
    let threads = std::thread::available_parallelism().map_or(2, usize::from).max(2);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .map_err(|error| plain("runtime", format!("cannot start: {error}"), None))
}

/// What the engine of a server works with.
pub(super) fn settings(
    home: &Home,
    surroundings: Surroundings,
    arguments: &GrantArguments,
    limits: Limits,
) -> Result<Settings, Problem> {
    let most = if arguments.allow_host_access { Profile::Permissive } else { Profile::Moderate };
    let profile = arguments.profile.unwrap_or(most);
    if profile == Profile::Permissive && !arguments.allow_host_access {
        let hint = "add --allow-host-access, or leave --profile out";
        return Err(plain("usage", "profile permissive reads and writes what is the host's", Some(hint)));
    }
    let configuration = arguments.config.as_ref().map(|path| surroundings.current_directory.join(path));
    // Wrong now is better than wrong with every request.
    options::configuration(
        configuration.as_deref(),
        &surroundings.current_directory,
        &surroundings.user.home,
    )?;
    Ok(Settings {
        home: home.clone(),
        program: environment::program()?,
        registry: images::options(false)?,
        grants: Grants { profile, host_access: arguments.allow_host_access },
        surroundings,
        configuration,
        limits,
    })
}

async fn run(arguments: &ServeArguments, home: &Home, settings: Settings, keys: Keys) -> Result<(), Problem> {
    let mut places = Vec::new();
    if !arguments.no_tcp {
        places.push(Place::Tcp(SocketAddr::new(arguments.host, arguments.port)));
    }
    places.push(match &arguments.socket {
        Some(path) => Place::Unix(path.clone()),
        None if arguments.no_tcp => Place::Unix(home.path().join(SOCKET)),
        // Two servers of one user are none too many: the first has the socket that nobody named.
        None => Place::UnixIfFree(home.path().join(SOCKET)),
    });
    let keyless = keys.is_empty();
    // Before anybody is told that it serves: from then on it ends in order.
    let signals = (handled(SignalKind::interrupt())?, handled(SignalKind::terminate())?);
    let engine = Engine::new(settings);
    let listening = http::listen(engine.clone(), keys, &places).await?;
    for address in listening.addresses() {
        ui::data(&format!("http://{address}\n"));
    }
    if !arguments.quiet {
        let whom = if keyless { "this user only" } else { "whoever has an API key" };
        let sockets = listening.sockets();
        let sockets: String =
            sockets.iter().map(|path| format!(", unix socket {}", ui::path(path))).collect();
        ui::note(&format!("serving {whom}{sockets}"));
        match engine.project() {
            Some(project) => ui::note(&format!(
                "sandboxes share {} as their profile says: moderate has a copy of it",
                ui::path(&project)
            )),
            None => ui::note("sandboxes share no project: none was found here"),
        }
    }
    listening.serve(ended(signals, arguments.quiet)).await?;
    engine.settle_down().await;
    Ok(())
}

/// A signal that no longer ends the process by itself.
pub(super) fn handled(kind: SignalKind) -> Result<Signal, Problem> {
    signal(kind).map_err(io("handle signals"))
}

/// Waits for the first signal to end; the second ends at once.
async fn ended((mut interrupt, mut terminate): (Signal, Signal), quiet: bool) {
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    if !quiet {
        ui::note("ending: requests that run may end; sandboxes live on");
    }
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => std::process::exit(130),
            _ = terminate.recv() => std::process::exit(143),
        }
    });
}

/// The keys: of flags, else of the environment, else of the configuration.
fn keys(arguments: &ServeArguments, surroundings: &Surroundings) -> Result<Keys, Problem> {
    let mut keys = Keys::default();
    for key in &arguments.api_key {
        keys.add(&parse(key, "--api-key")?);
    }
    if let Some(path) = &arguments.api_key_file {
        for line in read(path)?.lines().map(str::trim).filter(|line| !line.is_empty()) {
            keys.add(&parse(line, &path.display().to_string())?);
        }
        if keys.is_empty() {
            let message = format!("there is no key in {}", path.display());
            return Err(plain("usage", message, Some("write one a line: openssl rand -hex 32 > FILE")));
        }
    }
    if !keys.is_empty() {
        return Ok(keys);
    }
    if let Some(key) = surroundings.variable(KEY_VARIABLE.as_ref()).filter(|key| !key.is_empty()) {
        keys.add(&parse(&key.to_string_lossy(), KEY_VARIABLE)?);
        return Ok(keys);
    }
    let named = arguments.grants.config.as_deref();
    let (configuration, _) =
        options::configuration(named, &surroundings.current_directory, &surroundings.user.home)?;
    match configuration.api_key {
        None => {}
        Some(ApiKeySource::Key(key)) => keys.add(&key),
        Some(ApiKeySource::Variable(name)) => {
            let value = surroundings.variable(name.as_ref()).ok_or_else(|| {
                let message = format!("api_key_env names {name}, which is not set");
                plain("configuration", message, Some("set it, or take the line out"))
            })?;
            keys.add(&parse(&value.to_string_lossy(), &name)?);
        }
    }
    // A project's own file may be a stranger's, and so its key known to others.
    keys.local = named.is_none();
    Ok(keys)
}

fn parse(text: &str, place: &str) -> Result<ApiKey, Problem> {
    text.parse().map_err(|error| {
        let hint = Some("such as what openssl rand -hex 32 prints");
        plain("usage", format!("{place} holds no API key: {error}"), hint)
    })
}

fn read(path: &Path) -> Result<String, Problem> {
    let what = || format!("read the API keys in {}", path.display());
    let file = std::fs::File::open(path).map_err(io(what()))?;
    let mut text = String::new();
    file.take(KEY_FILE + 1).read_to_string(&mut text).map_err(io(what()))?;
    if text.len() as u64 > KEY_FILE {
        let message = format!("{} is larger than {} KiB", path.display(), KEY_FILE >> 10);
        return Err(plain("usage", message, Some("write one key a line")));
    }
    Ok(text)
}
