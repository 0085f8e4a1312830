//! `agentkernel pause`, `resume`, `fork`.

use agentkernel_sandbox::client::Sandbox;
use agentkernel_sandbox::inspect::SandboxInfo;
use agentkernel_sandbox::{Problem, fork as forks};

use super::{block_on, inspect, lifecycle};
use crate::arguments::{ForkArguments, PauseArguments};
use crate::{environment, ui};

pub(super) fn set_paused(arguments: &PauseArguments, paused: bool) -> Result<u8, Problem> {
    let home = environment::home()?;
    lifecycle::each(&arguments.names, &home, |directory| {
        block_on(async { Sandbox::open(directory.clone())?.set_paused(paused).await })?
    })
}

pub(super) fn fork(arguments: &ForkArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    home.sweep();
    let parent = home.find(&arguments.name)?;
    let names = match arguments.count {
        None => vec![arguments.new.clone()],
        Some(count) => (1..=count).map(|number| format!("{}-{number}", arguments.new)).collect(),
    };
    let program = environment::program()?;
    let mut status = ui::Status::new(!arguments.quiet && !arguments.json);
    status.say("forking ...");
    let forked = block_on(forks::fork(&parent, &names, &program))?;
    status.clear();
    let forked = forked?;
    if arguments.json {
        let infos: Vec<_> = forked.children.iter().map(SandboxInfo::of).collect::<Result<_, _>>()?;
        ui::json(&infos);
        return Ok(0);
    }
    for name in &names {
        ui::data(&format!("{name}\n"));
    }
    if !arguments.quiet {
        forked.children.iter().try_for_each(inspect::note_ports)?;
        ui::note(&format!("{} stood still for {} ms", parent.name(), forked.still.as_millis()));
    }
    Ok(0)
}
