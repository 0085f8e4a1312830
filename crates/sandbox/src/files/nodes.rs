//! Node ids: what the guest's kernel calls a file, and where the file is found.
//!
//! A node knows its parent and its name, never a path or a descriptor, so that renaming a directory is one
//! change and a fork can take the table over. A node lives as long as the guest counts lookups of it or has
//! nodes below it. A node whose name now belongs to something else is *detached*: it keeps its id until the
//! guest forgets it, but leads nowhere.
//!
//! INVARIANT: a child's `parent` names a node whose `children` name the child. The table's size is bounded.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::Stat;
use rustix::io::Errno;

use super::abi::{MAX_NAME, MAX_PATH, ROOT};
use super::table::SavedNode;

/// Most nodes of one server. A guest's kernel spends over a KiB of its own memory on each.
const LIMIT: usize = 1 << 20;

/// What a node was when it was looked up: a file that replaced it is another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    pub(super) fn of(stat: &Stat) -> Self {
        Self { device: stat.st_dev, inode: stat.st_ino }
    }
}

#[derive(Debug)]
struct Node {
    /// `None` for the root and for detached nodes.
    parent: Option<u64>,
    name: Arc<[u8]>,
    children: BTreeMap<Arc<[u8]>, u64>,
    lookups: u64,
    identity: Identity,
}

#[derive(Debug)]
struct Table {
    nodes: HashMap<u64, Node>,
    next: u64,
    limit: usize,
}

/// The table of one server.
#[derive(Debug)]
pub(super) struct Nodes(Mutex<Table>);

impl Nodes {
    /// A table that holds the root only.
    pub(super) fn new(root: Identity) -> Self {
        Self::with_limit(root, LIMIT)
    }

    fn with_limit(root: Identity, limit: usize) -> Self {
        let node =
            Node { parent: None, name: Arc::from([]), children: BTreeMap::new(), lookups: 1, identity: root };
        Self(Mutex::new(Table { nodes: HashMap::from([(ROOT, node)]), next: ROOT + 1, limit }))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of nodes, the root included.
    pub(super) fn len(&self) -> usize {
        self.table().nodes.len()
    }

    /// Forgets all nodes but the root.
    pub(super) fn clear(&self) {
        let mut table = self.table();
        table.nodes.retain(|&id, _| id == ROOT);
        if let Some(root) = table.nodes.get_mut(&ROOT) {
            root.children.clear();
        }
    }

    /// The node's path from the root (empty for the root) and its identity.
    ///
    /// `ESTALE` for unknown and detached nodes, `ENAMETOOLONG` where the path passes `PATH_MAX`.
    pub(super) fn path(&self, id: u64) -> Result<(Vec<u8>, Identity), Errno> {
        let table = self.table();
        let node = table.nodes.get(&id).ok_or(Errno::STALE)?;
        let identity = node.identity;
        let mut names = Vec::new();
        let (mut at, mut cursor, mut length) = (id, node, 0);
        while at != ROOT {
            length += cursor.name.len() + 1;
            if length > MAX_PATH {
                return Err(Errno::NAMETOOLONG);
            }
            names.push(&*cursor.name);
            at = cursor.parent.ok_or(Errno::STALE)?;
            cursor = table.nodes.get(&at).ok_or(Errno::STALE)?;
        }
        names.reverse();
        Ok((names.join(&b'/'), identity))
    }

    /// The node of the directory that `path` (not empty) lies in, and that of `path` itself, as far as the guest
    /// knows them.
    pub(super) fn known(&self, path: &[u8]) -> Option<(u64, Option<u64>)> {
        let table = self.table();
        let mut names = path.split(|&byte| byte == b'/');
        let last = names.next_back()?;
        let parent = names.try_fold(ROOT, |at, name| table.nodes.get(&at)?.children.get(name).copied())?;
        Some((parent, table.nodes.get(&parent)?.children.get(last).copied()))
    }

    /// Counts a lookup of `name` in `parent` and returns its node, a new one where there was none or where
    /// the name now belongs to another file.
    pub(super) fn enter(&self, parent: u64, name: &[u8], identity: Identity) -> Result<u64, Errno> {
        let mut table = self.table();
        let known = table.nodes.get(&parent).ok_or(Errno::STALE)?.children.get(name).copied();
        if let Some(id) = known {
            if let Some(node) = table.nodes.get_mut(&id).filter(|node| node.identity == identity) {
                node.lookups = node.lookups.saturating_add(1);
                return Ok(id);
            }
            table.unlink(parent, name);
        }
        table.insert(parent, name, identity)
    }

    /// Takes back `count` lookups; the node goes when none is left and nothing lies below it.
    pub(super) fn forget(&self, id: u64, count: u64) {
        let mut table = self.table();
        if let Some(node) = table.nodes.get_mut(&id).filter(|_| id != ROOT) {
            node.lookups = node.lookups.saturating_sub(count);
            table.sweep(id);
        }
    }

    /// All nodes, parents or not before their children, and the next one's id.
    pub(super) fn save(&self) -> (Vec<SavedNode>, u64) {
        let table = self.table();
        let saved = table.nodes.iter().map(|(&id, node)| SavedNode {
            id,
            parent: node.parent,
            name: serde_bytes::ByteBuf::from(&*node.name),
            lookups: node.lookups,
            identity: node.identity,
            version: None,
        });
        (saved.collect(), table.next)
    }

    /// Takes over what [`Self::save`] gave, in place of all there is; the root stays this server's. False, and nothing is
    /// taken over, where the nodes make no tree.
    pub(super) fn adopt(&self, saved: Vec<SavedNode>, next: u64) -> bool {
        let mut table = self.table();
        let Some(root) = table.nodes.get(&ROOT).map(|root| root.identity) else { return false };
        if saved.len() > table.limit {
            return false;
        }
        let mut nodes: HashMap<u64, Node> = HashMap::with_capacity(saved.len());
        let mut places = Vec::new();
        for node in saved {
            let name: Arc<[u8]> = Arc::from(node.name.as_slice());
            places.extend(node.parent.map(|parent| (node.id, parent, Arc::clone(&name))));
            let (id, lookups) = (node.id, node.lookups);
            let identity = if id == ROOT { root } else { node.identity };
            let good = id < next && (id == ROOT && node.parent.is_none() || is_name(&name));
            let node = Node { parent: node.parent, name, children: BTreeMap::new(), lookups, identity };
            if !good || nodes.insert(id, node).is_some() {
                return false;
            }
        }
        for (id, parent, name) in places {
            // A tree: each has one parent, which is there, and no way up leads back.
            let Some(above) = nodes.get_mut(&parent) else { return false };
            if above.children.insert(name, id).is_some() {
                return false;
            }
        }
        let adopted = Table { nodes, next, limit: table.limit };
        if !adopted.nodes.contains_key(&ROOT) || !adopted.is_forest() {
            return false;
        }
        *table = adopted;
        true
    }

    /// Detaches the node called `name` in `parent`: the file has gone.
    pub(super) fn detach(&self, parent: u64, name: &[u8]) {
        self.table().unlink(parent, name);
    }

    /// Detaches a node whose name belongs to another file by now.
    pub(super) fn detach_node(&self, id: u64) {
        let mut table = self.table();
        if let Some((parent, name)) = table.place(id) {
            table.unlink(parent, &name);
        }
    }

    /// Moves a node, as the host has just moved its file.
    pub(super) fn rename(&self, from: (u64, &[u8]), to: (u64, &[u8])) {
        let mut table = self.table();
        if from == to {
            return;
        }
        let moved = table.pull(from);
        table.unlink(to.0, to.1);
        if let Some(id) = moved {
            table.push(id, to);
        }
    }

    /// Exchanges two nodes.
    pub(super) fn exchange(&self, left: (u64, &[u8]), right: (u64, &[u8])) {
        let mut table = self.table();
        let (from_left, from_right) = (table.pull(left), table.pull(right));
        for (id, place) in [(from_left, right), (from_right, left)] {
            if let Some(id) = id {
                table.push(id, place);
            }
        }
    }
}

/// Whether it can be the name of a file in a directory.
fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name != b"."
        && name != b".."
        && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

impl Table {
    fn insert(&mut self, parent: u64, name: &[u8], identity: Identity) -> Result<u64, Errno> {
        if self.nodes.len() >= self.limit {
            return Err(Errno::NOMEM);
        }
        let id = self.next;
        self.next = self.next.checked_add(1).ok_or(Errno::NOMEM)?;
        let name: Arc<[u8]> = Arc::from(name);
        // `unlink` may have swept the parent together with its last child.
        let above = self.nodes.get_mut(&parent).ok_or(Errno::STALE)?;
        above.children.insert(Arc::clone(&name), id);
        let node = Node { parent: Some(parent), name, children: BTreeMap::new(), lookups: 1, identity };
        self.nodes.insert(id, node);
        Ok(id)
    }

    fn place(&self, id: u64) -> Option<(u64, Arc<[u8]>)> {
        let node = self.nodes.get(&id)?;
        Some((node.parent?, Arc::clone(&node.name)))
    }

    /// Removes a node from its place and keeps it, for [`Self::push`].
    fn pull(&mut self, (parent, name): (u64, &[u8])) -> Option<u64> {
        let id = self.nodes.get_mut(&parent)?.children.remove(name)?;
        self.nodes.get_mut(&id)?.parent = None;
        Some(id)
    }

    /// Puts a pulled node where it now belongs; one that cannot stand there stays detached.
    fn push(&mut self, id: u64, (parent, name): (u64, &[u8])) {
        if self.nodes.contains_key(&parent) && !self.is_below(parent, id) {
            let name: Arc<[u8]> = Arc::from(name);
            if let Some(above) = self.nodes.get_mut(&parent) {
                above.children.insert(Arc::clone(&name), id);
            }
            if let Some(node) = self.nodes.get_mut(&id) {
                node.parent = Some(parent);
                node.name = name;
            }
        } else {
            self.sweep(id);
        }
    }

    /// Whether every way up ends.
    fn is_forest(&self) -> bool {
        let mut ends = std::collections::HashSet::new();
        self.nodes.keys().all(|&id| {
            let (mut at, mut way) = (id, Vec::new());
            while !ends.contains(&at) {
                if way.len() > self.nodes.len() {
                    return false;
                }
                way.push(at);
                match self.nodes.get(&at).and_then(|node| node.parent) {
                    Some(parent) => at = parent,
                    None => break,
                }
            }
            ends.extend(way);
            true
        })
    }

    /// Whether `id` is `ancestor` or lies below it.
    fn is_below(&self, mut id: u64, ancestor: u64) -> bool {
        loop {
            if id == ancestor {
                return true;
            }
            match self.nodes.get(&id).and_then(|node| node.parent) {
                Some(parent) => id = parent,
                None => return false,
            }
        }
    }

    fn unlink(&mut self, parent: u64, name: &[u8]) {
        if let Some(id) = self.pull((parent, name)) {
            self.sweep(id);
            self.sweep(parent);
        }
    }

    /// Removes a node that nobody needs, and then its parent if that was kept for the node's sake.
    fn sweep(&mut self, mut id: u64) {
        while id != ROOT {
            match self.nodes.get(&id) {
                Some(node) if node.lookups == 0 && node.children.is_empty() => {}
                _ => return,
            }
            let Some(node) = self.nodes.remove(&id) else { return };
            let Some(parent) = node.parent else { return };
            if let Some(above) = self.nodes.get_mut(&parent) {
                above.children.remove(&node.name);
            }
            id = parent;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(inode: u64) -> Identity {
        Identity { device: 1, inode }
    }

    #[test]
    fn nodes_follow_renames_and_go_when_forgotten() {
        let nodes = Nodes::new(identity(1));
        let directory = nodes.enter(ROOT, b"a", identity(2)).unwrap();
        let file = nodes.enter(directory, b"b", identity(3)).unwrap();
        assert_eq!(nodes.enter(directory, b"b", identity(3)), Ok(file));
        nodes.rename((ROOT, b"a"), (ROOT, b"c"));
        assert_eq!(nodes.path(file).unwrap().0, b"c/b");
        nodes.forget(directory, u64::MAX);
        assert_eq!(nodes.path(file).unwrap().0, b"c/b", "a parent outlives its own lookups");
        nodes.forget(file, 1);
        assert_eq!(nodes.len(), 3);
        nodes.forget(file, 1);
        assert_eq!(nodes.len(), 1);
    }

    #[test]
    fn a_replaced_file_is_another_node() {
        let nodes = Nodes::new(identity(1));
        let old = nodes.enter(ROOT, b"a", identity(2)).unwrap();
        let new = nodes.enter(ROOT, b"a", identity(3)).unwrap();
        assert_ne!(old, new);
        assert_eq!(nodes.path(old), Err(Errno::STALE));
        nodes.forget(old, 1);
        nodes.forget(new, 1);
        nodes.forget(ROOT, 5);
        assert_eq!(nodes.len(), 1);
    }

    #[test]
    fn a_node_never_becomes_its_own_ancestor() {
        let nodes = Nodes::new(identity(1));
        let outer = nodes.enter(ROOT, b"a", identity(2)).unwrap();
        let inner = nodes.enter(outer, b"b", identity(3)).unwrap();
        nodes.rename((ROOT, b"a"), (inner, b"c"));
        assert_eq!(nodes.path(inner), Err(Errno::STALE));
        nodes.forget(inner, 1);
        nodes.forget(outer, 1);
        assert_eq!(nodes.len(), 1);
    }

    #[test]
    fn another_table_takes_the_nodes_over() {
        let nodes = Nodes::new(identity(1));
        let directory = nodes.enter(ROOT, b"a", identity(2)).unwrap();
        let file = nodes.enter(directory, b"b", identity(3)).unwrap();
        let gone = nodes.enter(ROOT, b"gone", identity(4)).unwrap();
        nodes.detach(ROOT, b"gone");
        let (saved, next) = nodes.save();
        let other = Nodes::new(identity(9));
        assert!(other.adopt(saved, next));
        assert_eq!(other.path(file), Ok((b"a/b".to_vec(), identity(3))));
        assert_eq!(other.path(ROOT), Ok((Vec::new(), identity(9))));
        assert_eq!(other.path(gone), Err(Errno::STALE));
        assert!(other.enter(ROOT, b"new", identity(5)).unwrap() > gone);
        other.forget(file, 1);
        other.forget(directory, 1);
        other.forget(gone, 1);
        assert_eq!(other.len(), 2);
    }

    #[test]
    fn a_table_that_is_no_tree_is_refused() {
        let nodes = Nodes::new(identity(1));
        nodes.enter(ROOT, b"a", identity(2)).unwrap();
        let damaged: [fn(&mut Vec<SavedNode>); 5] = [
            |saved| saved.iter_mut().for_each(|node| node.name = serde_bytes::ByteBuf::from("..")),
            |saved| saved.retain(|node| node.id != ROOT),
            |saved| saved.iter_mut().for_each(|node| node.parent = Some(node.id)),
            |saved| saved.iter_mut().filter(|node| node.id != ROOT).for_each(|node| node.parent = Some(77)),
            |saved| saved.iter_mut().for_each(|node| node.id = 5),
        ];
        for damage in damaged {
            let (mut saved, next) = nodes.save();
            damage(&mut saved);
            assert!(!nodes.adopt(saved, next));
        }
        assert_eq!(nodes.len(), 2);
    }

    #[test]
    fn the_table_is_bounded() {
        let nodes = Nodes::with_limit(identity(1), 3);
        nodes.enter(ROOT, b"a", identity(2)).unwrap();
        nodes.enter(ROOT, b"b", identity(3)).unwrap();
        assert_eq!(nodes.enter(ROOT, b"c", identity(4)), Err(Errno::NOMEM));
    }
}
