//! Which directories under the home directory the commands on `PATH` need.
//!
//! A version manager puts small shims or links on `PATH` and keeps the programs elsewhere. For the managers known
//! here that place is shared as well; of any other directory on `PATH` just the directory itself is. The home
//! directory is never shared, and nothing that contains another user's `PATH` could make it so.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

/// What a directory on `PATH` (relative to the home directory) needs besides or instead of itself.
struct Manager {
    on_path: &'static str,
    /// Whether directories below `on_path` mean this manager, too.
    below: bool,
    needs: &'static [&'static str],
}

const MANAGERS: &[Manager] = &[
    Manager {
        on_path: ".cargo/bin",
        below: false,
        needs: &[".cargo/bin", ".cargo/env", ".rustup/toolchains", ".rustup/settings.toml"],
    },
    Manager { on_path: ".rustup/toolchains", below: true, needs: &[".rustup/toolchains"] },
    Manager { on_path: ".pyenv", below: true, needs: &[".pyenv"] },
    Manager { on_path: ".rbenv", below: true, needs: &[".rbenv"] },
    Manager { on_path: ".nodenv", below: true, needs: &[".nodenv"] },
    Manager { on_path: ".goenv", below: true, needs: &[".goenv"] },
    Manager { on_path: ".rvm", below: true, needs: &[".rvm"] },
    Manager { on_path: ".nvm", below: true, needs: &[".nvm/versions", ".nvm/alias", ".nvm/nvm.sh"] },
    Manager { on_path: ".fnm", below: true, needs: &[".fnm"] },
    Manager { on_path: ".local/share/fnm", below: true, needs: &[".local/share/fnm"] },
    Manager { on_path: ".local/state/fnm_multishells", below: true, needs: &[".local/share/fnm"] },
    Manager { on_path: ".volta", below: true, needs: &[".volta/bin", ".volta/tools"] },
    Manager { on_path: ".asdf", below: true, needs: &[".asdf"] },
    Manager { on_path: ".local/share/mise", below: true, needs: &[".local/share/mise"] },
    Manager { on_path: ".sdkman/candidates", below: true, needs: &[".sdkman/candidates"] },
    Manager { on_path: ".bun", below: true, needs: &[".bun/bin"] },
    Manager { on_path: ".deno", below: true, needs: &[".deno/bin"] },
    Manager { on_path: "go", below: true, needs: &["go/bin"] },
    Manager { on_path: ".ghcup", below: true, needs: &[".ghcup/bin", ".ghcup/ghc", ".ghcup/cabal"] },
    Manager { on_path: ".poetry", below: true, needs: &[".poetry"] },
    Manager { on_path: ".local/share/pnpm", below: true, needs: &[".local/share/pnpm"] },
    Manager {
        on_path: ".local/bin",
        below: false,
        needs: &[
            ".local/bin",
            ".local/lib",
            ".local/share/uv/python",
            ".local/share/uv/tools",
            ".local/share/pipx/venvs",
            ".local/pipx/venvs",
        ],
    },
];

/// Names at the home directory's top that hold credentials or everything else: never shared whole.
const NEVER: &[&str] = &[
    ".agentkernel",
    ".aws",
    ".cargo",
    ".cache",
    ".config",
    ".docker",
    ".gnupg",
    ".kube",
    ".local",
    ".local/share",
    ".local/state",
    ".mozilla",
    ".password-store",
    ".rustup",
    ".ssh",
    ".var",
];

/// The directories (and a few files) under `home` that the directories of `path_variable` need, sorted, none
/// inside another. Never `home` itself, an ancestor of it, or what holds credentials.
pub fn toolchains_under(home: &Path, path_variable: &OsStr) -> Vec<PathBuf> {
    let mut found = BTreeSet::new();
    if !is_plain(home) || home.parent().is_none() {
        return Vec::new();
    }
    for directory in std::env::split_paths(path_variable).filter(|directory| is_plain(directory)) {
        let Ok(relative) = directory.strip_prefix(home) else { continue };
        if !relative.as_os_str().is_empty() {
            found.extend(needs(home, relative).into_iter().filter(|need| is_allowed(need)));
        }
    }
    let found = found.into_iter().map(|need| home.join(need)).filter(|path| path.exists());
    let existing: BTreeSet<PathBuf> = found.flat_map(|path| spellings(home, path)).collect();
    let inside_another = |path: &Path| path.ancestors().skip(1).any(|above| existing.contains(above));
    existing.iter().filter(|path| !inside_another(path)).cloned().collect()
}

/// The path as given and, where symlinks lead to it, as it really is: unless they lead out of the home directory or
/// to what must not be shared.
fn spellings(home: &Path, path: PathBuf) -> Vec<PathBuf> {
    let real = std::fs::canonicalize(home).ok().zip(std::fs::canonicalize(&path).ok());
    let real = real.and_then(|(home, real)| {
        let relative = real.strip_prefix(home).ok()?;
        (!relative.as_os_str().is_empty() && is_allowed(relative)).then_some(real)
    });
    [path].into_iter().chain(real).collect()
}

/// What `relative`, a directory on `PATH`, needs; relative to the home directory.
fn needs(home: &Path, relative: &Path) -> Vec<PathBuf> {
    let manager = MANAGERS.iter().find(|manager| {
        relative == Path::new(manager.on_path) || manager.below && relative.starts_with(manager.on_path)
    });
    if let Some(manager) = manager {
        return manager.needs.iter().map(PathBuf::from).chain([relative.to_owned()]).collect();
    }
    // A Python environment is found through its `pyvenv.cfg`, one level up; a prefix with `bin` and `lib`
    // (a compiler, a conda installation) needs both.
    match relative.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(prefix) if home.join(prefix).join("pyvenv.cfg").exists() => vec![prefix.to_owned()],
        Some(prefix) if relative.ends_with("bin") => ["bin", "lib", "lib64", "libexec", "share", "include"]
            .iter()
            .map(|part| prefix.join(part))
            .collect(),
        _ => vec![relative.to_owned()],
    }
}

fn is_allowed(relative: &Path) -> bool {
    !NEVER.iter().any(|never| {
        let never = Path::new(never);
        // Neither the place itself nor what lies above it; `.cargo/bin` is fine, `.ssh/bin` is not.
        never.starts_with(relative) || is_secret(never) && relative.starts_with(never)
    })
}

/// Whether nothing below the place may be shared either.
fn is_secret(never: &Path) -> bool {
    ![".cargo", ".rustup", ".local", ".local/share", ".local/state", ".cache", ".config", ".var"]
        .iter()
        .any(|holder| never == Path::new(holder))
}

fn is_plain(path: &Path) -> bool {
    path.is_absolute()
        && path.components().all(|component| matches!(component, Component::RootDir | Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(existing: &[&str], path: &[&str]) -> Vec<String> {
        let home = crate::files::tests::directory();
        for directory in existing {
            std::fs::create_dir_all(home.path().join(directory)).unwrap();
        }
        let path = std::env::join_paths(path.iter().map(|entry| match entry.strip_prefix('~') {
            Some(rest) => PathBuf::from(format!("{}{rest}", home.path().display())),
            None => PathBuf::from(entry),
        }));
        toolchains_under(home.path(), &path.unwrap())
            .iter()
            .map(|path| path.strip_prefix(home.path()).unwrap().display().to_string())
            .collect()
    }

    #[test]
    fn managers_are_known() {
        let existing = [".cargo/bin", ".cargo/registry", ".rustup/toolchains/x", ".pyenv/shims", ".ssh"];
        assert_eq!(
            found(&existing, &["~/.cargo/bin", "/usr/bin", "~/.pyenv/shims"]),
            [".cargo/bin", ".pyenv", ".rustup/toolchains"]
        );
        assert_eq!(
            found(&[".nvm/versions/node/v22/bin"], &["~/.nvm/versions/node/v22/bin"]),
            [".nvm/versions"]
        );
        assert_eq!(
            found(&["bin", "tools/x/bin", "tools/x/lib"], &["~/bin", "~/tools/x/bin"]),
            ["bin", "tools/x/bin", "tools/x/lib"]
        );
    }

    #[test]
    fn the_home_directory_and_secrets_are_never_shared() {
        let existing = [".ssh/bin", ".aws", ".cargo/bin", ".config/x", "a/b"];
        let path =
            ["~", "~/", "/", "~/..", "~/.ssh", "~/.ssh/bin", "~/.cargo", "~/.local", "~/a/../.aws", "."];
        assert!(found(&existing, &path).is_empty());
    }

    #[test]
    fn symlinks_share_what_they_lead_to_within_bounds() {
        let directory = crate::files::tests::directory();
        let home = directory.path().join("home");
        for made in ["real/tools", ".ssh", "x"] {
            std::fs::create_dir_all(home.join(made)).unwrap();
        }
        for (name, target) in
            [("tools", "real/tools"), ("whole", "."), ("above", ".."), ("keys", ".ssh"), ("away", "/etc")]
        {
            std::os::unix::fs::symlink(target, home.join(name)).unwrap();
        }
        let names = ["tools", "whole", "above", "keys", "away"];
        let path = std::env::join_paths(names.map(|name| home.join(name))).unwrap();
        let mut found = toolchains_under(&home, &path);
        found.retain(|path| !path.is_symlink());
        assert_eq!(found, [home.join("real/tools")]);
    }
}
