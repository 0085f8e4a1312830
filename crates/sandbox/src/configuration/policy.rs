//! Which commands may be started: a guard rail against accidents.

use memchr::memmem;
use serde::{Deserialize, Serialize};

use super::nearest::shown;

/// Which commands may be started in a sandbox.
///
/// **A guard rail, not a wall.** It is asked about the words a caller gives `run` and `exec`, not about what these then
/// start: a shell, an interpreter, `env`, a copy under another name, all get round it. The sandbox is the wall.
///
/// A pattern is words. The first is compared with the program's base name, or with the program as it was given if the
/// pattern's own has a `/`; the others with the first arguments, one for one. `git push` matches `/usr/bin/git push -f`
/// but not `git -C x push`. In a word `*` stands for any characters, also none. Case counts.
///
/// What matches `block` is refused, whatever `allow` says. If `allow` has a pattern, only what matches one is allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CommandPolicy {
    /// If not empty, only commands that match are allowed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
    /// Commands that match are refused.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub block: Vec<String>,
}

/// A command that may not be started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It matches a pattern of `block`.
    #[error("the command policy blocks `{pattern}`")]
    Blocked {
        /// The pattern.
        pattern: String,
    },
    /// It matches no pattern of `allow`.
    #[error("the command policy allows only certain commands, and `{program}` is none of them")]
    NotAllowed {
        /// The program as it was given, made fit to be shown.
        program: String,
    },
}

impl CommandPolicy {
    /// Longest pattern a configuration may have, bytes.
    pub const LONGEST_PATTERN: usize = 256;
    /// Most patterns a configuration may have in one list.
    pub const MOST_PATTERNS: usize = 256;

    /// Whether every command is allowed.
    pub fn is_empty(&self) -> bool {
        self.allow.is_empty() && self.block.is_empty()
    }

    /// Asks about a command: the program and its arguments.
    ///
    /// # Errors
    /// If it may not be started.
    pub fn check(&self, arguments: &[impl AsRef<[u8]>]) -> Result<(), Refusal> {
        if let Some(pattern) = self.block.iter().find(|pattern| matches(pattern, arguments)) {
            return Err(Refusal::Blocked { pattern: shown(pattern) });
        }
        if self.allow.is_empty() || self.allow.iter().any(|pattern| matches(pattern, arguments)) {
            return Ok(());
        }
        let program = arguments.first().map_or(&b""[..], AsRef::as_ref);
        // No more is shown than this, and invalid characters take the space of three.
        let start = program.get(..256).unwrap_or(program);
        Err(Refusal::NotAllowed { program: shown(&String::from_utf8_lossy(start)) })
    }
}

fn matches(pattern: &str, arguments: &[impl AsRef<[u8]>]) -> bool {
    let mut words = pattern.split_whitespace();
    let (Some(first), Some((program, arguments))) = (words.next(), arguments.split_first()) else {
        return false;
    };
    let program = program.as_ref();
    let program = if first.contains('/') { program } else { base_name(program) };
    let mut arguments = arguments.iter();
    word_matches(first.as_bytes(), program)
        && words.all(|word| {
            arguments.next().is_some_and(|argument| word_matches(word.as_bytes(), argument.as_ref()))
        })
}

fn base_name(path: &[u8]) -> &[u8] {
    path.rsplit(|byte| *byte == b'/').find(|part| !part.is_empty()).unwrap_or(path)
}

/// Takes the parts between `*` where they are first found, which is linear in both lengths and finds every match.
fn word_matches(pattern: &[u8], word: &[u8]) -> bool {
    let mut parts = pattern.split(|byte| *byte == b'*');
    let start = parts.next().unwrap_or_default();
    let Some(end) = parts.next_back() else { return start == word };
    let Some(mut rest) = word.strip_prefix(start).and_then(|rest| rest.strip_suffix(end)) else {
        return false;
    };
    for part in parts {
        let Some(after) = memmem::find(rest, part).and_then(|at| rest.get(at + part.len()..)) else {
            return false;
        };
        rest = after;
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy(allow: &[&str], block: &[&str]) -> CommandPolicy {
        let owned = |patterns: &[&str]| patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
        CommandPolicy { allow: owned(allow), block: owned(block) }
    }

    #[test]
    fn commands_and_patterns() {
        let blocking = policy(&[], &["git push", "rm -rf /*", "curl", "/opt/bad/*", "mkfs*"]);
        for refused in [
            &["git", "push"][..],
            &["/usr/bin/git", "push", "-f"],
            &["./git/", "push"],
            &["rm", "-rf", "/home"],
            &["curl"],
            &["/opt/bad/x/tool"],
            &["mkfs.ext4", "/dev/vda"],
        ] {
            assert!(blocking.check(refused).is_err(), "{refused:?}");
        }
        for allowed in [
            &["git"][..],
            &["git", "-C", "x", "push"],
            &["Git", "push"],
            &["rm", "-rf", "x"],
            &["xcurl", "curl"],
            &["opt/bad/x"],
            &[],
        ] {
            assert_eq!(blocking.check(allowed), Ok(()), "{allowed:?}");
        }
    }

    #[test]
    fn block_beats_allow_and_refusals_say_why() {
        let policy = policy(&["git", "make *"], &["git push"]);
        assert_eq!(policy.check(&["git", "status"]), Ok(()));
        assert_eq!(policy.check(&["make", "all"]), Ok(()));
        let said = |arguments: &[&str]| policy.check(arguments).unwrap_err().to_string();
        assert_eq!(said(&["git", "push"]), "the command policy blocks `git push`");
        assert_eq!(
            said(&["ma\u{7}ke"]),
            "the command policy allows only certain commands, and `ma\\u{7}ke` is none of them"
        );
        assert_eq!(
            said(&["make"]),
            "the command policy allows only certain commands, and `make` is none of them"
        );
        assert!(policy.check(&[] as &[&str]).is_err());
    }

    #[test]
    fn stored_form() {
        let stored = serde_json::to_string(&policy(&["git"], &[])).unwrap();
        assert_eq!(stored, r#"{"allow":["git"]}"#);
        assert_eq!(serde_json::from_str::<CommandPolicy>(&stored).unwrap(), policy(&["git"], &[]));
        assert!(serde_json::from_str::<CommandPolicy>(r#"{"alow":[]}"#).is_err());
    }

    /// What `*` means, word for word.
    fn by_definition(pattern: &[u8], word: &[u8]) -> bool {
        match pattern.split_first() {
            None => word.is_empty(),
            Some((b'*', rest)) => (0..=word.len()).any(|skipped| by_definition(rest, &word[skipped..])),
            Some((byte, rest)) => word.first() == Some(byte) && by_definition(rest, &word[1..]),
        }
    }

    proptest! {
        #[test]
        fn globs_are_as_defined(pattern in "[ab*]{0,8}", word in "[ab]{0,10}") {
            prop_assert_eq!(
                word_matches(pattern.as_bytes(), word.as_bytes()),
                by_definition(pattern.as_bytes(), word.as_bytes())
            );
        }

        #[test]
        fn blocked_stays_blocked_and_allowing_never_blocks(
            allow in proptest::collection::vec("[ab*]{1,3}( [ab*]{1,2}){0,2}", 0..4),
            block in proptest::collection::vec("[ab*]{1,3}( [ab*]{1,2}){0,2}", 0..4),
            command in proptest::collection::vec("[ab/]{1,4}", 1..4),
            more in proptest::collection::vec("[ab/]{1,4}", 0..3),
        ) {
            let policy = CommandPolicy { allow, block };
            let verdict = policy.check(&command);
            let only = |list: &[String]| CommandPolicy { allow: list.to_vec(), block: Vec::new() };
            let named = |list: &[String]| !list.is_empty() && only(list).check(&command).is_ok();
            prop_assert_eq!(
                verdict.is_ok(),
                !named(&policy.block) && (policy.allow.is_empty() || named(&policy.allow))
            );
            // More arguments do not get a blocked command through.
            let longer: Vec<String> = command.iter().chain(&more).cloned().collect();
            if matches!(verdict, Err(Refusal::Blocked { .. })) {
                let still = matches!(policy.check(&longer), Err(Refusal::Blocked { .. }));
                prop_assert!(still);
            }
        }

        #[test]
        fn directories_of_a_program_do_not_count(
            directory in "(/[a-z]{0,3}){0,3}", program in "[a-z]{1,4}", block in "[a-z*]{1,4}",
        ) {
            let policy = CommandPolicy { allow: Vec::new(), block: vec![block] };
            prop_assert_eq!(policy.check(&[&program]), policy.check(&[format!("{directory}/{program}")]));
        }
    }
}
