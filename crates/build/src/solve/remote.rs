//! What ADD takes from addresses: fetched by the executor, which knows what may be reached, and kept as one file.
//!
//! ```text
//! word ─► Remote ─┬─ --checksum ─► key ─► fetched only if the step is not in the cache, and compared
//!                 └─ without ────► fetched ─► key by content
//! ```
//! What comes is never unpacked. It lies in a file without a name on the store's disk: whatever happens, nothing is left.

use agentkernel_image::Digest;

use super::{Build, Executor, Solver, State};
use crate::dockerfile::{Place, Transfer, TransferSource};
use crate::executor::Failure;
use crate::place::nameless;
use crate::source::{self, Selection};

/// Something at an address.
pub(super) struct Remote {
    /// `http://` or `https://`.
    address: String,
    /// What the file is called; empty if the address does not tell.
    pub(super) name: Vec<u8>,
}

/// Something at an address, whose content is known.
pub(super) struct Pinned {
    pub(super) remote: Remote,
    pub(super) checksum: Digest,
    /// Where the address and the checksum stand.
    at: (Place, Place),
}

impl Remote {
    /// What a source of ADD names; `None` if that is a path, an error if it is a repository.
    pub(super) fn of(text: &str) -> Option<Result<Self, Failure>> {
        let is_web = ["http://", "https://"].iter().any(|scheme| text.starts_with(scheme));
        let is_git = ["git://", "ssh://", "git@"].iter().any(|scheme| text.starts_with(scheme));
        if is_git || (is_web && path_of(text).ends_with(".git")) {
            let hint = "clone it first and COPY it, or ADD an archive of it".to_owned();
            let message = format!("ADD of the git repository {text} is not supported");
            return Some(Err(Failure { message, hint: Some(hint) }));
        }
        is_web.then(|| Ok(Self { address: text.to_owned(), name: name_of(text) }))
    }
}

impl<E: Executor> Solver<'_, E> {
    /// The only source of an ADD with `--checksum`.
    pub(super) fn pinned(&self, state: &State<E::Machine>, transfer: &Transfer) -> Build<Option<Pinned>> {
        let Some(checksum) = &transfer.checksum else { return Ok(None) };
        let wrong = |at, message: &str| self.refuse(at, message, Some("ADD that address alone"));
        let [TransferSource::Path(word)] = transfer.sources.as_slice() else {
            return wrong(checksum.place, "--checksum is about one address, and there are other sources");
        };
        let remote = match Remote::of(&self.expand(state, word)?) {
            Some(remote) => remote.map_err(|failure| self.at(word.place, failure))?,
            None => return self.refuse(checksum.place, "--checksum is about an address, not a file", None),
        };
        let text = self.expand(state, checksum)?;
        let Ok(digest) = text.parse() else {
            let hint = Some("write --checksum=sha256: and 64 hexadecimal digits, as sha256sum prints them");
            return self.refuse(checksum.place, format!("`{text}` is no checksum"), hint);
        };
        Ok(Some(Pinned { remote, checksum: digest, at: (word.place, checksum.place) }))
    }

    /// Fetches what is at an address.
    pub(super) fn fetch(&mut self, remote: &Remote, at: Place, destination: &str) -> Build<Selection> {
        // Before anything is fetched for nothing; of directories that are there the plan knows.
        if remote.name.is_empty() && destination.ends_with('/') {
            return Err(self.at(at, nameless(destination)));
        }
        let unkept =
            |error: &dyn std::fmt::Display| Failure::new(format!("cannot keep what is fetched: {error}"));
        let mut file = self.writing.scratch().map_err(|error| self.at(at, unkept(&error)))?;
        let fetched = self.executor.fetch(&remote.address, &mut file, &mut *self.on_event);
        fetched.map_err(|failure| self.at(at, failure))?;
        let selection = source::fetched(&remote.name, file, self.time());
        selection.map_err(|error| self.at(at, unkept(&error)))
    }

    /// As [`Solver::fetch`], if it is what was said.
    pub(super) fn fetch_pinned(&mut self, pinned: &Pinned, destination: &str) -> Build<Selection> {
        let (at, checksum_at) = pinned.at;
        let selection = self.fetch(&pinned.remote, at, destination)?;
        let actual = source::file_digest(&selection).map_err(|failure| self.at(at, failure))?;
        if actual == pinned.checksum {
            return Ok(selection);
        }
        let message = format!("what was fetched has the digest {actual}, not {}", pinned.checksum);
        let hint = "if the new content is meant to be there, change the checksum";
        self.refuse(checksum_at, message, Some(hint))
    }
}

/// The path of an address, without query and fragment.
fn path_of(address: &str) -> &str {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    rest.find('/').map_or("", |slash| &rest[slash..])
}

/// The last part of an address's path, without its escapes; empty if that cannot be a file's name.
fn name_of(address: &str) -> Vec<u8> {
    let path = unescaped(path_of(address));
    let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
    let name = path[..end].rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let is_name = !matches!(name, b"." | b"..") && name.len() <= 255 && !name.contains(&0);
    if is_name { name.to_vec() } else { Vec::new() }
}

fn unescaped(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digit = |index: usize| tail.get(index).and_then(|byte| char::from(*byte).to_digit(16));
        match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((high * 16 + low) as u8);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files() {
        for (address, name) in [
            ("https://x.example/a/b.tar.gz?token=1/2#f", "b.tar.gz"),
            ("http://x.example/a/", "a"),
            ("http://x.example/a%20b%2", "a b%2"),
            ("http://x.example/a%2fb", "b"),
            ("http://x.example", ""),
            ("http://x.example/", ""),
            ("http://x.example?/q", ""),
            ("http://x.example/..", ""),
            ("http://x.example/a/%2e%2e", ""),
            ("http://x.example/%00", ""),
        ] {
            assert_eq!(String::from_utf8_lossy(&name_of(address)), name, "{address}");
        }
    }

    #[test]
    fn addresses_paths_and_repositories() {
        for text in ["a.txt", "http", "/https://x", "github.com/a/b.git"] {
            assert!(Remote::of(text).is_none(), "{text}");
        }
        for text in [
            "http://x.example/a",
            "https://x.example",
            "https://x.example/a.gitx",
            "https://x.example/?a.git",
        ] {
            assert!(Remote::of(text).is_some_and(|remote| remote.is_ok()), "{text}");
        }
        for text in [
            "git@x.example:a/b",
            "git://x.example/a",
            "ssh://git@x.example/a",
            "https://x.example/a.git",
            "https://x.example/a.git#main:sub",
        ] {
            assert!(Remote::of(text).is_some_and(|remote| remote.is_err()), "{text}");
        }
    }
}
