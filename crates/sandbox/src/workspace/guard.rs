//! Workspace paths that could run on the host by themselves.
//!
//! A guest that may write such a path needs no further help to leave its sandbox: the host's user opens an editor,
//! enters the directory, types `git status` or starts an agent, and the guest's program runs. `apply` holds these
//! paths back unless each is named, and in `rw` mode the file server keeps them read-only.
//!
//! Where the line is:
//! - **Guarded**: what a tool obeys when it merely looks at the project (shell hooks, editors, debuggers, git, agents),
//!   and settings of package managers that name programs for whatever is called next.
//! - **Not guarded**: project code that runs when its user runs the project: `Makefile`, `package.json`, `build.rs`,
//!   `conftest.py`, `.venv/`. It is what the agent was asked to write, and `diff` shows it. Nor what runs elsewhere:
//!   `.github/workflows` needs a push first. Nor `.gitmodules` and `.gitattributes`: both can only name what
//!   `.git/config` defines.
//!
//! Rules hold at any depth, because every one of these tools also looks in subdirectories that are opened by themselves.
//! Names are compared as a case-insensitive file system would, so that the list holds there too.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const GIT: &str = "git runs or obeys it";
const GIT_REPOSITORY: &str = "could make its directory a git repository with hooks of its own";
const GIT_HOOK: &str = "runs from git hooks";
const SHELL: &str = "runs when a shell enters the directory";
const EDITOR: &str = "editors and debuggers obey it when they open the directory";
const CONTAINER: &str = "runs when an editor opens the directory as a container";
const AGENT: &str = "agents obey it and start what it names";
const PACKAGES: &str = "names programs for the next call of a package manager or build tool";
const OURS: &str = "decides what the next sandbox may do";

/// Path endings and why they are guarded, all lower case. A rule guards what it names and everything beneath.
const RULES: &[(&[&str], &str)] = &[
    (&["agentkernel.toml"], OURS),
    (&[".agentkernelignore"], OURS),
    // Hook managers: their git hooks are installed already, these files say what the hooks run.
    (&[".husky"], GIT_HOOK),
    (&[".huskyrc"], GIT_HOOK),
    (&[".githooks"], GIT_HOOK),
    (&[".git-hooks"], GIT_HOOK),
    (&[".pre-commit-config.yaml"], GIT_HOOK),
    (&[".pre-commit-config.yml"], GIT_HOOK),
    (&[".overcommit.yml"], GIT_HOOK),
    (&[".lefthook"], GIT_HOOK),
    (&[".lefthook-local"], GIT_HOOK),
    (&["lefthook.yml"], GIT_HOOK),
    (&["lefthook.yaml"], GIT_HOOK),
    (&["lefthook.toml"], GIT_HOOK),
    (&["lefthook.json"], GIT_HOOK),
    (&["lefthook-local.yml"], GIT_HOOK),
    (&["lefthook-local.yaml"], GIT_HOOK),
    (&[".lefthook.yml"], GIT_HOOK),
    (&[".lefthook.yaml"], GIT_HOOK),
    (&[".lefthook.toml"], GIT_HOOK),
    (&[".lefthook.json"], GIT_HOOK),
    (&[".lefthook-local.yml"], GIT_HOOK),
    (&[".lefthook-local.yaml"], GIT_HOOK),
    // Shells. direnv asks again after a change of .envrc, but not after one of what it sources.
    (&[".envrc"], SHELL),
    (&[".direnv"], SHELL),
    (&[".autoenv"], SHELL),
    (&[".autoenv.zsh"], SHELL),
    (&[".autoenv_leave.zsh"], SHELL),
    (&[".mise.toml"], SHELL),
    (&[".mise.local.toml"], SHELL),
    (&["mise.toml"], SHELL),
    (&["mise.local.toml"], SHELL),
    (&[".mise"], SHELL),
    (&[".rtx.toml"], SHELL),
    // Editors and debuggers. Settings name interpreters, formatters and language servers.
    (&[".vscode", "tasks.json"], EDITOR),
    (&[".vscode", "launch.json"], EDITOR),
    (&[".vscode", "settings.json"], EDITOR),
    (&[".vscode", "mcp.json"], AGENT),
    (&[".idea"], EDITOR),
    (&[".run"], EDITOR),
    (&[".fleet"], EDITOR),
    (&[".zed"], EDITOR),
    (&[".helix"], EDITOR),
    (&[".exrc"], EDITOR),
    (&[".vimrc"], EDITOR),
    (&[".gvimrc"], EDITOR),
    (&[".lvimrc"], EDITOR),
    (&[".vim"], EDITOR),
    (&[".nvimrc"], EDITOR),
    (&[".nvim.lua"], EDITOR),
    (&[".nvim"], EDITOR),
    (&[".lazy.lua"], EDITOR),
    (&[".dir-locals.el"], EDITOR),
    (&[".dir-locals-2.el"], EDITOR),
    (&[".gdbinit"], EDITOR),
    (&[".lldbinit"], EDITOR),
    (&[".devcontainer"], CONTAINER),
    (&[".devcontainer.json"], CONTAINER),
    // Agents: hooks, and servers started for the model.
    (&[".claude"], AGENT),
    (&[".claude.json"], AGENT),
    (&[".mcp.json"], AGENT),
    (&[".cursor"], AGENT),
    (&[".windsurf"], AGENT),
    (&[".codex"], AGENT),
    (&[".gemini"], AGENT),
    (&[".opencode"], AGENT),
    (&["opencode.json"], AGENT),
    (&["opencode.jsonc"], AGENT),
    (&[".continue"], AGENT),
    (&[".roo"], AGENT),
    (&[".kilocode"], AGENT),
    (&[".kiro"], AGENT),
    (&[".amazonq"], AGENT),
    (&[".aider.conf.yml"], AGENT),
    // Package managers and build tools that read settings from the directory they are called in.
    (&[".cargo", "config.toml"], PACKAGES),
    (&[".cargo", "config"], PACKAGES),
    (&["rust-toolchain.toml"], PACKAGES),
    (&["rust-toolchain"], PACKAGES),
    (&[".npmrc"], PACKAGES),
    (&[".yarnrc"], PACKAGES),
    (&[".yarnrc.yml"], PACKAGES),
    (&[".yarn", "plugins"], PACKAGES),
    (&[".yarn", "releases"], PACKAGES),
    (&[".pnpmfile.cjs"], PACKAGES),
    (&[".pnpmfile.mjs"], PACKAGES),
    (&["bunfig.toml"], PACKAGES),
    (&[".bundle"], PACKAGES),
    (&[".mvn"], PACKAGES),
    (&[".bazelrc"], PACKAGES),
    (&["tools", "bazel"], PACKAGES),
    (&[".buckconfig"], PACKAGES),
];

/// Name endings, lower case, each with a reason.
const SUFFIXES: &[(&str, &str)] = &[
    // Settings and tasks of a whole workspace, under any name.
    (".code-workspace", EDITOR),
    // A bare repository: git runs what its config says as soon as it is called inside.
    (".git", GIT),
];

/// What git keeps directly in the workspace's own `.git` that names no programs: data, references, messages. All
/// else is guarded, such as `config`, `hooks`, `modules`, `worktrees`, `commondir`, and the to-do list of a rebase.
const GIT_DATA: &[&str] = &[
    "AUTO_MERGE",
    "CHERRY_PICK_HEAD",
    "COMMIT_EDITMSG",
    "FETCH_HEAD",
    "HEAD",
    "MERGE_HEAD",
    "MERGE_MODE",
    "MERGE_MSG",
    "MERGE_RR",
    "ORIG_HEAD",
    "REBASE_HEAD",
    "REVERT_HEAD",
    "SQUASH_MSG",
    "description",
    "index",
    "logs",
    "objects",
    "packed-refs",
    "refs",
    "rr-cache",
    "shallow",
];

/// Why a path relative to the workspace is held back; `None` for an ordinary path.
///
/// INVARIANT: what is beneath a guarded path is guarded. A caller that makes something else than a directory, or
/// moves a whole directory, asks [`guarded_leaf`] besides.
pub fn guarded(path: &Path) -> Option<&'static str> {
    let names: Vec<&OsStr> = path.iter().collect();
    let folded: Vec<String> = names.iter().map(|name| fold(name)).collect();
    let start = match git_data(&names) {
        // The workspace's own repository: its names are git's, no other rule speaks of them.
        GitPath::Data => return None,
        GitPath::Control => return Some(GIT),
        GitPath::Outside => 0,
        GitPath::Root => 1,
    };
    (start..folded.len()).find_map(|index| guarded_name(names[index], &folded[index..]))
}

/// As [`guarded`], for a file or link: also where a guarded path could only lie *beneath* it, such as `.vscode` or
/// `.git`, since a link there would lead to a directory with other names.
pub fn guarded_leaf(path: &Path) -> Option<&'static str> {
    guarded(path).or_else(|| {
        let folded: Vec<String> = path.iter().map(fold).collect();
        if folded.first().is_some_and(|name| name == ".git") && folded.len() == 1 {
            return Some(GIT);
        }
        RULES.iter().find_map(|(rule, reason)| {
            let prefixes = (1..rule.len()).map(|length| &rule[..length]);
            prefixes.into_iter().any(|prefix| ends_with(&folded, prefix)).then_some(*reason)
        })
    })
}

/// Where a path is in respect of the workspace's own repository.
enum GitPath {
    Outside,
    /// `.git` itself.
    Root,
    Data,
    Control,
}

fn git_data(names: &[&OsStr]) -> GitPath {
    match names {
        [root, inside @ ..] if root.as_bytes() == b".git" => match inside {
            [] => GitPath::Root,
            // Other object stores to read from, and programs for the files that match a pattern.
            [first, second, ..] if first.as_bytes() == b"objects" && is_alternates(second, inside) => {
                GitPath::Control
            }
            [first, second] if first.as_bytes() == b"info" && second.as_bytes() == b"exclude" => {
                GitPath::Data
            }
            [first] if first.as_bytes() == b"info" => GitPath::Data,
            [first, ..] if GIT_DATA.iter().any(|name| name.as_bytes() == first.as_bytes()) => GitPath::Data,
            _ => GitPath::Control,
        },
        _ => GitPath::Outside,
    }
}

/// `objects/info/alternates` and `http-alternates`; the folder's other files are lists of packs.
fn is_alternates(folder: &OsStr, inside: &[&OsStr]) -> bool {
    let named = inside.get(2).is_some_and(|name| fold(name).ends_with("alternates"));
    fold(folder) == "info" && named
}

fn guarded_name(name: &OsStr, folded: &[String]) -> Option<&'static str> {
    // Without a HEAD git takes no directory for a repository. Lower case is a usual file name, and git writes upper.
    if name.as_bytes() == b"HEAD" {
        return Some(GIT_REPOSITORY);
    }
    let first = folded.first()?;
    if first.starts_with("git~") {
        return Some(GIT);
    }
    let suffix = SUFFIXES.iter().find(|(suffix, _)| first.ends_with(suffix));
    let rule = || {
        RULES
            .iter()
            .find(|(rule, _)| folded.len() >= rule.len() && folded.iter().zip(*rule).all(|(a, b)| a == b))
    };
    suffix.map(|(_, reason)| *reason).or_else(|| rule().map(|(_, reason)| *reason))
}

fn ends_with(folded: &[String], rule: &[&str]) -> bool {
    folded.len() >= rule.len() && folded[folded.len() - rule.len()..].iter().zip(rule).all(|(a, b)| a == b)
}

/// The name as file systems compare it that ignore case: ext4 and f2fs with case folding also ignore code points
/// that show nothing, others ignore dots and spaces at the end.
fn fold(name: &OsStr) -> String {
    let visible = name.to_string_lossy();
    let visible = visible.chars().filter(|&symbol| !is_ignorable(symbol));
    let folded: String = visible.flat_map(char::to_uppercase).flat_map(char::to_lowercase).collect();
    folded.trim_end_matches(['.', ' ']).to_owned()
}

/// Unicode's default ignorable code points.
fn is_ignorable(symbol: char) -> bool {
    matches!(u32::from(symbol),
        0xad | 0x34f | 0x61c | 0x115f..=0x1160 | 0x17b4..=0x17b5 | 0x180b..=0x180f | 0x200b..=0x200f
        | 0x202a..=0x202e | 0x2060..=0x206f | 0x3164 | 0xfe00..=0xfe0f | 0xfeff | 0xffa0 | 0xfff0..=0xfff8
        | 0x1bca0..=0x1bca3 | 0x1d173..=0x1d17a | 0xe0000..=0xe0fff)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_runs_by_itself_is_guarded() {
        for path in [
            ".git/hooks/pre-commit",
            ".git/hooks",
            ".git/config",
            ".git/config.worktree",
            ".git/info/attributes",
            ".git/modules/a/config",
            ".git/worktrees/x/gitdir",
            ".git/commondir",
            ".git/objects/info/alternates",
            ".git/rebase-merge/git-rebase-todo",
            ".git/Hooks/x",
            ".GIT",
            ".GIT/config",
            ".Git/HEAD",
            "git~1/config",
            ".g\u{200c}it/config",
            ".gIt./config",
            "sub/.git",
            "sub/.git/HEAD",
            "sub/.git/objects/aa",
            "fixture/bare.git/config",
            "x/HEAD",
            ".envrc",
            "a/b/.envrc",
            ".direnv/bin/x",
            ".husky/pre-commit",
            ".vscode/tasks.json",
            "pkg/.VSCODE/Settings.json",
            "all.code-workspace",
            ".idea/workspace.xml",
            ".devcontainer/devcontainer.json",
            ".claude/settings.json",
            ".mcp.json",
            ".cursor/mcp.json",
            "agentkernel.toml",
            "sub/agentkernel.toml",
            ".agentkernelignore",
            "lefthook.yml",
            ".exrc",
            ".nvim.lua",
            ".cargo/config.toml",
            "k/.cargo/config",
            ".npmrc",
            ".yarnrc.yml",
            ".pnpmfile.cjs",
            ".pre-commit-config.yaml",
            ".bazelrc",
            "rust-toolchain.toml",
            ".\u{212a}iro/hooks",
            ".envrc.",
            "tools/bazel",
        ] {
            assert!(guarded(Path::new(path)).is_some(), "{path:?} is not guarded");
        }
    }

    #[test]
    fn ordinary_paths_are_free() {
        for path in [
            ".git",
            ".git/HEAD",
            ".git/index",
            ".git/objects/ab/cdef",
            ".git/objects/pack/p.pack",
            ".git/refs/heads/config",
            ".git/refs/heads/.envrc",
            ".git/logs/HEAD",
            ".git/packed-refs",
            ".git/info",
            ".git/info/exclude",
            ".git/objects/info/packs",
            ".gitignore",
            ".gitmodules",
            ".gitattributes",
            ".github/workflows/ci.yml",
            "src/main.rs",
            "Makefile",
            "package.json",
            "conftest.py",
            ".vscode",
            ".vscode/extensions.json",
            ".cargo",
            "src/head",
            "git",
            "hooks/pre-commit",
            "config",
            "digit",
            "tools/bazelisk",
            ".yarn/cache/x.zip",
        ] {
            assert_eq!(guarded(Path::new(path)), None, "{path:?}");
        }
    }

    #[test]
    fn a_link_in_place_of_a_guarded_directory_is_guarded() {
        for path in [".git", ".vscode", "a/.vscode", ".cargo", "tools", ".yarn", ".Git"] {
            assert!(guarded_leaf(Path::new(path)).is_some(), "{path:?}");
        }
        for path in ["a", "src/tools.rs", ".github", "vscode"] {
            assert_eq!(guarded_leaf(Path::new(path)), None, "{path:?}");
        }
    }

    proptest! {
        #[test]
        fn everything_beneath_a_guarded_path_is_guarded(
            rule in 0..RULES.len(), above in prop::collection::vec("[a-c]{1,3}", 0..3),
            beneath in prop::collection::vec(any::<String>().prop_map(|name| name.replace(['/', '\0'], "x")), 0..4),
            upper in any::<bool>(),
        ) {
            let names = above.into_iter().chain(RULES[rule].0.iter().map(|name| {
                if upper { name.to_uppercase() } else { (*name).to_owned() }
            }));
            let path: std::path::PathBuf = names.collect();
            prop_assert!(guarded(&path).is_some());
            prop_assert!(guarded(&path.join(beneath.join("/").trim_start_matches('/'))).is_some());
        }

        #[test]
        fn any_guarded_path_guards_what_is_beneath(path in "([.]git|hooks|objects|info|HEAD|a|alternates|exclude|x[.]git)(/([.]git|hooks|objects|info|HEAD|a|alternates|exclude)){0,4}") {
            let path = Path::new(&path);
            let above = path.ancestors().skip(1).any(|above| guarded(above).is_some());
            prop_assert!(!above || guarded(path).is_some());
        }
    }
}
