//! Connections: what is sent arrives, both ways, and what happens to one end happens to the other.

mod guest;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use agentkernel_network::audit::{Kind, Verdict};
use agentkernel_network::{Flow, GUEST, HOST, Mode, Published, Upstream};
use guest::{Guest, RAW, datagram, echo_service, listener, loopback, noise, read_datagram, take_all, tcp};
use smoltcp::socket::tcp::State;
use smoltcp::wire::{Icmpv4DstUnreachable, Icmpv4Message, Icmpv4Packet, Ipv4Packet, TcpControl};

const MANY: usize = 20 << 20;

fn allowed(port: u16) -> Guest {
    Guest::new(Mode::None, &[&loopback(port)], &[])
}

#[test]
fn much_is_echoed_unchanged() {
    let port = echo_service();
    let mut guest = allowed(port);
    let handle = guest.connect(HOST, port);
    let sent = noise(MANY, 1);
    let mut rest = &sent[..];
    let mut received = Vec::new();
    guest.until("all is echoed", |guest| {
        let socket = guest.socket(handle);
        if socket.may_send() && !rest.is_empty() {
            let count = socket.send_slice(rest).unwrap();
            rest = &rest[count..];
            if rest.is_empty() {
                socket.close();
            }
        }
        take_all(socket, &mut received);
        (received.len() >= MANY && !socket.may_recv()).then_some(())
    });
    assert!(received == sent);
    let entry = guest.recorded(Verdict::Ended, Kind::Tcp);
    assert_eq!((entry.sent, entry.received), (Some(MANY as u64), Some(MANY as u64)));
    assert_eq!(entry.reason, None);
    assert_eq!(guest.flows(), []);
}

#[test]
fn the_host_ends_first() {
    let (service, port) = listener();
    let server = thread::spawn(move || {
        let (mut stream, _) = service.accept().unwrap();
        stream.write_all(&noise(3 << 20, 2)).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        rest
    });
    let mut guest = allowed(port);
    let handle = guest.connect(HOST, port);
    assert!(guest.receive_all(handle) == noise(3 << 20, 2));
    // Half closed: the other way is still open.
    guest.send(handle, b"still here");
    assert_eq!(guest.flows().len(), 1);
    guest.socket(handle).close();
    guest.wait_state(handle, State::Closed);
    assert_eq!(server.join().unwrap(), b"still here");
    let entry = guest.recorded(Verdict::Ended, Kind::Tcp);
    assert_eq!((entry.sent, entry.received, entry.reason), (Some(10), Some(3 << 20), None));
}

#[test]
fn the_guest_ends_first() {
    let (service, port) = listener();
    let server = thread::spawn(move || {
        let (mut stream, _) = service.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        thread::sleep(Duration::from_millis(200));
        stream.write_all(&noise(2 << 20, 3)).unwrap();
        all
    });
    let mut guest = allowed(port);
    let handle = guest.connect(HOST, port);
    guest.send(handle, &noise(3 << 20, 4));
    guest.socket(handle).close();
    assert!(guest.receive_all(handle) == noise(2 << 20, 3));
    assert!(server.join().unwrap() == noise(3 << 20, 4));
    guest.wait_state(handle, State::TimeWait);
    assert_eq!(guest.recorded(Verdict::Ended, Kind::Tcp).reason, None);
    assert_eq!(guest.flows(), []);
}

#[test]
fn an_end_together_with_the_last_bytes_is_acknowledged() {
    let (service, port) = listener();
    let server = thread::spawn(move || {
        let (stream, _) = service.accept().unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        (&stream).read_to_end(&mut all).unwrap();
        all
    });
    let mut guest = allowed(port);
    let (own, remote) = (SocketAddrV4::new(GUEST, RAW), SocketAddrV4::new(HOST, port));
    guest.send_packet(&tcp(own, remote, TcpControl::Syn, 1000, None, b""));
    let first = guest.segment(RAW);
    let next = first.sequence.wrapping_add(1);
    guest.send_packet(&tcp(own, remote, TcpControl::None, 1001, Some(next), b""));
    let end = guest.segment(RAW);
    assert!(end.fin, "{end:?}");
    let next = next.wrapping_add(1);
    guest.send_packet(&tcp(own, remote, TcpControl::None, 1001, Some(next), b""));
    guest.send_packet(&tcp(own, remote, TcpControl::Fin, 1001, Some(next), b"bye"));
    let last = guest.segment(RAW);
    assert!(last.ack && !last.rst && last.acknowledges == 1005, "{last:?}");
    assert_eq!(server.join().unwrap(), b"bye");
}

#[test]
fn a_hundred_at_once() {
    let port = echo_service();
    let mut guest = allowed(port);
    const EACH: usize = 50_000;
    let mut open: Vec<_> = (0..100_u64).map(|n| (n, guest.connect(HOST, port), 0, Vec::new())).collect();
    guest.until("all are echoed", |guest| {
        for (number, handle, sent, received) in &mut open {
            let socket = guest.socket(*handle);
            if socket.may_send() && *sent < EACH {
                *sent += socket.send_slice(&noise(EACH, *number)[*sent..]).unwrap();
            }
            take_all(socket, received);
            if *sent == EACH {
                socket.close();
            }
        }
        open.iter().all(|(.., received)| received.len() >= EACH).then_some(())
    });
    for (number, _, _, received) in &open {
        assert!(*received == noise(EACH, *number), "{number}");
    }
    guest.until("all are over", |guest| guest.flows().is_empty().then_some(()));
    let entries = guest.entries();
    assert_eq!(entries.iter().filter(|entry| entry.verdict == Verdict::Ended).count(), 100);
    assert!(entries.iter().all(|entry| entry.verdict != Verdict::Dropped));
}

#[test]
fn a_slow_reader_of_the_host_holds_the_guest_back() {
    let (service, port) = listener();
    let mut guest = allowed(port);
    let handle = guest.connect(HOST, port);
    assert!(guest.is_open(handle));
    let (mut stream, _) = service.accept().unwrap();
    let data = noise(MANY, 5);
    let mut sent = 0;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(1) {
        guest.turn(Duration::from_millis(1));
        sent += guest.socket(handle).send_slice(&data[sent..]).unwrap();
    }
    assert!(sent < 12 << 20, "{sent} bytes were taken that nobody reads");
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    guest.send(handle, &data[sent..]);
    guest.socket(handle).close();
    guest.until("all is read", |_| reader.is_finished().then_some(()));
    assert!(reader.join().unwrap() == data);
}

#[test]
fn a_slow_reader_of_the_guest_holds_the_host_back() {
    let (service, port) = listener();
    let mut guest = allowed(port);
    let handle = guest.connect(HOST, port);
    assert!(guest.is_open(handle));
    let (mut stream, _) = service.accept().unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let data = noise(MANY, 6);
    let (told, tells) = std::sync::mpsc::channel();
    let writer = thread::spawn(move || {
        let mut sent = 0;
        while sent < data.len() {
            match stream.write(&data[sent..]) {
                Ok(count) => sent += count,
                Err(_) => told.send(sent).unwrap(),
            }
        }
        data
    });
    // It acknowledges, and takes nothing out of its buffer.
    let stuck = guest.until("the host waits", |_| tells.try_recv().ok());
    assert!(stuck < 14 << 20, "{stuck}");
    let received = guest.receive_all(handle);
    assert!(received == writer.join().unwrap());
}

#[test]
fn a_reset_of_the_host_resets_the_guest() {
    let (service, port) = listener();
    let mut guest = allowed(port);
    let (own, remote) = (SocketAddrV4::new(GUEST, RAW), SocketAddrV4::new(HOST, port));
    guest.send_packet(&tcp(own, remote, TcpControl::Syn, 1, None, b""));
    let first = guest.segment(RAW);
    assert!(first.syn && first.ack && first.acknowledges == 2);
    guest.send_packet(&tcp(own, remote, TcpControl::None, 2, Some(first.sequence + 1), b""));
    let (stream, _) = service.accept().unwrap();
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    drop(stream);
    let last = guest.segment(RAW);
    assert!(last.rst, "{last:?}");
    let entry = guest.recorded(Verdict::Ended, Kind::Tcp);
    assert!(entry.reason.unwrap().contains("reset"));
    assert_eq!(guest.flows(), []);
}

#[test]
fn a_reset_of_the_guest_resets_the_host() {
    let (service, port) = listener();
    let mut guest = allowed(port);
    let handle = guest.connect(HOST, port);
    assert!(guest.is_open(handle));
    let (mut stream, _) = service.accept().unwrap();
    guest.socket(handle).abort();
    guest.recorded(Verdict::Ended, Kind::Tcp);
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn what_nobody_listens_at_is_refused_and_recorded() {
    let (service, port) = listener();
    drop(service);
    let mut guest = allowed(port);
    assert!(!guest.connects(HOST, port));
    let entry = guest.recorded(Verdict::Failed, Kind::Tcp);
    assert!(entry.reason.unwrap().contains("refused"));
    assert_eq!((entry.name.as_deref(), entry.port), (Some("host.agentkernel.internal"), Some(port)));
    // The control.
    let _service = TcpListener::bind(("127.0.0.1", port)).unwrap();
    assert!(guest.connects(HOST, port));
}

/// A port of the host's where a SYN is not answered: its queue is full.
fn unanswering() -> (TcpListener, Vec<TcpStream>, u16) {
    let (listener, port) = listener();
    rustix::net::listen(&listener, 0).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let mut waiting = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        waiting.push(stream);
    }
    (listener, waiting, port)
}

#[test]
fn the_guest_is_answered_when_the_host_is_connected() {
    let (service, waiting, port) = unanswering();
    let mut guest = allowed(port);
    let handle = guest.connect(HOST, port);
    guest.during(Duration::from_millis(500));
    assert_eq!(guest.socket(handle).state(), State::SynSent);
    drop(waiting);
    thread::spawn(move || for _ in service.incoming() {});
    assert!(guest.is_open(handle));
}

#[test]
fn a_port_of_the_guest_is_used_again_at_once() {
    let port = echo_service();
    let mut guest = allowed(port);
    let own = SocketAddrV4::new(GUEST, RAW);
    let remote = SocketAddrV4::new(HOST, port);
    // The guest's kernel has forgotten the one before, and the host has not.
    for sequence in [1_000_u32, 900_000, 5] {
        guest.send_packet(&tcp(own, remote, TcpControl::Syn, sequence, None, b""));
        let began = Instant::now();
        let first = guest.raw("an answer to the newest", |packet| {
            guest::Segment::parse(packet).filter(|segment| segment.syn)
        });
        assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
        assert!(first.ack && first.acknowledges == sequence + 1, "{first:?}");
        guest.send_packet(&tcp(
            own,
            remote,
            TcpControl::None,
            sequence + 1,
            Some(first.sequence.wrapping_add(1)),
            b"x",
        ));
        guest.raw("an echo", |packet| guest::Segment::parse(packet).filter(|s| s.payload == b"x"));
        assert_eq!(guest.flows().len(), 1);
    }
    guest.until("two are over", |guest| {
        (guest.entries().iter().filter(|entry| entry.verdict == Verdict::Ended).count() == 2).then_some(())
    });
}

#[test]
fn a_guest_that_tries_again_while_the_host_connects_is_answered_for_its_last_try() {
    let (service, waiting, port) = unanswering();
    let mut guest = allowed(port);
    let (own, remote) = (SocketAddrV4::new(GUEST, RAW), SocketAddrV4::new(HOST, port));
    guest.send_packet(&tcp(own, remote, TcpControl::Syn, 1, None, b""));
    guest.during(Duration::from_millis(100));
    guest.send_packet(&tcp(own, remote, TcpControl::Syn, 70_000, None, b""));
    guest.during(Duration::from_millis(100));
    drop(waiting);
    thread::spawn(move || for _ in service.incoming() {});
    let first = guest.segment(RAW);
    assert!(first.syn && first.acknowledges == 70_001, "{first:?}");
}

#[test]
fn refusals_are_told_at_once_with_what_would_allow() {
    let (service, port) = listener();
    let (_other, other_port) = listener();
    thread::spawn(move || for _ in service.incoming() {});
    let mut guest = allowed(port);
    let (own, remote) = (SocketAddrV4::new(GUEST, RAW), SocketAddrV4::new(HOST, other_port));
    let began = Instant::now();
    guest.send_packet(&tcp(own, remote, TcpControl::Syn, 41, None, b""));
    let answer = guest.segment(RAW);
    assert!(began.elapsed() < Duration::from_millis(500));
    assert!(answer.rst && answer.ack && answer.acknowledges == 42, "{answer:?}");
    let entry = guest.recorded(Verdict::Refused, Kind::Tcp);
    assert_eq!(entry.allow, Some(loopback(other_port)));
    assert!(guest.connects(HOST, port));

    // UDP: refused by an ICMP message that quotes it.
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(guest::PATIENCE)).unwrap();
    let port = server.local_addr().unwrap().port();
    let to = SocketAddrV4::new(HOST, port);
    guest.send_packet(&datagram(own, to, b"hello"));
    let (reason, quoted) = guest.raw("port unreachable", |packet| {
        let header = Ipv4Packet::new_checked(packet).unwrap();
        let message = Icmpv4Packet::new_checked(header.payload()).ok()?;
        (message.msg_type() == Icmpv4Message::DstUnreachable)
            .then(|| (message.msg_code(), message.data().to_vec()))
    });
    assert_eq!(reason, u8::from(Icmpv4DstUnreachable::PortUnreachable));
    let quoted = Ipv4Packet::new_unchecked(&quoted);
    assert_eq!((quoted.src_addr(), quoted.dst_addr()), (GUEST, HOST));
    assert_eq!(quoted.payload()[2..4], port.to_be_bytes());
    let entry = guest.recorded(Verdict::Refused, Kind::Udp);
    assert_eq!(entry.allow, Some(format!("127.0.0.1:{port}/udp")));

    let mut guest = Guest::new(Mode::None, &[&entry.allow.unwrap()], &[]);
    guest.send_packet(&datagram(own, to, b"hello"));
    let mut buffer = [0; 100];
    let (count, peer) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..count], b"hello");
    server.send_to(b"hello yourself", peer).unwrap();
    let (source, destination, payload) = guest.raw("an answer", read_datagram);
    assert_eq!((source, destination, &payload[..]), (to, own, &b"hello yourself"[..]));
}

#[test]
fn pings() {
    let mut guest = Guest::new(Mode::Public, &[], &[]);
    guest.send_packet(&guest::echo(HOST, b"payload"));
    guest.send_packet(&guest::echo(Ipv4Addr::new(198, 51, 100, 1), b"payload"));
    let mut answers = Vec::new();
    for _ in 0..2 {
        answers.push(guest.raw("an answer", |packet| {
            let header = Ipv4Packet::new_checked(packet).unwrap();
            let message = Icmpv4Packet::new_checked(header.payload()).unwrap();
            assert!(message.verify_checksum());
            Some((header.src_addr(), message.msg_type(), message.msg_code(), message.data().to_vec()))
        }));
    }
    assert_eq!(answers[0], (HOST, Icmpv4Message::EchoReply, 0, b"payload".to_vec()));
    assert_eq!((answers[1].1, answers[1].2), (Icmpv4Message::DstUnreachable, 13));
}

#[test]
fn published_ports_lead_into_the_guest() {
    let (service, port) = listener();
    let (nobody, nobodys_port) = listener();
    let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
    let datagram_port = datagrams.local_addr().unwrap().port();
    let mut guest = Guest::with(Mode::None, &[], &[], |settings| {
        settings.published = vec![
            Published { upstream: Upstream::Tcp(service), guest_port: 80 },
            Published { upstream: Upstream::Tcp(nobody), guest_port: 81 },
            Published { upstream: Upstream::Udp(datagrams), guest_port: RAW + 5 },
        ];
    });
    let handle = guest.new_socket();
    guest.socket(handle).listen(80).unwrap();
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    client.write_all(b"GET").unwrap();
    assert_eq!(guest.receive(handle, 3), b"GET");
    assert_eq!(guest.socket(handle).remote_endpoint().unwrap().addr, HOST.into());
    assert_eq!(guest.flows().len(), 1);
    guest.send(handle, &noise(1 << 20, 8));
    guest.socket(handle).close();
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        all
    });
    guest.until("all is read", |_| reader.is_finished().then_some(()));
    assert!(reader.join().unwrap() == noise(1 << 20, 8));
    guest.until("it is over", |guest| guest.flows().is_empty().then_some(()));
    let entry = guest.recorded(Verdict::Ended, Kind::Published);
    assert_eq!((entry.sent, entry.received, entry.reason), (Some(1 << 20), Some(3), None));

    // Nobody listens in the guest: the host's end is closed soon.
    let mut client = TcpStream::connect(("127.0.0.1", nobodys_port)).unwrap();
    let reader = thread::spawn(move || client.read(&mut [0]).map_err(|error| error.kind()));
    let began = Instant::now();
    guest.until("it is closed", |_| reader.is_finished().then_some(()));
    assert!(began.elapsed() < Duration::from_secs(1));
    assert!(!matches!(reader.join().unwrap(), Ok(1..)));

    // UDP, from two peers.
    for text in [&b"one"[..], b"two"] {
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(text, ("127.0.0.1", datagram_port)).unwrap();
        let (source, destination, payload) = guest.raw("a datagram", read_datagram);
        assert_eq!((*source.ip(), destination.port(), &payload[..]), (HOST, RAW + 5, text));
        guest.send_packet(&datagram(destination, source, &[text, text].concat()));
        let mut buffer = [0; 100];
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        guest.turn(Duration::ZERO);
        let (count, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..count], from.port()), (&[text, text].concat()[..], datagram_port));
    }
}

#[test]
fn connections_of_a_saved_machine_are_reset() {
    let port = echo_service();
    let broken = Flow { guest_port: RAW + 9, remote: SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 4), 443) };
    let gone = Flow { guest_port: RAW + 10, ..broken };
    let mut guest = Guest::with(Mode::None, &[&loopback(port)], &[], |settings| {
        settings.broken = vec![broken, gone];
    });
    let own = SocketAddrV4::new(GUEST, RAW + 9);
    // It does not read for a while, as one that is not resumed yet.
    thread::sleep(Duration::from_millis(200));
    let mut seen = Vec::new();
    while seen.len() < 2 {
        let first = guest.raw("a segment that provokes", guest::Segment::parse);
        assert!(first.syn && !first.ack, "{first:?}");
        assert_eq!(first.remote, broken.remote);
        if !seen.contains(&first.destination) {
            seen.push(first.destination);
        }
    }
    assert_eq!(guest.flows(), [broken, gone]);
    guest.send_packet(&tcp(own, broken.remote, TcpControl::None, 5_000, Some(0xfedc_ba98), b""));
    let last = guest.raw("a reset", |packet| guest::Segment::parse(packet).filter(|segment| segment.rst));
    assert_eq!((last.sequence, last.destination), (0xfedc_ba98, RAW + 9));
    assert_eq!(guest.flows(), [gone]);
    // The other one is not there any more.
    let own = SocketAddrV4::new(GUEST, RAW + 10);
    guest.send_packet(&tcp(own, broken.remote, TcpControl::Rst, 0, Some(1), b""));
    guest.until("none is left", |guest| guest.flows().is_empty().then_some(()));
    guest.device.raw.clear();
    guest.during(Duration::from_millis(700));
    assert!(guest.device.raw.is_empty(), "it goes on provoking");
    assert!(guest.connects(HOST, port));
}

#[test]
fn the_end_of_the_network_leaves_nothing_behind() {
    let (service, port) = listener();
    let (published, published_port) = listener();
    let mut guest = Guest::with(Mode::None, &[&loopback(port)], &[], |settings| {
        settings.published = vec![Published { upstream: Upstream::Tcp(published), guest_port: 80 }];
    });
    let handle = guest.connect(HOST, port);
    assert!(guest.is_open(handle));
    let (mut stream, _) = service.accept().unwrap();
    guest.end();
    assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)));
    assert!(TcpStream::connect(("127.0.0.1", published_port)).is_err());
    guest.until("the machine's end is closed", |guest| guest.ended.then_some(()));
}
