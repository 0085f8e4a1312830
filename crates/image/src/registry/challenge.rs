//! What `WWW-Authenticate` asks for: RFC 9110, 11.6.1.

/// One way to authenticate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Challenge {
    /// In lower case: `bearer`, `basic`.
    pub(super) scheme: String,
    /// Names in lower case.
    parameters: Vec<(String, String)>,
}

impl Challenge {
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }
}

/// All of a header; what makes no sense is left out.
pub(super) fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges: Vec<Challenge> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',', '=', '"']);
        let end = rest.find([' ', '\t', ',', '=', '"']).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        if name.is_empty() {
            return challenges;
        }
        let name = name.to_ascii_lowercase();
        match after.trim_start_matches([' ', '\t']).strip_prefix('=') {
            Some(value) => {
                let (value, after) = read_value(value.trim_start_matches([' ', '\t']));
                if let Some(challenge) = challenges.last_mut() {
                    challenge.parameters.push((name, value));
                }
                rest = after;
            }
            None => {
                challenges.push(Challenge { scheme: name, parameters: Vec::new() });
                rest = after;
            }
        }
    }
}

/// A token or a quoted text, and what follows.
fn read_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (value, rest) = text.split_at(text.find([' ', '\t', ',']).unwrap_or(text.len()));
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut characters = quoted.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => break,
            '\\' => value.extend(characters.next()),
            other => value.push(other),
        }
    }
    (value, characters.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_as_registries_write_them() {
        let all = parse(
            r#"Basic realm="a \"b\", c", BEARER Realm="https://x.example/token?a=b",service=x.example , scope="repository:a/b:pull,push""#,
        );
        let schemes: Vec<_> = all.iter().map(|challenge| challenge.scheme.as_str()).collect();
        assert_eq!(schemes, ["basic", "bearer"]);
        assert_eq!(all[0].parameter("realm"), Some(r#"a "b", c"#));
        assert_eq!(all[1].parameter("realm"), Some("https://x.example/token?a=b"));
        assert_eq!(all[1].parameter("service"), Some("x.example"));
        assert_eq!(all[1].parameter("scope"), Some("repository:a/b:pull,push"));
        assert_eq!(all[1].parameter("error"), None);
        assert_eq!(parse(" ,, "), []);
        assert_eq!(parse("Negotiate")[0].scheme, "negotiate");
    }

    proptest::proptest! {
        #[test]
        fn any_header_is_read_to_its_end(header in r#"[a-c ,="\\é]{0,60}"#) {
            let most = header.len();
            proptest::prop_assert!(parse(&header).len() <= most);
        }
    }
}
