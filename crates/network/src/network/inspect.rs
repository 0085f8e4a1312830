//! What a connection's first bytes say whom they are for: the name in a TLS ClientHello, hosts of an HTTP request.

use rustls::server::Acceptor;

/// Most bytes of a beginning that are waited for.
pub(crate) const LIMIT: usize = 16 << 10;
/// The content type of a TLS record that holds a handshake (RFC 8446, 5.1).
const HANDSHAKE: u8 = 22;
/// Most headers of a request.
const HEADERS: usize = 100;

/// What a beginning is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Beginning {
    /// Too little to tell.
    Partial,
    /// TLS, with the name it asks for.
    Tls(Option<String>),
    /// HTTP, with all hosts it names.
    Http(Vec<String>),
    /// It begins like one of them, and goes on in another way: the reason.
    Malformed(&'static str),
    /// Neither.
    Other,
}

/// Reads the beginning of what a guest sends.
pub(crate) fn beginning(bytes: &[u8]) -> Beginning {
    match bytes.first() {
        None => Beginning::Partial,
        Some(&HANDSHAKE) => hello(bytes),
        Some(_) => request(bytes),
    }
}

fn hello(mut bytes: &[u8]) -> Beginning {
    let mut acceptor = Acceptor::default();
    while !bytes.is_empty() {
        if !matches!(acceptor.read_tls(&mut bytes), Ok(1..)) {
            return Beginning::Malformed("it begins like TLS and has no ClientHello");
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                return Beginning::Tls(accepted.client_hello().server_name().map(str::to_owned));
            }
            Err(_) => return Beginning::Malformed("it begins like TLS and has no ClientHello"),
        }
    }
    Beginning::Partial
}

fn request(bytes: &[u8]) -> Beginning {
    // HTTP/2 without TLS begins so (RFC 9113, 3.4); its requests are packed.
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n";
    let compared = bytes.len().min(PREFACE.len());
    if bytes[..compared] == PREFACE[..compared] {
        return match compared == PREFACE.len() {
            true => Beginning::Malformed("it is HTTP/2 without TLS, whose hosts are not read here"),
            false => Beginning::Partial,
        };
    }
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Beginning::Partial,
        // No line of a request.
        Err(httparse::Error::Token | httparse::Error::NewLine) if request.path.is_none() => {
            return Beginning::Other;
        }
        Err(_) => return Beginning::Malformed("it begins like HTTP and is no request"),
    }
    let mut hosts = Vec::new();
    let path = request.path.unwrap_or_default();
    if request.method == Some("CONNECT") {
        hosts.push(host(path));
    } else if let Some((_, rest)) = path.split_once("://") {
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        hosts.push(host(authority.rsplit_once('@').map_or(authority, |(_, host)| host)));
    }
    for header in request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("host")) {
        match std::str::from_utf8(header.value) {
            Ok(value) => hosts.push(host(value.trim())),
            Err(_) => return Beginning::Malformed("its Host is no name"),
        }
    }
    Beginning::Http(hosts)
}

/// A host without its port, and an address without its brackets.
fn host(authority: &str) -> String {
    if let Some((address, _)) = authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return address.to_owned();
    }
    authority.split_once(':').map_or(authority, |(host, _)| host).to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn client_hello(name: &str) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        let name = name.to_owned().try_into().unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_client_hello_in_pieces() {
        let bytes = client_hello("some.example");
        for cut in 1..bytes.len() {
            assert_eq!(beginning(&bytes[..cut]), Beginning::Partial, "{cut}");
        }
        assert_eq!(beginning(&bytes), Beginning::Tls(Some("some.example".into())));
        let followed = [&bytes[..], b"early data"].concat();
        assert_eq!(beginning(&followed), Beginning::Tls(Some("some.example".into())));
        assert_eq!(beginning(&client_hello("192.0.2.1")), Beginning::Tls(None));
        assert!(matches!(beginning(&[22, 3, 1, 0, 4, 2, 0, 0, 0]), Beginning::Malformed(_)));
        assert!(matches!(beginning(&[22, 0xff, 0xff, 0xff, 0xff, 0, 0]), Beginning::Malformed(_)));
    }

    #[test]
    fn hosts_of_requests() {
        for (text, hosts) in [
            ("GET / HTTP/1.1\r\nHost: a.example:8080\r\n\r\n", vec!["a.example"]),
            ("GET / HTTP/1.1\r\nhost:a.example\r\nHOST: b.example\r\n\r\n", vec!["a.example", "b.example"]),
            (
                "GET http://u:p@c.example:1/x HTTP/1.1\r\nHost: a.example\r\n\r\n",
                vec!["c.example", "a.example"],
            ),
            ("CONNECT d.example:443 HTTP/1.1\r\nHost: [::1]:443\r\n\r\n", vec!["d.example", "::1"]),
            ("GET / HTTP/1.0\r\n\r\n", vec![]),
        ] {
            for cut in 1..text.len() - 1 {
                assert_eq!(beginning(&text.as_bytes()[..cut]), Beginning::Partial, "{text} {cut}");
            }
            let hosts = hosts.into_iter().map(str::to_owned).collect();
            assert_eq!(beginning(text.as_bytes()), Beginning::Http(hosts));
        }
        assert_eq!(beginning(b"SSH-2.0-OpenSSH_9.2\r\n"), Beginning::Other);
        assert_eq!(beginning(b"\0\0\0\x05hello"), Beginning::Other);
        assert!(matches!(beginning(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), Beginning::Malformed(_)));
        assert!(matches!(beginning(b"GET / HTTP/1.1\r\nHo st: x\r\n\r\n"), Beginning::Malformed(_)));
    }
}
