//! UDP: one socket of the host's for each pair of ports, as long as something is said on it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::net::SendFlags;
use smoltcp::wire::Icmpv4DstUnreachable;
use tokio::net::UdpSocket;
use tokio::sync::Notify;

use super::budget::{Slot, Slots};
use super::decide::Permit;
use super::packet::{Packet, Written};
use super::{Flow, GUEST, HOST, Inner, MTU, names};
use crate::Protocol;
use crate::audit::{Entry, Kind, Verdict};
use crate::policy::Grounds;

/// Most conversations at once; for another one the oldest idle one is given up.
const CONVERSATIONS: usize = 256;
/// Most tasks of conversations, those included that were given up and have not ended yet.
const TASKS: usize = CONVERSATIONS + 64;
/// How long nothing may be said (RFC 4787 asks for two minutes at least).
const IDLE: Duration = Duration::from_secs(120);
/// Bytes of headers of a datagram.
const HEADERS: usize = 28;
/// First port of the host's end of conversations that begin at a published port.
const FIRST_PORT: u16 = 32_768;

/// A conversation.
struct Conversation {
    way: Way,
    heard: Cell<Instant>,
    sent: Cell<u64>,
    received: Cell<u64>,
    given_up: Notify,
}

/// Where the guest's datagrams go.
enum Way {
    /// A socket that is connected to the target.
    Out(UdpSocket),
    /// Somebody who wrote to a published port.
    Back(Rc<UdpSocket>, SocketAddr),
}

/// All conversations.
pub(crate) struct Conversations {
    open: RefCell<HashMap<Flow, Rc<Conversation>>>,
    /// The host's ends of conversations that begin outside: (published port, who wrote).
    peers: RefCell<HashMap<(u16, SocketAddr), u16>>,
    next_port: Cell<u16>,
    tasks: Rc<Slots>,
    questions: Rc<Slots>,
}

impl Default for Conversations {
    fn default() -> Self {
        Self {
            open: RefCell::default(),
            peers: RefCell::default(),
            next_port: Cell::new(FIRST_PORT),
            tasks: Slots::new(TASKS),
            questions: Slots::new(names::PENDING),
        }
    }
}

impl Conversations {
    /// Makes room for another one. One whose turn it is to go is told so.
    fn make_room(&self) -> bool {
        let mut open = self.open.borrow_mut();
        if open.len() < CONVERSATIONS {
            return false;
        }
        let oldest = open.iter().min_by_key(|(_, conversation)| conversation.heard.get());
        if let Some(flow) = oldest.map(|(flow, _)| *flow)
            && let Some(conversation) = open.remove(&flow)
        {
            conversation.given_up.notify_one();
        }
        true
    }
}

/// Takes a datagram of the guest's.
pub(crate) fn take(inner: &Rc<Inner>, packet: &Packet<'_>, source: u16, destination: u16, payload: &[u8]) {
    let remote = SocketAddrV4::new(packet.destination, destination);
    if destination == names::PORT {
        if payload.len() > names::QUESTION_LIMIT {
            return;
        }
        let Some(slot) = inner.conversations.questions.take() else { return };
        let (inner, question) = (inner.clone(), payload.to_vec());
        tokio::task::spawn_local(async move {
            let _slot = slot;
            if let Some(answer) = inner.name_server.answer(&inner.decisions, &question, true).await {
                inner.link.write(&Written::udp(remote, SocketAddrV4::new(GUEST, source), &answer));
            }
        });
        return;
    }
    let flow = Flow { guest_port: source, remote };
    let known = inner.conversations.open.borrow().get(&flow).cloned();
    let conversation = match known {
        Some(conversation) => conversation,
        None => {
            let Some(permit) = inner.decisions.connect(packet.destination, destination, Protocol::Udp) else {
                inner.link.write(&Written::unreachable(packet, Icmpv4DstUnreachable::PortUnreachable));
                return;
            };
            // What is lost in a flood may be said again.
            let Some(slot) = inner.conversations.tasks.take() else { return };
            match begin(inner, flow, &permit, slot) {
                Ok(conversation) => conversation,
                Err(error) => {
                    let entry = inner.decisions.entry(Verdict::Failed, Kind::Udp, &permit);
                    inner.decisions.write(Entry { reason: Some(error.to_string()), ..entry });
                    inner.link.write(&Written::unreachable(packet, Icmpv4DstUnreachable::NetUnreachable));
                    return;
                }
            }
        }
    };
    conversation.heard.set(Instant::now());
    conversation.sent.set(conversation.sent.get() + payload.len() as u64);
    // One that does not fit the host's buffer is lost, as on any way.
    // Not by `try_send`, for which a socket must have waited before.
    let _ = match &conversation.way {
        Way::Out(socket) => rustix::net::send(socket, payload, SendFlags::DONTWAIT),
        Way::Back(socket, peer) => rustix::net::sendto(socket, payload, SendFlags::DONTWAIT, peer),
    };
}

fn begin(inner: &Rc<Inner>, flow: Flow, permit: &Permit, slot: Slot) -> std::io::Result<Rc<Conversation>> {
    let local: SocketAddr =
        if permit.target.ip().is_loopback() { (Ipv4Addr::LOCALHOST, 0) } else { (Ipv4Addr::UNSPECIFIED, 0) }
            .into();
    let socket = std::net::UdpSocket::bind(local)?;
    socket.set_nonblocking(true)?;
    socket.connect(permit.target)?;
    let conversation = open(inner, flow, Way::Out(UdpSocket::from_std(socket)?), permit.clone(), Kind::Udp);
    let (inner, hearing) = (inner.clone(), conversation.clone());
    let permit = permit.clone();
    tokio::task::spawn_local(async move {
        let _slot = slot;
        let Way::Out(socket) = &hearing.way else { return };
        let mut failed = None;
        loop {
            let left = (hearing.heard.get() + IDLE).saturating_duration_since(Instant::now());
            tokio::select! {
                readable = socket.readable() => {
                    if readable.is_err() {
                        break;
                    }
                }
                () = hearing.given_up.notified() => break,
                () = tokio::time::sleep(left), if !left.is_zero() => continue,
                () = std::future::ready(()), if left.is_zero() => break,
            }
            {
                let mut buffer = inner.datagram.borrow_mut();
                match socket.try_recv(&mut buffer) {
                    Ok(length) => hear(&inner, flow, &hearing, &buffer[..length]),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    // The host was told that nobody is there. Whoever asks again may be heard.
                    Err(error) => failed = Some(error.to_string()),
                }
            }
            // Whoever says much without end must not keep the others from their turn.
            tokio::task::yield_now().await;
        }
        close(&inner, flow, &hearing, &permit, Kind::Udp, failed);
    });
    Ok(conversation)
}

fn open(inner: &Rc<Inner>, flow: Flow, way: Way, permit: Permit, kind: Kind) -> Rc<Conversation> {
    if inner.conversations.make_room() {
        let entry = Entry::new(Verdict::Dropped, kind, "limit");
        let reason = format!("more than {CONVERSATIONS} UDP conversations: the oldest idle one was given up");
        inner.decisions.write(Entry { reason: Some(reason), ..entry });
    }
    inner.decisions.write(inner.decisions.entry(Verdict::Allowed, kind, &permit));
    let conversation = Rc::new(Conversation {
        way,
        heard: Cell::new(Instant::now()),
        sent: Cell::new(0),
        received: Cell::new(0),
        given_up: Notify::new(),
    });
    inner.conversations.open.borrow_mut().insert(flow, conversation.clone());
    conversation
}

/// Passes a datagram on to the guest.
fn hear(inner: &Inner, flow: Flow, conversation: &Conversation, payload: &[u8]) {
    if payload.len() + HEADERS > usize::from(MTU) {
        return;
    }
    conversation.heard.set(Instant::now());
    conversation.received.set(conversation.received.get() + payload.len() as u64);
    inner.link.write(&Written::udp(flow.remote, SocketAddrV4::new(GUEST, flow.guest_port), payload));
}

fn close(
    inner: &Inner,
    flow: Flow,
    conversation: &Rc<Conversation>,
    permit: &Permit,
    kind: Kind,
    reason: Option<String>,
) {
    let mut open = inner.conversations.open.borrow_mut();
    if open.get(&flow).is_some_and(|known| Rc::ptr_eq(known, conversation)) {
        open.remove(&flow);
    }
    drop(open);
    let entry = inner.decisions.entry(Verdict::Ended, kind, permit);
    inner.decisions.write(Entry {
        sent: Some(conversation.sent.get()),
        received: Some(conversation.received.get()),
        reason,
        ..entry
    });
}

/// Hands what is written to a published port to the guest, for ever.
pub(crate) async fn publish(inner: Rc<Inner>, socket: UdpSocket, guest_port: u16) {
    let socket = Rc::new(socket);
    loop {
        if socket.readable().await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        }
        tokio::task::yield_now().await;
        let mut buffer = inner.datagram.borrow_mut();
        // An error is news of a peer that is gone.
        let Ok((length, peer)) = socket.try_recv_from(&mut buffer) else { continue };
        let conversations = &inner.conversations;
        let known = conversations.peers.borrow().get(&(guest_port, peer)).copied();
        let port = known.unwrap_or_else(|| {
            let port = conversations.next_port.get();
            conversations.next_port.set(port.checked_add(1).unwrap_or(FIRST_PORT));
            port
        });
        let flow = Flow { guest_port, remote: SocketAddrV4::new(HOST, port) };
        let known = conversations.open.borrow().get(&flow).cloned();
        let conversation = match known {
            Some(conversation) if matches!(&conversation.way, Way::Back(_, known) if *known == peer) => {
                conversation
            }
            Some(_) => continue,
            None => {
                let Some(slot) = conversations.tasks.take() else { continue };
                let permit = published(peer, guest_port);
                let way = Way::Back(socket.clone(), peer);
                let conversation = open(&inner, flow, way, permit.clone(), Kind::Published);
                conversations.peers.borrow_mut().insert((guest_port, peer), port);
                tokio::task::spawn_local(forget(
                    inner.clone(),
                    flow,
                    conversation.clone(),
                    peer,
                    permit,
                    slot,
                ));
                conversation
            }
        };
        hear(&inner, flow, &conversation, &buffer[..length]);
    }
}

/// Ends a conversation that began at a published port when nothing is said any more.
async fn forget(
    inner: Rc<Inner>,
    flow: Flow,
    conversation: Rc<Conversation>,
    peer: SocketAddr,
    permit: Permit,
    _slot: Slot,
) {
    loop {
        let left = (conversation.heard.get() + IDLE).saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        tokio::select! {
            () = conversation.given_up.notified() => break,
            () = tokio::time::sleep(left) => {}
        }
    }
    inner.conversations.peers.borrow_mut().remove(&(flow.guest_port, peer));
    close(&inner, flow, &conversation, &permit, Kind::Published, None);
}

/// What is recorded of somebody at a published port.
pub(crate) fn published(peer: SocketAddr, guest_port: u16) -> Permit {
    Permit {
        target: SocketAddr::new(peer.ip(), guest_port),
        name: None,
        grounds: Grounds::Published,
        scrutiny: super::decide::Scrutiny::None,
    }
}
