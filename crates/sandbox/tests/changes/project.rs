//! A host workspace in a directory of the build, and a guest made of a list of entries.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::Permissions;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agentkernel_sandbox::workspace::{
    ApplyOptions, ApplyReport, Base, BaseTable, ChangeLimits, ChangeRecorder, ChangeSet, Origin, RecordError,
    UpperEntry, apply,
};

/// What a test finds at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    File(Vec<u8>, u32),
    Directory(u32),
    Link(PathBuf),
}

pub(crate) type Nodes = BTreeMap<PathBuf, Node>;

pub(crate) struct Project {
    directory: tempfile::TempDir,
    pub(crate) bases: Arc<BaseTable>,
}

/// One entry of the guest's upper layer, with its data.
pub(crate) type Sent = (Vec<u8>, UpperEntry, Vec<u8>);

pub(crate) fn file(path: &str, content: &[u8]) -> Sent {
    file_with(path, content, 0o644)
}

pub(crate) fn file_with(path: &str, content: &[u8], mode: u32) -> Sent {
    let entry = UpperEntry::File { mode, size: content.len() as u64, modified_ns: 7 };
    (path.into(), entry, content.to_vec())
}

pub(crate) fn directory(path: &str) -> Sent {
    (path.into(), UpperEntry::Directory { mode: 0o755, opaque: false }, Vec::new())
}

pub(crate) fn opaque(path: &str) -> Sent {
    (path.into(), UpperEntry::Directory { mode: 0o755, opaque: true }, Vec::new())
}

pub(crate) fn link(path: &str, target: &str) -> Sent {
    (path.into(), UpperEntry::Symlink { target: target.into() }, Vec::new())
}

pub(crate) fn removed(path: &str) -> Sent {
    (path.into(), UpperEntry::Removed, Vec::new())
}

pub(crate) fn take_all() -> ApplyOptions {
    ApplyOptions::default()
}

impl Project {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        std::fs::create_dir(directory.path().join("work")).unwrap();
        Self { directory, bases: Arc::default() }
    }

    /// A project with these files, all of which the guest has seen.
    pub(crate) fn with(files: &[(&str, &str)]) -> Self {
        let project = Self::new();
        for (path, content) in files {
            project.write(path, content.as_bytes());
        }
        project.serve();
        project
    }

    pub(crate) fn state(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.directory.path().join("work")
    }

    pub(crate) fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root().join(path)
    }

    pub(crate) fn write(&self, path: impl AsRef<Path>, content: &[u8]) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    }

    /// Makes the tree what `nodes` says.
    pub(crate) fn build(&self, nodes: &Nodes) {
        for (path, node) in nodes {
            let path = self.path(path);
            match node {
                Node::Directory(mode) => {
                    std::fs::create_dir(&path).unwrap();
                    std::fs::set_permissions(&path, Permissions::from_mode(*mode)).unwrap();
                }
                Node::File(content, mode) => {
                    std::fs::write(&path, content).unwrap();
                    std::fs::set_permissions(&path, Permissions::from_mode(*mode)).unwrap();
                }
                Node::Link(target) => symlink(target, &path).unwrap(),
            }
        }
    }

    /// The guest looks at everything.
    pub(crate) fn serve(&self) {
        for path in self.nodes().keys() {
            let metadata = self.path(path).symlink_metadata().unwrap();
            self.bases.record_first(path, Base::of(&metadata));
        }
    }

    pub(crate) fn nodes(&self) -> Nodes {
        let mut nodes = Nodes::new();
        collect(&self.root(), Path::new(""), &mut nodes);
        nodes
    }

    pub(crate) fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.path(path)).unwrap()
    }

    pub(crate) fn recorder(&self, name: &str, limits: ChangeLimits) -> ChangeRecorder {
        let bases = Arc::clone(&self.bases);
        let origin = Origin {
            workspace: self.root(),
            sandbox: "box".into(),
            base: Box::new(move |path| bases.get(path)),
            visible: Box::new(|path| path.file_name() != Some(OsStr::from_bytes(b".secret"))),
        };
        ChangeRecorder::new(&self.state().join(name), origin, limits).unwrap()
    }

    pub(crate) fn try_record(&self, name: &str, sent: &[Sent]) -> Result<ChangeSet, RecordError> {
        let mut recorder = self.recorder(name, ChangeLimits::for_disk(1 << 30));
        for (path, entry, data) in sent {
            recorder.begin_entry(path, entry.clone())?;
            // An odd size, so that pieces and files do not end together.
            for piece in data.chunks(1000) {
                recorder.data(piece)?;
            }
            recorder.end_entry()?;
        }
        recorder.finish()
    }

    pub(crate) fn record(&self, sent: &[Sent]) -> ChangeSet {
        self.try_record("set", sent).unwrap()
    }

    /// Records and applies everything.
    pub(crate) fn take(&self, sent: &[Sent]) -> (ChangeSet, ApplyReport) {
        let mut set = self.record(sent);
        let report = apply(&mut set, &take_all()).unwrap();
        self.assert_tidy();
        (set, report)
    }

    /// No temporary name is left in the workspace.
    pub(crate) fn assert_tidy(&self) {
        let left: Vec<_> = self.nodes().into_keys().filter(|path| is_temporary(path)).collect();
        assert!(left.is_empty(), "left over: {left:?}");
    }
}

pub(crate) fn is_temporary(path: &Path) -> bool {
    path.iter().any(|name| name.as_bytes().starts_with(b".agentkernel-") && name.len() > 30)
}

fn collect(root: &Path, below: &Path, nodes: &mut Nodes) {
    for entry in std::fs::read_dir(root.join(below)).unwrap() {
        let path = below.join(entry.unwrap().file_name());
        let full = root.join(&path);
        let metadata = full.symlink_metadata().unwrap();
        let mode = metadata.permissions().mode() & 0o7777;
        if metadata.is_dir() {
            nodes.insert(path.clone(), Node::Directory(mode));
            collect(root, &path, nodes);
        } else if metadata.is_symlink() {
            nodes.insert(path, Node::Link(std::fs::read_link(full).unwrap()));
        } else if metadata.is_file() {
            nodes.insert(path, Node::File(std::fs::read(full).unwrap(), mode));
        }
    }
}
