//! What a guest says first on a connection.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| agentkernel_network::fuzzing::beginning(data));
