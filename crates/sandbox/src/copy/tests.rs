use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_bytes::ByteBuf;
use tempfile::TempDir;

use super::*;

const LIMITS: CopyLimits = CopyLimits { entries: 1000, bytes: 1 << 20 };

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

/// Hands a source's entries to a target, as if a guest sent them back.
fn through(source: impl Source, target: impl Target, limits: CopyLimits) -> Result<CopySummary, CopyError> {
    let mut entries = Vec::new();
    source.send(&mut |entry| {
        entries.push(entry);
        Ok(())
    })?;
    entries.push(Entry::End);
    hostile(entries, target, limits)
}

/// Sends these entries to a target.
fn hostile(entries: Vec<Entry>, target: impl Target, limits: CopyLimits) -> Result<CopySummary, CopyError> {
    runtime().block_on(async {
        let (near, mut far) = tokio::io::duplex(4096);
        let send = async move {
            for entry in &entries {
                if frame::write(&mut far, entry).await.is_err() {
                    return;
                }
            }
        };
        tokio::join!(copy_out(near, target, limits), send).0
    })
}

/// Everything below a directory: kind, mode and content by path.
fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            let path = entry.path();
            let metadata = entry.metadata().unwrap();
            let mode = metadata.mode() & 0o7777;
            let text = if metadata.is_dir() {
                pending.push(path.clone());
                format!("directory {mode:o}")
            } else if metadata.is_symlink() {
                format!("link {:?}", std::fs::read_link(&path).unwrap())
            } else {
                format!("file {mode:o} {} {:?}", metadata.mtime(), std::fs::read(&path).unwrap())
            };
            found.insert(path.strip_prefix(root).unwrap().to_owned(), text);
        }
    }
    found
}

#[derive(Clone, Debug)]
enum Node {
    File(Vec<u8>, u32),
    Link(String),
    Directory,
}

fn nodes() -> impl Strategy<Value = Vec<(Vec<u8>, Node)>> {
    let name = prop::collection::vec(prop_oneof![b'a'..=b'd', Just(b' '), Just(0xff), Just(b'\n')], 1..5);
    let node = prop_oneof![
        (prop::collection::vec(any::<u8>(), 0..100), prop_oneof![Just(0o644u32), Just(0o755), Just(0o600)])
            .prop_map(|(content, mode)| Node::File(content, mode)),
        "[a-z/.]{1,9}".prop_map(Node::Link),
        Just(Node::Directory),
    ];
    let path = prop::collection::vec(name, 1..4).prop_map(|names| names.join(&b'/'));
    prop::collection::vec((path, node), 0..12)
}

fn plant(nodes: &[(Vec<u8>, Node)]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, node) in nodes {
        let path = root.path().join(std::ffi::OsStr::from_bytes(path));
        // Paths that collide with others are left out, and so are those below links and files.
        let parents_are_plain = path
            .ancestors()
            .skip(1)
            .take_while(|above| *above != root.path())
            .all(|above| std::fs::symlink_metadata(above).map_or(true, |metadata| metadata.is_dir()));
        if !parents_are_plain || path.symlink_metadata().is_ok() {
            continue;
        }
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        match node {
            Node::File(content, mode) => {
                std::fs::write(&path, content).unwrap();
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(*mode)).unwrap();
            }
            Node::Link(target) => symlink(target, &path).unwrap(),
            Node::Directory => std::fs::create_dir(&path).unwrap(),
        }
    }
    root
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_tree_survives_the_way_there_and_back(nodes in nodes()) {
        let source = plant(&nodes);
        let target = tempfile::tempdir().unwrap();
        let host = HostTarget::new(&target.path().join("copy"), "x".as_ref());
        through(HostSource::new(source.path()), host, LIMITS).unwrap();
        prop_assert_eq!(tree(&target.path().join("copy")), tree(source.path()));
    }

    #[test]
    fn a_tree_survives_a_tar_archive(nodes in nodes()) {
        let source = plant(&nodes);
        let archive = tempfile::NamedTempFile::new().unwrap();
        let tape = TarTarget::new(archive.reopen().unwrap(), "".as_ref());
        through(HostSource::new(source.path()), tape, LIMITS).unwrap();
        let target = tempfile::tempdir().unwrap();
        let host = HostTarget::new(target.path(), "".as_ref());
        through(TarSource::new(archive.reopen().unwrap()), host, LIMITS).unwrap();
        prop_assert_eq!(tree(target.path()), tree(source.path()));
    }

    #[test]
    fn whatever_a_guest_sends_stays_below_the_target(
        sent in prop::collection::vec((prop::collection::vec(prop_oneof![
            Just(b"..".to_vec()), Just(b"a".to_vec()), Just(b"b".to_vec()), Just(Vec::new())], 0..4), 0u8..5), 0..12)) {
        let root = tempfile::tempdir().unwrap();
        let outside = root.path().join("outside");
        let inside = root.path().join("inside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::create_dir(&inside).unwrap();
        let mut entries = vec![Entry::Directory { path: ByteBuf::new(), mode: 0o755, opaque: false }];
        for (names, kind) in sent {
            let path = ByteBuf::from(names.join(&b'/'));
            entries.push(match kind {
                0 => Entry::Directory { path, mode: 0o7777, opaque: false },
                1 => Entry::Symlink { path, target: ByteBuf::from(outside.as_os_str().as_bytes()) },
                2 => Entry::Symlink { path, target: ByteBuf::from("..") },
                3 => Entry::Special { path },
                _ => Entry::File { path, mode: 0o6755, size: 0, modified_ns: i64::MIN },
            });
        }
        entries.push(Entry::End);
        let _ = hostile(entries, HostTarget::new(&inside, "".as_ref()), LIMITS);
        prop_assert!(tree(&outside).is_empty());
        prop_assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 2);
        for text in tree(&inside).values() {
            prop_assert!(!text.starts_with("file 6") && !text.starts_with("directory 7777"), "{}", text);
        }
    }
}

#[test]
fn an_archive_of_ours_is_one_to_the_systems_tar() {
    let source = plant(&[
        (b"deep/file".to_vec(), Node::File(vec![7; 1000], 0o755)),
        (b"link".to_vec(), Node::Link("deep/file".into())),
        (b"far".to_vec(), Node::Link("x".repeat(180))),
        ([b'n'; 200].to_vec(), Node::File(b"long name".to_vec(), 0o644)),
    ]);
    let archive = tempfile::NamedTempFile::new().unwrap();
    let tape = TarTarget::new(archive.reopen().unwrap(), "top".as_ref());
    through(HostSource::new(source.path()), tape, LIMITS).unwrap();
    let target = tempfile::tempdir().unwrap();
    let untar = |file: &Path, to: &Path| {
        let status = std::process::Command::new("tar").arg("xf").arg(file).arg("-C").arg(to).status();
        assert!(status.unwrap().success());
    };
    untar(archive.path(), target.path());
    assert_eq!(tree(&target.path().join("top")), tree(source.path()));

    // And theirs is one to us.
    let theirs = tempfile::NamedTempFile::new().unwrap();
    let mut command = std::process::Command::new("tar");
    let status = command.arg("cf").arg(theirs.path()).arg("-C").arg(source.path()).arg(".").status();
    assert!(status.unwrap().success());
    let back = tempfile::tempdir().unwrap();
    let host = HostTarget::new(back.path(), "".as_ref());
    through(TarSource::new(theirs.reopen().unwrap()), host, LIMITS).unwrap();
    assert_eq!(tree(back.path()), tree(source.path()));
}

#[test]
fn what_breaks_the_rules_is_refused() {
    let root = || Entry::Directory { path: ByteBuf::new(), mode: 0o755, opaque: false };
    let file =
        |path: &[u8], size| Entry::File { path: ByteBuf::from(path), mode: 0o644, size, modified_ns: 0 };
    let data = |bytes: &[u8]| Entry::Data(ByteBuf::from(bytes));
    let long = [b'n'; 300];
    let table: Vec<(Vec<Entry>, &str)> = vec![
        (vec![Entry::End], "no copy"),
        (vec![file(b"x", 0)], "without a root"),
        (vec![root(), root()], "two"),
        (vec![root(), file(b"../x", 0)], "refused"),
        (vec![root(), file(b"/x", 0)], "refused"),
        (vec![root(), file(b"a\0b", 0)], "refused"),
        (vec![root(), file(&long, 0)], "refused"),
        (vec![root(), file(b"x", 3), data(b"toolong")], "more or less"),
        (vec![root(), file(b"x", 3), Entry::End], "more or less"),
        (vec![root(), file(b"x", 2 << 20)], "exceeds"),
        (vec![root(), Entry::Removed { path: ByteBuf::from("x") }], "no copy"),
        (vec![root(), Entry::Failed { message: "no such\x1b file".into() }], "no such file"),
        (vec![root()], "broke"),
    ];
    for (entries, expected) in table {
        let target = tempfile::tempdir().unwrap();
        let error =
            hostile(entries.clone(), HostTarget::new(target.path(), "".as_ref()), LIMITS).unwrap_err();
        assert!(error.to_string().contains(expected), "{entries:?}: {error}");
        let left = tree(target.path());
        assert!(left.keys().all(|path| !path.to_string_lossy().contains(".agentkernel-")), "{left:?}");
    }
    let many: Vec<Entry> =
        std::iter::once(root()).chain((0..2000).map(|n| file(n.to_string().as_bytes(), 0))).collect();
    let target = tempfile::tempdir().unwrap();
    let error = hostile(many, HostTarget::new(target.path(), "".as_ref()), LIMITS).unwrap_err();
    assert!(matches!(error, CopyError::Limit(_)), "{error}");
}

#[test]
fn hostile_archives_are_refused() {
    let archive = |name: &str, kind: tar::EntryType, link: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_mode(0o644);
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_link_name_literal(link).unwrap();
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend([0; 1024]);
        std::io::Cursor::new(bytes)
    };
    for (name, kind, link) in [
        ("../x", tar::EntryType::Regular, ""),
        ("/x", tar::EntryType::Regular, ""),
        ("a/../../x", tar::EntryType::Directory, ""),
        ("x", tar::EntryType::Link, "/etc/passwd"),
    ] {
        let target = tempfile::tempdir().unwrap();
        let host = HostTarget::new(target.path(), "".as_ref());
        let error = through(TarSource::new(archive(name, kind, link)), host, LIMITS).unwrap_err();
        assert!(matches!(error, CopyError::Refused(_)), "{name}: {error}");
    }
}

#[test]
fn a_target_that_is_a_link_is_followed_if_that_is_said_but_none_below_it() {
    let root = tempfile::tempdir().unwrap();
    let real = root.path().join("real");
    std::fs::create_dir(&real).unwrap();
    symlink(&real, root.path().join("link")).unwrap();
    symlink("/tmp", real.join("trap")).unwrap();
    let source = plant(&[(b"trap/file".to_vec(), Node::File(b"x".to_vec(), 0o644))]);
    let target = HostTarget::new(&root.path().join("link"), "".as_ref());
    assert!(through(HostSource::new(source.path()), target, LIMITS).is_err());
    let target = HostTarget::new(&root.path().join("link"), "fine".as_ref());
    assert!(matches!(through(HostSource::new(source.path()), target, LIMITS), Err(CopyError::Refused(_))));
    let target = HostTarget::new(&root.path().join("link/"), "fine".as_ref());
    through(HostSource::new(source.path()), target, LIMITS).unwrap();
    assert_eq!(std::fs::read(real.join("fine/trap/file")).unwrap(), b"x");
}
