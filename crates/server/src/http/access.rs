//! Who may come in.
//!
//! With keys: whoever has one. Without: whoever reaches the unix socket, and on loopback the user themselves (and root),
//! if the request is for this machine and comes from no other place's page: a page of the web must not drive the server,
//! also not by a name that it had resolved to 127.0.0.1.

use std::net::{IpAddr, SocketAddr};

use agentkernel_sandbox::configuration::ApiKey;
use agentkernel_sandbox::{Problem, plain};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Uri, header};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Keys, as their hashes: all comparisons take the same time, whatever their lengths.
#[derive(Clone, Default)]
pub struct Keys {
    hashes: Vec<[u8; 32]>,
    /// What holds without a key holds with one, too: the keys are a stranger's.
    pub local: bool,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Keys").field("count", &self.hashes.len()).finish()
    }
}

impl Keys {
    /// Adds a key.
    pub fn add(&mut self, key: &ApiKey) {
        self.hashes.push(Sha256::digest(key.expose().as_bytes()).into());
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    fn know(&self, key: &[u8]) -> bool {
        let hash = Sha256::digest(key);
        let mut known = subtle::Choice::from(0);
        for other in &self.hashes {
            known |= other.ct_eq(hash.as_slice());
        }
        known.into()
    }
}

/// By which way a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// A unix socket of the user's own.
    Unix,
    /// TCP; whether the other end is a process of the user's, or root's, on this machine.
    Tcp { own: bool },
}

/// Lets a request in, or says why not.
///
/// # Errors
/// Code `unauthorized`, `not-local`.
pub(crate) fn check(keys: &Keys, way: Way, uri: &Uri, headers: &HeaderMap) -> Result<(), Problem> {
    if !keys.is_empty() {
        let given = key(headers);
        if !given.is_some_and(|given| given.len() <= ApiKey::LONGEST && keys.know(given)) {
            let hint = Some("send it as authorization: Bearer KEY");
            let message = if given.is_some() { "the API key is wrong" } else { "there is no API key" };
            return Err(plain("unauthorized", message, hint));
        }
        if !keys.local {
            return Ok(());
        }
    }
    let Way::Tcp { own } = way else { return Ok(()) };
    let hint = Some("start the server with --api-key-file to serve others");
    if !own {
        return Err(plain("not-local", "without an API key only its own user is served", hint));
    }
    if !is_for_this_machine(uri, headers) {
        let message = "without an API key only requests whose Host is this machine are served";
        return Err(plain("not-local", message, hint));
    }
    // A page of another port of this machine's may be a sandbox's: only the server's own would be trusted.
    let host = headers.get(header::HOST).map_or(&[][..], |host| host.as_bytes());
    let own_page = |origin: &[u8]| {
        let place = origin.strip_prefix(b"http://");
        place.is_some_and(|place| place.eq_ignore_ascii_case(host))
    };
    let from = headers.get_all("sec-fetch-site").iter();
    let from_elsewhere = { from }.any(|from| !matches!(from.as_bytes(), b"same-origin" | b"none"));
    if from_elsewhere || !headers.get_all(header::ORIGIN).iter().all(|origin| own_page(origin.as_bytes())) {
        let message = "without an API key no pages of other places are served";
        return Err(plain("not-local", message, hint));
    }
    Ok(())
}

/// The key that a request brings.
fn key(headers: &HeaderMap) -> Option<&[u8]> {
    if let Some(value) = headers.get("x-api-key") {
        return Some(value.as_bytes());
    }
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

/// Whether a request names this machine, and nothing else.
fn is_for_this_machine(uri: &Uri, headers: &HeaderMap) -> bool {
    let hosts: Vec<_> = headers.get_all(header::HOST).iter().collect();
    let [host] = hosts[..] else { return false };
    let host = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok());
    host.is_some_and(|host| is_local(&host)) && uri.authority().is_none_or(is_local)
}

fn is_local(authority: &Authority) -> bool {
    if authority.as_str().contains('@') {
        return false;
    }
    let host = authority.host();
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost")
        || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether the other end of a loopback connection is a process of this user's, or of root's. `None` if the system does not
/// tell.
pub(super) fn is_own(server: SocketAddr, client: SocketAddr) -> Option<bool> {
    let own = rustix::process::geteuid().as_raw();
    let table = if client.is_ipv4() { "/proc/net/tcp" } else { "/proc/net/tcp6" };
    let text = std::fs::read_to_string(table).ok()?;
    let wanted = [shown(client), shown(server)];
    // Format: proc_net_tcp of the kernel's documentation: slot, local address, remote address, state, queues, timer,
    // retransmissions, user id, timeout, inode.
    let (owner, inode) = text.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let ends = [fields.next()?, fields.next()?];
        let fits = ends == [wanted[0].as_str(), wanted[1].as_str()];
        fits.then(|| Some((fields.nth(4)?.parse::<u32>().ok()?, fields.nth(1)?.parse::<u64>().ok()?)))?
    })?;
    // One that its process has closed already is shown as nobody's: without an inode, and as if it was root's.
    Some(inode != 0 && (owner == own || owner == 0))
}

/// An address as `/proc/net/tcp` has it: words of the network's order, read as the machine's own.
fn shown(address: SocketAddr) -> String {
    let words = match address.ip() {
        IpAddr::V4(ip) => format!("{:08X}", u32::from_ne_bytes(ip.octets())),
        IpAddr::V6(ip) => {
            let octets = ip.octets();
            let words = octets.as_chunks::<4>().0.iter();
            words.map(|word| format!("{:08X}", u32::from_ne_bytes(*word))).collect()
        }
    };
    format!("{words}:{:04X}", address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(way: Way, keys: &Keys, uri: &str, pairs: &[(&'static str, &str)]) -> Option<String> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        check(keys, way, &uri.parse().unwrap(), &headers).err().map(|problem| problem.code)
    }

    #[test]
    fn without_a_key_only_what_is_local_is_served() {
        let way = Way::Tcp { own: true };
        for (host, origin, served) in [
            ("localhost", None, true),
            ("LOCALHOST:18888", None, true),
            ("127.0.0.1:1", None, true),
            ("127.9.9.9", None, true),
            ("[::1]:18888", Some("http://[::1]:18888"), true),
            ("localhost", Some("http://LOCALHOST"), true),
            // Another port's page may be a sandbox's.
            ("localhost:18888", Some("http://localhost:3000"), false),
            ("localhost:18888", Some("http://localhost"), false),
            ("localhost", Some("https://localhost"), false),
            ("evil.example", None, false),
            ("localhost.evil.example", None, false),
            ("127.0.0.1.evil.example", None, false),
            ("localhost@evil.example", None, false),
            ("10.0.0.1", None, false),
            ("0.0.0.0", None, false),
            ("", None, false),
            ("localhost", Some("http://evil.example"), false),
            ("localhost", Some("http://localhost.evil.example"), false),
            ("localhost", Some("null"), false),
            ("localhost", Some("file://"), false),
            ("localhost", Some(""), false),
        ] {
            let mut pairs = vec![("host", host)];
            pairs.extend(origin.map(|origin| ("origin", origin)));
            let code = asked(way, &Keys::default(), "/health", &pairs);
            assert_eq!(code.is_none(), served, "{host} {origin:?}");
        }
        let none = Keys::default();
        assert_eq!(asked(way, &none, "/health", &[]), Some("not-local".into()), "no host at all");
        let twice = [("host", "localhost"), ("host", "evil.example")];
        assert_eq!(asked(way, &none, "/health", &twice), Some("not-local".into()));
        assert_eq!(
            asked(way, &none, "http://evil.example/health", &[("host", "localhost")]),
            Some("not-local".into())
        );
        for (site, served) in
            [("none", true), ("same-origin", true), ("same-site", false), ("cross-site", false)]
        {
            let pairs = [("host", "localhost"), ("sec-fetch-site", site)];
            assert_eq!(asked(way, &none, "/health", &pairs).is_none(), served, "{site}");
        }
        let other = Way::Tcp { own: false };
        assert_eq!(asked(other, &none, "/health", &[("host", "localhost")]), Some("not-local".into()));
        assert_eq!(asked(Way::Unix, &none, "/health", &[]), None);
    }

    #[test]
    fn with_a_key_only_who_has_it_is_served() {
        let mut keys = Keys::default();
        keys.add(&"secret".parse().unwrap());
        keys.add(&"another".parse().unwrap());
        for way in [Way::Unix, Way::Tcp { own: true }, Way::Tcp { own: false }] {
            for (pairs, served) in [
                (vec![("authorization", "Bearer secret")], true),
                (vec![("authorization", "bearer another")], true),
                (vec![("x-api-key", "secret"), ("host", "evil.example")], true),
                (vec![("authorization", "Bearer secre")], false),
                (vec![("authorization", "Bearer secret2")], false),
                (vec![("authorization", "Basic secret")], false),
                (vec![("authorization", "secret")], false),
                (vec![("authorization", "é")], false),
                (vec![("x-api-key", "")], false),
                (vec![], false),
            ] {
                let code = asked(way, &keys, "/sandboxes", &pairs);
                assert_eq!(code.is_none(), served, "{way:?} {pairs:?}");
            }
        }
        assert!(!format!("{keys:?}").contains("secret"));
        // A stranger's key opens nothing that no key would open.
        keys.local = true;
        let way = Way::Tcp { own: true };
        for (host, served) in [("localhost", true), ("evil.example", false)] {
            let pairs = [("host", host), ("x-api-key", "secret")];
            assert_eq!(asked(way, &keys, "/sandboxes", &pairs).is_none(), served, "{host}");
        }
    }

    #[test]
    fn the_system_tells_whose_a_connection_is() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = std::net::TcpListener::bind(address) else { continue };
            let server = listener.local_addr().unwrap();
            let client = std::net::TcpStream::connect(server).unwrap();
            assert_eq!(is_own(server, client.local_addr().unwrap()), Some(true));
            assert_eq!(is_own(server, SocketAddr::new(server.ip(), 1)), None);
            // Whoever closed it at once cannot be told any more, and is not taken for root.
            let gone = client.local_addr().unwrap();
            drop(client);
            assert_ne!(is_own(server, gone), Some(true));
        }
    }
}
