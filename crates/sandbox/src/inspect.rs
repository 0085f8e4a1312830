//! What is known of a sandbox, for people and programs: read from its directory, without asking its supervisor.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agentkernel_machine::process_metrics;
use serde::Serialize;

use crate::configuration::{NetworkMode, Profile};
use crate::deadline::{self, Clocks, rfc3339};
use crate::executions::{self, State};
use crate::network::{AuditReader, Verdict};
use crate::problem::{Problem, plain};
use crate::project::WorkspaceMode;
use crate::record::{Entry, RecordReader};
use crate::spec::{Image, MountSource, Spec};
use crate::state::{Phase, SandboxDirectory};

/// A sandbox as `list` and `info` show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SandboxInfo {
    /// Name.
    pub name: String,
    /// UUID version 7.
    pub uuid: String,
    /// What it is about.
    pub status: Phase,
    /// What it runs on.
    pub backend: &'static str,
    /// Its image.
    pub image: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mb: u64,
    /// Writable layer, MiB.
    pub disk_mb: u64,
    /// When it was created, RFC 3339.
    pub created_at: String,
    /// When it was started, RFC 3339; none if it is stopped.
    pub started_at: Option<String>,
    /// How its processors are run; none if it is stopped.
    pub accelerator: Option<String>,
    /// What it may reach where no rule says anything.
    pub network: NetworkMode,
    /// What it may reach by a rule.
    pub allow: Vec<String>,
    /// What it may not, whatever else is said.
    pub deny: Vec<String>,
    /// Published ports, `BIND:HOST:GUEST[/udp]`; 0 for one that is picked when it is started for the first time.
    pub ports: Vec<String>,
    /// Words of the user's own.
    pub labels: BTreeMap<String, String>,
    /// Its profile.
    pub profile: Profile,
    /// Seconds it has left to live; none if it lives until it is removed.
    pub ttl: Option<u64>,
    /// When its time is up, RFC 3339.
    pub expires_at: Option<String>,
    /// The shared project.
    pub workspace: Option<PathBuf>,
    /// What becomes of changes to it.
    pub workspace_mode: WorkspaceMode,
    /// Other shared directories, as `-v` has them.
    pub mounts: Vec<String>,
    /// It belongs to a `run` and goes with it.
    pub temporary: bool,
    /// Its directory on the host.
    pub directory: PathBuf,
    /// Process id of its supervisor.
    pub supervisor_pid: Option<u32>,
    /// Process id of its machine.
    pub machine_pid: Option<u32>,
}

impl SandboxInfo {
    /// Reads what is known of the sandbox in `directory`.
    ///
    /// # Errors
    /// If its spec is gone or damaged.
    pub fn of(directory: &SandboxDirectory) -> Result<Self, Problem> {
        let spec = Spec::load(directory.path())?;
        let live = directory.live();
        let status = match &live {
            Some(live) => live.phase,
            None => directory.phase(),
        };
        let now = Clocks::now();
        let deadline = deadline::read(directory.path());
        let mounts = spec.mounts.iter().map(|mount| {
            let source = match &mount.source {
                MountSource::Host(path) | MountSource::Home(path) => path.display().to_string(),
                MountSource::Volume(name) => name.clone(),
            };
            format!("{source}:{}{}", mount.target.display(), if mount.read_only { ":ro" } else { "" })
        });
        Ok(Self {
            status,
            backend: "qemu",
            image: match &spec.image {
                Image::Host { .. } => "host".to_owned(),
                Image::Disk { name, .. } => name.clone(),
            },
            vcpus: spec.vcpus,
            memory_mb: spec.memory_mib,
            disk_mb: spec.disk_mib,
            created_at: rfc3339(spec.created_unix_ms),
            started_at: live.as_ref().map(|live| rfc3339(live.started_unix_ms)),
            accelerator: live.as_ref().and_then(|live| live.accelerator.clone()),
            network: spec.network.mode,
            allow: spec.network.allow.iter().map(ToString::to_string).collect(),
            deny: spec.network.deny.iter().map(ToString::to_string).collect(),
            ports: spec.network.ports.iter().map(ToString::to_string).collect(),
            profile: spec.profile,
            ttl: deadline.as_ref().map(|deadline| deadline.left(&now).as_secs()),
            expires_at: deadline.as_ref().map(|deadline| {
                let left = u64::try_from(deadline.left(&now).as_millis()).unwrap_or(u64::MAX);
                rfc3339(now.unix_ms.saturating_add(left))
            }),
            workspace_mode: spec.workspace.as_ref().map_or(WorkspaceMode::None, |workspace| workspace.mode),
            mounts: mounts.collect(),
            workspace: spec.workspace.map(|workspace| workspace.root),
            temporary: directory.is_temporary(),
            directory: directory.path().to_owned(),
            supervisor_pid: live.as_ref().map(|live| live.supervisor),
            machine_pid: live.as_ref().and_then(|live| live.machine),
            labels: spec.labels,
            name: spec.name,
            uuid: spec.uuid,
        })
    }
}

/// What a sandbox takes from the host now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Name.
    pub name: String,
    /// Resident memory of the machine's process, bytes: the guest's as far as it is backed, and the emulator's own.
    pub machine_memory_bytes: u64,
    /// The guest's memory, bytes.
    pub memory_limit_bytes: u64,
    /// Resident memory of the supervisor, bytes.
    pub supervisor_memory_bytes: u64,
    /// Processor time of both since the start, milliseconds.
    pub cpu_ms: u64,
    /// Bytes the writable layer takes on the host's disk.
    pub disk_bytes: u64,
    /// What it may grow to, bytes.
    pub disk_limit_bytes: u64,
    /// Detached commands that run.
    pub detached: usize,
    /// Time since the start, seconds.
    pub uptime_seconds: u64,
}

impl Stats {
    /// Measures the live sandbox in `directory`.
    ///
    /// # Errors
    /// Code `not-running` if it does not live.
    pub fn of(directory: &SandboxDirectory) -> Result<Self, Problem> {
        let spec = Spec::load(directory.path())?;
        let Some(live) = directory.live() else {
            let hint = format!("agentkernel start {}", spec.name);
            return Err(plain("not-running", format!("{} is not running", spec.name), Some(&hint)));
        };
        let supervisor = process_metrics(live.supervisor);
        let machine = live.machine.and_then(process_metrics);
        let cpu: Duration =
            [&supervisor, &machine].into_iter().flatten().map(|process| process.cpu_time).sum();
        let disk = std::fs::metadata(directory.path().join(crate::disk::FILE_NAME));
        let running = |execution: &executions::Execution| execution.state == State::Running;
        Ok(Self {
            machine_memory_bytes: machine.map_or(0, |process| process.resident_bytes),
            memory_limit_bytes: spec.memory_mib << 20,
            supervisor_memory_bytes: supervisor.map_or(0, |process| process.resident_bytes),
            cpu_ms: u64::try_from(cpu.as_millis()).unwrap_or(u64::MAX),
            disk_bytes: disk.map_or(0, |disk| disk.blocks() * 512),
            disk_limit_bytes: spec.disk_mib << 20,
            detached: executions::list(directory).into_iter().filter(running).count(),
            uptime_seconds: deadline::unix_ms().saturating_sub(live.started_unix_ms) / 1000,
            name: spec.name,
        })
    }
}

/// Follows all that happens to a sandbox: its record, its console, and what its network refused.
#[derive(Debug)]
pub struct LogReader {
    record: RecordReader,
    network: AuditReader,
}

impl LogReader {
    /// From the oldest entry that is kept.
    pub fn new(directory: &Path) -> Self {
        Self { record: RecordReader::new(directory), network: AuditReader::new(directory) }
    }

    /// What came since the last call, oldest first.
    ///
    /// # Errors
    /// If the files cannot be read.
    pub fn read(&mut self) -> std::io::Result<Vec<Entry>> {
        let mut entries = self.record.read()?;
        let refused = self.network.read()?.into_iter().filter(|entry| entry.verdict == Verdict::Refused);
        entries.extend(refused.map(|entry| Entry {
            time: rfc3339(entry.unix_ms),
            event: "refused".to_owned(),
            text: entry.reason.unwrap_or(entry.rule),
        }));
        // Those of the same moment stay in their order.
        entries.sort_by(|one, other| one.time.cmp(&other.time));
        Ok(entries)
    }
}
