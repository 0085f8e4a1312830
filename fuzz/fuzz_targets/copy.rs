//! What may be copied: a tar archive from anywhere, and the tree that a hostile guest sends.
//!
//! Input: bytes. They are an archive, and they are frames of entries; neither may write outside the target.

#![no_main]

use std::io::Cursor;
use std::path::Path;

use agentkernel_protocol::frame;
use agentkernel_protocol::message::Entry;
use agentkernel_sandbox::copy::{CopyLimits, HostTarget, Source, TarSource, copy_out};
use libfuzzer_sys::fuzz_target;

const LIMITS: CopyLimits = CopyLimits { entries: 100, bytes: 1 << 16 };

/// Feeds a target what a guest might send; nothing may appear beside it.
fn receive(entries: &[Entry]) {
    let world = tempfile::tempdir().expect("a directory");
    let target = world.path().join("target");
    std::fs::create_dir(&target).expect("a target");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let send = async move {
            for entry in entries {
                if frame::write(&mut far, entry).await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::join!(copy_out(near, HostTarget::new(&target, "".as_ref()), LIMITS), send);
    });
    let beside = std::fs::read_dir(world.path()).expect("a listing").count();
    assert_eq!(beside, 1);
    assert_plain(&target);
}

/// No special bits, and no name of a copy that was broken off.
fn assert_plain(directory: &Path) {
    use std::os::unix::fs::PermissionsExt;
    for entry in std::fs::read_dir(directory).expect("a listing").flatten() {
        assert!(!entry.file_name().to_string_lossy().starts_with(".agentkernel-"));
        let metadata = entry.metadata().expect("a file");
        if metadata.is_dir() {
            assert_plain(&entry.path());
        } else if metadata.is_file() {
            assert_eq!(metadata.permissions().mode() & 0o7000, 0);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut sent = Vec::new();
    let archive = TarSource::new(Cursor::new(data.to_vec()));
    let whole = archive.send(&mut |entry| {
        sent.push(entry);
        Ok(())
    });
    if whole.is_ok() {
        sent.push(Entry::End);
    }
    if sent.len() > 1 {
        receive(&sent);
    }
    let mut rest = data;
    let mut entries = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_le_bytes(*length)).min(after.len());
        let Ok(entry) = frame::decode::<Entry>(&after[..length]) else { break };
        entries.push(entry);
        rest = &after[length..];
    }
    if !entries.is_empty() {
        receive(&entries);
    }
});
