//! The views of mounted directories: all of one that the user named, but for the state directory; and of a home
//! directory what is no credential and no setting.

use rustix::fs::FileType;

use super::workspace::WorkspaceView;

#[derive(Debug)]
pub(in super::super) struct DirectoryView {
    /// Hidden with all that is below it; relative to the root.
    hidden: Option<Vec<u8>>,
    home: Option<HomeRules>,
}

/// What a home directory shows.
#[derive(Debug)]
struct HomeRules {
    secrets: WorkspaceView,
    /// The only shown paths whose first name begins with a dot, relative to the home.
    toolchains: Vec<Vec<u8>>,
}

impl DirectoryView {
    /// Everything but `hidden`.
    pub(in super::super) fn new(hidden: Option<Vec<u8>>) -> Self {
        Self { hidden, home: None }
    }

    /// A home directory: nothing whose name begins with a dot but the way to `toolchains`, and nothing that looks like a
    /// secret.
    pub(in super::super) fn home(toolchains: Vec<Vec<u8>>) -> Result<Self, ignore::Error> {
        Ok(Self { hidden: None, home: Some(HomeRules { secrets: WorkspaceView::new("")?, toolchains }) })
    }

    pub(super) fn shows(&self, path: &[u8], kind: FileType) -> bool {
        if self.hidden.as_deref().is_some_and(|hidden| is_at_or_below(path, hidden)) {
            return false;
        }
        match &self.home {
            Some(home) => home.shows(path, kind),
            None => WorkspaceView::is_known(kind),
        }
    }
}

impl HomeRules {
    fn shows(&self, path: &[u8], kind: FileType) -> bool {
        let admitted = !path.starts_with(b".")
            || self
                .toolchains
                .iter()
                .any(|toolchain| is_at_or_below(path, toolchain) || is_at_or_below(toolchain, path));
        admitted && self.secrets.shows(path, kind)
    }
}

fn is_at_or_below(path: &[u8], directory: &[u8]) -> bool {
    path.strip_prefix(directory).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_directory_is_never_shown() {
        let view = DirectoryView::new(Some(b".agentkernel".to_vec()));
        for (path, shown) in [
            (".agentkernel", false),
            (".agentkernel/sandboxes/a/spec.json", false),
            (".agentkernel-notes", true),
            ("project/.agentkernel", true),
            (".env", true),
        ] {
            assert_eq!(view.shows(path.as_bytes(), FileType::RegularFile), shown, "{path}");
        }
        assert!(!view.shows(b"disk", FileType::BlockDevice));
    }

    #[test]
    fn a_home_shows_work_and_toolchains_but_no_settings_and_secrets() {
        let view = DirectoryView::home(vec![b".cargo/bin".to_vec(), b".rustup".to_vec()]).unwrap();
        for (path, shown) in [
            ("notes.txt", true),
            ("work/.gitignore", true),
            ("work/.env", false),
            ("keys/id_rsa", false),
            (".bash_history", false),
            (".ssh", false),
            (".cargo", true),
            (".cargo/bin/cargo", true),
            (".cargo/credentials.toml", false),
            (".rustup/toolchains/x", true),
            (".rustupx", false),
        ] {
            assert_eq!(view.shows(path.as_bytes(), FileType::RegularFile), shown, "{path}");
        }
    }
}
