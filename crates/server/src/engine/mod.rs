//! The engine as clients drive it: what both doors call.
//!
//! ```text
//! request ─► grants: may they ask for that? ─► sandbox::options, launch, client ...
//!         └► admission: a place among the runs, or in the queue before them
//! ```
//! It reads and writes the same state directory as the command line: what one makes, the other sees. Whatever a client
//! began and did not wait for is ended (`launching::Held`).

mod capture;
mod detached;
mod events;
mod exec;
mod files;
mod grants;
mod host;
mod launching;
mod review;
mod run;
mod sandboxes;
mod snapshots;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use agentkernel_image::registry::RegistryOptions;
use agentkernel_sandbox::options::Surroundings;
use agentkernel_sandbox::spec::Spec;
use agentkernel_sandbox::state::{Home, SandboxDirectory};
use agentkernel_sandbox::{Problem, client, plain};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, broadcast};

pub use self::capture::{Capture, Said, utf8_prefix};
pub use self::events::Watch;
pub use self::exec::Interaction;
pub(crate) use self::exec::Step;
pub use self::grants::Grants;
pub(crate) use self::review::UNIFIED;
pub(crate) use self::run::OUTPUT;
pub use self::run::{Pending, Run, RunEvent};
use crate::model::LogEntry;

/// How often the engine sees to what others leave: processes that ended.
const CHORES: Duration = Duration::from_secs(2);
/// After so many of these times the state directory is swept.
const SWEEP: u64 = 15;

/// How long what was begun may take to end once nobody waits for it.
const FAREWELL: Duration = Duration::from_secs(10);

/// Commands in sandboxes that somebody waits for: what they say is kept in memory.
const COMMANDS: usize = 256;

/// What the engine works with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The state directory.
    pub home: Home,
    /// This program, for the processes it starts of itself.
    pub program: PathBuf,
    /// Who started the server, and where: whose project sandboxes share.
    pub surroundings: Surroundings,
    /// A configuration in place of the project's own.
    pub configuration: Option<PathBuf>,
    /// How images are pulled.
    pub registry: RegistryOptions,
    /// What clients may ask for.
    pub grants: Grants,
    /// How much at once.
    pub limits: Limits,
}

/// How much of the host clients may take at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Temporary sandboxes that run.
    pub runs: usize,
    /// Requests that may wait for such a place.
    pub queue: usize,
    /// Other sandboxes that run, whoever made them, before none is started any more.
    pub sandboxes: usize,
}

/// The engine.
#[derive(Clone, Debug)]
pub struct Engine {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    started: Instant,
    places: Arc<Semaphore>,
    /// Commands in sandboxes that somebody may still wait for.
    commands: Semaphore,
    /// Runs that have a place or wait for one.
    admitted: Arc<AtomicUsize>,
    /// Sandboxes that somebody waits for, or that are being ended because nobody does any more.
    held: Arc<AtomicUsize>,
    /// One review at a time: each rewrites its sandbox's change set.
    review: Mutex<()>,
    events: broadcast::Sender<Arc<LogEntry>>,
    /// What is read for those who listen; `None` while nobody does.
    records: Mutex<Option<events::Records>>,
}

/// A place among the runs.
#[derive(Debug)]
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
    _admitted: Admitted,
}

/// Counts a run until it is dropped.
#[derive(Debug)]
struct Admitted(Arc<AtomicUsize>);

impl Drop for Admitted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Engine {
    /// Makes the engine; on a runtime, for it has chores.
    pub fn new(settings: Settings) -> Self {
        let places = Arc::new(Semaphore::new(settings.limits.runs.max(1)));
        let (events, _) = broadcast::channel(events::QUEUE);
        let shared = Arc::new(Shared {
            settings,
            started: Instant::now(),
            places,
            commands: Semaphore::new(COMMANDS),
            admitted: Arc::default(),
            held: Arc::default(),
            review: Mutex::default(),
            events,
            records: Mutex::default(),
        });
        tokio::spawn(chores(Arc::downgrade(&shared)));
        tokio::spawn(events::watch(Arc::downgrade(&shared)));
        Self { shared }
    }

    fn home(&self) -> &Home {
        &self.shared.settings.home
    }

    fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// What clients may ask for.
    pub fn grants(&self) -> &Grants {
        &self.shared.settings.grants
    }

    /// Time since the start.
    pub fn uptime(&self) -> Duration {
        self.shared.started.elapsed()
    }

    /// Temporary sandboxes that run or wait for their turn.
    pub fn admitted(&self) -> usize {
        self.shared.admitted.load(Ordering::Relaxed)
    }

    /// Waits, for a while, until nothing is left of what somebody waited for who does so no more.
    pub async fn settle_down(&self) {
        let deadline = tokio::time::Instant::now() + FAREWELL;
        while self.shared.held.load(Ordering::Relaxed) > 0 && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Takes a place in the queue for the runs.
    ///
    /// # Errors
    /// Code `busy` if too many wait already.
    fn admit(&self) -> Result<Admitted, Problem> {
        let limits = self.settings().limits;
        let limit = limits.runs.max(1) + limits.queue;
        let admitted = self.shared.admitted.clone();
        let before = admitted.fetch_add(1, Ordering::Relaxed);
        let counted = Admitted(admitted);
        if before >= limit {
            let message = format!("{} commands run and {} wait already", limits.runs, limits.queue);
            return Err(plain("busy", message, Some("try again in a moment")));
        }
        Ok(counted)
    }

    /// Waits for a place among the runs.
    async fn place(&self, admitted: Admitted) -> Result<Place, Problem> {
        let permit = self.shared.places.clone().acquire_owned().await;
        let permit = permit.map_err(|_| plain("busy", "the server is ending", None))?;
        Ok(Place { _permit: permit, _admitted: admitted })
    }

    /// Whether `more` sandboxes that live on may run. Those that are asked for at the same moment may pass the limit
    /// together.
    ///
    /// # Errors
    /// Code `too-many`.
    async fn room(&self, more: usize) -> Result<(), Problem> {
        let (home, limit) = (self.home().clone(), self.settings().limits.sandboxes);
        blocking(move || {
            let lives = |sandbox: &SandboxDirectory| !sandbox.is_dead() && !sandbox.is_temporary();
            let live = home.list()?.iter().filter(|sandbox| lives(sandbox)).count();
            if live + more > limit {
                let message = format!("{live} sandboxes run, and at most {limit} may");
                return Err(plain("too-many", message, Some("stop or remove some")));
            }
            Ok(())
        })
        .await
    }

    /// The sandbox of that name or UUID, whatever it may do.
    fn look_up(&self, name: &str) -> Result<SandboxDirectory, Problem> {
        self.home().find(name)
    }

    /// The sandboxes that clients may use.
    fn visible(&self) -> Result<Vec<SandboxDirectory>, Problem> {
        let may = |spec: &Spec| self.grants().check_spec(spec).is_ok();
        let all = self.home().list()?.into_iter();
        Ok(all.filter(|directory| Spec::load(directory.path()).is_ok_and(|spec| may(&spec))).collect())
    }

    /// Paths of the host that clients are not told, and what stands for them.
    pub(crate) fn private_paths(&self) -> Vec<(String, &'static str)> {
        let settings = self.settings();
        let mut paths = vec![
            (settings.home.path().display().to_string(), "<state>"),
            (settings.program.display().to_string(), "<program>"),
        ];
        if let Some(project) = self.project() {
            paths.push((project.display().to_string(), "<project>"));
        }
        for (path, name) in [
            (&settings.surroundings.current_directory, "<directory>"),
            (&settings.surroundings.user.home, "<home>"),
        ] {
            // Of the root itself nothing would be left.
            if path.parent().is_some() {
                paths.push((path.display().to_string(), name));
            }
        }
        paths
    }

    /// The sandbox of that name or UUID, if clients may use what it may do.
    fn find(&self, name: &str) -> Result<(SandboxDirectory, Spec), Problem> {
        let directory = self.look_up(name)?;
        let spec = Spec::load(directory.path())?;
        self.grants().check_spec(&spec)?;
        Ok((directory, spec))
    }
}

/// Sees to what is left: processes that ended, and now and then what dead processes left in the state directory.
async fn chores(shared: Weak<Shared>) {
    for turn in 1u64.. {
        tokio::time::sleep(CHORES).await;
        let Some(shared) = shared.upgrade() else { return };
        client::reap();
        if turn.is_multiple_of(SWEEP) {
            let home = shared.settings.home.clone();
            // What goes wrong is tried again.
            let _ = tokio::task::spawn_blocking(move || home.sweep()).await;
        }
    }
}

/// Does what may wait for the disk on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(plain("internal", format!("a thread of the server's ended: {error}"), None)),
    }
}
