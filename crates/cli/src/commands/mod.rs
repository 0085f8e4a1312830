//! One file a verb: takes its arguments, calls the engine, renders the outcome.

mod audit;
mod benchmark;
mod build;
mod completions;
mod copy;
mod doctor;
mod exec;
mod execute;
mod fork;
mod images;
mod init;
mod inspect;
pub(crate) mod internal;
mod launch;
mod lifecycle;
mod mcp;
mod outcome;
mod plugin;
mod review;
mod run;
mod serve;
mod setup;
mod snapshot;
mod volume;

use std::process::ExitCode;

use agentkernel_sandbox::{Problem, plain};

use crate::arguments::{SandboxVerb, Verb};
use crate::ui;

/// Runs a verb and turns its outcome into an exit code.
pub(crate) fn dispatch(verb: Verb) -> ExitCode {
    let own_failure = match &verb {
        Verb::Sandbox(verb) | Verb::Group(verb) => own_failure(verb),
        _ => 1,
    };
    let outcome = match verb {
        Verb::Sandbox(verb) | Verb::Group(verb) => dispatch_sandbox(verb),
        Verb::Build(arguments) => build::build(&arguments),
        Verb::Images(verb) => images::images(&verb),
        Verb::Volume(verb) => volume::volume(&verb),
        Verb::Init(arguments) => init::init(&arguments),
        Verb::Plugin(verb) => plugin::plugin(&verb),
        Verb::Setup(arguments) => setup::setup(&arguments),
        Verb::Doctor(arguments) => doctor::doctor(&arguments),
        Verb::Benchmark(arguments) => benchmark::benchmark(&arguments),
        Verb::Mcp(arguments) => mcp::mcp(&arguments),
        Verb::Serve(arguments) => serve::serve(&arguments),
        Verb::Completions(arguments) => completions::completions(&arguments),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(problem) => {
            ui::error(&problem);
            ExitCode::from(own_failure)
        }
    }
}

/// Exit code of a failure that is not the command's own.
fn own_failure(verb: &SandboxVerb) -> u8 {
    match verb {
        SandboxVerb::Run(_) | SandboxVerb::Exec(_) | SandboxVerb::Attach(_) => ui::RUN_FAILED,
        _ => 1,
    }
}

fn dispatch_sandbox(verb: SandboxVerb) -> Result<u8, Problem> {
    match verb {
        SandboxVerb::Run(arguments) => run::run(&arguments),
        SandboxVerb::Create(mut arguments) => lifecycle::create(&mut arguments),
        SandboxVerb::Start(arguments) => lifecycle::start(&arguments),
        SandboxVerb::Stop(arguments) => lifecycle::stop(&arguments),
        SandboxVerb::Rm(arguments) => lifecycle::remove(&arguments),
        SandboxVerb::List(arguments) => inspect::list(&arguments),
        SandboxVerb::Info(arguments) => inspect::info(&arguments),
        SandboxVerb::Stats(arguments) => inspect::stats(&arguments),
        SandboxVerb::Exec(arguments) => exec::exec(&arguments),
        SandboxVerb::Attach(arguments) => exec::attach(&arguments),
        SandboxVerb::ExecList(arguments) => exec::list(&arguments),
        SandboxVerb::ExecLogs(arguments) => exec::logs(&arguments),
        SandboxVerb::ExecKill(arguments) => exec::kill(&arguments),
        SandboxVerb::Logs(arguments) => inspect::logs(&arguments),
        SandboxVerb::Audit(arguments) => audit::audit(&arguments),
        SandboxVerb::Cp(arguments) => copy::copy(&arguments),
        SandboxVerb::Diff(arguments) => review::diff(&arguments),
        SandboxVerb::Apply(arguments) => review::apply(&arguments),
        SandboxVerb::Extend(arguments) => lifecycle::extend(&arguments),
        SandboxVerb::Pause(arguments) => fork::set_paused(&arguments, true),
        SandboxVerb::Resume(arguments) => fork::set_paused(&arguments, false),
        SandboxVerb::Fork(arguments) => fork::fork(&arguments),
        SandboxVerb::Snapshot(verb) => snapshot::snapshot(&verb),
        SandboxVerb::Gc(arguments) => lifecycle::gc(&arguments),
    }
}

/// Runs `future` on a runtime of its own.
fn block_on<F: Future>(future: F) -> Result<F::Output, Problem> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| plain("runtime", format!("cannot start: {error}"), None))?;
    let output = runtime.block_on(future);
    // A thread may still wait for a terminal's next key.
    runtime.shutdown_background();
    Ok(output)
}
