//! From the words of `run` and `create` to a sandbox: flags beat the configuration, which beats the profile.

use std::ffi::OsString;
use std::path::PathBuf;

use agentkernel_sandbox::client::{Lease, Life, Warmth};
use agentkernel_sandbox::configuration::{NetworkMode, environment::parse_file};
use agentkernel_sandbox::deadline::{Clocks, Deadline};
use agentkernel_sandbox::launch::{Launch, Request};
use agentkernel_sandbox::options::{self, Options, Settled, Surroundings};
use agentkernel_sandbox::project::WorkspaceMode;
use agentkernel_sandbox::state::{HeldSandbox, Home};
use agentkernel_sandbox::{Problem, client, io, launch, lifecycle, plain};

use super::{images, inspect};
use crate::arguments::{self, Network, SandboxArguments};
use crate::{environment, ui};

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
    let surroundings = environment::surroundings()?;
    let Settled { request, notes } =
        options(arguments, &surroundings)?.request(home, &surroundings, command)?;
    if !quiet {
        notes.iter().for_each(|note| ui::note(note));
    }
    Ok(request)
}

/// The flags as the engine takes them.
fn options(arguments: &SandboxArguments, surroundings: &Surroundings) -> Result<Options, Problem> {
    let mounts = arguments.volume.iter().map(|mount| mount.resolve(&surroundings.user.home));
    Ok(Options {
        name: arguments.name.clone(),
        image: arguments.image.clone(),
        profile: arguments.profile,
        workspace: arguments.workspace.map(|mode| match mode {
            arguments::WorkspaceMode::Cow => WorkspaceMode::Cow,
            arguments::WorkspaceMode::Rw => WorkspaceMode::Rw,
            arguments::WorkspaceMode::Ro => WorkspaceMode::Ro,
            arguments::WorkspaceMode::None => WorkspaceMode::None,
        }),
        network: match arguments.network {
            Some(Network::Public) => Some(NetworkMode::Public),
            Some(Network::None) => Some(NetworkMode::None),
            None => arguments.no_network.then_some(NetworkMode::None),
        },
        allow: arguments.allow.clone(),
        deny: arguments.deny.clone(),
        publish: arguments.publish.clone(),
        environment: variables(&arguments.env_file, &arguments.env, surroundings)?,
        mounts: mounts.collect::<Result<_, _>>()?,
        directory: arguments.workdir.clone(),
        user: arguments.user.clone(),
        vcpus: arguments.vcpus,
        memory_mib: arguments.memory,
        disk_mib: arguments.disk,
        labels: arguments.label.clone(),
        configuration: arguments.config.clone(),
    })
}

/// Variables of files and flags, the flags' last.
pub(super) fn variables(
    files: &[PathBuf],
    flags: &[OsString],
    surroundings: &Surroundings,
) -> Result<Vec<(OsString, OsString)>, Problem> {
    let mut variables = Vec::new();
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
            match value {
                Some(value) => variables.push((name.into(), value.into())),
                None => variables.extend(options::variable(name.as_ref(), Some(surroundings))?),
            }
        }
    }
    for assignment in flags {
        variables.extend(options::variable(assignment, Some(surroundings))?);
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
    use std::path::Path;

    use agentkernel_sandbox::configuration::{Configuration, Profile};
    use agentkernel_sandbox::project::CONFIGURATION_FILE;
    use agentkernel_sandbox::spec::HostUser;
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Flags {
        #[command(flatten)]
        sandbox: SandboxArguments,
    }

    fn flags(text: &str) -> Options {
        let words = std::iter::once("create").chain(text.split_whitespace());
        let flags = Flags::try_parse_from(words).unwrap_or_else(|error| panic!("{error}"));
        let user = HostUser { name: "user".into(), uid: 1, gid: 1, home: "/home/user".into() };
        let (current_directory, environment) = ("/project".into(), Vec::new());
        let surroundings = Surroundings { user, current_directory, environment, certificates: None };
        options(&flags.sandbox, &surroundings).unwrap()
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
            let spec = flags(text).network(&configured(keys), profile);
            assert_eq!(spec.describe(), expected, "{text} {keys}");
        }
        let keys = configured("network.ports = ['8080:80', '5353:53/udp']");
        let spec = flags("-P 9090:80 --publish 0:53").network(&keys, Profile::Moderate);
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
            let result = flags(text).check_trust(&configured(keys));
            let told = result.err().and_then(|problem| problem.hint);
            match hint {
                None => assert_eq!(told, None, "{text} {keys}"),
                Some(hint) => assert!(told.unwrap_or_default().contains(hint), "{text} {keys}"),
            }
        }
    }
}
