//! What a guest reads, of workspaces and of a host image.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use super::*;
use crate::files::HostImageOptions;
use crate::workspace::{Base, BaseTable};

#[test]
fn the_session_starts_with_what_both_sides_know() {
    let directory = directory();
    let init = |minor: u32, flags: u32| {
        let client = Client::read_only(directory.path());
        client.call(INIT, 0, &halves(&[7, minor, 128 << 10, flags]))
    };
    let reply = init(36, u32::MAX).unwrap();
    assert_eq!(reply.len(), 64);
    assert_eq!(&reply[..8], halves(&[7, 36]));
    assert_eq!(u32::from_le_bytes(reply[20..24].try_into().unwrap()), 1 << 20, "largest write");
    assert_eq!(u16::from_le_bytes(reply[28..30].try_into().unwrap()), 256, "pages in a request");
    let flags = u32::from_le_bytes(reply[12..16].try_into().unwrap());
    assert_eq!(flags & (1 << 17 | 1 << 24), 1 << 17 | 1 << 24, "no OPEN, no OPENDIR");
    assert_eq!(&init(99, 0).unwrap()[4..8], halves(&[38]));
    assert_eq!(init(30, 0), Err(Errno::PROTO));
}

#[test]
fn odd_names_links_and_special_files_are_served_as_they_are() {
    let directory = directory();
    let root = directory.path();
    let long = [b'n'; 255];
    for name in [b"line\nbreak".as_slice(), b"\xff\xfe", b" ", b"-rf", &long] {
        fs::write(root.join(OsStr::from_bytes(name)), name).unwrap();
    }
    symlink("loop", root.join("loop")).unwrap();
    symlink("/etc/shadow", root.join("away")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        root.join("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let short = tempfile::Builder::new().prefix("s").tempdir_in(root).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        root.join("socket"),
        rustix::fs::FileType::Socket,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    drop(short);

    let client = Client::read_only(root);
    for name in [b"line\nbreak".as_slice(), b"\xff\xfe", b" ", b"-rf", &long] {
        let found = client.lookup(ROOT, name).unwrap();
        assert_eq!(client.read(found.node, 0, 0, 4096).unwrap(), name);
    }
    let link = client.walk("loop").unwrap();
    assert_eq!(client.call(READLINK, link.node, &[]).unwrap(), b"loop");
    let away = client.walk("away").unwrap();
    assert_eq!(client.call(READLINK, away.node, &[]).unwrap(), b"/etc/shadow");
    assert_eq!(client.read(away.node, 0, 0, 10), Err(Errno::NXIO), "a symlink is never followed");
    assert_eq!(client.lookup(away.node, b"x"), Err(Errno::NOTDIR));
    for (name, kind) in [("fifo", 0o010_000), ("socket", 0o140_000)] {
        let special = client.walk(name).unwrap();
        assert_eq!(special.mode & 0o170_000, kind);
        assert_eq!(client.read(special.node, 0, 0, 10), Err(Errno::NXIO), "never opened, so never hangs");
    }
    assert_eq!(client.list(ROOT, false, 4096).unwrap().len(), 11);
}

#[test]
fn directories_of_any_size_are_listed_once_each_in_small_pages() {
    let directory = directory();
    for number in 0..700 {
        fs::write(directory.path().join(format!("file-{number}")), "").unwrap();
    }
    let client = Client::read_only(directory.path());
    for (plus, page) in [(false, 200), (true, 400), (true, 1 << 20)] {
        let mut names = client.list(ROOT, plus, page).unwrap();
        names.sort();
        names.dedup_by(|left, right| left.0 == right.0);
        assert_eq!(names.len(), 702);
        for (_, node) in names.into_iter().filter(|&(_, node)| node != 0) {
            client.forget(node, 1);
        }
    }
    assert_eq!(client.server.node_count(), 1, "each entry was counted once");
}

#[test]
fn large_reads_are_whole_and_bounded() {
    let directory = directory();
    let content: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
    fs::write(directory.path().join("large"), &content).unwrap();
    let client = Client::read_only(directory.path());
    let node = client.walk("large").unwrap().node;
    assert_eq!(client.read(node, 0, 0, 1 << 20).unwrap(), content[..1 << 20]);
    assert_eq!(client.read(node, 0, 2_999_990, 1 << 20).unwrap(), content[2_999_990..]);
    assert_eq!(client.read(node, 0, 0, u32::MAX).unwrap().len(), 1 << 20);
    assert_eq!(client.read(node, 0, i64::MAX as u64, 100).unwrap_or_default(), b"");
    assert_eq!(client.read(node, 0, u64::MAX, 100), Err(Errno::INVAL));
    let mut reply = Vec::new();
    for size in [1 << 20, 4096, 17, 1 << 20] {
        let bytes = request(READ, node, &fields(&[0, 5, size, 0, 0]));
        assert!(client.server.handle_into(&bytes, &mut reply));
        assert_eq!(reply[16..], content[5..5 + size as usize], "a buffer used again");
    }
}

#[test]
fn a_read_only_export_is_cached_and_refuses_changes() {
    let directory = directory();
    fs::write(directory.path().join("file"), "x").unwrap();
    let client = Client::read_only(directory.path());
    let reply = client.call(LOOKUP, ROOT, b"file\0").unwrap();
    assert_eq!(u64_at(&reply, 16), 86_400);
    let reply = client.call(LOOKUP, ROOT, b"nothing\0").unwrap();
    assert_eq!((u64_at(&reply, 0), u64_at(&reply, 16)), (0, 86_400), "absence is remembered, too");
    let node = client.walk("file").unwrap().node;
    assert_eq!(client.open(node, 0), Err(Errno::NOSYS));
    assert_eq!(client.call(OPENDIR, ROOT, &[0; 8]), Err(Errno::NOSYS));
    for opcode in [SETATTR, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, WRITE, CREATE, RENAME2] {
        assert_eq!(client.call(opcode, ROOT, b"file\0file\0"), Err(Errno::ROFS));
    }
    assert!(client.call(STATFS, ROOT, &[]).is_ok_and(|reply| reply.len() == 80));
}

#[test]
fn hidden_files_do_not_exist_for_the_guest() {
    let directory = directory();
    let root = directory.path();
    fs::create_dir_all(root.join("a/private")).unwrap();
    for file in [".env", ".env.example", "a/key.pem", "a/private/x", "a/plain"] {
        fs::write(root.join(file), "").unwrap();
    }
    fs::write(root.join(".agentkernelignore"), "private/\n").unwrap();
    let client = Client::read_only(root);
    assert_eq!(client.names(ROOT), [".agentkernelignore", ".env.example", "a"]);
    assert_eq!(client.names(client.walk("a").unwrap().node), ["plain"]);
    for path in [".env", "a/key.pem", "a/private"] {
        assert_eq!(client.walk(path), Err(Errno::NOENT));
        assert!(!client.server.export().visible(&root.join(path)));
    }
    let plus = client.list(ROOT, true, 1 << 16).unwrap();
    assert_eq!(plus.len(), 5);

    fs::write(root.join(".agentkernelignore"), "[z-a]\n").unwrap();
    assert!(Export::workspace(root, Access::ReadOnly, None).is_err());
    fs::remove_file(root.join(".agentkernelignore")).unwrap();
    symlink("/dev/zero", root.join(".agentkernelignore")).unwrap();
    assert!(Export::workspace(root, Access::ReadOnly, None).is_err(), "not through a symlink");
}

#[test]
fn bases_are_what_files_were_when_first_served() {
    let directory = directory();
    let root = directory.path();
    fs::create_dir(root.join("d")).unwrap();
    fs::write(root.join("d/file"), "one").unwrap();
    fs::write(root.join("listed"), "").unwrap();
    let bases = Arc::new(BaseTable::default());
    let export = Export::workspace(root, Access::ReadOnly, Some(Arc::clone(&bases))).unwrap();
    let client = Client::new(export);
    let first = Base::of(&fs::symlink_metadata(root.join("d/file")).unwrap());
    let file = client.walk("d/file").unwrap();
    fs::write(root.join("d/file"), "other").unwrap();
    client.call(GETATTR, file.node, &fields(&[0, 0])).unwrap();
    assert_eq!(bases.get(Path::new("d/file")), Some(first));
    assert_eq!(bases.get(Path::new("d")), Some(Base::of(&fs::symlink_metadata(root.join("d")).unwrap())));
    assert_eq!(bases.get(Path::new("listed")), None);
    client.list(ROOT, true, 4096).unwrap();
    assert!(bases.get(Path::new("listed")).is_some());
}

#[test]
fn a_replaced_file_is_never_mixed_with_the_old_one() {
    let directory = directory();
    let root = directory.path();
    fs::create_dir(root.join("d")).unwrap();
    fs::write(root.join("d/file"), "old").unwrap();
    fs::write(root.join("new"), "newer").unwrap();
    let client = Client::read_only(root);
    let old = client.walk("d/file").unwrap();
    assert_eq!(client.read(old.node, 0, 0, 9).unwrap(), b"old");
    fs::rename(root.join("new"), root.join("d/file")).unwrap();
    assert_eq!(client.read(old.node, 0, 0, 9).unwrap(), b"old", "still open");
    let messages = client.server.invalidate(Path::new("d/file"));
    assert_eq!(messages.iter().map(|message| message[4]).collect::<Vec<_>>(), [2, 3]);
    for message in &messages {
        assert_eq!(u32::from_le_bytes(message[..4].try_into().unwrap()) as usize, message.len());
    }
    assert_eq!(messages[1][32..], *b"file\0");
    assert_eq!(client.read(old.node, 0, 0, 9), Err(Errno::STALE));
    assert_eq!(client.read(client.walk("d/file").unwrap().node, 0, 0, 9).unwrap(), b"newer");
    assert_eq!(client.server.invalidate(Path::new("d/absent")).len(), 1, "absence is cached, too");
    assert!(client.server.invalidate(Path::new("never/seen")).is_empty());
    assert!(client.server.invalidate(Path::new("")).is_empty());
}

/// A small host: toolchain directories in a closed home, a few system files.
fn host(root: &Path) -> Client {
    for directory in ["usr/bin", "usr/lib/closed", "etc/ssl/private", "home/ann/.cargo/bin", "home/ann/.ssh"]
    {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    symlink("usr/bin", root.join("bin")).unwrap();
    for (file, mode) in [
        ("usr/bin/true", 0o755),
        ("usr/bin/mine", 0o700),
        ("usr/lib/closed/inner", 0o644),
        ("etc/passwd", 0o644),
        ("etc/shadow", 0o644),
        ("etc/hosts", 0o644),
        ("etc/ssl/private/x", 0o644),
        ("home/ann/.cargo/bin/cargo", 0o700),
        ("home/ann/.cargo/credentials.toml", 0o644),
        ("home/ann/.ssh/id_rsa", 0o644),
        ("top", 0o644),
    ] {
        fs::write(root.join(file), file).unwrap();
        fs::set_permissions(root.join(file), fs::Permissions::from_mode(mode)).unwrap();
    }
    symlink("/usr/bin/true", root.join("usr/bin/absolute")).unwrap();
    symlink("ring", root.join("usr/bin/ring")).unwrap();
    fs::set_permissions(root.join("usr/lib/closed"), fs::Permissions::from_mode(0o710)).unwrap();
    fs::set_permissions(root.join("home/ann"), fs::Permissions::from_mode(0o700)).unwrap();
    let toolchains = vec![PathBuf::from("/home/ann/.cargo/bin"), PathBuf::from("/home/ann/.nothing")];
    Client::new(Export::host_image_at(root, HostImageOptions { toolchains }).unwrap())
}

#[test]
fn a_host_image_shows_what_nobody_may_see() {
    let directory = directory();
    let client = host(directory.path());
    assert_eq!(client.names(ROOT), ["bin", "etc", "home", "usr"]);
    assert_eq!(client.names(client.walk("usr/bin").unwrap().node), ["absolute", "ring", "true"]);
    assert_eq!(client.names(client.walk("etc").unwrap().node), ["passwd", "ssl"]);
    assert_eq!(client.names(client.walk("home/ann").unwrap().node), [".cargo"]);
    assert_eq!(client.names(client.walk("home/ann/.cargo").unwrap().node), ["bin"]);
    assert_eq!(client.walk("home/ann").unwrap().mode & 0o777, 0o755);
    let cargo = client.walk("home/ann/.cargo/bin/cargo").unwrap();
    assert_eq!(client.read(cargo.node, 0, 0, 100).unwrap(), b"home/ann/.cargo/bin/cargo");
    for hidden in [
        "top",
        "usr/bin/mine",
        "usr/lib/closed",
        "etc/shadow",
        "etc/hosts",
        "etc/ssl/private",
        "home/ann/.ssh",
        "home/ann/.cargo/credentials.toml",
    ] {
        assert_eq!(client.walk(hidden), Err(Errno::NOENT), "{hidden}");
    }
}

#[test]
fn what_the_host_closes_later_is_closed() {
    let directory = directory();
    let client = host(directory.path());
    let file = client.walk("etc/passwd").unwrap();
    let ssl = client.walk("etc/ssl").unwrap();
    let close = |path: &str| {
        fs::set_permissions(directory.path().join(path), fs::Permissions::from_mode(0o600)).unwrap();
    };
    close("etc/passwd");
    assert_eq!(client.read(file.node, 0, 0, 10), Err(Errno::NOENT));
    close("etc/ssl");
    assert_eq!(client.lookup(ssl.node, b"anything"), Err(Errno::NOENT));
    let inner = client.walk("home/ann/.cargo/bin/cargo").unwrap();
    close("home/ann/.cargo/bin");
    assert_eq!(
        client.read(inner.node, 0, 0, 10),
        Err(Errno::NOENT),
        "what lies below a closed directory, too"
    );
    for path in ["home/ann/.cargo/bin", "etc/ssl"] {
        fs::set_permissions(directory.path().join(path), fs::Permissions::from_mode(0o700)).unwrap();
    }
}

#[test]
fn the_engine_can_ask_what_the_guest_would_find() {
    let directory = directory();
    let root = directory.path();
    let client = host(root);
    let export = client.server.export();
    let entry = |path: &str| export.entry(&root.join(path));
    assert!(entry("bin/true").is_some_and(|entry| !entry.directory && entry.mode & 0o111 != 0));
    assert!(entry("usr").is_some_and(|entry| entry.directory));
    assert!(entry("usr/bin/../../bin/./true").is_some());
    for hidden in ["bin/mine", "etc/shadow", "usr/bin/ring", "nothing", "usr/lib/closed/inner"] {
        assert_eq!(entry(hidden), None, "{hidden}");
    }
    assert!(!export.visible(Path::new("/proc/self")));
    let host = Export::host_image(HostImageOptions::default()).unwrap();
    assert!(host.visible(Path::new("/bin/sh")) && !host.visible(Path::new("/etc/shadow")));
    for path in ["relative", "/", "/a/../b"] {
        let options = HostImageOptions { toolchains: vec![path.into()] };
        assert!(Export::host_image(options).is_err(), "{path}");
    }
}

#[test]
fn a_socket_in_use_is_not_touched() {
    let directory = directory();
    let path = directory.path().join("s");
    // The path of a listening socket has to be short: bind relative to the directory's descriptor.
    let parent = fs::File::open(directory.path()).unwrap();
    let near = format!("/proc/self/fd/{}/s", std::os::fd::AsRawFd::as_raw_fd(&parent));
    let listener = UnixListener::bind(near).unwrap();
    listener.set_nonblocking(true).unwrap();
    let client = Client::read_only(directory.path());
    let node = client.walk("s").unwrap().node;
    assert_eq!(client.read(node, 0, 0, 1), Err(Errno::NXIO));
    assert!(listener.accept().is_err(), "nobody connected");
    assert!(path.exists());
}
