//! From the words of `run` to a sandbox that is ready, with a line about what was chosen.

use std::ffi::OsString;

use agentkernel_sandbox::client::Lease;
use agentkernel_sandbox::launch::{Launch, Request};
use agentkernel_sandbox::project::{self, Choice, WorkspaceMode};
use agentkernel_sandbox::state::Home;
use agentkernel_sandbox::{Problem, launch, plain};

use crate::arguments::{self, Network, SandboxArguments};
use crate::{environment, ui};

/// Settles everything about the sandbox that `arguments` describe.
pub(super) fn settle(home: &Home, arguments: &SandboxArguments, quiet: bool) -> Result<Launch, Problem> {
    if arguments.network == Network::Public {
        let hint = "leave --network out: the sandbox then has no network";
        return Err(plain("no-network", "this version has no network for sandboxes yet", Some(hint)));
    }
    let user = environment::user()?;
    let current = environment::current_directory()?;
    let mode = match arguments.workspace {
        arguments::WorkspaceMode::Cow => WorkspaceMode::Cow,
        arguments::WorkspaceMode::Rw => WorkspaceMode::Rw,
        arguments::WorkspaceMode::Ro => WorkspaceMode::Ro,
        arguments::WorkspaceMode::None => WorkspaceMode::None,
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
    let request = Request {
        name: arguments.name.clone(),
        image: arguments.image.clone(),
        workspace,
        current_directory: current,
        vcpus: arguments.vcpus,
        memory_mib: arguments.memory,
        disk_mib: arguments.disk,
        user,
        path_variable: std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin")),
        program: environment::program()?,
    };
    home.sweep();
    let mut status = ui::Status::new(!quiet);
    let launch = launch::settle(home, request, &mut |text| status.say(text))?;
    status.clear();
    if !quiet {
        ui::note(&launch.description);
    }
    Ok(launch)
}

/// Starts the sandbox.
pub(super) async fn start(home: &Home, launch: &Launch, quiet: bool) -> Result<Lease, Problem> {
    let mut status = ui::Status::new(!quiet);
    let starting = Lease::start(home, &launch.spec);
    tokio::pin!(starting);
    loop {
        tokio::select! {
            result = &mut starting => return result,
            () = tokio::time::sleep(std::time::Duration::from_millis(500)) => status.say("starting the machine ..."),
        }
    }
}
