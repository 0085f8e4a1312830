//! A server that goes on for another one's guest: a restored machine asks by the node ids it knows.

use std::fs;

use super::{Client, FORGET, RELEASE, directory, fields};
use crate::files::table::is_current;
use rustix::io::Errno;

const FUTURE: i64 = i64::MAX;

#[test]
fn a_restored_guest_finds_what_it_knew() {
    let root = directory();
    fs::create_dir_all(root.path().join("a/b")).unwrap();
    fs::write(root.path().join("a/b/c"), "content").unwrap();
    fs::write(root.path().join("gone"), "").unwrap();
    let former = Client::read_write(root.path());
    let file = former.walk("a/b/c").unwrap();
    let gone = former.walk("gone").unwrap();
    let handle = former.open(file.node, 2).unwrap();
    let lost = former.open(gone.node, 0).unwrap();
    let table = former.server.save(true);
    fs::remove_file(root.path().join("gone")).unwrap();
    let next = Client::read_write(root.path());
    assert!(next.server.adopt(&table));
    // Its open files are open, its nodes lead where they led, new ones get ids that were never used.
    assert_eq!(next.write(file.node, handle, 0, b"CON"), Ok(3));
    assert_eq!(next.read(file.node, handle, 0, 100), Ok(b"CONtent".to_vec()));
    assert_eq!(next.read(gone.node, lost, 0, 1), Err(Errno::BADF));
    let directory = next.walk("a").unwrap().node;
    assert!(next.lookup(directory, b"b").unwrap().node < file.node);
    fs::write(root.path().join("new"), "").unwrap();
    assert!(next.walk("new").unwrap().node > gone.node);
    assert!(next.open(file.node, 0).unwrap() > lost);
    // Both servers serve on: nothing of the former was taken away.
    assert_eq!(former.read(file.node, handle, 0, 3), Ok(b"CON".to_vec()));
    next.call(RELEASE, file.node, &fields(&[handle, 0, 0])).unwrap();
    assert_eq!(next.read(file.node, handle, 0, 1), Err(Errno::BADF));
    let before = next.server.node_count();
    assert!(next.server.handle(&super::request(FORGET, file.node, &fields(&[1000]))).is_none());
    assert!(next.server.node_count() < before);
}

#[test]
fn damaged_tables_are_refused() {
    let root = directory();
    fs::write(root.path().join("file"), "").unwrap();
    let former = Client::read_only(root.path());
    former.walk("file").unwrap();
    let table = former.server.save(true);
    for cut in 0..table.len() {
        let next = Client::read_only(root.path());
        // Whatever the bytes are: refused, or a table that leads nowhere outside.
        if !next.server.adopt(&table[..cut]) {
            assert_eq!(next.server.node_count(), 1);
        }
    }
    assert!(Client::read_only(root.path()).server.adopt(&table));
}

/// Guards that a template whose guest has cached something of the host is not used once that has changed.
#[test]
fn a_change_of_what_was_seen_is_noticed() {
    let root = directory();
    fs::create_dir(root.path().join("seen")).unwrap();
    fs::write(root.path().join("seen/file"), "one").unwrap();
    fs::write(root.path().join("unseen"), "one").unwrap();
    let client = Client::read_only(root.path());
    client.walk("seen/file").unwrap();
    let table = client.server.save(true);
    let current = || is_current(&table, root.path(), FUTURE);
    assert!(current());
    assert!(!is_current(&table, root.path(), 0), "what changed after it was served is not as it was");
    fs::write(root.path().join("unseen"), "two").unwrap();
    assert!(current());
    fs::write(root.path().join("seen/other"), "").unwrap();
    assert!(!current(), "a new name in a directory that was seen");
    let table = client.server.save(true);
    let current = || is_current(&table, root.path(), FUTURE);
    assert!(current());
    fs::write(root.path().join("seen/file"), "two").unwrap();
    assert!(!current(), "another content");
    assert!(!is_current(b"nonsense", root.path(), FUTURE));
}
