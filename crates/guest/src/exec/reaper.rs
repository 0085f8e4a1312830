//! PID 1's duty: every process that ends is collected; the status of a program goes to whoever waits for it.

use std::collections::HashMap;
use std::io::Error;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::spawn_local;

use crate::system;

/// Programs whose end is awaited, by process id.
#[derive(Default)]
pub(crate) struct Reaper {
    waiting: Mutex<HashMap<i32, oneshot::Sender<i32>>>,
}

impl Reaper {
    /// Starts collecting.
    ///
    /// # Errors
    /// If the signal cannot be listened to.
    pub(crate) fn start() -> Result<Arc<Self>, Error> {
        let reaper = Arc::new(Self::default());
        let mut children = signal(SignalKind::child())?;
        let collector = reaper.clone();
        spawn_local(async move {
            loop {
                // One signal may stand for many children.
                while let Some((pid, status)) = system::reap() {
                    collector.ended(pid, status);
                }
                if children.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    fn ended(&self, pid: i32, status: i32) {
        if let Some(waiter) = self.lock().remove(&pid) {
            let _ = waiter.send(status);
        }
    }

    /// Starts a process with `fork` and returns its id and where its status will come.
    ///
    /// INVARIANT: the table is locked from before the process exists until it is entered, so that even one which ends
    /// at once finds its entry.
    pub(super) fn register(
        &self,
        fork: impl FnOnce() -> Result<i32, Error>,
    ) -> Result<(i32, oneshot::Receiver<i32>), Error> {
        let mut waiting = self.lock();
        let pid = fork()?;
        let (sender, receiver) = oneshot::channel();
        waiting.insert(pid, sender);
        Ok((pid, receiver))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, oneshot::Sender<i32>>> {
        self.waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
