//! A Dockerfile nobody has read: parsed, its words expanded, its lines taken for patterns of an ignore file.

#![no_main]

use agentkernel_build::dockerfile::expand::Lexer;
use agentkernel_build::dockerfile::{Dockerfile, Kind};
use agentkernel_build::ignore::{IgnoreFile, Pattern};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    match Dockerfile::parse(data) {
        Ok(file) => {
            assert!(!file.stages.is_empty());
            let lines = text.split('\n').count() as u32;
            let lexer = Lexer::new(file.escape);
            let mut lookup = |name: &str| (name.len() % 2 == 0).then(|| format!("{name} {name}"));
            for instruction in file.stages.iter().flat_map(|stage| &stage.instructions) {
                assert!((1..=lines).contains(&instruction.place.line) && instruction.place.column > 0);
                let _ = lexer.word(&instruction.text, &mut lookup);
                let _ = lexer.words(&instruction.text, &mut lookup);
                if let Kind::Run(run) = &instruction.kind {
                    for heredoc in &run.heredocs {
                        assert!(!heredoc.name.is_empty() && heredoc.text().len() <= heredoc.content.len());
                    }
                }
            }
        }
        Err(error) => {
            assert!(!error.message.is_empty() && error.hint.as_ref().is_some_and(|hint| !hint.is_empty()));
            let shown = error.render("Dockerfile");
            assert!(!shown.lines().next().unwrap_or_default().chars().any(|c| c.is_control() && c != '\t'));
        }
    }
    let mut lines = text.lines();
    let path = lines.next().unwrap_or_default().to_owned();
    if let Ok(file) = IgnoreFile::parse(data) {
        let _ = (file.is_ignored(path.as_bytes()), file.may_hold_exceptions(path.as_bytes()));
    }
    for line in lines.take(20) {
        if let Ok(pattern) = Pattern::parse(line) {
            let matches = pattern.matches(path.as_bytes());
            let is_root = path.split('/').all(|part| matches!(part, "" | "."));
            assert!(is_root || !matches || pattern.may_match_below(b""));
        }
    }
});
