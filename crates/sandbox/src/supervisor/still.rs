//! Stops the machine, for its user or to save it, and lets it go on.
//!
//! ```text
//!            pause                          quiet guest, stop, save
//! running ◄────────► paused      running ────────────────────────────► still ──(the client is done, or gone)──► running
//!            resume                paused: goes on for the moment that quieting takes
//! ```
//! One at a time. A client that saves holds the machine by its connection: if it dies, the machine goes on.

use std::sync::Arc;
use std::time::Duration;

use agentkernel_machine::Machine;
use agentkernel_network::Network;
use agentkernel_protocol::control::{Connection, ControlReply, Saved};
use agentkernel_protocol::frame;
use agentkernel_protocol::message::{Programs, Reply, Request};
use agentkernel_protocol::mux::{Opener, Stream};
use serde_bytes::ByteBuf;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, watch};

use super::clock;
use crate::exports::Exports;
use crate::problem::{Problem, plain, problem};

/// How long the guest may take to come to rest: as long as the slowest request to a file server.
const QUIET_PATIENCE: Duration = Duration::from_secs(20);
/// How long a client may take to copy what it saves.
const COPY_PATIENCE: Duration = Duration::from_secs(300);

/// The machine's stop and go.
pub(super) struct Still {
    machine: Arc<dyn Machine>,
    network: Arc<Network>,
    opener: Opener,
    epoch: u32,
    /// It becomes a template: nothing that was started in it may run on where it is restored, and what its guest has seen of
    /// the host is compared each time.
    is_template: bool,
    alone: Mutex<()>,
    paused: watch::Sender<bool>,
    /// What of it others see.
    shown: watch::Sender<bool>,
}

impl Still {
    pub(super) fn new(
        machine: Arc<dyn Machine>,
        network: Arc<Network>,
        opener: Opener,
        epoch: u32,
        is_template: bool,
    ) -> Self {
        let (paused, shown) = (watch::Sender::new(false), watch::Sender::new(false));
        Self { machine, network, opener, epoch, is_template, alone: Mutex::new(()), paused, shown }
    }

    /// Whether its user has paused it.
    pub(super) fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }

    /// Tells of each pause and its end.
    pub(super) fn watch(&self) -> watch::Receiver<bool> {
        self.paused.subscribe()
    }

    /// Others see now whether it is paused.
    pub(super) fn show(&self, paused: bool) {
        self.shown.send_replace(paused);
    }

    /// Waits until others see it: who asked may look next. Not for those who end the machine: then nobody shows it.
    pub(super) async fn until_shown(&self, paused: bool) {
        // The sender is this one's own.
        let _ = self.shown.subscribe().wait_for(|shown| *shown == paused).await;
    }

    pub(super) async fn pause(&self) -> Result<(), Problem> {
        let _alone = self.alone.lock().await;
        if !self.is_paused() {
            self.machine.pause().await.map_err(refused)?;
            self.paused.send_replace(true);
        }
        Ok(())
    }

    pub(super) async fn resume(&self) -> Result<(), Problem> {
        let _alone = self.alone.lock().await;
        if self.is_paused() {
            self.machine.resume().await.map_err(refused)?;
            self.paused.send_replace(false);
            self.set_clock().await;
        }
        Ok(())
    }

    /// The guest's clock stood still as well. One that does not take the time has other troubles, which whoever talks to it
    /// next is told.
    async fn set_clock(&self) {
        if !matches!(tokio::time::timeout(QUIET_PATIENCE, clock::set(&self.opener)).await, Ok(Some(()))) {
            tracing::warn!("the guest's clock could not be set");
        }
    }

    /// Saves the machine for `client`, and has it stand still until the client is done.
    pub(super) async fn save(&self, client: &mut UnixStream, exports: &Exports) -> Result<(), Problem> {
        let _alone = self.alone.lock().await;
        if self.is_paused() {
            self.machine.resume().await.map_err(refused)?;
        }
        let quiet = tokio::time::timeout(QUIET_PATIENCE, self.quiet()).await;
        let quiet = quiet.unwrap_or_else(|_| Err(plain("save", "the guest does not come to rest", None)));
        let result = match &quiet {
            Ok(_) => self.stand_still(client, exports).await,
            Err(problem) => Err(problem.clone()),
        };
        drop(quiet);
        if self.is_paused() {
            self.machine.pause().await.map_err(refused)?;
        } else {
            self.set_clock().await;
        }
        result
    }

    /// Brings the guest to rest for as long as the stream is held.
    async fn quiet(&self) -> Result<Stream, Problem> {
        let broken = |error: &dyn std::error::Error| problem("guest-protocol", error, None);
        let mut stream = self.opener.open().await.map_err(|error| broken(&error))?;
        let programs = self.is_template.then_some(Programs::End);
        frame::write(&mut stream, &Request::Quiesce { programs }).await.map_err(|error| broken(&error))?;
        match frame::read(&mut stream).await.map_err(|error| broken(&error))? {
            Reply::Done => Ok(stream),
            Reply::Failed { message } => Err(plain("save", crate::printable(&message), None)),
        }
    }

    async fn stand_still(&self, client: &mut UnixStream, exports: &Exports) -> Result<(), Problem> {
        self.machine.pause().await.map_err(refused)?;
        let given = tokio::time::timeout(COPY_PATIENCE, self.give(client, exports)).await;
        // Whatever came of it.
        self.machine.resume().await.map_err(refused)?;
        given.unwrap_or_else(|_| Err(plain("save", "the client took too long to copy the machine", None)))
    }

    async fn give(&self, client: &mut UnixStream, exports: &Exports) -> Result<(), Problem> {
        let devices = ByteBuf::from(self.machine.save().await.map_err(refused)?);
        let tables = exports.save(self.is_template);
        let file_systems = tables.iter().map(|(tag, table)| (tag.clone(), table.len() as u64)).collect();
        let connections = self.network.flows().into_iter().map(|flow| Connection {
            guest_port: flow.guest_port,
            address: flow.remote.ip().octets(),
            port: flow.remote.port(),
        });
        let connections = connections.collect();
        let saved = Saved { epoch: self.epoch, devices, file_systems, connections };
        let saved = ControlReply::Saved(Box::new(saved));
        frame::write(client, &saved).await.map_err(|error| problem("control", &error, None))?;
        let sent = async {
            for (_, table) in &tables {
                client.write_all(table).await?;
            }
            // It says nothing more, and closes.
            client.read(&mut [0]).await
        };
        sent.await.map(drop).map_err(|error| problem("control", &error, None))
    }
}

fn refused(error: agentkernel_machine::MachineError) -> Problem {
    problem("machine", &error, None)
}
