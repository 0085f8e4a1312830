//! `agentkernel completions`.

use clap::CommandFactory;

use agentkernel_sandbox::Problem;

use crate::arguments::{Arguments, CompletionsArguments};
use crate::ui;

pub(super) fn completions(arguments: &CompletionsArguments) -> Result<u8, Problem> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Arguments::command(), "agentkernel", &mut script);
    ui::data(&String::from_utf8_lossy(&script));
    Ok(0)
}
