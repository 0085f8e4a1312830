//! Well-formed images in every form they come in, and what the cache promises.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use agentkernel_image::{Digest, Progress, RootFileSystem, split_reference};
use common::{Fixture, INDEX, LAYER, chain, entry, file, gzip, tar, zstd};
use erofs_rs::EroFS;
use erofs_rs::backend::SliceImage;

fn read(image: &std::path::Path, path: &str) -> Vec<u8> {
    use std::io::Read;
    let bytes = fs::read(image).unwrap();
    let system = EroFS::new(SliceImage::new(&bytes)).unwrap();
    let mut content = Vec::new();
    system.open(path).unwrap().read_to_end(&mut content).unwrap();
    content
}

fn plain(tar: &[u8]) -> (String, Vec<u8>) {
    (LAYER.into(), tar.to_vec())
}

#[test]
fn every_form_gives_the_same_file_system() {
    let layers =
        [tar(&[file("a/x", b"old"), file("y", b"y")]), tar(&[file("a/x", b"new"), file(".wh.y", b"")])];
    let mut images = Vec::new();
    let fixture = Fixture::new();
    for (ending, pack) in [("", <[u8]>::to_vec as fn(&[u8]) -> Vec<u8>), ("+gzip", gzip), ("+zstd", zstd)] {
        let manifest = fixture.manifest(&layers, |tar| (format!("{LAYER}{ending}"), pack(tar)));
        fixture.index(&[&manifest]);
        images.push(fixture.prepare().unwrap());
        for (number, pack) in [<[u8]>::to_vec as fn(&[u8]) -> Vec<u8>, gzip, zstd].into_iter().enumerate() {
            let path = fixture.directory.path().join(format!("image-{number}.tar"));
            fs::write(&path, pack(&fixture.archive())).unwrap();
            let other = fixture.prepare_from(&path, None).unwrap();
            assert_eq!(other.root_file_system, images.last().unwrap().root_file_system);
        }
    }
    for image in &images {
        assert_eq!(read(&image.root_file_system, "/a/x"), b"new");
        assert_eq!(image.config.cmd, ["sh"]);
        assert_eq!(image.config.env, ["A=b"]);
        // All but the superblock, which carries the cache key, is a function of the layers' content.
        let bytes = fs::read(&image.root_file_system).unwrap();
        assert_eq!(bytes[4096..], fs::read(&images[0].root_file_system).unwrap()[4096..]);
    }
}

/// Several members or frames in one compressed stream, as parallel compressors write them.
#[test]
fn concatenated_streams_are_one_layer() {
    let layer = tar(&[file("x", &[5; 300_000])]);
    let (left, right) = layer.split_at(150_000);
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    let streams = [
        [gzip(left), gzip(right)].concat(),
        [skippable.clone(), zstd(left), skippable, zstd(right)].concat(),
    ];
    for stream in streams {
        let fixture = Fixture::new();
        let manifest = fixture.manifest(std::slice::from_ref(&layer), |_| (LAYER.into(), stream.clone()));
        fixture.index(&[&manifest]);
        assert_eq!(read(&fixture.prepare().unwrap().root_file_system, "/x"), [5; 300_000]);
    }
}

#[test]
fn tags_choose_among_images() {
    let fixture = Fixture::new();
    let named = |name: &str, full: &str| {
        let annotations = format!(
            r#","annotations":{{"org.opencontainers.image.ref.name":"{name}","io.containerd.image.name":"{full}"}}"#
        );
        fixture.manifest(&[tar(&[file("name", full.as_bytes())])], plain) + &annotations
    };
    let one = named("1.0", "docker.io/library/one:1.0");
    let two = named("latest", "docker.io/library/two:latest");
    let three = named("latest", "docker.io/library/three:latest");
    fixture.index(&[&one, &two, &three]);
    let layout = fixture.layout();
    let error = fixture.prepare().unwrap_err();
    assert!(chain(&error).contains("1.0, docker.io/library/two:latest, docker.io/library/three:latest"));
    assert_eq!(error.hint().unwrap(), format!("choose one: {}:1.0", layout.display()));
    for (tag, expected) in
        [("1.0", "one:1.0"), ("two:latest", "two:latest"), ("library/three:latest", "three:latest")]
    {
        let text = format!("{}:{tag}", layout.display());
        let (path, split) = split_reference(&text);
        assert_eq!((path.as_path(), split.as_deref()), (layout.as_path(), Some(tag)));
        let image = fixture.prepare_from(&path, split.as_deref()).unwrap();
        assert_eq!(image.name, format!("docker.io/library/{expected}"));
        assert_eq!(read(&image.root_file_system, "/name"), image.name.as_bytes());
    }
    assert!(chain(&fixture.prepare_from(&layout, Some("latest")).unwrap_err()).contains("several images"));
    assert!(
        chain(&fixture.prepare_from(&layout, Some("2.0")).unwrap_err()).contains(r#"no image called "2.0""#)
    );
    assert_eq!(split_reference(layout.to_str().unwrap()), (layout, None));
}

#[test]
fn indexes_lead_to_this_platform() {
    let fixture = Fixture::new();
    let on = |architecture: &str, variant: &str, content: &str| {
        let layer = tar(&[file("x", content.as_bytes())]);
        fixture.manifest_for(architecture, &[layer], plain)
            + &format!(
                r#","platform":{{"os":"linux","architecture":"{architecture}","variant":"{variant}"}}}}"#
            )
    };
    let attestation = r#"{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":2,"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","platform":{"os":"unknown","architecture":"unknown"}}"#;
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{},{attestation},{},{}]}}"#,
        on("arm64", "v8", "arm"),
        on("amd64", "v3", "new machines only"),
        on("amd64", "", "right"),
    );
    let nested = fixture.blob(INDEX, index.as_bytes());
    fixture.index(&[&nested]);
    assert_eq!(read(&fixture.prepare().unwrap().root_file_system, "/x"), b"right");
}

/// What `docker save` wrote before version 25: layers by name, the second a link to the first.
#[test]
fn docker_archives_without_a_layout() {
    let layer = tar(&[file("x", b"docker")]);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"User":"7"}},"rootfs":{{"diff_ids":["{0}","{0}"]}}}}"#,
        Digest::of(&layer)
    );
    let manifest = r#"[{"Config":"c.json","RepoTags":["a/b:1"],"Layers":["one/layer.tar","two/layer.tar"]}]"#;
    let archive = |layer: &[u8]| {
        tar(&[
            entry(b'0', b"one/layer.tar", b"", layer),
            entry(b'2', b"two/layer.tar", b"../one/layer.tar", b""),
            file("c.json", config.as_bytes()),
            file("manifest.json", manifest.as_bytes()),
        ])
    };
    let fixture = Fixture::new();
    let path = fixture.directory.path().join("saved.tar");
    fs::write(&path, archive(&layer)).unwrap();
    let image = fixture.prepare_from(&path, Some("b:1")).unwrap();
    assert_eq!((image.name.as_str(), image.config.user.as_deref()), ("a/b:1", Some("7")));
    assert_eq!(read(&image.root_file_system, "/x"), b"docker");
    fs::write(&path, archive(&tar(&[file("x", b"forged")]))).unwrap();
    fs::remove_file(&image.root_file_system).unwrap();
    assert!(
        chain(&fixture.prepare_from(&path, None).unwrap_err()).contains("but the image's configuration says")
    );
}

#[test]
fn a_second_call_reads_no_layer() {
    let layer = tar(&[file("x", &[1; 3 << 20])]);
    let fixture = Fixture::image(std::slice::from_ref(&layer));
    let run = || {
        let mut told: Vec<Progress> = Vec::new();
        let image =
            RootFileSystem::prepare(&fixture.layout(), None, &fixture.cache(), &mut |now| told.push(now));
        (image.unwrap(), told)
    };
    let (first, told) = run();
    assert_eq!(told.last().unwrap().bytes, layer.len() as u64);
    assert!(told.len() > 2 && told.is_sorted_by_key(|progress| progress.bytes), "{told:?}");
    assert_eq!(fs::metadata(&first.root_file_system).unwrap().permissions().mode() & 0o777, 0o444);
    let (second, told) = run();
    assert_eq!((second, told.len()), (first.clone(), 0));
    // A cached file that is no longer whole is made anew.
    fs::remove_file(&first.root_file_system).unwrap();
    fs::write(&first.root_file_system, [0; 8192]).unwrap();
    let (third, told) = run();
    assert!(!told.is_empty());
    assert_eq!(read(&third.root_file_system, "/x"), [1; 3 << 20]);
}

/// Regression guard: scratch of a killed process goes, scratch of a live one stays.
#[test]
fn abandoned_scratch_is_swept() {
    let fixture = Fixture::image(&[tar(&[])]);
    fs::create_dir(fixture.cache()).unwrap();
    fs::write(fixture.cache().join("tmp-1-0"), b"left by a killed process").unwrap();
    let live = fixture.cache().join("tmp-2-0");
    let held = fs::File::create(&live).unwrap();
    held.lock().unwrap();
    RootFileSystem::prepare(&fixture.layout(), None, &fixture.cache(), &mut |_| {}).unwrap();
    assert!(!fixture.cache().join("tmp-1-0").exists());
    assert!(live.exists());
}

#[test]
fn two_at_once_make_one_file() {
    let fixture = Fixture::image(&[tar(&[file("x", &[1; 1 << 20])])]);
    let prepare = || RootFileSystem::prepare(&fixture.layout(), None, &fixture.cache(), &mut |_| {}).unwrap();
    let images: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(prepare)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(images.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(fs::read_dir(fixture.cache()).unwrap().count(), 1);
}
