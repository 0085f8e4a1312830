//! What happens in sandboxes: read of their records, which also tell of what the command line does.
//!
//! ```text
//! sandboxes/*/record, network ─► watch, one task ─► broadcast ─► each client that listens
//! ```
//! With nobody listening nothing is read. Who listens too slowly misses some and is told how many.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use agentkernel_sandbox::inspect::LogReader;
use agentkernel_sandbox::state::SandboxDirectory;
use agentkernel_sandbox::{Problem, io};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use super::{Engine, Shared, blocking};
use crate::model::LogEntry;
use crate::problem::hidden;

/// Entries that wait for a slow listener.
pub(super) const QUEUE: usize = 1024;
/// How often records are looked at.
const GLANCE: Duration = Duration::from_millis(200);
/// Entries of one sandbox's record in one answer.
const ENTRIES: usize = 10_000;

/// Listens to what happens.
#[derive(Debug)]
pub struct Watch {
    receiver: broadcast::Receiver<Arc<LogEntry>>,
}

impl Watch {
    /// The next entry, or how many were missed; `None` when the engine ends.
    pub async fn next(&mut self) -> Option<Result<Arc<LogEntry>, u64>> {
        match self.receiver.recv().await {
            Ok(entry) => Some(Ok(entry)),
            Err(RecvError::Lagged(count)) => Some(Err(count)),
            Err(RecvError::Closed) => None,
        }
    }
}

impl Engine {
    /// Listens to what happens in all sandboxes from now on: whatever begins after this has returned is heard of.
    pub async fn watch(&self) -> Watch {
        let mut records = self.shared.records.lock().await;
        let receiver = self.shared.events.subscribe();
        if records.is_none() {
            let engine = self.clone();
            *records = tokio::task::spawn_blocking(move || Records::begin(&engine)).await.ok();
        }
        Watch { receiver }
    }

    /// A sandbox's record, or all of them, oldest first; of each the newest entries.
    ///
    /// # Errors
    /// Code `not-found`; if it cannot be read.
    pub async fn record(&self, name: Option<&str>) -> Result<Vec<LogEntry>, Problem> {
        let (engine, name) = (self.clone(), name.map(str::to_owned));
        blocking(move || {
            let directories = match &name {
                Some(name) => vec![engine.find(name)?.0],
                None => engine.visible()?,
            };
            let mut entries = Vec::new();
            for directory in directories {
                directory.repair();
                let read = LogReader::new(directory.path()).read().map_err(io("read the sandbox's record"));
                match read {
                    Ok(read) => {
                        let skip = read.len().saturating_sub(ENTRIES);
                        let name = directory.name();
                        entries.extend(read.into_iter().skip(skip).map(|entry| told(&engine, &name, entry)));
                    }
                    // Another one's damage hides nothing.
                    Err(_) if name.is_none() => {}
                    Err(problem) => return Err(problem),
                }
            }
            entries.sort_by(|one, other| one.timestamp.cmp(&other.timestamp));
            Ok(entries)
        })
        .await
    }
}

fn told(engine: &Engine, sandbox: &str, entry: agentkernel_sandbox::record::Entry) -> LogEntry {
    let text = hidden(engine, &entry.text);
    LogEntry { timestamp: entry.time, sandbox: sandbox.to_owned(), event: entry.event, text }
}

/// Reads records while somebody listens, and tells of sandboxes that go.
pub(super) async fn watch(shared: Weak<Shared>) {
    loop {
        tokio::time::sleep(GLANCE).await;
        let Some(shared) = shared.upgrade() else { return };
        let mut known = shared.records.lock().await;
        let records = known.take();
        if shared.events.receiver_count() == 0 {
            continue;
        }
        let engine = Engine { shared: shared.clone() };
        let read = tokio::task::spawn_blocking(move || {
            let mut records = records.unwrap_or_else(|| Records::begin(&engine));
            let entries = records.read(&engine);
            (records, entries)
        });
        // The next reading begins anew.
        let Ok((records, entries)) = read.await else { continue };
        *known = Some(records);
        for entry in entries {
            // Who stopped listening meanwhile misses nothing.
            let _ = shared.events.send(Arc::new(entry));
        }
    }
}

/// The records of all sandboxes, as far as they were read.
#[derive(Debug)]
pub(super) struct Records {
    readers: HashMap<PathBuf, (String, LogReader)>,
}

impl Records {
    /// From what is there now on.
    fn begin(engine: &Engine) -> Self {
        let mut records = Self { readers: HashMap::new() };
        records.read(engine);
        records
    }

    fn read(&mut self, engine: &Engine) -> Vec<LogEntry> {
        let all: Vec<SandboxDirectory> = engine.visible().unwrap_or_default();
        let mut entries = Vec::new();
        let present: Vec<PathBuf> = all.iter().map(|directory| directory.path().to_owned()).collect();
        self.readers.retain(|path, (name, _)| {
            let stays = present.contains(path);
            if !stays {
                let now = agentkernel_sandbox::deadline::unix_ms();
                entries.push(LogEntry {
                    timestamp: agentkernel_sandbox::deadline::rfc3339(now),
                    sandbox: name.clone(),
                    event: "removed".to_owned(),
                    text: String::new(),
                });
            }
            stays
        });
        for directory in all {
            let name = directory.name();
            let fresh = || (name.clone(), LogReader::new(directory.path()));
            let (_, reader) = self.readers.entry(directory.path().to_owned()).or_insert_with(fresh);
            let read = reader.read().unwrap_or_default();
            entries.extend(read.into_iter().map(|entry| told(engine, &name, entry)));
        }
        entries
    }
}
