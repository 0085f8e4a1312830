//! From what was asked for to a [`Spec`] and the defaults of programs run in it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use agentkernel_image::signal_number;

use crate::configuration::{CommandPolicy, Profile};
use crate::deadline::unix_ms;
use crate::exports;
use crate::images::Images;
use crate::network::NetworkSpec;
use crate::problem::{Problem, plain, problem};
use crate::project::{Workspace, WorkspaceMode};
use crate::spec::{
    Defaults, HostMount, HostUser, Image, MountSource, Spec, SpecFile, check_name, fresh_machine_id,
    new_uuid, set,
};
use crate::state::{Home, random_word};
use crate::text::Text;
use crate::workspace::{
    self, ApplyOptions, ApplyReport, ChangeSet, ChangeSetError, ChangeSummary, LastChanges,
};
use crate::{disk, files, setup};

/// Most virtual processors given without being asked.
const DEFAULT_VCPUS_LIMIT: usize = 4;
/// What a Debian kernel needs to boot, with something left for a program, MiB.
const SMALLEST_MEMORY_MIB: u64 = 128;
/// Most mounts of a sandbox: each is a file system that is served.
const MOUNTS_LIMIT: usize = 32;
/// `PATH` of images that set none, as Docker has it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What was asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Name of the sandbox; one is made up if there is none.
    pub name: Option<String>,
    /// `host`, the name of an image, or an OCI layout or archive; `host` if nothing is said.
    pub image: Option<String>,
    /// Nobody named the image; it was found to have the program. So the words are a program's, not arguments of an
    /// ENTRYPOINT.
    pub image_is_suggestion: bool,
    /// The shared project.
    pub workspace: Option<Workspace>,
    /// Other shared directories.
    pub mounts: Vec<HostMount>,
    /// Where the command was typed.
    pub current_directory: PathBuf,
    /// Virtual processors.
    pub vcpus: Option<u32>,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Writable layer, MiB.
    pub disk_mib: u64,
    /// Settings that hold where nothing else was said.
    pub profile: Profile,
    /// Nothing of the root file system can be changed.
    pub read_only_root: bool,
    /// Refuse to run without hardware virtualisation.
    pub require_hardware: bool,
    /// Variables for every program.
    pub environment: Vec<(OsString, OsString)>,
    /// Working directory in the guest, in place of the image's.
    pub directory: Option<PathBuf>,
    /// User in the guest, in place of the image's.
    pub guest_user: Option<String>,
    /// Which programs may be run.
    pub commands: CommandPolicy,
    /// Files for the guest.
    pub files: Vec<SpecFile>,
    /// A shell script run once, when the sandbox is created.
    pub init_script: Option<String>,
    /// Words of the user's own.
    pub labels: BTreeMap<String, String>,
    /// What it may reach, and the ports that lead into it.
    pub network: NetworkSpec,
    /// Who asks.
    pub user: HostUser,
    /// The host's `PATH`.
    pub path_variable: OsString,
    /// A PEM bundle of authorities that the user trusts besides the host's own.
    pub certificates: Option<PathBuf>,
}

/// What will be started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The sandbox.
    pub spec: Spec,
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
    if request.require_hardware
        && let Some(reason) = setup::emulated()
    {
        return Err(plain(
            "no-hardware",
            format!("hardware virtualisation is required and not to be had here: {reason}"),
            Some("agentkernel doctor; or leave require_hardware out"),
        ));
    }
    let created_unix_ms = unix_ms();
    let name = request.name.clone().unwrap_or_else(|| format!("run-{}", &random_word()[..8]));
    check_name(&name)?;
    request.network.check()?;
    check_mounts(home, &request)?;
    setup::ensure_kernel(home, progress)?;
    let (image, mut defaults) = match request.image.as_deref() {
        None | Some("host") => host(&request)?,
        Some(reference) => oci(home, reference, &request, progress)?,
    };
    if request.image_is_suggestion {
        defaults.entrypoint.clear();
        defaults.stop_signal = None;
    }
    for (name, value) in &request.environment {
        set(&mut defaults.environment, name, value);
    }
    if let Some(directory) = &request.directory {
        defaults.directory.clone_from(directory);
    }
    if let Some(user) = &request.guest_user {
        defaults.user.clone_from(user);
    }
    let spec = Spec {
        name,
        uuid: new_uuid(created_unix_ms),
        created_unix_ms,
        image,
        vcpus: request.vcpus.unwrap_or_else(default_vcpus),
        memory_mib: request.memory_mib,
        disk_mib: request.disk_mib,
        read_only_root: request.read_only_root,
        require_hardware: request.require_hardware,
        profile: request.profile,
        workspace: request.workspace,
        mounts: request.mounts,
        defaults,
        commands: request.commands,
        files: request.files,
        init_script: request.init_script,
        labels: request.labels,
        machine_id: fresh_machine_id(),
        certificates: request.certificates,
        network: request.network,
    };
    let description = describe(&spec, request.image_is_suggestion);
    Ok(Launch { spec, description })
}

/// Virtual processors of a sandbox where nobody said another number.
pub(crate) fn default_vcpus() -> u32 {
    std::thread::available_parallelism().map_or(1, usize::from).min(DEFAULT_VCPUS_LIMIT) as u32
}

/// The sandbox of a build's stage: nothing of the host's but a root file system.
pub(crate) fn for_build(
    name: String,
    root_file_system: &Path,
    vcpus: u32,
    memory_mib: u64,
    disk_mib: u64,
    network: NetworkSpec,
) -> Spec {
    let created_unix_ms = unix_ms();
    Spec {
        image: Image::Disk { path: root_file_system.to_owned(), name: name.clone() },
        name,
        uuid: new_uuid(created_unix_ms),
        created_unix_ms,
        vcpus,
        memory_mib,
        disk_mib,
        read_only_root: false,
        require_hardware: false,
        profile: Profile::Moderate,
        workspace: None,
        mounts: Vec::new(),
        defaults: Defaults::default(),
        commands: CommandPolicy::default(),
        files: Vec::new(),
        init_script: None,
        labels: BTreeMap::new(),
        machine_id: fresh_machine_id(),
        certificates: None,
        network,
    }
}

/// Mounts that would hand the guest more than was meant, or that cannot be.
fn check_mounts(home: &Home, request: &Request) -> Result<(), Problem> {
    if request.mounts.len() > MOUNTS_LIMIT {
        let message =
            format!("{} mounts are more than the {MOUNTS_LIMIT} a sandbox may have", request.mounts.len());
        return Err(plain("mounts", message, None));
    }
    let mut targets = std::collections::BTreeSet::new();
    targets.extend(request.workspace.as_ref().map(|workspace| workspace.root.clone()));
    for mount in &request.mounts {
        let target = mount.target.display();
        let normal =
            mount.target.components().skip(1).all(|part| matches!(part, std::path::Component::Normal(_)));
        const OURS: [&str; 5] = ["/", "/proc", "/sys", "/dev", "/run"];
        if !mount.target.is_absolute() || !normal || OURS.iter().any(|ours| mount.target == Path::new(ours)) {
            let hint = Some("give an absolute directory such as /data");
            return Err(plain("mount-target", format!("nothing can be mounted at {target}"), hint));
        }
        if !targets.insert(mount.target.clone()) {
            return Err(plain(
                "mount-target",
                format!("two directories are to be mounted at {target}"),
                None,
            ));
        }
        match &mount.source {
            MountSource::Host(path) if path.starts_with(home.path()) => {
                let message = format!("{} belongs to agentkernel's own state", path.display());
                return Err(plain(
                    "mount-source",
                    message,
                    Some("a named volume is given by its name alone"),
                ));
            }
            MountSource::Host(path) if !path.is_dir() => {
                let message = format!("{} is not a directory", path.display());
                return Err(plain("mount-source", message, Some("make it, or mount the directory it is in")));
            }
            MountSource::Volume(name) => drop(home.create_volume(name)?),
            MountSource::Host(_) | MountSource::Home(_) => {}
        }
    }
    Ok(())
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
        arguments: Vec::new(),
        environment: environment.iter().map(|(name, value)| (Text::from(*name), Text::from(value))).collect(),
        directory: workspace_directory(request).unwrap_or_else(|| user.home.clone()),
        user: format!("{}:{}", user.uid, user.gid),
        stop_signal: None,
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
    let image = Images::open(home)?.prepare(reference, progress)?;
    let config = &image.config;
    let mut environment = vec![(Text::from("PATH"), Text::from(DEFAULT_PATH))];
    for (name, value) in config.env.iter().filter_map(|assignment| assignment.split_once('=')) {
        set(&mut environment, name.as_ref(), value.as_ref());
    }
    let directory = config.working_dir.as_deref().filter(|directory| !matches!(*directory, "" | "/"));
    let directory = directory.map(PathBuf::from).or_else(|| workspace_directory(request));
    let defaults = Defaults {
        entrypoint: config.entrypoint.iter().map(Text::from).collect(),
        arguments: config.cmd.iter().map(Text::from).collect(),
        environment,
        directory: directory.unwrap_or_else(|| PathBuf::from("/")),
        user: config.user.clone().unwrap_or_default(),
        // One that nobody knows is as none, as for Docker; SIGTERM is what all are asked with.
        stop_signal: config.stop_signal.as_deref().and_then(signal_number),
    };
    Ok((Image::Disk { path: image.root_file_system, name: image.name }, defaults))
}

/// Where the command was typed, if the guest has that directory.
fn workspace_directory(request: &Request) -> Option<PathBuf> {
    let workspace = request.workspace.as_ref()?;
    request.current_directory.starts_with(&workspace.root).then(|| request.current_directory.clone())
}

fn describe(spec: &Spec, image_is_suggestion: bool) -> String {
    let mut text = match &spec.image {
        Image::Host { .. } => {
            "host image (this machine's own programs, read-only; --image takes another)".to_owned()
        }
        Image::Disk { name, .. } if image_is_suggestion => {
            format!("image {name} (--image host takes this machine's own programs)")
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
    let _ = write!(text, ", network {}", spec.network.describe());
    if let Some(reason) = setup::emulated() {
        let _ = write!(text, ", emulated: {reason}");
    }
    text
}

/// Loads a change set that a supervisor wrote. The supervisor is confined because it faces the guest: it has no say in
/// which directory the changes are for.
///
/// # Errors
/// If the set cannot be read or is for another directory.
pub(crate) fn checked_set(change_set: &Path, workspace: &Path) -> Result<ChangeSet, Problem> {
    let real = std::fs::symlink_metadata(change_set).is_ok_and(|metadata| metadata.is_dir());
    let set = ChangeSet::load(change_set).map_err(refused)?;
    if !real || set.workspace() != workspace {
        return Err(plain("changes", "the recorded changes are not for this sandbox's workspace", None));
    }
    Ok(set)
}

fn refused(error: ChangeSetError) -> Problem {
    problem("changes", &error, error.hint().map(str::to_owned))
}

/// Makes a finished sandbox's change set the last one. A set without changes leaves the former last one in place.
///
/// # Errors
/// If the set cannot be read or moved.
pub fn keep_last(home: &Home, change_set: &Path, workspace: &Path) -> Result<ChangeSet, Problem> {
    let set = checked_set(change_set, workspace)?;
    if set.is_empty() {
        return Ok(set);
    }
    LastChanges::new(home.path()).keep(set).map_err(refused)
}

/// Writes a finished sandbox's changes to its workspace, where they do not conflict; what is left becomes the last set.
///
/// # Errors
/// If the set cannot be read, the workspace not be written, or what is left not be kept.
pub fn apply_or_keep(
    home: &Home,
    change_set: &Path,
    workspace: &Path,
    options: &ApplyOptions,
) -> Result<(ChangeSummary, ApplyReport), Problem> {
    let mut set = checked_set(change_set, workspace)?;
    let summary = set.summary();
    let report = workspace::apply(&mut set, options)
        .map_err(|error| problem("apply", &error, error.hint().map(str::to_owned)))?;
    if !set.is_empty() {
        LastChanges::new(home.path()).keep(set).map_err(refused)?;
    }
    Ok((summary, report))
}
