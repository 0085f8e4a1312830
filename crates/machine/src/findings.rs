//! What is in order on this host and what is not, each with a remedy: the material of `doctor`.
//!
//! Every look is taken on a thread of its own and awaited for a bounded time, so that a device or file system that does
//! not answer becomes a finding and never a hang. Nothing here changes the host.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::accelerator::{self, Accelerator, DeviceProbe, Probe};
use crate::jail::{self, JailError, Layer, Wall};
use crate::kernel::{self, KernelError};
use crate::qemu;

/// Each look takes milliseconds; all are taken at the same time.
const LIMIT: Duration = Duration::from_secs(10);
/// The oldest QEMU whose `microvm` machines are known to work.
const QEMU_LEAST: (u32, u32) = (7, 2);
/// Room for a kernel, its package, and something to work with.
const DISK_WANTED_MIB: u64 = 2048;
/// Below it not even a kernel fits.
const DISK_NEEDED_MIB: u64 = 300;
/// A machine of the default size, QEMU included.
const MEMORY_WANTED_MIB: u64 = 2048 + qemu::OVERHEAD_MIB;
/// The smallest machine that runs more than a shell.
const MEMORY_NEEDED_MIB: u64 = 256 + qemu::OVERHEAD_MIB;

/// Something that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at: `accelerator`, `qemu`, `jail: landlock`, …
    pub name: String,
    /// How it is.
    pub status: Status,
    /// What was found, in words.
    pub detail: String,
    /// What the user can do about it, if it is not in order and something can be done.
    pub remedy: Option<String>,
}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// In order.
    Ok,
    /// Machines run, but slower, behind fewer walls, or not for long.
    Warning,
    /// No machine runs.
    Failure,
}

impl Finding {
    fn new(name: &str, status: Status, detail: impl Into<String>) -> Self {
        Self { name: name.to_owned(), status, detail: detail.into(), remedy: None }
    }

    fn remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }
}

type Look = Box<dyn FnOnce() -> Vec<Finding> + Send>;

/// Looks at everything a machine needs. `cache` is where [`kernel::prepare`] keeps kernels; `program` is the one whose
/// verb [`jail::VERB`] calls [`jail::main`]. Blocks for at most ten seconds, most often for a tenth of one.
#[must_use]
pub fn findings(cache: &Path, program: &Path) -> Vec<Finding> {
    let owned = |path: &Path| path.to_owned();
    let (for_kernel, for_disk, program) = (owned(cache), owned(cache), owned(program));
    let looks: Vec<(&'static str, Look)> = vec![
        ("accelerator", Box::new(|| judge_accelerator(&Probe::read()))),
        ("qemu", Box::new(|| vec![look_at_qemu()])),
        ("kernel", Box::new(move || vec![judge_kernel(kernel::load(&for_kernel, None))])),
        ("jail", Box::new(move || look_at_jail(&program))),
        ("disk", Box::new(move || vec![look_at_disk(&for_disk)])),
        ("memory", Box::new(|| vec![judge_memory(qemu::available_memory_mib())])),
    ];
    take(looks, LIMIT)
}

/// All looks at once, in their order; one that does not end in time is left to itself.
fn take(looks: Vec<(&'static str, Look)>, limit: Duration) -> Vec<Finding> {
    let deadline = Instant::now() + limit;
    let begin = |(name, look): (&'static str, Look)| {
        let (sender, receiver) = mpsc::channel();
        // A thread that cannot be started drops the sender, which is seen below.
        let _ = thread::Builder::new().name(format!("look-{name}")).spawn(move || sender.send(look()));
        (name, receiver)
    };
    let begun: Vec<_> = looks.into_iter().map(begin).collect();
    let end = |(name, receiver): (&'static str, mpsc::Receiver<Vec<Finding>>)| {
        let left = deadline.saturating_duration_since(Instant::now());
        receiver.recv_timeout(left).unwrap_or_else(|error| {
            let detail = match error {
                mpsc::RecvTimeoutError::Timeout => format!("no answer within {} s", limit.as_secs()),
                mpsc::RecvTimeoutError::Disconnected => "it could not be looked at".to_owned(),
            };
            vec![Finding::new(name, Status::Failure, detail)]
        })
    };
    begun.into_iter().flat_map(end).collect()
}

fn judge_accelerator(probe: &Probe) -> Vec<Finding> {
    let detection = accelerator::judge(probe);
    let name = detection.accelerator.name();
    let chosen = match detection.accelerator {
        Accelerator::Kvm => Finding::new("accelerator", Status::Ok, format!("{name}: {}", detection.reason)),
        Accelerator::Tcg => Finding {
            remedy: detection.remedy,
            ..Finding::new(
                "accelerator",
                Status::Warning,
                format!("{name} (emulation: slower, and a weaker wall than hardware): {}", detection.reason),
            )
        },
    };
    vec![chosen, judge_device(probe)]
}

fn judge_device(probe: &Probe) -> Finding {
    let name = "kvm access";
    match &probe.device {
        DeviceProbe::Api(version) => {
            Finding::new(name, Status::Ok, format!("/dev/kvm opens for this user (API {version})"))
        }
        DeviceProbe::Denied if probe.processor && !probe.paravirtual => {
            Finding::new(name, Status::Warning, "/dev/kvm may not be opened by this user")
                .remedy("sudo usermod -aG kvm \"$USER\", then log in again")
        }
        DeviceProbe::Denied => {
            Finding::new(name, Status::Ok, "/dev/kvm may not be opened by this user, and would be of no use")
        }
        DeviceProbe::Missing => Finding::new(name, Status::Warning, "there is no /dev/kvm"),
        DeviceProbe::Failed(error) => {
            Finding::new(name, Status::Warning, format!("/dev/kvm cannot be used: {error}"))
        }
    }
}

fn look_at_qemu() -> Finding {
    let install = "sudo apt-get install qemu-system-x86";
    let failure = |detail: String| Finding::new("qemu", Status::Failure, detail).remedy(install);
    let Some(program) = qemu::find() else {
        return failure(format!("{} is not on PATH", qemu::PROGRAM));
    };
    match kernel::command::run(Command::new(&program).arg("--version"), LIMIT / 2) {
        Ok(finished) => judge_qemu(&finished.output, &program),
        Err(error) => failure(format!("{} does not run: {error}", program.display())),
    }
}

fn judge_qemu(output: &str, program: &Path) -> Finding {
    let shown = program.display();
    let text = output.split_once("version ").and_then(|(_, rest)| rest.split_whitespace().next());
    let mut numbers = text.unwrap_or_default().split('.').map(|part| part.parse::<u32>().ok());
    let version = numbers.next().flatten().zip(numbers.next().flatten());
    let (least, install) = (format!("{}.{}", QEMU_LEAST.0, QEMU_LEAST.1), "install a newer qemu-system-x86");
    match version {
        Some((major, minor)) if (major, minor) >= QEMU_LEAST => {
            Finding::new("qemu", Status::Ok, format!("version {} at {shown}", text.unwrap_or_default()))
        }
        Some((major, minor)) => {
            let detail = format!("version {major}.{minor} at {shown} is older than {least}");
            Finding::new("qemu", Status::Failure, detail).remedy(install)
        }
        None => Finding::new("qemu", Status::Failure, format!("{shown} does not tell its version"))
            .remedy(install),
    }
}

fn judge_kernel(loaded: Result<kernel::Kernel, KernelError>) -> Finding {
    match loaded {
        Ok(kernel) => {
            let hash = kernel.sha256.get(..12).unwrap_or_default();
            let detail = format!("{} from {} (sha256 {hash}...)", kernel.release, kernel.origin);
            Finding::new("kernel", Status::Ok, detail)
        }
        Err(error) => {
            // The first run sets one up by itself.
            let missing = matches!(error, KernelError::Missing);
            let status = if missing { Status::Warning } else { Status::Failure };
            Finding { remedy: error.hint(), ..Finding::new("kernel", status, words(&error)) }
        }
    }
}

/// An error and its causes, in one line.
fn words(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn look_at_jail(program: &Path) -> Vec<Finding> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let probed = match runtime {
        Ok(runtime) => runtime.block_on(jail::probe(program)),
        Err(source) => Err(JailError::Talk { source }),
    };
    match probed {
        Ok(layers) => layers.iter().map(judge_layer).collect(),
        Err(error) => vec![Finding::new("jail", Status::Failure, words(&error))],
    }
}

fn judge_layer(layer: &Layer) -> Finding {
    let name = format!("jail: {}", layer.wall.name());
    if layer.holds {
        return Finding::new(&name, Status::Ok, &*layer.detail);
    }
    let finding = Finding::new(&name, Status::Warning, format!("does not hold: {}", layer.detail));
    match layer.wall {
        Wall::UserNamespace => Finding { remedy: user_namespace_remedy(), ..finding },
        Wall::Landlock => finding
            .remedy("boot a kernel of 5.13 or newer with landlock in its list of security modules (lsm=)"),
        _ => finding,
    }
}

/// The switch that keeps unprivileged users from namespaces; distributions have three.
fn user_namespace_remedy() -> Option<String> {
    let switches = [
        ("kernel.unprivileged_userns_clone", "0", "1"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
        ("user.max_user_namespaces", "0", "10000"),
    ];
    let is_set = |name: &str, value: &str| {
        let path = PathBuf::from("/proc/sys").join(name.replace('.', "/"));
        std::fs::read_to_string(path).is_ok_and(|text| text.trim() == value)
    };
    let (name, _, wanted) = switches.into_iter().find(|(name, closed, _)| is_set(name, closed))?;
    Some(format!("sudo sysctl {name}={wanted}"))
}

fn look_at_disk(cache: &Path) -> Finding {
    // Before the first set-up the cache is not there yet; its file system is.
    let there = cache.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(there) {
        Ok(data) => judge_disk(data.f_bavail.saturating_mul(data.f_frsize) >> 20, there),
        Err(error) => {
            Finding::new("disk", Status::Failure, format!("cannot look at {}: {error}", there.display()))
        }
    }
}

fn judge_disk(free_mib: u64, place: &Path) -> Finding {
    let finding = Finding::new("disk", Status::Ok, format!("{free_mib} MiB free at {}", place.display()));
    let remedy = "free some space, or move AGENTKERNEL_HOME to another file system";
    graded(finding, free_mib, (DISK_NEEDED_MIB, DISK_WANTED_MIB), remedy)
}

fn judge_memory(available_mib: Option<u64>) -> Finding {
    let Some(available_mib) = available_mib else {
        return Finding::new("memory", Status::Warning, "the system does not say how much is available");
    };
    let finding = Finding::new("memory", Status::Ok, format!("{available_mib} MiB available"));
    let remedy = "end something else, or ask for smaller machines with --memory";
    graded(finding, available_mib, (MEMORY_NEEDED_MIB, MEMORY_WANTED_MIB), remedy)
}

fn graded(finding: Finding, have: u64, (needed, wanted): (u64, u64), remedy: &str) -> Finding {
    match have {
        _ if have < needed => Finding { status: Status::Failure, ..finding }.remedy(remedy),
        _ if have < wanted => Finding { status: Status::Warning, ..finding }.remedy(remedy),
        _ => finding,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_that_hangs_or_breaks_is_a_finding() {
        let fine: Look = Box::new(|| vec![Finding::new("fine", Status::Ok, "")]);
        let hangs: Look = Box::new(|| {
            thread::sleep(Duration::from_secs(60));
            Vec::new()
        });
        let breaks: Look = Box::new(|| std::panic::resume_unwind(Box::new(())));
        let found =
            take(vec![("hangs", hangs), ("breaks", breaks), ("fine", fine)], Duration::from_millis(50));
        let told: Vec<_> = found.iter().map(|finding| (finding.name.as_str(), finding.status)).collect();
        assert_eq!(told, [("hangs", Status::Failure), ("breaks", Status::Failure), ("fine", Status::Ok)]);
    }

    #[test]
    fn what_is_not_in_order_has_a_remedy() {
        let path = Path::new("/usr/bin/q");
        let qemu = |text| judge_qemu(text, path).status;
        assert_eq!(qemu("QEMU emulator version 7.2.22 (Debian 1:7.2)\n"), Status::Ok);
        assert_eq!(qemu("QEMU emulator version 10.0\n"), Status::Ok);
        assert_eq!(qemu("QEMU emulator version 6.9.9\n"), Status::Failure);
        assert_eq!(qemu("nonsense"), Status::Failure);
        for finding in [
            judge_qemu("version 5.2.0", path),
            judge_kernel(Err(KernelError::Missing)),
            judge_disk(10, path),
            judge_disk(1000, path),
            judge_memory(Some(10)),
            judge_memory(Some(1000)),
        ] {
            assert!(finding.status > Status::Ok && finding.remedy.is_some(), "{finding:?}");
        }
        let probe = Probe { device: DeviceProbe::Denied, processor: true, paravirtual: false };
        let found = judge_accelerator(&probe);
        assert!(found.iter().all(|finding| finding.status == Status::Warning && finding.remedy.is_some()));
        assert_eq!(judge_memory(Some(1 << 20)).remedy, None);
    }
}
