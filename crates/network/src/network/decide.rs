//! What the policy says of what a guest does, and the record of it.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::{HOST, HOST_NAME};
use crate::audit::{AuditLog, Entry, Kind, Verdict};
use crate::policy::rule::canonical;
use crate::{Cause, Grounds, Policy, Protocol, Refusal};

/// Most addresses whose names are known.
const ADDRESSES: usize = 4096;
/// Most names of one address.
const NAMES_EACH: usize = 8;

/// Decides, and writes down what it decided.
pub(crate) struct Decisions {
    policy: Policy,
    answered: RefCell<Answered>,
    audit: RefCell<AuditLog>,
}

/// A connection that may be made.
#[derive(Debug, Clone)]
pub(crate) struct Permit {
    /// Where the host connects to.
    pub target: SocketAddr,
    /// The name that led there.
    pub name: Option<String>,
    /// By what it is permitted.
    pub grounds: Grounds,
    /// What is looked for in what the guest says first.
    pub scrutiny: Scrutiny,
}

/// What a connection's first words must not be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scrutiny {
    /// Nothing is looked at.
    None,
    /// They must not name what is denied.
    Denied,
    /// What they name must be allowed; TLS must name something.
    Listed,
}

impl Decisions {
    pub(crate) fn new(policy: Policy, audit: AuditLog) -> Self {
        Self { policy, answered: RefCell::default(), audit: RefCell::new(audit) }
    }

    /// Whether the guest may connect there. A refusal is written down; what is permitted is, when it has come about.
    pub(crate) fn connect(&self, address: Ipv4Addr, port: u16, protocol: Protocol) -> Option<Permit> {
        match self.judge(address, port, protocol) {
            Ok(permit) => Some(permit),
            Err((refusal, name)) => {
                self.refused(protocol.into(), &refusal, name, Some(address.into()), Some(port));
                None
            }
        }
    }

    fn judge(
        &self,
        address: Ipv4Addr,
        port: u16,
        protocol: Protocol,
    ) -> Result<Permit, (Box<Refusal>, Option<String>)> {
        let by_address = |address: Ipv4Addr| self.policy.address(address.into(), port, protocol, None);
        if address == HOST {
            // The host's own services listen on its loopback address; to reach them is to be allowed by that.
            let name = Some(HOST_NAME.to_owned());
            let target = Ipv4Addr::LOCALHOST;
            let grounds = by_address(target).map_err(|refusal| (refusal, name.clone()))?;
            return Ok(self.permit(SocketAddr::new(target.into(), port), name, grounds));
        }
        let target = SocketAddr::new(address.into(), port);
        let mut first_refusal = None;
        for name in self.answered.borrow().names(address) {
            match self.policy.address(address.into(), port, protocol, Some(name)) {
                Ok(grounds) => return Ok(self.permit(target, Some(name.clone()), grounds)),
                Err(refusal) if first_refusal.is_none() => {
                    first_refusal = Some((refusal, Some(name.clone())))
                }
                Err(_) => {}
            }
        }
        match (by_address(address), first_refusal) {
            // Its names are not allowed, or even denied; but who wrote the address means it.
            (Ok(grounds @ Grounds::Rule(_)), Some((refusal, _)))
                if !matches!(refusal.cause, Cause::Rule(_)) =>
            {
                Ok(self.permit(target, None, grounds))
            }
            (_, Some(refusal)) => Err(refusal),
            (Ok(grounds), None) => Ok(self.permit(target, None, grounds)),
            (Err(refusal), None) => Err((refusal, None)),
        }
    }

    fn permit(&self, target: SocketAddr, name: Option<String>, grounds: Grounds) -> Permit {
        let scrutiny = if self.policy.is_list() && grounds.is_name() {
            Scrutiny::Listed
        } else if self.policy.denies_names() {
            Scrutiny::Denied
        } else {
            Scrutiny::None
        };
        Permit { target, name, grounds, scrutiny }
    }

    /// Whether what a connection names first may be reached. A refusal is written down.
    pub(crate) fn says(&self, permit: &Permit, name: &str) -> bool {
        let port = permit.target.port();
        let result = match permit.scrutiny {
            Scrutiny::None => return true,
            Scrutiny::Denied => self.policy.not_denied(name, port, Protocol::Tcp),
            Scrutiny::Listed => self.policy.name(name, port, Protocol::Tcp).map(drop),
        };
        let Err(refusal) = result else { return true };
        let address = permit.target.ip();
        self.refused(Kind::Tcp, &refusal, Some(canonical(name)), Some(address), Some(port));
        false
    }

    /// Writes down that a connection ends because of how it began.
    pub(crate) fn unreadable(&self, permit: &Permit, reason: &str) {
        let entry =
            Entry { reason: Some(reason.to_owned()), ..self.entry(Verdict::Refused, Kind::Tcp, permit) };
        self.audit.borrow_mut().write(entry);
    }

    /// Whether a name may be resolved. A refusal is written down.
    pub(crate) fn resolve(&self, name: &str) -> Option<Grounds> {
        match self.policy.resolve(name) {
            Ok(grounds) => Some(grounds),
            Err(refusal) => {
                self.refused(Kind::Dns, &refusal, Some(canonical(name)), None, None);
                None
            }
        }
    }

    /// Whether a name that another one stands for may be resolved: only a rule against it counts.
    pub(crate) fn stands_for(&self, name: &str, target: &str) -> bool {
        let Err(refusal) = self.policy.resolve(target) else { return true };
        if !matches!(refusal.cause, Cause::Rule(_)) {
            return true;
        }
        self.refused(Kind::Dns, &refusal, Some(canonical(name)), None, None);
        false
    }

    /// Remembers what the guest was answered.
    pub(crate) fn answered(&self, name: &str, addresses: &[Ipv4Addr], grounds: &Grounds) {
        let name = canonical(name);
        let mut answered = self.answered.borrow_mut();
        for address in addresses {
            answered.add(*address, &name);
        }
        let entry = Entry {
            address: addresses.first().map(|address| IpAddr::V4(*address)),
            name: Some(name),
            ..Entry::new(Verdict::Allowed, Kind::Dns, grounds.to_string())
        };
        self.audit.borrow_mut().write(entry);
    }

    pub(crate) fn write(&self, entry: Entry) {
        self.audit.borrow_mut().write(entry);
    }

    /// An entry about a connection.
    pub(crate) fn entry(&self, verdict: Verdict, kind: Kind, permit: &Permit) -> Entry {
        Entry {
            name: permit.name.clone(),
            address: Some(permit.target.ip()),
            port: Some(permit.target.port()),
            ..Entry::new(verdict, kind, permit.grounds.to_string())
        }
    }

    fn refused(
        &self,
        kind: Kind,
        refusal: &Refusal,
        name: Option<String>,
        address: Option<IpAddr>,
        port: Option<u16>,
    ) {
        let entry = Entry {
            name,
            address,
            port,
            allow: refusal.allow.as_ref().map(ToString::to_string),
            reason: Some(refusal.to_string()),
            ..Entry::new(Verdict::Refused, kind, refusal.cause.to_string())
        };
        self.audit.borrow_mut().write(entry);
    }
}

/// Which names led to which addresses: the newest answers.
#[derive(Debug, Default)]
struct Answered {
    names: HashMap<Ipv4Addr, VecDeque<String>>,
    /// Addresses, the one answered first first; one that was answered again is in it once.
    order: VecDeque<Ipv4Addr>,
}

impl Answered {
    /// Names of an address, the one answered last first.
    fn names(&self, address: Ipv4Addr) -> impl Iterator<Item = &String> {
        self.names.get(&address).into_iter().flatten()
    }

    fn add(&mut self, address: Ipv4Addr, name: &str) {
        let names = self.names.entry(address).or_insert_with(|| {
            self.order.push_back(address);
            VecDeque::new()
        });
        names.retain(|known| known != name);
        names.push_front(name.to_owned());
        names.truncate(NAMES_EACH);
        if self.order.len() > ADDRESSES
            && let Some(oldest) = self.order.pop_front()
        {
            self.names.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Mode, Rule};

    fn decisions(mode: Mode, allow: &[&str], deny: &[&str]) -> (Decisions, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let rules = |texts: &[&str]| texts.iter().map(|text| text.parse::<Rule>().unwrap()).collect();
        let policy = Policy::new(mode, rules(allow), rules(deny), Vec::new());
        (Decisions::new(policy, AuditLog::open(directory.path()).unwrap()), directory)
    }

    const SOMEWHERE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

    #[test]
    fn under_a_list_only_answers_lead_somewhere() {
        let (decisions, directory) = decisions(Mode::None, &["good.example:443"], &[]);
        assert!(decisions.connect(SOMEWHERE, 443, Protocol::Tcp).is_none());
        let grounds = decisions.resolve("GOOD.example.").unwrap();
        decisions.answered("GOOD.example.", &[SOMEWHERE, Ipv4Addr::LOCALHOST], &grounds);
        let permit = decisions.connect(SOMEWHERE, 443, Protocol::Tcp).unwrap();
        assert_eq!((permit.name.as_deref(), permit.scrutiny), (Some("good.example"), Scrutiny::Listed));
        assert!(decisions.connect(SOMEWHERE, 80, Protocol::Tcp).is_none());
        assert!(decisions.connect(SOMEWHERE, 443, Protocol::Udp).is_none());
        // A name lifts nothing of the floor.
        assert!(decisions.connect(Ipv4Addr::LOCALHOST, 443, Protocol::Tcp).is_none());
        assert!(decisions.says(&permit, "good.example") && !decisions.says(&permit, "other.example"));
        assert!(decisions.resolve("other.example").is_none());
        let entries = crate::audit::read(directory.path()).unwrap();
        let refused = entries.iter().filter(|entry| entry.verdict == Verdict::Refused);
        let allows: Vec<_> = refused.map(|entry| entry.allow.clone().unwrap()).collect();
        assert_eq!(
            allows,
            [
                "198.51.100.7:443",
                "good.example:80",
                "good.example:443/udp",
                "127.0.0.1:443",
                "other.example:443",
                "other.example",
            ]
        );
    }

    #[test]
    fn a_denied_name_is_denied_whatever_shares_its_address() {
        let (decisions, _directory) = decisions(Mode::Public, &[], &["*.bad.example:443"]);
        let grounds = decisions.resolve("x.bad.example").unwrap();
        decisions.answered("x.bad.example", &[SOMEWHERE], &grounds);
        assert!(decisions.connect(SOMEWHERE, 443, Protocol::Tcp).is_none());
        assert!(decisions.connect(SOMEWHERE, 80, Protocol::Tcp).is_some());
        decisions.answered("good.example", &[SOMEWHERE], &Grounds::Public);
        let permit = decisions.connect(SOMEWHERE, 443, Protocol::Tcp).unwrap();
        assert_eq!(permit.scrutiny, Scrutiny::Denied);
        assert!(decisions.says(&permit, "good.example") && !decisions.says(&permit, "y.bad.example"));
    }

    #[test]
    fn the_host_is_reached_by_its_loopback_address_only_if_that_is_allowed() {
        let (decisions, _directory) = decisions(Mode::Public, &["127.0.0.1:8080"], &[]);
        assert!(decisions.connect(HOST, 22, Protocol::Tcp).is_none());
        let permit = decisions.connect(HOST, 8080, Protocol::Tcp).unwrap();
        assert_eq!(permit.target, "127.0.0.1:8080".parse().unwrap());
    }

    #[test]
    fn the_names_of_addresses_are_bounded() {
        let mut answered = Answered::default();
        for number in 0..20_000_u32 {
            answered.add(Ipv4Addr::from_bits(number), &format!("n{number}.example"));
            answered.add(Ipv4Addr::from_bits(19_999), &format!("m{number}.example"));
        }
        assert!(answered.names.len() <= ADDRESSES && answered.order.len() <= ADDRESSES);
        assert!(answered.names.values().all(|names| names.len() <= NAMES_EACH));
    }
}
