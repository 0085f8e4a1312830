//! The network of a machine, in user space: no TAP device, no root, nothing left behind.
//!
//! ```text
//! QEMU ── frames ──> link ── IPv4 ──┬─ TCP  connection   its own small TCP   <──>  a socket of the host's
//!                                   ├─ UDP  datagrams                        <──>  a socket of the host's
//!                                   └─ port 53   names, policed              <──>  the host's name servers
//! ```
//! One thread for each machine, which confines itself before it reads a frame. Every connection passes [`decide`] before a
//! socket of the host's is opened. All state is bounded, see [`budget`].

mod budget;
mod connection;
mod datagrams;
mod decide;
#[cfg(fuzzing)]
pub mod fuzzing;
mod inspect;
mod link;
mod names;
mod packet;
mod proxy;

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use smoltcp::wire::Icmpv4DstUnreachable;
use tokio::sync::oneshot;

use crate::Policy;
use crate::audit::AuditLog;
use budget::{Budget, CONNECTION_TASKS, CONNECTIONS, Slots};
use connection::{Connection, GivenUp};
use datagrams::Conversations;
use decide::Decisions;
use link::Link;
use names::NameServer;
use packet::{Content, Packet, Written};

/// The host's end of the link: gateway, name server, and the host's own 127.0.0.1 where a rule lifts that. Of 192.0.0.0/29,
/// which is set aside for such links (RFC 7335).
pub const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 1);
/// The guest's end of the link.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 2);
/// Length of the link's prefix.
pub const PREFIX: u8 = 29;
/// Largest IP packet on the link, bytes.
pub const MTU: u16 = 16_384;
/// The name of [`HOST`].
pub const HOST_NAME: &str = "host.agentkernel.internal";
/// The Ethernet address of the guest's card.
pub const GUEST_HARDWARE_ADDRESS: [u8; 6] = [0x02, 0x61, 0x6b, 0, 0, 2];

/// What a thread does to confine itself; the text says why it could not.
pub type Confinement = Box<dyn FnOnce() -> Result<(), String> + Send>;

/// What a network is made of.
pub struct Settings {
    /// What may be reached.
    pub policy: Policy,
    /// The host's name servers.
    pub resolvers: Vec<SocketAddr>,
    /// The proxy that connections to the outside go through.
    pub proxy: Option<Proxy>,
    /// Ports of the host that lead into the machine, listening already.
    pub published: Vec<Published>,
    /// Where every decision is recorded.
    pub audit: AuditLog,
    /// Connections that the machine was saved with: they are reset as soon as it runs.
    pub broken: Vec<Flow>,
    /// Done by the network's thread before it reads the first frame.
    pub confine: Confinement,
}

/// A proxy of the host's environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Its URL, as in `HTTPS_PROXY`: `http://[USER:PASSWORD@]HOST[:PORT]`.
    pub url: String,
    /// What is reached without it, as in `NO_PROXY`: names, suffixes, addresses, ranges, `*`.
    pub except: String,
}

/// A port of the host's that leads into the machine.
#[derive(Debug)]
pub struct Published {
    /// The host's socket.
    pub upstream: Upstream,
    /// The guest's port.
    pub guest_port: u16,
}

/// A socket of the host's for a published port.
#[derive(Debug)]
pub enum Upstream {
    /// TCP, listening.
    Tcp(TcpListener),
    /// UDP, bound.
    Udp(UdpSocket),
}

/// An open TCP connection of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Flow {
    /// The guest's port.
    pub guest_port: u16,
    /// The other end, as the guest sees it.
    pub remote: SocketAddrV4,
}

/// When connections that a saved machine had are reset, after its start: until it runs, and has read the first, more are sent.
const PROVOKED: [Duration; 8] = [
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(10),
    Duration::from_secs(30),
    Duration::from_secs(90),
];
/// Most connections of a saved machine that are reset.
const BROKEN_LIMIT: usize = CONNECTIONS;

/// A running network. It ends when this is dropped, or when the machine closes its end.
#[derive(Debug)]
pub struct Network {
    flows: Arc<Mutex<BTreeSet<Flow>>>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Network {
    /// Starts a network on a thread of its own. `frames` is the other end of QEMU's `-netdev stream`: each Ethernet frame
    /// follows its length as four bytes, big-endian.
    ///
    /// # Errors
    /// If the thread cannot be started, or could not confine itself.
    pub fn start(settings: Settings, frames: UnixStream) -> io::Result<Self> {
        let flows = Arc::new(Mutex::new(settings.broken.iter().take(BROKEN_LIMIT).copied().collect()));
        let (end, ending) = oneshot::channel();
        let (started, starts) = mpsc::channel();
        let shared = flows.clone();
        let thread = thread::Builder::new().name("network".to_owned()).spawn(move || {
            let runtime = match prepare(settings, &frames) {
                Ok(prepared) => prepared,
                Err(error) => return drop(started.send(Err(error))),
            };
            let (runtime, settings) = runtime;
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, async {
                match Inner::new(settings, shared) {
                    Ok((inner, published)) => {
                        let _ = started.send(Ok(()));
                        inner.run(frames, published, ending).await;
                    }
                    Err(error) => drop(started.send(Err(error))),
                }
            });
        })?;
        match starts.recv() {
            Ok(Ok(())) => Ok(Self { flows, end: Some(end), thread: Some(thread) }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the network's thread ended")),
        }
    }

    /// The TCP connections that are open now, and those of the saved machine that are not reset yet.
    pub fn flows(&self) -> Vec<Flow> {
        self.flows.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Confines this thread, which then makes what its tasks run on.
fn prepare(mut settings: Settings, frames: &UnixStream) -> io::Result<(tokio::runtime::Runtime, Settings)> {
    let confine = std::mem::replace(&mut settings.confine, Box::new(|| Ok(())));
    confine().map_err(io::Error::other)?;
    frames.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok((runtime, settings))
}

/// What all tasks of a network share.
struct Inner {
    link: Link,
    decisions: Decisions,
    name_server: NameServer,
    proxy: Option<proxy::Proxy>,
    budget: Rc<Budget>,
    connections: RefCell<HashMap<Flow, Rc<Connection>>>,
    connection_tasks: Rc<Slots>,
    conversations: Conversations,
    /// Where a datagram is read into before it is passed on.
    datagram: RefCell<Vec<u8>>,
    /// Connections of the saved machine that are not reset yet.
    broken: RefCell<BTreeSet<Flow>>,
    flows: Arc<Mutex<BTreeSet<Flow>>>,
}

impl Inner {
    fn new(settings: Settings, flows: Arc<Mutex<BTreeSet<Flow>>>) -> io::Result<(Rc<Self>, Vec<Published>)> {
        let proxy =
            settings.proxy.as_ref().map(|proxy| proxy::Proxy::parse(&proxy.url, &proxy.except)).transpose();
        let inner = Self {
            link: Link::default(),
            decisions: Decisions::new(settings.policy, settings.audit),
            name_server: NameServer::new(&settings.resolvers)?,
            proxy: proxy.map_err(|reason| io::Error::new(io::ErrorKind::InvalidInput, reason))?,
            budget: Budget::new(),
            connections: RefCell::default(),
            connection_tasks: Slots::new(CONNECTION_TASKS),
            conversations: Conversations::default(),
            datagram: RefCell::new(vec![0; 64 << 10]),
            broken: RefCell::new(settings.broken.into_iter().take(BROKEN_LIMIT).collect()),
            flows,
        };
        Ok((Rc::new(inner), settings.published))
    }

    async fn run(
        self: Rc<Self>,
        frames: UnixStream,
        published: Vec<Published>,
        ending: oneshot::Receiver<()>,
    ) {
        for port in published {
            if let Err(error) = self.clone().publish(port) {
                tracing::warn!("a published port is not served: {error}");
            }
        }
        let (reader, writer) = match tokio::net::UnixStream::from_std(frames) {
            Ok(stream) => stream.into_split(),
            Err(error) => return tracing::warn!("the machine's network is not served: {error}"),
        };
        tokio::task::spawn_local(self.clone().provoke());
        let taking = self.clone();
        tokio::select! {
            result = self.link.read(reader, |packet| taking.take(packet)) => {
                if let Err(error) = result {
                    tracing::debug!("the machine's network ends: {error}");
                }
            }
            error = self.link.drain(writer) => tracing::debug!("the machine's network ends: {error}"),
            _ = ending => {}
        }
    }

    fn publish(self: Rc<Self>, port: Published) -> io::Result<()> {
        match port.upstream {
            Upstream::Tcp(listener) => {
                listener.set_nonblocking(true)?;
                let listener = tokio::net::TcpListener::from_std(listener)?;
                tokio::task::spawn_local(connection::publish(self, listener, port.guest_port));
            }
            Upstream::Udp(socket) => {
                socket.set_nonblocking(true)?;
                let socket = tokio::net::UdpSocket::from_std(socket)?;
                tokio::task::spawn_local(datagrams::publish(self, socket, port.guest_port));
            }
        }
        Ok(())
    }

    /// Takes a packet of the guest's.
    fn take(self: &Rc<Self>, bytes: &[u8]) {
        // Only the guest's own address may send here.
        let Some(packet) = Packet::parse(bytes).filter(|packet| packet.source == GUEST) else { return };
        match packet.content {
            Content::Tcp(segment) => {
                let flow = Flow {
                    guest_port: segment.source,
                    remote: SocketAddrV4::new(packet.destination, segment.destination),
                };
                let known = self.connections.borrow().get(&flow).cloned();
                match known {
                    Some(connection) if segment.begins && connection.is_replaced(segment) => {
                        connection.give_up(GivenUp::Replaced);
                        self.forget(flow, &connection);
                        connection::take(self, &packet, segment);
                    }
                    Some(connection) => connection.take(&self.link, &packet, segment),
                    None => connection::take(self, &packet, segment),
                }
            }
            Content::Udp { source, destination, payload } => {
                datagrams::take(self, &packet, source, destination, payload);
            }
            Content::Echo { identifier, sequence, payload } if packet.destination == HOST => {
                self.link.write(&Written::echo(&packet, identifier, sequence, payload));
            }
            // Nothing but TCP and UDP is carried, and whoever waits is told so. Errors are not answered with errors.
            Content::Echo { .. } => {
                self.link.write(&Written::unreachable(&packet, Icmpv4DstUnreachable::CommProhibited));
            }
            Content::Other => {}
        }
    }

    /// Counts a connection in; the one that has to go for it, if there are too many.
    fn register(&self, flow: Flow, connection: &Rc<Connection>) -> Option<Rc<Connection>> {
        let mut connections = self.connections.borrow_mut();
        let mut flows = self.flows.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = (connections.len() >= CONNECTIONS)
            .then(|| {
                connections.iter().min_by_key(|(_, connection)| connection.heard()).map(|(flow, _)| *flow)
            })
            .flatten();
        let oldest = oldest.and_then(|oldest| {
            flows.remove(&oldest);
            connections.remove(&oldest)
        });
        connections.insert(flow, connection.clone());
        flows.insert(flow);
        oldest
    }

    fn is_open(&self, flow: Flow) -> bool {
        self.connections.borrow().contains_key(&flow)
    }

    /// Whether the guest knows of no such connection.
    fn is_free(&self, flow: Flow) -> bool {
        !self.is_open(flow) && !self.broken.borrow().contains(&flow)
    }

    fn forget(&self, flow: Flow, connection: &Rc<Connection>) {
        let mut connections = self.connections.borrow_mut();
        if connections.get(&flow).is_some_and(|known| Rc::ptr_eq(known, connection)) {
            connections.remove(&flow);
            self.flows.lock().unwrap_or_else(PoisonError::into_inner).remove(&flow);
        }
    }

    /// The guest knows that a connection of the saved machine is gone.
    fn settled(&self, flow: Flow) {
        if self.broken.borrow_mut().remove(&flow) && !self.is_open(flow) {
            self.flows.lock().unwrap_or_else(PoisonError::into_inner).remove(&flow);
        }
    }

    /// Has the guest say something on each connection that the saved machine had, which is then answered with a reset:
    /// whoever only waits on one would wait for ever.
    async fn provoke(self: Rc<Self>) {
        for delay in PROVOKED {
            tokio::time::sleep(delay).await;
            if self.broken.borrow().is_empty() {
                return;
            }
            for flow in &*self.broken.borrow() {
                let mut sequence = [0; 4];
                let _ = rustix::rand::getrandom(&mut sequence, rustix::rand::GetRandomFlags::empty());
                let segment =
                    packet::provoking(flow.remote.port(), flow.guest_port, u32::from_ne_bytes(sequence));
                self.link.write(&Written::tcp(*flow.remote.ip(), GUEST, segment));
            }
        }
    }
}
