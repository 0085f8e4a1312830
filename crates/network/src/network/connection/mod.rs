//! TCP: each connection of the guest's has a small stack of its own here, and a socket of the host's.
//!
//! ```text
//! SYN ─► policy ─► the host connects ─► SYN-ACK        refused: RST; nobody there: RST
//! ```
//! The guest is answered only when the host is connected, so that it sees what the host sees. Packets are taken in as they
//! are read; nothing is queued but in the buffers of a connection, whose windows bound them.

mod pass;
mod questions;
mod stack;

use std::cell::{Cell, RefCell};
use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::rc::Rc;
use std::time::{Duration, Instant};

use smoltcp::socket::tcp::State;
use smoltcp::wire::{IpAddress, IpEndpoint, IpListenEndpoint};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use crate::Protocol;
use crate::audit::{Entry, Kind, Verdict};
use crate::network::budget::{CONNECTIONS, Slot};
use crate::network::datagrams::published;
use crate::network::decide::Permit;
use crate::network::link::Link;
use crate::network::packet::{Content, Packet, Segment, Written};
use crate::network::{Flow, GUEST, HOST, Inner, names};
use pass::pass;
use questions::answer_questions;
use stack::Stack;

/// How long the host may take to connect.
const CONNECT: Duration = Duration::from_secs(30);
/// How long a guest may take to answer at a published port.
const ANSWER: Duration = Duration::from_secs(30);
/// First port of the host's end of connections that begin at a published port.
const FIRST_PORT: u16 = 32_768;
/// Longest SYN, bytes: with headers of the largest size. What one carries beyond (RFC 7413) is not waited with; its sender
/// tries again without.
const SYN_LIMIT: usize = 120;
/// When the host's end is asked whether it is still there, as nothing was said for so long.
const KEEP_ALIVE: Duration = Duration::from_secs(120);

/// A connection of the guest's.
pub(super) struct Connection {
    stack: RefCell<Option<Stack>>,
    /// Something happened to it.
    event: Notify,
    heard: Cell<Instant>,
    sent: Cell<u64>,
    received: Cell<u64>,
    given_up: Cell<Option<GivenUp>>,
    /// What the guest began it with; empty if the host did.
    syn: RefCell<Vec<u8>>,
    _slot: Slot,
}

/// Why a connection is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GivenUp {
    /// For another one.
    TooMany,
    /// The guest reset it before the host was connected.
    Reset,
    /// The guest uses its port anew.
    Replaced,
}

impl GivenUp {
    fn reason(self) -> String {
        match self {
            Self::TooMany => {
                format!("more than {} connections: the oldest idle one was given up", CONNECTIONS)
            }
            Self::Reset => "the guest gave it up before the host was connected".to_owned(),
            Self::Replaced => "the guest began it anew".to_owned(),
        }
    }

    fn verdict(self, otherwise: Verdict) -> Verdict {
        if self == Self::TooMany { Verdict::Dropped } else { otherwise }
    }
}

impl Connection {
    /// Begins one, for which the oldest idle one is given up if there are too many. `None` if those that were given up have
    /// yet to end: the guest tries again.
    fn begin(inner: &Inner, flow: Flow, syn: &[u8]) -> Option<Rc<Self>> {
        let slot = inner.connection_tasks.take()?;
        let connection = Rc::new(Self {
            stack: RefCell::new(None),
            event: Notify::new(),
            heard: Cell::new(Instant::now()),
            sent: Cell::new(0),
            received: Cell::new(0),
            given_up: Cell::new(None),
            syn: RefCell::new(syn.to_vec()),
            _slot: slot,
        });
        if let Some(oldest) = inner.register(flow, &connection) {
            oldest.give_up(GivenUp::TooMany);
        }
        Some(connection)
    }

    pub(super) fn heard(&self) -> Instant {
        self.heard.get()
    }

    /// Has its task reset and end it.
    pub(super) fn give_up(&self, why: GivenUp) {
        self.given_up.set(Some(why));
        self.event.notify_one();
    }

    /// Whether a SYN is of another connection from the same port: then the guest knows nothing of this one any more.
    pub(super) fn is_replaced(&self, segment: Segment) -> bool {
        if self.stack.borrow().is_none() {
            return false;
        }
        let syn = self.syn.borrow();
        let own = Packet::parse(&syn).map(|packet| packet.content);
        matches!(own, Some(Content::Tcp(own)) if own.sequence != segment.sequence)
    }

    /// Takes a segment of the guest's.
    pub(super) fn take(&self, link: &Link, packet: &Packet<'_>, segment: Segment) {
        self.heard.set(Instant::now());
        match &mut *self.stack.borrow_mut() {
            Some(stack) => stack.poll(link, Some(packet.bytes)),
            // The guest does not wait any more until the host is connected.
            None if segment.resets => self.given_up.set(Some(GivenUp::Reset)),
            // Its newest try is answered.
            None if segment.begins && packet.bytes.len() <= SYN_LIMIT => {
                packet.bytes.clone_into(&mut self.syn.borrow_mut());
                return;
            }
            None => return,
        }
        self.event.notify_one();
    }
}

/// Takes a segment that belongs to no connection.
pub(super) fn take(inner: &Rc<Inner>, packet: &Packet<'_>, segment: Segment) {
    let flow = Flow {
        guest_port: segment.source,
        remote: SocketAddrV4::new(packet.destination, segment.destination),
    };
    inner.settled(flow);
    if segment.resets {
        return;
    }
    if !segment.begins {
        reset(inner, packet, segment);
        return;
    }
    if packet.bytes.len() > SYN_LIMIT {
        return;
    }
    if segment.destination == names::PORT {
        let Some(connection) = Connection::begin(inner, flow, packet.bytes) else { return };
        listen(inner, &connection, flow, packet.bytes);
        tokio::task::spawn_local(answer_questions(inner.clone(), connection, flow));
        return;
    }
    let Some(permit) = inner.decisions.connect(packet.destination, segment.destination, Protocol::Tcp) else {
        reset(inner, packet, segment);
        return;
    };
    let Some(connection) = Connection::begin(inner, flow, packet.bytes) else { return };
    tokio::task::spawn_local(outgoing(inner.clone(), connection, flow, permit));
}

fn reset(inner: &Inner, packet: &Packet<'_>, segment: Segment) {
    inner.link.write(&Written::tcp(packet.destination, packet.source, segment.reset()));
}

/// Gives a connection its stack, which has the guest's SYN.
fn listen(inner: &Inner, connection: &Connection, flow: Flow, syn: &[u8]) {
    let mut stack = Stack::new(&inner.link, flow.remote, inner.budget.share());
    let endpoint =
        IpListenEndpoint { addr: Some(IpAddress::Ipv4(*flow.remote.ip())), port: flow.remote.port() };
    // Fails only for port 0, which no packet has here.
    let _ = stack.socket().listen(endpoint);
    stack.poll(&inner.link, Some(syn));
    *connection.stack.borrow_mut() = Some(stack);
}

/// A connection that the guest began.
async fn outgoing(inner: Rc<Inner>, connection: Rc<Connection>, flow: Flow, permit: Permit) {
    let began = Instant::now();
    let host = tokio::select! {
        biased;
        why = given_up(&connection) => Err((why.verdict(Verdict::Failed), why.reason())),
        host = tokio::time::timeout(CONNECT, connect(&inner, &permit)) => {
            let host = host.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            host.map_err(|error| (Verdict::Failed, error.to_string()))
        }
    };
    let syn = connection.syn.borrow().clone();
    let end = match host {
        Ok(host) => {
            inner.decisions.write(inner.decisions.entry(Verdict::Allowed, Kind::Tcp, &permit));
            listen(&inner, &connection, flow, &syn);
            pass(&inner, &connection, &host, Some(&permit)).await
        }
        Err((verdict, reason)) => {
            let entry = inner.decisions.entry(verdict, Kind::Tcp, &permit);
            inner.decisions.write(Entry { reason: Some(reason), ..entry });
            if let Some(packet) = Packet::parse(&syn)
                && let Content::Tcp(segment) = packet.content
            {
                reset(&inner, &packet, segment);
            }
            inner.forget(flow, &connection);
            return;
        }
    };
    ended(&inner, &connection, flow, &permit, Kind::Tcp, began, &end);
}

async fn given_up(connection: &Connection) -> GivenUp {
    loop {
        if let Some(why) = connection.given_up.get() {
            return why;
        }
        connection.event.notified().await;
    }
}

/// Connects as the host.
async fn connect(inner: &Inner, permit: &Permit) -> io::Result<TcpStream> {
    let name = permit.name.as_deref();
    let stream = match inner.proxy.as_ref().filter(|proxy| proxy.applies(permit.target, name)) {
        None => TcpStream::connect(permit.target).await?,
        Some(proxy) => {
            let address = inner.name_server.host(&proxy.host).await?;
            let stream = TcpStream::connect((address, proxy.port)).await?;
            // Where a rule allows the name, the proxy may resolve it; otherwise it connects to what was decided about.
            let target = match name.filter(|_| permit.grounds.is_name()) {
                Some(name) => format!("{name}:{}", permit.target.port()),
                None => permit.target.to_string(),
            };
            proxy.connect(stream, &target).await?
        }
    };
    prepare(&stream)?;
    Ok(stream)
}

/// What holds for sockets of the host's: the guest's own questions whether the host is still there end here.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    rustix::net::sockopt::set_socket_keepalive(stream, true)?;
    rustix::net::sockopt::set_tcp_keepidle(stream, KEEP_ALIVE)?;
    Ok(())
}

/// How a connection ended.
enum Outcome {
    /// Both sides said all they had to say.
    Complete,
    /// One side broke it off.
    Broken(String),
    /// The policy refuses what it began with; that is written down already.
    Refused,
    /// It was given up.
    GivenUp(GivenUp),
}

/// Writes down and forgets a connection that has ended.
fn ended(
    inner: &Inner,
    connection: &Rc<Connection>,
    flow: Flow,
    permit: &Permit,
    kind: Kind,
    began: Instant,
    outcome: &Outcome,
) {
    if let Some(mut stack) = connection.stack.borrow_mut().take() {
        match outcome {
            Outcome::Complete => stack.finish(&inner.link),
            // The guest has another connection there.
            Outcome::GivenUp(GivenUp::Replaced) => {}
            _ => stack.abort(&inner.link),
        }
    }
    inner.forget(flow, connection);
    let verdict = match outcome {
        Outcome::GivenUp(why) => why.verdict(Verdict::Ended),
        _ => Verdict::Ended,
    };
    let reason = match outcome {
        Outcome::Complete => None,
        Outcome::Broken(reason) => Some(reason.clone()),
        Outcome::Refused => Some("refused for what it began with".to_owned()),
        Outcome::GivenUp(why) => Some(why.reason()),
    };
    inner.decisions.write(Entry {
        sent: Some(connection.sent.get()),
        received: Some(connection.received.get()),
        lasted_ms: u64::try_from(began.elapsed().as_millis()).ok(),
        reason,
        ..inner.decisions.entry(verdict, kind, permit)
    });
}

/// Takes connections at a published port, for ever.
pub(super) async fn publish(inner: Rc<Inner>, listener: TcpListener, guest_port: u16) {
    let mut next_port = FIRST_PORT;
    loop {
        let (host, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors: some will be free again.
                tracing::debug!("a connection to a published port is not taken: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let flow = loop {
            let flow = Flow { guest_port, remote: SocketAddrV4::new(HOST, next_port) };
            next_port = next_port.checked_add(1).unwrap_or(FIRST_PORT);
            if inner.is_free(flow) {
                break flow;
            }
        };
        // As with a host that has no room for more.
        let Some(connection) = Connection::begin(&inner, flow, &[]) else { continue };
        tokio::task::spawn_local(incoming(inner.clone(), connection, flow, host, peer));
    }
}

/// A connection that began at a published port.
async fn incoming(
    inner: Rc<Inner>,
    connection: Rc<Connection>,
    flow: Flow,
    host: TcpStream,
    peer: SocketAddr,
) {
    let began = Instant::now();
    let permit = published(peer, flow.guest_port);
    inner.decisions.write(inner.decisions.entry(Verdict::Allowed, Kind::Published, &permit));
    let _ = prepare(&host);
    let mut stack = Stack::new(&inner.link, flow.remote, inner.budget.share());
    stack.connect(flow.remote, IpEndpoint::new(IpAddress::Ipv4(GUEST), flow.guest_port));
    stack.poll(&inner.link, None);
    *connection.stack.borrow_mut() = Some(stack);
    let mut outcome = None;
    let deadline = began + ANSWER;
    while outcome.is_none() {
        if let Some(why) = connection.given_up.get() {
            outcome = Some(Outcome::GivenUp(why));
            break;
        }
        let (state, delay) = match &mut *connection.stack.borrow_mut() {
            Some(stack) => {
                stack.poll(&inner.link, None);
                (stack.socket().state(), stack.delay())
            }
            None => (State::Closed, None),
        };
        match state {
            State::SynSent | State::SynReceived if Instant::now() > deadline => {
                outcome = Some(Outcome::Broken("nobody in the sandbox answers".to_owned()));
            }
            State::SynSent | State::SynReceived => {
                let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                // Time is up for what a full link does not take as well, which is no reason to look all the time.
                let delay = delay.filter(|delay| !delay.is_zero() || inner.link.has_room());
                let delay = delay.unwrap_or(left).min(left).max(Duration::from_millis(1));
                let waits = !inner.link.has_room();
                tokio::select! {
                    () = connection.event.notified() => {}
                    () = inner.link.emptied.notified(), if waits => {}
                    () = tokio::time::sleep(delay) => {}
                }
            }
            State::Closed => {
                outcome = Some(Outcome::Broken("nobody in the sandbox listens at that port".to_owned()));
            }
            _ => break,
        }
    }
    let outcome = match outcome {
        Some(outcome) => {
            let _ = host.set_zero_linger();
            outcome
        }
        None => pass(&inner, &connection, &host, None).await,
    };
    ended(&inner, &connection, flow, &permit, Kind::Published, began, &outcome);
}
