//! Files of variables, as `--env-file` takes them, with Docker's meaning.

use super::nearest::shown;

/// Largest file of variables, bytes.
pub const LARGEST_FILE: usize = 1 << 20;

/// What is wrong with a file of variables. Lines count from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvironmentFileError {
    /// The file exceeds [`LARGEST_FILE`].
    #[error("the file is larger than {} KiB", LARGEST_FILE >> 10)]
    TooLarge,
    /// A line begins with `=`.
    #[error("line {line}: there is no name before the `=`")]
    NoName {
        /// Number of the line.
        line: usize,
    },
    /// A name has white space in it, as in `export NAME=value`.
    #[error("line {line}: the name `{}` has white space in it", shown(name))]
    Spaces {
        /// Number of the line.
        line: usize,
        /// The name.
        name: String,
    },
    /// No variable can hold this byte.
    #[error("line {line}: a variable cannot hold a NUL byte")]
    Nul {
        /// Number of the line.
        line: usize,
    },
}

/// Reads lines `NAME=value`, and `NAME` alone, which has no value here: it stands for the caller's variable.
///
/// As with `docker run --env-file`: lines that are empty or begin with `#` are left out, white space before a name as
/// well; everything behind the `=` is the value, quotes, `#` and spaces at the end included. A name given twice comes
/// twice; the last one counts.
///
/// # Errors
/// At the first line that is none of these.
pub fn parse_file(text: &str) -> Result<Vec<(String, Option<String>)>, EnvironmentFileError> {
    if text.len() > LARGEST_FILE {
        return Err(EnvironmentFileError::TooLarge);
    }
    let mut variables = Vec::new();
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (index, written) in text.lines().enumerate() {
        let line = index + 1;
        let written = written.trim_start();
        if written.is_empty() || written.starts_with('#') {
            continue;
        }
        let (name, value) = match written.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (written, None),
        };
        if written.contains('\0') {
            return Err(EnvironmentFileError::Nul { line });
        }
        if name.is_empty() {
            return Err(EnvironmentFileError::NoName { line });
        }
        if name.contains(char::is_whitespace) {
            return Err(EnvironmentFileError::Spaces { line, name: name.to_owned() });
        }
        variables.push((name.to_owned(), value.map(str::to_owned)));
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_s_meaning() {
        let text = "\u{feff}A=1\r\n# comment\n\n  B= two # 'words' = more \nHOME\nA=\n\t#x\nE=\"q\"";
        let variables = parse_file(text).unwrap();
        let variables: Vec<(&str, Option<&str>)> =
            variables.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
        assert_eq!(
            variables,
            [
                ("A", Some("1")),
                ("B", Some(" two # 'words' = more ")),
                ("HOME", None),
                ("A", Some("")),
                ("E", Some("\"q\""))
            ]
        );
    }

    #[test]
    fn mistakes_name_their_line() {
        for (text, message) in [
            ("A=1\n=2", "line 2: there is no name before the `=`"),
            ("\n\nexport A=1", "line 3: the name `export A` has white space in it"),
            ("A \n", "line 1: the name `A ` has white space in it"),
            ("A=\0", "line 1: a variable cannot hold a NUL byte"),
            (&"#".repeat(LARGEST_FILE + 1), "the file is larger than 1024 KiB"),
        ] {
            assert_eq!(parse_file(text).unwrap_err().to_string(), message);
        }
    }
}
