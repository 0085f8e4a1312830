//! This machine's own addresses, as the kernel lists them: they belong to the floor of every egress policy.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IPv4: a tree of prefixes, with the machine's own marked.
const TREE: &str = "/proc/self/net/fib_trie";
/// IPv6: one a line.
const LIST: &str = "/proc/self/net/if_inet6";

/// The addresses of this machine's interfaces. A protocol that the kernel does not have has none.
pub(crate) fn own() -> Vec<IpAddr> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let (tree, list) = (read(TREE), read(LIST));
    local_v4(&tree).map(IpAddr::V4).chain(local_v6(&list).map(IpAddr::V6)).collect()
}

/// Each leaf is followed by lines that say what it is.
fn local_v4(tree: &str) -> impl Iterator<Item = Ipv4Addr> + '_ {
    let mut leaf = None;
    tree.lines().filter_map(move |line| {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse().ok();
        }
        line.starts_with("/32 host LOCAL").then_some(leaf).flatten()
    })
}

fn local_v6(list: &str) -> impl Iterator<Item = Ipv6Addr> + '_ {
    let words = list.lines().filter_map(|line| line.split_whitespace().next());
    words.filter_map(|word| u128::from_str_radix(word, 16).ok()).map(Ipv6Addr::from_bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lists() {
        let tree = "Local:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     \
                    |-- 192.0.2.1\n        /32 host LOCAL\n     |-- 192.0.2.255\n        /32 link BROADCAST\n     \
                    +-- 127.0.0.0/8 2 0 2\n        |-- 127.0.0.1\n           /32 host LOCAL\n";
        let found: Vec<String> = local_v4(tree).map(|address| address.to_string()).collect();
        assert_eq!(found, ["192.0.2.1", "127.0.0.1"]);
        let list = "20010db8000000000000000000000001 02 40 00 80     eth0\n\
                    00000000000000000000000000000001 01 80 10 80       lo\n";
        let found: Vec<String> = local_v6(list).map(|address| address.to_string()).collect();
        assert_eq!(found, ["2001:db8::1", "::1"]);
        assert!(own().contains(&Ipv4Addr::LOCALHOST.into()), "a machine has itself");
    }
}
