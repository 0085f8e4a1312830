//! One file a verb: takes its arguments, calls the engine, renders the outcome.

mod apply;
mod benchmark;
mod completions;
mod doctor;
mod execute;
pub(crate) mod internal;
mod launch;
mod run;
mod setup;

use std::process::ExitCode;

use agentkernel_sandbox::{Problem, plain};

use crate::arguments::Verb;
use crate::ui;

/// Runs a verb and turns its outcome into an exit code.
pub(crate) fn dispatch(verb: Verb) -> ExitCode {
    let own_failure = if matches!(verb, Verb::Run(_)) { ui::RUN_FAILED } else { 1 };
    let outcome = match verb {
        Verb::Run(arguments) => run::run(&arguments),
        Verb::Apply(arguments) => apply::apply(&arguments),
        Verb::Setup(arguments) => setup::setup(&arguments),
        Verb::Doctor(arguments) => doctor::doctor(&arguments),
        Verb::Benchmark(arguments) => benchmark::benchmark(&arguments),
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
