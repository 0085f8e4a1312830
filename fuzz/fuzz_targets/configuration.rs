//! What a project nobody has read may bring: its configuration, files of variables, and the command policy it asks for.
//!
//! Input: text. It is read as each of them; the words of its last line are a command for the policies.

#![no_main]

use std::path::{Component, Path};

use agentkernel_sandbox::configuration::{
    CommandPolicy, Configuration, ConfigurationError, Refusal, environment,
};
use libfuzzer_sys::fuzz_target;

fn configuration(text: &str) -> CommandPolicy {
    match Configuration::parse(text, Path::new("agentkernel.toml")) {
        Ok(configuration) => {
            for file in &configuration.files {
                assert!(file.source.components().all(|part| matches!(part, Component::Normal(_))));
                assert!(file.destination.is_absolute() && file.mode <= 0o777);
                assert!(
                    file.destination.components().skip(1).all(|part| matches!(part, Component::Normal(_)))
                );
            }
            for (name, value) in &configuration.environment {
                assert!(!name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0'));
            }
            configuration.commands
        }
        Err(ConfigurationError::Content { line, column, message, hint, .. }) => {
            let written = text.split('\n').nth(line - 1).expect("the line exists");
            assert!((1..=written.chars().count() + 1).contains(&column));
            let said = [message, hint.unwrap_or_default()].concat();
            assert!(said.len() < 1000 && !said.chars().any(char::is_control));
            CommandPolicy::default()
        }
        Err(other) => panic!("{other}"),
    }
}

fuzz_target!(|data: &[u8]| {
    let command: Vec<&[u8]> =
        data.rsplit(|byte| *byte == b'\n').next().unwrap_or_default().split(|byte| *byte == b' ').collect();
    let text = String::from_utf8_lossy(data);
    let lines = || text.lines().map(str::to_owned);
    let read = configuration(&text);
    let written =
        CommandPolicy { allow: lines().skip(1).step_by(2).collect(), block: lines().step_by(2).collect() };
    for policy in [read, written] {
        match policy.check(&command) {
            Ok(()) => {
                let block = CommandPolicy { allow: policy.block.clone(), block: Vec::new() };
                assert!(policy.block.is_empty() || block.check(&command).is_err());
            }
            Err(Refusal::Blocked { .. }) => assert!(!policy.block.is_empty()),
            Err(Refusal::NotAllowed { .. }) => assert!(!policy.allow.is_empty()),
        }
    }
    for (name, value) in environment::parse_file(&text).unwrap_or_default() {
        assert!(!name.is_empty() && !name.contains(|c: char| c == '=' || c == '\0' || c.is_whitespace()));
        assert!(!value.is_some_and(|value| value.contains(['\0', '\n'])));
    }
});
