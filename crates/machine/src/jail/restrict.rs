//! What the process takes from itself with the kernel's own means: limits, capabilities, landlock.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::enter::{Failure, Walls, doing, is_directory, open_without_links};
use super::{Orders, Wall};

/// Beyond it there is nothing this jail denies.
const NEWEST_ABI: ABI = ABI::V7;

pub(super) fn limits(orders: &Orders, walls: &mut Walls) {
    let limits = &orders.limits;
    walls.build(Wall::ResourceLimits, || {
        let mut wanted = vec![
            (Resource::Core, 0),
            (Resource::Fsize, limits.file_size_bytes),
            (Resource::Nofile, limits.open_files),
            (Resource::Msgqueue, 0),
        ];
        wanted.extend(limits.address_space_bytes.map(|bytes| (Resource::As, bytes)));
        // Counted per uid: under a uid that is shared, the user's other processes would count.
        wanted.extend(orders.identity.map(|_| (Resource::Nproc, limits.processes)));
        for (resource, value) in wanted {
            let most =
                rustix::process::getrlimit(resource).maximum.map_or(value, |maximum| maximum.min(value));
            let limit = Rlimit { current: Some(most), maximum: Some(most) };
            setrlimit(resource, limit).map_err(doing(format!("limit {resource:?}")))?;
        }
        Ok(format!(
            "files of {} MiB, {} descriptors, no core files",
            limits.file_size_bytes >> 20,
            limits.open_files
        ))
    });
}

/// Gives up every capability, and the means to get one back by executing something.
pub(super) fn capabilities(walls: &mut Walls) {
    walls.build(Wall::NoCapabilities, || {
        for capability in CapabilitySet::all().iter() {
            // Not allowed without the capability for it (then no_new_privs does the same), unknown on older kernels.
            let _ = rustix::thread::remove_capability_from_bounding_set(capability);
        }
        let _ = rustix::thread::clear_ambient_capability_set();
        let none = CapabilitySets {
            effective: CapabilitySet::empty(),
            permitted: CapabilitySet::empty(),
            inheritable: CapabilitySet::empty(),
        };
        rustix::thread::set_capabilities(None, none).map_err(doing("give up capabilities"))?;
        Ok("none held".to_owned())
    });
}

/// A kernel without landlock is reported; one that has it and refuses a rule is an error.
pub(super) fn landlock(
    orders: &Orders,
    descriptors: &[OwnedFd],
    reopened: &[(usize, PathBuf)],
    new_root: bool,
    walls: &mut Walls,
) -> Result<(), Failure> {
    if orders.without.contains(&Wall::Landlock) {
        walls.build(Wall::Landlock, || Ok(String::new()));
        return Ok(());
    }
    let ruleset = rules(orders, descriptors, reopened, new_root)?;
    let status = ruleset.restrict_self().map_err(|error| format!("enter landlock: {error}"))?;
    walls.build(Wall::Landlock, || {
        let version = match status.landlock {
            LandlockStatus::Available { effective_abi, .. } => format!("ABI {}", effective_abi as u32),
            _ => "not available".to_owned(),
        };
        match status.ruleset {
            RulesetStatus::FullyEnforced => Ok(format!("files, tcp, signals and sockets ({version})")),
            RulesetStatus::PartiallyEnforced => Ok(format!("as far as this kernel can ({version})")),
            RulesetStatus::NotEnforced => Err(format!("the kernel has no landlock ({version})")),
        }
    });
    Ok(())
}

fn rules(
    orders: &Orders,
    descriptors: &[OwnedFd],
    reopened: &[(usize, PathBuf)],
    new_root: bool,
) -> Result<RulesetCreated, Failure> {
    let mut ruleset = handled()?;
    let readable = AccessFs::Execute | AccessFs::ReadFile | AccessFs::ReadDir;
    for path in orders.readable.iter().chain(orders.program.iter()) {
        ruleset = allow(ruleset, path, readable)?;
    }
    for path in &orders.devices {
        ruleset = allow(ruleset, path, AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev)?;
    }
    for (index, path) in reopened {
        ruleset = match descriptors.get(*index) {
            Some(_) if new_root => allow(ruleset, path, AccessFs::ReadFile.into())?,
            Some(descriptor) => add(ruleset, descriptor, AccessFs::ReadFile.into())?,
            None => ruleset,
        };
    }
    Ok(ruleset)
}

fn handled() -> Result<RulesetCreated, Failure> {
    let mut ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    ruleset = ruleset.handle_access(AccessFs::from_all(NEWEST_ABI)).map_err(|error| error.to_string())?;
    ruleset = ruleset.handle_access(AccessNet::from_all(NEWEST_ABI)).map_err(|error| error.to_string())?;
    ruleset = ruleset.scope(Scope::from_all(NEWEST_ABI)).map_err(|error| error.to_string())?;
    ruleset.create().map_err(|error| error.to_string())
}

fn allow(
    ruleset: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, Failure> {
    let opened = open_without_links(path).map_err(doing(format!("open {}", path.display())))?;
    add(ruleset, &opened, access)
}

fn add(
    ruleset: RulesetCreated,
    file: &OwnedFd,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, Failure> {
    let directory = is_directory(file).map_err(doing("look at a file"))?;
    let access = if directory { access } else { access & AccessFs::from_file(NEWEST_ABI) };
    ruleset.add_rule(PathBeneath::new(file.as_fd(), access)).map_err(|error| error.to_string())
}
