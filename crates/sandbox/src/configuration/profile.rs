//! Profiles: what a sandbox may do where no flag and no key says otherwise.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::nearest::{shown, suggestion};
use crate::project::WorkspaceMode;

/// A named set of permissions. It is stored with the sandbox and holds over stop and start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// For commands one trusts: they write to the project and may read the home directory.
    Permissive,
    /// The default: changes to the project are kept apart.
    #[default]
    Moderate,
    /// For commands one does not trust at all: they see neither the project nor a network.
    Restrictive,
}

/// What a sandbox may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    /// Nothing.
    None,
    /// The internet, without private networks.
    Public,
}

/// What a [`Profile`] stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfileSettings {
    /// What the sandbox may reach.
    pub network: NetworkMode,
    /// What becomes of the project.
    pub workspace: WorkspaceMode,
    /// Whether the guest sees the home directory, read-only and without credentials.
    pub home_readonly: bool,
    /// Names of the caller's variables that commands are given.
    pub host_environment: &'static [&'static str],
    /// Whether the root file system is read-only, with `/tmp` in memory.
    pub read_only_root: bool,
    /// Memory if nothing else is asked for, MiB; without it the general default holds.
    pub memory_mib: Option<u64>,
}

/// A word that names no profile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{}` is no profile: there are permissive, moderate and restrictive{}",
    shown(.0),
    suggestion(.0, Profile::ALL.map(Profile::name))
)]
pub struct UnknownProfile(pub String);

impl Profile {
    /// All of them, from the most to the least permitted.
    pub const ALL: [Self; 3] = [Self::Permissive, Self::Moderate, Self::Restrictive];

    /// Its name, as flags and files spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Permissive => "permissive",
            Self::Moderate => "moderate",
            Self::Restrictive => "restrictive",
        }
    }

    /// What it stands for. Flags and keys that say something else beat it.
    pub const fn settings(self) -> ProfileSettings {
        match self {
            Self::Permissive => ProfileSettings {
                network: NetworkMode::Public,
                workspace: WorkspaceMode::Rw,
                home_readonly: true,
                host_environment: &["PATH", "HOME", "USER", "LANG", "LC_ALL", "TERM"],
                read_only_root: false,
                memory_mib: None,
            },
            Self::Moderate => ProfileSettings {
                network: NetworkMode::Public,
                workspace: WorkspaceMode::Cow,
                home_readonly: false,
                host_environment: &[],
                read_only_root: false,
                memory_mib: None,
            },
            Self::Restrictive => ProfileSettings {
                network: NetworkMode::None,
                workspace: WorkspaceMode::None,
                home_readonly: false,
                host_environment: &[],
                read_only_root: true,
                memory_mib: Some(256),
            },
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Profile {
    type Err = UnknownProfile;

    fn from_str(name: &str) -> Result<Self, UnknownProfile> {
        let found = Self::ALL.into_iter().find(|profile| profile.name() == name);
        found.ok_or_else(|| UnknownProfile(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_everywhere() {
        for profile in Profile::ALL {
            assert_eq!(profile.name().parse(), Ok(profile));
            assert_eq!(serde_json::to_string(&profile).unwrap(), format!("\"{profile}\""));
        }
        let error = "restrictve\u{7}".parse::<Profile>().unwrap_err();
        assert_eq!(
            error.to_string(),
            r"`restrictve\u{7}` is no profile: there are permissive, moderate and restrictive (did you mean `restrictive`?)"
        );
    }
}
