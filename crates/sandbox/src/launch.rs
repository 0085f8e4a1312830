//! From what was asked for to a [`Spec`] and the defaults of programs run in it.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::exports;
use crate::problem::{Problem, plain, problem};
use crate::project::{Workspace, WorkspaceMode};
use crate::spec::{HostUser, Image, Spec, check_name, new_uuid};
use crate::state::{Home, random_word};
use crate::workspace::{ChangeSet, ChangeSetError, LastChanges};
use crate::{disk, files, setup};

/// Most virtual processors given without being asked.
const DEFAULT_VCPUS_LIMIT: usize = 4;
/// What a Debian kernel needs to boot, with something left for a program, MiB.
const SMALLEST_MEMORY_MIB: u64 = 128;
/// `PATH` of images that set none, as Docker has it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What was asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Name of the sandbox; one is made up if there is none.
    pub name: Option<String>,
    /// `host`, or an OCI layout or archive; `host` if nothing is said.
    pub image: Option<String>,
    /// The shared project.
    pub workspace: Option<Workspace>,
    /// Where the command was typed.
    pub current_directory: PathBuf,
    /// Virtual processors.
    pub vcpus: Option<u32>,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Writable layer, MiB.
    pub disk_mib: u64,
    /// Who asks.
    pub user: HostUser,
    /// The host's `PATH`.
    pub path_variable: OsString,
    /// This program.
    pub program: PathBuf,
}

/// What will be started, and how programs run in it unless they are told otherwise.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The sandbox.
    pub spec: Spec,
    /// Words before the command's own: the image's ENTRYPOINT.
    pub entrypoint: Vec<OsString>,
    /// Environment.
    pub environment: Vec<(OsString, OsString)>,
    /// Working directory.
    pub directory: PathBuf,
    /// User, as in a Dockerfile's `USER`.
    pub user: String,
    /// One line for people: what was chosen, and how to choose otherwise.
    pub description: String,
}

/// Settles a request; prepares the kernel and the image if they are not there yet.
///
/// # Errors
/// If something asked for is not to be had; nothing was started.
pub fn settle(home: &Home, request: Request, progress: &mut dyn FnMut(&str)) -> Result<Launch, Problem> {
    if request.disk_mib < disk::SMALLEST_MIB {
        let message = format!("a disk of {} MiB is too small for a file system", request.disk_mib);
        return Err(plain("disk-size", message, Some("give it at least --disk 64M")));
    }
    if request.memory_mib < SMALLEST_MEMORY_MIB {
        let message =
            format!("{} MiB of memory are too little for the guest's kernel to start", request.memory_mib);
        return Err(plain("memory-size", message, Some("give it at least --memory 128M")));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let uuid = new_uuid(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
    let name = request.name.clone().unwrap_or_else(|| format!("run-{}", &random_word()[..8]));
    check_name(&name)?;
    setup::ensure_kernel(home, progress)?;
    let (image, defaults) = match request.image.as_deref() {
        None | Some("host") => host(&request)?,
        Some(reference) => oci(home, reference, &request, progress)?,
    };
    let host_vcpus = std::thread::available_parallelism().map_or(1, usize::from).min(DEFAULT_VCPUS_LIMIT);
    let spec = Spec {
        name,
        uuid,
        image,
        vcpus: request.vcpus.unwrap_or(host_vcpus as u32),
        memory_mib: request.memory_mib,
        disk_mib: request.disk_mib,
        workspace: request.workspace.clone(),
        program: request.program,
    };
    let description = describe(&spec);
    Ok(Launch {
        spec,
        entrypoint: defaults.entrypoint,
        environment: defaults.environment,
        directory: defaults.directory,
        user: defaults.user,
        description,
    })
}

struct Defaults {
    entrypoint: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    directory: PathBuf,
    user: String,
}

/// The host's own toolchain: its user, its `PATH` as far as the guest can see it.
fn host(request: &Request) -> Result<(Image, Defaults), Problem> {
    let user = &request.user;
    let toolchains = files::toolchains_under(&user.home, &request.path_variable);
    let export = exports::host_image(&toolchains)?;
    let inside = |path: &Path| {
        export.visible(path)
            || request.workspace.as_ref().is_some_and(|workspace| path.starts_with(&workspace.root))
    };
    let mut seen = std::collections::HashSet::new();
    let entries = std::env::split_paths(&request.path_variable)
        .filter(|path| path.is_absolute() && seen.insert(path.clone()) && inside(path));
    let path = std::env::join_paths(entries).unwrap_or_default();
    let path = if path.is_empty() { OsString::from(DEFAULT_PATH) } else { path };
    let environment = [
        ("PATH", path),
        ("HOME", user.home.clone().into_os_string()),
        ("USER", user.name.clone().into()),
        ("LOGNAME", user.name.clone().into()),
        ("LANG", "C.UTF-8".into()),
    ];
    let defaults = Defaults {
        entrypoint: Vec::new(),
        environment: environment.into_iter().map(|(name, value)| (name.into(), value)).collect(),
        directory: workspace_directory(request).unwrap_or_else(|| user.home.clone()),
        user: format!("{}:{}", user.uid, user.gid),
    };
    Ok((Image::Host { user: user.clone(), toolchains }, defaults))
}

/// An image of the OCI's format: its configuration decides, as with Docker.
fn oci(
    home: &Home,
    reference: &str,
    request: &Request,
    progress: &mut dyn FnMut(&str),
) -> Result<(Image, Defaults), Problem> {
    let image = setup::prepare_image(home, reference, progress)?;
    let config = &image.config;
    let mut environment: Vec<(OsString, OsString)> = config
        .env
        .iter()
        .filter_map(|assignment| assignment.split_once('='))
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
    if !environment.iter().any(|(name, _)| name == "PATH") {
        environment.push(("PATH".into(), DEFAULT_PATH.into()));
    }
    let directory = config.working_dir.as_deref().filter(|directory| !matches!(*directory, "" | "/"));
    let directory = directory.map(PathBuf::from).or_else(|| workspace_directory(request));
    let defaults = Defaults {
        entrypoint: config.entrypoint.iter().map(OsString::from).collect(),
        environment,
        directory: directory.unwrap_or_else(|| PathBuf::from("/")),
        user: config.user.clone().unwrap_or_default(),
    };
    Ok((Image::Disk { path: image.root_file_system, name: image.name }, defaults))
}

/// Where the command was typed, if the guest has that directory.
fn workspace_directory(request: &Request) -> Option<PathBuf> {
    let workspace = request.workspace.as_ref()?;
    request.current_directory.starts_with(&workspace.root).then(|| request.current_directory.clone())
}

fn describe(spec: &Spec) -> String {
    let mut text = match &spec.image {
        Image::Host { .. } => {
            "host image (this machine's own programs, read-only; --image takes another)".to_owned()
        }
        Image::Disk { name, .. } => format!("image {name}"),
    };
    if let Some(workspace) = &spec.workspace {
        let mode = match workspace.mode {
            WorkspaceMode::Cow => "copy-on-write",
            WorkspaceMode::Rw => "read-write",
            WorkspaceMode::Ro | WorkspaceMode::None => "read-only",
        };
        let _ = write!(text, ", {} {mode}", workspace.root.display());
    }
    if let Some(reason) = setup::emulated() {
        let _ = write!(text, ", emulated: {reason}");
    }
    text
}

/// Makes a finished sandbox's change set the last one. A set without changes leaves the former last one in place.
///
/// The set was written by the supervisor, which is confined because it faces the guest: it has no say in which directory
/// the changes are for.
///
/// # Errors
/// If the set cannot be read or moved.
pub fn keep_last(home: &Home, change_set: &Path, workspace: &Path) -> Result<ChangeSet, Problem> {
    let refused = |error: ChangeSetError| problem("changes", &error, error.hint().map(str::to_owned));
    let real = std::fs::symlink_metadata(change_set).is_ok_and(|metadata| metadata.is_dir());
    let set = ChangeSet::load(change_set).map_err(refused)?;
    if !real || set.workspace() != workspace {
        return Err(plain("changes", "the recorded changes are not for this sandbox's workspace", None));
    }
    if set.is_empty() {
        return Ok(set);
    }
    LastChanges::new(home.path()).keep(set).map_err(refused)
}
