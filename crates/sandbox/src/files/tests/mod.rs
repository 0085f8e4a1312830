//! Tests of the whole server, driven by a small FUSE client.

use std::path::Path;

/// An empty directory in the crate's own target directory, removed when dropped.
pub(super) fn directory() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tmp");
    std::fs::create_dir_all(&target).unwrap();
    tempfile::Builder::new().prefix("files-").tempdir_in(target.canonicalize().unwrap()).unwrap()
}
