//! Raw FUSE requests of a hostile guest against a small workspace: never a panic, every reply in form and bounded,
//! nothing made outside the workspace.
//!
//! Input: one byte (its lowest bit: read-write), then requests, each after its length in two bytes.

#![no_main]

use std::path::Path;

use agentkernel_sandbox::files::{Access, Export, FileServer};
use libfuzzer_sys::fuzz_target;

const REPLY_LIMIT: usize = (1 << 20) + 16;
/// FALLOCATE could fill the disk of whoever runs this.
const FALLOCATE: u8 = 43;

fn tree() -> tempfile::TempDir {
    let parent = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/trees");
    std::fs::create_dir_all(&parent).unwrap();
    let tree = tempfile::tempdir_in(parent).unwrap();
    let root = tree.path().join("served");
    std::fs::create_dir_all(root.join("d/e")).unwrap();
    std::fs::write(root.join("a"), "content").unwrap();
    std::fs::write(root.join(".env"), "secret").unwrap();
    std::os::unix::fs::symlink("../..", root.join("up")).unwrap();
    tree
}

fuzz_target!(|input: &[u8]| {
    let Some((&mode, mut rest)) = input.split_first() else { return };
    let tree = tree();
    let writable = Access::ReadWrite { guard: |path| path.ends_with("e") };
    let access = if mode & 1 == 1 { writable } else { Access::ReadOnly };
    let server = FileServer::new(Export::workspace(&tree.path().join("served"), access, None).unwrap());
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let (request, after) = after.split_at(usize::from(u16::from_le_bytes(*length)).min(after.len()));
        rest = after;
        if request.get(4) == Some(&FALLOCATE) {
            continue;
        }
        if let Some(reply) = server.handle(request) {
            assert!((16..=REPLY_LIMIT).contains(&reply.len()));
            assert_eq!(reply[..4], (reply.len() as u32).to_le_bytes());
            assert_eq!(reply[8..16], request[8..16]);
        }
    }
    assert_eq!(std::fs::read_dir(tree.path()).unwrap().count(), 1);
});
