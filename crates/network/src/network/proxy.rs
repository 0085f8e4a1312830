//! A proxy of the host's environment, asked with CONNECT (RFC 9110, 9.3.6).

use std::io;
use std::net::{IpAddr, SocketAddr};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::Rule;
use crate::policy::rule::canonical;

/// Most bytes of a proxy's answer.
const ANSWER_LIMIT: usize = 8 << 10;

/// A proxy, understood.
#[derive(Debug, Clone)]
pub(crate) struct Proxy {
    pub host: String,
    pub port: u16,
    authorization: Option<String>,
    except: Vec<String>,
}

impl Proxy {
    /// Reads the environment's words.
    ///
    /// # Errors
    /// Why it cannot be used, in words that hold no password.
    pub(crate) fn parse(url: &str, except: &str) -> Result<Self, String> {
        let rest = match url.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some((scheme, _)) => return Err(format!("proxies are spoken to in http, not in {scheme}")),
            None => url,
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (user, host) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        let (host, port) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, rest)) => (host, rest.strip_prefix(':')),
            None => host.split_once(':').map_or((host, None), |(host, port)| (host, Some(port))),
        };
        let port = match port {
            None | Some("") => 80,
            Some(port) => port.parse().map_err(|_| "the proxy's port is no number".to_owned())?,
        };
        if host.is_empty() {
            return Err("the proxy has no host".into());
        }
        let authorization = user.map(|user| format!("Basic {}", STANDARD.encode(unescape(user))));
        let except = except.split(',').map(|part| canonical(part.trim())).filter(|part| !part.is_empty());
        Ok(Self { host: host.to_owned(), port, authorization, except: except.collect() })
    }

    /// Whether it is to be asked for a target. The host's own services never are.
    pub(crate) fn applies(&self, target: SocketAddr, name: Option<&str>) -> bool {
        let address = target.ip();
        if address.is_loopback() {
            return false;
        }
        !self.except.iter().any(|part| {
            let (part, port) = match part.rsplit_once(':') {
                Some((rest, port)) if !rest.contains(':') => (rest, port.parse().ok()),
                _ => (part.as_str(), None),
            };
            port.is_none_or(|port: u16| port == target.port())
                && (part == "*" || is_about(part, address) || name.is_some_and(|name| is_suffix(part, name)))
        })
    }

    /// Has the proxy connect to a target.
    pub(crate) async fn connect(&self, mut stream: TcpStream, target: &str) -> io::Result<TcpStream> {
        let mut request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n");
        if let Some(authorization) = &self.authorization {
            request.push_str(&format!("Proxy-Authorization: {authorization}\r\n"));
        }
        request.push_str("\r\n");
        stream.write_all(request.as_bytes()).await?;
        // Byte by byte: what follows the answer is the connection's.
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            if answer.len() > ANSWER_LIMIT {
                return Err(io::Error::other("the proxy's answer does not end"));
            }
            answer.push(stream.read_u8().await?);
        }
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut headers);
        match (response.parse(&answer), response.code) {
            (Ok(_), Some(200..=299)) => Ok(stream),
            (Ok(_), Some(code)) => Err(io::Error::other(format!("the proxy answers {code}"))),
            _ => Err(io::Error::other("the proxy does not answer in HTTP")),
        }
    }
}

fn is_about(part: &str, address: IpAddr) -> bool {
    part.parse::<Rule>().is_ok_and(|rule| rule.is_about_address(address))
}

/// `example.com` and `.example.com` both mean the name and all below it, as for curl.
fn is_suffix(part: &str, name: &str) -> bool {
    let part = part.strip_prefix("*.").or_else(|| part.strip_prefix('.')).unwrap_or(part);
    name.strip_suffix(part).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Takes back what a URL escapes.
fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = (first == b'%')
            .then(|| after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok()))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &after[2..] } else { after };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_and_exceptions() {
        let proxy =
            Proxy::parse("http://us%65r:p%40ss@proxy.example:3128/", "corp.example, 10.0.0.0/8,.b:8080")
                .unwrap();
        assert_eq!((proxy.host.as_str(), proxy.port), ("proxy.example", 3128));
        assert_eq!(proxy.authorization.as_deref(), Some("Basic dXNlcjpwQHNz"));
        let applies = |target: &str, name| proxy.applies(target.parse().unwrap(), name);
        assert!(applies("198.51.100.1:443", Some("example.com")));
        assert!(applies("198.51.100.1:443", Some("notcorp.example")));
        for (target, name) in [
            ("198.51.100.1:443", Some("corp.example")),
            ("198.51.100.1:443", Some("a.corp.example")),
            ("10.1.2.3:443", None),
            ("127.0.0.1:80", None),
            ("198.51.100.1:8080", Some("a.b")),
        ] {
            assert!(!applies(target, name), "{target} {name:?}");
        }
        assert!(applies("198.51.100.1:80", Some("a.b")));
        assert_eq!(Proxy::parse("[::1]:8080", "").unwrap().host, "::1");
        assert_eq!(Proxy::parse("proxy", "*").unwrap().port, 80);
        assert!(!Proxy::parse("proxy", "*").unwrap().applies("198.51.100.1:80".parse().unwrap(), None));
        for url in ["https://proxy", "socks5://x", "http://", "http://h:x"] {
            assert!(Proxy::parse(url, "").is_err(), "{url}");
        }
    }
}
