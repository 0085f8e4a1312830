//! From a client's request to a sandbox that runs, or to nothing.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use agentkernel_sandbox::client::{self, Lease, Life, Sandbox, Warmth};
use agentkernel_sandbox::configuration::{self, NetworkMode};
use agentkernel_sandbox::deadline::{Clocks, Deadline};
use agentkernel_sandbox::images::Images;
use agentkernel_sandbox::launch::{self, Launch};
use agentkernel_sandbox::options::{self, Options};
use agentkernel_sandbox::project::WorkspaceMode;
use agentkernel_sandbox::spec::Spec;
use agentkernel_sandbox::state::SandboxDirectory;
use agentkernel_sandbox::values::{self, Mount};
use agentkernel_sandbox::{Problem, lifecycle, plain};

use super::grants::{self, Powers};
use super::{Engine, blocking};
use crate::model::{MachineOptions, Network, Profile, Workspace};

/// Virtual processors that a client may ask for, if the host has no more.
const VCPUS: usize = 8;
/// Memory that a client may ask for, if the host has no more, MiB.
const MEMORY_MIB: u64 = 4 << 10;
/// Largest writable layer that a client may ask for, MiB.
const DISK_MIB: u64 = 1 << 20;
/// Longest list of anything in a request: words of a command, variables, rules.
const LIST: usize = 4096;
/// Longest word of a request, bytes: what Linux takes as one argument.
const WORD: usize = 128 << 10;

impl Engine {
    /// What a client asks for, as the engine takes it.
    pub(crate) fn options(&self, machine: &MachineOptions<'_>) -> Result<Options, Problem> {
        if let Some(other) = machine.backend.filter(|name| !matches!(*name, "qemu" | "automatic")) {
            let message = format!("there is no backend {}", agentkernel_sandbox::printable(other));
            return Err(plain("backend-unknown", message, Some("qemu, or automatic")));
        }
        let parallelism = std::thread::available_parallelism().map_or(1, usize::from);
        if machine.vcpus.is_some_and(|vcpus| vcpus == 0 || vcpus as usize > parallelism.max(VCPUS)) {
            let message = format!("a sandbox here has 1 to {} virtual processors", parallelism.max(VCPUS));
            return Err(plain("vcpus", message, None));
        }
        let memory = host_memory_mib().max(MEMORY_MIB);
        if machine.memory_mb.is_some_and(|mib| mib > memory) {
            let message = format!("a sandbox here has at most {memory} MiB of memory");
            return Err(plain("memory-size", message, None));
        }
        if machine.disk_mb.is_some_and(|mib| mib > DISK_MIB) {
            let message = format!("a writable layer has at most {DISK_MIB} MiB");
            return Err(plain("disk-size", message, None));
        }
        let home = &self.settings().surroundings.user.home;
        let mounts = machine.volumes.iter().map(|text| {
            let mount: Mount = parse("volume", text)?;
            // Before the path is looked at: whether it is there is nothing to a client.
            if mount.is_path() && !self.grants().host_access {
                return Err(grants::refused("directories of the host"));
            }
            mount.resolve(home)
        });
        let options = Options {
            image: machine.image.map(|image| self.image(image)).transpose()?,
            profile: machine.profile.map(Into::into).or_else(|| self.grants().default_profile()),
            workspace: machine.workspace.map(Into::into),
            network: machine.network.map(Into::into),
            allow: list("allow", machine.allow)?,
            deny: list("deny", machine.deny)?,
            environment: variables(machine.env)?,
            mounts: mounts.collect::<Result<_, _>>()?,
            directory: machine.workdir.map(directory).transpose()?,
            user: machine.user.map(user).transpose()?,
            vcpus: machine.vcpus,
            memory_mib: machine.memory_mb,
            disk_mib: machine.disk_mb,
            configuration: self.settings().configuration.clone(),
            ..Options::default()
        };
        Ok(options)
    }

    /// An image that a client names: never a file of the host's, unless that is granted.
    fn image(&self, name: &str) -> Result<String, Problem> {
        word("image", name)?;
        let images = Images::open(self.home())?;
        if name != "host" && !self.grants().host_access && images.is_file(name) {
            return Err(grants::refused("images of files"));
        }
        Ok(name.to_owned())
    }

    /// Settles what is asked for; pulls the image if it is not there.
    pub(super) async fn settle(&self, options: Options, command: Vec<OsString>) -> Result<Launch, Problem> {
        let engine = self.clone();
        let request = blocking(move || {
            let surroundings = &engine.settings().surroundings;
            let request = options.request(engine.home(), surroundings, &command)?.request;
            // Also what the project's configuration names.
            request.image.as_deref().map(|image| engine.image(image)).transpose()?;
            engine.grants().check(&Powers {
                profile: request.profile,
                workspace: request.workspace.as_ref(),
                mounts: &request.mounts,
                network: &request.network,
            })?;
            Ok(request)
        })
        .await?;
        if let Some(image) = request.image.as_deref().filter(|image| *image != "host") {
            self.ensure(image).await?;
        }
        let home = self.home().clone();
        blocking(move || launch::settle(&home, request, &mut |text| tracing::info!("{text}"))).await
    }

    /// Pulls an image that is not there.
    async fn ensure(&self, image: &str) -> Result<(), Problem> {
        let images = Images::open(self.home())?;
        if images.is_here(image) {
            return Ok(());
        }
        // Who may not reach what is private from a sandbox may not have the server reach it. A name may lead there all the
        // same: it is the registry's client that looks it up.
        if !self.grants().host_access && images.registry(image)?.is_private() {
            return Err(grants::refused("registries by their address"));
        }
        tracing::info!("pulling {image}");
        let pulled = images.pull(image, &self.settings().registry, &|_| {}).await;
        pulled.map(drop).map_err(|mut problem| {
            if let Some(near) = images.nearest(image) {
                problem.hint = Some(format!("did you mean {near}?"));
            }
            problem
        })
    }

    /// Makes the sandbox and starts it.
    pub(super) async fn start_new(
        &self,
        launch: &Launch,
        life: Life,
        ttl: Option<Duration>,
        warmth: Warmth,
    ) -> Result<Held, Problem> {
        let deadline = ttl.map(|time| Deadline::after(time, &Clocks::now()));
        let (home, spec) = (self.home().clone(), launch.spec.clone());
        let counted = Counted::new(&self.shared.held);
        // What could not be started was not created, nor what nobody waits for by the time it is.
        let (held, mut guard) = blocking(move || {
            let held = client::create(&home, &spec, life, deadline.as_ref())?;
            let directory = Some((held.directory.clone(), spec.uuid));
            Ok((held, Held { directory, lease: None, counted: Some(counted) }))
        })
        .await?;
        let lease = client::start(held, &self.settings().program, warmth).await?;
        let lease = guard.lease.insert(lease);
        lifecycle::initialise(lease.sandbox(), &mut |_| {}).await?;
        Ok(guard)
    }
}

/// A sandbox that somebody waits for. Dropped, by whatever became of who waited, it is ended and removed.
#[derive(Debug)]
pub(super) struct Held {
    /// And the UUID of what was made there: another may have its name by the time it is ended.
    directory: Option<(SandboxDirectory, String)>,
    pub lease: Option<Lease>,
    /// Until nothing of it is left, or it lives on.
    counted: Option<Counted>,
}

/// Counts something until it is dropped.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Held {
    /// The sandbox.
    pub(super) fn sandbox(&self) -> Result<&Sandbox, Problem> {
        let lease = self.lease.as_ref().ok_or_else(|| plain("internal", "the sandbox was let go", None))?;
        Ok(lease.sandbox())
    }

    /// The lease.
    pub(super) fn lease(&mut self) -> Result<&mut Lease, Problem> {
        self.lease.as_mut().ok_or_else(|| plain("internal", "the sandbox was let go", None))
    }

    /// Lets it live on.
    pub(super) async fn live_on(mut self) -> Result<SandboxDirectory, Problem> {
        let lease = self.lease.take().ok_or_else(|| plain("internal", "the sandbox was let go", None))?;
        let sandbox = lease.live_on().await?;
        self.directory = None;
        Ok(sandbox.directory().clone())
    }

    /// Ends and removes it, and waits for that.
    pub(super) async fn release(mut self) -> Result<(), Problem> {
        let (lease, directory, counted) = (self.lease.take(), self.directory.take(), self.counted.take());
        blocking(move || {
            end(lease, directory);
            drop(counted);
            Ok(())
        })
        .await
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let (lease, directory) = (self.lease.take(), self.directory.take());
        if lease.is_none() && directory.is_none() {
            return;
        }
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                let counted = self.counted.take();
                runtime.spawn_blocking(move || {
                    end(lease, directory);
                    drop(counted);
                });
            }
            // The lease's end is the sandbox's; the next sweep takes what is left.
            Err(_) => drop(lease),
        }
    }
}

/// What was made for somebody who may be gone: dropped before it is taken, it is removed again.
struct Unclaimed<T, M: Fn(T) -> Vec<SandboxDirectory>> {
    made: Option<T>,
    sandboxes: M,
    counted: Option<Counted>,
}

impl<T, M: Fn(T) -> Vec<SandboxDirectory>> Drop for Unclaimed<T, M> {
    fn drop(&mut self) {
        let (Some(made), Ok(runtime)) = (self.made.take(), tokio::runtime::Handle::try_current()) else {
            return;
        };
        let (sandboxes, counted) = ((self.sandboxes)(made), self.counted.take());
        runtime.spawn(async move {
            for directory in sandboxes {
                if let Err(problem) = lifecycle::remove(&directory, true).await {
                    tracing::warn!("{}", problem.message);
                }
            }
            drop(counted);
        });
    }
}

/// Does what must not stop half-way to its end. If nobody waits for that any more, what it made is removed again.
pub(super) async fn completed<T: Send + 'static>(
    engine: &Engine,
    work: impl Future<Output = Result<T, Problem>> + Send + 'static,
    sandboxes: impl Fn(T) -> Vec<SandboxDirectory> + Send + 'static,
) -> Result<T, Problem> {
    let counted = Counted::new(&engine.shared.held);
    let (tell, told) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let done = work.await.map(|made| Unclaimed { made: Some(made), sandboxes, counted: Some(counted) });
        // What cannot be told, or is told and not heard, is dropped.
        let _ = tell.send(done);
    });
    let ended = || plain("internal", "the work ended without a result", None);
    let mut unclaimed = told.await.unwrap_or_else(|_| Err(ended()))?;
    unclaimed.made.take().ok_or_else(ended)
}

fn end(lease: Option<Lease>, directory: Option<(SandboxDirectory, String)>) {
    if let Some(lease) = lease {
        lease.release();
    }
    let Some((directory, uuid)) = directory else { return };
    if !Spec::load(directory.path()).is_ok_and(|spec| spec.uuid == uuid) {
        return;
    }
    let removed = tokio::runtime::Handle::current().block_on(lifecycle::remove(&directory, true));
    if let Err(problem) =
        removed.or_else(|problem| if problem.code == "not-found" { Ok(()) } else { Err(problem) })
    {
        tracing::warn!("{}", problem.message);
    }
}

/// Memory of the host, MiB.
fn host_memory_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.map_or(0, |kib| kib >> 10)
}

/// Refuses what no process can be given.
pub(super) fn word(what: &str, text: &str) -> Result<(), Problem> {
    if text.len() > WORD {
        return Err(plain("usage", format!("{what} is longer than {} KiB", WORD >> 10), None));
    }
    if text.contains('\0') {
        return Err(plain("usage", format!("{what} has a NUL in it"), None));
    }
    Ok(())
}

fn words(what: &str, list: &[String]) -> Result<(), Problem> {
    if list.len() > LIST {
        return Err(plain("usage", format!("{what} has more than {LIST} entries"), None));
    }
    list.iter().try_for_each(|text| word(what, text))
}

/// A command, as far as it can be one.
pub(super) fn command(list: &[String]) -> Result<Vec<OsString>, Problem> {
    words("command", list)?;
    if list.first().is_none_or(String::is_empty) {
        return Err(plain("usage", "command is empty", Some("such as [\"echo\", \"hello\"]")));
    }
    Ok(list.iter().map(OsString::from).collect())
}

/// Variables, each with its value: the server's own are nothing to clients.
pub(super) fn variables(list: &[String]) -> Result<Vec<(OsString, OsString)>, Problem> {
    words("env", list)?;
    list.iter().filter_map(|text| options::variable(text.as_ref(), None).transpose()).collect()
}

/// A directory of the guest.
pub(super) fn directory(text: &str) -> Result<PathBuf, Problem> {
    word("workdir", text)?;
    let path = Path::new(text);
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        let hint = Some("give an absolute path of the sandbox's");
        return Err(plain("usage", "workdir is no absolute path", hint));
    }
    Ok(path.to_owned())
}

/// A user of the guest.
pub(super) fn user(text: &str) -> Result<String, Problem> {
    word("user", text)?;
    if text.is_empty() || text.len() > 256 || text.chars().any(char::is_control) {
        return Err(plain("usage", "user is none", Some("a name or id of the guest, such as 1000 or root")));
    }
    Ok(text.to_owned())
}

/// A time.
pub(super) fn time(what: &str, text: &str) -> Result<Duration, Problem> {
    values::duration(text).map_err(|error| plain("usage", format!("{what}: {error}"), None))
}

fn parse<T: FromStr>(what: &str, text: &str) -> Result<T, Problem>
where
    T::Err: std::fmt::Display,
{
    word(what, text)?;
    text.parse().map_err(|error| plain("usage", format!("{what}: {error}"), None))
}

/// Texts of rules, ports and the like.
pub(super) fn list<T: FromStr>(what: &str, texts: &[String]) -> Result<Vec<T>, Problem>
where
    T::Err: std::fmt::Display,
{
    words(what, texts)?;
    texts.iter().map(|text| parse(what, text)).collect()
}

impl From<Profile> for configuration::Profile {
    fn from(profile: Profile) -> Self {
        match profile {
            Profile::Permissive => Self::Permissive,
            Profile::Moderate => Self::Moderate,
            Profile::Restrictive => Self::Restrictive,
        }
    }
}

impl From<configuration::Profile> for Profile {
    fn from(profile: configuration::Profile) -> Self {
        match profile {
            configuration::Profile::Permissive => Self::Permissive,
            configuration::Profile::Moderate => Self::Moderate,
            configuration::Profile::Restrictive => Self::Restrictive,
        }
    }
}

impl From<Workspace> for WorkspaceMode {
    fn from(mode: Workspace) -> Self {
        match mode {
            Workspace::Cow => Self::Cow,
            Workspace::Rw => Self::Rw,
            Workspace::Ro => Self::Ro,
            Workspace::None => Self::None,
        }
    }
}

impl From<WorkspaceMode> for Workspace {
    fn from(mode: WorkspaceMode) -> Self {
        match mode {
            WorkspaceMode::Cow => Self::Cow,
            WorkspaceMode::Rw => Self::Rw,
            WorkspaceMode::Ro => Self::Ro,
            WorkspaceMode::None => Self::None,
        }
    }
}

impl From<Network> for NetworkMode {
    fn from(mode: Network) -> Self {
        match mode {
            Network::None => Self::None,
            Network::Public => Self::Public,
        }
    }
}

impl From<NetworkMode> for Network {
    fn from(mode: NetworkMode) -> Self {
        match mode {
            NetworkMode::None => Self::None,
            NetworkMode::Public => Self::Public,
        }
    }
}
