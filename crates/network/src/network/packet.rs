//! IPv4 packets: what of a guest's is understood, and the few that are written here by hand.

use std::net::{Ipv4Addr, SocketAddrV4};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    Icmpv4DstUnreachable, Icmpv4Message, Icmpv4Packet, Icmpv4Repr, IpAddress, IpProtocol, Ipv4Packet,
    Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, UdpRepr,
};

/// Hops left to what is sent to the guest, which is one away.
const HOP_LIMIT: u8 = 64;
/// Bytes of a packet that an error message returns (RFC 792: its header and eight more; RFC 1812: as many as fit).
const RETURNED: usize = 128;

/// A packet of the guest's that is whole.
#[derive(Debug)]
pub(crate) struct Packet<'a> {
    /// Its bytes, as long as its header says.
    pub bytes: &'a [u8],
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub content: Content<'a>,
}

/// What a packet carries.
#[derive(Debug)]
pub(crate) enum Content<'a> {
    Tcp(Segment),
    Udp {
        source: u16,
        destination: u16,
        payload: &'a [u8],
    },
    /// A request for an echo.
    Echo {
        identifier: u16,
        sequence: u16,
        payload: &'a [u8],
    },
    /// Anything else: it is not carried.
    Other,
}

/// What is read of a TCP segment before a connection's own stack has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segment {
    pub source: u16,
    pub destination: u16,
    pub begins: bool,
    pub resets: bool,
    pub sequence: TcpSeqNumber,
    acknowledges: Option<TcpSeqNumber>,
    length: usize,
}

impl<'a> Packet<'a> {
    /// Reads a packet; `None` if it is malformed, a fragment, or not IPv4. Checksums are not looked at: the link loses
    /// nothing.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let packet = Ipv4Packet::new_checked(bytes).ok()?;
        if packet.version() != 4
            || packet.header_len() < 20
            || packet.more_frags()
            || packet.frag_offset() != 0
        {
            return None;
        }
        let bytes = bytes.get(..usize::from(packet.total_len()))?;
        let payload = bytes.get(usize::from(packet.header_len())..)?;
        let content = match packet.next_header() {
            // No connection leads to more than one place, and none of the stacks here takes that for an address.
            IpProtocol::Tcp if !IpAddress::Ipv4(packet.dst_addr()).is_unicast() => Content::Other,
            IpProtocol::Tcp => Content::Tcp(Segment::parse(payload)?),
            IpProtocol::Udp => {
                let datagram = UdpPacket::new_checked(payload).ok()?;
                let length = usize::from(datagram.len());
                let (source, destination) = (datagram.src_port(), datagram.dst_port());
                if source == 0 || destination == 0 {
                    return None;
                }
                Content::Udp { source, destination, payload: payload.get(8..length)? }
            }
            IpProtocol::Icmp => {
                let message = Icmpv4Packet::new_checked(payload).ok()?;
                if message.msg_type() == Icmpv4Message::EchoRequest {
                    let (identifier, sequence) = (message.echo_ident(), message.echo_seq_no());
                    Content::Echo { identifier, sequence, payload: payload.get(8..)? }
                } else {
                    Content::Other
                }
            }
            _ => Content::Other,
        };
        Some(Self { bytes, source: packet.src_addr(), destination: packet.dst_addr(), content })
    }
}

impl Segment {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let segment = TcpPacket::new_checked(bytes).ok()?;
        if segment.src_port() == 0 || segment.dst_port() == 0 || segment.header_len() < 20 {
            return None;
        }
        Some(Self {
            source: segment.src_port(),
            destination: segment.dst_port(),
            begins: segment.syn() && !segment.ack() && !segment.rst() && !segment.fin(),
            resets: segment.rst(),
            sequence: segment.seq_number(),
            acknowledges: segment.ack().then(|| segment.ack_number()),
            length: segment.segment_len(),
        })
    }

    /// The answer to a segment of a connection that is not there (RFC 9293, 3.10.7.1).
    pub(crate) fn reset(&self) -> TcpRepr<'static> {
        let (sequence, acknowledges) = match self.acknowledges {
            Some(sequence) => (sequence, None),
            None => (TcpSeqNumber(0), Some(self.sequence + self.length)),
        };
        segment(self.destination, self.source, TcpControl::Rst, sequence, acknowledges)
    }
}

fn segment(
    source: u16,
    destination: u16,
    control: TcpControl,
    sequence: TcpSeqNumber,
    acknowledges: Option<TcpSeqNumber>,
) -> TcpRepr<'static> {
    TcpRepr {
        src_port: source,
        dst_port: destination,
        control,
        seq_number: sequence,
        ack_number: acknowledges,
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    }
}

/// A segment that a live connection of the guest's answers with where it stands (RFC 5961, 4.2), so that it can be reset.
pub(crate) fn provoking(source: u16, destination: u16, sequence: u32) -> TcpRepr<'static> {
    segment(source, destination, TcpControl::Syn, TcpSeqNumber(sequence.cast_signed()), None)
}

/// A packet that is written here.
pub(crate) struct Written<'a> {
    header: Ipv4Repr,
    content: WrittenContent<'a>,
}

enum WrittenContent<'a> {
    Tcp(TcpRepr<'static>),
    Udp { source: u16, destination: u16, payload: &'a [u8] },
    Icmp(Icmpv4Repr<'a>),
}

impl<'a> Written<'a> {
    fn new(source: Ipv4Addr, destination: Ipv4Addr, content: WrittenContent<'a>) -> Self {
        let (next_header, payload_len) = match &content {
            WrittenContent::Tcp(segment) => (IpProtocol::Tcp, segment.buffer_len()),
            WrittenContent::Udp { payload, .. } => (IpProtocol::Udp, 8 + payload.len()),
            WrittenContent::Icmp(message) => (IpProtocol::Icmp, message.buffer_len()),
        };
        let header = Ipv4Repr {
            src_addr: source,
            dst_addr: destination,
            next_header,
            payload_len,
            hop_limit: HOP_LIMIT,
        };
        Self { header, content }
    }

    pub(crate) fn tcp(source: Ipv4Addr, destination: Ipv4Addr, segment: TcpRepr<'static>) -> Self {
        Self::new(source, destination, WrittenContent::Tcp(segment))
    }

    /// A datagram, whose payload fits the link.
    pub(crate) fn udp(source: SocketAddrV4, destination: SocketAddrV4, payload: &'a [u8]) -> Self {
        let content = WrittenContent::Udp { source: source.port(), destination: destination.port(), payload };
        Self::new(*source.ip(), *destination.ip(), content)
    }

    pub(crate) fn echo(packet: &Packet<'a>, identifier: u16, sequence: u16, payload: &'a [u8]) -> Self {
        let message = Icmpv4Repr::EchoReply { ident: identifier, seq_no: sequence, data: payload };
        Self::new(packet.destination, packet.source, WrittenContent::Icmp(message))
    }

    /// The news that a packet did not get where it was sent.
    pub(crate) fn unreachable(packet: &Packet<'a>, reason: Icmpv4DstUnreachable) -> Self {
        let header = Ipv4Packet::new_unchecked(packet.bytes);
        let length = usize::from(header.header_len());
        let data = &packet.bytes[length..packet.bytes.len().min(length + RETURNED)];
        let header = Ipv4Repr {
            src_addr: packet.source,
            dst_addr: packet.destination,
            next_header: header.next_header(),
            payload_len: packet.bytes.len() - length,
            hop_limit: header.hop_limit(),
        };
        let message = Icmpv4Repr::DstUnreachable { reason, header, data };
        // As if whoever it was sent to had said so.
        Self::new(packet.destination, packet.source, WrittenContent::Icmp(message))
    }

    /// Its length, bytes.
    pub(crate) fn len(&self) -> usize {
        self.header.buffer_len() + self.header.payload_len
    }

    /// Writes it into a buffer of its length.
    pub(crate) fn emit(&self, buffer: &mut [u8]) {
        let checksums = ChecksumCapabilities::default();
        let mut packet = Ipv4Packet::new_unchecked(buffer);
        self.header.emit(&mut packet, &checksums);
        let (source, destination) = (self.header.src_addr.into(), self.header.dst_addr.into());
        match &self.content {
            WrittenContent::Tcp(segment) => {
                let mut target = TcpPacket::new_unchecked(packet.payload_mut());
                segment.emit(&mut target, &source, &destination, &checksums);
            }
            WrittenContent::Udp { source: source_port, destination: destination_port, payload } => {
                let datagram = UdpRepr { src_port: *source_port, dst_port: *destination_port };
                let mut target = UdpPacket::new_unchecked(packet.payload_mut());
                datagram.emit(
                    &mut target,
                    &source,
                    &destination,
                    payload.len(),
                    |target| target.copy_from_slice(payload),
                    &checksums,
                );
            }
            WrittenContent::Icmp(message) => {
                message.emit(&mut Icmpv4Packet::new_unchecked(packet.payload_mut()), &checksums);
            }
        }
    }
}
