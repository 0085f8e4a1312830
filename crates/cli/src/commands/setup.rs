//! `agentkernel setup`: everything a first start needs, ahead of it.

use agentkernel_sandbox::setup::Installation;
use agentkernel_sandbox::{Problem, plain, setup, templates};
use serde::Serialize;

use super::{block_on, launch as starting};
use crate::arguments::{SandboxArguments, SetupArguments, WorkspaceMode};
use crate::{environment, ui};

/// What `--json` prints.
#[derive(Serialize)]
struct Outcome {
    #[serde(flatten)]
    installation: Installation,
    /// Images of which there are templates now.
    warm: Vec<String>,
}

pub(super) fn setup(arguments: &SetupArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    home.sweep();
    let mut status = ui::Status::new(!arguments.json);
    let options = setup::Options { kernel: arguments.kernel.clone(), force: arguments.force };
    let outcome = setup::setup(&home, &options, &mut |text| status.say(text))?;
    status.clear();
    let mut warm = Vec::new();
    for image in &arguments.warm {
        status.say(&format!("a template of {image} ..."));
        let sandbox = SandboxArguments {
            image: Some(image.clone()),
            workspace: Some(WorkspaceMode::None),
            ..SandboxArguments::default()
        };
        let launch = starting::settle(&home, &sandbox, &[], true)?;
        let made = block_on(templates::warm(&home, &launch.spec, &environment::program()?))??;
        status.clear();
        if !made {
            let message = format!("no template of {image} could be made");
            return Err(plain("template", message, Some("agentkernel --verbose setup --warm says why")));
        }
        warm.push(image.clone());
    }
    if arguments.json {
        ui::json(&Outcome { installation: outcome, warm });
    } else {
        ui::note(&format!("kernel {} ({})", outcome.kernel_release, outcome.kernel_source));
        ui::note(&format!("accelerator {}: {}", outcome.accelerator, outcome.accelerator_reason));
        for image in warm {
            ui::note(&format!("template of {image}"));
        }
        ui::note("ready: agentkernel run -- COMMAND");
    }
    Ok(0)
}
