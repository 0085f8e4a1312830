//! Which directory is the workspace: the project a command was typed in, never a home or a whole system.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The file that marks a project's root.
pub const CONFIGURATION_FILE: &str = "agentkernel.toml";

/// What becomes of the workspace in a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkspaceMode {
    /// Copy-on-write: changes are kept apart until they are applied.
    Cow,
    /// Changes reach the host at once.
    Rw,
    /// Changes are refused.
    Ro,
    /// The guest does not see the project.
    None,
}

/// A chosen workspace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workspace {
    /// Its root on the host, and in the guest.
    pub root: PathBuf,
    /// Never [`WorkspaceMode::None`].
    pub mode: WorkspaceMode,
}

/// The outcome of [`choose`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// This directory.
    Workspace(Workspace),
    /// None, as was asked for.
    NotWanted,
    /// None, because the directory must not be shared; the text says why.
    Unsuitable(String),
}

/// Chooses the workspace for a command typed in `current`: the nearest ancestor with `agentkernel.toml`, else
/// `current` itself; never `/`, the home directory or an ancestor of it, nor a directory of the system.
///
/// Both paths are absolute and free of symlinks.
pub fn choose(current: &Path, home: &Path, mode: WorkspaceMode) -> Choice {
    if mode == WorkspaceMode::None {
        return Choice::NotWanted;
    }
    let marked = current
        .ancestors()
        .filter(|directory| unsuitable(directory, home).is_none())
        .find(|directory| directory.join(CONFIGURATION_FILE).is_file());
    let root = marked.unwrap_or(current);
    match unsuitable(root, home) {
        Some(reason) => Choice::Unsuitable(reason),
        None => Choice::Workspace(Workspace { root: root.to_owned(), mode }),
    }
}

fn unsuitable(root: &Path, home: &Path) -> Option<String> {
    // The guest has its own of these, or they hold the host's system rather than a project.
    const SYSTEM: [&str; 17] = [
        "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin",
        "/sys", "/usr", "/var", "/tmp", "/opt", "/home",
    ];
    const INSIDE: [&str; 4] = ["/proc", "/sys", "/dev", "/boot"];
    if root == Path::new("/") {
        return Some("it is the root of the file system".into());
    }
    if root == home {
        return Some("it is your home directory".into());
    }
    if home.starts_with(root) {
        return Some("it contains your home directory".into());
    }
    if SYSTEM.iter().any(|system| root == Path::new(system))
        || INSIDE.iter().any(|system| root.starts_with(system))
    {
        return Some("it is a directory of the system".into());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(current: &str, home: &str) -> Choice {
        choose(Path::new(current), Path::new(home), WorkspaceMode::Cow)
    }

    #[test]
    fn homes_and_systems_are_never_shared() {
        for current in ["/", "/home", "/home/user", "/etc", "/usr", "/proc/self", "/tmp", "/var", "/dev/shm"]
        {
            assert!(matches!(chosen(current, "/home/user"), Choice::Unsuitable(_)), "{current}");
        }
        assert!(matches!(chosen("/data/deep", "/data/deep/home"), Choice::Unsuitable(_)));
    }

    #[test]
    fn a_project_below_them_is() {
        for current in
            ["/home/user/project", "/tmp/x", "/srv", "/root/project", "/home/user/.cache/x", "/homestead"]
        {
            let workspace = Workspace { root: current.into(), mode: WorkspaceMode::Cow };
            assert_eq!(chosen(current, "/home/user"), Choice::Workspace(workspace));
        }
    }

    #[test]
    fn the_nearest_marked_ancestor_wins_but_not_a_marked_home() {
        let home = tempfile::tempdir().unwrap();
        let root = home.path().join("project");
        let deep = root.join("src/deep");
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(home.path().join(CONFIGURATION_FILE), "").unwrap();
        let choice = choose(&deep, home.path(), WorkspaceMode::Ro);
        assert_eq!(choice, Choice::Workspace(Workspace { root: deep.clone(), mode: WorkspaceMode::Ro }));
        std::fs::write(root.join(CONFIGURATION_FILE), "").unwrap();
        let choice = choose(&deep, home.path(), WorkspaceMode::Ro);
        assert_eq!(choice, Choice::Workspace(Workspace { root, mode: WorkspaceMode::Ro }));
    }
}
