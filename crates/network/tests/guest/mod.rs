//! A guest without a machine: a TCP/IP stack of the test's own at the other end of the network's stream.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use agentkernel_network::audit::{self, AuditLog, Entry, Kind, Verdict};
use agentkernel_network::{
    Flow, GUEST, GUEST_HARDWARE_ADDRESS, HOST, MTU, Mode, Network, Policy, Rule, Settings,
};
use hickory_resolver::proto::op::{Message, Query, ResponseCode};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType, rdata};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::wire::{
    HardwareAddress, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, IpProtocol, Ipv4Packet, Ipv4Repr,
    TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, UdpRepr,
};

/// Ports of the guest from here on have no sockets: what comes there is looked at as it is.
pub const RAW: u16 = 60_000;
/// How long anything may take that is expected to happen.
pub const PATIENCE: Duration = Duration::from_secs(20);
const BUFFER: usize = 256 << 10;

/// A network and the guest on it.
pub struct Guest {
    pub network: Option<Network>,
    pub stream: UnixStream,
    pub device: Wire,
    pub interface: Interface,
    pub sockets: SocketSet<'static>,
    pub directory: tempfile::TempDir,
    began: Instant,
    received: Vec<u8>,
    next_port: u16,
    /// Whether it reads what is sent to it.
    pub reads: bool,
    pub ended: bool,
}

#[derive(Default)]
pub struct Wire {
    incoming: VecDeque<Vec<u8>>,
    pub outgoing: Vec<u8>,
    /// IP packets for no socket.
    pub raw: VecDeque<Vec<u8>>,
}

pub fn rules(texts: &[&str]) -> Vec<Rule> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// The rule that lets a guest reach a port of the host's.
pub fn loopback(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

impl Guest {
    pub fn new(mode: Mode, allow: &[&str], deny: &[&str]) -> Self {
        Self::with(mode, allow, deny, |_| {})
    }

    pub fn with(mode: Mode, allow: &[&str], deny: &[&str], change: impl FnOnce(&mut Settings)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut settings = Settings {
            policy: Policy::new(mode, rules(allow), rules(deny), Vec::new()),
            resolvers: Vec::new(),
            proxy: None,
            published: Vec::new(),
            audit: AuditLog::open(directory.path()).unwrap(),
            broken: Vec::new(),
            confine: Box::new(|| Ok(())),
        };
        change(&mut settings);
        let (stream, other) = UnixStream::pair().unwrap();
        let network = Network::start(settings, other).unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut device = Wire::default();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = 7;
        let mut interface = Interface::new(config, &mut device, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|all| all.push(IpCidr::new(IpAddress::Ipv4(GUEST), 0)).unwrap());
        Self {
            network: Some(network),
            stream,
            device,
            interface,
            sockets: SocketSet::new(Vec::new()),
            directory,
            began: Instant::now(),
            received: Vec::new(),
            next_port: 20_000,
            reads: true,
            ended: false,
        }
    }

    pub fn entries(&self) -> Vec<Entry> {
        audit::read(self.directory.path()).unwrap()
    }

    pub fn flows(&self) -> Vec<Flow> {
        self.network.as_ref().unwrap().flows()
    }

    /// Sends and takes what can be, and waits a little if there is nothing.
    pub fn turn(&mut self, wait: Duration) {
        self.flush();
        let mut was_idle = true;
        if self.reads {
            let mut buffer = vec![0; 128 << 10];
            for _ in 0..8 {
                match self.stream.read(&mut buffer) {
                    Ok(0) => {
                        self.ended = true;
                        break;
                    }
                    Ok(count) => {
                        self.received.extend_from_slice(&buffer[..count]);
                        was_idle = false;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(_) => {
                        self.ended = true;
                        break;
                    }
                }
            }
            self.split();
        }
        let now =
            smoltcp::time::Instant::from_micros(i64::try_from(self.began.elapsed().as_micros()).unwrap());
        self.interface.poll(now, &mut self.device, &mut self.sockets);
        self.flush();
        if was_idle && !wait.is_zero() {
            thread::sleep(wait.min(Duration::from_millis(1)));
        }
    }

    fn split(&mut self) {
        let mut start = 0;
        while let Some((length, rest)) = self.received[start..].split_first_chunk::<4>() {
            let length = u32::from_be_bytes(*length) as usize;
            let Some(frame) = rest.get(..length) else { break };
            start += 4 + length;
            assert_eq!(frame[..6], GUEST_HARDWARE_ADDRESS);
            assert!(frame.len() <= 14 + usize::from(MTU), "a frame of {}", frame.len());
            let packet = frame[14..].to_vec();
            if frame[12..14] != [8, 0] {
                self.device.raw.push_back(frame.to_vec());
                continue;
            }
            let header = Ipv4Packet::new_checked(&packet).expect("a whole packet");
            assert!(header.verify_checksum());
            assert_eq!(header.dst_addr(), GUEST);
            let is_raw = header.next_header() != IpProtocol::Tcp
                || TcpPacket::new_checked(header.payload()).unwrap().dst_port() >= RAW;
            match is_raw {
                true => self.device.raw.push_back(packet),
                false => self.device.incoming.push_back(packet),
            }
        }
        self.received.drain(..start);
    }

    fn flush(&mut self) {
        while !self.device.outgoing.is_empty() {
            match self.stream.write(&self.device.outgoing) {
                Ok(count) => drop(self.device.outgoing.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.ended = true;
                    self.device.outgoing.clear();
                }
            }
        }
    }

    /// Sends all of it, however long that takes, and reads meanwhile if it reads at all.
    pub fn flood(&mut self, bytes: &[u8]) {
        self.device.outgoing.extend_from_slice(bytes);
        let began = Instant::now();
        while !self.device.outgoing.is_empty() {
            assert!(began.elapsed() < PATIENCE, "the network does not read");
            self.turn(Duration::from_millis(1));
        }
    }

    /// Goes on until there is an answer.
    #[track_caller]
    pub fn until<T>(&mut self, what: &str, mut look: impl FnMut(&mut Self) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            self.turn(Duration::from_millis(1));
            if let Some(answer) = look(self) {
                return answer;
            }
            assert!(
                began.elapsed() < PATIENCE,
                "this does not happen: {what}; the record: {:#?}",
                self.entries().iter().rev().take(5).collect::<Vec<_>>()
            );
        }
    }

    pub fn during(&mut self, time: Duration) {
        let began = Instant::now();
        while began.elapsed() < time {
            self.turn(Duration::from_millis(1));
        }
    }

    pub fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn new_socket(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        self.sockets.add(socket)
    }

    pub fn port(&mut self) -> u16 {
        self.next_port += 1;
        self.next_port
    }

    pub fn connect_from(&mut self, port: u16, address: Ipv4Addr, remote: u16) -> SocketHandle {
        let handle = self.new_socket();
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.connect(self.interface.context(), (IpAddress::Ipv4(address), remote), port).unwrap();
        handle
    }

    pub fn connect(&mut self, address: Ipv4Addr, remote: u16) -> SocketHandle {
        let port = self.port();
        self.connect_from(port, address, remote)
    }

    /// Whether a connection comes about.
    #[track_caller]
    pub fn connects(&mut self, address: Ipv4Addr, remote: u16) -> bool {
        let handle = self.connect(address, remote);
        let is_open = self.is_open(handle);
        self.sockets.get_mut::<tcp::Socket<'_>>(handle).abort();
        self.turn(Duration::ZERO);
        self.sockets.remove(handle);
        is_open
    }

    #[track_caller]
    pub fn is_open(&mut self, handle: SocketHandle) -> bool {
        self.until("a connection is open or refused", |guest| match guest.socket(handle).state() {
            tcp::State::SynSent | tcp::State::SynReceived => None,
            state => Some(state == tcp::State::Established || state == tcp::State::CloseWait),
        })
    }

    #[track_caller]
    pub fn send(&mut self, handle: SocketHandle, bytes: &[u8]) {
        self.is_open(handle);
        let mut rest = bytes;
        self.until("bytes are sent", |guest| {
            let count = guest.socket(handle).send_slice(rest).expect("an open connection");
            rest = &rest[count..];
            rest.is_empty().then_some(())
        });
    }

    /// Everything until the other end has ended or reset it.
    #[track_caller]
    pub fn receive_all(&mut self, handle: SocketHandle) -> Vec<u8> {
        self.is_open(handle);
        let mut all = Vec::new();
        self.until("a connection ends", |guest| {
            let socket = guest.socket(handle);
            take_all(socket, &mut all);
            (!socket.may_recv()).then_some(())
        });
        all
    }

    #[track_caller]
    pub fn receive(&mut self, handle: SocketHandle, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        self.until("bytes are received", |guest| {
            let socket = guest.socket(handle);
            while socket.can_recv() && all.len() < count {
                socket
                    .recv(|bytes| {
                        let taken = bytes.len().min(count - all.len());
                        all.extend_from_slice(&bytes[..taken]);
                        (taken, ())
                    })
                    .unwrap();
            }
            (all.len() == count).then_some(())
        });
        all
    }

    #[track_caller]
    pub fn wait_state(&mut self, handle: SocketHandle, state: tcp::State) {
        self.until(&format!("{state}"), |guest| (guest.socket(handle).state() == state).then_some(()));
    }

    /// The first entry of the record like this, which may take a moment.
    #[track_caller]
    pub fn recorded(&mut self, verdict: Verdict, kind: Kind) -> Entry {
        self.until(&format!("an entry {verdict:?} {kind:?}"), |guest| {
            guest.entries().into_iter().find(|entry| entry.verdict == verdict && entry.kind == kind)
        })
    }

    /// The network ended cleanly when it was told to, and soon.
    pub fn end(&mut self) {
        let began = Instant::now();
        drop(self.network.take());
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    }

    pub fn send_packet(&mut self, packet: &[u8]) {
        frame(&mut self.device.outgoing, packet);
        self.flush();
    }

    /// The next packet for no socket that is looked for.
    #[track_caller]
    pub fn raw<T>(&mut self, what: &str, mut look: impl FnMut(&[u8]) -> Option<T>) -> T {
        self.until(what, |guest| {
            while let Some(packet) = guest.device.raw.pop_front() {
                if let Some(found) = look(&packet) {
                    return Some(found);
                }
            }
            None
        })
    }

    /// The next segment to a raw port.
    #[track_caller]
    pub fn segment(&mut self, port: u16) -> Segment {
        self.raw("a segment", |packet| Segment::parse(packet).filter(|segment| segment.destination == port))
    }

    /// Asks for a name over UDP.
    #[track_caller]
    pub fn ask_bytes(&mut self, server: SocketAddrV4, question: &[u8]) -> Vec<u8> {
        let port = RAW + 1000 + self.port() % 4000;
        self.send_packet(&datagram(SocketAddrV4::new(GUEST, port), server, question));
        self.raw("an answer", |packet| {
            let (source, destination, payload) = read_datagram(packet)?;
            (source == server && destination.port() == port).then_some(payload)
        })
    }

    #[track_caller]
    pub fn ask(&mut self, name: &str, kind: RecordType) -> Message {
        let bytes = self.ask_bytes(SocketAddrV4::new(HOST, 53), &question(name, kind));
        Message::from_vec(&bytes).unwrap()
    }

    #[track_caller]
    pub fn resolve(&mut self, name: &str) -> Result<Vec<Ipv4Addr>, ResponseCode> {
        let answer = self.ask(name, RecordType::A);
        match answer.metadata.response_code {
            ResponseCode::NoError => Ok(answer
                .answers
                .iter()
                .filter_map(|record| match record.data {
                    RData::A(address) => Some(address.0),
                    _ => None,
                })
                .collect()),
            code => Err(code),
        }
    }
}

pub fn question(name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = 77;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message.to_vec().unwrap()
}

/// Puts a packet into a frame on the stream.
pub fn frame(stream: &mut Vec<u8>, packet: &[u8]) {
    stream.extend_from_slice(&u32::try_from(14 + packet.len()).unwrap().to_be_bytes());
    stream.extend_from_slice(&[2, 0x61, 0x6b, 0, 0, 1]);
    stream.extend_from_slice(&GUEST_HARDWARE_ADDRESS);
    stream.extend_from_slice(&[8, 0]);
    stream.extend_from_slice(packet);
}

fn packet(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    next_header: IpProtocol,
    payload_len: usize,
    fill: impl FnOnce(&mut [u8]),
) -> Vec<u8> {
    let header =
        Ipv4Repr { src_addr: source, dst_addr: destination, next_header, payload_len, hop_limit: 64 };
    let mut bytes = vec![0; header.buffer_len() + payload_len];
    let mut packet = Ipv4Packet::new_unchecked(&mut bytes);
    header.emit(&mut packet, &ChecksumCapabilities::default());
    fill(packet.payload_mut());
    bytes
}

pub fn datagram(source: SocketAddrV4, destination: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    packet(*source.ip(), *destination.ip(), IpProtocol::Udp, 8 + payload.len(), |bytes| {
        UdpRepr { src_port: source.port(), dst_port: destination.port() }.emit(
            &mut UdpPacket::new_unchecked(bytes),
            &IpAddress::Ipv4(*source.ip()),
            &IpAddress::Ipv4(*destination.ip()),
            payload.len(),
            |target| target.copy_from_slice(payload),
            &ChecksumCapabilities::default(),
        );
    })
}

pub fn echo(destination: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let message = Icmpv4Repr::EchoRequest { ident: 5, seq_no: 9, data: payload };
    packet(GUEST, destination, IpProtocol::Icmp, message.buffer_len(), |bytes| {
        message.emit(&mut Icmpv4Packet::new_unchecked(bytes), &ChecksumCapabilities::default());
    })
}

pub fn tcp(
    source: SocketAddrV4,
    destination: SocketAddrV4,
    control: TcpControl,
    sequence: u32,
    acknowledges: Option<u32>,
    payload: &[u8],
) -> Vec<u8> {
    let segment = TcpRepr {
        src_port: source.port(),
        dst_port: destination.port(),
        control,
        seq_number: TcpSeqNumber(sequence.cast_signed()),
        ack_number: acknowledges.map(|number| TcpSeqNumber(number.cast_signed())),
        window_len: 60_000,
        window_scale: (control == TcpControl::Syn).then_some(4),
        max_seg_size: (control == TcpControl::Syn).then_some(MTU - 40),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    };
    packet(*source.ip(), *destination.ip(), IpProtocol::Tcp, segment.buffer_len(), |bytes| {
        segment.emit(
            &mut TcpPacket::new_unchecked(bytes),
            &IpAddress::Ipv4(*source.ip()),
            &IpAddress::Ipv4(*destination.ip()),
            &ChecksumCapabilities::default(),
        );
    })
}

pub fn read_datagram(bytes: &[u8]) -> Option<(SocketAddrV4, SocketAddrV4, Vec<u8>)> {
    let header = Ipv4Packet::new_checked(bytes).ok()?;
    if header.next_header() != IpProtocol::Udp {
        return None;
    }
    let datagram = UdpPacket::new_checked(header.payload()).ok()?;
    assert!(datagram.verify_checksum(&header.src_addr().into(), &header.dst_addr().into()));
    let source = SocketAddrV4::new(header.src_addr(), datagram.src_port());
    let destination = SocketAddrV4::new(header.dst_addr(), datagram.dst_port());
    Some((source, destination, datagram.payload().to_vec()))
}

/// A segment that was sent to a raw port.
#[derive(Debug, Clone)]
pub struct Segment {
    pub remote: SocketAddrV4,
    pub destination: u16,
    pub syn: bool,
    pub ack: bool,
    pub fin: bool,
    pub rst: bool,
    pub sequence: u32,
    pub acknowledges: u32,
    pub payload: Vec<u8>,
}

impl Segment {
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let header = Ipv4Packet::new_checked(bytes).ok()?;
        if header.next_header() != IpProtocol::Tcp {
            return None;
        }
        let segment = TcpPacket::new_checked(header.payload()).ok()?;
        assert!(segment.verify_checksum(&header.src_addr().into(), &header.dst_addr().into()));
        Some(Self {
            remote: SocketAddrV4::new(header.src_addr(), segment.src_port()),
            destination: segment.dst_port(),
            syn: segment.syn(),
            ack: segment.ack(),
            fin: segment.fin(),
            rst: segment.rst(),
            sequence: segment.seq_number().0.cast_unsigned(),
            acknowledges: segment.ack_number().0.cast_unsigned(),
            payload: segment.payload().to_vec(),
        })
    }
}

pub struct Received(Vec<u8>);
pub struct Sent<'a>(&'a mut Vec<u8>);

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sent<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Sent<'_>)> {
        let packet = self.incoming.pop_front()?;
        Some((Received(packet), Sent(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sent<'_>> {
        (self.outgoing.len() < 256 << 10).then_some(Sent(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = usize::from(MTU);
        capabilities
    }
}

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        let mut packet = vec![0; length];
        let result = fill(&mut packet);
        frame(self.0, &packet);
        result
    }
}

/// Takes all that a socket has.
pub fn take_all(socket: &mut tcp::Socket<'_>, received: &mut Vec<u8>) {
    while socket.can_recv() {
        let take = |bytes: &mut [u8]| {
            received.extend_from_slice(bytes);
            (bytes.len(), ())
        };
        socket.recv(take).unwrap();
    }
}

/// Bytes that look like nothing, the same each time.
pub fn noise(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}

/// A listener, and its port.
pub fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// A service that sends back what it is sent, until that ends.
pub fn echo_service() -> u16 {
    let (listener, port) = listener();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(move || {
                    let mut buffer = vec![0; 32 << 10];
                    while let Ok(count @ 1..) = stream.read(&mut buffer) {
                        if stream.write_all(&buffer[..count]).is_err() {
                            return;
                        }
                    }
                })
                .unwrap();
        }
    });
    port
}

/// How the name server of a test answers.
pub type Answers = dyn Fn(&Query, bool) -> (ResponseCode, Vec<Record>) + Send + Sync;

/// A name server of the test's own, which remembers what it was asked.
pub struct Upstream {
    pub address: SocketAddr,
    pub asked: Arc<Mutex<Vec<(String, RecordType, bool)>>>,
}

impl Upstream {
    /// `answers` is told whether it is asked over TCP. Over UDP, more than ten records are cut off.
    pub fn new(
        answers: impl Fn(&Query, bool) -> (ResponseCode, Vec<Record>) + Send + Sync + 'static,
    ) -> Self {
        let answers: Arc<Answers> = Arc::new(answers);
        let asked: Arc<Mutex<Vec<_>>> = Arc::default();
        let (listener, socket) = loop {
            let (listener, port) = listener();
            if let Ok(socket) = UdpSocket::bind(("127.0.0.1", port)) {
                break (listener, socket);
            }
        };
        let address = socket.local_addr().unwrap();
        let (log, reply) = (asked.clone(), answers.clone());
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok((count, peer)) = socket.recv_from(&mut buffer) {
                let answer = Self::answer(&buffer[..count], &*reply, &log, false);
                let _ = socket.send_to(&answer, peer);
            }
        });
        let (log, reply) = (asked.clone(), answers);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let (log, reply) = (log.clone(), reply.clone());
                thread::spawn(move || {
                    let mut length = [0; 2];
                    while stream.read_exact(&mut length).is_ok() {
                        let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
                        stream.read_exact(&mut question).unwrap();
                        let answer = Self::answer(&question, &*reply, &log, true);
                        let length = u16::try_from(answer.len()).unwrap().to_be_bytes();
                        let _ = stream.write_all(&[&length[..], &answer].concat());
                    }
                });
            }
        });
        Self { address, asked }
    }

    fn answer(
        question: &[u8],
        reply: &Answers,
        log: &Mutex<Vec<(String, RecordType, bool)>>,
        tcp: bool,
    ) -> Vec<u8> {
        let question = Message::from_vec(question).unwrap();
        let query = question.queries[0].clone();
        log.lock().unwrap().push((query.name().to_ascii().to_ascii_lowercase(), query.query_type(), tcp));
        let (code, records) = reply(&query, tcp);
        let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
        answer.metadata.recursion_available = true;
        answer.metadata.response_code = code;
        answer.add_query(query);
        if records.len() > 10 && !tcp {
            answer.metadata.truncation = true;
        } else {
            answer.add_answers(records);
        }
        answer.to_vec().unwrap()
    }

    /// What it was asked for, in any way, that ends so.
    pub fn heard(&self, suffix: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|(name, ..)| name.ends_with(suffix)).count()
    }
}

pub fn a(name: &Name, address: [u8; 4], ttl: u32) -> Record {
    Record::from_rdata(name.clone(), ttl, RData::A(rdata::A(address.into())))
}

pub fn alias(name: &Name, target: &str) -> Record {
    Record::from_rdata(name.clone(), 60, RData::CNAME(rdata::CNAME(Name::from_ascii(target).unwrap())))
}

/// Memory of this process, bytes.
pub fn memory() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// Descriptors of this process.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

pub fn threads_named(name: &str) -> usize {
    let is_named = |entry: std::io::Result<std::fs::DirEntry>| {
        let text = std::fs::read_to_string(entry.unwrap().path().join("comm")).unwrap_or_default();
        text.trim() == name
    };
    std::fs::read_dir(Path::new("/proc/self/task"))
        .unwrap()
        .filter(|_| true)
        .map(is_named)
        .filter(|is| *is)
        .count()
}
