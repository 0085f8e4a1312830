//! Sandboxes as wholes: made, listed, changed, started, stopped, forked, removed.

use std::collections::BTreeMap;
use std::time::Duration;

use agentkernel_sandbox::client::{self, Life, Sandbox, Warmth};
use agentkernel_sandbox::deadline::{self, Clocks, Deadline, rfc3339};
use agentkernel_sandbox::inspect;
use agentkernel_sandbox::spec::{Spec, check_name};
use agentkernel_sandbox::state::{Phase, SandboxDirectory};
use agentkernel_sandbox::{Problem, fork, lifecycle, plain, values};

use super::launching::{completed, list, time, word};
use super::{Engine, blocking};
use crate::model::{
    CreateRequest, ExtendRequest, Extended, ForkRequest, SandboxInfo, SandboxStats, SandboxStatus,
    StopRequest, UpdateRequest,
};

/// Most labels of a sandbox.
const LABELS: usize = 64;
/// Time between asking programs to end and killing them, where nothing is said.
const GRACE: Duration = Duration::from_secs(10);
/// Longest such time: a request waits for it.
const LONGEST_GRACE: Duration = Duration::from_secs(120);

impl Engine {
    /// Makes a sandbox and starts it.
    ///
    /// # Errors
    /// Code `name-taken`; whatever keeps it from starting: nothing is left of it then.
    pub async fn create(&self, request: &CreateRequest) -> Result<SandboxInfo, Problem> {
        check_name(&request.name)?;
        let ttl = request.ttl.as_deref().map(|text| time("ttl", text)).transpose()?;
        let mut options = self.options(&request.machine())?;
        options.name = Some(request.name.clone());
        options.labels = labels(&request.labels)?;
        options.publish = list("ports", &request.ports)?;
        if self.look_up(&request.name).is_ok_and(|found| found.name() == request.name) {
            return Err(taken(&request.name));
        }
        self.room(1).await?;
        let launch = self.settle(options, Vec::new()).await?;
        let warmth = if request.fast { Warmth::Warm } else { Warmth::Cold };
        let held = self.start_new(&launch, Life::Persistent, ttl, warmth).await?;
        info(&held.live_on().await?)
    }

    /// All sandboxes, by name.
    ///
    /// # Errors
    /// If the state directory cannot be read.
    pub async fn list(&self) -> Result<Vec<SandboxInfo>, Problem> {
        let home = self.home().clone();
        blocking(move || {
            // One that is damaged, or gone meanwhile, hides no other.
            Ok(home.list()?.iter().filter_map(|directory| info(directory).ok()).collect())
        })
        .await
    }

    /// What is known of a sandbox.
    ///
    /// # Errors
    /// Code `not-found`.
    pub async fn info(&self, name: &str) -> Result<SandboxInfo, Problem> {
        let (engine, name) = (self.clone(), name.to_owned());
        blocking(move || {
            let directory = engine.look_up(&name)?;
            directory.repair();
            info(&directory)
        })
        .await
    }

    /// What sandboxes take from the host now: one, or all that run.
    ///
    /// # Errors
    /// Code `not-found`, `not-running`.
    pub async fn stats(&self, name: Option<&str>) -> Result<Vec<SandboxStats>, Problem> {
        let (engine, name) = (self.clone(), name.map(str::to_owned));
        blocking(move || match name {
            Some(name) => Ok(vec![stats(inspect::Stats::of(&engine.look_up(&name)?)?)]),
            None => {
                let live = engine.home().list()?.into_iter();
                let live = live.filter(|sandbox| sandbox.phase() != Phase::Stopped);
                Ok(live.filter_map(|sandbox| inspect::Stats::of(&sandbox).ok()).map(stats).collect())
            }
        })
        .await
    }

    /// Changes labels and time to live.
    ///
    /// # Errors
    /// Code `not-found`; if the disk is full.
    pub async fn update(&self, name: &str, request: &UpdateRequest) -> Result<SandboxInfo, Problem> {
        let labels = request.labels.as_ref().map(labels).transpose()?;
        let ttl = match request.ttl.as_deref() {
            None => None,
            Some("never") => Some(None),
            Some(text) => Some(Some(time("ttl", text)?)),
        };
        let (engine, name) = (self.clone(), name.to_owned());
        blocking(move || {
            let (directory, mut spec) = engine.find(&name)?;
            if let Some(labels) = labels {
                spec.labels = labels.into_iter().collect();
                spec.save(directory.path())?;
            }
            if let Some(ttl) = ttl {
                let deadline = ttl.map(|time| Deadline::after(time, &Clocks::now()));
                deadline::write(directory.path(), deadline.as_ref())?;
                if directory.is_dead() {
                    client::watch_deadline(&directory, &engine.settings().program)?;
                }
            }
            info(&directory)
        })
        .await
    }

    /// Starts a sandbox that is stopped. One that runs is left alone.
    ///
    /// # Errors
    /// Whatever keeps it from starting.
    pub async fn start(&self, name: &str) -> Result<SandboxInfo, Problem> {
        let (directory, _) = self.find(name)?;
        if directory.is_dead() {
            self.room(1).await?;
        }
        if let Some(lease) = lifecycle::start(&directory, &self.settings().program).await? {
            match lifecycle::initialise(lease.sandbox(), &mut |_| {}).await {
                Ok(()) => drop(lease.live_on().await?),
                Err(problem) => {
                    let released = blocking(move || {
                        lease.release();
                        Ok(())
                    });
                    released.await?;
                    return Err(problem);
                }
            }
        }
        info(&directory)
    }

    /// Stops a sandbox. One that is stopped is left alone.
    ///
    /// # Errors
    /// If it does not let go.
    pub async fn stop(&self, name: &str, request: &StopRequest) -> Result<SandboxInfo, Problem> {
        let grace = request.grace.as_deref().map(|text| time("grace", text)).transpose()?;
        let grace = grace.unwrap_or(GRACE);
        if grace > LONGEST_GRACE {
            let message = format!("grace is longer than {} s", LONGEST_GRACE.as_secs());
            return Err(plain("usage", message, None));
        }
        let directory = self.look_up(name)?;
        lifecycle::stop(&directory, grace, request.force, &self.settings().program).await?;
        info(&directory)
    }

    /// Removes a sandbox, also if it runs.
    ///
    /// # Errors
    /// Code `not-found`; if it does not let go.
    pub async fn remove(&self, name: &str) -> Result<(), Problem> {
        let directory = self.look_up(name)?;
        lifecycle::remove(&directory, true).await
    }

    /// Stops a sandbox's processors, or lets them go on.
    ///
    /// # Errors
    /// Code `not-running`; if the machine does not obey.
    pub async fn set_paused(&self, name: &str, paused: bool) -> Result<SandboxInfo, Problem> {
        let (engine, name) = (self.clone(), name.to_owned());
        let sandbox = blocking(move || Sandbox::open(engine.find(&name)?.0)).await?;
        sandbox.set_paused(paused).await?;
        info(sandbox.directory())
    }

    /// Makes copies of a sandbox that runs.
    ///
    /// # Errors
    /// Code `name-taken`, `not-running`; no copy is left then.
    pub async fn fork(&self, name: &str, request: &ForkRequest) -> Result<Vec<SandboxInfo>, Problem> {
        let names = match request.count {
            None => vec![request.new_name.clone()],
            Some(count) => (1..=count).map(|number| format!("{}-{number}", request.new_name)).collect(),
        };
        names.iter().try_for_each(|name| check_name(name))?;
        let (directory, _) = self.find(name)?;
        self.room(names.len()).await?;
        let program = self.settings().program.clone();
        let work = async move { fork::fork(&directory, &names, &program).await };
        let forked = completed(self, work, |forked| forked.children).await?;
        forked.children.iter().map(info).collect()
    }

    /// Gives a sandbox more time. One that lives until it is removed has all the time there is.
    ///
    /// # Errors
    /// Code `not-found`; if the disk is full.
    pub async fn extend(&self, name: &str, request: &ExtendRequest) -> Result<Extended, Problem> {
        let by = time("by", request.by.as_deref().unwrap_or("1h"))?;
        let (engine, name) = (self.clone(), name.to_owned());
        blocking(move || {
            let directory = engine.look_up(&name)?;
            match lifecycle::extend(&directory, Some(by), &engine.settings().program) {
                Ok(deadline) => {
                    Ok(Extended { expires_at: deadline.map(|deadline| rfc3339(deadline.unix_ms)) })
                }
                Err(problem) if problem.code == "no-deadline" => Ok(Extended { expires_at: None }),
                Err(problem) => Err(problem),
            }
        })
        .await
    }
}

fn taken(name: &str) -> Problem {
    let hint = "choose another name, or remove that one first";
    plain("name-taken", format!("there is a sandbox called {name} already"), Some(hint))
}

fn labels(labels: &BTreeMap<String, String>) -> Result<Vec<(String, String)>, Problem> {
    if labels.len() > LABELS {
        return Err(plain("usage", format!("a sandbox has at most {LABELS} labels"), None));
    }
    let label = |(key, value): (&String, &String)| {
        word("labels", value)?;
        let text = format!("{key}={value}");
        let read = values::label(&text).map_err(|error| plain("usage", format!("labels: {error}"), None))?;
        if read.0 == *key { Ok(read) } else { Err(plain("usage", "a label's name has a =", None)) }
    };
    labels.iter().map(label).collect()
}

/// What clients are told of a sandbox: no path of the host's.
pub(super) fn info(directory: &SandboxDirectory) -> Result<SandboxInfo, Problem> {
    let known = inspect::SandboxInfo::of(directory)?;
    let workspace = Spec::load(directory.path())?.workspace;
    Ok(SandboxInfo {
        name: known.name,
        uuid: known.uuid,
        status: match known.status {
            Phase::Starting | Phase::Running | Phase::Stopping => SandboxStatus::Running,
            Phase::Paused => SandboxStatus::Paused,
            Phase::Stopped => SandboxStatus::Stopped,
        },
        backend: known.backend.to_owned(),
        image: known.image,
        vcpus: known.vcpus,
        memory_mb: known.memory_mb,
        disk_mb: known.disk_mb,
        created_at: known.created_at,
        ports: known.ports,
        labels: known.labels,
        profile: known.profile.into(),
        ttl: known.ttl,
        expires_at: known.expires_at,
        workspace: workspace.map_or(crate::model::Workspace::None, |workspace| workspace.mode.into()),
        network: known.network.into(),
    })
}

fn stats(stats: inspect::Stats) -> SandboxStats {
    SandboxStats {
        name: stats.name,
        machine_memory_bytes: stats.machine_memory_bytes,
        memory_limit_bytes: stats.memory_limit_bytes,
        supervisor_memory_bytes: stats.supervisor_memory_bytes,
        cpu_ms: stats.cpu_ms,
        disk_bytes: stats.disk_bytes,
        disk_limit_bytes: stats.disk_limit_bytes,
        detached: stats.detached,
        uptime_seconds: stats.uptime_seconds,
    }
}
