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
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    waiting: HashMap<i32, oneshot::Sender<i32>>,
    /// How many are being started now.
    starting: usize,
    /// Those that ended while some were being started: one of them may be among these.
    early: HashMap<i32, i32>,
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
        let mut table = self.lock();
        if let Some(waiter) = table.waiting.remove(&pid) {
            let _ = waiter.send(status);
        } else if table.starting > 0 {
            table.early.insert(pid, status);
        }
    }

    /// Starts a process with `fork` and returns its id and where its status will come. The table is not locked meanwhile:
    /// whoever collects may have to serve the new process first.
    pub(super) fn register(
        &self,
        fork: impl FnOnce() -> Result<i32, Error>,
    ) -> Result<(i32, oneshot::Receiver<i32>), Error> {
        self.lock().starting += 1;
        let forked = fork();
        let mut table = self.lock();
        table.starting -= 1;
        let (sender, receiver) = oneshot::channel();
        if let Ok(pid) = forked {
            match table.early.remove(&pid) {
                Some(status) => drop(sender.send(status)),
                None => drop(table.waiting.insert(pid, sender)),
            }
        }
        if table.starting == 0 {
            table.early.clear();
        }
        forked.map(|pid| (pid, receiver))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
