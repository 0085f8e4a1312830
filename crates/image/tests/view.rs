//! What a build sees of an image is what a machine would: the view against the model of the other tests' images.

mod common;

use agentkernel_image::{FileSystem, LayerItem, LayerWriter, Metadata, NodeKind, ResolveError, Store};
use common::{Fixture, file, pax, tar};
use std::collections::BTreeMap;

/// Path, kind, metadata and content of everything, links between names besides.
fn everything(system: &FileSystem) -> BTreeMap<Vec<u8>, (NodeKind, Metadata, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut pending = vec![(Vec::new(), system.root())];
    while let Some((path, node)) = pending.pop() {
        let mut content = Vec::new();
        loop {
            let mut buffer = [0; 700];
            match system.read_at(node, &mut buffer, content.len() as u64).unwrap() {
                0 => break,
                count => content.extend_from_slice(&buffer[..count]),
            }
        }
        for (name, child) in system.children(node) {
            pending.push(([&path[..], b"/", name].concat(), child));
        }
        all.insert(path, (system.kind(node), system.metadata(node), content));
    }
    all
}

fn entries() -> Vec<Vec<u8>> {
    let long = "d".repeat(120);
    vec![
        common::entry(b'5', b"etc/", b"", b""),
        file("etc/empty", b""),
        file("etc/small", b"small"),
        file("etc/big", &vec![7; 9000]),
        file("etc/tail", &vec![8; 4096 + 100]),
        pax(&[("SCHILY.xattr.security.capability", b"\x01\n\x00\xff"), ("mtime", b"12.5")]),
        file("etc/capable", b"x"),
        common::entry(b'2', b"bin", b"usr/bin", b""),
        common::entry(b'5', b"usr/bin/", b"", b""),
        common::entry(b'1', b"etc/other-name", b"etc/small", b""),
        common::entry(b'6', b"fifo", b"", b""),
        pax(&[("path", format!("etc/{long}/{long}").as_bytes())]),
        file("x", b"deep"),
    ]
}

#[test]
fn an_image_is_read_back_as_its_layers_were() {
    let layer = tar(&entries());
    let fixture = Fixture::image(&[layer]);
    let prepared = fixture.prepare().unwrap();
    let mut loaded = FileSystem::new();
    loaded.load(&prepared.root_file_system).unwrap();

    let store = Store::open(&fixture.directory.path().join("store")).unwrap();
    let writing = store.writing().unwrap();
    let (digest, _) = writing.copy(&tar(&entries())[..], None).unwrap();
    let mut laid = FileSystem::new();
    laid.add_layer(&store, &digest).unwrap();
    assert_eq!(everything(&loaded), everything(&laid));
    let node = |path: &[u8]| loaded.resolve(path, true).unwrap().node.unwrap();
    assert_eq!(node(b"etc/small"), node(b"etc/other-name"));
    assert_eq!(loaded.links(node(b"etc/small")), 2);

    // Another layer over either gives the same.
    let mut writer = LayerWriter::new(writing.blob().unwrap(), Some(100));
    let metadata = Metadata { mode: 0o4755, user: 3_000_000, mtime: 200, ..Metadata::default() };
    let items = [
        LayerItem::Whiteout { path: b"etc/big".into() },
        LayerItem::Node { path: b"usr/bin/new".into(), metadata, kind: NodeKind::File(3) },
    ];
    for item in &items {
        writer.item(item).unwrap();
    }
    writer.data(b"new").unwrap();
    let (upper, _) = writer.finish().unwrap().finish(None).unwrap();
    for system in [&mut loaded, &mut laid] {
        system.add_layer(&store, &upper).unwrap();
    }
    assert_eq!(everything(&loaded), everything(&laid));
    let new = loaded.resolve(b"/bin/new", true).unwrap();
    assert_eq!(new.path, b"usr/bin/new");
    let metadata = loaded.metadata(new.node.unwrap());
    assert_eq!((metadata.mode, metadata.user, metadata.mtime), (0o4755, 3_000_000, 100));
    assert_eq!(loaded.resolve(b"etc/big", true).unwrap().node, None);
}

#[test]
fn paths_are_followed_within_the_root() {
    let (directory, link) = (
        |name: &[u8]| common::entry(b'5', name, b"", b""),
        |name: &[u8], target: &[u8]| common::entry(b'2', name, target, b""),
    );
    let layer = tar(&[
        directory(b"a/b/"),
        link(b"absolute", b"/a"),
        link(b"a/up", b"../../../a/b"),
        link(b"loop", b"loop"),
        link(b"dangling", b"a/new/deep"),
        file("file", b"x"),
    ]);
    let fixture = Fixture::image(&[layer]);
    let mut system = FileSystem::new();
    system.load(&fixture.prepare().unwrap().root_file_system).unwrap();
    for (path, expected, is_there) in [
        ("absolute/b", "a/b", true),
        ("absolute/up", "a/b", true),
        ("/../..//./absolute/up/new", "a/b/new", false),
        ("dangling/er", "a/new/deep/er", false),
        ("nothing/../a", "a", true),
        ("", "", true),
        ("file", "file", true),
    ] {
        let resolved = system.resolve(path.as_bytes(), true).unwrap();
        let shown = (String::from_utf8(resolved.path).unwrap(), resolved.node.is_some());
        assert_eq!(shown, (expected.to_owned(), is_there), "{path}");
    }
    assert_eq!(system.resolve(b"absolute", false).unwrap().path, b"absolute");
    assert_eq!(system.resolve(b"loop/x", false), Err(ResolveError::SymlinkLoop));
    assert_eq!(system.resolve(b"file/x", false), Err(ResolveError::NotADirectory));
}
