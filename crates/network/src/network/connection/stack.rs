//! The small TCP of one connection.

use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{self, State};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, IpEndpoint, IpListenEndpoint};

use crate::network::budget::Share;
use crate::network::link::{Link, Wire};

/// A TCP of one connection.
pub(super) struct Stack {
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    began: Instant,
    _share: Share,
}

impl Stack {
    pub(super) fn new(link: &Link, own: SocketAddrV4, share: Share) -> Self {
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

    pub(super) fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    fn now(&self) -> StackInstant {
        StackInstant::from_micros(i64::try_from(self.began.elapsed().as_micros()).unwrap_or(i64::MAX))
    }

    /// Takes a packet, and sends what is to be sent.
    pub(super) fn poll(&mut self, link: &Link, input: Option<&[u8]>) {
        let now = self.now();
        self.interface.poll(now, &mut Wire { input, link, is_urgent: false }, &mut self.sockets);
    }

    /// Says its last, also on a link that is full: nothing would say it again.
    pub(super) fn finish(&mut self, link: &Link) {
        // It may hold an acknowledgement back for as long as this.
        let now = self.now() + self.socket().ack_delay().unwrap_or_default();
        self.interface.poll(now, &mut Wire { input: None, link, is_urgent: true }, &mut self.sockets);
    }

    /// How long until it has something to do by itself.
    pub(super) fn delay(&mut self) -> Option<Duration> {
        let now = self.now();
        self.interface.poll_delay(now, &self.sockets).map(Into::into)
    }

    /// Whether the guest will say no more, and all it said was read.
    pub(super) fn has_heard_all(&mut self) -> bool {
        let socket = self.socket();
        let begun = !matches!(socket.state(), State::Listen | State::SynSent | State::SynReceived);
        begun && !socket.may_recv()
    }

    pub(super) fn abort(&mut self, link: &Link) {
        self.socket().abort();
        self.finish(link);
    }

    /// Begins a connection to a port of the guest's.
    pub(super) fn connect(&mut self, own: SocketAddrV4, guest: IpEndpoint) {
        let local = IpListenEndpoint { addr: Some(IpAddress::Ipv4(*own.ip())), port: own.port() };
        let Self { interface, sockets, handle, .. } = self;
        // Fails only for a port 0, which is not published.
        let _ = sockets.get_mut::<tcp::Socket<'_>>(*handle).connect(interface.context(), guest, local);
    }
}
