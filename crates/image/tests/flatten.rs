//! Random layers, flattened, read back by an independent EROFS reader and compared with a model of the rules.
//!
//! The model works in the specification's two steps (first a layer's whiteouts, then its entries); the code under test
//! takes entries as they stream by, markers shuffled among them.

mod common;

use std::collections::BTreeMap;
use std::io::Read;

use common::{Fixture, pax, tar};
use erofs_rs::EroFS;
use erofs_rs::backend::SliceImage;
use proptest::prelude::*;

/// What a test can see of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    kind: Kind,
    mode: u32,
    user: u32,
    mtime: (i64, u32),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Tells hard links from copies; not compared itself.
    identity: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    File(Vec<u8>),
    Directory,
    Symlink(Vec<u8>),
    Device(u32, u32),
    Fifo,
}

#[derive(Debug, Clone)]
enum Action {
    Put {
        path: String,
        what: u8,
        mode: u32,
        user: u32,
        mtime: (i64, u32),
        size: usize,
        xattr: Option<Vec<u8>>,
    },
    HardLink {
        path: String,
        target: usize,
    },
    Whiteout {
        path: String,
    },
    Opaque {
        path: String,
    },
}

type Tree = BTreeMap<String, Node>;

fn path() -> impl Strategy<Value = String> {
    // Names around `.` and `..` in sort order, one that fills directory blocks, and some that collide often.
    let name = prop_oneof![
        4 => "[abc]",
        1 => prop_oneof![Just("!".to_owned()), Just(".-".to_owned()), Just("...".to_owned()), Just("é".to_owned())],
        1 => (0..60_u32).prop_map(|number| format!("{number:0>200}")),
    ];
    prop::collection::vec(name, 1..4).prop_map(|parts| parts.join("/"))
}

fn action() -> impl Strategy<Value = Action> {
    let size = prop_oneof![
        Just(0),
        1..300_usize,
        2000..2100_usize,
        4000..4200_usize,
        Just(8192),
        9000..70_000_usize
    ];
    let mtime = (-5_000_000_000_i64..5_000_000_000, 0..1_000_000_000_u32);
    let xattr = prop::option::weighted(0.3, prop::collection::vec(any::<u8>(), 0..3000));
    let put = (path(), 0..8_u8, 0..0o10000_u32, any::<u32>(), mtime, size, xattr).prop_map(
        |(path, what, mode, user, mtime, size, xattr)| Action::Put {
            path,
            what,
            mode,
            user,
            mtime,
            size,
            xattr,
        },
    );
    prop_oneof![
        10 => put,
        2 => (path(), any::<usize>()).prop_map(|(path, target)| Action::HardLink { path, target }),
        2 => path().prop_map(|path| Action::Whiteout { path }),
        1 => path().prop_map(|path| Action::Opaque { path }),
    ]
}

fn implicit() -> Node {
    Node { kind: Kind::Directory, mode: 0o755, user: 0, mtime: (0, 0), xattrs: BTreeMap::new(), identity: 0 }
}

fn remove(tree: &mut Tree, path: &str, itself: bool) {
    let below = format!("{path}/");
    tree.retain(|name, _| !(name.starts_with(&below) || itself && name == path));
}

fn put(tree: &mut Tree, path: &str, node: Node) {
    for (end, _) in path.match_indices('/') {
        let parent = &path[..end];
        if tree.get(parent).is_none_or(|node| node.kind != Kind::Directory) {
            tree.insert(parent.into(), implicit());
        }
    }
    if node.kind != Kind::Directory {
        remove(tree, path, true);
    }
    tree.insert(path.into(), node);
}

/// Applies a layer to the model and writes it as a tar.
fn layer(tree: &mut Tree, actions: &[Action], identity: &mut usize) -> Vec<u8> {
    for action in actions {
        match action {
            Action::Whiteout { path } => remove(tree, path, true),
            Action::Opaque { path } if tree.get(path).is_some_and(|node| node.kind == Kind::Directory) => {
                remove(tree, path, false);
            }
            _ => {}
        }
    }
    let mut entries = Vec::new();
    let mut files: Vec<String> = Vec::new();
    for action in actions {
        match action {
            Action::Whiteout { path } => {
                let (parent, name) =
                    path.rsplit_once('/').map_or(("", path.as_str()), |(parent, name)| (parent, name));
                entries.push(named(b'0', &format!("{parent}/.wh.{name}"), "", &[], &implicit()));
            }
            Action::Opaque { path } => {
                entries.push(named(b'0', &format!("{path}/.wh..wh..opq"), "", &[], &implicit()));
            }
            Action::HardLink { path, target } => {
                // Only what this layer made and still holds: what else a link may mean is not the model's business.
                files.retain(|name| tree.get(name).is_some_and(|node| matches!(node.kind, Kind::File(_))));
                let Some(target) = files.get(target % files.len().max(1)).cloned() else { continue };
                if target == *path
                    || target.starts_with(&format!("{path}/"))
                    || path.starts_with(&format!("{target}/"))
                {
                    continue;
                }
                let node = tree[&target].clone();
                entries.push(named(b'1', path, &target, &[], &node));
                put(tree, path, node);
            }
            Action::Put { path, what, mode, user, mtime, size, xattr } => {
                *identity += 1;
                let data: Vec<u8> = (0..*size).map(|index| (index * 31 + *identity) as u8).collect();
                // Symbolic links are never anybody's parent here: their names are their own.
                let path = if *what == 5 { format!("{path}-link") } else { path.clone() };
                let (flag, kind) = match what {
                    0..=2 => (b'0', Kind::File(data)),
                    3 | 4 => (b'5', Kind::Directory),
                    5 => (b'2', Kind::Symlink(vec![b't'; size % 4095 + 1])),
                    6 => (b'3', Kind::Device(user % 4096, user % (1 << 20))),
                    _ => (b'6', Kind::Fifo),
                };
                let xattrs = xattr.iter().map(|value| (b"user.test".to_vec(), value.clone())).collect();
                let node =
                    Node { kind, mode: *mode, user: *user, mtime: *mtime, xattrs, identity: *identity };
                let (link, content) = match &node.kind {
                    Kind::File(data) => (Vec::new(), data.as_slice()),
                    Kind::Symlink(target) => (target.clone(), &[][..]),
                    _ => (Vec::new(), &[][..]),
                };
                entries.push(named(flag, &path, std::str::from_utf8(&link).unwrap(), content, &node));
                files.push(path.clone());
                put(tree, &path, node);
            }
        }
    }
    tar(&entries)
}

/// An entry: names, times, owners and attributes in a PAX header, the rest in its own.
fn named(flag: u8, name: &str, link: &str, data: &[u8], node: &Node) -> Vec<u8> {
    let time = match node.mtime {
        (whole, 0) => format!("{whole}"),
        (whole, nanoseconds) if whole < 0 => {
            format!("-{}.{:09}", -(whole + 1), 1_000_000_000 - nanoseconds)
        }
        (whole, nanoseconds) => format!("{whole}.{nanoseconds:09}"),
    };
    let user = node.user.to_string();
    let keys: Vec<_> = node
        .xattrs
        .iter()
        .map(|(key, value)| (format!("SCHILY.xattr.{}", String::from_utf8_lossy(key)), value))
        .collect();
    let mut records: Vec<(&str, &[u8])> = vec![("path", name.as_bytes()), ("mtime", time.as_bytes())];
    records.extend([("uid", user.as_bytes()), ("gid", user.as_bytes())]);
    if !link.is_empty() {
        records.push(("linkpath", link.as_bytes()));
    }
    records.extend(keys.iter().map(|(key, value)| (key.as_str(), value.as_slice())));
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::new(flag));
    header.set_size(data.len() as u64);
    header.set_mode(node.mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    if let Kind::Device(major, minor) = node.kind {
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
    }
    header.set_cksum();
    let mut bytes = pax(&records);
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// The image as another implementation reads it, each node with its inode's number as identity, and link counts.
fn read_back(bytes: &[u8]) -> (Tree, BTreeMap<String, u32>) {
    use std::os::unix::fs::PermissionsExt;
    let system = EroFS::new(SliceImage::new(bytes)).unwrap();
    let mut tree = Tree::new();
    let mut links = BTreeMap::new();
    for entry in system.walk_dir("/").unwrap() {
        let entry = entry.unwrap();
        let inode = entry.inode;
        let kind = if inode.is_dir() {
            Kind::Directory
        } else if inode.is_symlink() {
            Kind::Symlink(system.read_link_inode(inode).unwrap().as_bytes().to_vec())
        } else if inode.is_file() {
            let mut content = Vec::new();
            system.open_inode_file(inode).unwrap().read_to_end(&mut content).unwrap();
            Kind::File(content)
        } else if let Some((major, minor)) = inode.device() {
            Kind::Device(major, minor)
        } else {
            Kind::Fifo
        };
        assert_eq!(inode.uid(), inode.gid());
        let path = entry.dir_entry.path();
        let path = String::from_utf8(path.as_bytes().to_vec()).unwrap().trim_start_matches('/').to_owned();
        let node = Node {
            kind,
            mode: inode.permissions().mode() & 0o7777,
            user: inode.uid(),
            mtime: inode.modified_unix(),
            xattrs: system.xattrs_inode(inode).unwrap(),
            identity: inode.id() as usize,
        };
        // By name as well, which bisects sorted blocks.
        assert!(system.xattrs(format!("/{path}").as_str()).is_ok(), "{path} is not found by name");
        links.insert(path.clone(), inode.nlink());
        tree.insert(path, node);
    }
    (tree, links)
}

fn without_identity(tree: &Tree) -> Tree {
    tree.iter().map(|(path, node)| (path.clone(), Node { identity: 0, ..node.clone() })).collect()
}

/// Names by the thing they name.
fn aliases(tree: &Tree) -> Vec<Vec<&str>> {
    let mut groups: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for (path, node) in tree.iter().filter(|(_, node)| node.kind != Kind::Directory) {
        groups.entry(node.identity).or_default().push(path);
    }
    let mut groups: Vec<_> = groups.into_values().collect();
    groups.sort();
    groups
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flattening_obeys_the_model(layers in prop::collection::vec(prop::collection::vec(action(), 0..40), 1..5)) {
        let mut model = Tree::new();
        let mut identity = 0;
        let tars: Vec<_> = layers.iter().map(|actions| layer(&mut model, actions, &mut identity)).collect();
        let fixture = Fixture::image(&tars);
        let image = fixture.prepare().unwrap();
        let (actual, links) = read_back(&std::fs::read(image.root_file_system).unwrap());
        prop_assert_eq!(without_identity(&actual), without_identity(&model));
        prop_assert_eq!(aliases(&actual), aliases(&model));
        for group in aliases(&model) {
            prop_assert_eq!(links[group[0]] as usize, group.len());
        }
    }
}
