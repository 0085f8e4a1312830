//! The built-in table of languages: which image fits a command or a project when nobody says.

use std::ffi::OsString;
use std::io;
use std::path::Path;

use super::nearest::{shown, suggestion};
use super::read::read_text;

/// A language, or another thing projects are made with.
#[derive(Debug, PartialEq, Eq)]
pub struct Language {
    /// Its name, as `runtime` spells it.
    pub name: &'static str,
    /// Its name for people.
    pub title: &'static str,
    /// The image that has its programs.
    pub image: &'static str,
    /// Other names `runtime` may have.
    aliases: &'static [&'static str],
    /// Programs of the image. What it has not (`mvn`, `poetry`) is not here: choosing it for them would not run them.
    pub commands: &'static [&'static str],
    /// Files at a project's root; `*.x` is any name that ends so.
    files: &'static [&'static str],
}

/// A plain system with a shell: no command and no file means it, only `runtime` does.
pub static BASE: Language = Language {
    name: "base",
    title: "shell",
    image: "alpine:3.20",
    aliases: &["shell", "sh", "alpine"],
    commands: &[],
    files: &[],
};

/// Of several that fit, the first is chosen. C is last, because every kind of project may have a makefile.
static TABLE: [Language; 12] = [
    Language {
        name: "node",
        title: "Node.js",
        image: "node:22-alpine",
        aliases: &["nodejs", "javascript", "typescript"],
        commands: &["node", "nodejs", "npm", "npx", "yarn", "corepack"],
        files: &["package.json"],
    },
    Language {
        name: "rust",
        title: "Rust",
        image: "rust:1.85-alpine",
        aliases: &[],
        commands: &["cargo", "rustc", "rustdoc", "rustup"],
        files: &["Cargo.toml"],
    },
    Language {
        name: "go",
        title: "Go",
        image: "golang:1.23-alpine",
        aliases: &["golang"],
        commands: &["go", "gofmt"],
        files: &["go.mod", "go.work"],
    },
    Language {
        name: "python",
        title: "Python",
        image: "python:3.12-alpine",
        aliases: &["py"],
        commands: &["python", "pip", "pydoc"],
        files: &["pyproject.toml", "requirements.txt", "setup.py", "setup.cfg", "Pipfile"],
    },
    Language {
        name: "ruby",
        title: "Ruby",
        image: "ruby:3.3-alpine",
        aliases: &[],
        commands: &["ruby", "bundle", "bundler", "gem", "irb", "rake"],
        files: &["Gemfile", "Rakefile", "*.gemspec"],
    },
    Language {
        name: "java",
        title: "Java",
        image: "eclipse-temurin:21-alpine",
        aliases: &["jvm"],
        commands: &["java", "javac", "jar", "jshell", "mvnw", "gradlew"],
        files: &["pom.xml", "build.gradle", "build.gradle.kts"],
    },
    Language {
        name: "dotnet",
        title: ".NET",
        image: "mcr.microsoft.com/dotnet/sdk:8.0",
        aliases: &["csharp", "fsharp"],
        commands: &["dotnet"],
        files: &["*.csproj", "*.fsproj", "*.vbproj", "*.sln", "global.json"],
    },
    Language {
        name: "php",
        title: "PHP",
        image: "php:8.3-alpine",
        aliases: &[],
        commands: &["php"],
        files: &["composer.json"],
    },
    Language {
        name: "elixir",
        title: "Elixir",
        image: "elixir:1.16-alpine",
        aliases: &["erlang"],
        commands: &["elixir", "elixirc", "mix", "iex", "erl", "erlc"],
        files: &["mix.exs"],
    },
    Language {
        name: "lua",
        title: "Lua",
        image: "nickblah/lua:5.4-alpine",
        aliases: &[],
        commands: &["lua", "luac"],
        files: &["*.rockspec", ".luacheckrc"],
    },
    Language {
        name: "terraform",
        title: "Terraform",
        image: "hashicorp/terraform:1.10",
        aliases: &[],
        commands: &["terraform"],
        files: &["*.tf"],
    },
    Language {
        name: "c",
        title: "C or C++",
        image: "gcc:14-bookworm",
        aliases: &["cpp", "c++", "gcc"],
        commands: &["gcc", "g++", "cc", "c++", "gfortran"],
        files: &["CMakeLists.txt", "meson.build", "configure.ac", "configure", "Makefile", "makefile"],
    },
];

/// A word that names no language.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is no runtime{}", shown(.0), suggestion(.0, Language::names()))]
pub struct UnknownLanguage(pub String);

impl Language {
    /// All of the table, [`BASE`] last.
    pub fn all() -> impl Iterator<Item = &'static Self> {
        TABLE.iter().chain([&BASE])
    }

    /// Every word [`Language::named`] knows.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::all().flat_map(|language| [language.name].into_iter().chain(language.aliases.iter().copied()))
    }

    /// The language of a name or of another name for it.
    ///
    /// # Errors
    /// If there is none.
    pub fn named(name: &str) -> Result<&'static Self, UnknownLanguage> {
        Self::all()
            .find(|language| language.name == name || language.aliases.contains(&name))
            .ok_or_else(|| UnknownLanguage(name.to_owned()))
    }

    /// Whether the image has the command: compared are base names, without a version as in `python3.12`.
    fn has(&self, command: &str) -> bool {
        let name = command.rsplit('/').next().unwrap_or(command);
        let versionless = name.trim_end_matches(|end: char| end.is_ascii_digit() || end == '.');
        let versionless = versionless.strip_suffix('-').unwrap_or(versionless);
        self.commands.contains(&name) || self.commands.contains(&versionless)
    }

    fn has_file(&self, name: &str) -> bool {
        self.files.iter().any(|file| match file.strip_prefix('*') {
            Some(end) => name.len() > end.len() && name.ends_with(end),
            None => *file == name,
        })
    }
}

/// What a project's root says about its language.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Project {
    /// Names of the files there; those that tell nothing may be missing.
    pub files: Vec<String>,
    /// Content of its `Procfile`.
    pub procfile: Option<String>,
}

impl Project {
    /// Most entries of a directory that are looked at.
    const MOST_ENTRIES: usize = 100_000;
    /// Largest `Procfile` that is read, bytes.
    const LARGEST_PROCFILE: u64 = 64 << 10;

    /// Looks at a project's root. Nothing there is followed or executed; a `Procfile` that cannot be read, or is larger
    /// than any real one, is left out.
    ///
    /// # Errors
    /// If the directory cannot be listed.
    pub fn read(root: &Path) -> io::Result<Self> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(root)?.take(Self::MOST_ENTRIES) {
            let Ok(name) = entry?.file_name().into_string() else { continue };
            if TABLE.iter().any(|language| language.has_file(&name)) {
                files.push(name);
            }
        }
        files.sort_unstable();
        let procfile = read_text(&root.join("Procfile"), Self::LARGEST_PROCFILE).ok();
        Ok(Self { files, procfile })
    }
}

/// Chooses the language for a command of a project: the first in the table that has the command; else that has one of
/// the project's files; else that has the command of the `web:` line in its `Procfile`.
pub fn choose(command: &[OsString], project: &Project) -> Option<&'static Language> {
    let with_command = |word: &str| TABLE.iter().find(|language| language.has(word));
    let by_command = || with_command(command.first()?.to_str()?);
    let by_files = || TABLE.iter().find(|language| project.files.iter().any(|name| language.has_file(name)));
    let by_procfile = || with_command(web_command(project.procfile.as_deref()?)?);
    by_command().or_else(by_files).or_else(by_procfile)
}

/// The program a `Procfile` starts as `web`, behind assignments and `env` or `exec`.
fn web_command(procfile: &str) -> Option<&str> {
    let line = procfile.lines().find_map(|line| line.trim_start().strip_prefix("web:"))?;
    line.split_whitespace().find(|word| !word.contains('=') && !matches!(*word, "env" | "exec"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn chosen(command: &str, files: &[&str], procfile: &str) -> Option<&'static str> {
        let command: Vec<OsString> = command.split_whitespace().map(OsString::from).collect();
        let files = files.iter().map(|file| (*file).to_owned()).collect();
        let project = Project { files, procfile: Some(procfile.to_owned()) };
        choose(&command, &project).map(|language| language.name)
    }

    #[test]
    fn command_then_files_then_procfile() {
        for (command, language) in [
            ("python3 x.py", "python"),
            ("/usr/bin/python3.12", "python"),
            ("pip3 install x", "python"),
            ("npx x", "node"),
            ("cargo test", "rust"),
            ("go1.23.4 build", "go"),
            ("g++-14 x.cc", "c"),
            ("c++ x.cc", "c"),
            ("./gradlew build", "java"),
            ("mix test", "elixir"),
            ("lua5.4 x", "lua"),
        ] {
            assert_eq!(chosen(command, &["Cargo.toml"], "web: ruby x"), Some(language), "{command}");
        }
        for (file, language) in [
            ("package.json", "node"),
            ("pyproject.toml", "python"),
            ("App.csproj", "dotnet"),
            ("main.tf", "terraform"),
            ("Makefile", "c"),
        ] {
            assert_eq!(chosen("make test", &["Makefile", file], "web: ruby x"), Some(language), "{file}");
        }
        for (procfile, language) in [
            ("release: x\nweb: PORT=1 bundle exec puma\n", Some("ruby")),
            ("web: env A=1 python3 -m app", Some("python")),
            ("worker: node x", None),
            ("web:", None),
        ] {
            assert_eq!(chosen("make", &["README.md", ".csproj", ".tf"], procfile), language, "{procfile}");
        }
        assert_eq!(chosen("", &[], ""), None);
        assert_eq!(chosen("pythonish", &["xpackage.json"], ""), None);
    }

    #[test]
    fn every_word_means_one_language() {
        let words = |of: fn(&'static Language) -> &'static [&'static str]| {
            let words: Vec<&str> = Language::all().flat_map(of).copied().collect();
            assert_eq!(words.iter().collect::<HashSet<_>>().len(), words.len());
        };
        words(|language| language.commands);
        words(|language| language.files);
        let names: Vec<&str> = Language::names().collect();
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
        for name in names {
            assert!(Language::named(name).is_ok());
        }
        assert_eq!(Language::named("shell"), Ok(&BASE));
        let error = Language::named("pyton").unwrap_err();
        assert_eq!(error.to_string(), "`pyton` is no runtime (did you mean `python`?)");
    }

    #[test]
    fn projects_are_read_without_following() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        for name in ["go.mod", "x.tf", "notes.txt"] {
            std::fs::write(root.path().join(name), "").unwrap();
        }
        std::fs::write(outside.path().join("secret"), "web: ruby").unwrap();
        let procfile = root.path().join("Procfile");
        std::os::unix::fs::symlink(outside.path().join("secret"), &procfile).unwrap();
        let mut project = Project { files: vec!["go.mod".into(), "x.tf".into()], procfile: None };
        assert_eq!(Project::read(root.path()).unwrap(), project);
        std::fs::remove_file(&procfile).unwrap();
        std::fs::write(&procfile, "web: go run .").unwrap();
        project.procfile = Some("web: go run .".into());
        assert_eq!(Project::read(root.path()).unwrap(), project);
    }
}
