use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;

fn rules(texts: &[&str]) -> Vec<Rule> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn policy(mode: Mode, allow: &[&str], deny: &[&str]) -> Policy {
    Policy::new(
        mode,
        rules(allow),
        rules(deny),
        vec!["198.18.7.7".parse().unwrap(), "2a00::7".parse().unwrap()],
    )
}

fn ask(policy: &Policy, text: &str) -> Result<Grounds, Box<Refusal>> {
    let (text, protocol) = match text.strip_suffix("/udp") {
        Some(rest) => (rest, Protocol::Udp),
        None => (text, Protocol::Tcp),
    };
    match text.parse::<SocketAddr>() {
        Ok(socket) => policy.address(socket.ip(), socket.port(), protocol, None),
        Err(_) => {
            let (name, port) = text.rsplit_once(':').unwrap();
            policy.name(name, port.parse().unwrap(), protocol)
        }
    }
}

#[test]
fn rules_are_read_and_written() {
    for (text, written) in [
        ("Example.COM.", "example.com"),
        ("*.example.com:443", "*.example.com:443"),
        ("_dns.example:53/udp", "_dns.example:53/udp"),
        ("example.com/tcp", "example.com/tcp"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.0.0.0/8:53/udp", "10.0.0.0/8:53/udp"),
        ("10.0.0.0/8/udp", "10.0.0.0/8/udp"),
        ("192.0.2.7:8080", "192.0.2.7:8080"),
        ("192.0.2.7/32", "192.0.2.7"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("::1", "::1"),
        ("[::1]:80", "[::1]:80"),
        ("[fd00::/8]:53/udp", "[fd00::/8]:53/udp"),
        ("::/0", "::/0"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
    ] {
        let rule: Rule = text.parse().unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(rule.to_string(), written);
        assert_eq!(written.parse(), Ok(rule));
    }
    for (text, reason) in [
        ("", "it names nothing"),
        (":80", "it names nothing"),
        ("*", "an asterisk"),
        ("*.", "it names nothing"),
        ("a.*.b", "an asterisk"),
        ("a..b", "neither a name"),
        ("a b", "neither a name"),
        ("bücher.example", "in ASCII: xn--"),
        ("https://example.com/x", "leave out what stands before"),
        ("example.com:0", "`0` is no port"),
        ("example.com:+1", "`+1` is no port"),
        ("example.com:65536", "`65536` is no port"),
        ("example.com/sctp", "`example.com` is no address"),
        ("10.0.0.1/8", "the range begins at 10.0.0.0: write 10.0.0.0/8"),
        ("10.0.0.0/33", "`/33` is no length of a range; there are /0 to /32"),
        ("10.0.0.0/+8", "`/+8` is no length"),
        ("fd00::1/8", "the range begins at fd00::"),
        ("[::1", "the bracket is not closed"),
        ("[::1]80", "only :PORT"),
        ("[10.0.0.1]:80", "only IPv6"),
        ("fe80::1%eth0", "is no address"),
        ("127.1", "write an address in full"),
        ("2130706433", "write an address in full"),
        ("0x7f.0x1", "write an address in full"),
    ] {
        let error = text.parse::<Rule>().unwrap_err().to_string();
        assert!(error.starts_with(&format!("`{text}` is no rule: ")) && error.contains(reason), "{error}");
    }
    let long = "a.".repeat(127) + "b";
    assert!(long.parse::<Rule>().is_err() && "a".repeat(64).parse::<Rule>().is_err());
}

#[test]
fn the_floor_is_exactly_this() {
    let public = policy(Mode::Public, &[], &[]);
    for (address, entry) in [
        ("127.0.0.1", Floor::Loopback),
        ("127.255.255.255", Floor::Loopback),
        ("::1", Floor::Loopback),
        ("10.0.0.0", Floor::Private),
        ("10.255.255.255", Floor::Private),
        ("172.16.0.0", Floor::Private),
        ("172.31.255.255", Floor::Private),
        ("192.168.0.1", Floor::Private),
        ("fc00::", Floor::Private),
        ("fdff:ffff::1", Floor::Private),
        ("169.254.169.254", Floor::Metadata),
        ("fd00:ec2::254", Floor::Metadata),
        ("169.254.1.1", Floor::LinkLocal),
        ("fe80::1", Floor::LinkLocal),
        ("febf::1", Floor::LinkLocal),
        ("100.64.0.0", Floor::Shared),
        ("100.127.255.255", Floor::Shared),
        ("224.0.0.1", Floor::Multicast),
        ("239.255.255.255", Floor::Multicast),
        ("ff02::1", Floor::Multicast),
        ("0.0.0.0", Floor::Unspecified),
        ("::", Floor::Unspecified),
        ("255.255.255.255", Floor::Broadcast),
        ("198.18.7.7", Floor::Host),
        ("2a00::7", Floor::Host),
        // The same in other clothes.
        ("::ffff:127.0.0.1", Floor::Loopback),
        ("::ffff:198.18.7.7", Floor::Host),
        ("::10.0.0.1", Floor::Private),
        ("::2", Floor::Unspecified),
        ("64:ff9b::169.254.169.254", Floor::Metadata),
        ("64:ff9b:1::8.8.8.8", Floor::Translated),
        ("2002:7f00:1::", Floor::Loopback),
        ("2002:c612:707::1", Floor::Host),
        // Teredo: the client at the end, turned over; the server after the prefix.
        ("2001:0:808:808::f5ff:fffe", Floor::Private),
        ("2001:0:a00:1::f7f7:f7f7", Floor::Private),
    ] {
        let refusal = public.address(address.parse().unwrap(), 443, Protocol::Tcp, None).unwrap_err();
        assert_eq!(refusal.cause, Cause::Floor(entry), "{address}");
    }
    for address in [
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "192.167.1.1",
        "169.253.1.1",
        "100.63.255.255",
        "100.128.0.0",
        "223.255.255.255",
        "240.0.0.1",
        "1.0.0.0",
        "198.18.7.8",
        // Documentation ranges: registries are behind them on some networks.
        "192.0.2.1",
        "198.51.100.1",
        "203.0.113.1",
        "2001:db8::1",
        "2606:4700::1",
        "fbff::1",
        "fec0::1",
        "64:ff9b::8.8.8.8",
        "2002:808:808::",
        "::8.8.8.8",
        "2001:0:808:808::f7f7:f7f7",
    ] {
        assert_eq!(
            public.address(address.parse().unwrap(), 443, Protocol::Tcp, None),
            Ok(Grounds::Public),
            "{address}"
        );
    }
}

#[test]
fn decisions() {
    let denied = |rule: &str| Cause::Rule(rule.parse().unwrap());
    for (mode, allow, deny, target, expected) in [
        (Mode::None, &[][..], &[][..], "example.com:443", Some(Cause::NoNetwork)),
        (Mode::None, &[], &[], "8.8.8.8:443", Some(Cause::NoNetwork)),
        (Mode::None, &["example.com"], &[], "example.com:443", None),
        (Mode::None, &["example.com"], &[], "EXAMPLE.com.:443", None),
        (Mode::None, &["example.com"], &[], "www.example.com:443", Some(Cause::NotListed)),
        (Mode::None, &["example.com"], &[], "8.8.8.8:443", Some(Cause::NotListed)),
        (Mode::None, &["example.com:443"], &[], "example.com:80", Some(Cause::NotListed)),
        (Mode::None, &["example.com"], &[], "example.com:443/udp", Some(Cause::NotListed)),
        (Mode::None, &["example.com/udp"], &[], "example.com:443/udp", None),
        (Mode::None, &["*.example.com"], &[], "a.b.example.com:443", None),
        (Mode::None, &["*.example.com"], &[], "example.com:443", Some(Cause::NotListed)),
        (Mode::None, &["*.example.com"], &[], "notexample.com:443", Some(Cause::NotListed)),
        (Mode::None, &["8.8.8.0/24"], &[], "8.8.8.8:53", None),
        (Mode::None, &["8.8.8.0/24"], &[], "8.8.9.8:53", Some(Cause::NotListed)),
        (Mode::None, &["0.0.0.0/0"], &[], "127.0.0.1:53", None),
        (Mode::None, &["0.0.0.0/0"], &[], "[::1]:53", Some(Cause::Floor(Floor::Loopback))),
        (Mode::Public, &["127.0.0.1:80"], &[], "127.0.0.1:80", None),
        (Mode::Public, &["127.0.0.1:80"], &[], "[::ffff:127.0.0.1]:80", None),
        (Mode::Public, &["127.0.0.1:80"], &[], "127.0.0.1:81", Some(Cause::Floor(Floor::Loopback))),
        (Mode::Public, &["127.0.0.1:80"], &[], "[2002:7f00:1::]:80", Some(Cause::Floor(Floor::Loopback))),
        (Mode::Public, &["fd00::/8"], &[], "[fd00::5]:80", None),
        (Mode::Public, &[], &["example.com"], "example.com:443/udp", Some(denied("example.com"))),
        (Mode::Public, &[], &["example.com:443"], "example.com:80", None),
        (Mode::Public, &[], &["8.8.8.8"], "[64:ff9b::8.8.8.8]:443", Some(denied("8.8.8.8"))),
        (Mode::Public, &["10.0.0.5"], &["10.0.0.0/8"], "10.0.0.5:80", Some(denied("10.0.0.0/8"))),
        (Mode::None, &["example.com"], &["*.com"], "example.com:443", Some(denied("*.com"))),
    ] {
        let found = ask(&policy(mode, allow, deny), target).err().map(|refusal| refusal.cause);
        assert_eq!(found, expected, "{mode:?} {allow:?} {deny:?} {target}");
    }
}

#[test]
fn a_name_lifts_nothing_and_is_asked_after() {
    let from = |policy: &Policy, name: &str, address: &str| {
        policy.address(address.parse().unwrap(), 443, Protocol::Tcp, Some(name))
    };
    let listed = policy(Mode::None, &["example.com", "localhost"], &[]);
    assert!(matches!(from(&listed, "example.com", "8.8.8.8"), Ok(Grounds::Rule(_))));
    assert_eq!(from(&listed, "other.example", "8.8.8.8").unwrap_err().cause, Cause::NotListed);
    let refusal = from(&listed, "localhost", "127.0.0.1").unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "the network policy refuses 127.0.0.1:443, which localhost leads to: it is a loopback address"
    );
    assert_eq!(refusal.hint(), "if it is meant to be reached, allow it: --allow 127.0.0.1:443");
    let both = policy(Mode::None, &["localhost", "127.0.0.1:443"], &[]);
    assert!(from(&both, "localhost", "127.0.0.1").is_ok());
    let denied = policy(Mode::Public, &[], &["8.8.8.8"]);
    let refusal = from(&denied, "example.com", "8.8.8.8").unwrap_err();
    assert!(refusal.to_string().ends_with("denied by 8.8.8.8") && refusal.hint().contains("--deny 8.8.8.8"));
    // A text that is an address is no name, whoever asks.
    assert!(denied.name("127.0.0.1", 80, Protocol::Tcp).is_err());
}

#[test]
fn refusals_name_the_flag() {
    for (mode, allow, target, text, hint) in [
        (
            Mode::Public,
            &[][..],
            "169.254.169.254:80",
            "it is a metadata address",
            "--allow 169.254.169.254:80",
        ),
        (Mode::Public, &[], "[::1]:53/udp", "it is a loopback address", "--allow [::1]:53/udp"),
        (
            Mode::None,
            &[],
            "a.example:80",
            "there is no network",
            "--network public, or this alone, --allow a.example:80",
        ),
        (Mode::None, &["b.example"], "a.example:80", "no rule allows it", "--allow a.example:80"),
    ] {
        let refusal = ask(&policy(mode, allow, &[]), target).unwrap_err();
        assert!(
            refusal.to_string().contains(text) && refusal.hint().contains(hint),
            "{refusal} {}",
            refusal.hint()
        );
        // What the hint says does help.
        let with = Policy::new(mode, [rules(allow), vec![refusal.allow.unwrap()]].concat(), vec![], vec![]);
        assert!(ask(&with, target).is_ok(), "{target}");
    }
}

/// Addresses of the floor.
fn floored() -> impl Strategy<Value = Ipv4Addr> {
    let base = prop_oneof![
        Just(([127, 0, 0, 0], 8)),
        Just(([10, 0, 0, 0], 8)),
        Just(([172, 16, 0, 0], 12)),
        Just(([192, 168, 0, 0], 16)),
        Just(([169, 254, 0, 0], 16)),
        Just(([100, 64, 0, 0], 10)),
        Just(([224, 0, 0, 0], 4)),
        Just(([0, 0, 0, 0], 8)),
        Just(([255, 255, 255, 255], 32)),
    ];
    (base, any::<u32>()).prop_map(|((base, bits), rest)| {
        let rest = rest.checked_shr(bits).unwrap_or(0);
        Ipv4Addr::from_bits(u32::from_be_bytes(base) | rest)
    })
}

/// Every address of IPv6 that stands for one of IPv4.
fn clothes(address: Ipv4Addr) -> Vec<IpAddr> {
    let [a, b, c, d] = address.octets().map(u16::from);
    let (high, low) = (a << 8 | b, c << 8 | d);
    vec![
        address.into(),
        address.to_ipv6_mapped().into(),
        Ipv6Addr::new(0, 0, 0, 0, 0, 0, high, low).into(),
        Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low).into(),
        Ipv6Addr::new(0x2002, high, low, 1, 2, 3, 4, 5).into(),
        Ipv6Addr::new(0x2001, 0, high, low, 0, 0, !0x808, !0x808).into(),
        Ipv6Addr::new(0x2001, 0, 0x808, 0x808, 0, 0, !high, !low).into(),
    ]
}

fn any_address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits).into()),
        any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).into()),
        (any::<u32>(), 0..7usize).prop_map(|(bits, index)| clothes(Ipv4Addr::from_bits(bits))[index]),
    ]
}

fn any_mode() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::None), Just(Mode::Public)]
}

fn any_protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp)]
}

proptest! {
    #[test]
    fn every_spelling_of_a_floored_address_is_refused(address in floored(), port in 1u16.., protocol in any_protocol()) {
        for spelling in clothes(address) {
            let public = policy(Mode::Public, &["*.example", "a.example"], &[]);
            prop_assert!(public.address(spelling, port, protocol, None).is_err(), "{}", spelling);
            prop_assert!(public.address(spelling, port, protocol, Some("a.example")).is_err(), "{}", spelling);
            let none = policy(Mode::None, &["a.example", "a.example/udp"], &[]);
            prop_assert!(none.address(spelling, port, protocol, Some("a.example")).is_err(), "{}", spelling);
        }
    }

    #[test]
    fn deny_beats_allow(address in any_address(), port in 1u16.., mode in any_mode(), protocol in any_protocol()) {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let rule: Rule = format!("{address}/{bits}").parse().unwrap();
        let allow = rules(&["0.0.0.0/0", "::/0", "0.0.0.0/0/udp", "::/0/udp", "a.example", "a.example/udp"]);
        let policy = Policy::new(mode, [allow, vec![rule.clone()]].concat(), vec![rule], vec![]);
        prop_assert!(policy.address(address, port, protocol, None).is_err());
        prop_assert!(policy.address(address, port, protocol, Some("a.example")).is_err());
    }

    #[test]
    fn denied_addresses_are_denied_in_every_spelling(bits in any::<u32>(), port in 1u16..) {
        let address = Ipv4Addr::from_bits(bits);
        let policy = Policy::new(Mode::Public, rules(&["0.0.0.0/0", "::/0"]), rules(&[&address.to_string()]), vec![]);
        for spelling in clothes(address) {
            prop_assert!(policy.address(spelling, port, Protocol::Tcp, None).is_err(), "{}", spelling);
        }
    }

    #[test]
    fn a_name_never_permits_more_than_its_address(address in any_address(), port in 1u16.., protocol in any_protocol()) {
        let policy = policy(Mode::Public, &["a.example", "*.example"], &[]);
        let alone = policy.address(address, port, protocol, None).is_ok();
        prop_assert_eq!(policy.address(address, port, protocol, Some("a.example")).is_ok(), alone);
    }

    #[test]
    fn what_is_not_listed_is_refused(address in any_address(), port in 1u16.., protocol in any_protocol()) {
        let none = policy(Mode::None, &["a.example"], &[]);
        prop_assert!(none.address(address, port, protocol, None).is_err());
        prop_assert!(none.address(address, port, protocol, Some("b.example")).is_err());
        prop_assert!(policy(Mode::None, &[], &[]).address(address, port, protocol, None).is_err());
    }

    #[test]
    fn any_text_is_a_rule_or_none(text in "\\PC*") {
        if let Ok(rule) = text.parse::<Rule>() {
            prop_assert_eq!(rule.to_string().parse::<Rule>(), Ok(rule));
        }
    }

    #[test]
    fn ranges_hold_what_begins_alike(first in any::<u32>(), other in any::<u32>(), bits in 0u8..=32) {
        let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
        let rule: Rule = format!("{}/{bits}", Ipv4Addr::from_bits(first & mask)).parse().unwrap();
        prop_assert_eq!(rule.is_about_address(Ipv4Addr::from_bits(other).into()), first & mask == other & mask);
    }
}
