//! The network of a machine, in user space: no TAP device, no root, nothing left behind.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};

use crate::Policy;
use crate::audit::AuditLog;

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

/// A running network. It ends when this is dropped, or when the machine closes its end.
#[derive(Debug)]
pub struct Network {}

impl Network {
    /// Starts a network on a thread of its own. `frames` is the other end of QEMU's `-netdev stream`: each Ethernet frame
    /// follows its length as four bytes, big-endian.
    ///
    /// # Errors
    /// If the thread cannot be started, or could not confine itself.
    pub fn start(settings: Settings, frames: UnixStream) -> io::Result<Self> {
        let (_, _) = (settings, frames);
        Ok(Self {})
    }

    /// The TCP connections that are open now.
    pub fn flows(&self) -> Vec<Flow> {
        Vec::new()
    }
}
