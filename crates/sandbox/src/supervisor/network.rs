//! The network of a sandbox's machine: made before the machine, kept as long as it.

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;

use agentkernel_machine::qemu::NetworkCard;
use agentkernel_network::audit::AuditLog;
use agentkernel_network::{
    Flow, GUEST, GUEST_HARDWARE_ADDRESS, HOST, MTU, Network, PREFIX, Proxy, Published, Settings, Upstream,
};
use agentkernel_protocol::message::Link;

use super::confine::confine_network;
use crate::problem::{Problem, io, plain};
use crate::spec::Spec;

/// Where the host's name servers are listed.
const RESOLVERS: &str = "/etc/resolv.conf";
/// Most bytes of that file, and most name servers, that are looked at.
const RESOLVERS_BYTES: u64 = 64 << 10;
const RESOLVERS_LIMIT: usize = 8;
const DNS_PORT: u16 = 53;

/// Starts the network of a machine of `spec`, which goes on from one that had the connections `broken`. Returned with the
/// card that the machine is to have. The record of what is decided lies in `directory`.
///
/// # Errors
/// If its record cannot be opened, its thread cannot confine itself, or the proxy's address is none.
pub(super) fn start(
    spec: &Spec,
    directory: &Path,
    proxy: Option<Proxy>,
    published: &[Published],
    broken: Vec<Flow>,
) -> Result<(Network, NetworkCard), Problem> {
    let what = "start the sandbox's network";
    let (near, cable) = UnixStream::pair().map_err(io(what))?;
    let settings = Settings {
        policy: spec.network.policy(),
        resolvers: resolvers(),
        proxy: proxy.filter(is_usable),
        published: published.iter().map(again).collect::<Result<_, _>>().map_err(io(what))?,
        audit: AuditLog::open(directory).map_err(io("open the record of the network"))?,
        broken,
        confine: Box::new(confine_network),
    };
    let network = Network::start(settings, near).map_err(|error| {
        // The proxy's URL may hold a password.
        let hint = (error.kind() == std::io::ErrorKind::InvalidInput)
            .then_some("set HTTPS_PROXY to http://HOST:PORT, or unset it");
        plain("network", format!("cannot {what}: {error}"), hint)
    })?;
    Ok((network, NetworkCard { cable, address: GUEST_HARDWARE_ADDRESS, mtu: MTU }))
}

/// How the guest sets its card up.
pub(super) const fn link() -> Link {
    Link { guest: GUEST.octets(), host: HOST.octets(), prefix: PREFIX, mtu: MTU }
}

/// Whether the network speaks to such a proxy.
pub(super) fn is_usable(proxy: &Proxy) -> bool {
    proxy.url.split_once("://").is_none_or(|(scheme, _)| scheme.eq_ignore_ascii_case("http"))
}

/// The same socket once more: a machine that does not come up is followed by another.
fn again(port: &Published) -> std::io::Result<Published> {
    let upstream = match &port.upstream {
        Upstream::Tcp(listener) => Upstream::Tcp(TcpListener::try_clone(listener)?),
        Upstream::Udp(socket) => Upstream::Udp(UdpSocket::try_clone(socket)?),
    };
    Ok(Published { upstream, guest_port: port.guest_port })
}

/// The host's name servers; a host without such a file has none.
fn resolvers() -> Vec<SocketAddr> {
    let read = || {
        let file = std::fs::File::open(RESOLVERS)?;
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut std::io::Read::take(file, RESOLVERS_BYTES), &mut text)?;
        std::io::Result::Ok(String::from_utf8_lossy(&text).into_owned())
    };
    name_servers(&read().unwrap_or_default())
}

fn name_servers(text: &str) -> Vec<SocketAddr> {
    let listed = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next() == Some("nameserver")).then(|| address(words.next()?)).flatten()
    });
    listed.take(RESOLVERS_LIMIT).collect()
}

/// An address, which may name its interface (`fe80::1%eth0`).
fn address(word: &str) -> Option<SocketAddr> {
    let (address, zone) = word.split_once('%').map_or((word, None), |(address, zone)| (address, Some(zone)));
    match (address.parse().ok()?, zone) {
        (address, None) => Some(SocketAddr::new(address, DNS_PORT)),
        (IpAddr::V6(address), Some(zone)) => {
            let index =
                || std::fs::read_to_string(Path::new("/sys/class/net").join(zone).join("ifindex")).ok();
            // A zone is a number or a name, and a name is no path.
            let scope = match zone.parse() {
                Ok(number) => number,
                Err(_) if zone.contains('/') || zone.starts_with('.') => return None,
                Err(_) => index()?.trim().parse().ok()?,
            };
            Some(std::net::SocketAddrV6::new(address, DNS_PORT, 0, scope).into())
        }
        (IpAddr::V4(_), Some(_)) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_resolvers_do() {
        let text = "# nameserver 192.0.2.9\nsearch example.org\nnameserver 192.0.2.1\n nameserver\t2001:db8::1 # x\n\
                    nameserver fe80::1%7\nnameserver fe80::2%../../x\nnameserver x\nnameserver\nnameserver 192.0.2.2%1\n";
        let found: Vec<String> = name_servers(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.0.2.1:53", "[2001:db8::1]:53", "[fe80::1%7]:53"]);
        assert_eq!(name_servers(&"nameserver 192.0.2.1\n".repeat(100)).len(), RESOLVERS_LIMIT);
    }
}
