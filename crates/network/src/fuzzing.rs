//! Entrances for the fuzz targets in `fuzz/`; built only with `--cfg fuzzing`, as cargo-fuzz does.

use std::path::Path;

pub use crate::network::fuzzing::{beginning, packets, question};

/// A record in a directory that is the fuzz target's own, begun anew.
pub(crate) fn record(directory: &Path) -> Option<crate::audit::AuditLog> {
    for entry in std::fs::read_dir(directory).ok()?.flatten() {
        std::fs::remove_file(entry.path()).ok()?;
    }
    crate::audit::AuditLog::open(directory).ok()
}
