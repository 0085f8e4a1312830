//! TCP: each connection of the guest's has a small stack of its own here, and a socket of the host's.
//!
//! ```text
//! SYN ─► policy ─► the host connects ─► SYN-ACK        refused: RST; nobody there: RST
//! ```
//! The guest is answered only when the host is connected, so that it sees what the host sees. Packets are taken in as they
//! are read; nothing is queued but in the buffers of a connection, whose windows bound them.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::rc::Rc;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{self, State};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, IpEndpoint, IpListenEndpoint};
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use super::budget::{Share, Slot};
use super::datagrams::published;
use super::decide::{Permit, Scrutiny};
use super::inspect::{self, Beginning};
use super::link::{Link, Wire};
use super::packet::{Content, Packet, Segment, Written};
use super::{Flow, GUEST, HOST, Inner, names};
use crate::Protocol;
use crate::audit::{Entry, Kind, Verdict};

/// How long the host may take to connect.
const CONNECT: Duration = Duration::from_secs(30);
/// How long a guest may take to answer at a published port.
const ANSWER: Duration = Duration::from_secs(30);
/// How long the guest may take to acknowledge the last byte after the host's end is closed.
const LINGER: Duration = Duration::from_secs(60);
/// First port of the host's end of connections that begin at a published port.
const FIRST_PORT: u16 = 32_768;
/// How long the end of a connection to the name server may take.
const GOODBYE: Duration = Duration::from_secs(5);
/// Longest SYN, bytes: with headers of the largest size. What one carries beyond (RFC 7413) is not waited with; its sender
/// tries again without.
const SYN_LIMIT: usize = 120;
/// When the host's end is asked whether it is still there, as nothing was said for so long.
const KEEP_ALIVE: Duration = Duration::from_secs(120);
/// Longest question over TCP, bytes, with its length.
const QUESTION: usize = 2 + (2 << 10);

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
            Self::TooMany => format!(
                "more than {} connections: the oldest idle one was given up",
                super::budget::CONNECTIONS
            ),
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

/// A TCP of one connection.
struct Stack {
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    began: Instant,
    _share: Share,
}

impl Stack {
    fn new(link: &Link, own: SocketAddrV4, share: Share) -> Self {
        let began = Instant::now();
        let mut config = Config::new(HardwareAddress::Ip);
        let mut seed = [0; 8];
        let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
        config.random_seed = u64::from_ne_bytes(seed);
        let mut interface =
            Interface::new(config, &mut Wire { input: None, link, is_urgent: false }, StackInstant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // The whole world is on this link.
            let _ = addresses.push(IpCidr::new(IpAddress::Ipv4(*own.ip()), 0));
        });
        let buffer = |size| tcp::SocketBuffer::new(vec![0; size]);
        let mut socket = tcp::Socket::new(buffer(share.guests()), buffer(share.hosts()));
        socket.set_nagle_enabled(false);
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Self { interface, sockets, handle, began, _share: share }
    }

    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    fn now(&self) -> StackInstant {
        StackInstant::from_micros(i64::try_from(self.began.elapsed().as_micros()).unwrap_or(i64::MAX))
    }

    /// Takes a packet, and sends what is to be sent.
    fn poll(&mut self, link: &Link, input: Option<&[u8]>) {
        let now = self.now();
        self.interface.poll(now, &mut Wire { input, link, is_urgent: false }, &mut self.sockets);
    }

    /// Says its last, also on a link that is full: nothing would say it again.
    fn finish(&mut self, link: &Link) {
        // It may hold an acknowledgement back for as long as this.
        let now = self.now() + self.socket().ack_delay().unwrap_or_default();
        self.interface.poll(now, &mut Wire { input: None, link, is_urgent: true }, &mut self.sockets);
    }

    /// How long until it has something to do by itself.
    fn delay(&mut self) -> Option<Duration> {
        let now = self.now();
        self.interface.poll_delay(now, &self.sockets).map(Into::into)
    }

    /// Whether the guest will say no more, and all it said was read.
    fn has_heard_all(&mut self) -> bool {
        let socket = self.socket();
        let begun = !matches!(socket.state(), State::Listen | State::SynSent | State::SynReceived);
        begun && !socket.may_recv()
    }

    fn abort(&mut self, link: &Link) {
        self.socket().abort();
        self.finish(link);
    }
}

/// Takes a segment that belongs to no connection.
pub(super) fn take(inner: &Rc<Inner>, packet: &Packet<'_>, segment: Segment) {
    let flow = Flow {
        guest_port: segment.source,
        remote: SocketAddrV4::new(packet.destination, segment.destination),
    };
    if segment.resets {
        inner.settled(flow);
        return;
    }
    if !segment.begins {
        inner.settled(flow);
        reset(inner, packet, segment);
        return;
    }
    inner.settled(flow);
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

/// What is left to do on a connection.
struct Progress {
    /// The host said its last.
    host_ended: bool,
    /// The host was told that the guest said its last.
    guest_ended: bool,
    /// The host's socket takes no more for now.
    host_is_full: bool,
    /// What the guest begins with was looked at.
    judged: bool,
}

/// Passes bytes between guest and host until both have said all.
async fn pass(inner: &Inner, connection: &Connection, host: &TcpStream, permit: Option<&Permit>) -> Outcome {
    let watched = permit.filter(|permit| permit.scrutiny != Scrutiny::None);
    let mut progress =
        Progress { host_ended: false, guest_ended: false, host_is_full: false, judged: watched.is_none() };
    let mut lingers = None;
    loop {
        if let Some(why) = connection.given_up.get() {
            let _ = host.set_zero_linger();
            return Outcome::GivenUp(why);
        }
        let (delay, interest, waits) = {
            let mut stack = connection.stack.borrow_mut();
            let Some(stack) = stack.as_mut() else { return Outcome::Complete };
            // A stack that was reset before it was open listens again.
            let is_reset = matches!(stack.socket().state(), State::Closed | State::Listen);
            if is_reset && !(progress.host_ended && progress.guest_ended) {
                let _ = host.set_zero_linger();
                return Outcome::Broken("the guest reset it".to_owned());
            }
            if !progress.judged
                && let Some(permit) = watched
            {
                match judge(inner, stack, permit) {
                    Judgement::Later => {}
                    Judgement::Good => progress.judged = true,
                    Judgement::Bad => {
                        let _ = host.set_zero_linger();
                        return Outcome::Refused;
                    }
                }
            }
            if let Err(error) = transfer(connection, stack, host, &mut progress) {
                return Outcome::Broken(error.to_string());
            }
            stack.poll(&inner.link, None);
            let socket = stack.socket();
            match socket.state() {
                State::Closed | State::TimeWait if progress.host_ended && progress.guest_ended => {
                    return Outcome::Complete;
                }
                State::Closed => {
                    let _ = host.set_zero_linger();
                    return Outcome::Broken("the guest reset it".to_owned());
                }
                _ => {}
            }
            let reads = !progress.host_ended && socket.can_send();
            let writes = progress.host_is_full && socket.can_recv();
            let interest = match (reads, writes) {
                (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
                (true, false) => Some(Interest::READABLE),
                (false, true) => Some(Interest::WRITABLE),
                (false, false) => None,
            };
            (stack.delay(), interest, !inner.link.has_room())
        };
        if progress.host_ended && progress.guest_ended {
            let since = *lingers.get_or_insert_with(Instant::now);
            if since.elapsed() > LINGER {
                return Outcome::Broken("the guest does not acknowledge the end".to_owned());
            }
        }
        let delay = delay.or(lingers.map(|_| LINGER));
        tokio::select! {
            () = connection.event.notified() => {}
            // A link that is full is no reason to look again before it is not.
            () = inner.link.emptied.notified(), if waits => {}
            () = sleep(delay), if delay.is_some() && !waits => {}
            ready = ready(host, interest), if interest.is_some() => {
                if let Err(error) = ready {
                    return Outcome::Broken(error.to_string());
                }
                connection.heard.set(Instant::now());
            }
        }
    }
}

async fn sleep(delay: Option<Duration>) {
    match delay {
        // Another task's turn.
        Some(Duration::ZERO) => tokio::task::yield_now().await,
        Some(delay) => tokio::time::sleep(delay).await,
        None => {}
    }
}

async fn ready(host: &TcpStream, interest: Option<Interest>) -> io::Result<()> {
    match interest {
        Some(interest) => host.ready(interest).await.map(drop),
        None => Ok(()),
    }
}

/// Moves what can be moved without waiting.
fn transfer(
    connection: &Connection,
    stack: &mut Stack,
    host: &TcpStream,
    progress: &mut Progress,
) -> io::Result<()> {
    let closed = || io::Error::from(io::ErrorKind::NotConnected);
    progress.host_is_full = false;
    while progress.judged && stack.socket().can_recv() && !progress.host_is_full {
        let result = stack.socket().recv(|bytes| match host.try_write(bytes) {
            Ok(count) => (count, Ok(count)),
            Err(error) => (0, Err(error)),
        });
        match result.map_err(|_| closed())? {
            Ok(0) => progress.host_is_full = true,
            Ok(count) => connection.sent.set(connection.sent.get() + count as u64),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => progress.host_is_full = true,
            Err(error) => return Err(error),
        }
    }
    if stack.has_heard_all() && !progress.guest_ended {
        progress.guest_ended = true;
        // One that has ended already needs no telling.
        let _ = rustix::net::shutdown(host, rustix::net::Shutdown::Write);
    }
    let mut is_empty = false;
    while !progress.host_ended && !is_empty && stack.socket().can_send() {
        let result = stack.socket().send(|buffer| match host.try_read(buffer) {
            Ok(count) => (count, Ok(count)),
            Err(error) => (0, Err(error)),
        });
        match result.map_err(|_| closed())? {
            Ok(0) => progress.host_ended = true,
            Ok(count) => connection.received.set(connection.received.get() + count as u64),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => is_empty = true,
            Err(error) => return Err(error),
        }
    }
    if progress.host_ended {
        stack.socket().close();
    }
    Ok(())
}

enum Judgement {
    Later,
    Good,
    Bad,
}

/// Looks at what the guest says first, which is still in its buffer.
fn judge(inner: &Inner, stack: &mut Stack, permit: &Permit) -> Judgement {
    let has_ended = stack.has_heard_all();
    let socket = stack.socket();
    let is_full = socket.recv_queue() >= socket.recv_capacity().min(inspect::LIMIT);
    // Nothing was taken out yet, so it lies in one piece.
    let bytes = socket.peek(inspect::LIMIT).unwrap_or_default();
    let names = match inspect::beginning(bytes) {
        Beginning::Partial if has_ended && bytes.is_empty() => return Judgement::Good,
        Beginning::Partial if is_full || has_ended => {
            inner.decisions.unreadable(permit, "whom it is for cannot be told from what it begins with");
            return Judgement::Bad;
        }
        Beginning::Partial => return Judgement::Later,
        Beginning::Other => return Judgement::Good,
        Beginning::Malformed(reason) => {
            inner.decisions.unreadable(permit, reason);
            return Judgement::Bad;
        }
        Beginning::Tls(None) if permit.scrutiny == Scrutiny::Listed => {
            inner.decisions.unreadable(permit, "its TLS names no server, so that the rule cannot be checked");
            return Judgement::Bad;
        }
        Beginning::Tls(name) => name.into_iter().collect(),
        Beginning::Http(names) => names,
    };
    match names.iter().all(|name| inner.decisions.says(permit, name)) {
        true => Judgement::Good,
        false => Judgement::Bad,
    }
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
    let remote = IpEndpoint::new(IpAddress::Ipv4(GUEST), flow.guest_port);
    let local = IpListenEndpoint { addr: Some(IpAddress::Ipv4(*flow.remote.ip())), port: flow.remote.port() };
    let Stack { interface, sockets, handle, .. } = &mut stack;
    // Fails only for a port 0, which is not published.
    let _ = sockets.get_mut::<tcp::Socket<'_>>(*handle).connect(interface.context(), remote, local);
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

/// Answers questions for names over TCP (RFC 7766), one after the other.
async fn answer_questions(inner: Rc<Inner>, connection: Rc<Connection>, flow: Flow) {
    let mut question = Vec::new();
    while let Some(bytes) = receive(&inner, &connection).await {
        question.extend(bytes);
        let complete = question.split_first_chunk::<2>().and_then(|(length, rest)| {
            let length = usize::from(u16::from_be_bytes(*length));
            rest.get(..length).map(|bytes| (bytes.to_vec(), 2 + length))
        });
        match complete {
            None if question.len() > QUESTION => break,
            None => continue,
            Some((bytes, used)) => {
                question.drain(..used);
                let Some(answer) = inner.name_server.answer(&inner.decisions, &bytes, false).await else {
                    break;
                };
                let length = u16::try_from(answer.len()).unwrap_or(u16::MAX);
                if !send(&inner, &connection, &[&length.to_be_bytes(), &answer[..]].concat()).await {
                    break;
                }
            }
        }
    }
    let goodbye = with_stack(&inner, &connection, |stack| {
        stack.socket().close();
        matches!(stack.socket().state(), State::Closed | State::TimeWait).then_some(())
    });
    let _ = tokio::time::timeout(GOODBYE, goodbye).await;
    let replaced = connection.given_up.get() == Some(GivenUp::Replaced);
    if let Some(mut stack) = connection.stack.borrow_mut().take()
        && !replaced
    {
        match stack.socket().state() {
            State::Closed | State::TimeWait => stack.finish(&inner.link),
            _ => stack.abort(&inner.link),
        }
    }
    inner.forget(flow, &connection);
}

/// What the guest says next, at most as much as one question; `None` if it says no more. An empty answer means to look
/// again at what is there.
async fn receive(inner: &Inner, connection: &Connection) -> Option<Vec<u8>> {
    with_stack(inner, connection, |stack| {
        if stack.socket().can_recv() {
            let mut bytes = vec![0; QUESTION];
            let count = stack.socket().recv_slice(&mut bytes).unwrap_or(0);
            bytes.truncate(count);
            return Some(Some(bytes));
        }
        (stack.has_heard_all() || stack.socket().state() == State::Closed).then_some(None)
    })
    .await
    .flatten()
}

/// Sends all of it; false if the guest is gone.
async fn send(inner: &Inner, connection: &Connection, bytes: &[u8]) -> bool {
    let mut rest = bytes;
    let sent = with_stack(inner, connection, |stack| {
        while !rest.is_empty() {
            match stack.socket().send_slice(rest) {
                Ok(0) => return None,
                Ok(count) => rest = &rest[count..],
                Err(_) => return Some(false),
            }
        }
        // The last answer must be gone before the stack is.
        (stack.socket().send_queue() == 0).then_some(true)
    });
    sent.await.unwrap_or(false)
}

/// Looks at a connection's stack whenever something happened, until there is an answer; `None` if it was given up.
async fn with_stack<T>(
    inner: &Inner,
    connection: &Connection,
    mut look: impl FnMut(&mut Stack) -> Option<T>,
) -> Option<T> {
    loop {
        let delay = {
            let mut stack = connection.stack.borrow_mut();
            let stack = stack.as_mut().filter(|_| connection.given_up.get().is_none())?;
            stack.poll(&inner.link, None);
            let answer = look(stack);
            stack.poll(&inner.link, None);
            if answer.is_some() {
                return answer;
            }
            stack.delay()
        };
        let waits = !inner.link.has_room();
        tokio::select! {
            () = connection.event.notified() => {}
            () = inner.link.emptied.notified(), if waits => {}
            () = sleep(delay), if delay.is_some() && !waits => {}
        }
    }
}
