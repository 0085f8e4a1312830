//! `--image`: an OCI layout or archive as the root file system.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::host::Host;

/// Writes an OCI layout with one layer: a static busybox and a few files.
fn layout(directory: &Path) {
    let root = directory.join("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::create_dir_all(root.join("srv/app")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    std::os::unix::fs::symlink("busybox", root.join("bin/sh")).unwrap();
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\napp:x:1234:1235::/srv/app:/bin/sh\n")
        .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\napp:x:1235:\nextra:x:77:app\n").unwrap();
    let blobs = directory.join("layout/blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let layer = directory.join("layer.tar");
    let status = Command::new("tar")
        .args(["--owner=0", "--group=0", "--numeric-owner", "--sort=name", "-cf"])
        .arg(&layer)
        .arg("-C")
        .arg(&root)
        .arg(".")
        .status()
        .unwrap();
    assert!(status.success());
    let layer = add(&blobs, &fs::read(&layer).unwrap());
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "config": {
            "Entrypoint": ["/bin/busybox", "env", "EXTRA=1"], "Cmd": ["unused"],
            "Env": ["PATH=/bin", "FLAVOUR=plain"], "WorkingDir": "/srv/app", "User": "app"
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.0]}
    });
    let config = add(&blobs, config.to_string().as_bytes());
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config.0, "size": config.1},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer.0, "size": layer.1}]
    });
    let manifest = add(&blobs, manifest.to_string().as_bytes());
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest.0, "size": manifest.1,
            "annotations": {"org.opencontainers.image.ref.name": "latest"}
        }]
    });
    fs::write(directory.join("layout/index.json"), index.to_string()).unwrap();
    fs::write(directory.join("layout/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

fn add(blobs: &Path, content: &[u8]) -> (String, usize) {
    let draft = blobs.join("draft");
    fs::write(&draft, content).unwrap();
    let output = Command::new("sha256sum").arg(&draft).output().unwrap();
    let digest = String::from_utf8(output.stdout).unwrap()[..64].to_owned();
    fs::rename(draft, blobs.join(&digest)).unwrap();
    (format!("sha256:{digest}"), content.len())
}

#[test]
fn a_layout_and_an_archive_run_as_their_configuration_says() {
    let host = Host::new();
    layout(host.path());
    let layout = host.path().join("layout");
    let archive = host.path().join("image.tar");
    let status =
        Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&layout).arg(".").status().unwrap();
    assert!(status.success());
    let script = "pwd; id -u; id -g; id -G; echo $HOME $FLAVOUR $EXTRA; touch /srv/app/x 2>/dev/null || echo not mine; \
                  cat /etc/hostname; ls /usr 2>/dev/null | wc -l";
    for image in [&layout, &archive] {
        let said = host.agentkernel(&[
            "run",
            "-q",
            "-n",
            "imaged",
            "--image",
            image.to_str().unwrap(),
            "--",
            "sh",
            "-c",
            script,
        ]);
        let lines: Vec<&str> = said.expect(0).lines().collect();
        assert_eq!(lines[..4], ["/srv/app", "1234", "1235", "1235 77"], "{}", said.stderr);
        assert_eq!(lines[4..], ["/srv/app plain 1", "not mine", "imaged", "0"]);
    }
    // The project is there as well, copy-on-write.
    host.write("hello.txt", "hello");
    let project = host.project();
    let said = host.agentkernel(&[
        "run",
        "-q",
        "-u",
        "root",
        "-w",
        project.to_str().unwrap(),
        "--image",
        layout.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        "busybox cat hello.txt; echo new > new.txt",
    ]);
    assert_eq!(said.expect(0), "hello");
    host.agentkernel(&["apply", "--last"]).expect(0);
    assert_eq!(host.read("new.txt"), "new\n");
}

#[test]
fn broken_images_are_refused_before_anything_starts() {
    let host = Host::new();
    layout(host.path());
    let layout = host.path().join("layout");
    let said = host.agentkernel(&["run", "--image", "/no/such/image", "--", "true"]);
    said.expect(125);
    assert!(said.stderr.contains("/no/such/image"), "{}", said.stderr);
    for entry in fs::read_dir(layout.join("blobs/sha256")).unwrap().flatten() {
        let mut content = fs::read(entry.path()).unwrap();
        let last = content.len() - 1;
        content[last] ^= 1;
        fs::write(entry.path(), content).unwrap();
    }
    let said = host.agentkernel(&["run", "--image", layout.to_str().unwrap(), "--", "true"]);
    said.expect(125);
    assert!(said.stderr.contains("digest") || said.stderr.contains("sha256"), "{}", said.stderr);
}
