//! What `agentkernel doctor` says about this host: one finding a line, each with what a user can do about it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde::Serialize;

use crate::accelerator;
use crate::jail::{self, Wall};
use crate::kernel::{self, run_command};
use crate::qemu;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// In order.
    Ok,
    /// Machines run, but not as well or as safely as they could.
    Warning,
    /// Machines do not run.
    Failure,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub name: String,
    /// How it is.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What a user can do.
    pub remedy: Option<String>,
}

/// QEMU answers at once; a program in its place may not.
const VERSION_LIMIT: Duration = Duration::from_secs(10);
/// The first QEMU whose `microvm` this driver is tried with.
const OLDEST_QEMU: (u32, u32) = (7, 2);
/// A kernel (70 MB), and a sandbox's writable layer that is used a little.
const DISK_WANTED_MIB: u64 = 1024;
/// The default size of a machine.
const MEMORY_WANTED_MIB: u64 = 2048;

/// Looks at everything a machine needs. `cache` is where kernels are kept, `configured` is `kernel.path`, and `launcher`
/// our own program, through which a jail is tried. Takes well under a second and starts no guest.
pub async fn findings(cache: &Path, configured: Option<&Path>, launcher: &Path) -> Vec<Finding> {
    let mut findings = vec![accelerator_finding(), qemu_finding().await, kernel_finding(cache, configured)];
    findings.extend(jail_findings(launcher).await);
    findings.push(memory_finding());
    findings.push(disk_finding(cache));
    findings
}

fn finding(name: &str, status: Status, detail: impl Into<String>, remedy: Option<String>) -> Finding {
    Finding { name: name.to_owned(), status, detail: detail.into(), remedy }
}

fn accelerator_finding() -> Finding {
    let detection = accelerator::detect();
    let status = if detection.hardware_usable { Status::Ok } else { Status::Warning };
    let detail = match detection.hardware_usable {
        true => detection.reason,
        false => format!("software emulation: {}", detection.reason),
    };
    finding("accelerator", status, detail, detection.remedy)
}

async fn qemu_finding() -> Finding {
    let install = Some("sudo apt-get install qemu-system-x86".to_owned());
    let Some(program) = qemu::find() else {
        return finding("qemu", Status::Failure, format!("{} is not installed", qemu::PROGRAM), install);
    };
    let shown = program.display().to_string();
    let ask = move || run_command(Command::new(program).arg("--version"), VERSION_LIMIT);
    let output = match tokio::task::spawn_blocking(ask).await {
        Ok(Ok(finished)) => finished.output,
        Ok(Err(error)) => {
            return finding("qemu", Status::Failure, format!("{shown} does not run: {error}"), install);
        }
        Err(_) => return finding("qemu", Status::Failure, format!("{shown} could not be asked"), install),
    };
    let (oldest_major, oldest_minor) = OLDEST_QEMU;
    match parse_version(&output) {
        Some(version) if version >= OLDEST_QEMU => {
            finding("qemu", Status::Ok, format!("{}.{} ({shown})", version.0, version.1), None)
        }
        Some((major, minor)) => {
            let detail = format!("{major}.{minor} is older than {oldest_major}.{oldest_minor} ({shown})");
            finding("qemu", Status::Warning, detail, install)
        }
        None => finding("qemu", Status::Warning, format!("{shown} does not tell its version"), install),
    }
}

/// Major and minor of `QEMU emulator version 7.2.22 (Debian …)`.
fn parse_version(output: &str) -> Option<(u32, u32)> {
    let version = output.split_once("version ")?.1;
    let mut numbers = version.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kernel_finding(cache: &Path, configured: Option<&Path>) -> Finding {
    match kernel::load(cache, configured) {
        Ok(kernel) => {
            finding("guest kernel", Status::Ok, format!("{} from {}", kernel.release, kernel.origin), None)
        }
        Err(error) => finding("guest kernel", Status::Failure, error.to_string(), error.hint()),
    }
}

async fn jail_findings(launcher: &Path) -> Vec<Finding> {
    let layers = match jail::probe(launcher).await {
        Ok(layers) => layers,
        Err(error) => return vec![finding("jail", Status::Failure, error.to_string(), None)],
    };
    let finding_of = |layer: jail::Layer| {
        let status = if layer.holds { Status::Ok } else { Status::Warning };
        let remedy = if layer.holds { None } else { remedy(layer.wall) };
        finding(&format!("jail: {}", layer.wall.name()), status, layer.detail, remedy.map(str::to_owned))
    };
    layers.into_iter().map(finding_of).collect()
}

fn remedy(wall: Wall) -> Option<&'static str> {
    match wall {
        Wall::UserNamespace | Wall::NetworkNamespace | Wall::IpcNamespace | Wall::MountNamespace => Some(
            "allow unprivileged user namespaces (sysctl user.max_user_namespaces, or AppArmor's restriction)",
        ),
        Wall::Landlock => {
            Some("use a kernel of 5.13 or later with landlock among its security modules (lsm=)")
        }
        Wall::OwnUid
        | Wall::NoCapabilities
        | Wall::NoNewPrivileges
        | Wall::ResourceLimits
        | Wall::ParentDeath => None,
    }
}

fn memory_finding() -> Finding {
    match qemu::available_memory_mib() {
        Some(mib) if mib >= MEMORY_WANTED_MIB => {
            finding("memory", Status::Ok, format!("{mib} MiB available"), None)
        }
        Some(mib) => {
            let detail = format!("{mib} MiB available, a machine asks for {MEMORY_WANTED_MIB} by default");
            finding("memory", Status::Warning, detail, Some("ask for less with --memory".to_owned()))
        }
        None => finding("memory", Status::Warning, "cannot read /proc/meminfo", None),
    }
}

/// The file system of `cache`, or of the nearest directory above it that exists.
fn disk_finding(cache: &Path) -> Finding {
    let Some(space) = cache.ancestors().find_map(|folder| rustix::fs::statvfs(folder).ok()) else {
        return finding("disk", Status::Warning, "cannot tell how much is free", None);
    };
    let free_mib = space.f_bavail.saturating_mul(space.f_frsize) >> 20;
    if free_mib >= DISK_WANTED_MIB {
        return finding("disk", Status::Ok, format!("{free_mib} MiB free"), None);
    }
    let detail = format!("{free_mib} MiB free, {DISK_WANTED_MIB} are wanted");
    let remedy = "free some space, or move the state with AGENTKERNEL_HOME".to_owned();
    finding("disk", Status::Warning, detail, Some(remedy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_version_of_distributions() {
        assert_eq!(parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\n"), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0\n"), Some((10, 0)));
        assert_eq!(parse_version("something else"), None);
    }
}
