//! The store: what comes in comes out the same, is there once, and only whole; what is damaged is told.

mod common;

use std::collections::HashSet;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use agentkernel_image::{Digest, Reference, RootFileSystem, Store, StoreError};
use common::{Fixture, INDEX, LAYER, MANIFEST, file, gzip, tar, zstd};

fn reference(text: &str) -> Reference {
    text.parse().unwrap()
}

/// A layout of two images that share a layer, by their full names.
fn two_images(pack: impl Fn(&[u8]) -> (String, Vec<u8>) + Copy) -> Fixture {
    let fixture = Fixture::new();
    let base = tar(&[file("base", b"base")]);
    let open = |name: &str, layers: &[Vec<u8>]| {
        let open = fixture.manifest(layers, pack);
        format!(r#"{open},"annotations":{{"io.containerd.image.name":"{name}"}}"#)
    };
    let one = open("docker.io/library/one:1", std::slice::from_ref(&base));
    let two = open("registry.example/two:latest", &[base.clone(), tar(&[file("more", b"more")])]);
    fixture.index(&[&one, &two]);
    fixture
}

fn blobs(store: &Store) -> usize {
    fs::read_dir(store.path().join("blobs/sha256")).unwrap().count()
}

fn store() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("images")).unwrap();
    (directory, store)
}

#[test]
fn images_come_in_in_every_form_and_go_out_again() {
    type Pack = fn(&[u8]) -> (String, Vec<u8>);
    let packs: [Pack; 3] = [
        |tar| (LAYER.into(), tar.to_vec()),
        |tar| (format!("{LAYER}+gzip"), gzip(tar)),
        |tar| (format!("{LAYER}+zstd"), zstd(tar)),
    ];
    for pack in packs {
        let fixture = two_images(pack);
        let archive = fixture.directory.path().join("images.tar");
        fs::write(&archive, gzip(&fixture.archive())).unwrap();
        for source in [fixture.layout(), archive] {
            let (directory, store) = store();
            let loaded = store.load(&source, None, None, &mut |_| {}).unwrap();
            let names: Vec<_> = loaded.iter().map(|image| image.name.as_str()).collect();
            assert_eq!(names, ["docker.io/library/one:1", "registry.example/two:latest"]);
            // Two manifests, two configurations, two layers.
            assert_eq!(blobs(&store), 6);
            store.verify().unwrap();
            let one = store.find("one:1").unwrap();
            assert_eq!(store.find(&one.image_id.hex()[..12]).unwrap().digest, one.digest);
            assert_eq!(one.config.env, ["A=b"]);

            let saved = directory.path().join("saved.tar");
            let images: Vec<_> = loaded.iter().map(|image| store.find(&image.name).unwrap()).collect();
            store.save(&images, fs::File::create(&saved).unwrap()).unwrap();
            let (_other_directory, other) = self::store();
            let again = other.load(&saved, None, None, &mut |_| {}).unwrap();
            assert_eq!(again.len(), 2);
            assert_eq!(other.find("registry.example/two").unwrap().digest, images[1].digest);
            let same = directory.path().join("again.tar");
            other.save(&again, fs::File::create(&same).unwrap()).unwrap();
            assert!(fs::read(&saved).unwrap() == fs::read(&same).unwrap());
            // As older versions of Docker read and write it.
            let docker = only_docker(&saved);
            fs::write(&same, docker).unwrap();
            let (_third_directory, third) = self::store();
            let names: Vec<_> = third
                .load(&same, None, None, &mut |_| {})
                .unwrap()
                .into_iter()
                .map(|image| image.name)
                .collect();
            assert_eq!(names, ["docker.io/library/one:1", "registry.example/two:latest"]);
            assert_eq!(third.find("one:1").unwrap().image_id, one.image_id);

            let prepared =
                RootFileSystem::prepare(store.path(), Some(&one.name), &fixture.cache(), &mut |_| {})
                    .unwrap();
            assert_eq!(prepared.digest, one.digest.to_string());
        }
    }
}

/// The archive without its OCI documents.
fn only_docker(archive: &Path) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut source = tar::Archive::new(fs::File::open(archive).unwrap());
    for entry in source.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().into_owned();
        if path != Path::new("index.json") && path != Path::new("oci-layout") {
            let mut header = entry.header().clone();
            builder.append_data(&mut header, path, &mut entry).unwrap();
        }
    }
    builder.into_inner().unwrap()
}

#[test]
fn names_come_and_go_and_prune_takes_what_none_leads_to() {
    let (_directory, store) = store();
    let fixture = two_images(|tar| (LAYER.into(), tar.to_vec()));
    store.load(&fixture.layout(), None, None, &mut |_| {}).unwrap();
    let two = store.find("registry.example/two").unwrap();
    store.tag(&two, &reference("other")).unwrap();
    assert!(store.untag(&reference("registry.example/two")).unwrap());
    assert!(!store.untag(&reference("registry.example/two")).unwrap());
    assert_eq!(store.prune(&HashSet::new(), false).unwrap().blobs, 0);
    assert_eq!(store.find("other").unwrap().digest, two.digest);

    assert!(store.untag(&reference("other")).unwrap());
    let upper = two.layers[1].digest;
    // Somebody else still needs one of the layers.
    let kept = HashSet::from([upper]);
    assert_eq!(store.prune(&kept, true).unwrap().blobs, 2);
    assert_eq!(blobs(&store), 6);
    assert_eq!(store.prune(&kept, false).unwrap().blobs, 2);
    assert_eq!(store.prune(&HashSet::new(), false).unwrap().blobs, 1);
    store.verify().unwrap();
    assert_eq!(store.find("one:1").unwrap().layers.len(), 1);

    for (text, expected) in [("onee:1", Some("one:1")), ("nothing-like-it", None)] {
        match store.find(text) {
            Err(StoreError::NotFound { nearest, .. }) => assert_eq!(nearest.as_deref(), expected),
            other => panic!("{text}: {other:?}"),
        }
    }
    assert!(matches!(store.find("-x"), Err(StoreError::Reference(_))));
}

#[test]
fn what_is_being_added_is_not_pruned_and_what_was_abandoned_is() {
    let (_directory, store) = store();
    let writing = store.writing().unwrap();
    writing.document("text/plain", b"a blob").unwrap();
    assert!(matches!(store.prune(&HashSet::new(), false), Err(StoreError::Busy { .. })));
    assert!(store.contains(&Digest::of(b"a blob"), 6));
    let mut blob = writing.blob().unwrap();
    blob.write_all(b"half").unwrap();
    let scratch = fs::read_dir(store.path().join("ingest")).unwrap().next().unwrap().unwrap().path();
    // As a process killed here leaves it: unlocked, and with a name.
    let left = scratch.with_file_name("tmp-1-99999");
    fs::copy(&scratch, &left).unwrap();
    drop(store.writing().unwrap());
    assert!(scratch.exists() && !left.exists());
    let wrong = blob.finish(Some((Digest::of(b"whole"), 4)));
    assert!(matches!(wrong, Err(StoreError::WrongDigest { .. })), "{wrong:?}");
    assert!(!scratch.exists());
    drop(writing);
    assert_eq!(store.prune(&HashSet::new(), false).unwrap().bytes, 6);
}

#[test]
fn damage_is_found_and_nothing_damaged_gets_a_name() {
    let (_directory, store) = store();
    let fixture = two_images(|tar| (format!("{LAYER}+gzip"), gzip(tar)));
    // A truncated layer in the source.
    let layers: Vec<_> = fs::read_dir(fixture.layout().join("blobs/sha256"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| fs::read(path).unwrap().starts_with(&[0x1f, 0x8b]))
        .collect();
    let whole = fs::read(&layers[0]).unwrap();
    for damaged in [&whole[..whole.len() - 1], &[&whole[..whole.len() - 1], b"x"].concat()] {
        fs::write(&layers[0], damaged).unwrap();
        store.load(&fixture.layout(), None, None, &mut |_| {}).unwrap_err();
        assert!(store.list().unwrap().is_empty());
    }
    fs::write(&layers[0], &whole).unwrap();
    store.load(&fixture.layout(), None, None, &mut |_| {}).unwrap();

    // A damaged blob in the store.
    let one = store.find("one:1").unwrap();
    let path = store.path().join("blobs/sha256").join(one.digest.hex());
    fs::remove_file(&path).unwrap();
    fs::write(&path, b"{}").unwrap();
    assert!(matches!(store.verify(), Err(StoreError::WrongDigest { .. })));
    assert!(store.find("one:1").is_err());
    assert!(store.list().unwrap().iter().any(|listed| listed.image.is_err()));
    // Nobody knows what it needs, so nothing is removed.
    assert!(store.prune(&HashSet::new(), false).is_err());
    // To load it again mends it: what is no longer of its size is written anew.
    store.load(&fixture.layout(), None, None, &mut |_| {}).unwrap();
    store.verify().unwrap();
}

#[test]
fn an_image_without_a_full_name_is_given_one() {
    let (_directory, store) = store();
    let fixture = Fixture::new();
    let open = fixture.manifest(&[tar(&[file("x", b"x")])], |tar| (LAYER.into(), tar.to_vec()));
    let tagged = format!(r#"{open},"annotations":{{"org.opencontainers.image.ref.name":"latest"}}"#);
    fixture.index(&[&tagged]);
    let error = store.load(&fixture.layout(), None, None, &mut |_| {}).unwrap_err();
    assert!(error.hint().unwrap().contains("--tag"), "{error}");
    let loaded =
        store.load(&fixture.layout(), Some("latest"), Some(&reference("tools:2")), &mut |_| {}).unwrap();
    assert_eq!(loaded[0].name, "docker.io/library/tools:2");

    // An index of several systems: ours is taken.
    let arm = fixture.manifest_for("arm64", &[tar(&[file("arm", b"")])], |tar| (LAYER.into(), tar.to_vec()));
    let of = |open: &str, architecture: &str| {
        format!(r#"{open},"platform":{{"os":"linux","architecture":"{architecture}"}}}}"#)
    };
    let nested = format!(
        r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{},{}]}}"#,
        of(&arm, "arm64"),
        of(&open, "amd64")
    );
    let nested = fixture.blob(INDEX, nested.as_bytes());
    fixture.index(&[&nested]);
    let multi = store.load(&fixture.layout(), None, Some(&reference("multi")), &mut |_| {}).unwrap();
    assert_eq!(multi[0].digest, loaded[0].digest);
    assert_eq!(multi[0].manifest.media_type, MANIFEST);
}

#[test]
fn names_given_by_many_at_once_are_all_there() {
    let (_directory, store) = store();
    let fixture = two_images(|tar| (LAYER.into(), tar.to_vec()));
    store.load(&fixture.layout(), None, None, &mut |_| {}).unwrap();
    let one = store.find("one:1").unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (store, one) = (&store, &one);
            scope.spawn(move || {
                for number in 0..5 {
                    store.tag(one, &reference(&format!("name-{thread}:{number}"))).unwrap();
                }
            });
        }
    });
    assert_eq!(store.list().unwrap().len(), 22);
}
