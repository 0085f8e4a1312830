//! What a client of the HTTP API sends: a head, and a body, as far as it gets without a machine.
//!
//! Input: the lines of a head (a URI, then headers), an empty line, a body.

#![no_main]

use std::sync::OnceLock;

use agentkernel_server::engine::Engine;
use agentkernel_server::fuzzing;
use libfuzzer_sys::fuzz_target;

static ENGINE: OnceLock<(tokio::runtime::Runtime, tempfile::TempDir, Engine)> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let (_, _, engine) = ENGINE.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let directory = tempfile::tempdir().expect("a directory");
        let engine = runtime.block_on(async { fuzzing::engine(directory.path()) });
        (runtime, directory, engine)
    });
    let split = data.windows(2).position(|pair| pair == b"\n\n").unwrap_or(data.len());
    fuzzing::head(&data[..split]);
    fuzzing::body(engine, data.get(split + 2..).unwrap_or_default());
});
