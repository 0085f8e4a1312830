//! From what is copied to a layer: where each file goes, which directories are made, who owns them.

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};

use agentkernel_image::{FileSystem, LayerItem, LayerWriter, Metadata, NodeKind, ResolveError, Resolved};

use crate::executor::Failure;
use crate::source::{Item, Selection, Tree, join};

const BUFFER: usize = 256 << 10;
/// Mode of directories that nobody described.
const DIRECTORY_MODE: u16 = 0o755;

/// Who owns what is made, and its mode, where the instruction says so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Ownership {
    /// `--chown`.
    pub(crate) owner: Option<(u32, u32)>,
    /// `--chmod`.
    pub(crate) mode: Option<u16>,
}

/// What a layer will hold, by path.
#[derive(Default)]
pub(crate) struct Plan<'s> {
    entries: BTreeMap<Vec<u8>, Entry<'s>>,
}

struct Entry<'s> {
    metadata: Metadata,
    kind: NodeKind,
    /// Where a file's data comes from.
    item: Option<&'s Item>,
    /// Names with the same number, of the same selection, are one file.
    link: Option<(usize, u64)>,
}

impl<'s> Plan<'s> {
    /// Whether nothing has to be written.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A directory and its missing parents, each `owner`'s; nothing if it is there.
    pub(crate) fn directory(
        &mut self,
        system: &FileSystem,
        path: &[u8],
        owner: (u32, u32),
        time: i64,
    ) -> Result<(), Failure> {
        let resolved = system.resolve(path, true).map_err(|error| nowhere(path, error))?;
        match resolved.node {
            Some(node) if system.is_directory(node) => Ok(()),
            Some(_) => Err(Failure::new(format!("/{} is not a directory", shown(&resolved.path)))),
            None => self.parents(system, &[&resolved.path[..], b"/x"].concat(), owner, time),
        }
    }

    /// Everything of `selections`, at `destination`, absolute and expanded.
    pub(crate) fn transfer(
        &mut self,
        system: &FileSystem,
        selections: &'s [Selection],
        destination: &str,
        ownership: Ownership,
        time: i64,
    ) -> Result<(), Failure> {
        let wants_directory =
            destination.ends_with('/') || destination.ends_with("/.") || destination.is_empty();
        let resolved = system
            .resolve(destination.as_bytes(), true)
            .map_err(|error| nowhere(destination.as_bytes(), error))?;
        let is_directory = resolved.node.map(|node| system.is_directory(node));
        if selections.len() > 1 && !wants_directory && is_directory != Some(true) {
            return Err(Failure {
                message: format!("{destination} is to take several files, so it has to be a directory"),
                hint: Some(format!("write it with a slash at its end: {destination}/")),
            });
        }
        for (number, selection) in selections.iter().enumerate() {
            let into = wants_directory || is_directory == Some(true);
            if selection.is_directory() {
                if is_directory == Some(false) {
                    return Err(Failure::new(format!("cannot copy a directory over the file {destination}")));
                }
                self.tree(system, selection, number, &resolved.path, ownership, time)?;
            } else if into {
                if is_directory == Some(false) {
                    return Err(Failure::new(format!("{destination} is a file, not a directory")));
                }
                if selection.name.is_empty() {
                    return Err(nameless(destination));
                }
                let path = join(&resolved.path, &selection.name);
                self.file(system, selection, number, &path, ownership, time)?;
            } else {
                self.file(system, selection, number, &resolved.path, ownership, time)?;
            }
        }
        Ok(())
    }

    fn file(
        &mut self,
        system: &FileSystem,
        selection: &'s Selection,
        number: usize,
        path: &[u8],
        ownership: Ownership,
        time: i64,
    ) -> Result<(), Failure> {
        let Some(item) = selection.items.first() else { return Ok(()) };
        let resolved = system.resolve(path, false).map_err(|error| nowhere(path, error))?;
        if resolved.node.is_some_and(|node| system.is_directory(node)) {
            return Err(Failure::new(format!("cannot copy a file over the directory /{}", shown(path))));
        }
        self.parents(system, &resolved.path, ownership.owner.unwrap_or((0, 0)), time)?;
        self.put(resolved.path, item, number, ownership);
        Ok(())
    }

    /// A directory's content, or an archive's.
    #[allow(clippy::too_many_arguments)]
    fn tree(
        &mut self,
        system: &FileSystem,
        selection: &'s Selection,
        number: usize,
        target: &[u8],
        ownership: Ownership,
        time: i64,
    ) -> Result<(), Failure> {
        let owner = ownership.owner.unwrap_or((0, 0));
        self.parents(system, &[target, b"/x"].concat(), owner, time)?;
        // Directories that are not there yet, or not as directories: by their path in what is copied.
        let mut new: HashMap<&[u8], Vec<u8>> = HashMap::new();
        for item in &selection.items {
            // The destination takes after what it is a copy of in nothing: Docker's builder makes it first.
            if item.path.is_empty() {
                continue;
            }
            let (parent, name) = match item.path.iter().rposition(|byte| *byte == b'/') {
                Some(slash) => (&item.path[..slash], &item.path[slash + 1..]),
                None => (&b""[..], &item.path[..]),
            };
            let is_directory = item.kind == NodeKind::Directory;
            let (path, there) = if let Some(parent) = new.get(parent) {
                (join(parent, name), None)
            } else {
                let path = join(target, &item.path);
                let Resolved { path, node } =
                    system.resolve(&path, false).map_err(|error| nowhere(&path, error))?;
                (path, node.map(|node| system.is_directory(node)))
            };
            // What an archive holds replaces what is of another kind; what is copied does not.
            match there {
                Some(true) if !is_directory && !selection.unpacked => {
                    let path = shown(&path);
                    return Err(Failure::new(format!("cannot copy a file over the directory /{path}")));
                }
                Some(false) if is_directory && !selection.unpacked => {
                    let path = shown(&path);
                    return Err(Failure::new(format!("cannot copy a directory over the file /{path}")));
                }
                _ => {}
            }
            if is_directory && there != Some(true) {
                new.insert(&item.path, path.clone());
            }
            self.parents(system, &path, owner, time)?;
            self.put(path, item, number, ownership);
        }
        Ok(())
    }

    fn put(&mut self, path: Vec<u8>, item: &'s Item, number: usize, ownership: Ownership) {
        let mut metadata = item.metadata.clone();
        if let Some((user, group)) = ownership.owner {
            (metadata.user, metadata.group) = (user, group);
        }
        if let (Some(mode), false) = (ownership.mode, matches!(item.kind, NodeKind::Symlink(_))) {
            metadata.mode = mode;
        }
        let link = item.link.map(|link| (number, link));
        self.entries.insert(path, Entry { metadata, kind: item.kind.clone(), item: Some(item), link });
    }

    /// The directories above `path`: as they are, or new. A layer lists them all, for overlays take a listed directory's
    /// attributes from the uppermost layer that has it.
    fn parents(
        &mut self,
        system: &FileSystem,
        path: &[u8],
        owner: (u32, u32),
        time: i64,
    ) -> Result<(), Failure> {
        let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(index, _)| index);
        for parent in slashes.map(|slash| &path[..slash]).filter(|parent| !parent.is_empty()) {
            match self.entries.get(parent).map(|entry| &entry.kind) {
                None => {}
                Some(NodeKind::Directory) => continue,
                Some(_) => return Err(Failure::new(format!("/{} is not a directory", shown(parent)))),
            }
            let resolved = system.resolve(parent, false).map_err(|error| nowhere(parent, error))?;
            let metadata = match resolved.node {
                Some(node) if system.is_directory(node) => system.metadata(node),
                Some(_) => return Err(Failure::new(format!("/{} is not a directory", shown(parent)))),
                None => Metadata {
                    mode: DIRECTORY_MODE,
                    user: owner.0,
                    group: owner.1,
                    mtime: time,
                    ..Metadata::default()
                },
            };
            let entry = Entry { metadata, kind: NodeKind::Directory, item: None, link: None };
            self.entries.insert(parent.to_vec(), entry);
        }
        Ok(())
    }

    /// Writes the layer.
    pub(crate) fn write<W: Write>(
        &self,
        tree: &Tree<'_>,
        writer: &mut LayerWriter<W>,
    ) -> Result<(), Failure> {
        let failed = |error: std::io::Error| Failure::new(format!("cannot write a layer: {error}"));
        let mut links: HashMap<(usize, u64), &[u8]> = HashMap::new();
        let mut buffer = vec![0; BUFFER];
        for (path, entry) in &self.entries {
            if let Some(link) = entry.link {
                if let Some(target) = links.get(&link) {
                    let link = LayerItem::HardLink { path: path.clone(), target: target.to_vec() };
                    writer.item(&link).map_err(failed)?;
                    continue;
                }
                links.insert(link, path);
            }
            let (metadata, kind) = (entry.metadata.clone(), entry.kind.clone());
            writer.item(&LayerItem::Node { path: path.clone(), metadata, kind }).map_err(failed)?;
            let Some(item) = entry.item.filter(|_| matches!(entry.kind, NodeKind::File(_))) else { continue };
            let mut reader = tree.open(item)?;
            loop {
                let count = reader
                    .read(&mut buffer)
                    .map_err(|error| Failure::new(format!("cannot read {}: {error}", shown(&item.path))))?;
                if count == 0 {
                    break;
                }
                writer.data(&buffer[..count]).map_err(failed)?;
            }
        }
        Ok(())
    }
}

/// An address may end without anything that could be a file's name.
pub(crate) fn nameless(destination: &str) -> Failure {
    let directory = destination.trim_end_matches('/');
    Failure {
        message: "the address does not tell what the file is called".into(),
        hint: Some(format!("name the file itself, not a directory: {directory}/NAME")),
    }
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

fn nowhere(path: &[u8], error: ResolveError) -> Failure {
    Failure::new(format!("/{} leads nowhere: {error}", shown(path).trim_start_matches('/')))
}
