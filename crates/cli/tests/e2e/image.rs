//! `--image`: an OCI layout or archive as the root file system.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::host::{Host, Running, finish, noise, signal};

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
    let loaded =
        finish(host.command(&["images", "load", "-", "--tag", "my-tools"]), &fs::read(&archive).unwrap());
    assert_eq!(loaded.expect(0), "my-tools:latest\n");
    for image in [layout.as_path(), &archive, Path::new("my-tools")] {
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
    // Without a command, what it says itself; without a name, what suits the project or the command and is here.
    let said = host.agentkernel(&["run", "-q", "--image", "my-tools"]);
    assert!(said.stderr.contains("unused"), "{said:?}");
    host.agentkernel(&["images", "tag", "my-tools", "node:22-alpine"]).expect(0);
    host.write("package.json", "{}");
    let said = host.agentkernel(&["run", "--", "sh", "-c", "echo $FLAVOUR $EXTRA"]);
    assert_eq!(said.expect(0), "plain\n");
    assert!(said.stderr.contains("image node:22-alpine (--image host takes"), "{}", said.stderr);
    let said = host.agentkernel(&["run", "-q", "--image", "host", "--", "sh", "-c", "echo $FLAVOUR"]);
    assert_eq!(said.expect(0), "\n");
    fs::remove_file(host.project().join("package.json")).unwrap();
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
fn images_are_kept_by_name() {
    let host = Host::new();
    layout(host.path());
    let layout = host.path().join("layout");
    let source = format!("{}:latest", layout.display());
    host.agentkernel(&["images", "load", &source]).expect(1);
    host.agentkernel(&["images", "load", &source, "--tag", "my-tools"]).expect(0);
    host.agentkernel(&["create", "dev", "--no-start", "--image", "my-tools", "--workspace", "none"])
        .expect(0);
    let list = |host: &Host| -> serde_json::Value {
        serde_json::from_str(host.agentkernel(&["images", "list", "--json"]).expect(0)).unwrap()
    };
    let listed = list(&host);
    assert_eq!(listed[0]["name"], "my-tools:latest");
    assert_eq!(listed[0]["used_by"], serde_json::json!(["dev"]));
    let id = listed[0]["image_id"].as_str().unwrap().to_owned();

    let said = host.agentkernel(&["images", "rm", "my-tools"]);
    said.expect(1);
    assert!(said.stderr.contains("used by dev") && said.stderr.contains("--force"), "{}", said.stderr);
    host.agentkernel(&["images", "tag", &id[7..19], "localhost:1/team/tools:2"]).expect(0);
    host.agentkernel(&["images", "rm", "my-tools"]).expect(0);
    let said = host.agentkernel(&["run", "--image", "localhost:1/team/tols:2", "--", "true"]);
    said.expect(125);
    assert!(said.stderr.contains("did you mean localhost:1/team/tools:2?"), "{}", said.stderr);
    let inspected = host.agentkernel(&["images", "inspect", "localhost:1/team/tools:2"]);
    assert!(inspected.expect(0).contains("/bin/busybox env EXTRA=1"), "{}", inspected.expect(0));

    let saved = host.path().join("saved.tar");
    let save = ["images", "save", "localhost:1/team/tools:2", "-o", saved.to_str().unwrap()];
    host.agentkernel(&save).expect(0);
    host.agentkernel(&["images", "rm", "--force", "localhost:1/team/tools:2"]).expect(0);
    assert_eq!(list(&host), serde_json::json!([]));
    assert_eq!(fs::read_dir(host.state().join("images/blobs/sha256")).unwrap().count(), 0);
    let loaded = host.agentkernel(&["images", "load", saved.to_str().unwrap(), "--json"]);
    assert!(loaded.expect(0).contains("localhost:1/team/tools:2"));
    assert_eq!(list(&host)[0]["image_id"], id.as_str());
    assert!(host.agentkernel(&["images", "prune"]).expect(0).contains("0 blobs"));
    for bad in ["My", "-x", "a/../b", "ä"] {
        let said = host.agentkernel(&["images", "tag", "localhost:1/team/tools:2", "--", bad]);
        said.expect(1);
        assert!(said.stderr.contains("hint:"), "{}", said.stderr);
    }
    host.agentkernel(&["rm", "dev"]).expect(0);
}

/// Debian's `docker-registry` on a port of its own; ended when dropped.
struct Registry {
    process: std::process::Child,
    address: String,
}

impl Registry {
    fn start(directory: &Path) -> Self {
        // Free now, and nobody else's in a moment: the kernel hands ports out in turn.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let configuration = directory.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {address}}}\n",
            directory.join("registry").display()
        );
        fs::write(&configuration, text).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("docker-registry is missing: scripts/install-packages test");
        let registry = Self { process, address };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while std::net::TcpStream::connect(&registry.address).is_err() {
            assert!(std::time::Instant::now() < deadline, "the registry does not listen");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        registry
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn images_go_to_a_registry_and_come_back_when_they_are_asked_for() {
    let host = Host::new();
    layout(host.path());
    let registry = Registry::start(host.path());
    let name = format!("{}/team/tools:2", registry.address);
    let source = format!("{}:latest", host.path().join("layout").display());
    host.agentkernel(&["images", "load", &source, "--tag", "tools"]).expect(0);
    let digest = host.agentkernel(&["images", "push", "tools", &name]).expect(0).trim().to_owned();
    host.agentkernel(&["images", "rm", "tools"]).expect(0);
    let pinned = format!("{}/team/tools@{digest}", registry.address);
    assert_eq!(host.agentkernel(&["images", "pull", &pinned]).expect(0).trim(), pinned);
    host.agentkernel(&["images", "rm", &pinned]).expect(0);
    let create = ["create", "dev", "--no-start", "--workspace", "none", "--image", &name];
    let said = host.agentkernel(&create);
    said.expect(0);
    assert!(said.stderr.contains("is not here: pulling it"), "{}", said.stderr);
    let said = host.agentkernel(&["images", "pull", &format!("{}/team/tools:3", registry.address)]);
    said.expect(1);
    assert!(said.stderr.contains("tools:3"), "{}", said.stderr);
    // A build's base comes as well.
    host.agentkernel(&["rm", "dev"]).expect(0);
    host.agentkernel(&["images", "rm", &name]).expect(0);
    host.write("Dockerfile", format!("FROM {name}\nLABEL built=yes\n"));
    let said = host.agentkernel(&["build", "-t", "built", "."]);
    said.expect(0);
    assert!(said.stderr.contains("is not here: pulling it"), "{}", said.stderr);
    host.agentkernel(&create).expect(0);
    // Killed while a layer comes: the next one takes it all, and nothing is left of the first.
    fs::write(host.project().join("large"), noise(48 << 20)).unwrap();
    host.write("Dockerfile", "FROM scratch\nCOPY large /\n");
    host.agentkernel(&["build", "-t", "large", "."]).expect(0);
    let large = format!("{}/team/large:1", registry.address);
    host.agentkernel(&["images", "push", "large", &large]).expect(0);
    host.agentkernel(&["images", "rm", "large"]).expect(0);
    host.agentkernel(&["images", "prune"]).expect(0);
    let ingest = || -> Vec<u64> {
        let entries = fs::read_dir(host.state().join("images/ingest")).unwrap().flatten();
        entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).collect()
    };
    let pull = Running::start(host.command(&["images", "pull", &large]));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !ingest().iter().any(|size| *size > 1 << 20) {
        assert!(std::time::Instant::now() < deadline, "no layer comes");
    }
    signal(pull.child.id(), rustix::process::Signal::KILL);
    assert_ne!(pull.end().0, 0);
    let said = host.agentkernel(&["images", "inspect", &large]);
    said.expect(1);
    host.agentkernel(&["images", "pull", &large]).expect(0);
    assert!(ingest().is_empty());
    crate::build::assert_store_is_sound(&host);
    host.agentkernel(&["images", "rm", &large]).expect(0);
    drop(registry);
    // What is here needs no registry.
    host.agentkernel(&["create", "other", "--no-start", "--workspace", "none", "--image", &name]).expect(0);
    host.agentkernel(&["rm", "dev", "other"]).expect(0);
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
