//! Names of images, as people type them and as stores keep them.
//!
//! The grammar is that of the distribution project (`reference` package): `[DOMAIN/]PATH[:TAG][@DIGEST]`. A name
//! without a domain is Docker Hub's, one of a single component there lies under `library/`; without a tag and a digest
//! `latest` is meant.

use std::fmt;

use crate::digest::Digest;

/// The registry that names without one belong to.
const DOCKER_HUB: &str = "docker.io";
/// Longest repository name, domain included, in bytes: the grammar's own bound.
const NAME_BYTES: usize = 255;
/// Longest tag, in bytes: the grammar's own bound.
const TAG_BYTES: usize = 128;

/// A full name: displays as `docker.io/library/alpine:3.20`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    /// Host and port of the registry.
    pub registry: String,
    /// Path within it.
    pub repository: String,
    /// `None` only if there is a digest.
    pub tag: Option<String>,
    /// Digest of the manifest or index, if the name pins one.
    pub digest: Option<Digest>,
}

/// A text that is not the name of an image.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not the name of an image: {reason}")]
pub struct InvalidReference {
    /// The text, shortened.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl InvalidReference {
    /// What the user can do about it.
    pub fn hint(&self) -> String {
        "a name is [REGISTRY/]REPOSITORY[:TAG][@sha256:DIGEST], in lower case but for the tag".to_owned()
    }
}

impl Reference {
    /// The name to show to people: without what is understood.
    pub fn familiar(&self) -> String {
        let full = self.to_string();
        let short = full.strip_prefix("docker.io/").unwrap_or(&full);
        short.strip_prefix("library/").unwrap_or(short).to_owned()
    }

    /// The name without tag and digest, as people know it.
    pub fn familiar_repository(&self) -> String {
        Self { tag: None, digest: None, ..self.clone() }.familiar()
    }

    /// True for registries that answer on this machine only.
    pub fn is_loopback(&self) -> bool {
        let host = match self.registry.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) => host,
            _ => &self.registry,
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(formatter, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(formatter, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl std::str::FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        parse(text).map_err(|reason| InvalidReference { text: text.chars().take(120).collect(), reason })
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.starts_with('-') {
        return Err("it begins with `-`");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => {
            (rest, Some(digest.parse().map_err(|_| "its digest is not a sha256 digest")?))
        }
        None => (text, None),
    };
    // A colon after the last slash begins the tag; one before belongs to a port.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (registry, path) = match name.split_once('/') {
        Some((first, path)) if is_domain(first) => (normal_domain(first)?, path),
        _ => (DOCKER_HUB.to_owned(), name),
    };
    if path.is_empty() {
        return Err("it has no repository");
    }
    check_path(path)?;
    let repository = match registry == DOCKER_HUB && !path.contains('/') {
        true => format!("library/{path}"),
        false => path.to_owned(),
    };
    if registry.len() + 1 + repository.len() > NAME_BYTES {
        return Err("it is longer than 255 characters");
    }
    let tag = match (tag, &digest) {
        (None, None) => Some("latest".to_owned()),
        (tag, _) => tag.map(str::to_owned),
    };
    Ok(Reference { registry, repository, tag, digest })
}

/// Whether the first component of a name is a registry and not a part of the path.
fn is_domain(first: &str) -> bool {
    first.contains(['.', ':']) || first.eq_ignore_ascii_case("localhost")
}

fn normal_domain(domain: &str) -> Result<String, &'static str> {
    let invalid = "its registry is not a host name";
    let (host, port) = match domain.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or(invalid)?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| invalid)?;
            (&domain[..address.len() + 2], port.strip_prefix(':'))
        }
        None => match domain.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (domain, None),
        },
    };
    let is_label = |label: &str| {
        let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !label.is_empty() && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    if !host.starts_with('[') && !host.split('.').all(is_label) {
        return Err(invalid);
    }
    if port.is_some_and(|port| port.parse::<u16>().is_err() || port.starts_with('+')) {
        return Err("its registry's port is not a number");
    }
    let domain = domain.to_ascii_lowercase();
    Ok(if matches!(domain.as_str(), "index.docker.io" | "registry-1.docker.io") {
        DOCKER_HUB.into()
    } else {
        domain
    })
}

fn check_path(path: &str) -> Result<(), &'static str> {
    if path.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err("it has upper-case letters");
    }
    path.split('/').try_for_each(check_component)
}

/// A component: letters and digits, between them one `.`, one or two `_`, or any number of `-`.
pub(crate) fn check_component(component: &str) -> Result<(), &'static str> {
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    if bytes.is_empty() {
        return Err("a part of it is empty");
    }
    if !bytes.iter().all(|byte| is_word(*byte) || matches!(byte, b'.' | b'_' | b'-')) {
        return Err("it has characters other than letters, digits, `.`, `_` and `-`");
    }
    if !is_word(bytes[0]) || !is_word(bytes[bytes.len() - 1]) {
        return Err("a part of it begins or ends with a separator");
    }
    let separators = bytes.split(|byte| is_word(*byte));
    if separators
        .into_iter()
        .all(|run| matches!(run, b"" | b"." | b"_" | b"__") || run.iter().all(|byte| *byte == b'-'))
    {
        Ok(())
    } else {
        Err("two separators follow each other")
    }
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let sound = tag.bytes().all(|byte| is_word(byte) || matches!(byte, b'.' | b'-'));
    match tag.as_bytes() {
        [] => Err("its tag is empty"),
        [first, ..] if sound && is_word(*first) && tag.len() <= TAG_BYTES => Ok(()),
        _ => Err("its tag has other characters than letters, digits, `.`, `_` and `-`, or more than 128"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_and_shortened() {
        for (text, full, familiar) in [
            ("alpine", "docker.io/library/alpine:latest", "alpine:latest"),
            ("alpine:3.20", "docker.io/library/alpine:3.20", "alpine:3.20"),
            ("me/tools", "docker.io/me/tools:latest", "me/tools:latest"),
            ("docker.io/alpine", "docker.io/library/alpine:latest", "alpine:latest"),
            ("index.docker.io/library/alpine", "docker.io/library/alpine:latest", "alpine:latest"),
            ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
            ("localhost:5000/x/y:1", "localhost:5000/x/y:1", "localhost:5000/x/y:1"),
            ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
            ("ghcr.io/a__b/c---d", "ghcr.io/a__b/c---d:latest", "ghcr.io/a__b/c---d:latest"),
            ("Registry.example/x:V1", "registry.example/x:V1", "registry.example/x:V1"),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(
                (reference.to_string(), reference.familiar()),
                (full.into(), familiar.into()),
                "{text}"
            );
            assert_eq!(full.parse::<Reference>().unwrap(), reference);
        }
        let digest = Digest::of(b"x");
        let pinned: Reference = format!("alpine@{digest}").parse().unwrap();
        assert_eq!(pinned.tag, None);
        assert_eq!(pinned.familiar(), format!("alpine@{digest}"));
        let both: Reference = format!("alpine:1@{digest}").parse().unwrap();
        assert_eq!(both.to_string(), format!("docker.io/library/alpine:1@{digest}"));
    }

    #[test]
    fn what_is_no_name_is_told_why() {
        for (text, reason) in [
            ("", "it is empty"),
            ("-x", "it begins with `-`"),
            ("My", "it has upper-case letters"),
            // In lower case it would be a path at Docker Hub.
            ("A/0", "it has upper-case letters"),
            ("a/../b", "a part of it begins or ends with a separator"),
            ("a//b", "a part of it is empty"),
            ("a..b", "two separators follow each other"),
            ("a___b", "two separators follow each other"),
            ("a:", "its tag is empty"),
            ("a:-x", "its tag has other characters than letters, digits, `.`, `_` and `-`, or more than 128"),
            ("a@sha256:12", "its digest is not a sha256 digest"),
            ("ä", "it has characters other than letters, digits, `.`, `_` and `-`"),
            ("host.:80/x", "its registry is not a host name"),
            ("host:http/x", "its registry's port is not a number"),
            ("localhost/", "it has no repository"),
        ] {
            assert_eq!(text.parse::<Reference>().unwrap_err().reason, reason, "{text}");
        }
        assert!("a/".repeat(200).trim_end_matches('/').parse::<Reference>().is_err());
    }

    #[test]
    fn loopback() {
        for (text, expected) in [
            ("localhost:5000/x", true),
            ("127.0.0.1:5/x", true),
            ("[::1]/x", true),
            ("a.example/x", false),
            ("x", false),
        ] {
            assert_eq!(text.parse::<Reference>().unwrap().is_loopback(), expected, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn whatever_parses_comes_back_the_same(text in "[a-zA-Z0-9._:/@-]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                proptest::prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
            }
        }
    }
}
