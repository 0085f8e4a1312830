//! The guest's name server: every question is policed, and answered from the host's own name servers.
//!
//! Nothing of an answer is passed on but records of the type that was asked for and the aliases that lead there. There are
//! no addresses of IPv6 and no HTTPS records, which could carry keys that hide the name of a connection.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_resolver::proto::rr::{DNSClass, Name, RData, Record, RecordType, rdata};

use super::decide::Decisions;
use super::{HOST, HOST_NAME};

/// The port of name servers.
pub(crate) const PORT: u16 = 53;
/// Longest answer over UDP without and with EDNS, bytes (RFC 6891; the latter fits every link).
const DATAGRAM: u16 = 512;
const DATAGRAM_LIMIT: u16 = 1232;
/// Longest question, bytes: one name and options.
pub(crate) const QUESTION_LIMIT: usize = 2048;
/// Most questions that are being answered; of those over UDP, as many are waited with.
pub(crate) const PENDING: usize = 128;
/// Most answers that are remembered.
const CACHED: u64 = 512;
/// How long a name server may take, and how often it is asked again: both together are less than the five seconds that the
/// guest's own libraries wait.
const PATIENCE: Duration = Duration::from_secs(2);
const ATTEMPTS: usize = 1;
/// How long the name of the host itself holds, seconds.
const HOST_TTL: u32 = 60;

/// Answers questions.
pub(crate) struct NameServer {
    resolver: Option<TokioResolver>,
    pending: Cell<usize>,
}

impl NameServer {
    /// One that asks these; without any it only knows the host.
    pub(crate) fn new(resolvers: &[SocketAddr]) -> io::Result<Self> {
        let servers = resolvers.iter().map(|server| {
            let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
                connection.port = server.port();
                connection
            });
            NameServerConfig::new(server.ip(), true, connections.into())
        });
        let mut options = ResolverOpts::default();
        options.timeout = PATIENCE;
        options.attempts = ATTEMPTS;
        options.cache_size = CACHED;
        options.use_hosts_file = ResolveHosts::Never;
        options.preserve_intermediates = true;
        options.edns0 = true;
        let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
        let resolver = (!resolvers.is_empty())
            .then(|| {
                let provider = TokioRuntimeProvider::default();
                TokioResolver::builder_with_config(config, provider).with_options(options).build()
            })
            .transpose()
            .map_err(io::Error::other)?;
        Ok(Self { resolver, pending: Cell::new(0) })
    }

    /// The address of a name that the host itself wants to reach.
    pub(crate) async fn host(&self, name: &str) -> io::Result<IpAddr> {
        if let Ok(address) = name.parse() {
            return Ok(address);
        }
        let resolver = self.resolver.as_ref().ok_or_else(|| io::Error::other("there is no name server"))?;
        let found = resolver.lookup_ip(name).await.map_err(io::Error::other)?;
        found.iter().next().ok_or_else(|| io::Error::other(format!("{name} has no address")))
    }

    /// The answer to a question; `None` if it is none, or too much is asked at once. `over_udp`: an answer that is too long
    /// says so instead.
    pub(crate) async fn answer(
        &self,
        decisions: &Decisions,
        question: &[u8],
        over_udp: bool,
    ) -> Option<Vec<u8>> {
        if question.len() > QUESTION_LIMIT || self.pending.get() >= PENDING {
            return None;
        }
        self.pending.set(self.pending.get() + 1);
        let _pending = scopeguard(|| self.pending.set(self.pending.get() - 1));
        let message = match Message::from_vec(question) {
            Ok(message) if message.metadata.message_type == MessageType::Query => message,
            Ok(_) => return None,
            Err(_) => {
                let id = u16::from_be_bytes(*question.first_chunk()?);
                return Message::error_msg(id, OpCode::Query, ResponseCode::FormErr).to_vec().ok();
            }
        };
        let mut reply = Message::response(message.metadata.id, message.metadata.op_code);
        reply.metadata.recursion_desired = message.metadata.recursion_desired;
        reply.metadata.recursion_available = true;
        reply.metadata.checking_disabled = message.metadata.checking_disabled;
        if message.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(DATAGRAM_LIMIT);
            reply.set_edns(edns);
        }
        let query = match message.queries.as_slice() {
            _ if message.metadata.op_code != OpCode::Query => Err(ResponseCode::NotImp),
            [query] if query.query_class() == DNSClass::IN => Ok(query.clone()),
            [_] => Err(ResponseCode::Refused),
            _ => Err(ResponseCode::FormErr),
        };
        reply.metadata.response_code = match query {
            Err(code) => code,
            Ok(query) => {
                reply.add_query(query.clone());
                match self.records(decisions, &query).await {
                    Ok(records) => {
                        reply.add_answers(records);
                        ResponseCode::NoError
                    }
                    Err(code) => code,
                }
            }
        };
        let bytes = reply.to_vec().ok()?;
        let limit = match over_udp {
            true => message.edns.map_or(DATAGRAM, |edns| edns.max_payload().clamp(DATAGRAM, DATAGRAM_LIMIT)),
            false => u16::MAX,
        };
        if bytes.len() <= usize::from(limit) { Some(bytes) } else { reply.truncate().to_vec().ok() }
    }

    async fn records(&self, decisions: &Decisions, query: &Query) -> Result<Vec<Record>, ResponseCode> {
        let name = query.name();
        let text = readable(name).ok_or(ResponseCode::NXDomain)?;
        let kind = query.query_type();
        let one = |address: Ipv4Addr| {
            let is_address = kind == RecordType::A;
            Ok(is_address
                .then(|| Record::from_rdata(name.clone(), HOST_TTL, RData::A(rdata::A(address))))
                .into_iter()
                .collect())
        };
        if text == HOST_NAME {
            return one(HOST);
        }
        if text == "localhost" || text.ends_with(".localhost") {
            return one(Ipv4Addr::LOCALHOST);
        }
        let grounds = decisions.resolve(&text).ok_or(ResponseCode::NXDomain)?;
        match kind {
            RecordType::A
            | RecordType::CAA
            | RecordType::CNAME
            | RecordType::MX
            | RecordType::NAPTR
            | RecordType::NS
            | RecordType::PTR
            | RecordType::SOA
            | RecordType::SRV
            | RecordType::SSHFP
            | RecordType::TLSA
            | RecordType::TXT => {}
            RecordType::ANY | RecordType::AXFR | RecordType::IXFR => return Err(ResponseCode::NotImp),
            // AAAA, HTTPS and what else there may be: there is none.
            _ => return Ok(Vec::new()),
        }
        let resolver = self.resolver.as_ref().ok_or(ResponseCode::ServFail)?;
        let mut asked = name.clone();
        // Nothing is looked for below the host's own domain.
        asked.set_fqdn(true);
        let found = match resolver.lookup(asked, kind).await {
            Ok(found) => found,
            Err(NetError::Dns(DnsError::NoRecordsFound(none)))
                if none.response_code == ResponseCode::NoError =>
            {
                return Ok(Vec::new());
            }
            Err(NetError::Dns(DnsError::NoRecordsFound(none))) => return Err(none.response_code),
            Err(error) => {
                tracing::debug!("a name is not resolved: {error}");
                return Err(ResponseCode::ServFail);
            }
        };
        let mut records = Vec::new();
        let mut addresses = Vec::new();
        for record in found.answers() {
            match &record.data {
                RData::CNAME(target) => {
                    let target = readable(&target.0).ok_or(ResponseCode::NXDomain)?;
                    if !decisions.stands_for(&text, &target) {
                        return Err(ResponseCode::NXDomain);
                    }
                }
                RData::A(address) => addresses.push(address.0),
                data if data.record_type() != kind => continue,
                _ => {}
            }
            records.push(record.clone());
        }
        decisions.answered(&text, &addresses, &grounds);
        Ok(records)
    }
}

/// A name as text; `None` for one that no host, service or zone has: what it means would be read in two ways.
fn readable(name: &Name) -> Option<String> {
    let known = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'/');
    let mut text = String::new();
    for label in name.iter() {
        if !label.iter().all(known) {
            return None;
        }
        if !text.is_empty() {
            text.push('.');
        }
        text.push_str(&std::str::from_utf8(label).ok()?.to_ascii_lowercase());
    }
    Some(text)
}

/// Does something when it is dropped.
fn scopeguard(end: impl FnMut()) -> impl Drop {
    struct Guard<F: FnMut()>(F);
    impl<F: FnMut()> Drop for Guard<F> {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    Guard(end)
}
