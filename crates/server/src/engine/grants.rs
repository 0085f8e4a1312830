//! What clients may ask for. The default lets nothing of the host be written or read that a sandbox of the default profile
//! could not.

use agentkernel_sandbox::configuration::{NetworkMode, Profile};
use agentkernel_sandbox::network::NetworkSpec;
use agentkernel_sandbox::project::{Workspace, WorkspaceMode};
use agentkernel_sandbox::spec::{HostMount, MountSource, Spec};
use agentkernel_sandbox::{Problem, plain};

/// What whoever started the server grants to its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grants {
    /// The most a sandbox may be trusted.
    pub profile: Profile,
    /// Directories of the host may be mounted, the project be written at once, images be read of files, private networks
    /// be reached, ports be opened to others.
    pub host_access: bool,
}

impl Default for Grants {
    fn default() -> Self {
        Self { profile: Profile::Moderate, host_access: false }
    }
}

/// What a sandbox may do, of what is granted or not.
pub(crate) struct Powers<'a> {
    pub profile: Profile,
    pub workspace: Option<&'a Workspace>,
    pub mounts: &'a [HostMount],
    pub network: &'a NetworkSpec,
}

impl Grants {
    /// The profile of whoever asks for none.
    pub(crate) fn default_profile(&self) -> Option<Profile> {
        (self.profile == Profile::Restrictive).then_some(Profile::Restrictive)
    }

    /// Checks what a sandbox that is there may do.
    ///
    /// # Errors
    /// Code `not-granted`.
    pub(crate) fn check_spec(&self, spec: &Spec) -> Result<(), Problem> {
        self.check(&Powers {
            profile: spec.profile,
            workspace: spec.workspace.as_ref(),
            mounts: &spec.mounts,
            network: &spec.network,
        })
    }

    /// Checks what a sandbox is to be able to do.
    ///
    /// # Errors
    /// Code `not-granted`, with what it is.
    pub(crate) fn check(&self, powers: &Powers<'_>) -> Result<(), Problem> {
        let Powers { profile, workspace, mounts, network } = powers;
        if rank(*profile) > rank(self.profile) {
            let what = format!("profile {profile}: at most {} is granted", self.profile);
            return Err(match (*profile, self.host_access) {
                (Profile::Permissive, false) => refused(&what),
                _ => plain("not-granted", format!("the server does not grant {what}"), None),
            });
        }
        if self.profile == Profile::Restrictive {
            let what = if network.mode != NetworkMode::None || !network.allow.is_empty() {
                "a network"
            } else if workspace.is_some() {
                "a workspace"
            } else if mounts.iter().any(|mount| !matches!(mount.source, MountSource::Volume(_))) {
                "a directory of the host"
            } else {
                return Ok(());
            };
            let message = format!("the server grants profile restrictive, which has no place for {what}");
            return Err(plain("not-granted", message, None));
        }
        if self.host_access {
            return Ok(());
        }
        if workspace.is_some_and(|workspace| workspace.mode == WorkspaceMode::Rw) {
            return Err(refused("workspace rw: write to the project at once"));
        }
        if mounts.iter().any(|mount| !matches!(mount.source, MountSource::Volume(_))) {
            return Err(refused("directories of the host"));
        }
        if let Some(rule) = network.allow.iter().find(|rule| !rule.is_name()) {
            return Err(refused(&format!("what is at {rule}, which may be private")));
        }
        if let Some(port) = network.ports.iter().find(|port| !port.is_local()) {
            return Err(refused(&format!("a port that others may reach: {port}")));
        }
        Ok(())
    }
}

/// That something needs access to the host.
pub(crate) fn refused(what: &str) -> Problem {
    let hint = "whoever starts the server grants it: --allow-host-access";
    plain("not-granted", format!("the server does not grant {what}"), Some(hint))
}

/// Profiles, from the least to the most permitted.
const fn rank(profile: Profile) -> u8 {
    match profile {
        Profile::Restrictive => 0,
        Profile::Moderate => 1,
        Profile::Permissive => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(mode: NetworkMode, allow: &[&str], ports: &[&str]) -> NetworkSpec {
        NetworkSpec {
            mode,
            allow: allow.iter().map(|rule| rule.parse().unwrap()).collect(),
            ports: ports.iter().map(|port| port.parse().unwrap()).collect(),
            ..NetworkSpec::default()
        }
    }

    #[test]
    fn nothing_of_the_host_without_a_grant() {
        let public = network(NetworkMode::Public, &[], &[]);
        let cow = Workspace { root: "/p".into(), mode: WorkspaceMode::Cow };
        let rw = Workspace { root: "/p".into(), mode: WorkspaceMode::Rw };
        let volume =
            HostMount { source: MountSource::Volume("v".into()), target: "/v".into(), read_only: false };
        let host =
            HostMount { source: MountSource::Host("/srv".into()), target: "/v".into(), read_only: true };
        let [default, all] = [Grants::default(), Grants { profile: Profile::Permissive, host_access: true }];
        let restrictive = Grants { profile: Profile::Restrictive, host_access: false };
        type Case<'a> = (Profile, Option<&'a Workspace>, &'a [HostMount], NetworkSpec, [bool; 3]);
        let cases: [Case<'_>; 9] = [
            (Profile::Moderate, Some(&cow), &[], public.clone(), [true, true, false]),
            (Profile::Moderate, Some(&rw), &[], public.clone(), [false, true, false]),
            (Profile::Permissive, Some(&cow), &[], public.clone(), [false, true, false]),
            (Profile::Moderate, None, &[volume], public.clone(), [true, true, false]),
            (Profile::Moderate, None, &[host], public, [false, true, false]),
            (
                Profile::Moderate,
                None,
                &[],
                network(NetworkMode::None, &["a.example"], &[]),
                [true, true, false],
            ),
            (
                Profile::Moderate,
                None,
                &[],
                network(NetworkMode::Public, &["10.0.0.1"], &[]),
                [false, true, false],
            ),
            (
                Profile::Moderate,
                None,
                &[],
                network(NetworkMode::None, &[], &["0.0.0.0:80:80"]),
                [false, true, false],
            ),
            (
                Profile::Restrictive,
                None,
                &[],
                network(NetworkMode::None, &[], &["80:80"]),
                [true, true, true],
            ),
        ];
        for (number, (profile, workspace, mounts, network, expected)) in cases.iter().enumerate() {
            let powers = Powers { profile: *profile, workspace: *workspace, mounts, network };
            let found = [default, all, restrictive].map(|grants| grants.check(&powers).is_ok());
            assert_eq!(found, *expected, "{number}");
        }
    }
}
