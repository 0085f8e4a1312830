//! The `agentkernel.toml` that `init` writes.

use std::fmt::Write as _;

use super::language::{BASE, Language};
use crate::spec::check_name;

/// What `init` found out about a project.
#[derive(Clone, Copy, Debug)]
pub struct InitChoice<'a> {
    /// Suggested as the sandbox's name, unless it cannot be one: the directory's name, say.
    pub name: Option<&'a str>,
    /// What the project is made with.
    pub language: Option<&'static Language>,
    /// Whether this machine has the language's programs, so that the `host` image does.
    pub host_suffices: bool,
}

/// The text of a commented configuration. It chooses a runtime if the host lacks the project's; everything else is there
/// as a comment with its default or an example, a `#` away from being set.
pub fn template(choice: &InitChoice<'_>) -> String {
    let name = choice.name.filter(|name| check_name(name).is_ok()).unwrap_or("my-project");
    let language = choice.language.unwrap_or(&BASE);
    let Language { name: runtime, title, image, .. } = language;
    let chosen = choice.language.filter(|_| !choice.host_suffices);
    let why = match (choice.language, chosen) {
        (Some(_), Some(_)) => {
            format!("A {title} project, and this machine has no {title}: the image {image} does.")
        }
        (Some(_), None) => format!(
            "A {title} project. This machine has {title}, so that no runtime or image needs to be chosen."
        ),
        (None, _) => {
            "Where the image comes from if this machine's own programs are not to be used.".to_owned()
        }
    };
    let mark = if chosen.is_some() { "" } else { "#" };
    let names: Vec<&str> = Language::all().map(|language| language.name).collect();
    let (some, others) = names.split_at(names.len() / 2);
    let mut text = String::from(HEAD);
    let _ = write!(
        text,
        "\
[sandbox]
# {why}
# Runtimes: {some},
# {others}. Another image, instead of one: image = \"debian:12\"
{mark}runtime = \"{runtime}\"

# A name for sandboxes; without it each gets its own.
#name = \"{name}\"

",
        some = some.join(", "),
        others = others.join(", "),
    );
    text.push_str(REST);
    text
}

const HEAD: &str = "\
# How agentkernel makes sandboxes for this project. The directory of this file is the workspace.
# What is commented out shows its default; `name` and `runtime` have none and show an example. Flags beat
# what is set here.

";

const REST: &str = r#"# The project in the guest: a copy whose changes wait for `agentkernel apply` (cow), the real thing (rw),
# read-only (ro), or none.
#workspace = "cow"

# Shell commands for a new sandbox, before the first command:   init_script = "make deps"

[resources]
# Virtual processors; without it the host's, at most 4.
#vcpus = 4
# MiB. The host backs only what is used.
#memory_mb = 2048
#disk_mb = 10240

[security]
# permissive (writes to the project, reads the home directory), moderate, or
# restrictive (no project, no network, nothing but /tmp can be written).
#profile = "moderate"
# Refuse to run where processors have to be emulated.
#require_hardware = false

# A guard rail against accidents: commands by name and first arguments, `*` for any characters.
# A shell gets round it. If `allow` is not empty, nothing else may run.
[security.commands]
#allow = []
#block = []

[network]
# What sandboxes reach: what is public, but neither this machine nor its networks; or none. With none,
# what `allow` names is reached all the same, and nothing else.
#mode = "public"
# Names, *.NAME, addresses and ranges, each with :PORT and /udp if wanted; `deny` beats `allow`:
#   allow = ["*.example.com:443"]
#   deny = ["tracker.example"]
# Ports of this machine that lead into the sandbox, HOST:GUEST:   ports = ["8080:80"]

# Variables of every command:   NAME = "value"
[env]

# What `agentkernel build` takes here where no flag says otherwise:
#   [build]
#   dockerfile = "docker/Dockerfile"
#   context = "."
#   target = "test"
#   args = { VERSION = "3" }

# Files put into new sandboxes, from beneath this directory:
#   [[files]]
#   source = "config/settings.json"
#   dest = "/etc/app/settings.json"
#   mode = "0644"

# The key that clients of `agentkernel serve`, started here, must show; or the variable that has it:
#   [api]
#   api_key_env = "AGENTKERNEL_API_KEY"
"#;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::configuration::{Configuration, NetworkMode, Profile};
    use crate::project::WorkspaceMode;

    fn parsed(text: &str) -> Configuration {
        Configuration::parse(text, Path::new("agentkernel.toml"))
            .unwrap_or_else(|error| panic!("{error}\n{text}"))
    }

    #[test]
    fn every_template_is_a_configuration_and_shows_the_defaults() {
        let none = [None].into_iter();
        for language in none.chain(Language::all().map(Some)) {
            for host_suffices in [true, false] {
                for name in [None, Some("shop"), Some("\"]\n[x"), Some("é")] {
                    let text = template(&InitChoice { name, language, host_suffices });
                    assert!(text.lines().all(|line| line.chars().count() <= 110), "{text}");
                    let image = language.filter(|_| !host_suffices).map(|language| language.image.to_owned());
                    assert_eq!(parsed(&text), Configuration { image, ..Configuration::default() });
                    // What is a `#` away from being set.
                    let set = text.lines().map(|line| match line.strip_prefix('#') {
                        Some(rest) if rest.starts_with(|first: char| first.is_ascii_alphabetic()) => rest,
                        _ => line,
                    });
                    let set = parsed(&set.collect::<Vec<_>>().join("\n"));
                    let image = language.unwrap_or(&BASE).image;
                    let expected = Configuration {
                        name: Some(if name == Some("shop") { "shop" } else { "my-project" }.to_owned()),
                        image: Some(image.to_owned()),
                        workspace: Some(WorkspaceMode::Cow),
                        vcpus: Some(4),
                        memory_mib: Some(2048),
                        disk_mib: Some(10240),
                        profile: Some(Profile::default()),
                        network: Some(NetworkMode::Public),
                        ..Configuration::default()
                    };
                    assert_eq!(set, expected);
                }
            }
        }
    }
}
