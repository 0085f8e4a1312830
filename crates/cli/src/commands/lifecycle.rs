//! `agentkernel create`, `start`, `stop`, `rm`, `extend`, `gc`.

use agentkernel_sandbox::client::{Life, Warmth};
use agentkernel_sandbox::deadline::rfc3339;
use agentkernel_sandbox::inspect::SandboxInfo;
use agentkernel_sandbox::state::{Home, SandboxDirectory};
use agentkernel_sandbox::{Problem, client, lifecycle, plain};

use super::{block_on, launch as starting, run};
use crate::arguments::{
    CreateArguments, ExtendArguments, GcArguments, RemoveArguments, StartArguments, StopArguments,
};
use crate::{environment, ui};

pub(super) fn create(arguments: &mut CreateArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    if let Some(name) = arguments.sandbox_name.take() {
        if arguments.sandbox.name.is_some() {
            return Err(plain("usage", "the sandbox's name was given twice", None));
        }
        arguments.sandbox.name = Some(name);
    }
    let quiet = arguments.quiet || arguments.json;
    let launch = starting::settle(&home, &arguments.sandbox, &[], quiet)?;
    let name = launch.spec.name.clone();
    let held = starting::create(&home, &launch, Life::Persistent, &arguments.sandbox)?;
    let directory = held.directory.clone();
    if arguments.no_start {
        drop(held);
        client::watch_deadline(&directory, &environment::program()?)?;
    } else {
        let started = block_on(async {
            tokio::select! {
                lease = starting::start(held, quiet, arguments.sandbox.warmth()) => lease?.live_on().await.map(|_| None),
                code = run::interrupted() => Ok(Some(code)),
            }
        })?;
        match started {
            Ok(None) => {}
            // What could not be started was not created; whoever wants it tries again.
            Ok(Some(code)) => {
                block_on(lifecycle::remove(&directory, true))??;
                return Ok(code);
            }
            Err(problem) => {
                let _ = block_on(lifecycle::remove(&directory, true))?;
                return Err(problem);
            }
        }
    }
    if arguments.json {
        ui::json(&SandboxInfo::of(&directory)?);
    } else {
        ui::data(&format!("{name}\n"));
        if !quiet && !arguments.no_start {
            ui::note(&format!("running: agentkernel exec {name} -- COMMAND, agentkernel attach {name}"));
        }
    }
    Ok(0)
}

/// Does something to each sandbox that was named; goes on after a failure.
pub(super) fn each(
    names: &[String],
    home: &Home,
    mut act: impl FnMut(&SandboxDirectory) -> Result<(), Problem>,
) -> Result<u8, Problem> {
    let mut failed = false;
    for name in names {
        match home.find(name).and_then(|directory| act(&directory)) {
            Ok(()) => ui::data(&format!("{name}\n")),
            Err(problem) => {
                ui::error(&problem);
                failed = true;
            }
        }
    }
    Ok(u8::from(failed))
}

pub(super) fn start(arguments: &StartArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    each(&arguments.names, &home, |directory| {
        block_on(async {
            let Some(held) = lifecycle::hold_to_start(directory).await? else {
                ui::note(&format!("{} runs already", directory.name()));
                return Ok(());
            };
            tokio::select! {
                lease = starting::start(held, false, Warmth::Warm) => lease?.live_on().await.map(drop),
                code = run::interrupted() => Err(plain("interrupted", format!("interrupted ({code})"), None)),
            }
        })?
    })
}

pub(super) fn stop(arguments: &StopArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    let program = environment::program()?;
    each(&arguments.names, &home, |directory| {
        let stopped = block_on(lifecycle::stop(directory, arguments.grace, arguments.force, &program))??;
        if !stopped {
            ui::note(&format!("{} is stopped already", directory.name()));
        }
        Ok(())
    })
}

pub(super) fn remove(arguments: &RemoveArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    let names = match arguments.all {
        true => home.list()?.iter().map(SandboxDirectory::name).collect(),
        false => arguments.names.clone(),
    };
    each(&names, &home, |directory| block_on(lifecycle::remove(directory, arguments.force))?)
}

pub(super) fn extend(arguments: &ExtendArguments) -> Result<u8, Problem> {
    let directory = environment::home()?.find(&arguments.name)?;
    let deadline = lifecycle::extend(&directory, arguments.by, &environment::program()?)?;
    let expires_at = deadline.map(|deadline| rfc3339(deadline.unix_ms));
    if arguments.json {
        ui::json(&serde_json::json!({ "name": directory.name(), "expires_at": expires_at }));
    } else {
        ui::data(&format!("{}\n", expires_at.as_deref().unwrap_or("never")));
    }
    Ok(0)
}

pub(super) fn gc(arguments: &GcArguments) -> Result<u8, Problem> {
    let garbage = lifecycle::gc(&environment::home()?, arguments.dry_run)?;
    if arguments.json {
        ui::json(&garbage);
        return Ok(0);
    }
    let mut lines = String::new();
    for (what, names) in
        [("expired", &garbage.expired), ("abandoned", &garbage.abandoned), ("repaired", &garbage.repaired)]
    {
        for name in names {
            lines.push_str(&format!("{what} {name}\n"));
        }
    }
    if garbage.templates > 0 {
        lines.push_str(&format!("templates {}\n", garbage.templates));
    }
    if garbage.leftovers > 0 {
        lines.push_str(&format!("leftovers {}\n", garbage.leftovers));
    }
    ui::data(&lines);
    Ok(0)
}
