//! The hidden verbs by which this program starts its own supervisors and jails.

use std::path::PathBuf;
use std::process::ExitCode;

use agentkernel_sandbox::{client, deadline, jail, supervisor};

use crate::{environment, ui};

/// Runs a hidden verb if one was asked for.
pub(crate) fn dispatch() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    let verb = arguments.next()?;
    if verb == jail::VERB {
        return Some(jail::main());
    }
    if verb == client::REAP_VERB {
        let directory = arguments.next().map(PathBuf::from)?;
        // A session of its own, so that the end of the terminal is not its end.
        let _ = rustix::process::setsid();
        return Some(ExitCode::from(u8::from(deadline::reap(directory).is_err())));
    }
    if verb == client::SUPERVISE_VERB {
        let directory = arguments.next().map(PathBuf::from)?;
        ui::start_logging(arguments.next().is_some_and(|word| word == "--verbose"));
        // Whoever holds the lease was told what went wrong.
        let Ok(program) = environment::program() else { return Some(ExitCode::FAILURE) };
        return Some(match supervisor::main(directory, &program, environment::proxy()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        });
    }
    None
}
