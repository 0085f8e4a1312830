//! The file system in memory: names, links, attributes and where each file's data lies.
//!
//! The rules are those of overlayfs and containerd. A layer's entries are placed literally, each layer as if it were
//! unpacked alone and laid over the ones below: a parent that is not a directory in this layer's view is replaced by
//! one; only a symbolic link that this very layer made is followed, within the tree. Whiteouts hide lower layers and
//! never what their own layer holds, in whatever order the two come.

use std::collections::{BTreeMap, VecDeque};
use std::mem;

use crate::layer::LayerError;
use crate::layer::path::components;
use crate::layer::tar::Metadata;
use crate::limits::SYMLINK_HOPS;

/// An index into [`Tree::inodes`].
pub(crate) type InodeId = u32;

/// The root directory.
pub(crate) const ROOT: InodeId = 0;

const IMPLICIT_MODE: u16 = 0o755;
/// What an inode and its share of containers take in memory, roughly.
const INODE_BYTES: usize = 128;

/// Where a file's data lies in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Data {
    /// The first whole block.
    pub(crate) first_block: u32,
    /// Where the last, partial block waits to be put beside the inode; `None` if it has a block of its own.
    pub(crate) tail: Option<u64>,
}

/// What an inode is; `D` tells where a file's data lies.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Kind<D = Data> {
    File {
        size: u64,
        data: D,
    },
    /// An index into [`Tree::directories`].
    Directory(u32),
    Symlink(Box<[u8]>),
    CharacterDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// A file, directory or other object, apart from its names.
#[derive(Debug)]
pub(crate) struct Inode<D = Data> {
    pub(crate) kind: Kind<D>,
    pub(crate) mode: u16,
    pub(crate) user: u32,
    pub(crate) group: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nanoseconds: u32,
    /// Names of it; for a directory always 1 while it exists.
    pub(crate) links: u32,
    /// The layer that gave these attributes.
    layer: u32,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl<D> Inode<D> {
    /// As a directory is that no layer lists: mode 0755, of root, from 1970.
    fn new(kind: Kind<D>, layer: u32) -> Self {
        Self {
            kind,
            mode: IMPLICIT_MODE,
            user: 0,
            group: 0,
            mtime: 0,
            mtime_nanoseconds: 0,
            links: 0,
            layer,
            xattrs: BTreeMap::new(),
        }
    }
}

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    pub(crate) inode: InodeId,
    /// The last layer that named it or anything below it.
    layer: u32,
}

/// A directory's names, sorted by bytes.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    pub(crate) children: BTreeMap<Box<[u8]>, Link>,
    /// The layer that already cleared away everything from below it.
    cleared: u32,
}

/// A new object, as [`Tree::insert`] takes it.
#[derive(Debug)]
pub(crate) enum Object<D = Data> {
    File { size: u64, data: D },
    Directory,
    Symlink(Vec<u8>),
    CharacterDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}

/// Data that nothing refers to any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeadData<D = Data> {
    pub(crate) size: u64,
    pub(crate) data: D,
}

/// The file system so far.
#[derive(Debug)]
pub(crate) struct Tree<D = Data> {
    pub(crate) inodes: Vec<Inode<D>>,
    pub(crate) directories: Vec<Directory>,
    dead: Vec<DeadData<D>>,
    layer: u32,
    metadata_bytes: u64,
    metadata_limit: u64,
}

/// Whether a walk makes what is missing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Walk {
    Create,
    Find,
}

impl<D: Clone> Tree<D> {
    /// An empty root directory. `metadata_limit` bounds the bytes of names, targets and attributes.
    pub(crate) fn new(metadata_limit: u64) -> Self {
        Self {
            inodes: vec![Inode::new(Kind::Directory(0), 0)],
            directories: vec![Directory::default()],
            dead: Vec::new(),
            layer: 0,
            metadata_bytes: 0,
            metadata_limit,
        }
    }

    /// Starts the next layer.
    pub(crate) fn begin_layer(&mut self) {
        self.layer += 1;
    }

    /// Data that became unused since the last call.
    pub(crate) fn take_dead(&mut self) -> Vec<DeadData<D>> {
        mem::take(&mut self.dead)
    }

    /// Puts an object at `path`; `entry` names it in errors.
    pub(crate) fn insert(
        &mut self,
        path: &[&[u8]],
        object: Object<D>,
        metadata: Metadata,
    ) -> Result<(), LayerError> {
        let xattr_bytes: usize =
            metadata.xattrs.iter().map(|(name, value)| name.len() + value.len() + 64).sum();
        self.account(xattr_bytes)?;
        let Some((name, parents)) = path.split_last() else {
            return match object {
                Object::Directory => {
                    self.set_attributes(ROOT, metadata);
                    Ok(())
                }
                _ => Err(LayerError::invalid(b"/", "the root is not a directory")),
            };
        };
        let parent = self.make_parents(parents)?;
        if let (Object::Directory, Some(link)) = (&object, self.child(parent, name))
            && matches!(self.inodes[link.inode as usize].kind, Kind::Directory(_))
        {
            self.set_attributes(link.inode, metadata);
            self.touch(parent, name);
            return Ok(());
        }
        let kind = match object {
            Object::File { size, data } => Kind::File { size, data },
            Object::Directory => self.new_directory(),
            Object::Symlink(target) => {
                self.account(target.len())?;
                Kind::Symlink(target.into())
            }
            Object::CharacterDevice { major, minor } => Kind::CharacterDevice { major, minor },
            Object::BlockDevice { major, minor } => Kind::BlockDevice { major, minor },
            Object::Fifo => Kind::Fifo,
        };
        let inode = self.new_inode(kind)?;
        self.set_attributes(inode, metadata);
        self.link(parent, name, inode)
    }

    /// Gives an earlier file another name; `false` if there is no such file.
    pub(crate) fn hard_link(&mut self, path: &[&[u8]], target: &[&[u8]]) -> Result<bool, LayerError> {
        let (Some((name, parents)), Some((target_name, target_parents))) =
            (path.split_last(), target.split_last())
        else {
            return Ok(false);
        };
        let Some(directory) = self.walk(target_parents, Walk::Find)? else { return Ok(false) };
        let Some(link) = self.child(directory, target_name) else { return Ok(false) };
        let inode = link.inode;
        if matches!(self.inodes[inode as usize].kind, Kind::Directory(_)) {
            return Ok(false);
        }
        // Counted before the parents are made, which may remove the target's own name.
        self.inodes[inode as usize].links += 1;
        let parent = self.make_parents(parents)?;
        self.link(parent, name, inode)?;
        self.inodes[inode as usize].links -= 1;
        Ok(true)
    }

    /// Hides what lower layers hold at `path`.
    pub(crate) fn whiteout(&mut self, parents: &[&[u8]], name: &[u8]) -> Result<(), LayerError> {
        let Some(parent) = self.walk(parents, Walk::Find)? else { return Ok(()) };
        let Some(link) = self.child(parent, name) else { return Ok(()) };
        if link.layer < self.layer {
            self.children_mut(parent).remove(name);
            self.remove(link.inode);
        } else if matches!(self.inodes[link.inode as usize].kind, Kind::Directory(_)) {
            self.forget_lower_attributes(link.inode);
            self.clear_lower(link.inode);
        }
        Ok(())
    }

    /// Hides what lower layers hold in the directory `path`.
    pub(crate) fn opaque(&mut self, path: &[&[u8]]) -> Result<(), LayerError> {
        if let Some(directory) = self.walk(path, Walk::Find)? {
            self.clear_lower(directory);
        }
        Ok(())
    }

    /// The names in a directory; none if the inode is no directory.
    pub(crate) fn children(&self, inode: InodeId) -> Option<&BTreeMap<Box<[u8]>, Link>> {
        match self.inodes[inode as usize].kind {
            Kind::Directory(index) => Some(&self.directories[index as usize].children),
            _ => None,
        }
    }

    /// The directory that holds `parents`' last component, made if it is not there.
    fn make_parents(&mut self, parents: &[&[u8]]) -> Result<InodeId, LayerError> {
        // Creating, a walk always arrives or fails.
        Ok(self.walk(parents, Walk::Create)?.unwrap_or(ROOT))
    }

    fn walk(&mut self, path: &[&[u8]], mode: Walk) -> Result<Option<InodeId>, LayerError> {
        let mut trail = vec![ROOT];
        let mut pending: VecDeque<Box<[u8]>> = VecDeque::new();
        let mut rest = path.iter();
        let mut hops = 0;
        loop {
            let queued = pending.pop_front();
            let name: &[u8] = match &queued {
                Some(name) => name,
                None => match rest.next() {
                    Some(name) => name,
                    None => return Ok(trail.last().copied()),
                },
            };
            if name == b".." {
                if trail.len() > 1 {
                    trail.pop();
                }
                continue;
            }
            let here = trail.last().copied().unwrap_or(ROOT);
            match self.step(here, name, mode)? {
                Step::Into(inode) => trail.push(inode),
                Step::Missing => return Ok(None),
                Step::Follow(target) => {
                    hops += 1;
                    if hops > SYMLINK_HOPS {
                        let entry = path.join(&b'/').escape_ascii().to_string();
                        return Err(LayerError::SymlinkLoop { entry });
                    }
                    if target.starts_with(b"/") {
                        trail.truncate(1);
                    }
                    for part in target.split(|byte| *byte == b'/').rev() {
                        // A name that cannot exist is left to fail as any other missing one.
                        if !part.is_empty() && part != b"." && (part == b".." || components(part).is_ok()) {
                            pending.push_front(part.into());
                        }
                    }
                }
            }
        }
    }

    /// One component of a walk.
    fn step(&mut self, parent: InodeId, name: &[u8], mode: Walk) -> Result<Step, LayerError> {
        let layer = self.layer;
        if let Some(link) = self.child(parent, name) {
            match &self.inodes[link.inode as usize].kind {
                Kind::Directory(_) => {
                    if mode == Walk::Create {
                        self.touch(parent, name);
                    }
                    return Ok(Step::Into(link.inode));
                }
                Kind::Symlink(target) if link.layer == layer => return Ok(Step::Follow(target.clone())),
                _ => {}
            }
        }
        if mode == Walk::Find {
            return Ok(Step::Missing);
        }
        let inode = self.implicit_directory()?;
        self.link(parent, name, inode)?;
        Ok(Step::Into(inode))
    }

    fn child(&self, parent: InodeId, name: &[u8]) -> Option<Link> {
        self.children(parent)?.get(name).copied()
    }

    fn children_mut(&mut self, parent: InodeId) -> &mut BTreeMap<Box<[u8]>, Link> {
        // INVARIANT: parents come from `walk`, which arrives at directories only.
        let index = match self.inodes[parent as usize].kind {
            Kind::Directory(index) => index,
            _ => ROOT,
        };
        &mut self.directories[index as usize].children
    }

    fn touch(&mut self, parent: InodeId, name: &[u8]) {
        let layer = self.layer;
        if let Some(link) = self.children_mut(parent).get_mut(name) {
            link.layer = layer;
        }
    }

    /// Names an inode, in place of whatever had the name.
    fn link(&mut self, parent: InodeId, name: &[u8], inode: InodeId) -> Result<(), LayerError> {
        let layer = self.layer;
        self.account(name.len() + 48)?;
        self.inodes[inode as usize].links += 1;
        if let Some(old) = self.children_mut(parent).insert(name.into(), Link { inode, layer }) {
            self.remove(old.inode);
        }
        Ok(())
    }

    /// Takes one name away from an inode, and everything below it if it is a directory.
    fn remove(&mut self, inode: InodeId) {
        let mut doomed = vec![inode];
        while let Some(id) = doomed.pop() {
            let inode = &mut self.inodes[id as usize];
            inode.links = inode.links.saturating_sub(1);
            if inode.links > 0 {
                continue;
            }
            inode.xattrs = BTreeMap::new();
            match &mut inode.kind {
                Kind::File { size, data } => self.dead.push(DeadData { size: *size, data: data.clone() }),
                Kind::Directory(index) => {
                    let children = mem::take(&mut self.directories[*index as usize].children);
                    doomed.extend(children.into_values().map(|link| link.inode));
                }
                Kind::Symlink(target) => *target = Box::default(),
                _ => {}
            }
        }
    }

    /// Removes what lower layers put below a directory, and keeps what this layer did.
    fn clear_lower(&mut self, directory: InodeId) {
        let mut pending = vec![directory];
        while let Some(id) = pending.pop() {
            let Kind::Directory(index) = self.inodes[id as usize].kind else { continue };
            let directory = &mut self.directories[index as usize];
            // Once a layer: a layer that repeats a marker must not cost a walk each time.
            if mem::replace(&mut directory.cleared, self.layer) == self.layer {
                continue;
            }
            let layer = self.layer;
            let lower: Vec<_> = directory.children.extract_if(.., |_, link| link.layer < layer).collect();
            let kept: Vec<_> = directory.children.values().map(|link| link.inode).collect();
            for (_, link) in lower {
                self.remove(link.inode);
            }
            for inode in kept {
                if matches!(self.inodes[inode as usize].kind, Kind::Directory(_)) {
                    self.forget_lower_attributes(inode);
                    pending.push(inode);
                }
            }
        }
    }

    fn forget_lower_attributes(&mut self, inode: InodeId) {
        if self.inodes[inode as usize].layer < self.layer {
            self.set_attributes(inode, Metadata { mode: IMPLICIT_MODE, ..Metadata::default() });
        }
    }

    fn set_attributes(&mut self, inode: InodeId, metadata: Metadata) {
        let layer = self.layer;
        let inode = &mut self.inodes[inode as usize];
        inode.mode = metadata.mode;
        inode.user = metadata.user;
        inode.group = metadata.group;
        inode.mtime = metadata.mtime;
        inode.mtime_nanoseconds = metadata.mtime_nanoseconds;
        inode.xattrs = metadata.xattrs;
        inode.layer = layer;
    }

    fn implicit_directory(&mut self) -> Result<InodeId, LayerError> {
        let kind = self.new_directory();
        self.new_inode(kind)
    }

    fn new_directory(&mut self) -> Kind<D> {
        self.directories.push(Directory::default());
        Kind::Directory((self.directories.len() - 1) as u32)
    }

    fn new_inode(&mut self, kind: Kind<D>) -> Result<InodeId, LayerError> {
        self.account(INODE_BYTES)?;
        self.inodes.push(Inode::new(kind, self.layer));
        u32::try_from(self.inodes.len() - 1)
            .map_err(|_| LayerError::TooManyEntries { limit: u64::from(u32::MAX) })
    }

    /// Counts bytes kept in memory; what is removed again stays counted, so that churn is bounded too.
    fn account(&mut self, bytes: usize) -> Result<(), LayerError> {
        self.metadata_bytes += bytes as u64;
        if self.metadata_bytes > self.metadata_limit {
            return Err(LayerError::TooMuchMetadata { limit: self.metadata_limit });
        }
        Ok(())
    }
}

enum Step {
    Into(InodeId),
    Missing,
    Follow(Box<[u8]>),
}
