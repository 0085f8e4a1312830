//! From the words of `run` and `create` to a sandbox: flags beat the configuration, which beats the profile.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use agentkernel_sandbox::client::{Lease, Life, Warmth};
use agentkernel_sandbox::configuration::language::{self, Project};
use agentkernel_sandbox::configuration::{
    Configuration, ConfigurationError, NetworkMode, Profile, environment::parse_file,
};
use agentkernel_sandbox::deadline::{Clocks, Deadline};
use agentkernel_sandbox::images::Images;
use agentkernel_sandbox::launch::{Launch, Request};
use agentkernel_sandbox::network::{NetworkSpec, PublishedPort};
use agentkernel_sandbox::project::{self, CONFIGURATION_FILE, Choice, WorkspaceMode};
use agentkernel_sandbox::spec::{HostMount, MountSource, SpecFile};
use agentkernel_sandbox::state::{HeldSandbox, Home};
use agentkernel_sandbox::{Problem, client, io, launch, lifecycle, plain, problem};

use super::{images, inspect};
use crate::arguments::{self, Network, SandboxArguments};
use crate::{environment, ui, values};

/// Memory of a sandbox where nobody said another, MiB.
const DEFAULT_MEMORY_MIB: u64 = 2048;
/// Size of the writable layer where nobody said another, MiB.
const DEFAULT_DISK_MIB: u64 = 10 << 10;
/// Largest file of variables, bytes.
const ENVIRONMENT_FILE_LIMIT: u64 = 1 << 20;

/// Settles everything about the sandbox that `arguments` and the project's configuration describe.
/// `command` is what will be run first, if that is known: it has a say in the image.
pub(super) fn settle(
    home: &Home,
    arguments: &SandboxArguments,
    command: &[OsString],
    quiet: bool,
) -> Result<Launch, Problem> {
    let request = request(home, arguments, command, quiet)?;
    home.sweep();
    let mut status = ui::Status::new(!quiet);
    if let Some(reference) = request.image.as_deref().filter(|reference| *reference != "host") {
        images::ensure(home, reference, quiet)?;
    }
    let launch = launch::settle(home, request, &mut |text| status.say(text))?;
    status.clear();
    if !quiet {
        ui::note(&launch.description);
    }
    Ok(launch)
}

/// What `arguments` and the project's configuration ask for.
pub(super) fn request(
    home: &Home,
    arguments: &SandboxArguments,
    command: &[OsString],
    quiet: bool,
) -> Result<Request, Problem> {
    let user = environment::user()?;
    let current = environment::current_directory()?;
    let (configuration, directory) = configuration(arguments.config.as_deref(), &current, &user.home)?;
    if arguments.config.is_none() {
        check_trust(arguments, &configuration)?;
        check_network_trust(arguments, &configuration)?;
    }
    let profile = arguments.profile.or(configuration.profile).unwrap_or(Profile::Moderate);
    let settings = profile.settings();
    let network = network(arguments, &configuration, profile);
    if let Some(rule) = network.idle_rules().first().filter(|_| !quiet) {
        ui::note(&format!(
            "--allow {rule} changes nothing under network public, where names reach only what is public; \
             --network none makes it a list, an address rule reaches what is private"
        ));
    }
    let mode = match arguments.workspace {
        Some(arguments::WorkspaceMode::Cow) => WorkspaceMode::Cow,
        Some(arguments::WorkspaceMode::Rw) => WorkspaceMode::Rw,
        Some(arguments::WorkspaceMode::Ro) => WorkspaceMode::Ro,
        Some(arguments::WorkspaceMode::None) => WorkspaceMode::None,
        None => configuration.workspace_mode(profile),
    };
    let workspace = match project::choose(&current, &user.home, mode) {
        Choice::Workspace(workspace) => Some(workspace),
        Choice::NotWanted => None,
        Choice::Unsuitable(reason) => {
            if !quiet {
                ui::note(&format!("no workspace: {} is not shared, {reason}", current.display()));
            }
            None
        }
    };
    let mut mounts = Vec::new();
    if settings.home_readonly {
        let (source, target) = (MountSource::Home(user.home.clone()), user.home.clone());
        mounts.push(HostMount { source, target, read_only: true });
    }
    for mount in &arguments.volume {
        mounts.push(host_mount(mount)?);
    }
    let mut variables: Vec<(OsString, OsString)> = Vec::new();
    for name in settings.host_environment {
        // The home, the user and the search path are those of the guest's own.
        if !matches!(*name, "PATH" | "HOME" | "USER")
            && let Some(value) = std::env::var_os(name)
        {
            variables.push((OsString::from(name), value));
        }
    }
    variables.extend(configuration.environment.iter().map(|(name, value)| (name.into(), value.into())));
    variables.extend(self::variables(&arguments.env_file, &arguments.env)?);
    let files = configuration
        .files
        .iter()
        .map(|file| SpecFile::read(&directory, &file.source, &file.destination, file.mode));
    let asked = arguments.image.clone().or(configuration.image);
    let suitable = match asked {
        Some(_) => None,
        None => suitable_image(home, command, workspace.as_ref().map(|workspace| workspace.root.as_path())),
    };
    Ok(Request {
        name: arguments.name.clone().or(configuration.name),
        image_is_suggestion: suitable.is_some(),
        image: asked.or(suitable.map(str::to_owned)),
        workspace,
        mounts,
        current_directory: current,
        vcpus: arguments.vcpus.or(configuration.vcpus),
        memory_mib: arguments
            .memory
            .or(configuration.memory_mib)
            .or(settings.memory_mib)
            .unwrap_or(DEFAULT_MEMORY_MIB),
        disk_mib: arguments.disk.or(configuration.disk_mib).unwrap_or(DEFAULT_DISK_MIB),
        profile,
        read_only_root: settings.read_only_root,
        require_hardware: configuration.require_hardware,
        environment: variables,
        directory: arguments.workdir.clone(),
        guest_user: arguments.user.clone(),
        commands: configuration.commands,
        files: files.collect::<Result<_, _>>()?,
        init_script: configuration.init_script,
        labels: arguments.label.iter().cloned().collect(),
        network,
        user,
        certificates: environment::certificates(),
        path_variable: std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin")),
    })
}

/// What the table of languages has for a command or a project: if that is in the store, or if this machine lacks the
/// program. `None` for this machine's own programs.
fn suitable_image(home: &Home, command: &[OsString], project: Option<&Path>) -> Option<&'static str> {
    let project = project.and_then(|root| Project::read(root).ok()).unwrap_or_default();
    let language = language::choose(command, &project)?;
    let is_stored = Images::open(home).is_ok_and(|images| images.is_here(language.image));
    let word = command.first().and_then(|word| word.to_str());
    let is_on_this_machine = match word.filter(|word| language.commands.contains(word)) {
        Some(word) => environment::finds(word),
        None => language.commands.iter().any(|program| environment::finds(program)),
    };
    (is_stored || !is_on_this_machine).then_some(language.image)
}

/// The configuration that holds in `current`, and the directory it lies in: the one named, or the project's.
pub(super) fn configuration(
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

/// A project's own file may be a stranger's: it tightens what it likes, but what it loosens must be asked for by the
/// person at the keyboard.
fn check_trust(arguments: &SandboxArguments, configuration: &Configuration) -> Result<(), Problem> {
    let refuse = |what: &str, flag: &str| {
        let hint = format!("if you trust this project: {flag}, or --config {CONFIGURATION_FILE}");
        Err(plain("configuration", format!("{CONFIGURATION_FILE} asks for {what}"), Some(&hint)))
    };
    let permissive = arguments.profile.is_none() && configuration.profile == Some(Profile::Permissive);
    let writes = arguments.workspace.is_none() && configuration.workspace == Some(WorkspaceMode::Rw);
    match (permissive, writes) {
        (true, _) => {
            refuse("profile permissive: write to the project, read your home", "--profile permissive")
        }
        (_, true) => refuse("workspace rw: write to the project at once", "--workspace rw"),
        (false, false) => Ok(()),
    }
}

/// As [`check_trust`], for the network: names beyond what is public lead nowhere that the default does not. Addresses may
/// be this machine's own and its networks', a port may be open to others, and who asked for nothing gets nothing.
fn check_network_trust(arguments: &SandboxArguments, configuration: &Configuration) -> Result<(), Problem> {
    let refuse = |what: String, flag: String| {
        let hint = format!("if you trust this project: {flag}, or --config {CONFIGURATION_FILE}");
        Err(plain("configuration", format!("{CONFIGURATION_FILE} asks for {what}"), Some(&hint)))
    };
    let nothing_asked = arguments.profile == Some(Profile::Restrictive) && arguments.network.is_none();
    if nothing_asked && !arguments.no_network && configuration.network == Some(NetworkMode::Public) {
        return refuse("a network".into(), "--network public".into());
    }
    if !is_none(arguments) {
        let unasked = configuration.allow.iter().filter(|rule| !arguments.allow.contains(rule));
        if let Some(rule) = { unasked }.find(|rule| nothing_asked || !rule.is_name()) {
            return refuse(format!("what is at {rule}"), format!("--allow {rule}"));
        }
    }
    let unasked = configuration.ports.iter().filter(|port| !arguments.publish.contains(port));
    if let Some(port) = { unasked }.find(|port| !port.is_local()) {
        return refuse(format!("a port that others may reach: {port}"), format!("--publish {port}"));
    }
    Ok(())
}

fn is_none(arguments: &SandboxArguments) -> bool {
    arguments.no_network || arguments.network == Some(Network::None)
}

/// What the sandbox may reach: flags beat keys, which beat the profile. Rules of both hold; but whoever types that there is
/// no network means to have what is typed alone.
fn network(arguments: &SandboxArguments, configuration: &Configuration, profile: Profile) -> NetworkSpec {
    let flag = match arguments.network {
        Some(Network::Public) => Some(NetworkMode::Public),
        _ => is_none(arguments).then_some(NetworkMode::None),
    };
    let mode = flag.or(configuration.network).unwrap_or(profile.settings().network);
    let mut spec = NetworkSpec { mode, ..NetworkSpec::default() };
    if flag != Some(NetworkMode::None) {
        spec.allow.clone_from(&configuration.allow);
    }
    spec.allow.extend(arguments.allow.iter().cloned());
    spec.deny = [&configuration.deny[..], &arguments.deny].concat();
    // A flag about the same port of the guest's takes the key's place.
    let said = |port: &PublishedPort| {
        arguments.publish.iter().any(|flag| (flag.guest, flag.udp) == (port.guest, port.udp))
    };
    spec.ports = configuration.ports.iter().filter(|port| !said(port)).copied().collect();
    spec.ports.extend(&arguments.publish);
    spec
}

/// A mount's source is a path if it has a slash or is `.`, `..` or `~`; else it names a volume.
fn host_mount(mount: &values::Mount) -> Result<HostMount, Problem> {
    let source = if mount.source.contains('/') || matches!(mount.source.as_str(), "." | ".." | "~") {
        let path = match mount.source.strip_prefix('~') {
            Some(rest) => environment::home_directory()?.join(rest.trim_start_matches('/')),
            None => PathBuf::from(&mount.source),
        };
        let path = path.canonicalize().map_err(io(format!("mount {}", path.display())))?;
        MountSource::Host(path)
    } else {
        MountSource::Volume(mount.source.clone())
    };
    Ok(HostMount { source, target: mount.target.clone(), read_only: mount.read_only })
}

/// Variables of files and flags, the flags' last.
pub(super) fn variables(files: &[PathBuf], flags: &[OsString]) -> Result<Vec<(OsString, OsString)>, Problem> {
    let mut variables = Vec::new();
    let mut add = |name: &OsStr, value: Option<&OsStr>| match value {
        Some(value) => variables.push((name.to_owned(), value.to_owned())),
        None => variables.extend(std::env::var_os(name).map(|value| (name.to_owned(), value))),
    };
    for path in files {
        let what = || format!("read the variables in {}", path.display());
        let size = std::fs::metadata(path).map_err(io(what()))?.len();
        if size > ENVIRONMENT_FILE_LIMIT {
            return Err(plain("env-file", format!("{} is larger than 1 MiB", path.display()), None));
        }
        let text = std::fs::read_to_string(path).map_err(io(what()))?;
        let parsed = parse_file(&text)
            .map_err(|error| plain("env-file", format!("{}: {error}", path.display()), None))?;
        for (name, value) in parsed {
            add(name.as_ref(), value.as_ref().map(AsRef::as_ref));
        }
    }
    for assignment in flags {
        let bytes = assignment.as_bytes();
        match bytes.iter().position(|byte| *byte == b'=') {
            Some(0) => {
                let message = format!("{} has no name before the =", assignment.display());
                return Err(plain("usage", message, Some("write K=V, or K to take this shell's value")));
            }
            Some(at) => add(OsStr::from_bytes(&bytes[..at]), Some(OsStr::from_bytes(&bytes[at + 1..]))),
            None => add(assignment, None),
        }
    }
    Ok(variables)
}

/// Makes the sandbox's directory.
pub(super) fn create(
    home: &Home,
    launch: &Launch,
    life: Life,
    arguments: &SandboxArguments,
) -> Result<HeldSandbox, Problem> {
    let deadline = arguments.ttl.map(|time| Deadline::after(time, &Clocks::now()));
    client::create(home, &launch.spec, life, deadline.as_ref())
}

/// Starts a sandbox and runs its init script, if it has one that did not run yet.
pub(super) async fn start(held: HeldSandbox, quiet: bool, warmth: Warmth) -> Result<Lease, Problem> {
    let program = environment::program()?;
    let mut status = ui::Status::new(!quiet);
    let lease = {
        let starting = client::start(held, &program, warmth);
        tokio::pin!(starting);
        loop {
            tokio::select! {
                result = &mut starting => break result?,
                () = tokio::time::sleep(std::time::Duration::from_millis(500)) => {
                    status.say("starting the machine ...");
                }
            }
        }
    };
    status.clear();
    let said = &mut |bytes: &[u8]| {
        if !quiet {
            ui::raw(bytes);
        }
    };
    if !quiet {
        inspect::note_ports(lease.sandbox().directory())?;
    }
    match lifecycle::initialise(lease.sandbox(), said).await {
        Ok(()) => Ok(lease),
        Err(problem) => {
            lease.release();
            Err(problem)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Flags {
        #[command(flatten)]
        sandbox: SandboxArguments,
    }

    fn flags(text: &str) -> SandboxArguments {
        let words = std::iter::once("create").chain(text.split_whitespace());
        Flags::try_parse_from(words).unwrap_or_else(|error| panic!("{error}")).sandbox
    }

    fn configured(text: &str) -> Configuration {
        Configuration::parse(text, Path::new(CONFIGURATION_FILE)).unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn flags_beat_keys_which_beat_the_profile() {
        for (text, keys, profile, expected) in [
            ("", "", Profile::Moderate, "public"),
            ("", "", Profile::Permissive, "public"),
            ("", "", Profile::Restrictive, "none"),
            ("", "network.mode = 'public'", Profile::Restrictive, "public"),
            ("", "security.network = false", Profile::Moderate, "none"),
            ("--network public", "security.network = false", Profile::Restrictive, "public"),
            ("--no-network", "network.mode = 'public'", Profile::Permissive, "none"),
            ("--network none", "network.allow = ['a.example']", Profile::Moderate, "none"),
            (
                "--no-network --allow b.example",
                "network.allow = ['a.example']",
                Profile::Moderate,
                "only b.example",
            ),
            ("--allow b.example", "", Profile::Restrictive, "only b.example"),
            (
                "--allow 10.0.0.5:80 --deny b.example",
                "security.domains.block = ['c.example']\nnetwork.deny = ['d.example']",
                Profile::Moderate,
                "public and 10.0.0.5:80, not d.example, c.example, b.example",
            ),
            (
                "--allow b.example",
                "security.domains = { allow = ['*.a.example'], allowlist_only = true }",
                Profile::Moderate,
                "only *.a.example, b.example",
            ),
        ] {
            let spec = network(&flags(text), &configured(keys), profile);
            assert_eq!(spec.describe(), expected, "{text} {keys}");
        }
        let keys = configured("network.ports = ['8080:80', '5353:53/udp']");
        let spec = network(&flags("-P 9090:80 --publish 0:53"), &keys, Profile::Moderate);
        let ports: Vec<String> = spec.ports.iter().map(ToString::to_string).collect();
        assert_eq!(ports, ["127.0.0.1:5353:53/udp", "127.0.0.1:9090:80", "127.0.0.1:0:53"]);
    }

    #[test]
    fn a_project_does_not_open_what_is_private() {
        for (text, keys, hint) in [
            ("", "network.mode = 'public'", None),
            ("", "network.allow = ['a.example']", None),
            ("", "network.ports = ['8080:80']", None),
            ("", "network = { mode = 'none', allow = ['10.0.0.0/8'] }", Some("--allow 10.0.0.0/8")),
            ("", "security.domains.allow = ['127.0.0.1']", Some("--allow 127.0.0.1")),
            ("--allow 127.0.0.1", "security.domains.allow = ['127.0.0.1']", None),
            ("--no-network", "network.allow = ['127.0.0.1']", None),
            ("", "network.ports = ['0.0.0.0:8080:80']", Some("--publish 0.0.0.0:8080:80")),
            ("-P 0.0.0.0:8080:80", "network.ports = ['0.0.0.0:8080:80']", None),
            ("--profile restrictive", "network.mode = 'public'", Some("--network public")),
            ("--profile restrictive", "network.allow = ['a.example']", Some("--allow a.example")),
            ("--profile restrictive --no-network", "network.mode = 'public'", None),
        ] {
            let result = check_network_trust(&flags(text), &configured(keys));
            let told = result.err().and_then(|problem| problem.hint);
            match hint {
                None => assert_eq!(told, None, "{text} {keys}"),
                Some(hint) => assert!(told.unwrap_or_default().contains(hint), "{text} {keys}"),
            }
        }
    }
}
