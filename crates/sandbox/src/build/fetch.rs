//! What ADD takes from addresses, fetched on this machine through the build's egress policy. The solver's executor calls it.
//!
//! ```text
//! address ─► policy: name ─► resolved ─► policy: each address ─► connected to those that are left, by no other resolver
//!    ▲                                                                     │
//!    └──────────── redirect: at most 10, never from https to http ◄────────┤
//!                                                                          ▼
//!                                                        body, bounded ─► the solver's file
//! ```
//! Every hop has a client of its own, so that no connection outlives the question whether it may be made. If a proxy of the
//! environment applies, it is the proxy that connects: the name is asked after all the same, and so is what it leads to here, if
//! names can be resolved here.

use std::error::Error;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use agentkernel_build::executor::Failure;
use agentkernel_build::{Event, OnEvent};
use agentkernel_image::http::{self, Reason};
use agentkernel_network::{Mode, Policy, Protocol, Refusal, Rule};
use reqwest::dns::{Name, Resolve, Resolving};
use reqwest::header::LOCATION;
use reqwest::{Response, StatusCode, Url, redirect};
use tokio::time::timeout;

use crate::configuration::NetworkMode;
use crate::network::NetworkSpec;
use crate::problem::problem;

/// What ADD may reach, and the programs of RUN.
#[derive(Clone, Debug, Default)]
pub struct Egress {
    /// What holds where no rule says anything.
    pub mode: Mode,
    /// What is allowed.
    pub allow: Vec<Rule>,
    /// What is denied, whatever else is said.
    pub deny: Vec<Rule>,
}

impl Egress {
    /// The same for the machines of a build.
    pub(super) fn network(&self) -> NetworkSpec {
        let mode = match self.mode {
            Mode::None => NetworkMode::None,
            Mode::Public => NetworkMode::Public,
        };
        NetworkSpec { mode, allow: self.allow.clone(), deny: self.deny.clone(), ports: Vec::new() }
    }

    /// The policy of this machine.
    pub(super) fn policy(&self) -> Policy {
        let own = super::addresses::own();
        Policy::new(self.mode, self.allow.clone(), self.deny.clone(), own)
    }
}

/// Bounds of one fetch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Most bytes.
    bytes: u64,
    /// Most redirects.
    redirects: usize,
    /// How often something is tried that may be better a moment later.
    attempts: u32,
    /// The pause after the first failure; it doubles with each.
    backoff: Duration,
    /// How long a name may take to be resolved, or a connection to come about, TLS included.
    connect: Duration,
    /// How long nothing may arrive.
    idle: Duration,
    /// How long all of it may take.
    whole: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 4 << 30,
            redirects: 10,
            attempts: 4,
            backoff: Duration::from_millis(300),
            connect: Duration::from_secs(15),
            idle: Duration::from_secs(60),
            whole: Duration::from_secs(2 * 60 * 60),
        }
    }
}

/// Why nothing was fetched.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("{address} is no address: {reason}")]
    Address { address: String, reason: String },
    #[error(transparent)]
    Refused(#[from] Box<Refusal>),
    #[error("{place} redirects to {target}: {refusal}")]
    RefusedRedirect { place: String, target: String, refusal: Box<Refusal> },
    #[error("{place} redirects to where nothing may go: {reason}")]
    Redirect { place: String, reason: String },
    #[error("cannot find {host}: {reason}")]
    Resolve { host: String, reason: String },
    #[error("cannot reach {place}: {reason}")]
    Connect { place: String, reason: String },
    #[error("the TLS connection to {place} failed: {reason}")]
    Tls { place: String, reason: String },
    #[error("{place} answers {status}")]
    Status { place: String, status: StatusCode },
    #[error("the connection to {place} broke: {reason}")]
    Broken { place: String, reason: String },
    #[error("{place} sends more than {limit} bytes")]
    TooLarge { place: String, limit: u64 },
    #[error("{place} took longer than {} minutes", limit.as_secs() / 60)]
    TooSlow { place: String, limit: Duration },
    #[error("cannot prepare for HTTP: {reason}")]
    Client { reason: String },
    #[error("cannot keep what is fetched: {source}")]
    Disk { source: io::Error },
}

impl FetchError {
    /// Whether it may be better a moment later.
    fn is_transient(&self) -> bool {
        match self {
            Self::Connect { .. } => true,
            Self::Status { status, .. } => status.is_server_error(),
            _ => false,
        }
    }

    /// What the user can do about it, where there is something.
    fn hint(&self) -> Option<String> {
        match self {
            Self::Refused(refusal) | Self::RefusedRedirect { refusal, .. } => Some(refusal.hint()),
            Self::Resolve { .. } | Self::Connect { .. } => Some(
                "check the address and the network; a proxy is taken from HTTPS_PROXY and NO_PROXY".into(),
            ),
            Self::Tls { .. } => Some(
                "if a proxy or the server has a certificate authority of its own, add it to this machine's \
                 (update-ca-certificates), or name its file in SSL_CERT_FILE"
                    .into(),
            ),
            Self::Status { status: StatusCode::NOT_FOUND, .. } => {
                Some("check the address: nothing is there".into())
            }
            Self::Status { status, .. } if status.is_server_error() => {
                Some("try again later: the fault is the server's".into())
            }
            Self::Broken { .. } => Some("try again: nothing of it was kept".into()),
            Self::Disk { source } if source.kind() == io::ErrorKind::StorageFull => {
                Some("free some disk space: agentkernel images prune".into())
            }
            _ => None,
        }
    }
}

/// Writes what is at `address` to `target`, an empty file.
pub(super) async fn fetch(
    policy: &Policy,
    limits: &Limits,
    address: &str,
    target: &mut File,
    on_event: OnEvent<'_>,
) -> Result<(), Failure> {
    let fetched = match parse(address) {
        Ok(url) => {
            let place = http::place(&url);
            let late = |_| Err(FetchError::TooSlow { place, limit: limits.whole });
            let fetch = Fetch { policy, limits, address };
            timeout(limits.whole, fetch.whole(url, target, on_event)).await.unwrap_or_else(late)
        }
        Err(error) => Err(error),
    };
    fetched.map_err(|error| Failure {
        hint: error.hint(),
        ..Failure::new(problem("fetch", &error, None).message)
    })
}

fn parse(address: &str) -> Result<Url, FetchError> {
    let wrong = |reason: String| FetchError::Address { address: address.to_owned(), reason };
    let url = Url::parse(address).map_err(|error| wrong(error.to_string()))?;
    match url.scheme() {
        "http" | "https" => Ok(url),
        other => Err(wrong(format!("{other} is not spoken here"))),
    }
}

/// Where a redirect leads: never from an encrypted connection to one that is not.
fn next(url: &Url, location: Option<&str>) -> Result<Url, FetchError> {
    let elsewhere = |reason: &str| FetchError::Redirect { place: http::place(url), reason: reason.into() };
    let next = location.and_then(|location| url.join(location).ok());
    let next = next.ok_or_else(|| elsewhere("it names no address"))?;
    match (url.scheme(), next.scheme()) {
        ("http", "http") | (_, "https") => Ok(next),
        ("https", "http") => Err(elsewhere("from HTTPS to HTTP")),
        _ => Err(elsewhere("to what is neither HTTP nor HTTPS")),
    }
}

struct Fetch<'a> {
    policy: &'a Policy,
    limits: &'a Limits,
    address: &'a str,
}

impl Fetch<'_> {
    async fn whole(&self, url: Url, target: &mut File, on_event: OnEvent<'_>) -> Result<(), FetchError> {
        let mut response = self.follow(url).await?;
        let place = http::place(response.url());
        let size = response.content_length();
        let too_large = || FetchError::TooLarge { place: place.clone(), limit: self.limits.bytes };
        if size.is_some_and(|size| size > self.limits.bytes) {
            return Err(too_large());
        }
        let mut bytes = 0;
        loop {
            let chunk = match timeout(self.limits.idle, response.chunk()).await {
                Ok(chunk) => chunk.map_err(|error| broken(error, response.url()))?,
                Err(_) => return Err(self.stalled(response.url())),
            };
            let Some(chunk) = chunk else { break };
            bytes += chunk.len() as u64;
            if bytes > self.limits.bytes {
                return Err(too_large());
            }
            target.write_all(&chunk).map_err(|source| FetchError::Disk { source })?;
            on_event(Event::Fetch { address: self.address, bytes, size });
        }
        target.rewind().map_err(|source| FetchError::Disk { source })
    }

    /// Asks, and follows where it is sent to; an answer with a body.
    async fn follow(&self, mut url: Url) -> Result<Response, FetchError> {
        for hop in 0..=self.limits.redirects {
            let response = self.send(&url).await.map_err(|error| match error {
                FetchError::Refused(refusal) if hop > 0 => {
                    let place = parse(self.address).map_or_else(|_| String::new(), |url| http::place(&url));
                    FetchError::RefusedRedirect { place, target: http::place(&url), refusal }
                }
                other => other,
            })?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Err(FetchError::Status { place: http::place(&url), status });
            }
            url = next(&url, response.headers().get(LOCATION).and_then(|value| value.to_str().ok()))?;
        }
        let reason = format!("there are more than {} redirects", self.limits.redirects);
        Err(FetchError::Redirect { place: http::place(&url), reason })
    }

    /// Asks once, or again where that may help.
    async fn send(&self, url: &Url) -> Result<Response, FetchError> {
        let mut pause = self.limits.backoff;
        for _ in 1..self.limits.attempts {
            match self.try_send(url).await {
                Err(error) if error.is_transient() => {
                    tracing::debug!(%error, ?pause, "will be tried again");
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                answer => return answer,
            }
        }
        self.try_send(url).await
    }

    async fn try_send(&self, url: &Url) -> Result<Response, FetchError> {
        let (addresses, missing) = self.resolve(url).await?;
        let is_loopback = !addresses.is_empty() && addresses.iter().all(|address| address.ip().is_loopback());
        let host = url.host_str().unwrap_or_default().to_owned();
        let resolver = Permitted { host: host.clone(), addresses, missing: missing.clone() };
        let mut builder =
            http::client(self.limits.connect).redirect(redirect::Policy::none()).dns_resolver(resolver);
        if is_loopback {
            builder = builder.no_proxy();
        }
        let client = builder.build().map_err(|error| FetchError::Client { reason: error.to_string() })?;
        let response = match timeout(self.limits.idle, client.get(url.clone()).send()).await {
            Ok(Ok(response)) => response,
            // Only if no proxy resolved it.
            Ok(Err(error)) if error.is_connect() && is_unresolved(&error) => {
                return Err(FetchError::Resolve { host, reason: missing.unwrap_or_default() });
            }
            Ok(Err(error)) => return Err(broken(error, url)),
            Err(_) => return Err(self.stalled(url)),
        };
        match response.status() {
            status if status.is_server_error() => Err(FetchError::Status { place: http::place(url), status }),
            _ => Ok(response),
        }
    }

    /// Addresses that may be connected to; if the name leads nowhere, why.
    async fn resolve(&self, url: &Url) -> Result<(Vec<SocketAddr>, Option<String>), FetchError> {
        let host = url.host_str().unwrap_or_default();
        let port = url.port_or_known_default().unwrap_or(80);
        // However it was spelt: hexadecimal, octal and short forms are written out by now.
        if let Ok(address) = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            self.policy.address(address, port, Protocol::Tcp, None)?;
            return Ok((vec![SocketAddr::new(address, port)], None));
        }
        self.policy.name(host, port, Protocol::Tcp)?;
        let found = match timeout(self.limits.connect, tokio::net::lookup_host((host, port))).await {
            Ok(found) => found.map_err(|error| error.to_string()),
            Err(_) => Err("no answer came".to_owned()),
        };
        // Behind a proxy names may be known to it alone.
        let found: Vec<SocketAddr> = match found {
            Ok(found) => found.collect(),
            // Whoever resolves it, it means itself (RFC 6761).
            Err(_) if is_localhost(host) => vec![SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)],
            Err(reason) => return Ok((Vec::new(), Some(crate::printable(&reason)))),
        };
        let mut refused = None;
        let mut permitted = Vec::new();
        for address in found {
            match self.policy.address(address.ip(), port, Protocol::Tcp, Some(host)) {
                Ok(_) => permitted.push(address),
                Err(refusal) => refused = refused.or(Some(refusal)),
            }
        }
        match refused {
            Some(refusal) if permitted.is_empty() => Err(FetchError::Refused(refusal)),
            _ => Ok((permitted, None)),
        }
    }

    fn stalled(&self, url: &Url) -> FetchError {
        let reason = format!("nothing came for {} seconds", self.limits.idle.as_secs());
        FetchError::Broken { place: http::place(url), reason }
    }
}

/// Gives the addresses that were asked after, and no others; names of proxies are the system's to resolve.
struct Permitted {
    host: String,
    addresses: Vec<SocketAddr>,
    missing: Option<String>,
}

/// The name of what is fetched leads nowhere.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unresolved(String);

impl Resolve for Permitted {
    fn resolve(&self, name: Name) -> Resolving {
        if name.as_str().eq_ignore_ascii_case(&self.host) {
            let answer = match &self.missing {
                Some(reason) => Err(Unresolved(reason.clone()).into()),
                None => Ok(Box::new(self.addresses.clone().into_iter()) as reqwest::dns::Addrs),
            };
            return Box::pin(std::future::ready(answer));
        }
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            Ok(Box::new(found.collect::<Vec<_>>().into_iter()) as reqwest::dns::Addrs)
        })
    }
}

fn is_localhost(host: &str) -> bool {
    let host = host.trim_end_matches('.');
    host == "localhost" || host.ends_with(".localhost")
}

fn is_unresolved(error: &reqwest::Error) -> bool {
    let mut next: Option<&(dyn Error + 'static)> = error.source();
    while let Some(cause) = next {
        if cause.is::<Unresolved>() {
            return true;
        }
        next = cause.source();
    }
    false
}

fn broken(error: reqwest::Error, url: &Url) -> FetchError {
    let place = http::place(url);
    let error = error.without_url();
    let Reason { text: reason, is_tls, .. } = Reason::of(&error);
    if is_tls {
        FetchError::Tls { place, reason }
    } else if error.is_connect() {
        FetchError::Connect { place, reason }
    } else if error.is_builder() {
        FetchError::Client { reason }
    } else {
        FetchError::Broken { place, reason }
    }
}

#[cfg(test)]
mod tests;
