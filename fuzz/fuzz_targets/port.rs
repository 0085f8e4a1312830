//! A guest that writes anything on its port: both ends of the conversation refuse or wait, and never panic.
#![no_main]

use agentkernel_protocol::frame;
use agentkernel_protocol::message::{Entry, ExecInput, ExecOutput, Request};
use agentkernel_protocol::mux;
use agentkernel_protocol::record::Port;
use libfuzzer_sys::fuzz_target;
use tokio::io::AsyncWriteExt;

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let _ = frame::decode::<ExecOutput>(data);
        let _ = frame::decode::<Entry>(data);
        let _ = frame::decode::<Request>(data);
        let _ = frame::decode::<ExecInput>(data);
        // The host, greeted properly, then given the data.
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let answer = [1, 0, 0, 0, 2, 0, 0, 2, 1, 0];
        far.write_all(&answer).await.unwrap();
        far.write_all(data).await.unwrap();
        far.shutdown().await.unwrap();
        let mut port = Port::new(near);
        if port.greet(1).await.is_ok() {
            let (_opener, driver) = mux::host(port.session());
            let _ = driver.await;
        }
        // The guest, given the data from the start.
        let (near, mut far) = tokio::io::duplex(1 << 20);
        far.write_all(data).await.unwrap();
        far.shutdown().await.unwrap();
        let mut port = Port::new(near);
        while port.accept("6.1").await.is_ok() {
            let _ = mux::guest(port.session(), drop).await;
        }
    });
});
