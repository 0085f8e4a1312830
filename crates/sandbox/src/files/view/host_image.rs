//! The view of a `host` image: the host's own programs, as nobody would see them.
//!
//! Three zones, judged by the path:
//! - *system*: `/usr`, `/etc` and the like. Shown is what **others** may read or pass; the supervisor may be
//!   root, so the mode bits decide and not what an open would say.
//! - *toolchain*: directories named on `PATH` below `$HOME`. Homes are closed to others, so the bits of the
//!   toolchain's owner count here, for the owner's files.
//! - *passage*: the directories on the way to either. They show the way down and nothing else.
//!
//! The deny-list of [`super::secrets`] holds in all of them.

use std::collections::BTreeSet;

use rustix::fs::FileType;

use super::{Facts, Listing, secrets};

/// What of `/` is shown, relative to it.
pub(crate) const SYSTEM: &[&str] =
    &["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "opt", "etc", "var/lib/dpkg", "var/lib/apt"];

/// The mode of passages: whoever the guest's user is, the way down is open.
const PASSAGE_MODE: u32 = 0o755;

const OTHERS_READ: u32 = 0o004;
const OTHERS_PASS: u32 = 0o001;
const OWNER_READ: u32 = 0o400;
const OWNER_PASS: u32 = 0o100;

/// A directory that is served for its owner's sake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Toolchain {
    /// Relative to `/`.
    pub(in super::super) path: Vec<u8>,
    pub(in super::super) owner: u32,
}

#[derive(Debug)]
pub(in super::super) struct HostImageView {
    toolchains: Vec<Toolchain>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Zone {
    System,
    Toolchain { owner: u32 },
    Passage,
    Outside,
}

impl HostImageView {
    pub(in super::super) fn new(toolchains: Vec<Toolchain>) -> Self {
        Self { toolchains }
    }

    fn zone(&self, path: &[u8]) -> Zone {
        if let Some(toolchain) = self.toolchains.iter().find(|toolchain| is_within(path, &toolchain.path)) {
            return Zone::Toolchain { owner: toolchain.owner };
        }
        if SYSTEM.iter().any(|root| is_within(path, root.as_bytes())) {
            return Zone::System;
        }
        if self.roots().any(|root| is_within(root, path)) { Zone::Passage } else { Zone::Outside }
    }

    fn roots(&self) -> impl Iterator<Item = &[u8]> {
        let toolchains = self.toolchains.iter().map(|toolchain| toolchain.path.as_slice());
        SYSTEM.iter().map(|root| root.as_bytes()).chain(toolchains)
    }

    pub(super) fn shows(&self, path: &[u8], facts: Facts) -> bool {
        self.admits(path, facts) && !secrets::hidden_on_host(path)
    }

    /// The part of [`Self::shows`] that may change while a path stays the same: what the bits say.
    pub(super) fn admits(&self, path: &[u8], facts: Facts) -> bool {
        let zone = self.zone(path);
        match facts.kind {
            FileType::Symlink => zone != Zone::Outside,
            FileType::Directory => zone == Zone::Passage || allowed(zone, facts, OWNER_PASS, OTHERS_PASS),
            FileType::RegularFile => allowed(zone, facts, OWNER_READ, OTHERS_READ),
            _ => false,
        }
    }

    pub(super) fn listing(&self, path: &[u8], facts: Facts) -> Listing {
        let zone = self.zone(path);
        if zone == Zone::Passage {
            return Listing::Names(self.ways_down(path));
        }
        if allowed(zone, facts, OWNER_READ, OTHERS_READ) { Listing::Host } else { Listing::Denied }
    }

    pub(super) fn mode(&self, path: &[u8], mode: u32) -> u32 {
        if self.zone(path) == Zone::Passage { PASSAGE_MODE } else { mode }
    }

    /// The names below a passage that lead to something shown.
    fn ways_down(&self, passage: &[u8]) -> Vec<Vec<u8>> {
        let names: BTreeSet<&[u8]> = self
            .roots()
            .filter_map(|root| match passage {
                b"" => Some(root),
                _ => root.strip_prefix(passage)?.strip_prefix(b"/"),
            })
            .filter_map(|rest| rest.split(|&byte| byte == b'/').next())
            .collect();
        names.into_iter().map(<[u8]>::to_vec).collect()
    }
}

/// Whether the bits that count in `zone` are set.
fn allowed(zone: Zone, facts: Facts, owner_bit: u32, others_bit: u32) -> bool {
    match zone {
        Zone::Toolchain { owner } if facts.owner == owner => facts.mode & owner_bit != 0,
        Zone::Toolchain { .. } | Zone::System => facts.mode & others_bit != 0,
        Zone::Passage | Zone::Outside => false,
    }
}

/// Whether `path` is `root` or lies below it.
fn is_within(path: &[u8], root: &[u8]) -> bool {
    root.is_empty() || path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWNER: u32 = 1000;

    fn view() -> HostImageView {
        let toolchain = |path: &str| Toolchain { path: path.into(), owner: OWNER };
        HostImageView::new(vec![toolchain("home/ann/.cargo/bin"), toolchain("home/ann/.pyenv")])
    }

    fn facts(kind: FileType, mode: u32, owner: u32) -> Facts {
        Facts { kind, mode, owner }
    }

    #[test]
    fn files_are_shown_as_to_nobody() {
        use FileType::{Directory, Fifo, RegularFile, Socket, Symlink};
        for (path, kind, mode, owner, expected) in [
            ("usr", Directory, 0o755, 0, true),
            ("usr/bin/true", RegularFile, 0o755, 0, true),
            ("usr/bin/sudo", RegularFile, 0o4711, 0, false),
            ("usr/share/hidden", Directory, 0o750, 0, false),
            ("bin", Symlink, 0o777, 0, true),
            ("etc/passwd", RegularFile, 0o644, 0, true),
            ("etc/shadow", RegularFile, 0o644, 0, false),
            ("etc/shadow-", RegularFile, 0o644, 0, false),
            ("etc/shadow.bak", RegularFile, 0o644, 0, false),
            ("etc/secret", RegularFile, 0o600, 0, false),
            ("etc/secret", RegularFile, 0o640, OWNER, false),
            ("etc/resolv.conf", Symlink, 0o777, 0, false),
            ("etc/ssl/certs/ca-certificates.crt", RegularFile, 0o644, 0, true),
            ("etc/ssl/certs/ISRG_Root_X1.pem", Symlink, 0o777, 0, true),
            ("usr/lib/python3/dist-packages/certifi/cacert.pem", RegularFile, 0o644, 0, true),
            ("etc/ssl/private", Directory, 0o755, 0, false),
            ("etc/ssh/ssh_host_rsa_key", RegularFile, 0o644, 0, false),
            ("etc/machine-id", RegularFile, 0o444, 0, false),
            ("var", Directory, 0o700, 0, true),
            ("var/lib/dpkg/status", RegularFile, 0o644, 0, true),
            ("var/lib/mysql", Directory, 0o755, 0, false),
            ("var/log", Directory, 0o755, 0, false),
            ("usr/run/socket", Socket, 0o777, 0, false),
            ("usr/run/fifo", Fifo, 0o777, 0, false),
            ("proc", Directory, 0o755, 0, false),
            ("usrlocal", Directory, 0o755, 0, false),
            ("home", Directory, 0o755, 0, true),
            ("home/ann", Directory, 0o700, OWNER, true),
            ("home/ann/.ssh", Directory, 0o755, OWNER, false),
            ("home/ann/notes", RegularFile, 0o644, OWNER, false),
            ("home/bob", Directory, 0o755, 1001, false),
            ("home/ann/.cargo", Directory, 0o700, OWNER, true),
            ("home/ann/.cargo/credentials.toml", RegularFile, 0o644, OWNER, false),
            ("home/ann/.cargo/bin/cargo", RegularFile, 0o700, OWNER, true),
            ("home/ann/.cargo/bin/odd", RegularFile, 0o700, 0, false),
            ("home/ann/.cargo/bin/odd", RegularFile, 0o704, 0, true),
            ("home/ann/.pyenv/x/.netrc", RegularFile, 0o700, OWNER, false),
            ("home/ann/.pyenv/x/server.key", RegularFile, 0o700, OWNER, false),
        ] {
            assert_eq!(view().shows(path.as_bytes(), facts(kind, mode, owner)), expected, "{path} {mode:o}");
        }
    }

    #[test]
    fn passages_list_the_way_down_only() {
        let directory = facts(FileType::Directory, 0o700, OWNER);
        let names = |path: &str| match view().listing(path.as_bytes(), directory) {
            Listing::Names(names) => names.into_iter().map(|name| String::from_utf8(name).unwrap()).collect(),
            other => vec![format!("{other:?}")],
        };
        assert_eq!(names("home/ann"), [".cargo", ".pyenv"]);
        assert_eq!(names("home/ann/.cargo"), ["bin"]);
        assert_eq!(names("var/lib"), ["apt", "dpkg"]);
        assert!(names("").contains(&"home".to_owned()));
        assert_eq!(names("home/ann/.cargo/bin"), ["Host"]);
        assert_eq!(names("usr"), ["Denied"]);
        assert_eq!(view().mode(b"home/ann", 0o700), 0o755);
        assert_eq!(view().mode(b"home/ann/.pyenv", 0o700), 0o700);
    }

    proptest! {
        /// Whatever lies outside the roots and off the way to them is hidden, whatever its bits are.
        #[test]
        fn nothing_else_is_shown(names in prop::collection::vec("[a-z.]{1,6}", 1..6), mode in 0u32..0o10000) {
            let path = names.join("/");
            let inside = view().roots().any(|root| {
                is_within(path.as_bytes(), root) || is_within(root, path.as_bytes())
            });
            for kind in [FileType::RegularFile, FileType::Directory, FileType::Symlink] {
                prop_assert!(inside || !view().shows(path.as_bytes(), facts(kind, mode, OWNER)));
            }
        }

        /// A system file is shown only if others may read it.
        #[test]
        fn others_bits_decide(names in prop::collection::vec("[a-z]{1,6}", 1..6), mode in 0u32..0o10000,
                              owner in any::<u32>()) {
            let path = format!("usr/{}", names.join("/"));
            let shown = view().shows(path.as_bytes(), facts(FileType::RegularFile, mode, owner));
            prop_assert!(!shown || mode & 0o004 != 0);
        }
    }
}
