//! `agentkernel`: parse, settle, call the engine, render.
#![forbid(unsafe_code)]

mod arguments;
mod commands;
mod environment;
mod terminal;
mod ui;
mod values;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    if let Some(code) = commands::internal::dispatch() {
        return code;
    }
    let arguments = match arguments::Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return ui::usage(&error),
    };
    ui::start_logging(arguments.verbose);
    commands::dispatch(arguments.command)
}
