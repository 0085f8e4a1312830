//! Frames of a machine: split, read, and given to the stacks of connections.
#![no_main]

use libfuzzer_sys::fuzz_target;

thread_local! {
    /// Where the record is, used again for each input.
    static DIRECTORY: tempfile::TempDir = tempfile::tempdir().expect("a directory for the record");
}

fuzz_target!(|data: &[u8]| {
    DIRECTORY.with(|directory| agentkernel_network::fuzzing::packets(data, directory.path()));
});
