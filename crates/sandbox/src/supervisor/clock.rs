//! The guest's wall clock, set from the host's.
//!
//! A guest that is slow to take the time is behind by as much, and on a busy host that may be seconds: 20 machines that are
//! restored at once on two processors took two. So it is told again until it has answered soon after it was told.

use std::time::{Duration, Instant};

use agentkernel_protocol::frame;
use agentkernel_protocol::message::{Reply, Request};
use agentkernel_protocol::mux::Opener;

use crate::deadline::unix_ns;

/// A guest that has answered within this time has a clock that is right: it is behind by less.
pub(super) const CLOSE: Duration = Duration::from_millis(200);
/// How often a guest is told; the last time stands, however late it comes.
const ROUNDS: usize = 5;

/// Sets it. `None` if the guest does not take the time.
pub(super) async fn set(opener: &Opener) -> Option<()> {
    for _ in 0..ROUNDS {
        let told = Instant::now();
        let mut stream = opener.open().await.ok()?;
        frame::write(&mut stream, &Request::Clock { unix_time_ns: unix_ns() }).await.ok()?;
        match frame::read::<Reply, _>(&mut stream).await.ok()? {
            Reply::Done if told.elapsed() <= CLOSE => break,
            Reply::Done => tracing::debug!("the guest took {:?} to take the time", told.elapsed()),
            Reply::Failed { .. } => return None,
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use agentkernel_protocol::mux;

    use super::*;

    /// Has a guest that is `late` by so much, one after the other, told the time; what it was told, nanoseconds.
    async fn told(late: &[Duration], reply: Reply) -> (Option<()>, Vec<u64>) {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let (opener, driver) = mux::host(ours);
        let times = Arc::new(Mutex::new(Vec::new()));
        let heard = times.clone();
        let mut late = late.iter().copied();
        let guest = mux::guest(theirs, move |mut stream| {
            let (heard, late, reply) = (heard.clone(), late.next().unwrap_or_default(), reply.clone());
            tokio::spawn(async move {
                let Ok(Request::Clock { unix_time_ns }) = frame::read(&mut stream).await else { return };
                heard.lock().unwrap().push(unix_time_ns);
                tokio::time::sleep(late).await;
                let _ = frame::write(&mut stream, &reply).await;
            });
        });
        let result = tokio::select! {
            result = set(&opener) => result,
            _ = driver => unreachable!("the connection ended"),
            _ = guest => unreachable!("the guest ended"),
        };
        let times = times.lock().unwrap().clone();
        (result, times)
    }

    #[tokio::test]
    async fn a_guest_that_is_slow_is_told_again_what_the_time_is_then() {
        let slow = CLOSE + Duration::from_millis(50);
        let (result, times) = told(&[slow, slow], Reply::Done).await;
        assert_eq!((result, times.len()), (Some(()), 3));
        assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= 250_000_000), "{times:?}");
        let (result, times) = told(&[], Reply::Done).await;
        assert_eq!((result, times.len()), (Some(()), 1));
        let (result, times) = told(&[slow; 9], Reply::Done).await;
        assert_eq!((result, times.len()), (Some(()), ROUNDS));
        let (result, _) = told(&[], Reply::Failed { message: "no".into() }).await;
        assert_eq!(result, None);
    }
}
