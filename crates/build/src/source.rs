//! What `COPY` and `ADD` take: files of the context, of other stages and images, of archives and documents.
//!
//! A [`Selection`] is a list of files with their attributes and a way to their data; its digest is a function of content
//! alone: names, kinds, modes, owners, link targets, attributes and bytes, not times.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agentkernel_image::{Digest, FileSystem, LayerItem, LayerReader, Metadata, NodeId, NodeKind};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, openat2};
use sha2::{Digest as _, Sha256};

use crate::executor::Failure;
use crate::ignore::{IgnoreFile, Pattern};

/// Most files of one selection.
const FILES_LIMIT: usize = 2_000_000;
const BUFFER: usize = 256 << 10;

/// Where a file's data is.
#[derive(Debug, Clone)]
pub(crate) enum Data {
    /// In the context; what it was when it was looked at.
    Context { path: PathBuf, size: u64, changed: (i64, i64) },
    /// In a stage or image.
    Node(NodeId),
    /// Here.
    Bytes(Arc<[u8]>),
    /// In a file, from a place on.
    Section { file: Arc<File>, position: u64 },
    /// There is none.
    None,
}

/// One thing that is copied.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    /// Relative to what was named; empty for that itself.
    pub(crate) path: Vec<u8>,
    pub(crate) metadata: Metadata,
    pub(crate) kind: NodeKind,
    pub(crate) data: Data,
    /// The same number for names of the same file.
    pub(crate) link: Option<u64>,
}

/// What one source word stands for: one file, or a directory and all in it.
#[derive(Debug, Clone)]
pub(crate) struct Selection {
    /// Its last component: the name it has where it goes.
    pub(crate) name: Vec<u8>,
    /// Itself first, if it is not an unpacked archive.
    pub(crate) items: Vec<Item>,
    /// Its content goes to the destination, not it itself: an archive.
    pub(crate) unpacked: bool,
}

impl Selection {
    pub(crate) fn is_directory(&self) -> bool {
        self.unpacked || self.items.first().is_some_and(|item| item.kind == NodeKind::Directory)
    }
}

/// A tree to take from.
pub(crate) enum Tree<'a> {
    Context(&'a Context),
    FileSystem(&'a FileSystem),
}

/// A directory of the host, as the ignore file shows it. Nothing outside of it is ever read.
#[derive(Debug)]
pub struct Context {
    root: OwnedFd,
    path: PathBuf,
    ignore: IgnoreFile,
}

impl Context {
    /// The context in `path`.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: &Path, ignore: IgnoreFile) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty())?;
        Ok(Self { root, path: path.to_owned(), ignore })
    }

    fn open_beneath(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, rustix::io::Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        // Absolute links of the project mean the project, not this machine.
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    fn failed(&self, path: &Path, error: impl Into<io::Error>) -> Failure {
        let error = error.into();
        Failure::new(format!("cannot read {}: {error}", self.path.join(path).display()))
    }

    /// Names in a directory, sorted, those that are ignored left out.
    fn names(&self, directory: &Path) -> Result<Vec<Vec<u8>>, Failure> {
        let opened = self.open_beneath(directory, OFlags::RDONLY | OFlags::DIRECTORY);
        let opened = opened.map_err(|error| self.failed(directory, error))?;
        let mut names = Vec::new();
        for entry in Dir::read_from(&opened).map_err(|error| self.failed(directory, error))? {
            let entry = entry.map_err(|error| self.failed(directory, error))?;
            let name = entry.file_name().to_bytes().to_vec();
            if !matches!(name.as_slice(), b"." | b"..") {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Looks at one path, links at its end not followed. `None` for what no image holds.
    fn item(&self, path: &Path, relative: Vec<u8>) -> Result<Option<Item>, Failure> {
        let opened = self.open_beneath(path, OFlags::PATH | OFlags::NOFOLLOW);
        let opened = opened.map_err(|error| self.failed(path, error))?;
        let stat =
            rustix::fs::statat(&opened, "", AtFlags::EMPTY_PATH).map_err(|error| self.failed(path, error))?;
        let metadata = Metadata {
            mode: (stat.st_mode & 0o7777) as u16,
            user: 0,
            group: 0,
            mtime: stat.st_mtime,
            mtime_nanoseconds: 0,
            xattrs: BTreeMap::new(),
        };
        let mut link = None;
        let (kind, data) = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => (NodeKind::Directory, Data::None),
            FileType::RegularFile => {
                if stat.st_nlink > 1 {
                    link = Some(stat.st_ino);
                }
                let size = stat.st_size.cast_unsigned();
                let changed = (stat.st_ctime, stat.st_ctime_nsec.cast_signed());
                (NodeKind::File(size), Data::Context { path: path.to_owned(), size, changed })
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&opened, "", Vec::new());
                let target = target.map_err(|error| self.failed(path, error))?;
                (NodeKind::Symlink(target.into_bytes()), Data::None)
            }
            FileType::Fifo => (NodeKind::Fifo, Data::None),
            FileType::Socket => return Ok(None),
            _ => {
                let shown = self.path.join(path);
                return Err(Failure {
                    message: format!(
                        "{} is neither a file, a directory nor a symbolic link",
                        shown.display()
                    ),
                    hint: Some("leave it out with .dockerignore".into()),
                });
            }
        };
        Ok(Some(Item { path: relative, metadata, kind, data, link }))
    }

    fn read(&self, path: &Path, size: u64, changed: (i64, i64)) -> Result<File, Failure> {
        let opened = self.open_beneath(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK);
        let file = File::from(opened.map_err(|error| self.failed(path, error))?);
        let now = file.metadata().map_err(|error| self.failed(path, error))?;
        if now.len() != size || (now.ctime(), now.ctime_nsec()) != changed || !now.is_file() {
            let shown = self.path.join(path);
            return Err(Failure::new(format!("{} changed while it was read", shown.display())));
        }
        Ok(file)
    }
}

impl Tree<'_> {
    /// What a source word, expanded, stands for; several if it is a pattern.
    pub(crate) fn select(&self, word: &str, exclude: &IgnoreFile) -> Result<Vec<Selection>, Failure> {
        let clean: Vec<&str> = word.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
        let mut parts: Vec<&str> = Vec::new();
        for part in clean {
            if part == ".." {
                parts.pop();
            } else {
                parts.push(part);
            }
        }
        let is_pattern = parts.iter().any(|part| part.contains(['*', '?', '[', '\\']));
        let paths = match is_pattern {
            false => vec![parts.join("/").into_bytes()],
            true => self.expand(&parts.join("/"))?,
        };
        let mut selections = Vec::new();
        for path in paths {
            selections.push(self.one(&path, exclude)?);
        }
        Ok(selections)
    }

    /// Paths that match a pattern, sorted. A pattern that matches nothing is an error, as a path that is not there.
    fn expand(&self, text: &str) -> Result<Vec<Vec<u8>>, Failure> {
        let pattern = Pattern::parse(text).map_err(|error| Failure::new(error.reason))?;
        let mut found = Vec::new();
        let mut pending = vec![Vec::new()];
        while let Some(directory) = pending.pop() {
            for name in self.names(&directory)? {
                let path = join(&directory, &name);
                if pattern.matches(&path) && !self.is_ignored(&path) {
                    found.push(path);
                } else if pattern.may_match_below(&path) && self.is_directory(&path) {
                    pending.push(path);
                }
            }
        }
        found.sort();
        if found.is_empty() {
            return Err(Failure::new(format!("nothing matches `{text}`")));
        }
        Ok(found)
    }

    fn names(&self, directory: &[u8]) -> Result<Vec<Vec<u8>>, Failure> {
        match self {
            Self::Context(context) => context.names(as_path(directory)),
            Self::FileSystem(system) => {
                let node = system.resolve(directory, true).ok().and_then(|resolved| resolved.node);
                Ok(node
                    .into_iter()
                    .flat_map(|node| system.children(node).map(|(name, _)| name.to_vec()))
                    .collect())
            }
        }
    }

    fn is_directory(&self, path: &[u8]) -> bool {
        match self {
            Self::Context(context) => context
                .open_beneath(as_path(path), OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW)
                .is_ok(),
            Self::FileSystem(system) => {
                let node = system.resolve(path, false).ok().and_then(|resolved| resolved.node);
                node.is_some_and(|node| system.is_directory(node))
            }
        }
    }

    fn is_ignored(&self, path: &[u8]) -> bool {
        match self {
            Self::Context(context) => !path.is_empty() && context.ignore.is_ignored(path),
            Self::FileSystem(_) => false,
        }
    }

    /// What is at a path; a link there is followed.
    fn one(&self, path: &[u8], exclude: &IgnoreFile) -> Result<Selection, Failure> {
        let missing = |why: &str| {
            let shown = String::from_utf8_lossy(path).into_owned();
            Failure { message: format!("`{shown}` {why}"), hint: None }
        };
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default().to_vec();
        let mut items = Vec::new();
        match self {
            Self::Context(context) => {
                if self.is_ignored(path) && !context.ignore.may_hold_exceptions(path) {
                    return Err(Failure {
                        hint: Some("let it in with a line `!` and its name".into()),
                        ..missing("is left out by the ignore file")
                    });
                }
                let real = match context.open_beneath(as_path(path), OFlags::PATH) {
                    Ok(opened) => {
                        // Where a link leads, in the context's own words.
                        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&opened));
                        let whole =
                            std::fs::read_link(link).map_err(|error| context.failed(as_path(path), error))?;
                        let root = format!(
                            "/proc/self/fd/{}",
                            std::os::fd::AsRawFd::as_raw_fd(&context.root.as_fd())
                        );
                        let root =
                            std::fs::read_link(root).map_err(|error| context.failed(as_path(path), error))?;
                        whole
                            .strip_prefix(&root)
                            .map(Path::to_owned)
                            .unwrap_or_else(|_| as_path(path).to_owned())
                    }
                    Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {
                        return Err(missing("is not in the build context"));
                    }
                    Err(error) => return Err(context.failed(as_path(path), error)),
                };
                context.walk(&real, exclude, &mut items)?;
                if items.is_empty() {
                    return Err(missing("is a socket, which no image holds"));
                }
            }
            Self::FileSystem(system) => {
                let resolved = system
                    .resolve(path, true)
                    .map_err(|error| missing(&format!("leads nowhere: {error}")))?;
                let node = resolved.node.ok_or_else(|| missing("is not in the stage or image"))?;
                walk_nodes(system, node, exclude, &mut items)?;
            }
        }
        Ok(Selection { name, items, unpacked: false })
    }

    /// Opens an item's data.
    pub(crate) fn open<'t>(&'t self, item: &Item) -> Result<Box<dyn Read + 't>, Failure> {
        Ok(match (&item.data, self) {
            (Data::Context { path, size, changed }, Self::Context(context)) => {
                Box::new(context.read(path, *size, *changed)?.take(*size))
            }
            (Data::Node(node), Self::FileSystem(system)) => {
                Box::new(NodeReader { system, node: *node, offset: 0 })
            }
            (Data::Bytes(bytes), _) => Box::new(io::Cursor::new(bytes.clone())),
            (Data::Section { file, position }, _) => {
                let size = if let NodeKind::File(size) = item.kind { size } else { 0 };
                Box::new(SectionReader { file: file.clone(), position: *position }.take(size))
            }
            _ => Box::new(io::empty()),
        })
    }
}

impl Context {
    /// Everything at and below a path that is not left out.
    fn walk(&self, start: &Path, exclude: &IgnoreFile, items: &mut Vec<Item>) -> Result<(), Failure> {
        let Some(first) = self.item(start, Vec::new())? else { return Ok(()) };
        let is_directory = first.kind == NodeKind::Directory;
        items.push(first);
        let mut pending = if is_directory { vec![Vec::new()] } else { Vec::new() };
        while let Some(directory) = pending.pop() {
            let mut below = Vec::new();
            for name in self.names(&start.join(as_path(&directory)))? {
                let relative = join(&directory, &name);
                let path = start.join(as_path(&relative));
                let whole = path.as_os_str().as_bytes();
                let ignored = self.ignore.is_ignored(whole) || exclude.is_ignored(&relative);
                let may = self.ignore.may_hold_exceptions(whole);
                if ignored && !may {
                    continue;
                }
                let Some(item) = self.item(&path, relative.clone())? else { continue };
                let is_directory = item.kind == NodeKind::Directory;
                // A directory that is left out shows only what is let in again below it.
                if !ignored || is_directory {
                    if items.len() >= FILES_LIMIT {
                        return Err(Failure::new(format!("more than {FILES_LIMIT} files")));
                    }
                    items.push(item);
                }
                if is_directory {
                    below.push(relative);
                }
            }
            pending.extend(below.into_iter().rev());
        }
        self.drop_hollow(start, exclude, items);
        items.sort_by(|left, right| left.path.cmp(&right.path));
        Ok(())
    }

    /// Takes out directories that are left out and under which nothing was let in.
    fn drop_hollow(&self, start: &Path, exclude: &IgnoreFile, items: &mut Vec<Item>) {
        let mut needed: std::collections::HashSet<Vec<u8>> = std::collections::HashSet::new();
        for index in (0..items.len()).rev() {
            let item = &items[index];
            let whole = start.join(as_path(&item.path));
            let ignored = !item.path.is_empty()
                && (self.ignore.is_ignored(whole.as_os_str().as_bytes()) || exclude.is_ignored(&item.path));
            if ignored && item.kind == NodeKind::Directory && !needed.contains(&item.path) {
                items.remove(index);
                continue;
            }
            if let Some(slash) = items[index].path.iter().rposition(|byte| *byte == b'/') {
                needed.insert(items[index].path[..slash].to_vec());
            }
        }
    }
}

fn walk_nodes(
    system: &FileSystem,
    start: NodeId,
    exclude: &IgnoreFile,
    items: &mut Vec<Item>,
) -> Result<(), Failure> {
    let mut pending = vec![(Vec::new(), start)];
    while let Some((path, node)) = pending.pop() {
        if items.len() >= FILES_LIMIT {
            return Err(Failure::new(format!("more than {FILES_LIMIT} files")));
        }
        let kind = system.kind(node);
        let data = if matches!(kind, NodeKind::File(_)) { Data::Node(node) } else { Data::None };
        let link = (kind != NodeKind::Directory && system.links(node) > 1).then(|| node_number(node));
        for (name, child) in system.children(node) {
            let below = join(&path, name);
            if !exclude.is_ignored(&below) {
                pending.push((below, child));
            }
        }
        items.push(Item { path, metadata: system.metadata(node), kind, data, link });
    }
    items.sort_by(|left, right| left.path.cmp(&right.path));
    Ok(())
}

fn node_number(node: NodeId) -> u64 {
    node.number()
}

struct NodeReader<'a> {
    system: &'a FileSystem,
    node: NodeId,
    offset: u64,
}

impl Read for NodeReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.system.read_at(self.node, buffer, self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}

struct SectionReader {
    file: Arc<File>,
    position: u64,
}

impl Read for SectionReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = std::os::unix::fs::FileExt::read_at(&*self.file, buffer, self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

/// Unpacks an archive, uncompressed: what it holds, with its owners and modes.
pub(crate) fn unpack(file: File) -> Result<Selection, Failure> {
    let failed = |error: agentkernel_image::LayerError| {
        Failure::new(format!("the archive cannot be unpacked: {error}"))
    };
    let shared = Arc::new(file.try_clone().map_err(|error| Failure::new(error.to_string()))?);
    let mut reader = LayerReader::archive(file);
    let mut items: Vec<Item> = Vec::new();
    let mut known: HashMap<Vec<u8>, usize> = HashMap::new();
    let mut links = 0;
    while let Some(item) = reader.next_item().map_err(failed)? {
        if items.len() >= FILES_LIMIT {
            return Err(Failure::new(format!("the archive has more than {FILES_LIMIT} entries")));
        }
        let item = match item {
            LayerItem::Node { path, metadata, kind } => {
                let position = reader.position();
                let data = match kind {
                    NodeKind::File(_) => Data::Section { file: shared.clone(), position },
                    _ => Data::None,
                };
                Item { path, metadata, kind, data, link: None }
            }
            LayerItem::HardLink { path, target } => {
                let first = known.get(&target).copied();
                let first = first.ok_or_else(|| {
                    Failure::new(format!(
                        "the archive links to what it does not hold: {}",
                        String::from_utf8_lossy(&target)
                    ))
                })?;
                let link = *items[first].link.get_or_insert_with(|| {
                    links += 1;
                    links
                });
                Item { path, link: Some(link), ..items[first].clone() }
            }
            // Not told apart in an archive.
            LayerItem::Whiteout { .. } | LayerItem::Opaque { .. } => continue,
        };
        match known.get(&item.path) {
            // As tar unpacks it: the last of a name counts.
            Some(index) => items[*index] = item,
            None => {
                known.insert(item.path.clone(), items.len());
                items.push(item);
            }
        }
    }
    items.sort_by(|left, right| left.path.cmp(&right.path));
    Ok(Selection { name: Vec::new(), items, unpacked: true })
}

/// A document as a file.
pub(crate) fn document(name: &str, content: String) -> Selection {
    let bytes: Arc<[u8]> = content.into_bytes().into();
    let metadata = Metadata { mode: 0o644, ..Metadata::default() };
    let kind = NodeKind::File(bytes.len() as u64);
    let item = Item { path: Vec::new(), metadata, kind, data: Data::Bytes(bytes), link: None };
    Selection { name: name.as_bytes().to_vec(), items: vec![item], unpacked: false }
}

/// What came from an address, whole, as a file; only its owner may read it, as for Docker.
pub(crate) fn fetched(name: &[u8], file: File, time: i64) -> io::Result<Selection> {
    let metadata = Metadata { mode: 0o600, mtime: time, ..Metadata::default() };
    let kind = NodeKind::File(file.metadata()?.len());
    let data = Data::Section { file: Arc::new(file), position: 0 };
    let item = Item { path: Vec::new(), metadata, kind, data, link: None };
    Ok(Selection { name: name.to_vec(), items: vec![item], unpacked: false })
}

/// The digest of the content of what [`fetched`] made.
pub(crate) fn file_digest(selection: &Selection) -> Result<Digest, Failure> {
    let [Item { data: Data::Section { file, position }, .. }] = selection.items.as_slice() else {
        return Err(Failure::new("nothing was fetched"));
    };
    let reader = SectionReader { file: file.clone(), position: *position };
    Digest::read(reader).map_err(|error| Failure::new(format!("cannot read what was fetched: {error}")))
}

/// The digest of all that selections hold.
pub(crate) fn digest(tree: &Tree<'_>, selections: &[Selection]) -> Result<Digest, Failure> {
    let mut hasher = Sha256::new();
    let push = |hasher: &mut Sha256, bytes: &[u8]| {
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    let mut buffer = vec![0; BUFFER];
    for selection in selections {
        push(&mut hasher, &selection.name);
        hasher.update([u8::from(selection.unpacked)]);
        hasher.update((selection.items.len() as u64).to_le_bytes());
        let mut links: HashMap<u64, u64> = HashMap::new();
        for (index, item) in selection.items.iter().enumerate() {
            push(&mut hasher, &item.path);
            let metadata = &item.metadata;
            push(&mut hasher, &metadata.mode.to_le_bytes());
            push(&mut hasher, &metadata.user.to_le_bytes());
            push(&mut hasher, &metadata.group.to_le_bytes());
            for (name, value) in &metadata.xattrs {
                push(&mut hasher, name);
                push(&mut hasher, value);
            }
            push(&mut hasher, format!("{:?}", item.kind).as_bytes());
            if let Some(link) = item.link {
                let first = *links.entry(link).or_insert(index as u64);
                hasher.update(first.to_le_bytes());
                if first != index as u64 {
                    continue;
                }
            }
            if let NodeKind::File(size) = item.kind {
                let mut reader = tree.open(item)?;
                let mut left = size;
                loop {
                    let count = reader.read(&mut buffer).map_err(|error| unreadable(item, &error))?;
                    if count == 0 {
                        break;
                    }
                    left = left.saturating_sub(count as u64);
                    hasher.update(&buffer[..count]);
                }
                if left > 0 {
                    return Err(unreadable(item, &io::ErrorKind::UnexpectedEof.into()));
                }
            }
        }
    }
    let digest: [u8; 32] = hasher.finalize().into();
    Ok(Digest::of(&digest))
}

fn unreadable(item: &Item, error: &io::Error) -> Failure {
    Failure::new(format!("cannot read {}: {error}", String::from_utf8_lossy(&item.path)))
}

pub(crate) fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

fn as_path(bytes: &[u8]) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(bytes))
}
