//! Host and guest over an in-memory byte stream: greeting, streams, stalled readers, hostile peers, restores.

use std::time::Duration;

use agentkernel_protocol::frame::{self, FrameError};
use agentkernel_protocol::message::{ExecOutput, Request};
use agentkernel_protocol::mux::{self, MuxError, Stream};
use agentkernel_protocol::record::{HandshakeError, Port};
use proptest::prelude::*;
use serde_bytes::ByteBuf;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Answers each stream's request by so many bytes of output as its grace says, then an end.
async fn flood(mut stream: Stream) {
    let Ok(Request::Shutdown { grace_ms }) = frame::read::<Request, _>(&mut stream).await else { return };
    for _ in 0..grace_ms {
        let chunk = ExecOutput::Stdout(ByteBuf::from(vec![7; frame::CHUNK]));
        if frame::write(&mut stream, &chunk).await.is_err() {
            return;
        }
    }
    let _ = stream.shutdown().await;
}

async fn guest_of(io: tokio::io::DuplexStream) {
    let mut port = Port::new(io);
    while port.accept("6.1").await.is_ok() {
        mux::guest(port.session(), |stream| {
            tokio::task::spawn_local(flood(stream));
        })
        .await;
    }
}

async fn read_all(stream: &mut Stream) -> usize {
    let mut total = 0;
    loop {
        match frame::read(stream).await {
            Ok(ExecOutput::Stdout(bytes)) => total += bytes.len(),
            Ok(other) => panic!("{other:?}"),
            Err(FrameError::Closed) => return total,
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_stalled_reader_stalls_only_its_own_stream() {
    tokio::task::LocalSet::new()
        .run_until(async {
            let (near, far) = tokio::io::duplex(64 << 10);
            tokio::task::spawn_local(guest_of(far));
            let mut port = Port::new(near);
            assert_eq!(port.greet(1).await.unwrap().kernel, "6.1");
            tokio::task::spawn_local(async move {
                let (opener, driver) = mux::host(port.session());
                let readers = tokio::task::spawn_local(async move {
                    let mut stalled = Vec::new();
                    for _ in 0..20 {
                        let mut stream = opener.open().await.unwrap();
                        frame::write(&mut stream, &Request::Shutdown { grace_ms: 100 }).await.unwrap();
                        stalled.push(stream);
                    }
                    let mut stream = opener.open().await.unwrap();
                    frame::write(&mut stream, &Request::Shutdown { grace_ms: 300 }).await.unwrap();
                    assert_eq!(read_all(&mut stream).await, 300 * frame::CHUNK);
                    for stream in &mut stalled {
                        assert_eq!(read_all(stream).await, 100 * frame::CHUNK);
                    }
                });
                tokio::select! {
                    error = driver => panic!("{error}"),
                    readers = readers => readers.unwrap(),
                }
            })
            .await
            .unwrap();
        })
        .await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_higher_epoch_ends_a_session_frozen_in_the_middle_of_a_record() {
    let (mut near, far) = tokio::io::duplex(64 << 10);
    let guest = async move {
        let mut port = Port::new(far);
        port.accept("6.1").await.unwrap();
        let mut bytes = [0; 8];
        let mut session = port.session();
        session.read_exact(&mut bytes[..5]).await.unwrap();
        let reset = session.read(&mut bytes).await.unwrap_err();
        assert_eq!(reset.kind(), std::io::ErrorKind::ConnectionReset);
        port.accept("6.1").await.unwrap();
        port.session().read_exact(&mut bytes[..3]).await.unwrap();
        assert_eq!(&bytes[..3], b"new");
    };
    let host = async move {
        let mut port = Port::new(&mut near);
        port.greet(1).await.unwrap();
        port.session().write_all(b"first").await.unwrap();
        port.session().flush().await.unwrap();
        let mut port = Port::new(&mut near);
        port.greet(2).await.unwrap();
        port.session().write_all(b"new").await.unwrap();
        port.session().flush().await.unwrap();
    };
    tokio::join!(guest, host);
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_opens_a_stream_is_refused() {
    let (near, far) = tokio::io::duplex(64 << 10);
    let hostile = async move {
        let mut port = Port::new(far);
        port.accept("6.1").await.unwrap();
        let mut session = port.session();
        // A yamux data frame with SYN on stream 2, as only a client of its own would send.
        session.write_all(&[0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0]).await.unwrap();
        session.flush().await.unwrap();
        let _ = session.read_to_end(&mut Vec::new()).await;
    };
    let host = async move {
        let mut port = Port::new(near);
        port.greet(1).await.unwrap();
        let (_opener, driver) = mux::host(port.session());
        assert!(matches!(driver.await, MuxError::UnexpectedStream));
    };
    tokio::join!(hostile, host);
}

fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

proptest! {
    /// Whatever a guest writes on its port, the host refuses or waits; it neither panics nor grows.
    #[test]
    fn garbage_never_greets(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        block_on(async {
            let (near, mut far) = tokio::io::duplex(1 << 20);
            far.write_all(&bytes).await.unwrap();
            let _ = far.shutdown().await;
            let mut port = Port::new(near);
            let greeting = tokio::time::timeout(Duration::from_secs(5), port.greet(1)).await.unwrap();
            prop_assert!(matches!(greeting, Err(HandshakeError::Io(_) | HandshakeError::Malformed(_))));
            Ok(())
        })?;
    }

    #[test]
    fn garbage_frames_are_errors(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        block_on(async {
            let mut reader = &bytes[..];
            while let Ok(_message) = frame::read::<ExecOutput, _>(&mut reader).await {}
        });
    }
}
