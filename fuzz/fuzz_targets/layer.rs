//! Layers as tar streams, merged and written as a root file system.

#![no_main]

use std::cell::RefCell;
use std::fs::File;

use libfuzzer_sys::fuzz_target;

thread_local! {
    /// Two scratch files, used again for each input.
    static SCRATCH: RefCell<Option<(File, File)>> = const { RefCell::new(None) };
}

fuzz_target!(|data: &[u8]| {
    SCRATCH.with_borrow_mut(|scratch| {
        let new = || Some((tempfile::tempfile().ok()?, tempfile::tempfile().ok()?));
        if scratch.is_none() {
            *scratch = new();
        }
        let Some((image, spool)) = scratch else { return };
        if image.set_len(0).is_ok() && spool.set_len(0).is_ok() {
            agentkernel_image::fuzzing::layers(data, image, spool);
        }
    });
});
