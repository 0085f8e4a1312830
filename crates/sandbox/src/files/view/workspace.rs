//! The view of a workspace: everything but what looks like a secret.
//!
//! A default list of names is hidden; the workspace's own `.agentkernelignore` (syntax of `.gitignore`) hides
//! more, and its `!` lines show names again that the default list hides.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ignore::Match;
use ignore::gitignore::{Gitignore, GitignoreBuilder};
use rustix::fs::FileType;

use super::secrets;

/// The ignore file's name, at the workspace's root.
pub(in super::super) const IGNORE_FILE: &str = ".agentkernelignore";

#[derive(Debug)]
pub(in super::super) struct WorkspaceView {
    defaults: Gitignore,
    own: Gitignore,
}

impl WorkspaceView {
    /// A view with the lines of an ignore file, empty where there is none.
    ///
    /// # Errors
    /// The first line that is no pattern.
    pub(in super::super) fn new(ignore_file: &str) -> Result<Self, ignore::Error> {
        let mut defaults = GitignoreBuilder::new("/");
        defaults.case_insensitive(true)?;
        for line in secrets::WORKSPACE {
            defaults.add_line(None, line)?;
        }
        let mut own = GitignoreBuilder::new("/");
        for line in ignore_file.lines() {
            own.add_line(None, line)?;
        }
        Ok(Self { defaults: defaults.build()?, own: own.build()? })
    }

    pub(super) fn shows(&self, path: &[u8], kind: FileType) -> bool {
        Self::is_known(kind) && !self.hides(path, kind == FileType::Directory)
    }

    /// Kinds that are shown: no device of the host.
    pub(super) fn is_known(kind: FileType) -> bool {
        matches!(
            kind,
            FileType::RegularFile
                | FileType::Directory
                | FileType::Symlink
                | FileType::Fifo
                | FileType::Socket
        )
    }

    fn hides(&self, path: &[u8], is_directory: bool) -> bool {
        let path = Path::new(OsStr::from_bytes(path));
        match self.own.matched(path, is_directory) {
            Match::None => self.defaults.matched(path, is_directory).is_ignore(),
            decided => decided.is_ignore(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shows(view: &WorkspaceView, path: &str) -> bool {
        match path.strip_suffix('/') {
            Some(directory) => view.shows(directory.as_bytes(), FileType::Directory),
            None => view.shows(path.as_bytes(), FileType::RegularFile),
        }
    }

    #[test]
    fn secrets_are_hidden_by_default() {
        let view = WorkspaceView::new("").unwrap();
        for path in [
            ".env",
            "a/b/.env.production",
            ".ENV",
            "tls/server.pem",
            "server.key",
            "id_ed25519",
            ".npmrc",
            "x/.ssh/",
            ".aws/",
            "service-account-prod.json",
            "infra/terraform.tfstate",
            "infra/terraform.tfstate.backup",
            "prod.tfvars",
        ] {
            assert!(!shows(&view, path), "{path}");
        }
        for path in [
            ".env.example",
            ".envrc",
            "certifi/cacert.pem",
            "src/main.rs",
            "environment",
            "keys.rs",
            ".git/config",
            "id_rsa.pub",
            "line\nbreak",
        ] {
            assert!(shows(&view, path), "{path}");
        }
    }

    #[test]
    fn the_ignore_file_hides_more_and_shows_again() {
        let view = WorkspaceView::new("# mine\n!.env.test\n/private/\n*.sqlite\n!keep.sqlite\n").unwrap();
        for (path, expected) in [
            (".env.test", true),
            (".env", false),
            ("private/", false),
            ("a/private/", true),
            ("private", true),
            ("a/b.sqlite", false),
            ("a/keep.sqlite", true),
        ] {
            assert_eq!(shows(&view, path), expected, "{path}");
        }
        assert!(WorkspaceView::new("[z-a]").is_err(), "a broken line is told, not passed over");
    }

    proptest! {
        #[test]
        fn any_path_is_judged(path in prop::collection::vec(any::<u8>(), 1..64)) {
            let view = WorkspaceView::new("*.x\n!y\n").unwrap();
            view.shows(&path, FileType::RegularFile);
        }

        #[test]
        fn a_secret_is_hidden_at_any_depth(names in prop::collection::vec("[a-z]{1,6}", 0..5)) {
            let view = WorkspaceView::new("").unwrap();
            let path: String = names.iter().map(|name| format!("{name}/")).collect();
            let path = format!("{}.env", path);
            prop_assert!(!shows(&view, &path));
        }
    }
}
