//! What of a tree the guest may see: pure decisions about a path and what `lstat` says of it.
//!
//! An entry is judged together with its path, and only where everything above it is shown. What a view hides
//! does not exist for the guest: lookups find nothing and listings leave it out.

pub(super) mod directory;
pub(super) mod host_image;
pub(super) mod secrets;
pub(super) mod workspace;

use rustix::fs::{FileType, Stat};

use directory::DirectoryView;
use host_image::HostImageView;
use workspace::WorkspaceView;

/// What a view needs to know of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) kind: FileType,
    /// Permission bits, those of the owner's class first.
    pub(super) mode: u32,
    pub(super) owner: u32,
}

impl Facts {
    pub(super) fn of(stat: &Stat) -> Self {
        Self { kind: super::host::kind(stat), mode: stat.st_mode & 0o7777, owner: stat.st_uid }
    }
}

/// Where a directory's entries come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Listing {
    /// From the host's directory, each entry judged by itself.
    Host,
    /// From these names alone, where they exist.
    Names(Vec<Vec<u8>>),
    /// The directory may be passed through but not read.
    Denied,
}

/// The filter of an export.
#[derive(Debug)]
pub(super) enum View {
    HostImage(HostImageView),
    Workspace(WorkspaceView),
    Directory(DirectoryView),
}

impl View {
    /// Whether an entry is shown. `path` is relative to the export's root, which itself (empty) always is.
    pub(super) fn shows(&self, path: &[u8], facts: Facts) -> bool {
        path.is_empty()
            || match self {
                Self::HostImage(view) => view.shows(path, facts),
                Self::Workspace(view) => view.shows(path, facts.kind),
                Self::Directory(view) => view.shows(path, facts.kind),
            }
    }

    /// Whether what was shown once may still be passed or read, now that `lstat` says `facts` of it.
    pub(super) fn still_admits(&self, path: &[u8], facts: Facts) -> bool {
        match self {
            Self::HostImage(view) => path.is_empty() || view.admits(path, facts),
            Self::Workspace(_) | Self::Directory(_) => true,
        }
    }

    /// How a shown directory is listed.
    pub(super) fn listing(&self, path: &[u8], facts: Facts) -> Listing {
        match self {
            Self::HostImage(view) => view.listing(path, facts),
            Self::Workspace(_) | Self::Directory(_) => Listing::Host,
        }
    }

    /// The permission bits that are shown in place of the host's.
    pub(super) fn mode(&self, path: &[u8], mode: u32) -> u32 {
        match self {
            Self::HostImage(view) => view.mode(path, mode),
            Self::Workspace(_) | Self::Directory(_) => mode,
        }
    }

    /// Whether more than name and type of an entry must be known to judge it.
    pub(super) fn needs_mode(&self) -> bool {
        matches!(self, Self::HostImage(_))
    }
}
