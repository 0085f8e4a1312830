//! A guest that sends what no kernel would, and a host that changes under the server.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use rustix::io::Errno;

use super::*;

#[test]
fn names_that_lead_away_are_refused() {
    let directory = directory();
    let client = Client::read_write(directory.path());
    let long = [b'x'; 256];
    for (name, error) in [
        (b"..".as_slice(), Errno::INVAL),
        (b".", Errno::INVAL),
        (b"", Errno::INVAL),
        (b"a/b", Errno::INVAL),
        (b"../../etc", Errno::INVAL),
        (b"/etc", Errno::INVAL),
        (&long, Errno::NAMETOOLONG),
    ] {
        assert_eq!(client.lookup(ROOT, name), Err(error));
        let mut body = halves(&[0o755, 0]);
        body.extend(terminated(&[name]));
        assert_eq!(client.call(MKDIR, ROOT, &body).unwrap_err(), error);
    }
    assert_eq!(client.call(LOOKUP, ROOT, b"unterminated"), Err(Errno::INVAL));
}

#[test]
fn forged_nodes_handles_and_lengths_are_refused() {
    let directory = directory();
    fs::write(directory.path().join("file"), "x").unwrap();
    let client = Client::read_write(directory.path());
    for node in [0, 2, 77, u64::MAX] {
        assert_eq!(client.lookup(node, b"file"), Err(Errno::STALE));
        assert_eq!(client.open(node, 0), Err(Errno::STALE));
        assert_eq!(client.call(GETATTR, node, &fields(&[0, 0])), Err(Errno::STALE));
    }
    let node = client.walk("file").unwrap().node;
    let handle = client.open(node, 2).unwrap();
    assert_eq!(client.read(ROOT, handle, 0, 1), Err(Errno::BADF), "another node's handle");
    assert_eq!(client.write(node, handle + 1, 0, b"x"), Err(Errno::BADF));
    assert_eq!(client.call(WRITE, node, &fields(&[handle, 0, 1 << 30, 0, 0])), Err(Errno::INVAL));
    assert_eq!(client.call(999, ROOT, &[]), Err(Errno::NOSYS));
    assert_eq!(client.call(READ, node, &[]), Err(Errno::INVAL));

    let mut longer = request(GETATTR, ROOT, &fields(&[0, 0]));
    longer.push(0);
    assert_eq!(parse(&client.server.handle(&longer).unwrap()), Err(Errno::INVAL));
    let mut extended = request(GETATTR, ROOT, &fields(&[0, 0]));
    extended[36..38].copy_from_slice(&u16::MAX.to_le_bytes());
    assert_eq!(parse(&client.server.handle(&extended).unwrap()), Err(Errno::INVAL));
    assert_eq!(client.server.handle(&longer[..39]), None);
    assert_eq!(client.server.handle(&[]), None);
    let huge = request(WRITE, node, &vec![0; 2 << 20]);
    assert_eq!(parse(&client.server.handle(&huge).unwrap()), Err(Errno::INVAL));
}

#[test]
fn forgetting_too_much_or_in_bulk_is_harmless() {
    let directory = directory();
    fs::create_dir_all(directory.path().join("a/b/c")).unwrap();
    let client = Client::read_only(directory.path());
    let nodes: Vec<u64> = ["a", "a/b", "a/b/c"].iter().map(|path| client.walk(path).unwrap().node).collect();
    assert_eq!(client.server.node_count(), 4);
    let mut body = halves(&[u32::MAX, 0]);
    body.extend(nodes.iter().chain(&[ROOT, 999]).flat_map(|&node| fields(&[node, u64::MAX])));
    assert_eq!(client.server.handle(&request(BATCH_FORGET, 0, &body)), None);
    assert_eq!(client.server.node_count(), 1);
    client.walk("a/b").unwrap();
    client.call(DESTROY, 0, &[]).unwrap();
    assert_eq!(client.server.node_count(), 1);
    assert!(client.walk("a/b").is_ok());
}

#[test]
fn swapping_a_directory_for_a_symlink_leads_nowhere() {
    let directory = directory();
    let root = directory.path().join("served");
    fs::create_dir_all(root.join("dir")).unwrap();
    fs::write(root.join("dir/file"), "inside").unwrap();
    let outside = directory.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "outside").unwrap();
    symlink(&outside, root.join("link")).unwrap();
    for client in [Client::read_only(&root), Client::read_write(&root)] {
        let done = AtomicBool::new(false);
        let (mut inside, mut attempts) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let from = (rustix::fs::CWD, root.join("dir"), root.join("link"));
                    let exchange = rustix::fs::RenameFlags::EXCHANGE;
                    rustix::fs::renameat_with(from.0, from.1, rustix::fs::CWD, from.2, exchange).unwrap();
                }
            });
            while inside < 200 && attempts < 200_000 {
                attempts += 1;
                let Ok(found) = client.walk("dir/file") else { continue };
                let handle = client.open(found.node, 0).unwrap_or(0);
                if let Ok(content) = client.read(found.node, handle, 0, 100) {
                    assert_eq!(content, b"inside");
                    inside += 1;
                }
                let _ = client.call(RELEASE, found.node, &fields(&[handle, 0, 0]));
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!(inside > 0, "the race was run");
    }
}

#[test]
fn many_threads_share_a_server() {
    let directory = directory();
    for number in 0..50 {
        fs::create_dir(directory.path().join(format!("{number}"))).unwrap();
    }
    let client = Client::read_write(directory.path());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for (_, node) in (0..20).flat_map(|_| client.list(ROOT, true, 2000).unwrap()) {
                    if node != 0 {
                        client.forget(node, 1);
                    }
                }
            });
        }
    });
    assert_eq!(client.server.node_count(), 1);
}

/// Requests whose headers are right and whose arguments are anything, often small numbers.
fn any_request() -> impl Strategy<Value = Vec<u8>> {
    let small = prop_oneof![0u64..8, any::<u64>()].prop_map(|value| value.to_le_bytes().to_vec());
    let name = prop_oneof![
        Just(b"a\0".to_vec()),
        Just(b"d\0".to_vec()),
        Just(b"b\0a\0".to_vec()),
        Just(b"..\0".to_vec()),
        prop::collection::vec(any::<u8>(), 0..20)
    ];
    let body = (prop::collection::vec(small, 0..12), name)
        .prop_map(|(numbers, name)| [numbers.concat(), name].concat());
    (0u32..56, 0u64..12, body).prop_map(|(opcode, node, body)| request(opcode, node, &body))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_sequence_of_requests_is_answered_in_form(
        requests in prop::collection::vec(any_request(), 1..40),
        garbage in prop::collection::vec(any::<u8>(), 0..200),
        writable in any::<bool>(),
    ) {
        let directory = directory();
        let root = directory.path().join("served");
        fs::create_dir_all(root.join("d/e")).unwrap();
        fs::write(root.join("a"), "content").unwrap();
        symlink("..", root.join("up")).unwrap();
        let client = if writable { Client::read_write(&root) } else { Client::read_only(&root) };
        client.list(ROOT, true, 4096).unwrap();
        client.server.handle(&garbage);
        for request in &requests {
            if let Some(reply) = client.server.handle(request) {
                let _ = parse(&reply);
            }
        }
        prop_assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing was made outside");
        client.call(DESTROY, 0, &[]).unwrap();
        prop_assert_eq!((client.server.node_count(), client.server.handle_count()), (1, 0));
    }
}

#[test]
fn a_root_that_became_a_link_is_not_served() {
    let directory = tempfile::tempdir().unwrap();
    let (real, link) = (directory.path().join("real"), directory.path().join("link"));
    fs::create_dir_all(real.join("inner")).unwrap();
    symlink("real", &link).unwrap();
    for root in [link.clone(), link.join("inner")] {
        assert!(Export::directory(&root, Access::ReadOnly, Path::new("")).is_err(), "{root:?}");
        assert!(Export::workspace(&root, Access::ReadOnly, None).is_err(), "{root:?}");
    }
    assert!(Export::directory(&real, Access::ReadOnly, Path::new("")).is_ok());
}
