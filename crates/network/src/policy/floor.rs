//! The floor: addresses that nothing reaches by default, because they lead to this machine or its neighbours.
//!
//! Documentation ranges (192.0.2.0/24 and others) are not in it: on some networks registries are reached through one.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Why an address is in the floor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Floor {
    /// 127.0.0.0/8 and ::1.
    Loopback,
    /// 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16 and fc00::/7.
    Private,
    /// 169.254.169.254 and fd00:ec2::254, where clouds hand out credentials.
    Metadata,
    /// 169.254.0.0/16 and fe80::/10.
    LinkLocal,
    /// 100.64.0.0/10, which carriers and clouds use among themselves.
    Shared,
    /// 224.0.0.0/4 and ff00::/8.
    Multicast,
    /// 0.0.0.0/8 and ::, which Linux takes for this machine.
    Unspecified,
    /// 255.255.255.255.
    Broadcast,
    /// An address of this machine.
    Host,
    /// 64:ff9b:1::/48: where in it an IPv4 address lies is each network's own choice, so that none can be ruled out.
    Translated,
}

impl fmt::Display for Floor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Loopback => "a loopback address",
            Self::Private => "a private address",
            Self::Metadata => "a metadata address, where clouds hand out credentials",
            Self::LinkLocal => "a link-local address",
            Self::Shared => "a shared address (100.64.0.0/10)",
            Self::Multicast => "a multicast address",
            Self::Unspecified => "an unspecified address",
            Self::Broadcast => "the broadcast address",
            Self::Host => "an address of this machine",
            Self::Translated => "an address that a local NAT64 translates",
        })
    }
}

/// The floor's entry that an address, or one that it stands for, is in.
pub(super) fn entry(address: IpAddr, host_addresses: &[IpAddr]) -> Option<Floor> {
    spellings(address).into_iter().find_map(|spelling| {
        let entry = match spelling {
            IpAddr::V4(address) => entry_v4(address),
            IpAddr::V6(address) => entry_v6(address),
        };
        entry.or_else(|| host_addresses.contains(&spelling).then_some(Floor::Host))
    })
}

/// The address itself, IPv4-mapped ones as IPv4, and the IPv4 addresses that it embeds.
pub(super) fn spellings(address: IpAddr) -> Vec<IpAddr> {
    let address = address.to_canonical();
    let mut all = vec![address];
    if let IpAddr::V6(address) = address {
        let segments = address.segments();
        let at = |index: usize| {
            let ([a, b], [c, d]) = (segments[index].to_be_bytes(), segments[index + 1].to_be_bytes());
            Ipv4Addr::new(a, b, c, d)
        };
        let embedded = match segments {
            // IPv4-compatible (RFC 4291), deprecated and still understood.
            [0, 0, 0, 0, 0, 0, ..] if address != Ipv6Addr::LOCALHOST && !address.is_unspecified() => {
                vec![at(6)]
            }
            // NAT64 (RFC 6052).
            [0x64, 0xff9b, 0, 0, 0, 0, ..] => vec![at(6)],
            // 6to4 (RFC 3056).
            [0x2002, ..] => vec![at(1)],
            // Teredo (RFC 4380): its server, and the client with every bit turned over.
            [0x2001, 0, ..] => vec![at(2), Ipv4Addr::from_bits(!at(6).to_bits())],
            _ => Vec::new(),
        };
        all.extend(embedded.into_iter().map(IpAddr::V4));
    }
    all
}

fn entry_v4(address: Ipv4Addr) -> Option<Floor> {
    Some(match address.octets() {
        [127, ..] => Floor::Loopback,
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => Floor::Private,
        [169, 254, 169, 254] => Floor::Metadata,
        [169, 254, ..] => Floor::LinkLocal,
        [100, 64..=127, ..] => Floor::Shared,
        [224..=239, ..] => Floor::Multicast,
        [0, ..] => Floor::Unspecified,
        [255, 255, 255, 255] => Floor::Broadcast,
        _ => return None,
    })
}

fn entry_v6(address: Ipv6Addr) -> Option<Floor> {
    Some(match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0] => Floor::Unspecified,
        [0, 0, 0, 0, 0, 0, 0, 1] => Floor::Loopback,
        [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254] => Floor::Metadata,
        [0xfc00..=0xfdff, ..] => Floor::Private,
        [0xfe80..=0xfebf, ..] => Floor::LinkLocal,
        [0xff00..=0xffff, ..] => Floor::Multicast,
        [0x64, 0xff9b, 1, ..] => Floor::Translated,
        _ => return None,
    })
}
