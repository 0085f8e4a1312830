//! Random trees, random guests, random hosts, against a model that fits on a page.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use agentkernel_sandbox::workspace::{UpperEntry, apply};
use proptest::prelude::*;

use crate::project::*;

/// One act of a guest or of the host's user on a tree.
#[derive(Clone, Debug)]
enum Act {
    Write(PathBuf, u8, u32),
    Link(PathBuf, u8),
    Directory(PathBuf),
    Remove(PathBuf),
}

fn some_path() -> impl Strategy<Value = PathBuf> {
    prop::collection::vec("[abc]", 1..4).prop_map(|names| names.into_iter().collect())
}

fn act() -> impl Strategy<Value = Act> {
    let mode = prop_oneof![Just(0o644_u32), Just(0o755), Just(0o600)];
    prop_oneof![
        3 => (some_path(), 0..6_u8, mode).prop_map(|(path, content, mode)| Act::Write(path, content, mode)),
        1 => (some_path(), 0..3_u8).prop_map(|(path, target)| Act::Link(path, target)),
        1 => some_path().prop_map(Act::Directory),
        2 => some_path().prop_map(Act::Remove),
    ]
}

fn remove(tree: &mut Nodes, path: &Path) {
    tree.retain(|other, _| !other.starts_with(path));
}

/// Does the act as a shell would with `mkdir -p` and `rm -rf`.
fn perform(tree: &mut Nodes, act: &Act) {
    let (path, node) = match act {
        Act::Write(path, content, mode) => (path, Some(Node::File(vec![*content; 9], *mode))),
        Act::Link(path, target) => (path, Some(Node::Link(["a", "c", "no"][usize::from(*target)].into()))),
        Act::Directory(path) => (path, Some(Node::Directory(0o755))),
        Act::Remove(path) => (path, None),
    };
    let Some(node) = node else { return remove(tree, path) };
    let above: Vec<&Path> = path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty()).collect();
    for above in above.into_iter().rev() {
        if !matches!(tree.get(above), Some(Node::Directory(_))) {
            remove(tree, above);
            tree.insert(above.into(), Node::Directory(0o755));
        }
    }
    if !(matches!(node, Node::Directory(_)) && matches!(tree.get(path), Some(Node::Directory(_)))) {
        remove(tree, path);
        tree.insert(path.clone(), node);
    }
}

/// The upper layer an overlay would hold, with copies of some unchanged files.
fn upper(host: &Nodes, guest: &Nodes, copies: &BTreeSet<usize>) -> Vec<Sent> {
    let directory = |tree: &Nodes, path: &Path| matches!(tree.get(path), Some(Node::Directory(_)));
    let mut sent: Vec<Sent> = Vec::new();
    for (index, (path, node)) in guest.iter().enumerate() {
        let name = path.to_str().unwrap();
        let same = host.get(path) == Some(node);
        match node {
            Node::Directory(mode) => {
                // A directory made in place of anything but a directory is opaque.
                let opaque = host.contains_key(path) && !directory(host, path);
                if !same
                    || guest.keys().chain(host.keys()).any(|other| {
                        other != path && other.starts_with(path) && host.get(other) != guest.get(other)
                    })
                {
                    sent.push((name.into(), UpperEntry::Directory { mode: *mode, opaque }, Vec::new()));
                }
            }
            _ if same && !copies.contains(&index) => {}
            Node::File(content, mode) => sent.push(file_with(name, content, *mode)),
            Node::Link(target) => sent.push(link(name, target.to_str().unwrap())),
        }
    }
    for path in host.keys().filter(|path| !guest.contains_key(*path)) {
        let parent = path.parent().unwrap();
        if parent.as_os_str().is_empty() || directory(guest, parent) && directory(host, parent) {
            sent.push(removed(path.to_str().unwrap()));
        }
    }
    sent
}

fn grown(acts: &[Act]) -> Nodes {
    let mut tree = Nodes::new();
    acts.iter().for_each(|act| perform(&mut tree, act));
    tree
}

/// What the acts do, done for real: only what differs is touched, the rest keeps its version.
fn rebuild(project: &Project, from: &Nodes, to: &Nodes) {
    for (path, node) in from.iter().rev().filter(|(path, node)| to.get(*path) != Some(*node)) {
        match node {
            Node::Directory(_) if matches!(to.get(path), Some(Node::Directory(_))) => {}
            Node::Directory(_) => std::fs::remove_dir(project.path(path)).unwrap(),
            _ => std::fs::remove_file(project.path(path)).unwrap(),
        }
    }
    let new: Nodes = to
        .iter()
        .filter(|(path, node)| from.get(*path) != Some(node))
        .map(|(p, n)| (p.clone(), n.clone()))
        .collect();
    project.build(&new);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn applying_gives_the_guests_tree(
        start in prop::collection::vec(act(), 0..12), changes in prop::collection::vec(act(), 0..12),
        copies in prop::collection::btree_set(0..12_usize, 0..6), cut in any::<prop::sample::Index>(),
    ) {
        let project = Project::new();
        let host = grown(&start);
        project.build(&host);
        project.serve();
        let mut guest = host.clone();
        changes.iter().for_each(|act| perform(&mut guest, act));
        let sent = upper(&host, &guest, &copies);
        let mut set = project.record(&sent);
        prop_assert_eq!(set.is_empty(), host == guest);
        // First a part, as after a crash or by choice, then all.
        if !set.is_empty() {
            let part = set.entries()[cut.index(set.entries().len())].path.as_path().to_owned();
            let options = agentkernel_sandbox::workspace::ApplyOptions { paths: vec![part], ..take_all() };
            apply(&mut set, &options).unwrap();
        }
        let report = apply(&mut set, &take_all()).unwrap();
        prop_assert!(report.is_complete(), "{:?}", report);
        prop_assert_eq!(project.nodes(), guest);
        prop_assert!(set.is_empty());
        prop_assert!(project.try_record("again", &sent).unwrap().is_empty());
    }

    #[test]
    fn what_the_host_did_meanwhile_is_never_lost(
        start in prop::collection::vec(act(), 0..12), changes in prop::collection::vec(act(), 0..12),
        meanwhile in prop::collection::vec(act(), 0..6),
    ) {
        let project = Project::new();
        let host = grown(&start);
        project.build(&host);
        project.serve();
        let (mut guest, mut now) = (host.clone(), host.clone());
        changes.iter().for_each(|act| perform(&mut guest, act));
        meanwhile.iter().for_each(|act| perform(&mut now, act));
        let mut set = project.record(&upper(&host, &guest, &BTreeSet::new()));
        rebuild(&project, &host, &now);
        let dry = agentkernel_sandbox::workspace::ApplyOptions { dry_run: true, ..take_all() };
        let dry = apply(&mut set, &dry).unwrap();
        prop_assert_eq!(project.nodes(), now.clone());
        let report = apply(&mut set, &take_all()).unwrap();
        let after = project.nodes();
        prop_assert!(report.failed.is_empty() && report.not_applied.is_empty(), "{:?}", report);
        prop_assert_eq!(&dry.conflicts, &report.conflicts);
        for (path, node) in &now {
            let hosts_own = host.get(path) != Some(node);
            if hosts_own && !matches!(node, Node::Directory(_)) {
                prop_assert_eq!(after.get(path), Some(node), "lost {:?}", path);
            }
        }
        for applied in &report.applied {
            let path = applied.path.as_path();
            let same = after.get(path) == guest.get(path)
                || matches!((after.get(path), guest.get(path)), (Some(Node::Directory(_)), Some(Node::Directory(_))));
            prop_assert!(same, "{:?}: {:?}", path, after.get(path));
        }
        // Every other path is as the host had it.
        for path in now.keys().chain(after.keys()) {
            let touched = report.applied.iter().any(|applied| applied.path.as_path() == path);
            prop_assert!(touched || now.get(path) == after.get(path), "{:?} changed unasked", path);
        }
        project.assert_tidy();
    }
}
