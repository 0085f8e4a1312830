//! `agentkernel setup`: everything a first start needs, ahead of it.

use agentkernel_sandbox::{Problem, setup};

use crate::arguments::SetupArguments;
use crate::{environment, ui};

pub(super) fn setup(arguments: &SetupArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    home.sweep();
    let mut status = ui::Status::new(!arguments.json);
    let options = setup::Options { kernel: arguments.kernel.clone(), force: arguments.force };
    let outcome = setup::setup(&home, &options, &mut |text| status.say(text))?;
    status.clear();
    if arguments.json {
        ui::json(&outcome);
    } else {
        ui::note(&format!("kernel {} ({})", outcome.kernel_release, outcome.kernel_source));
        ui::note(&format!("accelerator {}: {}", outcome.accelerator, outcome.accelerator_reason));
        ui::note("ready: agentkernel run -- COMMAND");
    }
    Ok(0)
}
