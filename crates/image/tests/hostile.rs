//! Images made to do harm, or broken on the way: each is refused with an error that says why, or rendered harmless.

mod common;

use std::fs;

use agentkernel_image::{Digest, Limits};
use common::{Fixture, INDEX, LAYER, chain, entry, file, gzip, pax, sized_entry, tar, zstd};

/// Prepares an image of these layers; the error's text.
fn refusal(layers: &[Vec<u8>]) -> String {
    chain(&Fixture::image(layers).prepare().expect_err("a hostile image was accepted"))
}

#[test]
fn hostile_layers_are_refused_by_name() {
    let mut bad_checksum = file("x", b"");
    bad_checksum[0] = b'y';
    let cases: Vec<(Vec<Vec<u8>>, &str)> = vec![
        (vec![file("../escape", b"")], r#""../escape" leads out"#),
        (vec![file("a/../../escape", b"")], "leads out"),
        (vec![file("/../escape", b"")], "leads out"),
        (vec![entry(b'1', b"link", b"../../etc/passwd", b"")], r#""link" leads out"#),
        (vec![entry(b'1', b"link", b"/etc/passwd", b"")], r#"hard link to "/etc/passwd", which is not"#),
        (vec![entry(b'1', b"link", b"later", b""), file("later", b"")], "not an earlier file"),
        (vec![entry(b'5', b"d", b"", b""), entry(b'1', b"link", b"d", b"")], "not an earlier file"),
        (vec![entry(b'2', b"link", b"", b"")], "bad target"),
        (vec![file("./", b""), file(".", b"x")], "the root is not a directory"),
        (vec![file(".wh.", b"")], "bad name of a whiteout"),
        (vec![file(".wh...", b"")], "bad name of a whiteout"),
        (vec![entry(b'Z', b"odd", b"", b"")], "unsupported type 'Z'"),
        (vec![bad_checksum], "checksum"),
        (vec![pax(&[("path", b"a\0b")]), file("x", b"")], "zero byte"),
        (vec![pax(&[("path", &[b'n'; 256])]), file("x", b"")], "longer than 255"),
        (vec![pax(&[("path", &b"d/".repeat(2100))]), file("x", b"")], "longer than 4095"),
        (vec![pax(&[("uid", b"4294967296")]), file("x", b"")], "owner is out of range"),
        (vec![pax(&[("SCHILY.xattr.user.x", &[0; 65_536])]), file("x", b"")], "larger than 65535"),
        (vec![pax(&[("size", b"18446744073709551615")]), file("x", b"")], "size is out of range"),
        (
            vec![pax(&[("GNU.sparse.realsize", b"9"), ("GNU.sparse.map", b"5,9")]), file("x", b"")],
            "out of range",
        ),
        (
            vec![pax(&[("GNU.sparse.realsize", b"99"), ("GNU.sparse.map", b"5,9,6,1")]), file("x", b"")],
            "overlap",
        ),
        (vec![entry(b'x', b"pax", b"", b"99 a=b\n"), file("x", b"")], "malformed record"),
        (vec![sized_entry(b'x', b"pax", b"", b"", 10 << 30)], "larger than 1 MiB"),
        (vec![sized_entry(b'L', b"name", b"", b"", 10 << 30)], "larger than 1 MiB"),
        (vec![sized_entry(b'0', b"short", b"", b"data", 1 << 20)], "ends early"),
        (
            vec![entry(b'2', b"a", b"b", b""), entry(b'2', b"b", b"a", b""), file("a/x", b"")],
            "too many symbolic links",
        ),
    ];
    for (entries, expected) in cases {
        let text = refusal(&[tar(&entries)]);
        assert!(text.contains(expected), "expected {expected:?} in {text:?}");
        assert!(text.starts_with("cannot read layer 1 of 1 (sha256:"), "{text}");
    }
}

#[test]
fn limits_hold_and_name_themselves() {
    let limits = Limits {
        entries: 10,
        total_bytes: 1 << 20,
        metadata_bytes: 4096,
        compression_ratio: 10,
        ratio_floor_bytes: 100_000,
    };
    let sparse =
        [pax(&[("GNU.sparse.realsize", b"10737418240"), ("GNU.sparse.map", b"0,0")]), file("x", b"")];
    let zeros = tar(&[file("zeros", &[0; 900_000])]);
    let cases = [
        (tar(&vec![file("x", b""); 11]), "more than 10 entries"),
        (tar(&[file("x", &[1; 2 << 20])]), "more than 1048576 bytes"),
        (tar(&sparse), "more than 1048576 bytes"),
        (tar(&[pax(&[("SCHILY.xattr.user.x", &[b'v'; 4096])]), file("x", b"")]), "more than 4096 bytes"),
    ];
    let check = |fixture: &Fixture, expected: &str| {
        let text = chain(&fixture.prepare_within(&fixture.layout(), None, &limits).unwrap_err());
        assert!(text.contains(expected), "expected {expected:?} in {text:?}");
    };
    for (layer, expected) in cases {
        check(&Fixture::image(&[layer]), expected);
    }
    for pack in [gzip, zstd] {
        let fixture = Fixture::new();
        let manifest = fixture.manifest(std::slice::from_ref(&zeros), |tar| (LAYER.into(), pack(tar)));
        fixture.index(&[&manifest]);
        check(&fixture, "more than 10 times");
    }
}

/// A 10 GiB hole costs no disk and no time.
#[test]
fn a_sparse_member_stays_sparse() {
    use std::os::unix::fs::MetadataExt;
    let sparse =
        [pax(&[("GNU.sparse.realsize", b"10737418240"), ("GNU.sparse.map", b"0,4")]), file("x", b"data")];
    let fixture = Fixture::image(&[tar(&sparse)]);
    let metadata = fs::metadata(fixture.prepare().unwrap().root_file_system).unwrap();
    assert!(metadata.len() > 10 << 30);
    assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
}

#[test]
fn damaged_blobs_are_refused() {
    let content = tar(&[file("x", &[7; 5000])]);
    let damage = |change: &dyn Fn(&mut Vec<u8>), pack: fn(&[u8]) -> Vec<u8>| {
        let fixture = Fixture::new();
        let packed = pack(&content);
        let manifest = fixture.manifest(std::slice::from_ref(&content), |_| (LAYER.into(), packed.clone()));
        fixture.index(&[&manifest]);
        let path = fixture.layout().join("blobs/sha256").join(Digest::of(&packed).hex());
        let mut bytes = packed.clone();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
        chain(&fixture.prepare().expect_err("damage went unnoticed"))
    };
    let plain: fn(&[u8]) -> Vec<u8> = <[u8]>::to_vec;
    let text = damage(&|bytes| bytes[600] ^= 1, plain);
    assert!(text.contains("digest is sha256:"), "{text}");
    // Behind the tar's end, where only the digest can tell.
    let text = damage(&|bytes| *bytes.last_mut().unwrap() = 1, plain);
    assert!(text.contains("digest is sha256:"), "{text}");
    let text = damage(&|bytes| bytes.truncate(1000), plain);
    assert!(text.contains("has 1000 bytes, not"), "{text}");
    for pack in [gzip, zstd] {
        // Anything may be noticed first: the stream, the tar in it or the digest.
        damage(
            &|bytes| {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0x55;
            },
            pack,
        );
    }
    // Other content than the configuration promises, all blobs intact.
    let fixture = Fixture::new();
    let manifest = fixture.manifest(&[content], |_| (LAYER.into(), gzip(&tar(&[file("y", b"")]))));
    fixture.index(&[&manifest]);
    let text = chain(&fixture.prepare().unwrap_err());
    assert!(text.contains("but the image's configuration says"), "{text}");
}

#[test]
fn documents_are_checked_before_they_are_believed() {
    let layer = tar(&[file("x", b"")]);
    let plain = |tar: &[u8]| (LAYER.to_owned(), tar.to_vec());
    type Case<'a> = (&'a str, Box<dyn Fn(&Fixture) + 'a>);
    let cases: Vec<Case> = vec![
        ("holds no image", Box::new(|fixture| fixture.index(&[]))),
        ("is no OCI image layout", Box::new(|_| {})),
        (
            "image's index.json is invalid",
            Box::new(|fixture| fs::write(fixture.layout().join("index.json"), "{").unwrap()),
        ),
        (
            "index.json is too large",
            Box::new(|fixture| fs::write(fixture.layout().join("index.json"), vec![b' '; 5 << 20]).unwrap()),
        ),
        (
            "cannot read index.json",
            Box::new(|fixture| {
                std::os::unix::fs::symlink("/etc/passwd", fixture.layout().join("index.json")).unwrap()
            }),
        ),
        (
            "not made for linux/amd64, but for linux/arm64",
            Box::new(|fixture| {
                let manifest = fixture.manifest_for("arm64", std::slice::from_ref(&layer), plain);
                fixture.index(&[&manifest]);
            }),
        ),
        (
            "but for linux/s390x",
            Box::new(|fixture| {
                let manifest = fixture.manifest(std::slice::from_ref(&layer), plain)
                    + r#","platform":{"os":"linux","architecture":"s390x"}"#;
                fixture.index(&[&manifest]);
            }),
        ),
        (
            "is encrypted",
            Box::new(|fixture| {
                let pack = |tar: &[u8]| (format!("{LAYER}+gzip+encrypted"), tar.to_vec());
                let manifest = fixture.manifest(std::slice::from_ref(&layer), pack);
                fixture.index(&[&manifest]);
            }),
        ),
        (
            "layer is of unsupported type",
            Box::new(|fixture| {
                let manifest =
                    fixture.manifest(std::slice::from_ref(&layer), |tar| ("text/html".into(), tar.to_vec()));
                fixture.index(&[&manifest]);
            }),
        ),
        (
            "lacks its blob sha256:",
            Box::new(|fixture| {
                let manifest = fixture.manifest(std::slice::from_ref(&layer), plain);
                fixture.index(&[&manifest]);
                fs::remove_file(fixture.layout().join("blobs/sha256").join(Digest::of(&layer).hex()))
                    .unwrap();
            }),
        ),
        (
            "nested too deep",
            Box::new(|fixture| {
                let mut descriptor = fixture.manifest(std::slice::from_ref(&layer), plain);
                for _ in 0..5 {
                    let index = format!(r#"{{"schemaVersion":2,"manifests":[{descriptor}}}]}}"#);
                    descriptor = fixture.blob(INDEX, index.as_bytes());
                }
                fixture.index(&[&descriptor]);
            }),
        ),
        (
            "an index and a manifest at once",
            Box::new(|fixture| {
                let both = fixture.blob(INDEX, br#"{"schemaVersion":2,"manifests":[],"layers":[]}"#);
                fixture.index(&[&both]);
            }),
        ),
        (
            "not a sha256 digest",
            Box::new(|fixture| {
                fixture.index(&[r#"{"mediaType":"x","size":1,"digest":"sha256:../../../etc/passwd""#])
            }),
        ),
    ];
    for (expected, spoil) in cases {
        let fixture = Fixture::new();
        spoil(&fixture);
        let text = chain(&fixture.prepare().expect_err(expected));
        assert!(text.contains(expected), "expected {expected:?} in {text:?}");
    }
}

#[test]
fn blobs_behind_links_are_refused() {
    let fixture = Fixture::image(&[tar(&[file("x", b"")])]);
    let blobs = fixture.layout().join("blobs/sha256");
    let outside = fixture.directory.path().join("outside");
    fs::rename(&blobs, &outside).unwrap();
    std::os::unix::fs::symlink(&outside, &blobs).unwrap();
    assert!(chain(&fixture.prepare().unwrap_err()).starts_with("cannot read blobs/sha256/"));
}

#[test]
fn archives_are_bounded_and_checked() {
    let fixture = Fixture::image(&[tar(&[file("x", &[1; 100_000])])]);
    let archive = fixture.archive();
    let path = fixture.directory.path().join("image.tar");
    let refused = |bytes: &[u8], limits: &Limits| {
        fs::write(&path, bytes).unwrap();
        chain(&fixture.prepare_within(&path, None, limits).unwrap_err())
    };
    let text = refused(&archive[..archive.len() / 2], &Limits::default());
    assert!(text.contains("ends early"), "{text}");
    let text = refused(b"not an archive at all", &Limits::default());
    assert!(text.contains("cannot read the archive"), "{text}");
    let text = refused(&gzip(&archive), &Limits { total_bytes: 1000, ..Limits::default() });
    assert!(text.contains("more than 1000 bytes"), "{text}");
    let text = refused(&gzip(&archive)[..200], &Limits::default());
    assert!(text.contains("damaged gzip stream"), "{text}");
}
