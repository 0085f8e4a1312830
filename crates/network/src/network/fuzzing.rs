//! What a guest sends, given to what reads it.

use std::path::Path;
use std::sync::Arc;

use super::decide::Decisions;
use super::inspect::{self, Beginning};
use super::names::NameServer;
use super::{Inner, Settings, link};
use crate::fuzzing::record;
use crate::{Mode, Policy};

/// Takes `data` as the stream of a machine that may reach nothing but its name server, which knows no other.
pub fn packets(data: &[u8], directory: &Path) {
    let Some(audit) = record(directory) else { return };
    let settings = Settings {
        policy: Policy::new(Mode::None, Vec::new(), Vec::new(), Vec::new()),
        resolvers: Vec::new(),
        proxy: None,
        published: Vec::new(),
        audit,
        broken: Vec::new(),
        confine: Box::new(|| Ok(())),
    };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let Ok((inner, _)) = Inner::new(settings, Arc::default()) else { return };
        let mut rest = data;
        while let Ok(Some((frame, behind))) = link::split(rest) {
            if let Some(packet) = frame.get(14..) {
                inner.take(packet);
            }
            rest = behind;
            tokio::task::yield_now().await;
        }
        for _ in 0..4 {
            tokio::task::yield_now().await;
        }
    });
}

/// Takes `data` as a question for a name, over UDP and TCP.
pub fn question(data: &[u8], directory: &Path) {
    let Some(audit) = record(directory) else { return };
    let decisions = Decisions::new(Policy::new(Mode::Public, Vec::new(), Vec::new(), Vec::new()), audit);
    let Ok(server) = NameServer::new(&[]) else { return };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() else { return };
    runtime.block_on(async {
        for over_udp in [true, false] {
            if let Some(answer) = server.answer(&decisions, data, over_udp).await {
                assert!(answer.len() <= usize::from(u16::MAX) && (!over_udp || answer.len() <= 1232));
                assert_eq!(answer.get(..2), data.get(..2));
            }
        }
    });
}

/// Takes `data` as the beginning of a connection. What is let through for how it begins must not turn out to be for
/// somebody else when more of it is there.
pub fn beginning(data: &[u8]) {
    let whole = inspect::beginning(data);
    for cut in [data.len() / 4, data.len() / 2, data.len().saturating_sub(1)] {
        let part = inspect::beginning(&data[..cut]);
        if matches!(part, Beginning::Other | Beginning::Http(_) | Beginning::Tls(_)) {
            assert_eq!(part, whole);
        }
    }
}
