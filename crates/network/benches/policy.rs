//! What a decision costs with a hundred rules: `cargo bench -p agentkernel-network --bench policy`. At most 5 us each.

#![allow(missing_docs, reason = "the macro of criterion writes a function without")]

use std::hint::black_box;

use agentkernel_network::{Mode, Policy, Protocol, Rule};
use criterion::{Criterion, criterion_group, criterion_main};

fn decisions(criterion: &mut Criterion) {
    let rule = |text: String| text.parse::<Rule>().expect("a rule");
    let allow = (0..50).map(|n| match n % 2 {
        0 => rule(format!("*.zone-{n}.example:443")),
        _ => rule(format!("10.{n}.0.0/16:443")),
    });
    let deny = (0..50).map(|n| match n % 2 {
        0 => rule(format!("denied-{n}.example")),
        _ => rule(format!("198.51.{n}.0/24")),
    });
    let policy = Policy::new(Mode::None, allow.collect(), deny.collect(), Vec::new());
    let names = [
        ("name, allowed by the last rule", "a.zone-48.example", true),
        ("name, denied", "denied-48.example", false),
        ("name, on no list", "other.example", false),
    ];
    for (what, name, is_allowed) in names {
        assert_eq!(policy.name(name, 443, Protocol::Tcp).is_ok(), is_allowed);
        criterion.bench_function(what, |bencher| {
            bencher.iter(|| policy.name(black_box(name), 443, Protocol::Tcp))
        });
    }
    let addresses = [
        ("address, allowed by the last rule", "10.49.0.1", None, true),
        ("address, denied", "198.51.49.7", None, false),
        ("address, on no list", "203.0.113.7", None, false),
        ("address of a name", "203.0.113.7", Some("a.zone-48.example"), true),
    ];
    for (what, address, name, is_allowed) in addresses {
        let address = address.parse().expect("an address");
        assert_eq!(policy.address(address, 443, Protocol::Tcp, name).is_ok(), is_allowed);
        criterion.bench_function(what, |bencher| {
            bencher.iter(|| policy.address(black_box(address), 443, Protocol::Tcp, name))
        });
    }
}

criterion_group!(policy, decisions);
criterion_main!(policy);
