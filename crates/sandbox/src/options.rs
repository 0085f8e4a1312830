//! From what somebody asks for to a [`Request`]: options beat the project's configuration, which beats the profile.
//!
//! Flags of the command line and bodies of the API's requests become [`Options`]; what they are settled with comes from the
//! same place for both.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::configuration::language::{self, Project};
use crate::configuration::{Configuration, ConfigurationError, NetworkMode, Profile};
use crate::images::Images;
use crate::launch::Request;
use crate::network::{NetworkSpec, PublishedPort, Rule};
use crate::problem::{Problem, plain, problem};
use crate::project::{self, CONFIGURATION_FILE, Choice, WorkspaceMode};
use crate::spec::{HostMount, HostUser, MountSource, SpecFile};
use crate::state::Home;

/// Memory of a sandbox where nobody said another, MiB.
pub const DEFAULT_MEMORY_MIB: u64 = 2048;
/// Size of the writable layer where nobody said another, MiB.
pub const DEFAULT_DISK_MIB: u64 = 10 << 10;

/// Who asks, and where.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// The user.
    pub user: HostUser,
    /// The directory in which they are, free of symlinks.
    pub current_directory: PathBuf,
    /// Their environment.
    pub environment: Vec<(OsString, OsString)>,
    /// A PEM bundle of authorities that they trust besides the host's own.
    pub certificates: Option<PathBuf>,
}

impl Surroundings {
    /// The value of a variable.
    pub fn variable(&self, name: &OsStr) -> Option<&OsStr> {
        self.environment.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_os_str())
    }

    fn path_variable(&self) -> &OsStr {
        self.variable("PATH".as_ref()).unwrap_or("/usr/bin:/bin".as_ref())
    }

    /// Whether the host has a program on its `PATH`.
    pub fn finds(&self, program: &str) -> bool {
        std::env::split_paths(self.path_variable()).any(|directory| directory.join(program).is_file())
    }
}

/// What was asked for; what was not is `None` or empty.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Name of the sandbox.
    pub name: Option<String>,
    /// `host`, the name of an image, or a path of one.
    pub image: Option<String>,
    /// The profile.
    pub profile: Option<Profile>,
    /// What becomes of the project.
    pub workspace: Option<WorkspaceMode>,
    /// What the sandbox may reach where no rule says anything.
    pub network: Option<NetworkMode>,
    /// What it may reach.
    pub allow: Vec<Rule>,
    /// What it may not reach.
    pub deny: Vec<Rule>,
    /// Ports that lead into it.
    pub publish: Vec<PublishedPort>,
    /// Variables of every command.
    pub environment: Vec<(OsString, OsString)>,
    /// Directories of the host and volumes.
    pub mounts: Vec<HostMount>,
    /// Where commands start.
    pub directory: Option<PathBuf>,
    /// Who runs commands.
    pub user: Option<String>,
    /// Virtual processors.
    pub vcpus: Option<u32>,
    /// Memory, MiB.
    pub memory_mib: Option<u64>,
    /// Writable layer, MiB.
    pub disk_mib: Option<u64>,
    /// Words of the user's own.
    pub labels: Vec<(String, String)>,
    /// Configuration to use in place of the project's own: one that the user trusts.
    pub configuration: Option<PathBuf>,
}

/// What [`Options::request`] made.
#[derive(Clone, Debug)]
pub struct Settled {
    /// What is asked of [`crate::launch::settle`].
    pub request: Request,
    /// What is to be said about it.
    pub notes: Vec<String>,
}

impl Options {
    /// Settles what is asked for. `command` is what will be run first, if that is known: it has a say in the image.
    ///
    /// # Errors
    /// Code `configuration` if the project's file is wrong, or asks for what only the user may grant; or if a file it names
    /// cannot be read.
    pub fn request(
        self,
        home: &Home,
        surroundings: &Surroundings,
        command: &[OsString],
    ) -> Result<Settled, Problem> {
        let user = surroundings.user.clone();
        let current = &surroundings.current_directory;
        let (configuration, directory) = configuration(self.configuration.as_deref(), current, &user.home)?;
        if self.configuration.is_none() {
            self.check_trust(&configuration)?;
        }
        let profile = self.profile.or(configuration.profile).unwrap_or(Profile::Moderate);
        let settings = profile.settings();
        let mut notes = Vec::new();
        let network = self.network(&configuration, profile);
        if let Some(rule) = network.idle_rules().first() {
            notes.push(format!(
                "--allow {rule} changes nothing under network public, where names reach only what is public; \
                 --network none makes it a list, an address rule reaches what is private"
            ));
        }
        let mode = self.workspace.unwrap_or_else(|| configuration.workspace_mode(profile));
        let workspace = match project::choose(current, &user.home, mode) {
            Choice::Workspace(workspace) => Some(workspace),
            Choice::NotWanted => None,
            Choice::Unsuitable(reason) => {
                notes.push(format!("no workspace: {} is not shared, {reason}", current.display()));
                None
            }
        };
        let mut mounts = Vec::new();
        if settings.home_readonly {
            let (source, target) = (MountSource::Home(user.home.clone()), user.home.clone());
            mounts.push(HostMount { source, target, read_only: true });
        }
        mounts.extend(self.mounts);
        let mut variables: Vec<(OsString, OsString)> = Vec::new();
        for name in settings.host_environment {
            // The home, the user and the search path are those of the guest's own.
            if !matches!(*name, "PATH" | "HOME" | "USER")
                && let Some(value) = surroundings.variable(name.as_ref())
            {
                variables.push((OsString::from(name), value.to_owned()));
            }
        }
        variables.extend(configuration.environment.iter().map(|(name, value)| (name.into(), value.into())));
        variables.extend(self.environment);
        let files = configuration
            .files
            .iter()
            .map(|file| SpecFile::read(&directory, &file.source, &file.destination, file.mode));
        let files = files.collect::<Result<_, _>>()?;
        let asked = self.image.or(configuration.image);
        let root = workspace.as_ref().map(|workspace| workspace.root.as_path());
        let suitable = match asked {
            Some(_) => None,
            None => suitable_image(home, surroundings, command, root),
        };
        let memory_mib = self.memory_mib.or(configuration.memory_mib).or(settings.memory_mib);
        let request = Request {
            name: self.name.or(configuration.name),
            image_is_suggestion: suitable.is_some(),
            image: asked.or(suitable.map(str::to_owned)),
            workspace,
            mounts,
            current_directory: current.clone(),
            vcpus: self.vcpus.or(configuration.vcpus),
            memory_mib: memory_mib.unwrap_or(DEFAULT_MEMORY_MIB),
            disk_mib: self.disk_mib.or(configuration.disk_mib).unwrap_or(DEFAULT_DISK_MIB),
            profile,
            read_only_root: settings.read_only_root,
            require_hardware: configuration.require_hardware,
            environment: variables,
            directory: self.directory,
            guest_user: self.user,
            commands: configuration.commands,
            files,
            init_script: configuration.init_script,
            labels: self.labels.into_iter().collect(),
            network,
            user,
            certificates: surroundings.certificates.clone(),
            path_variable: surroundings.path_variable().to_owned(),
        };
        Ok(Settled { request, notes })
    }

    /// A project's own file may be a stranger's: it tightens what it likes, but what it loosens must be asked for by the
    /// person at the keyboard.
    ///
    /// For the network: names beyond what is public lead nowhere that the default does not. Addresses may be this machine's
    /// own and its networks', a port may be open to others, and who asked for nothing gets nothing.
    ///
    /// # Errors
    /// Code `configuration`, with the flag that asks for it.
    pub fn check_trust(&self, configuration: &Configuration) -> Result<(), Problem> {
        let refuse = |what: String, flag: String| {
            let hint = format!("if you trust this project: {flag}, or --config {CONFIGURATION_FILE}");
            Err(plain("configuration", format!("{CONFIGURATION_FILE} asks for {what}"), Some(&hint)))
        };
        if self.profile.is_none() && configuration.profile == Some(Profile::Permissive) {
            let what = "profile permissive: write to the project, read your home";
            return refuse(what.into(), "--profile permissive".into());
        }
        if self.workspace.is_none() && configuration.workspace == Some(WorkspaceMode::Rw) {
            return refuse("workspace rw: write to the project at once".into(), "--workspace rw".into());
        }
        let nothing_asked = self.profile == Some(Profile::Restrictive) && self.network.is_none();
        if nothing_asked && configuration.network == Some(NetworkMode::Public) {
            return refuse("a network".into(), "--network public".into());
        }
        if self.network != Some(NetworkMode::None) {
            let unasked = configuration.allow.iter().filter(|rule| !self.allow.contains(rule));
            if let Some(rule) = { unasked }.find(|rule| nothing_asked || !rule.is_name()) {
                return refuse(format!("what is at {rule}"), format!("--allow {rule}"));
            }
        }
        let unasked = configuration.ports.iter().filter(|port| !self.publish.contains(port));
        if let Some(port) = { unasked }.find(|port| !port.is_local()) {
            return refuse(format!("a port that others may reach: {port}"), format!("--publish {port}"));
        }
        Ok(())
    }

    /// What the sandbox may reach. Rules of options and configuration both hold; but whoever asks for no network means to
    /// have what they ask for alone.
    pub fn network(&self, configuration: &Configuration, profile: Profile) -> NetworkSpec {
        let mode = self.network.or(configuration.network).unwrap_or(profile.settings().network);
        let mut spec = NetworkSpec { mode, ..NetworkSpec::default() };
        if self.network != Some(NetworkMode::None) {
            spec.allow.clone_from(&configuration.allow);
        }
        spec.allow.extend(self.allow.iter().cloned());
        spec.deny = [&configuration.deny[..], &self.deny].concat();
        // An option about the same port of the guest's takes the key's place.
        let said = |port: &PublishedPort| {
            self.publish.iter().any(|asked| (asked.guest, asked.udp) == (port.guest, port.udp))
        };
        spec.ports = configuration.ports.iter().filter(|port| !said(port)).copied().collect();
        spec.ports.extend(&self.publish);
        spec
    }
}

/// What the table of languages has for a command or a project: if that is in the store, or if this machine lacks the
/// program. `None` for this machine's own programs.
fn suitable_image(
    home: &Home,
    surroundings: &Surroundings,
    command: &[OsString],
    project: Option<&Path>,
) -> Option<&'static str> {
    let project = project.and_then(|root| Project::read(root).ok()).unwrap_or_default();
    let language = language::choose(command, &project)?;
    let is_stored = Images::open(home).is_ok_and(|images| images.is_here(language.image));
    let word = command.first().and_then(|word| word.to_str());
    let is_on_this_machine = match word.filter(|word| language.commands.contains(word)) {
        Some(word) => surroundings.finds(word),
        None => language.commands.iter().any(|program| surroundings.finds(program)),
    };
    (is_stored || !is_on_this_machine).then_some(language.image)
}

/// The configuration that holds in `current`, and the directory it lies in: the one named, or the project's.
///
/// # Errors
/// Code `configuration` if it cannot be read or something in it is wrong.
pub fn configuration(
    named: Option<&Path>,
    current: &Path,
    home: &Path,
) -> Result<(Configuration, PathBuf), Problem> {
    let path = match named {
        Some(path) => Some(current.join(path)),
        None => match project::choose(current, home, WorkspaceMode::Ro) {
            Choice::Workspace(workspace) => {
                Some(workspace.root.join(CONFIGURATION_FILE)).filter(|path| path.symlink_metadata().is_ok())
            }
            Choice::NotWanted | Choice::Unsuitable(_) => None,
        },
    };
    let Some(path) = path else { return Ok((Configuration::default(), current.to_owned())) };
    let configuration = Configuration::load(&path).map_err(|error: ConfigurationError| {
        problem("configuration", &error, error.hint().map(str::to_owned))
    })?;
    let directory = path.parent().unwrap_or(current).to_owned();
    Ok((configuration, directory))
}

/// Reads a variable as it is given: `K=V`, or `K` alone, which `surroundings` have the value of.
///
/// # Errors
/// Code `usage` if there is no name.
pub fn variable(
    assignment: &OsStr,
    surroundings: Option<&Surroundings>,
) -> Result<Option<(OsString, OsString)>, Problem> {
    let bytes = assignment.as_bytes();
    match (bytes.iter().position(|byte| *byte == b'='), surroundings) {
        (Some(0), _) => {
            let message = format!("{} has no name before the =", assignment.display());
            Err(plain("usage", message, Some("write K=V")))
        }
        (Some(at), _) => {
            let (name, value) = (OsStr::from_bytes(&bytes[..at]), OsStr::from_bytes(&bytes[at + 1..]));
            Ok(Some((name.to_owned(), value.to_owned())))
        }
        (None, Some(surroundings)) => {
            Ok(surroundings.variable(assignment).map(|value| (assignment.to_owned(), value.to_owned())))
        }
        (None, None) => {
            let message = format!("{} has no value", assignment.display());
            Err(plain("usage", message, Some("write K=V")))
        }
    }
}
