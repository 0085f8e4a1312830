//! Starts the machine a spec describes.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use agentkernel_machine::Machine;
use agentkernel_machine::accelerator::{self, Accelerator};
use agentkernel_machine::kernel;
use agentkernel_machine::qemu::{self, Disk, DiskDurability, MachineConfig, NetworkCard};
use agentkernel_network::Network;
use tokio::net::UnixStream;

use crate::disk;
use crate::problem::{Problem, io, plain, problem};
use crate::saved::Fingerprint;
use crate::spec::Spec;
use crate::state::SandboxDirectory;

/// Serial number of the disk that holds an image's root file system.
pub(super) const IMAGE_SERIAL: &str = "image";
/// Serial number of the writable layer.
pub(super) const WRITABLE_SERIAL: &str = "writable";

/// A machine that was started, and the stream to its agent.
pub(super) struct Started {
    pub machine: Arc<dyn Machine>,
    pub accelerator: Accelerator,
    pub network: Arc<Network>,
    stream: Option<UnixStream>,
}

impl Started {
    /// The stream to the machine's agent; once.
    pub(super) fn take_stream(&mut self) -> Result<UnixStream, Problem> {
        self.stream.take().ok_or_else(|| plain("machine-start", "the machine has no agent's port", None))
    }
}

/// Starts the machine of `spec`, whose process keeps `lock` open as long as it lives. It boots, or goes on from what is
/// restored. Its card leads to `network`.
#[allow(clippy::too_many_arguments)]
pub(super) async fn start(
    spec: &Spec,
    directory: &SandboxDirectory,
    program: &Path,
    lock: &File,
    restore: Option<(qemu::Restore, &Fingerprint)>,
    (network, card): (Network, NetworkCard),
    console: impl FnMut(&[u8]) + Send + 'static,
    watchers: impl FnOnce() -> Result<(), String> + Send + 'static,
) -> Result<Started, Problem> {
    let cache = directory.home().cache();
    let kernel = kernel::load(&cache, None).map_err(|error| problem("kernel", &error, error.hint()))?;
    let accelerator = accelerator::detect().accelerator;
    let lock = lock.try_clone().map_err(io("hand the lock on"))?;
    if spec.require_hardware && accelerator == Accelerator::Tcg {
        let message = "the sandbox requires hardware virtualisation, which this machine has no longer";
        return Err(plain("no-hardware", message, Some("agentkernel doctor")));
    }
    if let Some((_, saved)) = &restore
        && let Some(what) = Fingerprint::of(&kernel, spec).difference(saved)
    {
        let message = format!("the saved machine cannot go on here: it was saved with {what}");
        return Err(plain(
            "restore-mismatch",
            message,
            Some("take a new snapshot where it is to be restored"),
        ));
    }
    let is_resumed = restore.as_ref().is_some_and(|(machine, _)| machine.process.is_some());
    let config = MachineConfig {
        kernel,
        restore: restore.map(|(machine, _)| machine),
        accelerator,
        vcpus: spec.vcpus,
        memory_mib: u32::try_from(spec.memory_mib)
            .map_err(|_| plain("memory-size", "that is more memory than a machine can have", None))?,
        disks: disks(spec, directory)?,
        network: Some(card),
        launcher: program.to_owned(),
        machine_uid: None,
        inherit: vec![lock.into()],
        console_log: Some(Box::new(console)),
        kernel_arguments: Vec::new(),
        watchers: Some(Box::new(watchers)),
    };
    let machine = qemu::start(config).await.map_err(|error| {
        let code = if is_resumed && error.is_of_process() { "machine-resume" } else { "machine-start" };
        problem(code, &error, error.hint())
    })?;
    let stream = machine.take_stream();
    Ok(Started { machine: Arc::new(machine), accelerator, network: Arc::new(network), stream })
}

fn disks(spec: &Spec, directory: &SandboxDirectory) -> Result<Vec<Disk>, Problem> {
    let durability = if directory.is_temporary() { DiskDurability::Scratch } else { DiskDurability::Durable };
    let disks = disk::all(spec, directory.path())?.into_iter().map(|(file, kind)| match kind {
        disk::Kind::Writable => Disk { file, read_only: false, serial: WRITABLE_SERIAL.into(), durability },
        disk::Kind::Image => {
            Disk { file, read_only: true, serial: IMAGE_SERIAL.into(), durability: DiskDurability::Scratch }
        }
    });
    Ok(disks.collect())
}
