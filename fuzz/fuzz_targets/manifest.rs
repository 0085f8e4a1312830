//! Indexes, manifests and configurations.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| agentkernel_image::fuzzing::documents(data));
