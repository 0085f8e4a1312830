//! What a project says about its sandboxes, and what is taken where it says nothing.
//!
//! ```text
//! agentkernel.toml ─► Configuration ─┐
//!         profile ─► ProfileSettings ─┼─► the caller: flags beat keys, keys beat the profile ─► launch
//!   command, files ─► language ───────┘
//!                     CommandPolicy ─────► asked before every command
//! ```
//! The file may come with a project nobody has read: it is bounded, not followed to other places, and strict, so that
//! nothing in it is silently without effect. It may still ask for much (a profile, an image, a writable workspace); what
//! of that is granted is the caller's decision.

mod document;
pub mod environment;
mod key;
pub mod language;
mod nearest;
mod policy;
mod profile;
mod read;
mod template;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt::Display;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use agentkernel_network::Rule as NetworkRule;
use toml::Spanned;
use toml::de::DeValue;

use self::document::{Mistake, Table, wrong_type};
pub use self::key::{ApiKey, ApiKeySource, BadApiKey};
use self::language::{Language, UnknownLanguage};
use self::nearest::{nearest, shown, shown_up_to};
pub use self::policy::{CommandPolicy, Refusal};
pub use self::profile::{NetworkMode, Profile, ProfileSettings, UnknownProfile};
pub use self::read::ReadError;
pub use self::template::{InitChoice, template};
use crate::network::{PORTS_LIMIT, PublishedPort, RULES_LIMIT};
use crate::project::WorkspaceMode;
use crate::spec::check_name;

/// Largest configuration file, bytes.
const LARGEST_FILE: u64 = 1 << 20;
/// Permissions of a file that is put into the guest, if nothing is said.
const DEFAULT_MODE: u32 = 0o644;
/// Most memory and largest disk that can be asked for, MiB: 16 TiB.
const MOST_MIB: u64 = 16 << 20;

/// What an `agentkernel.toml` says. What it does not say is `None`, empty or false.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    /// `[sandbox] name`, checked.
    pub name: Option<String>,
    /// `[sandbox] image` or `base_image`, or what `runtime` stands for.
    pub image: Option<String>,
    /// `[sandbox] init_script`: text for the guest's shell.
    pub init_script: Option<String>,
    /// `[sandbox] workspace`; `none` as well if `[security] mount_cwd` is false.
    pub workspace: Option<WorkspaceMode>,
    /// `[security] mount_cwd = true`: the project is wanted even if the profile leaves it out. See
    /// [`Configuration::workspace_mode`].
    pub mount_cwd: bool,
    /// `[resources] vcpus`: virtual processors, 1 to 64.
    pub vcpus: Option<u32>,
    /// `[resources] memory_mb`, MiB.
    pub memory_mib: Option<u64>,
    /// `[resources] disk_mb`: the writable layer, MiB.
    pub disk_mib: Option<u64>,
    /// `[security] profile`.
    pub profile: Option<Profile>,
    /// `[security] require_hardware`: refuse to emulate.
    pub require_hardware: bool,
    /// `[security] network` or `[network] mode`; `none` as well if `[security.domains] allowlist_only` is true.
    pub network: Option<NetworkMode>,
    /// `[network] allow`, then `[security.domains] allow`.
    pub allow: Vec<NetworkRule>,
    /// `[network] deny`, then `[security.domains] block`.
    pub deny: Vec<NetworkRule>,
    /// `[network] ports`.
    pub ports: Vec<PublishedPort>,
    /// `[security.commands]`.
    pub commands: CommandPolicy,
    /// `[[files]]`, in the order of the file; no two have the same destination.
    pub files: Vec<InjectedFile>,
    /// `[env]`, in the order of the file.
    pub environment: Vec<(String, String)>,
    /// `[build]`.
    pub build: BuildDefaults,
    /// `[api]`: the key of `agentkernel serve`. Sandboxes and their commands have nothing to do with it.
    pub api_key: Option<ApiKeySource>,
}

/// What `agentkernel build` of this directory takes where no flag says otherwise. The paths are relative to the
/// configuration's directory, plain names only; as with [`InjectedFile::source`] links on their way may lead out of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BuildDefaults {
    /// The Dockerfile.
    pub dockerfile: Option<PathBuf>,
    /// The build context; empty for the directory itself.
    pub context: Option<PathBuf>,
    /// The stage.
    pub target: Option<String>,
    /// Values of ARGs, in the order of the file.
    pub arguments: Vec<(String, String)>,
    /// Take nothing from earlier builds.
    pub no_cache: bool,
}

/// A file of the project that every new sandbox is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InjectedFile {
    /// Relative to the configuration's directory, plain names only. It may still lead through symbolic links: it must be
    /// opened beneath that directory.
    pub source: PathBuf,
    /// Absolute path in the guest, plain names only.
    pub destination: PathBuf,
    /// Permissions, at most `0o777`.
    pub mode: u32,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    /// The file cannot be read, or is no small text file.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ReadError,
    },
    /// Something in it is wrong.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1, in characters.
        column: usize,
        /// What is wrong.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
}

impl ConfigurationError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Read { .. } => None,
            Self::Content { hint, .. } => hint.as_deref(),
        }
    }
}

impl Configuration {
    /// Reads a configuration file: a regular file of at most 1 MiB, not a symbolic link.
    ///
    /// # Errors
    /// If it is no such file, or its content is refused by [`Configuration::parse`].
    pub fn load(path: &Path) -> Result<Self, ConfigurationError> {
        let text = read::read_text(path, LARGEST_FILE)
            .map_err(|source| ConfigurationError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Reads the text of a configuration file; `path` is only for messages.
    ///
    /// # Errors
    /// At the first mistake found: an unknown key, a value of the wrong type or out of range, keys that contradict each
    /// other. The error has the place, and where one is near, the word that was probably meant.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigurationError> {
        let read = if text.len() as u64 > LARGEST_FILE {
            Err(Mistake::new(0, format!("the file is larger than {} KiB", LARGEST_FILE >> 10)))
        } else {
            document::parse(text).and_then(|document| read(Table::root(&document)))
        };
        read.map_err(|Mistake { at, message, hint }| {
            let before = text.get(..at).unwrap_or(text);
            let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
            ConfigurationError::Content {
                path: path.to_owned(),
                line: 1 + before.bytes().filter(|byte| *byte == b'\n').count(),
                column: 1 + before.get(line_start..).map_or(0, |line| line.chars().count()),
                message,
                hint,
            }
        })
    }

    /// What becomes of the project under a profile, which may be another than the file's own: a flag beats that.
    pub fn workspace_mode(&self, profile: Profile) -> WorkspaceMode {
        let general = match profile.settings().workspace {
            WorkspaceMode::None if self.mount_cwd => WorkspaceMode::Cow,
            mode => mode,
        };
        self.workspace.unwrap_or(general)
    }
}

fn read(root: Table<'_>) -> Result<Configuration, Mistake> {
    let sandbox = root.table("sandbox", "sandbox")?;
    let resources = root.table("resources", "resources")?;
    let security = root.table("security", "security")?;
    let commands = security.table("commands", "security.commands")?;
    let domains = security.table("domains", "security.domains")?;
    let network = root.table("network", "network")?;
    let workspace = workspace(sandbox, security)?;
    Ok(Configuration {
        name: name(sandbox)?,
        image: image(sandbox)?,
        init_script: init_script(sandbox)?,
        workspace,
        mount_cwd: security.boolean("mount_cwd")?.is_some_and(Spanned::into_inner),
        vcpus: resources.number("vcpus", 1..=64)?.and_then(|number| u32::try_from(number).ok()),
        memory_mib: resources.number("memory_mb", 128..=MOST_MIB)?,
        disk_mib: resources.number("disk_mb", 64..=MOST_MIB)?,
        profile: security.choice("profile", &Profile::ALL.map(|profile| (profile.name(), profile)))?,
        require_hardware: security.boolean("require_hardware")?.is_some_and(Spanned::into_inner),
        network: network_mode(security, domains, network)?,
        allow: [rules(network, "allow")?, rules(domains, "allow")?].concat(),
        deny: [rules(network, "deny")?, rules(domains, "block")?].concat(),
        ports: parsed(network, "ports", PORTS_LIMIT, PORT_HINT)?,
        commands: CommandPolicy { allow: patterns(commands, "allow")?, block: patterns(commands, "block")? },
        files: files(root.tables("files", "files")?)?,
        environment: environment(root.table("env", "env")?)?,
        build: build(root.table("build", "build")?)?,
        api_key: key::api_key(root.table("api", "api")?)?,
    })
}

fn build(table: Table<'_>) -> Result<BuildDefaults, Mistake> {
    let path = |key: &str, may_be_all: bool| {
        let Some(found) = table.string(key)? else { return Ok(None) };
        let written = *found.get_ref();
        if may_be_all && matches!(written, "." | "./") {
            return Ok(Some(PathBuf::new()));
        }
        let path = plain_path(written.strip_suffix('/').filter(|_| may_be_all).unwrap_or(written), false);
        path.map(Some).ok_or_else(|| {
            let message = format!("`build.{key}` cannot be `{}`", shown(written));
            Mistake::new(found.span().start, message)
                .hint("name a place beneath the configuration's own directory, relative to it, without `..`")
        })
    };
    let arguments = table.table("args", "build.args")?.entries()?.into_iter().map(|(name, value)| {
        let text = *name.get_ref();
        if text.is_empty() || text.contains(['=', '\0']) {
            let message = format!("`{}` cannot be the name of a build argument", shown(text));
            return Err(Mistake::new(name.span().start, message));
        }
        Ok((text.to_owned(), (*value.get_ref()).to_owned()))
    });
    Ok(BuildDefaults {
        dockerfile: path("dockerfile", false)?,
        context: path("context", true)?,
        target: table.string("target")?.map(|target| (*target.get_ref()).to_owned()),
        arguments: arguments.collect::<Result<_, _>>()?,
        no_cache: table.boolean("no_cache")?.is_some_and(Spanned::into_inner),
    })
}

fn name(sandbox: Table<'_>) -> Result<Option<String>, Mistake> {
    let Some(name) = sandbox.string("name")? else { return Ok(None) };
    match check_name(name.get_ref()) {
        Ok(()) => Ok(Some((*name.get_ref()).to_owned())),
        Err(problem) => {
            let message = format!("`{}` is not a sandbox name", shown(name.get_ref()));
            let mistake = Mistake::new(name.span().start, message);
            Err(Mistake { hint: problem.hint, ..mistake })
        }
    }
}

fn image(sandbox: Table<'_>) -> Result<Option<String>, Mistake> {
    let given = [sandbox.string("image")?, sandbox.string("base_image")?];
    let runtime = sandbox.string("runtime")?;
    let image = match &given {
        [Some(_), Some(_)] => {
            let message = "`sandbox.base_image` is another name for `sandbox.image`: give one of them";
            return Err(Mistake::new(sandbox.place("base_image"), message));
        }
        [image, alias] => image.as_ref().or(alias.as_ref()),
    };
    match (image, runtime) {
        (Some(_), Some(_)) => {
            let message = "`sandbox.runtime` and `sandbox.image` both choose the image: give one of them";
            Err(Mistake::new(sandbox.place("runtime"), message))
        }
        (Some(image), None) if image.get_ref().is_empty() || image.get_ref().contains(char::is_control) => {
            let message = format!("`{}` is no name of an image", shown(image.get_ref()));
            Err(Mistake::new(image.span().start, message))
        }
        (Some(image), None) => Ok(Some((*image.get_ref()).to_owned())),
        (None, Some(runtime)) => match Language::named(runtime.get_ref()) {
            Ok(language) => Ok(Some(language.image.to_owned())),
            Err(UnknownLanguage(word)) => {
                let message = format!("`{}` is no runtime", shown(&word));
                let hint = match nearest(&word, Language::names()) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => {
                        let names: Vec<&str> = Language::all().map(|language| language.name).collect();
                        format!("there are {}; `image` takes any other", names.join(", "))
                    }
                };
                Err(Mistake::new(runtime.span().start, message).hint(hint))
            }
        },
        (None, None) => Ok(None),
    }
}

fn init_script(sandbox: Table<'_>) -> Result<Option<String>, Mistake> {
    let Some(script) = sandbox.string("init_script")? else { return Ok(None) };
    if script.get_ref().contains('\0') {
        return Err(Mistake::new(script.span().start, "`sandbox.init_script` cannot have a NUL byte in it"));
    }
    Ok(Some((*script.get_ref()).to_owned()))
}

fn workspace(sandbox: Table<'_>, security: Table<'_>) -> Result<Option<WorkspaceMode>, Mistake> {
    let modes = [
        ("cow", WorkspaceMode::Cow),
        ("rw", WorkspaceMode::Rw),
        ("ro", WorkspaceMode::Ro),
        ("none", WorkspaceMode::None),
    ];
    let mode = sandbox.choice("workspace", &modes)?;
    let mount = security.boolean("mount_cwd")?.map(Spanned::into_inner);
    match (mode, mount) {
        (Some(mode), Some(mount)) if mount == (mode == WorkspaceMode::None) => {
            let message = format!("`security.mount_cwd = {mount}` contradicts `sandbox.workspace`");
            Err(Mistake::new(security.place("mount_cwd"), message).hint("give one of them"))
        }
        (None, Some(false)) => Ok(Some(WorkspaceMode::None)),
        (mode, _) => Ok(mode),
    }
}

/// What holds where no rule says anything. Three keys say so, and none may say otherwise than another.
fn network_mode(
    security: Table<'_>,
    domains: Table<'_>,
    network: Table<'_>,
) -> Result<Option<NetworkMode>, Mistake> {
    const MODES: [(&str, NetworkMode); 2] = [("none", NetworkMode::None), ("public", NetworkMode::Public)];
    // 0.18 had true and false there.
    let wanted = match security.value("network").map(Spanned::get_ref) {
        Some(DeValue::String(_)) => security.choice("network", &MODES)?,
        _ => security.boolean("network")?.map(|wanted| match wanted.into_inner() {
            true => NetworkMode::Public,
            false => NetworkMode::None,
        }),
    };
    let mode = network.choice("mode", &MODES)?;
    if let (Some(mode), Some(wanted)) = (mode, wanted)
        && mode != wanted
    {
        let message = "`security.network` contradicts `network.mode`";
        return Err(Mistake::new(security.place("network"), message).hint("give one of them"));
    }
    let mode = mode.or(wanted);
    if !domains.boolean("allowlist_only")?.is_some_and(Spanned::into_inner) {
        return Ok(mode);
    }
    if mode == Some(NetworkMode::Public) {
        let other = if network.value("mode").is_some() { "network.mode" } else { "security.network" };
        let message = format!("`security.domains.allowlist_only` contradicts `{other}`");
        let hint = "an allow-list is mode \"none\" with what is allowed: give one of them";
        return Err(Mistake::new(domains.place("allowlist_only"), message).hint(hint));
    }
    Ok(Some(NetworkMode::None))
}

/// Longest text of why a rule is none, characters: it repeats some of the rule.
const LONGEST_REASON: usize = 250;
const RULE_HINT: &str = "a rule is NAME, *.NAME, an address or a range, each with :PORT and /udp if wanted: \"*.example.com:443\"";
const PORT_HINT: &str = "a port is [BIND:]HOST:GUEST, with /udp if wanted: \"8080:80\"";

fn rules(table: Table<'_>, key: &str) -> Result<Vec<NetworkRule>, Mistake> {
    parsed(table, key, RULES_LIMIT, RULE_HINT)
}

/// A list of texts that stand for something.
fn parsed<T: FromStr<Err: Display>>(
    table: Table<'_>,
    key: &str,
    limit: usize,
    hint: &str,
) -> Result<Vec<T>, Mistake> {
    let texts = table.strings(key)?;
    if let Some(beyond) = texts.get(limit) {
        let message = format!("`{}` has more than {limit} elements", table.name(key));
        return Err(Mistake::new(beyond.span().start, message));
    }
    let values = texts.into_iter().map(|text| {
        text.get_ref().parse().map_err(|error: T::Err| {
            let error = shown_up_to(&error.to_string(), LONGEST_REASON);
            Mistake::new(text.span().start, format!("`{}`: {error}", table.name(key))).hint(hint)
        })
    });
    values.collect()
}

fn patterns(commands: Table<'_>, key: &str) -> Result<Vec<String>, Mistake> {
    let patterns = commands.strings(key)?;
    if let Some(beyond) = patterns.get(CommandPolicy::MOST_PATTERNS) {
        let message =
            format!("`{}` has more than {} patterns", commands.name(key), CommandPolicy::MOST_PATTERNS);
        return Err(Mistake::new(beyond.span().start, message));
    }
    let patterns = patterns.into_iter().map(|pattern| {
        let text = *pattern.get_ref();
        if text.trim().is_empty() {
            return Err(Mistake::new(pattern.span().start, "a pattern without words matches no command"));
        }
        if text.len() > CommandPolicy::LONGEST_PATTERN {
            let message = format!("a pattern has at most {} bytes", CommandPolicy::LONGEST_PATTERN);
            return Err(Mistake::new(pattern.span().start, message));
        }
        Ok(text.to_owned())
    });
    patterns.collect()
}

fn files(tables: Vec<Table<'_>>) -> Result<Vec<InjectedFile>, Mistake> {
    let mut destinations = HashSet::new();
    let files = tables.into_iter().map(|table| {
        let (source, dest) = (table.required("source")?, table.required("dest")?);
        let written = shown(source.get_ref());
        let source = plain_path(source.get_ref(), false).ok_or_else(|| {
            Mistake::new(source.span().start, format!("`files.source` cannot be `{written}`"))
                .hint("name a file beneath the configuration's own directory, relative to it, without `..`")
        })?;
        let written = shown(dest.get_ref());
        let destination = plain_path(dest.get_ref(), true).ok_or_else(|| {
            Mistake::new(dest.span().start, format!("`files.dest` cannot be `{written}`"))
                .hint("give the file's whole path in the guest, from `/` on, without `..`")
        })?;
        if !destinations.insert(destination.clone()) {
            let message = format!("two files cannot both become `{written}`");
            return Err(Mistake::new(dest.span().start, message));
        }
        Ok(InjectedFile { source, destination, mode: file_mode(table)? })
    });
    files.collect()
}

/// A path of plain names to a file, absolute or relative as asked for.
fn plain_path(text: &str, absolute: bool) -> Option<PathBuf> {
    let path = Path::new(text);
    let plain = path
        .components()
        .all(|component| matches!(component, Component::Normal(_) | Component::CurDir | Component::RootDir));
    let file = path.file_name().is_some() && !text.ends_with('/') && !text.ends_with("/.");
    let good = plain && file && path.is_absolute() == absolute && !text.contains('\0');
    good.then(|| path.components().filter(|component| *component != Component::CurDir).collect())
}

fn file_mode(table: Table<'_>) -> Result<u32, Mistake> {
    let Some(value) = table.value("mode") else { return Ok(DEFAULT_MODE) };
    let digits = match value.get_ref() {
        DeValue::String(text) => Some(text.strip_prefix("0o").unwrap_or(text)),
        // A decimal 644 is another number than the one that was probably meant.
        DeValue::Integer(integer) => (integer.radix() == 8).then_some(integer.as_str()),
        _ => return Err(wrong_type("files.mode", "an octal number, such as \"0644\"", value)),
    };
    let octal = digits.filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
    let mode = octal.and_then(|digits| u32::from_str_radix(digits, 8).ok());
    mode.filter(|mode| *mode <= 0o777).ok_or_else(|| {
        Mistake::new(value.span().start, "`files.mode` must be an octal number from \"0\" to \"0777\"")
            .hint("write \"0644\", or 0o644 without quotes")
    })
}

fn environment(table: Table<'_>) -> Result<Vec<(String, String)>, Mistake> {
    let variables = table.entries()?.into_iter().map(|(name, value)| {
        let text = *name.get_ref();
        if text.is_empty() || text.contains(['=', '\0']) {
            let message = format!("`{}` cannot be the name of a variable", shown(text));
            return Err(Mistake::new(name.span().start, message));
        }
        if value.get_ref().contains('\0') {
            return Err(Mistake::new(value.span().start, "a variable cannot hold a NUL byte"));
        }
        Ok((text.to_owned(), (*value.get_ref()).to_owned()))
    });
    variables.collect()
}
