//! What a hostile guest does. One test after the other: they measure the memory of the process.

mod guest;

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use agentkernel_network::audit::{Kind, Verdict};
use agentkernel_network::{GUEST, HOST, Mode};
use guest::{Guest, descriptors, echo, echo_service, frame, listener, loopback, memory, noise, tcp};
use proptest::prelude::*;
use smoltcp::wire::TcpControl;

/// All that the network of a machine may take.
const MEMORY: usize = 64 << 20;

fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[track_caller]
fn still_works(guest: &mut Guest, port: u16) {
    let handle = guest.connect(HOST, port);
    guest.send(handle, b"hello");
    assert_eq!(guest.receive(handle, 5), b"hello");
    guest.socket(handle).abort();
    guest.turn(Duration::ZERO);
}

fn syns(count: u32, remote: impl Fn(u32) -> SocketAddrV4) -> Vec<u8> {
    let mut stream = Vec::new();
    for number in 0..count {
        let port = u16::try_from(1024 + number % 50_000).unwrap();
        let own = SocketAddrV4::new(GUEST, port);
        frame(&mut stream, &tcp(own, remote(number), TcpControl::Syn, number, None, b""));
    }
    stream
}

#[test]
fn a_flood_of_beginnings() {
    let _alone = alone();
    let port = echo_service();
    let mut guest = Guest::new(Mode::None, &[&loopback(port)], &[]);
    still_works(&mut guest, port);
    let memory_before = memory();
    let flood = syns(20_000, |_| SocketAddrV4::new(HOST, port));
    guest.flood(&flood);
    let most = memory().saturating_sub(memory_before);
    assert!(guest.flows().len() <= 1024);
    assert!(most < MEMORY + (40 << 20), "{} MiB", most >> 20);
    guest.device.raw.clear();
    still_works(&mut guest, port);
    guest.recorded(Verdict::Dropped, Kind::Tcp);
    assert!(guest.flows().len() <= 1024);
    drop(flood);
    guest.end();
    thread::sleep(Duration::from_millis(500));
}

#[test]
fn ten_thousand_connections() {
    let _alone = alone();
    let (service, port) = listener();
    rustix::net::listen(&service, 4096).unwrap();
    thread::spawn(move || {
        let mut all = std::collections::VecDeque::new();
        for stream in service.incoming() {
            all.push_back(stream);
            if all.len() > 100 {
                all.pop_front();
            }
        }
    });
    let echo = echo_service();
    let mut guest = Guest::new(Mode::None, &[&loopback(port), &loopback(echo)], &[]);
    let before = memory();
    let oldest = guest.connect(HOST, echo);
    assert!(guest.is_open(oldest));
    for part in syns(10_000, |_| SocketAddrV4::new(HOST, port)).chunks(64 << 10) {
        guest.flood(part);
    }
    guest.until("the oldest is given up", |guest| (!guest.socket(oldest).is_open()).then_some(()));
    let most = memory().saturating_sub(before);
    assert!(most < MEMORY + (40 << 20), "{} MiB", most >> 20);
    assert!(guest.flows().len() <= 1024);
    let entry = guest.recorded(Verdict::Dropped, Kind::Tcp);
    assert!(entry.reason.unwrap().contains("1024"));
    still_works(&mut guest, echo);
}

#[test]
fn floods_of_datagrams_and_questions() {
    let _alone = alone();
    let port = echo_service();
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = SocketAddrV4::new(HOST, server.local_addr().unwrap().port());
    let allow = [loopback(port), format!("{}/udp", loopback(to.port()))];
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let allow: Vec<&str> = allow.iter().map(String::as_str).collect();
    let mut guest = Guest::with(Mode::Public, &allow, &[], |settings| {
        settings.resolvers = vec![silent.local_addr().unwrap()];
    });
    still_works(&mut guest, port);
    let (memory_before, descriptors_before) = (memory(), descriptors());
    let mut stream = Vec::new();
    for number in 0..30_000_u16 {
        let own = SocketAddrV4::new(GUEST, 1024 + number);
        frame(&mut stream, &guest::datagram(own, to, b"x"));
        let question =
            guest::question(&format!("n{number}.example."), hickory_resolver::proto::rr::RecordType::A);
        frame(&mut stream, &guest::datagram(own, SocketAddrV4::new(HOST, 53), &question));
        // Refused, each a line of the record.
        frame(&mut stream, &guest::datagram(own, SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9), b"x"));
    }
    guest.flood(&stream);
    drop(stream);
    let (most, open) =
        (memory().saturating_sub(memory_before), descriptors().saturating_sub(descriptors_before));
    assert!(most < MEMORY, "{} MiB", most >> 20);
    assert!(open < 256 + 64 + 512, "{open}");
    let record: u64 = std::fs::read_dir(guest.directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    assert!(record <= 4 << 20, "{record}");
    still_works(&mut guest, port);
    let mut buffer = [0; 10];
    while server.set_nonblocking(true).is_ok() && server.recv(&mut buffer).is_ok() {}
    server.set_nonblocking(false).unwrap();
    server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    guest.send_packet(&guest::datagram(SocketAddrV4::new(GUEST, 60_001), to, b"newest"));
    assert_eq!(server.recv(&mut buffer).unwrap(), 6);
}

#[test]
fn a_guest_that_reads_nothing() {
    let _alone = alone();
    let port = echo_service();
    let mut guest = Guest::new(Mode::None, &[&loopback(port)], &[]);
    still_works(&mut guest, port);
    guest.reads = false;
    let before = memory();
    for _ in 0..40 {
        let mut stream = Vec::new();
        for _ in 0..100 {
            frame(&mut stream, &echo(HOST, &noise(9000, 1)));
        }
        guest.flood(&stream);
    }
    let most = memory().saturating_sub(before);
    assert!(most < 16 << 20, "{} MiB", most >> 20);
    guest.reads = true;
    still_works(&mut guest, port);
    guest.reads = false;
    guest.end();
}

#[test]
fn what_comes_from_another_address_is_not_taken() {
    let _alone = alone();
    let port = echo_service();
    let mut guest = Guest::new(Mode::None, &[&loopback(port)], &[]);
    for source in [HOST, Ipv4Addr::new(198, 51, 100, 1), Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED] {
        let own = SocketAddrV4::new(source, 60_000);
        let remote = SocketAddrV4::new(HOST, port);
        guest.send_packet(&tcp(own, remote, TcpControl::Syn, 1, None, b""));
    }
    guest.during(Duration::from_millis(100));
    assert!(guest.device.raw.is_empty() && guest.entries().is_empty() && guest.flows().is_empty());
    // Nor are parts of packets.
    let mut whole =
        tcp(SocketAddrV4::new(GUEST, 60_000), SocketAddrV4::new(HOST, port), TcpControl::Syn, 1, None, b"");
    whole[6] |= 0x20;
    guest.send_packet(&whole);
    guest.during(Duration::from_millis(100));
    assert!(guest.device.raw.is_empty() && guest.flows().is_empty());
    still_works(&mut guest, port);
}

#[test]
fn a_frame_that_is_too_long_ends_the_network() {
    let _alone = alone();
    for length in [u32::MAX, 1 << 20] {
        let mut guest = Guest::new(Mode::Public, &[], &[]);
        guest.flood(&length.to_be_bytes());
        guest.until("the end", |guest| guest.ended.then_some(()));
        guest.end();
    }
}

#[test]
fn a_connection_to_many_places_at_once() {
    let _alone = alone();
    let port = echo_service();
    let mut guest =
        Guest::new(Mode::None, &[&loopback(port), "224.0.0.0/4", "255.255.255.255", "0.0.0.0"], &[]);
    for address in [Ipv4Addr::new(235, 0, 0, 1), Ipv4Addr::BROADCAST, Ipv4Addr::UNSPECIFIED] {
        for port in [53, 80] {
            let own = SocketAddrV4::new(GUEST, 60_000);
            guest.send_packet(&tcp(own, SocketAddrV4::new(address, port), TcpControl::Syn, 1, None, b""));
        }
    }
    guest.during(Duration::from_millis(50));
    assert!(!guest.ended && guest.flows().is_empty());
    still_works(&mut guest, port);
}

#[test]
fn nothing_of_it_stops_the_network() {
    let _alone = alone();
    let port = echo_service();
    let guest = Mutex::new(Guest::new(Mode::None, &[&loopback(port)], &[]));
    let own = SocketAddrV4::new(GUEST, 60_000);
    let remote = SocketAddrV4::new(HOST, port);
    let base = (0..5_usize, any::<[u8; 16]>()).prop_map(move |(kind, bytes)| match kind {
        0 => tcp(own, remote, TcpControl::Syn, 7, None, b""),
        1 => tcp(own, remote, TcpControl::None, 8, Some(9), &bytes),
        2 => guest::datagram(own, SocketAddrV4::new(HOST, 53), &bytes),
        3 => echo(HOST, &bytes),
        _ => tcp(own, SocketAddrV4::new(HOST, 53), TcpControl::Syn, 7, None, b""),
    });
    let mutated =
        (base, prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6), any::<bool>())
            .prop_map(|(mut bytes, changes, cut)| {
                for (index, value) in &changes {
                    let at = index.index(bytes.len());
                    bytes[at] = *value;
                }
                if cut && let Some((index, _)) = changes.first() {
                    bytes.truncate(index.index(bytes.len()));
                }
                bytes
            });
    let any_packet = prop_oneof![4 => mutated, 1 => prop::collection::vec(any::<u8>(), 0..200)];
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..Default::default()
    });
    runner
        .run(&prop::collection::vec((any_packet, 0..4_u8), 1..40), |packets| {
            let mut guest = guest.lock().unwrap();
            let mut stream = Vec::new();
            for (packet, kind) in &packets {
                let start = stream.len();
                frame(&mut stream, packet);
                if *kind == 0 {
                    // ARP and others.
                    stream[start + 17] = packet.first().copied().unwrap_or(6);
                }
            }
            guest.flood(&stream);
            prop_assert!(!guest.ended);
            Ok(())
        })
        .unwrap();
    let mut guest = guest.into_inner().unwrap();
    guest.device.raw.clear();
    still_works(&mut guest, port);
}
