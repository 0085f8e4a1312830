//! What a guest changes in a workspace it may write to, and what it cannot.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use rustix::io::Errno;

use super::*;

const WRITE_ONLY: u32 = 1;
const READ_WRITE: u32 = 2;

fn create(client: &Client, parent: u64, name: &[u8], mode: u32) -> Result<(u64, u64), Errno> {
    let mut body = halves(&[READ_WRITE | 0o100 | 0o200, mode, 0o022, 0]);
    body.extend(terminated(&[name]));
    let reply = client.call(CREATE, parent, &body)?;
    Ok((u64_at(&reply, 0), u64_at(&reply, 128)))
}

fn make_directory(client: &Client, parent: u64, name: &[u8]) -> Result<u64, Errno> {
    let mut body = halves(&[0o755, 0]);
    body.extend(terminated(&[name]));
    Ok(entry(&client.call(MKDIR, parent, &body)?).unwrap().node)
}

fn make_node(client: &Client, name: &[u8], mode: u32) -> Result<Vec<u8>, Errno> {
    let mut body = halves(&[mode, 0x0105, 0, 0]);
    body.extend(terminated(&[name]));
    client.call(MKNOD, ROOT, &body)
}

fn rename(client: &Client, from: (u64, &[u8]), to: (u64, &[u8]), flags: u32) -> Result<(), Errno> {
    let mut body = fields(&[to.0, u64::from(flags)]);
    body.extend(terminated(&[from.1, to.1]));
    client.call(RENAME2, from.0, &body).map(drop)
}

fn link(client: &Client, node: u64, name: &[u8]) -> Result<Vec<u8>, Errno> {
    let mut body = fields(&[node]);
    body.extend(terminated(&[name]));
    client.call(LINK, ROOT, &body)
}

/// SETATTR with the fields that are not zero: mode, size, owner.
fn set(client: &Client, node: u64, valid: u32, mode: u32, size: u64, owner: u32) -> Result<Vec<u8>, Errno> {
    let mut body = halves(&[valid, 0]);
    body.extend(fields(&[0, size, 0, 5, 6, 0]));
    body.extend(halves(&[0, 7, 0, mode, 0, owner, owner, 0]));
    client.call(SETATTR, node, &body)
}

#[test]
fn files_are_made_written_changed_and_removed() {
    let directory = directory();
    let root = directory.path();
    let client = Client::read_write(root);
    let (node, handle) = create(&client, ROOT, b"file", 0o4666).unwrap();
    assert_eq!(fs::metadata(root.join("file")).unwrap().mode() & 0o7777, 0o666, "no umask, no set-uid");
    assert_eq!(client.write(node, handle, 0, b"hello world"), Ok(11));
    assert_eq!(client.read(node, handle, 6, 100).unwrap(), b"world");
    set(&client, node, 1 << 3, 0, 5, 0).unwrap();
    assert_eq!(fs::read(root.join("file")).unwrap(), b"hello");
    set(&client, node, 1, 0o6711, 0, 0).unwrap();
    assert_eq!(fs::metadata(root.join("file")).unwrap().mode() & 0o7777, 0o711);
    set(&client, node, 1 << 4 | 1 << 5, 0, 0, 0).unwrap();
    assert_eq!(fs::metadata(root.join("file")).unwrap().mtime(), 6);
    let owner = fs::metadata(root.join("file")).unwrap().uid();
    assert!(set(&client, node, 1 << 1, 0, 0, owner).is_ok());
    assert_eq!(set(&client, node, 1 << 1, 0, 0, owner + 1).unwrap_err(), Errno::PERM);
    assert_eq!(set(&client, node, 1 << 3, 0, u64::MAX, 0).unwrap_err(), Errno::FBIG);

    client.call(UNLINK, ROOT, b"file\0").unwrap();
    assert!(!root.join("file").exists());
    assert_eq!(client.read(node, handle, 0, 9).unwrap(), b"hello", "open files outlive their names");
    assert!(client.call(GETATTR, node, &fields(&[0, 0])).is_ok());
    client.call(RELEASE, node, &fields(&[handle, 0, 0])).unwrap();
    assert!(client.call(GETATTR, node, &fields(&[0, 0])).is_err());
    client.forget(node, 1);
    assert_eq!((client.server.node_count(), client.server.handle_count()), (1, 0));
}

#[test]
fn all_kinds_but_devices_are_made() {
    let directory = directory();
    let root = directory.path();
    let client = Client::read_write(root);
    make_node(&client, b"fifo", 0o010_644).unwrap();
    make_node(&client, b"socket", 0o140_644).unwrap();
    make_node(&client, b"plain", 0o100_640).unwrap();
    for device in [0o020_644, 0o060_644] {
        assert_eq!(make_node(&client, b"device", device).unwrap_err(), Errno::PERM);
    }
    assert!(fs::metadata(root.join("fifo")).unwrap().file_type().is_fifo());
    let inner = make_directory(&client, ROOT, b"dir").unwrap();
    create(&client, inner, b"x", 0o644).unwrap();
    assert_eq!(client.call(RMDIR, ROOT, b"dir\0").unwrap_err(), Errno::NOTEMPTY);
    client.call(SYMLINK, ROOT, &terminated(&[b"link", b"../../../etc/passwd"])).unwrap();
    assert_eq!(fs::read_link(root.join("link")).unwrap(), Path::new("../../../etc/passwd"));
    let link_node = client.walk("link").unwrap().node;
    assert_eq!(client.open(link_node, READ_WRITE), Err(Errno::NXIO));
    assert!(set(&client, link_node, 1 << 5, 0, 0, 0).is_ok(), "the link's own time");
    link(&client, client.walk("plain").unwrap().node, b"second").unwrap();
    assert_eq!(fs::metadata(root.join("plain")).unwrap().nlink(), 2);
}

#[test]
fn nodes_follow_renames() {
    let directory = directory();
    let root = directory.path();
    let client = Client::read_write(root);
    let a = make_directory(&client, ROOT, b"a").unwrap();
    let b = make_directory(&client, ROOT, b"b").unwrap();
    let (file, _) = create(&client, a, b"file", 0o644).unwrap();
    rename(&client, (ROOT, b"a"), (b, b"c"), 0).unwrap();
    assert!(client.call(GETATTR, file, &fields(&[0, 0])).is_ok());
    assert!(root.join("b/c/file").exists());
    let (other, _) = create(&client, b, b"other", 0o600).unwrap();
    assert_eq!(rename(&client, (b, b"other"), (a, b"file"), 1), Err(Errno::EXIST), "NOREPLACE");
    rename(&client, (b, b"other"), (a, b"file"), 2).unwrap();
    let mode = |node| client.call(GETATTR, node, &fields(&[0, 0])).map(|reply| reply[76] & 0o77);
    assert_eq!((mode(file), mode(other)), (Ok(0o44), Ok(0)));
    assert!(rename(&client, (ROOT, b"b"), (a, b"below"), 0).is_err());
    assert_eq!(rename(&client, (ROOT, b"b"), (ROOT, b"d"), 4), Err(Errno::INVAL), "WHITEOUT");
    for (from, to) in
        [(b"../x".as_slice(), b"y".as_slice()), (b"b", b".."), (b"b", b"c/../../x"), (b"..", b"x")]
    {
        assert_eq!(rename(&client, (ROOT, from), (ROOT, to), 0), Err(Errno::INVAL));
    }
}

#[test]
fn hidden_names_cannot_be_made_or_replaced() {
    let directory = directory();
    let root = directory.path();
    fs::write(root.join(".env"), "secret").unwrap();
    fs::create_dir(root.join("d")).unwrap();
    fs::write(root.join("d/server.key"), "secret").unwrap();
    let client = Client::read_write(root);
    let (file, _) = create(&client, ROOT, b"file", 0o644).unwrap();
    assert_eq!(create(&client, ROOT, b".env", 0o644), Err(Errno::ACCESS));
    assert_eq!(create(&client, ROOT, b"new.pem", 0o644), Err(Errno::ACCESS));
    assert_eq!(make_directory(&client, ROOT, b".ssh"), Err(Errno::ACCESS));
    assert_eq!(link(&client, file, b".netrc").unwrap_err(), Errno::ACCESS);
    assert_eq!(client.call(SYMLINK, ROOT, &terminated(&[b".npmrc", b"x"])).unwrap_err(), Errno::ACCESS);
    assert_eq!(rename(&client, (ROOT, b"file"), (ROOT, b".env"), 0), Err(Errno::ACCESS));
    assert_eq!(rename(&client, (ROOT, b".env"), (ROOT, b"seen"), 0), Err(Errno::NOENT));
    assert_eq!(client.call(UNLINK, ROOT, b".env\0").unwrap_err(), Errno::NOENT);
    assert_eq!(fs::read(root.join(".env")).unwrap(), b"secret");
    rename(&client, (ROOT, b"d"), (ROOT, b"e"), 0).unwrap();
    assert_eq!(client.walk("e/server.key"), Err(Errno::NOENT), "moved along, still hidden");
}

#[test]
fn a_move_does_not_uncover_what_a_path_hides() {
    let directory = directory();
    let root = directory.path();
    fs::create_dir_all(root.join("conf/deep")).unwrap();
    fs::write(root.join("conf/deep/secret"), "x").unwrap();
    fs::write(root.join(".agentkernelignore"), "/conf/deep/secret\n").unwrap();
    let client = Client::read_write(root);
    assert_eq!(rename(&client, (ROOT, b"conf"), (ROOT, b"other"), 0), Err(Errno::ACCESS));
    let conf = client.walk("conf").unwrap().node;
    assert_eq!(rename(&client, (conf, b"deep"), (ROOT, b"deep"), 0), Err(Errno::ACCESS));
}

#[test]
fn guarded_paths_stay_as_they_are() {
    let directory = directory();
    let root = directory.path();
    fs::create_dir_all(root.join(".git/hooks")).unwrap();
    fs::write(root.join(".git/hooks/pre-commit"), "x").unwrap();
    fs::write(root.join(".envrc"), "x").unwrap();
    let client = Client::read_write(root);
    let hooks = client.walk(".git/hooks").unwrap().node;
    let hook = client.walk(".git/hooks/pre-commit").unwrap().node;
    let git = client.walk(".git").unwrap().node;
    let handle = client.open(hook, 0).unwrap();
    assert_eq!(client.read(hook, handle, 0, 9).unwrap(), b"x", "reading is fine");
    assert_eq!(client.write(hook, handle, 0, b"y"), Err(Errno::BADF));
    assert_eq!(client.open(hook, READ_WRITE), Err(Errno::ROFS));
    assert_eq!(client.open(hook, 0o1000), Err(Errno::ROFS), "truncation on open");
    assert_eq!(set(&client, hook, 1, 0o777, 0, 0).unwrap_err(), Errno::ROFS);
    assert_eq!(set(&client, hook, 1 << 3, 0, 0, 0).unwrap_err(), Errno::ROFS);
    assert_eq!(create(&client, hooks, b"post-commit", 0o755), Err(Errno::ROFS));
    assert_eq!(create(&client, git, b".envrc", 0o644), Err(Errno::ROFS), "at any depth");
    assert_eq!(client.call(UNLINK, ROOT, b".envrc\0").unwrap_err(), Errno::ROFS);
    assert_eq!(link(&client, hook, b"alias").unwrap_err(), Errno::ROFS);
    for (from, to) in [
        ((git, b"hooks".as_slice()), (ROOT, b"free".as_slice())),
        ((ROOT, b".git"), (ROOT, b"free")),
        ((hooks, b"pre-commit"), (ROOT, b"free")),
    ] {
        assert_eq!(rename(&client, from, to, 0), Err(Errno::ROFS), "neither it nor what holds it moves");
    }
    // A directory prepared elsewhere cannot become a guarded one.
    let free = make_directory(&client, ROOT, b"free").unwrap();
    make_directory(&client, free, b"hooks").unwrap();
    let nested = make_directory(&client, ROOT, b"nested").unwrap();
    assert_eq!(rename(&client, (ROOT, b"free"), (nested, b".git"), 0), Err(Errno::ROFS));
    assert_eq!(rename(&client, (ROOT, b"free"), (ROOT, b".git"), 2), Err(Errno::ROFS), "nor by exchange");
    create(&client, git, b"index", 0o644).unwrap();
    assert_eq!(fs::read(root.join(".git/hooks/pre-commit")).unwrap(), b"x");
}

#[test]
fn programs_the_host_runs_as_others_are_not_written() {
    let directory = directory();
    let path = directory.path().join("program");
    fs::write(&path, "x").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).unwrap();
    let client = Client::read_write(directory.path());
    let node = client.walk("program").unwrap().node;
    assert_eq!(client.open(node, WRITE_ONLY), Err(Errno::PERM));
    assert_eq!(set(&client, node, 1 << 3, 0, 0, 0).unwrap_err(), Errno::PERM);
}

#[test]
fn a_fifo_never_hangs_and_a_swapped_file_is_noticed() {
    let directory = directory();
    let root = directory.path();
    let client = Client::read_write(root);
    make_node(&client, b"fifo", 0o010_644).unwrap();
    let fifo = client.walk("fifo").unwrap().node;
    for flags in [0, WRITE_ONLY, READ_WRITE] {
        assert_eq!(client.open(fifo, flags), Err(Errno::NXIO));
    }
    assert_eq!(set(&client, fifo, 1 << 3, 0, 0, 0).unwrap_err(), Errno::INVAL);
    let mut body = halves(&[READ_WRITE | 0o100, 0o644, 0, 0]);
    body.extend(terminated(&[b"fifo"]));
    assert_eq!(client.call(CREATE, ROOT, &body), Err(Errno::NXIO), "nor through CREATE");
    let (file, _) = create(&client, ROOT, b"file", 0o644).unwrap();
    fs::rename(root.join("fifo"), root.join("file")).unwrap();
    assert_eq!(client.open(file, READ_WRITE), Err(Errno::STALE));
    symlink("/etc/passwd", root.join("new")).unwrap();
    fs::rename(root.join("new"), root.join("file")).unwrap();
    assert_eq!(client.open(client.walk("file").unwrap().node, 0), Err(Errno::NXIO));
}
