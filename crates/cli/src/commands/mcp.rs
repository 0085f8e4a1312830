//! `agentkernel mcp`.

use agentkernel_sandbox::Problem;
use agentkernel_server::engine::{Engine, Limits};
use agentkernel_server::mcp;
use tokio::signal::unix::SignalKind;

use super::serve::{default_runs, handled, runtime, settings};
use crate::arguments::{McpArguments, QUEUE, SANDBOXES};
use crate::environment;

pub(super) fn mcp(arguments: &McpArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    let surroundings = environment::surroundings()?;
    let limits = Limits { runs: default_runs(), queue: QUEUE.into(), sandboxes: SANDBOXES.into() };
    let settings = settings(&home, surroundings, &arguments.grants, limits)?;
    let runtime = runtime()?;
    let served = runtime.block_on(async {
        let engine = Engine::new(settings);
        let mut terminate = handled(SignalKind::terminate())?;
        let result = tokio::select! {
            result = mcp::serve_stdio(engine.clone()) => result,
            _ = terminate.recv() => Ok(()),
        };
        engine.settle_down().await;
        result
    });
    runtime.shutdown_background();
    served.map(|()| 0)
}
