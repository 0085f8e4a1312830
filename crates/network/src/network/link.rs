//! The wire between the machine and this thread: Ethernet frames on a stream, each after its length.

use std::cell::RefCell;
use std::io;

use smoltcp::phy::{Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;

use super::packet::Written;
use super::{GUEST_HARDWARE_ADDRESS, HOST, MTU};

/// The Ethernet address of this end.
const HARDWARE_ADDRESS: [u8; 6] = [0x02, 0x61, 0x6b, 0, 0, 1];
const LENGTH_BYTES: usize = 4;
const HEADER: usize = 14;
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
/// Longest frame that QEMU passes on, whatever the guest's card is set to.
const FRAME_LIMIT: usize = (64 << 10) + (4 << 10);
/// Bytes of frames that wait for the machine beyond which connections wait.
const WAITING: usize = 512 << 10;
/// Bytes beyond which answers to a guest that does not read are lost, as on any link.
const LOST: usize = 1 << 20;

/// The way to the machine.
#[derive(Debug, Default)]
pub(crate) struct Link {
    waiting: RefCell<Vec<u8>>,
    /// There is something to write.
    filled: Notify,
    /// There is room again.
    pub emptied: Notify,
}

impl Link {
    /// Whether a connection may send.
    pub(crate) fn has_room(&self) -> bool {
        self.waiting.borrow().len() < WAITING
    }

    /// Sends an IP packet of a length, filled in by `fill`.
    fn send<R>(&self, length: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        self.frame(TYPE_IPV4, length, fill)
    }

    pub(crate) fn write(&self, packet: &Written<'_>) {
        self.send(packet.len(), |buffer| packet.emit(buffer));
    }

    fn frame<R>(&self, kind: [u8; 2], length: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut waiting = self.waiting.borrow_mut();
        let start = waiting.len();
        let size = u32::try_from(HEADER + length).unwrap_or(u32::MAX);
        waiting.extend_from_slice(&size.to_be_bytes());
        waiting.extend_from_slice(&GUEST_HARDWARE_ADDRESS);
        waiting.extend_from_slice(&HARDWARE_ADDRESS);
        waiting.extend_from_slice(&kind);
        let content = waiting.len();
        waiting.resize(content + length, 0);
        let result = fill(&mut waiting[content..]);
        if start > LOST {
            waiting.truncate(start);
        }
        drop(waiting);
        self.filled.notify_one();
        result
    }

    /// Writes what is sent until the machine is gone.
    pub(crate) async fn drain(&self, mut stream: OwnedWriteHalf) -> io::Error {
        let mut writing = Vec::new();
        loop {
            std::mem::swap(&mut writing, &mut self.waiting.borrow_mut());
            if writing.is_empty() {
                self.filled.notified().await;
                continue;
            }
            self.emptied.notify_waiters();
            if let Err(error) = stream.write_all(&writing).await {
                return error;
            }
            writing.clear();
            writing.shrink_to(WAITING + FRAME_LIMIT);
        }
    }

    /// Hands each IP packet of the machine to `take`, until the machine is gone.
    ///
    /// # Errors
    /// If the stream breaks, or says what QEMU never does.
    pub(crate) async fn read(
        &self,
        mut stream: OwnedReadHalf,
        mut take: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let mut buffer = vec![0; 4 * FRAME_LIMIT];
        let mut filled = 0;
        loop {
            let count = stream.read(&mut buffer[filled..]).await?;
            if count == 0 {
                return Ok(());
            }
            filled += count;
            let mut start = 0;
            while let Some((frame, rest)) = split(&buffer[start..filled])? {
                match frame.get(12..HEADER) {
                    Some(kind) if kind == TYPE_IPV4 => take(&frame[HEADER..]),
                    Some(kind) if kind == TYPE_ARP => self.resolve(&frame[HEADER..]),
                    _ => {}
                }
                start = filled - rest.len();
            }
            buffer.copy_within(start..filled, 0);
            filled -= start;
        }
    }

    /// Answers who has this end's address (RFC 826): the guest's card asks nobody, but root in it may set that otherwise.
    fn resolve(&self, request: &[u8]) {
        const QUESTION: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
        const ANSWER: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 2];
        if request.len() < 28 || request[..8] != QUESTION || request[24..28] != HOST.octets() {
            return;
        }
        let asker: [u8; 10] = request[8..18].try_into().unwrap_or_default();
        self.frame(TYPE_ARP, 28, |reply| {
            reply[..8].copy_from_slice(&ANSWER);
            reply[8..14].copy_from_slice(&HARDWARE_ADDRESS);
            reply[14..18].copy_from_slice(&HOST.octets());
            reply[18..28].copy_from_slice(&asker);
        });
    }
}

/// The first frame of a stream, and what follows it.
pub(crate) fn split(bytes: &[u8]) -> io::Result<Option<(&[u8], &[u8])>> {
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
    let length = u32::from_be_bytes(*length) as usize;
    if length > FRAME_LIMIT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    Ok(rest.split_at_checked(length))
}

/// One end of a connection's own stack: at most one packet in, any number out.
pub(crate) struct Wire<'a> {
    pub input: Option<&'a [u8]>,
    pub link: &'a Link,
    /// Whether it may send though the link is full.
    pub is_urgent: bool,
}

impl Device for Wire<'_> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Sent<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Sent<'_>)> {
        let input = self.input.take()?;
        Some((Received(input), Sent(self.link)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sent<'_>> {
        (self.is_urgent || self.link.has_room()).then_some(Sent(self.link))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = usize::from(MTU);
        // The link loses and changes nothing; but the guest looks at what it receives.
        let mut checksum = ChecksumCapabilities::default();
        (checksum.ipv4, checksum.tcp) = (Checksum::Tx, Checksum::Tx);
        capabilities.checksum = checksum;
        capabilities
    }
}

pub(crate) struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(self.0)
    }
}

pub(crate) struct Sent<'a>(&'a Link);

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        self.0.send(length, fill)
    }
}
