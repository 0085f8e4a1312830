//! Rules as people write them: a name, `*.NAME`, an address or a range, each with `:PORT` and `/udp` where wanted.
//!
//! ```text
//! example.com   *.example.com:443   192.0.2.7:8080   10.0.0.0/8   [fd00::/8]:53/udp
//! ```

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// Longest name, as DNS has it.
const NAME_LIMIT: usize = 253;
/// Longest part of a name between dots.
const LABEL_LIMIT: usize = 63;

/// What is spoken over IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// What a rule is about: places, a port or all, a protocol or what the list it stands in takes for granted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rule {
    pub(super) place: Place,
    pub(super) port: Option<u16>,
    pub(super) protocol: Option<Protocol>,
}

/// Places of the network.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// One name.
    Name(String),
    /// All names below this one.
    Below(String),
    /// Addresses that begin with the same bits.
    Range { address: IpAddr, bits: u8 },
}

/// A text that is no rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{rule}` is no rule: {reason}")]
pub struct InvalidRule {
    /// The rule, shortened.
    pub rule: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Rule {
    /// The rule that is about exactly this.
    pub(super) fn exact(place: Place, port: u16, protocol: Protocol) -> Self {
        // TCP goes without saying where something is let through.
        Self { place, port: Some(port), protocol: (protocol == Protocol::Udp).then_some(protocol) }
    }

    /// Whether it is about names, not addresses.
    pub fn is_name(&self) -> bool {
        matches!(self.place, Place::Name(_) | Place::Below(_))
    }

    pub(super) fn is_about_name(&self, name: &str) -> bool {
        match &self.place {
            Place::Name(own) => own == name,
            Place::Below(own) => name.strip_suffix(own.as_str()).is_some_and(|rest| rest.ends_with('.')),
            Place::Range { .. } => false,
        }
    }

    pub(crate) fn is_about_address(&self, address: IpAddr) -> bool {
        let Place::Range { address: own, bits } = self.place else { return false };
        match (own, address) {
            (IpAddr::V4(own), IpAddr::V4(address)) => {
                let rest = 32 - u32::from(bits);
                own.to_bits().checked_shr(rest) == address.to_bits().checked_shr(rest)
            }
            (IpAddr::V6(own), IpAddr::V6(address)) => {
                let rest = 128 - u32::from(bits);
                own.to_bits().checked_shr(rest) == address.to_bits().checked_shr(rest)
            }
            _ => false,
        }
    }
}

impl FromStr for Rule {
    type Err = InvalidRule;

    fn from_str(text: &str) -> Result<Self, InvalidRule> {
        parse(text).map_err(|reason| {
            let shown = text.chars().filter(|character| !character.is_control());
            InvalidRule { rule: shown.take(80).collect(), reason }
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Name(name) => formatter.write_str(name)?,
            Place::Below(name) => write!(formatter, "*.{name}")?,
            Place::Range { address, bits } => {
                let is_one = *bits == if address.is_ipv4() { 32 } else { 128 };
                let range = if is_one { address.to_string() } else { format!("{address}/{bits}") };
                match address.is_ipv6() && self.port.is_some() {
                    true => write!(formatter, "[{range}]")?,
                    false => formatter.write_str(&range)?,
                }
            }
        }
        if let Some(port) = self.port {
            write!(formatter, ":{port}")?;
        }
        formatter.write_str(match self.protocol {
            Some(Protocol::Udp) => "/udp",
            Some(Protocol::Tcp) => "/tcp",
            None => "",
        })
    }
}

fn parse(text: &str) -> Result<Rule, String> {
    let (rest, protocol) = match text.rsplit_once('/') {
        Some((rest, "udp")) => (rest, Some(Protocol::Udp)),
        Some((rest, "tcp")) => (rest, Some(Protocol::Tcp)),
        _ => (text, None),
    };
    if rest.contains("//") {
        return Err("leave out what stands before the name: example.com".into());
    }
    let (host, port) = if let Some(rest) = rest.strip_prefix('[') {
        let (inside, behind) = rest.split_once(']').ok_or("the bracket is not closed")?;
        let port = match behind {
            "" => None,
            behind => Some(behind.strip_prefix(':').ok_or("only :PORT may follow the bracket")?),
        };
        if !inside.contains(':') {
            return Err("only IPv6 addresses stand in brackets".into());
        }
        (inside, port)
    } else if rest.matches(':').count() > 1 {
        (rest, None)
    } else {
        rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port)))
    };
    let port = port.map(|port| match port.parse() {
        Ok(number) if number > 0 && port.bytes().all(|byte| byte.is_ascii_digit()) => Ok(number),
        _ => Err(format!("`{port}` is no port; there are 1 to 65535")),
    });
    Ok(Rule { place: place(host)?, port: port.transpose()?, protocol })
}

fn place(host: &str) -> Result<Place, String> {
    if let Some((address, bits)) = host.split_once('/') {
        let address: IpAddr = address.parse().map_err(|_| format!("`{address}` is no address"))?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let digits = !bits.is_empty() && bits.bytes().all(|byte| byte.is_ascii_digit());
        let length: Option<u8> = bits.parse().ok().filter(|length| digits && *length <= most);
        let length =
            length.ok_or_else(|| format!("`/{bits}` is no length of a range; there are /0 to /{most}"))?;
        return range(address, length);
    }
    if let Ok(address) = host.parse::<IpAddr>() {
        return range(address, if address.is_ipv4() { 32 } else { 128 });
    }
    if host.contains(':') {
        return Err(format!("`{host}` is no address"));
    }
    match host.strip_prefix("*.") {
        Some(below) => name(below).map(Place::Below),
        None => name(host).map(Place::Name),
    }
}

fn range(address: IpAddr, bits: u8) -> Result<Place, String> {
    let first: IpAddr = match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
            std::net::Ipv4Addr::from_bits(address.to_bits() & mask).into()
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
            Ipv6Addr::from_bits(address.to_bits() & mask).into()
        }
    };
    if first != address {
        return Err(format!("the range begins at {first}: write {first}/{bits}"));
    }
    // IPv4 in the clothes of IPv6 is compared as what it is.
    Ok(match (address, address.to_canonical()) {
        (IpAddr::V6(_), IpAddr::V4(mapped)) if bits >= 96 => {
            Place::Range { address: mapped.into(), bits: bits - 96 }
        }
        _ => Place::Range { address, bits },
    })
}

/// A name as it is compared: lower case, no dot at its end.
fn name(text: &str) -> Result<String, String> {
    let name = canonical(text);
    if name.is_empty() {
        return Err("it names nothing".into());
    }
    if !name.is_ascii() {
        return Err("write the name as DNS has it, in ASCII: xn--...".into());
    }
    if name.contains('*') {
        return Err("an asterisk stands for what comes first only: *.example.com".into());
    }
    let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if name.len() > NAME_LIMIT
        || name
            .split('.')
            .any(|label| label.is_empty() || label.len() > LABEL_LIMIT || !label.bytes().all(known))
    {
        return Err("neither a name, an address nor a range".into());
    }
    // What programs take for an address (127.1, 0x7f000001) is no name that could be resolved.
    let last = name.rsplit('.').next().unwrap_or_default();
    let is_hexadecimal =
        last.strip_prefix("0x").is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_hexdigit()));
    if is_hexadecimal || last.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("write an address in full: 192.0.2.1".into());
    }
    Ok(name)
}

/// How names are compared: in lower case, without the dot at the end.
pub(crate) fn canonical(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}
