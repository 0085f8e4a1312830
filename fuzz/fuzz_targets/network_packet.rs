//! Frames of a machine: split, read, and given to the stacks of connections.
#![no_main]

use libfuzzer_sys::fuzz_target;

thread_local! {
    /// Where the record is, used again for each input.
    static DIRECTORY: Option<tempfile::TempDir> = tempfile::tempdir().ok();
}

fuzz_target!(|data: &[u8]| {
    DIRECTORY.with(|directory| {
        if let Some(directory) = directory {
            agentkernel_network::fuzzing::packets(data, directory.path());
        }
    });
});
