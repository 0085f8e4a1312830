//! The installation: the guest's kernel, images made ready, and findings about the host.

use std::path::{Path, PathBuf};

use agentkernel_machine::accelerator::{self, Accelerator};
use agentkernel_machine::kernel::{self, Kernel, KernelError, KernelOptions, Progress};
use serde::Serialize;

pub use agentkernel_machine::findings::{Finding, Status};

use crate::problem::{Problem, problem};
use crate::state::Home;

/// What `setup` is told.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Use this kernel.
    pub kernel: Option<PathBuf>,
    /// Prepare again even if everything is there.
    pub force: bool,
}

/// What sandboxes start from.
#[derive(Clone, Debug, Serialize)]
pub struct Installation {
    /// `uname -r` of the guest.
    pub kernel_release: String,
    /// Where the kernel came from.
    pub kernel_source: String,
    /// SHA-256 of the kernel as it is booted.
    pub kernel_sha256: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Why that one.
    pub accelerator_reason: String,
}

/// Finds or fetches the kernel and makes everything ready.
///
/// # Errors
/// If there is no kernel to be had.
pub fn setup(
    home: &Home,
    options: &Options,
    progress: &mut dyn FnMut(&str),
) -> Result<Installation, Problem> {
    let known = if options.force { None } else { kernel::load(&home.cache(), None).ok() };
    if known.is_none() || options.kernel.is_some() {
        prepare(home, options.kernel.as_deref(), progress)?;
    }
    installation(home)
}

/// What sandboxes start from now.
///
/// # Errors
/// If `setup` has not been run.
pub fn installation(home: &Home) -> Result<Installation, Problem> {
    let kernel = kernel::load(&home.cache(), None).map_err(|error| kernel_problem(&error))?;
    let detection = accelerator::detect();
    Ok(Installation {
        kernel_release: kernel.release,
        kernel_source: kernel.origin,
        kernel_sha256: kernel.sha256,
        accelerator: detection.accelerator.name().to_owned(),
        accelerator_reason: detection.reason,
    })
}

/// Prepares the kernel if that was never done; a damaged one is an error, for someone damaged it.
pub(crate) fn ensure_kernel(home: &Home, progress: &mut dyn FnMut(&str)) -> Result<(), Problem> {
    match kernel::load(&home.cache(), None) {
        Ok(_) => Ok(()),
        Err(KernelError::Missing) => prepare(home, None, progress).map(|_| ()),
        Err(error) => Err(kernel_problem(&error)),
    }
}

fn prepare(
    home: &Home,
    configured: Option<&Path>,
    progress: &mut dyn FnMut(&str),
) -> Result<Kernel, Problem> {
    let options =
        KernelOptions { cache: home.cache(), configured: configured.map(Path::to_owned), offline: false };
    let mut tell = |step: Progress| match step {
        Progress::Resolving => progress("looking for a guest kernel ..."),
        Progress::Downloading { packages } => progress(&format!("downloading {} ...", packages.join(", "))),
        Progress::Unpacking { what } => progress(&format!("unpacking {what} ...")),
    };
    kernel::prepare(&options, &mut tell).map_err(|error| kernel_problem(&error))
}

fn kernel_problem(error: &KernelError) -> Problem {
    problem("kernel", error, error.hint())
}

/// Why machines are emulated here; `None` if the hardware runs them.
/// How machines' processors are run here: `kvm` or `tcg`.
pub fn accelerator() -> &'static str {
    match accelerator::detect().accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg",
    }
}

pub(crate) fn emulated() -> Option<String> {
    let detection = accelerator::detect();
    (detection.accelerator == Accelerator::Tcg).then_some(detection.reason)
}

/// What the host offers sandboxes, each with a remedy where it lacks something.
pub fn findings(home: &Home, program: &Path) -> Vec<Finding> {
    agentkernel_machine::findings::findings(&home.cache(), program)
}
