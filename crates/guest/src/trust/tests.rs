#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;

fn open(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn trust(authorities: &[&str]) -> Trust {
    let all: Vec<ByteBuf> = authorities.iter().map(|der| ByteBuf::from(der.as_bytes())).collect();
    Trust::new(&all)
}

fn write(root: &Path, path: &str, content: impl AsRef<[u8]>) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn paths(laid: &Laid) -> Vec<&str> {
    laid.files.iter().map(|file| file.path.to_str().unwrap()).collect()
}

#[test]
fn a_bundle_has_the_images_authorities_and_the_hosts() {
    let directory = tempfile::tempdir().unwrap();
    let (root, over) = (directory.path().join("root"), directory.path().join("over"));
    fs::create_dir(&over).unwrap();
    // The last line is not ended.
    write(&root, "etc/ssl/certs/ca-certificates.crt", pem::block(b"both") + pem::block(b"image").trim_end());
    symlink("certs/ca-certificates.crt", root.join("etc/ssl/cert.pem")).unwrap();
    fs::set_permissions(root.join("etc/ssl"), Permissions::from_mode(0o711)).unwrap();
    fs::create_dir_all(root.join("usr/local/share")).unwrap();
    let handle = open(&root);
    let laid = trust(&["both", "host"]).survey(&handle, true);
    assert_eq!(
        paths(&laid),
        ["etc/ssl/certs/ca-certificates.crt", "usr/local/share/ca-certificates/agentkernel-host-001.crt"]
    );
    laid.write(&over, &handle).unwrap();
    let merged = fs::read(over.join("etc/ssl/certs/ca-certificates.crt")).unwrap();
    let expected: BTreeSet<_> = ["both", "host", "image"].map(|der| der.as_bytes().to_vec()).into();
    assert_eq!(pem::certificates(&merged), expected);
    assert_eq!(laid.bundle, merged);
    let stat = |path: PathBuf| rustix::fs::stat(path).unwrap();
    for path in ["etc", "etc/ssl", "etc/ssl/certs/ca-certificates.crt", "usr/local/share"] {
        let (one, other) = (stat(root.join(path)), stat(over.join(path)));
        assert_eq!(one.st_mode, other.st_mode, "{path}");
        assert_eq!(tree::modified_ns(&one), tree::modified_ns(&other), "{path}");
    }
    // In a build nothing is left that was not there.
    let laid = trust(&["both", "host"]).survey(&handle, false);
    assert_eq!(paths(&laid), ["etc/ssl/certs/ca-certificates.crt"]);
    let upper = directory.path().join("upper");
    let mine = [merged, pem::block(b"mine").into_bytes()].concat();
    write(&upper, "etc/ssl/certs/ca-certificates.crt", &mine);
    write(&upper, "srv/copy", &mine);
    laid.take_out(&open(&upper)).unwrap();
    let left = pem::certificates(&fs::read(upper.join("etc/ssl/certs/ca-certificates.crt")).unwrap());
    assert_eq!(left, ["both", "image", "mine"].map(|der| der.as_bytes().to_vec()).into());
    assert_eq!(pem::certificates(&fs::read(upper.join("srv/copy")).unwrap()), left);
    // What a program wrote anew is its own, whatever is in it.
    let anew = pem::block(b"host") + &pem::block(b"both");
    write(&upper, "etc/ssl/certs/ca-certificates.crt", &anew);
    laid.take_out(&open(&upper)).unwrap();
    assert_eq!(fs::read(upper.join("etc/ssl/certs/ca-certificates.crt")).unwrap(), anew.as_bytes());
}

#[test]
fn a_root_without_bundles_gets_none() {
    let directory = tempfile::tempdir().unwrap();
    let root = open(directory.path());
    let laid = trust(&["host"]).survey(&root, true);
    assert!(laid.is_empty());
    assert_eq!(pem::certificates(&laid.bundle), [b"host".to_vec()].into());
    // Of a host without authorities nothing is told.
    write(directory.path(), "etc/ssl/cert.pem", pem::block(b"image"));
    let laid = trust(&[]).survey(&root, true);
    assert!(laid.is_empty() && laid.bundle.is_empty());
}

#[test]
fn an_images_links_lead_nowhere_out_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root");
    write(directory.path(), "outside/ca-certificates.crt", pem::block(b"outside"));
    fs::create_dir_all(root.join("etc/ssl")).unwrap();
    fs::create_dir_all(root.join("etc/pki/tls")).unwrap();
    symlink(directory.path().join("outside"), root.join("etc/ssl/certs")).unwrap();
    symlink("../../../../../outside/ca-certificates.crt", root.join("etc/ssl/cert.pem")).unwrap();
    symlink("cert.pem", root.join("etc/pki/tls/cert.pem")).unwrap();
    fs::create_dir(root.join("etc/ssl/ca-bundle.pem")).unwrap();
    let laid = trust(&["host"]).survey(&open(&root), true);
    assert!(laid.is_empty(), "{:?}", paths(&laid));
    // Nor do those of a layer.
    write(&root, "etc/pki/tls/certs/ca-bundle.crt", pem::block(b"image"));
    let laid = trust(&["host"]).survey(&open(&root), true);
    assert_eq!(paths(&laid), ["etc/pki/tls/certs/ca-bundle.crt"]);
    let upper = directory.path().join("upper");
    fs::create_dir_all(upper.join("etc/pki/tls")).unwrap();
    let other = directory.path().join("other");
    write(&other, "ca-bundle.crt", &laid.files[0].content);
    symlink(&other, upper.join("etc/pki/tls/certs")).unwrap();
    laid.take_out(&open(&upper)).unwrap();
    assert_eq!(fs::read(other.join("ca-bundle.crt")).unwrap(), laid.files[0].content);
}

#[test]
fn stores_of_java_are_found_and_added_to() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let store = keystore::Store::default().with(&[b"image"]);
    write(root, "etc/ssl/certs/java/cacerts", &store);
    write(root, "opt/jdk/lib/security/cacerts", &store);
    write(root, "opt/strange/lib/security/cacerts", b"what is this");
    fs::create_dir_all(root.join("usr/lib/jvm/17/lib/security")).unwrap();
    symlink("/etc/ssl/certs/java/cacerts", root.join("usr/lib/jvm/17/lib/security/cacerts")).unwrap();
    let laid = trust(&["host"]).survey(&open(root), false);
    assert_eq!(paths(&laid), ["etc/ssl/certs/java/cacerts", "opt/jdk/lib/security/cacerts"]);
    for file in &laid.files {
        let merged = keystore::Store::read(&file.content).unwrap().certificates();
        assert_eq!(merged, [b"image".to_vec(), b"host".to_vec()].into());
    }
}

proptest! {
    #[test]
    fn bundles_are_read_as_they_are_written(
        known in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 0..5),
        added in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 1..5),
        junk in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let text: String = known.iter().map(|der| pem::block(der)).collect();
        let expected: BTreeSet<_> = known.into_iter().collect();
        prop_assert_eq!(pem::certificates(text.as_bytes()), expected);
        let added: Vec<&[u8]> = added.iter().map(Vec::as_slice).collect();
        let appendix = pem::appendix(&added);
        let all = [text.as_bytes(), &appendix, &junk].concat();
        prop_assert_eq!(pem::without(&all, &appendix), Some([text.as_bytes(), &junk].concat()));
        let _ = pem::certificates(&junk);
    }
}
