//! `agentkernel init`: a configuration for this project, to be read and changed.

use std::io::Write;

use agentkernel_sandbox::configuration::language::{Project, choose};
use agentkernel_sandbox::configuration::{InitChoice, template};
use agentkernel_sandbox::project::CONFIGURATION_FILE;
use agentkernel_sandbox::{Problem, io, plain};

use crate::arguments::InitArguments;
use crate::{environment, ui};

pub(super) fn init(arguments: &InitArguments) -> Result<u8, Problem> {
    let surroundings = environment::surroundings()?;
    let directory = &surroundings.current_directory;
    let path = directory.join(CONFIGURATION_FILE);
    let project = Project::read(directory).map_err(io(format!("look at {}", directory.display())))?;
    let language = choose(&[], &project);
    let text = template(&InitChoice {
        name: directory.file_name().and_then(|name| name.to_str()),
        language,
        host_suffices: language
            .is_none_or(|language| language.commands.iter().any(|program| surroundings.finds(program))),
    });
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(!arguments.force).create(arguments.force).truncate(arguments.force);
    let written = options.open(&path).and_then(|mut file| file.write_all(text.as_bytes()));
    match written {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let message = format!("there is a {} already", path.display());
            Err(plain("exists", message, Some("agentkernel init --force replaces it")))
        }
        Err(error) => Err(io(format!("write {}", path.display()))(error)),
        Ok(()) => {
            ui::note(&format!(
                "wrote {}: everything in it is a default, a # away from being set",
                path.display()
            ));
            Ok(0)
        }
    }
}
