//! `agentkernel list`, `info`, `stats`, `logs`: what is known of sandboxes.

use std::net::SocketAddr;
use std::time::Duration;

use agentkernel_sandbox::inspect::{LogReader, SandboxInfo, Stats};
use agentkernel_sandbox::spec::Spec;
use agentkernel_sandbox::state::{Phase, SandboxDirectory};
use agentkernel_sandbox::{Problem, io};

use crate::arguments::{InfoArguments, ListArguments, LogsArguments, StatsArguments};
use crate::{environment, ui};

const GLANCE: Duration = Duration::from_millis(100);

pub(super) fn list(arguments: &ListArguments) -> Result<u8, Problem> {
    let mut all = Vec::new();
    for directory in environment::home()?.list()? {
        match SandboxInfo::of(&directory) {
            Ok(info) => all.push(info),
            // Removed since it was listed, or damaged: the others are shown all the same.
            Err(_) if !directory.path().exists() => {}
            Err(problem) => ui::error(&problem),
        }
    }
    all.retain(|info| {
        arguments.label.iter().all(|wanted| match wanted.split_once('=') {
            Some((key, value)) => info.labels.get(key).is_some_and(|found| found == value),
            None => info.labels.contains_key(wanted),
        })
    });
    if arguments.json {
        ui::json(&all);
    } else if arguments.quiet {
        ui::data(&all.iter().map(|info| format!("{}\n", info.name)).collect::<String>());
    } else {
        let rows = all.iter().map(|info| {
            vec![
                info.name.clone(),
                info.status.to_string(),
                ui::line(&info.image),
                info.vcpus.to_string(),
                ui::size(info.memory_mb << 20),
                info.profile.name().to_owned(),
                info.ttl.map_or_else(|| "-".to_owned(), |left| ui::time(Duration::from_secs(left))),
                if info.ports.is_empty() { "-".to_owned() } else { info.ports.join(",") },
                info.created_at.clone(),
            ]
        });
        ui::table(&["NAME", "STATUS", "IMAGE", "CPUS", "MEMORY", "PROFILE", "TTL", "PORTS", "CREATED"], rows);
    }
    Ok(0)
}

pub(super) fn info(arguments: &InfoArguments) -> Result<u8, Problem> {
    let directory = environment::home()?.find(&arguments.name)?;
    directory.repair();
    let info = SandboxInfo::of(&directory)?;
    if arguments.json {
        ui::json(&info);
        return Ok(0);
    }
    let spec = Spec::load(directory.path())?;
    let none = || "-".to_owned();
    let workspace = match &info.workspace {
        Some(root) => format!("{} ({})", ui::path(root), ui::word(&info.workspace_mode)),
        None => none(),
    };
    let labels: Vec<String> = info.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let rows = [
        ("name", info.name.clone()),
        ("uuid", info.uuid.clone()),
        ("status", info.status.to_string()),
        ("image", ui::line(&info.image)),
        ("profile", info.profile.name().to_owned()),
        ("processors", info.vcpus.to_string()),
        ("memory", ui::size(info.memory_mb << 20)),
        ("disk", ui::size(info.disk_mb << 20)),
        ("workspace", workspace),
        ("mounts", if info.mounts.is_empty() { none() } else { ui::line(&info.mounts.join(", ")) }),
        ("network", spec.network.describe()),
        ("ports", if info.ports.is_empty() { none() } else { info.ports.join(", ") }),
        ("labels", if labels.is_empty() { none() } else { ui::line(&labels.join(", ")) }),
        ("created", info.created_at.clone()),
        ("started", info.started_at.clone().unwrap_or_else(none)),
        ("expires", info.expires_at.clone().unwrap_or_else(|| "never".to_owned())),
        ("accelerator", info.accelerator.clone().unwrap_or_else(none)),
        ("directory", ui::path(&info.directory)),
    ];
    ui::data(&rows.iter().map(|(name, value)| format!("{name:<12} {value}\n")).collect::<String>());
    Ok(0)
}

pub(super) fn stats(arguments: &StatsArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    let all: Vec<Stats> = match &arguments.name {
        Some(name) => vec![Stats::of(&home.find(name)?)?],
        None => {
            let live = home.list()?.into_iter().filter(|sandbox| sandbox.phase() != Phase::Stopped);
            live.filter_map(|sandbox| Stats::of(&sandbox).ok()).collect()
        }
    };
    if arguments.json {
        ui::json(&all);
        return Ok(0);
    }
    let rows = all.iter().map(|stats| {
        vec![
            stats.name.clone(),
            format!("{} / {}", ui::size(stats.machine_memory_bytes), ui::size(stats.memory_limit_bytes)),
            ui::size(stats.supervisor_memory_bytes),
            ui::time(Duration::from_millis(stats.cpu_ms)),
            format!("{} / {}", ui::size(stats.disk_bytes), ui::size(stats.disk_limit_bytes)),
            stats.detached.to_string(),
            ui::time(Duration::from_secs(stats.uptime_seconds)),
        ]
    });
    ui::table(&["NAME", "MEMORY", "SUPERVISOR", "CPU TIME", "DISK", "DETACHED", "UPTIME"], rows);
    Ok(0)
}

pub(super) fn logs(arguments: &LogsArguments) -> Result<u8, Problem> {
    let directory: SandboxDirectory = environment::home()?.find(&arguments.name)?;
    directory.repair();
    let mut log = LogReader::new(directory.path());
    loop {
        for entry in log.read().map_err(io("read the sandbox's record"))? {
            let line = if arguments.json {
                serde_json::to_string(&entry).unwrap_or_default()
            } else {
                format!("{} {:<9} {}", entry.time, entry.event, ui::line(&entry.text))
            };
            if !ui::raw_data(format!("{}\n", line.trim_end()).as_bytes()) {
                return Ok(0);
            }
        }
        if !arguments.follow || !directory.path().exists() {
            return Ok(0);
        }
        std::thread::sleep(GLANCE);
    }
}

/// Says which ports of this machine lead into a sandbox.
pub(super) fn note_ports(directory: &SandboxDirectory) -> Result<(), Problem> {
    let spec = Spec::load(directory.path())?;
    for port in &spec.network.ports {
        let protocol = if port.udp { "/udp" } else { "" };
        let from = SocketAddr::new(port.bind, port.host);
        ui::note(&format!("{from}{protocol} leads to port {} of {}", port.guest, spec.name));
    }
    Ok(())
}
