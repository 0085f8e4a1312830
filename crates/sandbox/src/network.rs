//! What a sandbox may reach and what reaches it, as its spec says; and what became of that, as its record says.
//!
//! ```text
//! NetworkSpec ─┬─► policy() ─► the machine's network          record ─┬─► AuditReader    `audit`, `logs`
//!              └─► bind()   ─► sockets that lead into it              └─► refusals()     the end of `run`, `exec`
//! ```
//! Ports are bound by the supervisor, before there is a machine and before it is confined: a port that is taken is an error
//! while nothing has happened yet. Port 0 is picked then, and written into the spec: it stays over stop and start.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::str::FromStr;

pub use agentkernel_network::Rule;
pub use agentkernel_network::audit::{Entry, Kind, Verdict};
use agentkernel_network::{Cause, Mode, Policy, Published, Upstream, audit};
use serde::{Deserialize, Serialize};

use crate::build::addresses;
use crate::configuration::NetworkMode;
use crate::problem::{Problem, plain, printable};
use crate::spec::Spec;
use crate::state::{Home, SandboxDirectory};

/// Most rules of a sandbox: each connection is compared with all of them.
pub const RULES_LIMIT: usize = 1024;
/// Most published ports of a sandbox: each is a socket of the supervisor's.
pub const PORTS_LIMIT: usize = 64;
/// What the reason of a refusal by a rule of `deny` has in it.
const DENIED: &str = ": denied by ";
/// Most refusals that are told apart at the end of a command.
const REFUSALS_LIMIT: usize = 100;

/// What a sandbox may reach, and what of it is reached from the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// What holds where no rule says anything.
    pub mode: NetworkMode,
    /// What is allowed; with mode `none`, that alone.
    #[serde(default, with = "texts", skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Rule>,
    /// What is denied, whatever else is said.
    #[serde(default, with = "texts", skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<Rule>,
    /// Ports of the host that lead into the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PublishedPort>,
}

/// Sandboxes of versions without a network were made to have none.
impl Default for NetworkSpec {
    fn default() -> Self {
        Self { mode: NetworkMode::None, allow: Vec::new(), deny: Vec::new(), ports: Vec::new() }
    }
}

/// Rules as the texts people write.
mod texts {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<T: Display, S: Serializer>(
        rules: &[T],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(rules.iter().map(T::to_string))
    }

    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        let texts = Vec::<String>::deserialize(deserializer)?;
        texts.iter().map(|text| text.parse().map_err(de::Error::custom)).collect()
    }
}

/// A port of the host's that leads to one of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// Address of the host that it is open on.
    pub bind: IpAddr,
    /// The host's port; 0: one that is free is picked when the sandbox is started for the first time.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
    /// UDP, not TCP.
    #[serde(default)]
    pub udp: bool,
    /// The host's port was picked, not asked for.
    #[serde(default)]
    pub picked: bool,
}

/// A text that names no port to publish.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{port}` publishes no port: {reason}")]
pub struct InvalidPort {
    /// The text, shortened.
    pub port: String,
    /// What is wrong with it.
    pub reason: String,
}

impl FromStr for PublishedPort {
    type Err = InvalidPort;

    /// Reads `[BIND:]HOST:GUEST[/udp]`; an IPv6 address stands in brackets.
    fn from_str(text: &str) -> Result<Self, InvalidPort> {
        published_port(text).map_err(|reason| InvalidPort { port: printable(text), reason })
    }
}

fn published_port(text: &str) -> Result<PublishedPort, String> {
    const FORM: &str = "write HOST:GUEST, such as 8080:80, or 127.0.0.1:8080:80/udp with all there is to say";
    let (rest, udp) = match text.split_once('/') {
        None => (text, false),
        Some((rest, "tcp")) => (rest, false),
        Some((rest, "udp")) => (rest, true),
        Some(_) => return Err("only /tcp and /udp may follow the ports".into()),
    };
    let Some((rest, guest)) = rest.rsplit_once(':') else {
        return Err(match number(rest) {
            Some(guest) => format!("say which port of this machine leads there: 0:{guest} picks a free one"),
            None => FORM.into(),
        });
    };
    let (bind, host) = match rest.rsplit_once(':') {
        None => (Ipv4Addr::LOCALHOST.into(), rest),
        Some((bind, host)) => {
            let inside = bind.strip_prefix('[').and_then(|bind| bind.strip_suffix(']'));
            let address = match inside {
                Some(inside) => inside.parse().ok().map(IpAddr::V6),
                None if bind.contains(':') => {
                    return Err("an IPv6 address stands in brackets: [::1]:8080:80".into());
                }
                None => bind.parse().ok().map(IpAddr::V4),
            };
            let wrong = || format!("`{}` is no address of this machine; {FORM}", printable(bind));
            (address.ok_or_else(wrong)?, host)
        }
    };
    let port = |text: &str, least: u16| {
        let found = number(text).filter(|port| *port >= least);
        found.ok_or_else(|| format!("`{}` is no port; there are {least} to 65535", printable(text)))
    };
    Ok(PublishedPort { bind, host: port(host, 0)?, guest: port(guest, 1)?, udp, picked: false })
}

fn number(text: &str) -> Option<u16> {
    text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
}

impl fmt::Display for PublishedPort {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let udp = if self.udp { "/udp" } else { "" };
        write!(formatter, "{}:{}{udp}", SocketAddr::new(self.bind, self.host), self.guest)
    }
}

impl PublishedPort {
    /// Whether it is reached from this machine alone.
    pub fn is_local(&self) -> bool {
        self.bind.to_canonical().is_loopback()
    }

    /// Whether both cannot be open at once.
    fn clashes(&self, other: &Self) -> bool {
        let overlap = self.bind == other.bind || self.bind.is_unspecified() || other.bind.is_unspecified();
        self.host != 0 && self.host == other.host && self.udp == other.udp && overlap
    }

    fn open(&self) -> io::Result<(Upstream, u16)> {
        let address = SocketAddr::new(self.bind, self.host);
        Ok(if self.udp {
            let socket = UdpSocket::bind(address)?;
            let port = socket.local_addr()?.port();
            (Upstream::Udp(socket), port)
        } else {
            let listener = TcpListener::bind(address)?;
            let port = listener.local_addr()?.port();
            (Upstream::Tcp(listener), port)
        })
    }
}

impl NetworkSpec {
    /// Makes sure that it is within bounds and does not contradict itself.
    ///
    /// # Errors
    /// Says what is too much, or which ports clash with each other.
    pub fn check(&self) -> Result<(), Problem> {
        if self.allow.len() + self.deny.len() > RULES_LIMIT {
            let message = format!("a sandbox has at most {RULES_LIMIT} network rules");
            return Err(plain("network-rules", message, Some("a range or *.NAME stands for many")));
        }
        if self.ports.len() > PORTS_LIMIT {
            return Err(plain("ports", format!("a sandbox publishes at most {PORTS_LIMIT} ports"), None));
        }
        for (index, port) in self.ports.iter().enumerate() {
            if let Some(other) = self.ports[..index].iter().find(|other| port.clashes(other)) {
                let message =
                    format!("{port} and {other} cannot both be published: the host's port is the same");
                return Err(plain("ports", message, Some("give each port of this machine once")));
            }
        }
        Ok(())
    }

    /// The policy of this machine, whose own addresses are not reached unless one is allowed.
    pub fn policy(&self) -> Policy {
        let mode = match self.mode {
            NetworkMode::None => Mode::None,
            NetworkMode::Public => Mode::Public,
        };
        Policy::new(mode, self.allow.clone(), self.deny.clone(), addresses::own())
    }

    /// Ports for a copy of the sandbox: the original holds those that it has, so others are picked.
    pub(crate) fn for_copy(mut self) -> Self {
        for port in &mut self.ports {
            (port.host, port.picked) = (0, true);
        }
        self
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        let rules = |rules: &[Rule]| {
            let shown: Vec<String> = rules.iter().take(5).map(Rule::to_string).collect();
            let more = if rules.len() > shown.len() { ", ..." } else { "" };
            shown.join(", ") + more
        };
        let mut text = match (self.mode, self.allow.is_empty()) {
            (NetworkMode::None, true) => return "none".into(),
            (NetworkMode::None, false) => format!("only {}", rules(&self.allow)),
            (NetworkMode::Public, true) => "public".to_owned(),
            (NetworkMode::Public, false) => format!("public and {}", rules(&self.allow)),
        };
        if !self.deny.is_empty() {
            text += &format!(", not {}", rules(&self.deny));
        }
        text
    }

    /// The allowed names that change nothing: under `public` names are reached anyhow, and lift nothing of the floor.
    pub fn idle_rules(&self) -> Vec<&Rule> {
        match self.mode {
            NetworkMode::None => Vec::new(),
            NetworkMode::Public => self.allow.iter().filter(|rule| rule.is_name()).collect(),
        }
    }
}

/// Opens the published ports. Those to be picked are picked, and noted in the spec; one that was picked for an earlier start
/// and is taken by now is picked anew.
///
/// # Errors
/// Code `port-taken` or `port` if a port cannot be had: nothing is open then.
pub fn bind(network: &mut NetworkSpec) -> Result<Vec<Published>, Problem> {
    let mut published = Vec::new();
    for port in &mut network.ports {
        let opened = match port.open() {
            Err(error) if error.kind() == ErrorKind::AddrInUse && port.picked => {
                port.host = 0;
                port.open()
            }
            opened => opened,
        };
        let (upstream, host) = opened.map_err(|error| refused(port, &error))?;
        port.picked |= port.host == 0;
        port.host = host;
        published.push(Published { upstream, guest_port: port.guest });
    }
    Ok(published)
}

fn refused(port: &PublishedPort, error: &io::Error) -> Problem {
    let (protocol, address) = (if port.udp { "UDP" } else { "TCP" }, SocketAddr::new(port.bind, port.host));
    let (code, why, hint) = match error.kind() {
        ErrorKind::AddrInUse => {
            let other = format!(
                "publish another port, or 0:{}{} for one that is free; ss -lnp says which program has it",
                port.guest,
                if port.udp { "/udp" } else { "" }
            );
            ("port-taken", "another program has it".to_owned(), Some(other))
        }
        ErrorKind::PermissionDenied => {
            let hint = "ports below 1024 are root's: publish a higher one".to_owned();
            ("port", "this user may not have it".to_owned(), Some(hint))
        }
        ErrorKind::AddrNotAvailable => {
            let hint = "publish on 127.0.0.1, 0.0.0.0 or an address of this machine".to_owned();
            ("port", "this machine has no such address".to_owned(), Some(hint))
        }
        _ => ("port", error.to_string(), None),
    };
    Problem { code: code.into(), message: format!("cannot publish {protocol} port {address}: {why}"), hint }
}

/// Opens the ports of a sandbox that is being started, and writes those that were picked into its spec.
///
/// # Errors
/// As [`bind`]; if another sandbox has the port, its name is in the message.
pub(crate) fn publish(spec: &Spec, sandbox: &SandboxDirectory) -> Result<Vec<Published>, Problem> {
    let mut network = spec.network.clone();
    let published = bind(&mut network).map_err(|problem| {
        if problem.code != "port-taken" {
            return problem;
        }
        match holder(sandbox.home(), spec) {
            Some((port, name)) => Problem {
                message: format!("cannot publish {port}: the sandbox {name} has that port"),
                hint: Some(format!("publish another port, or agentkernel stop {name}")),
                ..problem
            },
            None => problem,
        }
    })?;
    if network != spec.network {
        Spec { network, ..spec.clone() }.save(sandbox.path())?;
    }
    Ok(published)
}

/// A live sandbox that has one of the ports that `spec` wants.
fn holder(home: &Home, spec: &Spec) -> Option<(PublishedPort, String)> {
    let others = home.list().ok()?.into_iter().filter(|other| !other.is_dead());
    let others = others.filter_map(|other| Spec::load(other.path()).ok());
    others.filter(|other| other.uuid != spec.uuid).find_map(|other| {
        let wanted = spec.network.ports.iter().filter(|port| !port.picked);
        let port = wanted.copied().find(|port| other.network.ports.iter().any(|own| own.clashes(port)))?;
        Some((port, other.name))
    })
}

/// Follows the record of what a sandbox's network decided. Works whether the sandbox runs or not.
#[derive(Debug)]
pub struct AuditReader {
    directory: PathBuf,
    last: u64,
}

impl AuditReader {
    /// From the oldest entry that is kept.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), last: 0 }
    }

    /// From what comes after now.
    pub fn from_now(directory: &Path) -> Self {
        let last = audit::last_sequence(directory).unwrap_or(0);
        Self { last, ..Self::new(directory) }
    }

    /// What came since the last call, oldest first.
    ///
    /// # Errors
    /// If the record cannot be read; one that does not exist is empty.
    pub fn read(&mut self) -> io::Result<Vec<Entry>> {
        if audit::last_sequence(&self.directory)? <= self.last {
            return Ok(Vec::new());
        }
        let mut entries = audit::read(&self.directory)?;
        entries.retain(|entry| entry.sequence > self.last);
        self.last = entries.last().map_or(self.last, |entry| entry.sequence);
        Ok(entries)
    }
}

/// Where an entry leads: name and address with the port, as far as they are known.
pub fn target(entry: &Entry) -> String {
    let port = entry.port.map_or_else(String::new, |port| format!(":{port}"));
    match (&entry.name, entry.address) {
        (Some(name), Some(address)) => format!("{name}{port} ({address})"),
        (Some(name), None) => format!("{name}{port}"),
        (None, Some(IpAddr::V6(address))) if entry.port.is_some() => format!("[{address}]{port}"),
        (None, Some(address)) => format!("{address}{port}"),
        (None, None) => port,
    }
}

/// Something that was refused, however often.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// The name that was asked for, or the address, with the port if one was asked for.
    pub target: String,
    /// What was refused, and why, in words.
    pub reason: String,
    /// The rule that would permit it, for `--allow`; none helps against a rule of `--deny`.
    pub allow: Option<String>,
    /// What to do if it is meant to be reached.
    pub hint: String,
    /// How often.
    pub count: u64,
}

/// What was refused, each once, in the order in which it came up; at most 100 of them, and how many others there were.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// Each of them.
    pub list: Vec<Refused>,
    /// How many others there were.
    pub others: u64,
}

/// Gathers the refusals among the entries of a record. A question for a name and a connection to it are one.
pub fn refusals(entries: &[Entry]) -> Refusals {
    // By what was asked for, and what would permit it.
    let mut places: HashMap<(String, Option<&str>), usize> = HashMap::new();
    let mut refusals = Refusals::default();
    let refused = || entries.iter().filter(|entry| entry.verdict == Verdict::Refused);
    let connections = refused().filter(|entry| entry.kind != Kind::Dns);
    let connected: HashSet<&str> = connections.filter_map(|entry| entry.name.as_deref()).collect();
    for entry in refused() {
        // The connection says more: it has the port.
        if entry.kind == Kind::Dns && entry.name.as_deref().is_some_and(|name| connected.contains(name)) {
            continue;
        }
        let subject = match (&entry.name, entry.address) {
            (Some(name), _) => name.clone(),
            (None, address) => address.map(|address| address.to_string()).unwrap_or_default(),
        };
        let key = (format!("{subject} {}", entry.port.unwrap_or(0)), entry.allow.as_deref());
        if let Some(place) = places.get(&key) {
            refusals.list[*place].count += 1;
            continue;
        }
        if refusals.list.len() == REFUSALS_LIMIT {
            refusals.others += 1;
            continue;
        }
        places.insert(key, refusals.list.len());
        refusals.list.push(Refused {
            target: target(&Entry {
                address: entry.address.filter(|_| entry.name.is_none()),
                ..entry.clone()
            }),
            reason: entry.reason.clone().unwrap_or_else(|| entry.rule.clone()),
            allow: entry.allow.clone(),
            hint: hint(entry),
            count: 1,
        });
    }
    refusals
}

/// What to do about a refusal, by flags.
fn hint(entry: &Entry) -> String {
    match (&entry.allow, entry.address) {
        (Some(allow), _) if entry.rule == Cause::NoNetwork.to_string() => {
            format!("--network public, or this alone: --allow {allow}")
        }
        (Some(allow), _) => format!("--allow {allow}"),
        // Whom it is for cannot be read; one that is allowed by its address is not asked.
        (None, Some(address)) if !entry.reason.as_deref().is_some_and(|reason| reason.contains(DENIED)) => {
            let to = SocketAddr::new(address, entry.port.unwrap_or_default());
            format!("--allow {to}, which does not look at what is said")
        }
        (None, _) => format!("leave out --deny {}, or that rule of the configuration", entry.rule),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn port(text: &str) -> PublishedPort {
        text.parse().unwrap()
    }

    fn spec(ports: &[&str]) -> NetworkSpec {
        NetworkSpec { ports: ports.iter().map(|text| port(text)).collect(), ..NetworkSpec::default() }
    }

    #[test]
    fn ports_as_people_write_them() {
        for (text, written) in [
            ("8080:80", "127.0.0.1:8080:80"),
            ("0:80", "127.0.0.1:0:80"),
            ("8080:80/tcp", "127.0.0.1:8080:80"),
            ("5353:53/udp", "127.0.0.1:5353:53/udp"),
            ("0.0.0.0:8080:80", "0.0.0.0:8080:80"),
            ("[::1]:8080:80/udp", "[::1]:8080:80/udp"),
            ("[::]:65535:65535", "[::]:65535:65535"),
        ] {
            assert_eq!(port(text).to_string(), written);
        }
        for (text, reason) in [
            ("80", "0:80 picks a free one"),
            ("80/udp", "0:80 picks a free one"),
            ("", "write HOST:GUEST"),
            ("web", "write HOST:GUEST"),
            ("8080:", "`` is no port; there are 1 to 65535"),
            (":80", "`` is no port; there are 0 to 65535"),
            ("8080:0", "`0` is no port; there are 1"),
            ("65536:80", "`65536` is no port"),
            ("+80:80", "`+80` is no port"),
            ("8080:80/sctp", "only /tcp and /udp"),
            ("8080:80/udp/tcp", "only /tcp and /udp"),
            ("::1:8080:80", "stands in brackets: [::1]:8080:80"),
            ("[::1:8080:80", "stands in brackets"),
            ("[127.0.0.1]:8080:80", "is no address of this machine"),
            ("localhost:8080:80", "`localhost` is no address of this machine"),
            (":8080:80", "`` is no address"),
        ] {
            let error = text.parse::<PublishedPort>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn specs_of_before_have_no_network_and_rules_are_texts() {
        let read = |text: &str| serde_json::from_str::<NetworkSpec>(text);
        let written = r#"{"mode":"public","allow":["10.0.0.5:53/udp"],"deny":["*.bad.example"]}"#;
        let spec = read(written).unwrap();
        assert_eq!(serde_json::to_string(&spec).unwrap(), written);
        assert_eq!(spec.describe(), "public and 10.0.0.5:53/udp, not *.bad.example");
        assert!(read(r#"{"mode":"none","allow":["a..b"]}"#).is_err());
        assert_eq!(NetworkSpec::default().describe(), "none");
        let refusal = NetworkSpec::default().policy().resolve("a.example").unwrap_err();
        assert_eq!(refusal.cause, Cause::NoNetwork);
    }

    #[test]
    fn ports_that_clash_are_told() {
        for (ports, good) in [
            (&["80:80", "80:81/udp"][..], true),
            (&["80:80", "127.0.0.2:80:80"], true),
            (&["0:80", "0:80"], true),
            (&["80:80", "80:81"], false),
            (&["80:80", "0.0.0.0:80:81"], false),
        ] {
            assert_eq!(spec(ports).check().is_ok(), good, "{ports:?}");
        }
        assert!(spec(&["0:1"; 65]).check().is_err());
    }

    #[test]
    fn picked_ports_stay_and_taken_ones_are_an_error() {
        let mut first = spec(&["0:80", "0:53/udp"]);
        let open = bind(&mut first).unwrap();
        let picked: Vec<u16> = first.ports.iter().map(|port| port.host).collect();
        assert!(open.len() == 2 && picked.iter().all(|port| *port > 0));
        assert!(first.ports.iter().all(|port| port.picked));
        // Somebody else wants the very same, with a free one before it.
        let mut other = spec(&["0:80", &format!("{}:80", picked[0])]);
        let problem = bind(&mut other).unwrap_err();
        assert_eq!(problem.code, "port-taken");
        assert!(problem.message.contains(&picked[0].to_string()), "{problem:?}");
        assert!(problem.hint.unwrap().contains("0:80"));
        // A copy has others.
        let mut copy = first.clone().for_copy();
        let copies = bind(&mut copy).unwrap();
        assert!(copy.ports.iter().zip(&picked).all(|(port, taken)| port.host != *taken && port.guest > 0));
        drop((open, copies));
        let again = first.clone();
        let _open = bind(&mut first).unwrap();
        assert_eq!(first, again);
        // What was picked and is gone is picked anew.
        let mut late = again;
        drop(bind(&mut late).unwrap());
        assert!(late.ports[0].host != picked[0]);
    }

    fn refusal(kind: Kind, name: Option<&str>, port: Option<u16>, allow: &str) -> Entry {
        Entry {
            name: name.map(str::to_owned),
            address: name.is_none().then_some(Ipv4Addr::new(192, 0, 2, 1).into()),
            port,
            allow: Some(allow.to_owned()),
            reason: Some("the network policy refuses it: there is no network".into()),
            ..Entry::new(Verdict::Refused, kind, "no network")
        }
    }

    #[test]
    fn refusals_are_told_once() {
        let dns = |name: &str| refusal(Kind::Dns, Some(name), None, name);
        let entries = [
            dns("a.example"),
            dns("a.example"),
            dns("b.example"),
            Entry::new(Verdict::Allowed, Kind::Dns, "public"),
            refusal(Kind::Tcp, Some("b.example"), Some(80), "b.example:80"),
            refusal(Kind::Tcp, None, Some(443), "192.0.2.1:443"),
            Entry {
                allow: None,
                reason: Some("the network policy refuses c.example:80: denied by *.example".into()),
                rule: "*.example".into(),
                ..refusal(Kind::Tcp, Some("c.example"), Some(80), "")
            },
            Entry {
                allow: None,
                reason: Some("its TLS names no server".into()),
                ..refusal(Kind::Tcp, None, Some(8443), "")
            },
        ];
        let told = refusals(&entries);
        let lines: Vec<String> = told
            .list
            .iter()
            .map(|refused| format!("{} {} {}", refused.target, refused.count, refused.hint))
            .collect();
        assert_eq!(
            lines,
            [
                "a.example 2 --network public, or this alone: --allow a.example",
                "b.example:80 1 --network public, or this alone: --allow b.example:80",
                "192.0.2.1:443 1 --network public, or this alone: --allow 192.0.2.1:443",
                "c.example:80 1 leave out --deny *.example, or that rule of the configuration",
                "192.0.2.1:8443 1 --allow 192.0.2.1:8443, which does not look at what is said",
            ]
        );
        let many: Vec<Entry> = (0..500).map(|number| dns(&format!("n{number}.example"))).collect();
        let told = refusals(&many);
        assert_eq!((told.list.len(), told.others), (REFUSALS_LIMIT, 500 - REFUSALS_LIMIT as u64));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(bind in any::<IpAddr>(), host in any::<u16>(), guest in 1u16.., udp in any::<bool>()) {
            let port = PublishedPort { bind, host, guest, udp, picked: false };
            prop_assert_eq!(port.to_string().parse(), Ok(port));
        }

        #[test]
        fn any_text_is_a_port_or_none(text in "\\PC{0,20}|[0-9:/\\[\\]udp.]{0,20}") {
            if let Ok(port) = text.parse::<PublishedPort>() {
                prop_assert_eq!(port.to_string().parse(), Ok(port));
            }
        }
    }
}
