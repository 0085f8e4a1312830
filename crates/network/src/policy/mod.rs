//! The egress policy: a pure function of mode and rules. Whoever connects asks it twice.
//!
//! ```text
//! name ─► Policy::name ─► (resolved) ─► Policy::address, told the name ─► connected to that very address
//! address written out ────────────────► Policy::address
//!
//! a rule of `deny` is about it       refused      whatever else is said
//! a rule of `allow` is about the     permitted    the floor included: who writes the address means it
//!   address
//! the floor                          refused      a name that leads there lifts nothing: whoever owns it chose that
//! mode `public`                      permitted
//! mode `none`                        permitted    if a rule of `allow` is about the name; else refused
//! ```
//! A rule that names no protocol means TCP in `allow`, and TCP and UDP in `deny`: each errs on the safe side.

pub mod floor;
pub mod rule;

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use floor::Floor;
use rule::{Place, Protocol, Rule, canonical};

/// What holds where no rule says anything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// Nothing is reached; with rules that allow something, that alone.
    None,
    /// Everything is reached but the floor.
    #[default]
    Public,
}

/// What may be reached.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    mode: Mode,
    allow: Vec<Rule>,
    deny: Vec<Rule>,
    host_addresses: Vec<IpAddr>,
}

/// Why something is permitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grounds {
    /// The mode permits what nothing forbids.
    Public,
    /// A rule of `allow`.
    Rule(Rule),
    /// It comes from outside, through a port that was published.
    Published,
}

/// Why something is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// A rule of `deny`.
    Rule(Rule),
    /// The floor.
    Floor(Floor),
    /// There is no network, and no rule that allows something.
    NoNetwork,
    /// There is a list of what is allowed, and it is not on it.
    NotListed,
}

/// A refusal: what, why, and what would change it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Name or address, with its port.
    pub target: String,
    /// The name that led to the address.
    pub name: Option<String>,
    /// Why.
    pub cause: Cause,
    /// The rule of `allow` that would permit it; none helps against a rule of `deny`.
    pub allow: Option<Rule>,
}

impl Policy {
    /// A policy. `host_addresses` are this machine's own, which belong to the floor.
    pub fn new(mode: Mode, allow: Vec<Rule>, deny: Vec<Rule>, host_addresses: Vec<IpAddr>) -> Self {
        let host_addresses = host_addresses.iter().map(IpAddr::to_canonical).collect();
        Self { mode, allow, deny, host_addresses }
    }

    /// Whether a name may be resolved to be connected to. What it leads to is asked of [`Policy::address`]; a text that
    /// is an address is taken for one.
    ///
    /// # Errors
    /// Why not.
    pub fn name(&self, name: &str, port: u16, protocol: Protocol) -> Result<Grounds, Box<Refusal>> {
        if let Ok(address) = name.parse() {
            return self.address(address, port, protocol, None);
        }
        let name = canonical(name);
        let refuse = |cause: Cause| {
            let target = format!("{name}:{port}");
            let allow = match cause {
                Cause::Rule(_) => None,
                _ => Some(Rule::exact(Place::Name(name.clone()), port, protocol)),
            };
            Err(Box::new(Refusal { target, name: None, cause, allow }))
        };
        if let Some(rule) = self.denying(|rule| rule.is_about_name(&name), port, protocol) {
            return refuse(Cause::Rule(rule.clone()));
        }
        if let Some(rule) = self.allowing(|rule| rule.is_about_name(&name), port, protocol) {
            return Ok(Grounds::Rule(rule.clone()));
        }
        match self.mode {
            Mode::Public => Ok(Grounds::Public),
            Mode::None => refuse(self.silence()),
        }
    }

    /// Whether an address may be connected to. `resolved_from` is the name that led to it, if one did; it is asked after
    /// as well, so that nothing is lost by calling this alone.
    ///
    /// # Errors
    /// Why not.
    pub fn address(
        &self,
        address: IpAddr,
        port: u16,
        protocol: Protocol,
        resolved_from: Option<&str>,
    ) -> Result<Grounds, Box<Refusal>> {
        let by_name = resolved_from.map(|name| self.name(name, port, protocol)).transpose()?;
        let spellings = floor::spellings(address);
        let canonical_address = address.to_canonical();
        let refuse = |cause: Cause| {
            let target = SocketAddr::new(canonical_address, port).to_string();
            let allow = match cause {
                Cause::Rule(_) => None,
                _ => {
                    let bits = if canonical_address.is_ipv4() { 32 } else { 128 };
                    let place = Place::Range { address: canonical_address, bits };
                    Some(Rule::exact(place, port, protocol))
                }
            };
            Err(Box::new(Refusal { target, name: resolved_from.map(canonical), cause, allow }))
        };
        // Denied is denied in every spelling; allowed is only what was written.
        let denied = |rule: &Rule| spellings.iter().any(|spelling| rule.is_about_address(*spelling));
        if let Some(rule) = self.denying(denied, port, protocol) {
            return refuse(Cause::Rule(rule.clone()));
        }
        if let Some(rule) = self.allowing(|rule| rule.is_about_address(canonical_address), port, protocol) {
            return Ok(Grounds::Rule(rule.clone()));
        }
        if let Some(entry) = floor::entry(address, &self.host_addresses) {
            return refuse(Cause::Floor(entry));
        }
        match (by_name, self.mode) {
            (Some(grounds), _) => Ok(grounds),
            (None, Mode::Public) => Ok(Grounds::Public),
            (None, Mode::None) => refuse(self.silence()),
        }
    }

    /// Whether a name may be resolved at all, for whatever port and protocol.
    ///
    /// # Errors
    /// Why not: a rule of `deny` is about the name as a whole, or there is a list and no rule of it is about the name.
    pub fn resolve(&self, name: &str) -> Result<Grounds, Box<Refusal>> {
        let name = canonical(name);
        let refuse = |cause: Cause| {
            let whole = Rule { place: Place::Name(name.clone()), port: None, protocol: None };
            let allow = (!matches!(cause, Cause::Rule(_))).then_some(whole);
            Err(Box::new(Refusal { target: name.clone(), name: None, cause, allow }))
        };
        // Names that lead to the same place are told apart by their ports only when connected to.
        let whole =
            |rule: &&Rule| rule.port.is_none() && rule.protocol.is_none() && rule.is_about_name(&name);
        if let Some(rule) = self.deny.iter().find(whole) {
            return refuse(Cause::Rule(rule.clone()));
        }
        if let Some(rule) = self.allow.iter().find(|rule| rule.is_about_name(&name)) {
            return Ok(Grounds::Rule(rule.clone()));
        }
        match self.mode {
            Mode::Public => Ok(Grounds::Public),
            Mode::None => refuse(self.silence()),
        }
    }

    /// Whether no rule of `deny` is about a name, whatever else holds.
    ///
    /// # Errors
    /// The rule that is.
    pub fn not_denied(&self, name: &str, port: u16, protocol: Protocol) -> Result<(), Box<Refusal>> {
        let name = canonical(name);
        match self.denying(|rule| rule.is_about_name(&name), port, protocol) {
            None => Ok(()),
            Some(rule) => Err(Box::new(Refusal {
                target: format!("{name}:{port}"),
                name: None,
                cause: Cause::Rule(rule.clone()),
                allow: None,
            })),
        }
    }

    /// Whether any rule of `deny` is about names, which only what is said on a connection can tell.
    pub fn denies_names(&self) -> bool {
        self.deny.iter().any(Rule::is_name)
    }

    /// Whether only what a rule allows is reached.
    pub fn is_list(&self) -> bool {
        self.mode == Mode::None
    }

    fn denying(&self, about: impl Fn(&Rule) -> bool, port: u16, protocol: Protocol) -> Option<&Rule> {
        self.deny.iter().find(|rule| {
            rule.port.is_none_or(|own| own == port)
                && rule.protocol.is_none_or(|own| own == protocol)
                && about(rule)
        })
    }

    fn allowing(&self, about: impl Fn(&Rule) -> bool, port: u16, protocol: Protocol) -> Option<&Rule> {
        self.allow.iter().find(|rule| {
            rule.port.is_none_or(|own| own == port)
                && rule.protocol.unwrap_or(Protocol::Tcp) == protocol
                && about(rule)
        })
    }

    /// Why what no rule is about is refused in mode `none`.
    fn silence(&self) -> Cause {
        if self.allow.is_empty() { Cause::NoNetwork } else { Cause::NotListed }
    }
}

impl Grounds {
    /// Whether it is a rule about a name.
    pub fn is_name(&self) -> bool {
        matches!(self, Self::Rule(rule) if rule.is_name())
    }
}

impl fmt::Display for Grounds {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Public => formatter.write_str("public"),
            Self::Rule(rule) => rule.fmt(formatter),
            Self::Published => formatter.write_str("published"),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(rule) => rule.fmt(formatter),
            Self::Floor(entry) => entry.fmt(formatter),
            Self::NoNetwork => formatter.write_str("no network"),
            Self::NotListed => formatter.write_str("no rule"),
        }
    }
}

impl Refusal {
    /// What the user can do about it, by flags of the command.
    pub fn hint(&self) -> String {
        match (&self.cause, &self.allow) {
            (Cause::Rule(rule), _) => format!("leave out --deny {rule} if it is meant to be reached"),
            (Cause::NoNetwork, Some(rule)) => {
                format!("let it have what is public, --network public, or this alone, --allow {rule}")
            }
            (_, Some(rule)) => format!("if it is meant to be reached, allow it: --allow {rule}"),
            (_, None) => "it cannot be allowed".into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "the network policy refuses {}", self.target)?;
        if let Some(name) = &self.name {
            write!(formatter, ", which {name} leads to")?;
        }
        match &self.cause {
            Cause::Rule(rule) => write!(formatter, ": denied by {rule}"),
            Cause::Floor(entry) => write!(formatter, ": it is {entry}"),
            Cause::NoNetwork => formatter.write_str(": there is no network"),
            Cause::NotListed => formatter.write_str(": no rule allows it"),
        }
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests;
