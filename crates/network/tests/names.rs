//! Names, and what is said first on connections that names led to.

mod guest;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use agentkernel_network::audit::{Kind, Verdict};
use agentkernel_network::{HOST, Mode, Proxy};
use guest::{Guest, Upstream, a, alias, echo_service, listener, question};
use hickory_resolver::proto::op::{Message, ResponseCode};
use hickory_resolver::proto::rr::RecordType;
use smoltcp::socket::tcp::State;

/// Where all names lead; everything there is reached through a proxy.
const SOMEWHERE: [u8; 4] = [198, 51, 100, 7];

fn upstream() -> Upstream {
    let rounds = AtomicUsize::new(0);
    Upstream::new(move |query, _| {
        let name = query.name();
        let text = name.to_ascii();
        if query.query_type() != RecordType::A {
            return (ResponseCode::NoError, Vec::new());
        }
        let first = rounds.fetch_add(usize::from(text.starts_with("rebinds")), Ordering::Relaxed) == 0;
        let records = match text.as_str() {
            "none.example." => return (ResponseCode::NXDomain, Vec::new()),
            "chain.example." => vec![
                alias(name, "x.denied.example."),
                a(&"x.denied.example.".parse().unwrap(), SOMEWHERE, 60),
            ],
            "fine-chain.example." => {
                vec![alias(name, "cdn.test."), a(&"cdn.test.".parse().unwrap(), SOMEWHERE, 60)]
            }
            "many.example." => (0..200).map(|n| a(name, [198, 51, 100, n], 60)).collect(),
            "metadata.example." => vec![a(name, [169, 254, 169, 254], 60)],
            "rebinds.example." => vec![a(name, if first { SOMEWHERE } else { [127, 0, 0, 1] }, 0)],
            _ => vec![a(name, SOMEWHERE, 60)],
        };
        (ResponseCode::NoError, records)
    })
}

fn guest(mode: Mode, allow: &[&str], deny: &[&str], server: SocketAddr) -> Guest {
    Guest::with(mode, allow, deny, |settings| settings.resolvers = vec![server])
}

#[test]
fn answers() {
    let upstream = upstream();
    let mut guest = guest(Mode::Public, &[], &["denied.example", "*.denied.example"], upstream.address);
    assert_eq!(guest.resolve("some.example."), Ok(vec![SOMEWHERE.into()]));
    assert_eq!(guest.resolve("SOME.Example."), Ok(vec![SOMEWHERE.into()]));
    assert_eq!(guest.resolve("host.agentkernel.internal."), Ok(vec![HOST]));
    assert_eq!(guest.resolve("localhost."), Ok(vec![Ipv4Addr::LOCALHOST]));
    assert_eq!(guest.resolve("fine-chain.example."), Ok(vec![SOMEWHERE.into()]));
    assert_eq!(guest.resolve("none.example."), Err(ResponseCode::NXDomain));
    for kind in [RecordType::AAAA, RecordType::HTTPS, RecordType::SVCB] {
        let answer = guest.ask("some.example.", kind);
        assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NoError, 0));
        assert_eq!(answer.queries[0].query_type(), kind);
    }
    assert_eq!(guest.ask("some.example.", RecordType::ANY).metadata.response_code, ResponseCode::NotImp);
    // Whoever is asked, it is this one that answers.
    let other = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 53), 53);
    let bytes = guest.ask_bytes(other, &question("some.example.", RecordType::A));
    assert_eq!(Message::from_vec(&bytes).unwrap().answers.len(), 1);

    let before = upstream.asked.lock().unwrap().len();
    for name in ["denied.example.", "c2VjcmV0.denied.example.", "x.y.DENIED.example."] {
        for kind in [RecordType::A, RecordType::AAAA, RecordType::TXT, RecordType::HTTPS] {
            assert_eq!(guest.ask(name, kind).metadata.response_code, ResponseCode::NXDomain, "{name}");
        }
    }
    assert_eq!(upstream.asked.lock().unwrap().len(), before, "something of it was passed on");
    assert_eq!(guest.resolve("chain.example."), Err(ResponseCode::NXDomain));
    let entry = guest.recorded(Verdict::Refused, Kind::Dns);
    assert_eq!((entry.name.as_deref(), entry.allow), (Some("denied.example"), None));
}

#[test]
fn a_list_is_all_that_is_asked_for() {
    let upstream = upstream();
    let mut guest = guest(Mode::None, &["some.example:443"], &[], upstream.address);
    for name in ["ZGF0YQ.tunnel.example.", "other.example.", "x.some.example."] {
        for kind in [RecordType::A, RecordType::TXT, RecordType::NULL, RecordType::MX] {
            assert_eq!(guest.ask(name, kind).metadata.response_code, ResponseCode::NXDomain);
        }
    }
    assert!(upstream.asked.lock().unwrap().is_empty());
    assert_eq!(guest.resolve("some.example."), Ok(vec![SOMEWHERE.into()]));
    assert_eq!(upstream.heard("some.example."), 1);
    let entry = guest.recorded(Verdict::Refused, Kind::Dns);
    assert_eq!(entry.allow.as_deref(), Some("zgf0yq.tunnel.example"));
}

#[test]
fn a_name_lifts_nothing_of_the_floor() {
    let upstream = upstream();
    let port = echo_service();
    let allow = [format!("rebinds.example:{port}"), "metadata.example:80".into()];
    let allow: Vec<&str> = allow.iter().map(String::as_str).collect();
    let mut own = guest(Mode::None, &allow, &[], upstream.address);
    assert_eq!(own.resolve("rebinds.example."), Ok(vec![SOMEWHERE.into()]));
    assert_eq!(own.resolve("rebinds.example."), Ok(vec![Ipv4Addr::LOCALHOST]));
    assert!(!own.connects(Ipv4Addr::LOCALHOST, port));
    assert!(!own.connects(HOST, port));
    assert_eq!(own.resolve("metadata.example."), Ok(vec![Ipv4Addr::new(169, 254, 169, 254)]));
    assert!(!own.connects(Ipv4Addr::new(169, 254, 169, 254), 80));
    let refused = own.entries().into_iter().filter(|entry| entry.verdict == Verdict::Refused).count();
    assert_eq!(refused, 3);
    // The control: who writes the address means it.
    let mut own = guest(Mode::None, &[&guest::loopback(port)], &[], upstream.address);
    assert!(own.connects(HOST, port) && own.connects(Ipv4Addr::LOCALHOST, port));
}

#[test]
fn long_answers_are_asked_for_again_over_tcp() {
    let upstream = upstream();
    let mut guest = guest(Mode::Public, &[], &[], upstream.address);
    let answer = guest.ask("many.example.", RecordType::A);
    assert!(answer.metadata.truncation && answer.answers.len() < 200);
    let handle = guest.connect(HOST, 53);
    assert!(guest.is_open(handle));
    for _ in 0..2 {
        let question = question("many.example.", RecordType::A);
        let length = u16::try_from(question.len()).unwrap().to_be_bytes();
        guest.send(handle, &length);
        guest.during(Duration::from_millis(20));
        guest.send(handle, &question);
        let length = guest.receive(handle, 2);
        let bytes = guest.receive(handle, usize::from(u16::from_be_bytes([length[0], length[1]])));
        assert_eq!(Message::from_vec(&bytes).unwrap().answers.len(), 200);
    }
    guest.socket(handle).close();
    guest.until("an orderly end", |guest| match guest.socket(handle).state() {
        State::TimeWait => Some(()),
        State::Closed => panic!("it was reset"),
        _ => None,
    });
    guest.until("it is over", |guest| guest.flows().is_empty().then_some(()));
}

#[test]
fn malformed_questions() {
    let upstream = upstream();
    let mut guest = guest(Mode::Public, &[], &[], upstream.address);
    let whole = question("some.example.", RecordType::A);
    let server = SocketAddrV4::new(HOST, 53);
    for cut in [2, 11, 12, 20, whole.len() - 1] {
        if cut < 12 {
            let bytes = guest.ask_bytes(server, &whole[..cut]);
            assert_eq!(bytes[..2], whole[..2]);
            assert_eq!(bytes[3] & 15, 1, "{cut}");
            continue;
        }
        let answer = Message::from_vec(&guest.ask_bytes(server, &whole[..cut])).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::FormErr, "{cut}");
    }
    // Neither answers nor nothing at all are answered; and it goes on.
    let mut response = whole.clone();
    response[2] |= 0x80;
    for bytes in [&response[..], b"", b"x", &[0; 9000]] {
        guest.send_packet(&guest::datagram(
            SocketAddrV4::new(agentkernel_network::GUEST, 61_000),
            server,
            bytes,
        ));
    }
    guest.send_packet(&guest::datagram(
        SocketAddrV4::new(agentkernel_network::GUEST, 61_001),
        server,
        &whole,
    ));
    let answered = guest.raw("an answer", guest::read_datagram);
    assert_eq!(answered.1.port(), 61_001);
}

#[test]
fn name_servers_that_are_gone() {
    let gone = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut own = guest(Mode::Public, &[], &[], gone);
    let began = Instant::now();
    assert_eq!(own.resolve("some.example."), Err(ResponseCode::ServFail));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let mut own = Guest::new(Mode::Public, &[], &[]);
    let began = Instant::now();
    assert_eq!(own.resolve("some.example."), Err(ResponseCode::ServFail));
    assert!(began.elapsed() < Duration::from_secs(1));
    // One of two is enough.
    let upstream = upstream();
    let mut own =
        Guest::with(Mode::Public, &[], &[], |settings| settings.resolvers = vec![gone, upstream.address]);
    assert_eq!(own.resolve("some.example."), Ok(vec![SOMEWHERE.into()]));
}

/// A proxy that connects to nothing: it echoes, after greeting with `first`. It answers with `answer`.
fn proxy(answer: &'static [u8], first: &'static [u8]) -> (Proxy, std::sync::mpsc::Receiver<String>) {
    let (listener, port) = listener();
    let (told, tells) = std::sync::mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let told = told.clone();
            thread::spawn(move || {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    if stream.read_exact(&mut byte).is_err() {
                        return;
                    }
                    request.push(byte[0]);
                }
                let _ = told.send(String::from_utf8(request).unwrap());
                let _ = stream.write_all(&[answer, first].concat());
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    let _ = stream.write_all(&buffer[..count]);
                }
            });
        }
    });
    (Proxy { url: format!("http://127.0.0.1:{port}"), except: String::new() }, tells)
}

fn client_hello(name: &str) -> Vec<u8> {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = name.to_owned().try_into().unwrap();
    let mut client = rustls::ClientConnection::new(std::sync::Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// Whether a beginning is let through, which the proxy then echoes.
#[track_caller]
fn passes(guest: &mut Guest, port: u16, beginning: &[u8], piece: usize) -> bool {
    let handle = guest.connect(SOMEWHERE.into(), port);
    assert!(guest.is_open(handle));
    for part in beginning.chunks(piece) {
        if guest.socket(handle).may_send() {
            guest.send(handle, part);
            guest.during(Duration::from_millis(2));
        }
    }
    let mut received = 0;
    guest.until("an echo, or the end", |guest| {
        let socket = guest.socket(handle);
        while socket.can_recv() {
            received += socket.recv(|bytes| (bytes.len(), bytes.len())).unwrap();
        }
        if received >= beginning.len() {
            return Some(true);
        }
        (socket.state() == State::Closed).then_some(false)
    })
}

#[test]
fn what_is_said_first_must_be_on_the_list() {
    let upstream = upstream();
    let (proxy, asked) = proxy(b"HTTP/1.1 200 OK\r\n\r\n", b"");
    let allow = ["good.example:443", "good.example:80", "good.example:22"];
    let mut guest = Guest::with(Mode::None, &allow, &[], |settings| {
        settings.resolvers = vec![upstream.address];
        settings.proxy = Some(proxy);
    });
    assert_eq!(guest.resolve("good.example."), Ok(vec![SOMEWHERE.into()]));
    let good = client_hello("good.example");
    for piece in [good.len(), 7] {
        assert!(passes(&mut guest, 443, &good, piece), "{piece}");
        assert!(!passes(&mut guest, 443, &client_hello("other.example"), piece));
        assert!(!passes(&mut guest, 443, &client_hello("192.0.2.1"), piece), "no name");
    }
    assert!(asked.try_recv().unwrap().starts_with("CONNECT good.example:443 HTTP/1.1\r\n"));
    let mut hidden = good.clone();
    let at = hidden.windows(12).position(|bytes| bytes == b"good.example").unwrap();
    hidden[at - 9..at - 7].copy_from_slice(&0xfe0d_u16.to_be_bytes());
    assert!(!passes(&mut guest, 443, &hidden, hidden.len()), "only an encrypted name");
    for (text, is_good) in [
        ("GET / HTTP/1.1\r\nHost: good.example\r\n\r\n", true),
        ("GET / HTTP/1.1\r\nHost: GOOD.example.:80\r\n\r\n", true),
        ("GET http://good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n", true),
        ("GET / HTTP/1.1\r\nHost: other.example\r\n\r\n", false),
        ("GET / HTTP/1.1\r\nHost: good.example\r\nHost: other.example\r\n\r\n", false),
        ("GET http://other.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n", false),
        ("CONNECT other.example:443 HTTP/1.1\r\nHost: good.example\r\n\r\n", false),
        ("GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", false),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", false),
    ] {
        for piece in [text.len(), 5] {
            assert_eq!(passes(&mut guest, 80, text.as_bytes(), piece), is_good, "{text}");
        }
    }
    assert!(passes(&mut guest, 22, b"SSH-2.0-OpenSSH_9.2\r\n", 100));
    let entries = guest.entries();
    let refused = entries.iter().find(|entry| entry.verdict == Verdict::Refused).unwrap();
    assert_eq!(refused.allow.as_deref(), Some("other.example:443"));
}

#[test]
fn a_service_that_speaks_first_is_heard() {
    let upstream = upstream();
    let (proxy, _asked) = proxy(b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n", b"220 ready\r\n");
    let mut guest = Guest::with(Mode::None, &["good.example:25"], &[], |settings| {
        settings.resolvers = vec![upstream.address];
        settings.proxy = Some(proxy);
    });
    guest.resolve("good.example.").unwrap();
    let handle = guest.connect(SOMEWHERE.into(), 25);
    assert_eq!(guest.receive(handle, 11), b"220 ready\r\n");
    guest.send(handle, b"EHLO me\r\n");
    assert_eq!(guest.receive(handle, 9), b"EHLO me\r\n");
}

#[test]
fn a_denied_name_is_refused_whatever_the_address() {
    let upstream = upstream();
    let (proxy, asked) = proxy(b"HTTP/1.1 200 OK\r\n\r\n", b"");
    let mut guest = Guest::with(Mode::Public, &[], &["*.bad.example"], |settings| {
        settings.resolvers = vec![upstream.address];
        settings.proxy = Some(proxy);
    });
    assert!(passes(&mut guest, 443, &client_hello("good.example"), 1000));
    assert!(asked.recv().unwrap().starts_with("CONNECT 198.51.100.7:443 HTTP/1.1\r\n"));
    assert!(!passes(&mut guest, 443, &client_hello("x.bad.example"), 1000));
    assert!(passes(&mut guest, 443, &client_hello("192.0.2.1"), 1000), "no name is none that is denied");
    assert!(!passes(&mut guest, 80, b"GET / HTTP/1.1\r\nHost: x.bad.example\r\n\r\n", 9));
    assert!(passes(&mut guest, 80, b"GET / HTTP/1.1\r\nHost: fine.example\r\n\r\n", 9));
}

#[test]
fn proxies_that_do_not_do_it() {
    let endless: &'static [u8] = vec![b'x'; 20_000].leak();
    for (answer, reason) in [
        (&b"HTTP/1.1 403 Forbidden\r\n\r\n"[..], "403"),
        (b"garbage\r\n\r\n", "does not answer in HTTP"),
        (endless, "does not end"),
    ] {
        let (proxy, _asked) = proxy(answer, b"");
        let mut guest = Guest::with(Mode::Public, &[], &[], |settings| settings.proxy = Some(proxy));
        assert!(!guest.connects(SOMEWHERE.into(), 443));
        let entry = guest.recorded(Verdict::Failed, Kind::Tcp);
        assert!(entry.reason.as_ref().unwrap().contains(reason), "{entry:?}");
    }
}
