//! The network of the machine: loopback, and the card that leads to the host.
//!
//! Nobody but the host is on that link, so nothing is asked for by ARP, and nothing is there for IPv6.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use agentkernel_protocol::message::Link;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// The card, as the kernel names the first.
const CARD: &str = "eth0";
/// How long the kernel may take to show the card after its driver was loaded.
const PATIENCE: Duration = Duration::from_secs(20);

/// As in containers: a program that is nobody's may use every port, and ask whether somebody answers.
const SETTINGS: [(&str, &str); 2] =
    [("ipv4/ip_unprivileged_port_start", "0"), ("ipv4/ping_group_range", "0 2147483647")];

/// Sets loopback and card up.
///
/// # Errors
/// Says which step failed and why.
pub(crate) fn set_up(link: &Link) -> Result<(), String> {
    loopback_up().map_err(say("bring the loopback interface up"))?;
    for (name, value) in SETTINGS {
        write(name, value)?;
    }
    let deadline = Instant::now() + PATIENCE;
    while !Path::new("/sys/class/net").join(CARD).exists() {
        if Instant::now() > deadline {
            return Err("the machine has no network card".into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    write(&format!("ipv6/conf/{CARD}/disable_ipv6"), "1")?;
    card_up(link).map_err(say(format!("set {CARD} up")))
}

fn write(name: &str, value: &str) -> Result<(), String> {
    match std::fs::write(format!("/proc/sys/net/{name}"), value) {
        // A kernel without it has nothing that it would change.
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(say(format!("set net/{name}"))(error))
        }
        _ => Ok(()),
    }
}

/// Brings the loopback interface of this thread's network up. Neither allocates nor takes locks.
pub(crate) fn loopback_up() -> Result<(), Errno> {
    let socket = socket()?;
    let mut request = request("lo");
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    control(&socket, libc::SIOCSIFFLAGS, &request)
}

/// Gives the card its addresses and brings it up, and sends everything to the host.
fn card_up(link: &Link) -> Result<(), Errno> {
    let socket = socket()?;
    let mut request = request(CARD);
    request.ifr_ifru.ifru_mtu = link.mtu.into();
    control(&socket, libc::SIOCSIFMTU, &request)?;
    request.ifr_ifru.ifru_addr = address(link.guest);
    control(&socket, libc::SIOCSIFADDR, &request)?;
    let mask = u32::MAX.checked_shl(32 - u32::from(link.prefix.min(32))).unwrap_or(0);
    request.ifr_ifru.ifru_netmask = address(mask.to_be_bytes());
    control(&socket, libc::SIOCSIFNETMASK, &request)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING | libc::IFF_NOARP) as libc::c_short;
    control(&socket, libc::SIOCSIFFLAGS, &request)?;
    // SAFETY: all-zero bytes are a valid `rtentry`.
    let mut route: libc::rtentry = unsafe { MaybeUninit::zeroed().assume_init() };
    route.rt_dst = address([0; 4]);
    route.rt_genmask = address([0; 4]);
    route.rt_gateway = address(link.host);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    control(&socket, libc::SIOCADDRT, &route)
}

fn socket() -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
}

fn request(interface: &str) -> libc::ifreq {
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    // Its last byte stays zero.
    for (target, byte) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(interface.bytes()) {
        *target = byte as libc::c_char;
    }
    request
}

/// An IPv4 address as the requests have it.
fn address(address: [u8; 4]) -> libc::sockaddr {
    // SAFETY: all-zero bytes are a valid `sockaddr`.
    let mut generic: libc::sockaddr = unsafe { MaybeUninit::zeroed().assume_init() };
    generic.sa_family = libc::AF_INET as libc::sa_family_t;
    // Behind the port.
    for (target, byte) in generic.sa_data[2..6].iter_mut().zip(address) {
        *target = byte as libc::c_char;
    }
    generic
}

fn control<T>(socket: &OwnedFd, request: libc::c_ulong, argument: &T) -> Result<(), Errno> {
    // SAFETY: the requests of this module read what they are given, which lives through the call and is what each of them
    // takes: an `ifreq` or an `rtentry`.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request as _, std::ptr::from_ref(argument)) };
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// Names the step in an error.
fn say<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> String {
    move |error| format!("cannot {what}: {error}")
}
