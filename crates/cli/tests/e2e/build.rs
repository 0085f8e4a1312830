//! `agentkernel build`: Dockerfiles become images that run, in real machines.

use std::fs;
use std::process::Command;

use rustix::process::Signal;

use crate::host::{Host, Running, finish, is_root, noise, set_mode, signal};
use crate::living_faults::Mounted;

/// A context with an archive of a small root file system, and its image called `base`.
pub(crate) fn base(host: &Host) {
    let root = host.path().join("root");
    for directory in ["bin", "etc", "tmp"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in
        ["sh", "cat", "chmod", "id", "ln", "ls", "mkdir", "mkfifo", "mv", "rm", "sleep", "touch", "wc"]
    {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
        .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\napp:x:1000:\n").unwrap();
    let archive = host.project().join("base.tar.gz");
    let status = Command::new("tar")
        .args(["--owner=0", "--group=0", "--numeric-owner", "-czf"])
        .arg(&archive)
        .arg("-C")
        .arg(&root)
        .arg(".")
        .status();
    assert!(status.unwrap().success());
    host.write("base.Dockerfile", "FROM scratch\nADD base.tar.gz /\nENV PATH=/bin\n");
    host.agentkernel(&["build", "-t", "base", "-f", "base.Dockerfile", "."]).expect(0);
}

/// Every blob is what it is called.
pub(crate) fn assert_store_is_sound(host: &Host) {
    for entry in fs::read_dir(host.state().join("images/blobs/sha256")).unwrap().flatten() {
        let output = Command::new("sha256sum").arg(entry.path()).output().unwrap();
        let digest = String::from_utf8(output.stdout).unwrap()[..64].to_owned();
        assert_eq!(digest, entry.file_name().into_string().unwrap());
    }
}

fn stderr_of(host: &Host, arguments: &[&str]) -> String {
    let said = host.agentkernel(arguments);
    said.expect(0);
    said.stderr.clone()
}

const DOCKERFILE: &str = r#"FROM base AS one
RUN mkdir -p /d/old && echo one > /d/old/f
FROM base AS unneeded
RUN exit 9
FROM base
ARG WHO=world
ENV GREETING="hello $WHO"
COPY hello.txt /srv/
RUN echo "$GREETING" > /greeting && rm /srv/hello.txt && mkdir /srv/sub && ln -s /greeting /link && mkfifo /fifo
COPY --from=one /d /d
RUN mv /d/old /d/new && chmod 4755 /bin/busybox && ln /d/new/f /d/new/g
USER app
WORKDIR /home/app
RUN --mount=type=cache,target=/cache,uid=1000 echo more >> /cache/log; wc -l < /cache/log > lines
RUN --mount=type=secret,id=token,uid=1000 --mount=type=bind,source=hello.txt,target=/bound \
    --mount=type=tmpfs,target=/scratch cat /run/secrets/token /bound > /scratch/x && wc -c < /scratch/x > size
RUN <<EOF
id > id
cat /etc/hosts | wc -l
EOF
COPY last.txt .
CMD ["sh", "-c", "cat /greeting"]
"#;

#[test]
fn a_step_has_the_network_that_is_asked_for() {
    let host = Host::new();
    base(&host);
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let fetch = format!("busybox nc -w 5 192.0.0.1 {port} < /dev/null");
    let refused = format!("{{ {fetch}; test $? = 1; }}");
    let serving = std::thread::spawn(move || {
        let (mut client, _) = server.accept().unwrap();
        std::io::Write::write_all(&mut client, b"from the host\n").unwrap();
        std::io::Read::read(&mut client, &mut [0; 4096]).unwrap();
        // Every other connection is one too many.
        server.set_nonblocking(true).unwrap();
        server
    });
    host.write(
        "Dockerfile",
        format!(
            "FROM base\nRUN --network=none test $(wc -l < /proc/net/dev) = 3 && busybox ping -c 1 127.0.0.1 && {refused}\n\
             RUN busybox grep -q eth0 /proc/net/dev && {fetch} > /fetched\n\
             USER app\nRUN --network=none {refused}\n"
        ),
    );
    let rule = format!("127.0.0.1:{port}");
    let build = ["build", "-t", "networks", "--network", "none", "--allow", &rule, "."];
    host.agentkernel(&build).expect(0);
    let server = serving.join().unwrap();
    let said = host.agentkernel(&["run", "-q", "-i", "networks", "--", "cat", "/fetched"]);
    assert_eq!(said.expect(0), "from the host\n");
    host.write("Dockerfile", format!("FROM base\nRUN {refused}\n"));
    host.agentkernel(&["build", "-t", "networks", "."]).expect(0);
    assert!(server.accept().is_err(), "this machine was reached without being allowed");
}

#[test]
fn a_dockerfile_becomes_an_image_that_runs() {
    let host = Host::new();
    base(&host);
    host.write("Dockerfile", DOCKERFILE);
    host.write("hello.txt", "hello file\n");
    host.write("last.txt", "first\n");
    host.write("token", "s3cr3t-token-value\n");
    let build = [
        "build",
        "-t",
        "my-tools",
        "--build-arg",
        "WHO=there",
        "--secret",
        "id=token,src=token",
        "--label",
        "a=b",
        ".",
    ];
    let said = stderr_of(&host, &build);
    assert!(!said.contains("exit 9"), "{said}");

    // All of it again without a machine, and the last step alone when only that changed.
    let said = stderr_of(&host, &build);
    assert_eq!(said.matches("CACHED").count(), 10, "{said}");
    host.write("last.txt", "second\n");
    let said = stderr_of(&host, &build);
    assert_eq!(said.matches("CACHED").count(), 9, "{said}");

    let script = "cat greeting 2>/dev/null; cat lines size id last.txt; ls /srv /d; ls -l /bin/busybox /link /fifo; ls /run; \
                  ls -l /d/new/f";
    let said = host.agentkernel(&[
        "run",
        "-q",
        "--workspace",
        "none",
        "--image",
        "my-tools",
        "--",
        "sh",
        "-c",
        script,
    ]);
    let text = said.expect(0);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..4], ["1", "30", "uid=1000(app) gid=1000(app)", "second"], "{text}");
    assert_eq!(lines[4..9], ["/d:", "new", "", "/srv:", "sub"], "{text}");
    let (busybox, fifo, link) = (lines[9], lines[10], lines[11]);
    assert!(busybox.starts_with("-rwsr-xr-x"), "{text}");
    assert!(fifo.starts_with("prw-r--r--") && link.ends_with("/link -> /greeting"), "{text}");
    assert!(lines.last().unwrap().starts_with("-rw-r--r--    2 root"), "{text}");
    assert!(!text.contains("secrets"), "{text}");

    // The secret is in no layer, the caches neither; the labels are.
    for entry in fs::read_dir(host.state().join("images/blobs/sha256")).unwrap().flatten() {
        let content = fs::read(entry.path()).unwrap();
        let found = content.windows(12).any(|window| window == b"s3cr3t-token");
        assert!(!found, "the secret is in {}", entry.path().display());
    }
    let record = fs::read_to_string(host.state().join("image-metadata/my-tools.json")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["labels"]["agentkernel.name"], "my-tools");
    assert_eq!(
        (&record["labels"]["agentkernel.managed"], &record["labels"]["a"]),
        (&"true".into(), &"b".into())
    );
    let inspected = host.agentkernel(&["images", "inspect", "my-tools", "--json"]);
    let inspected: serde_json::Value = serde_json::from_str(inspected.expect(0)).unwrap();
    assert_eq!(inspected["image_id"], record["image_id"]);

    // Built anew at the same time, every byte is the same, those of steps that ran in a machine as well.
    host.write(
        "same",
        "FROM base\nRUN mkdir -p /d/e && echo x > /d/f && ln /d/f /d/g\nRUN rm -r /d/e && touch /d/new\n",
    );
    let layers = || -> serde_json::Value {
        let mut command = host.command(&["build", "-t", "same", "-f", "same", "--no-cache", "."]);
        command.env("SOURCE_DATE_EPOCH", "86400");
        finish(command, b"").expect(0);
        let inspected = host.agentkernel(&["images", "inspect", "same", "--json"]);
        let mut inspected: serde_json::Value = serde_json::from_str(inspected.expect(0)).unwrap();
        assert_eq!(inspected["created"], "1970-01-02T00:00:00Z");
        serde_json::json!([inspected["digest"].take(), inspected["layers"].take()])
    };
    assert_eq!(layers(), layers());

    // As any other image, under its name.
    host.write("child.Dockerfile", "FROM my-tools\nLABEL child=yes\n");
    host.agentkernel(&["build", "-t", "child", "-f", "child.Dockerfile", "."]).expect(0);
    host.agentkernel(&["images", "rm", "child", "same", "my-tools", "base"]).expect(0);
    assert!(!host.state().join("image-metadata/child.json").exists());
    // What steps made stays for the next build, until it is pruned.
    assert!(fs::read_dir(host.state().join("images/blobs/sha256")).unwrap().count() > 0);
    host.agentkernel(&["images", "prune"]).expect(0);
    assert_eq!(fs::read_dir(host.state().join("images/blobs/sha256")).unwrap().count(), 0);
}

#[test]
fn a_build_that_fails_leaves_the_former_image_and_nothing_else() {
    let host = Host::new();
    base(&host);
    host.write("Dockerfile", "FROM base\nCOPY Dockerfile /\n");
    host.agentkernel(&["build", "-t", "tools", "."]).expect(0);
    let id = |host: &Host| -> serde_json::Value {
        let inspected = host.agentkernel(&["images", "inspect", "tools", "--json"]);
        serde_json::from_str::<serde_json::Value>(inspected.expect(0)).unwrap()["image_id"].clone()
    };
    let before = id(&host);
    host.write("Dockerfile", "FROM base\nRUN echo begun\nRUN echo last words && \\\n    exit 7\n");
    let said = host.agentkernel(&["build", "-t", "tools", "."]);
    said.expect(1);
    for part in ["Dockerfile:3:1: the command ended with exit code 7", "last words", "    ^"] {
        assert!(said.stderr.contains(part), "{}", said.stderr);
    }
    assert_eq!(id(&host), before);

    // Killed while a step runs: nothing runs on, and the next build takes what was done.
    host.write("Dockerfile", "FROM base\nRUN echo begun\nRUN echo ready && sleep 600\n");
    let build = Running::start(host.command(&["build", "-t", "tools", "--progress", "plain", "."]));
    host.wait_for_process("qemu");
    signal(build.child.id(), Signal::KILL);
    let _ = build.end();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !host.processes().is_empty() {
        assert!(std::time::Instant::now() < deadline, "{:?}", host.processes());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(id(&host), before);
    host.write("Dockerfile", "FROM base\nRUN echo begun\nRUN true\n");
    let said = stderr_of(&host, &["build", "-t", "tools", "."]);
    assert!(said.contains("CACHED"), "{said}");
    assert_ne!(id(&host), before);
    assert_store_is_sound(&host);

    // Two of one name at once: both end, one of them is it.
    host.write("Dockerfile", "FROM base\nCOPY base.Dockerfile /one\n");
    host.write("other", "FROM base\nCOPY base.Dockerfile /two\n");
    let both = [["build", "-t", "tools", "-f", "Dockerfile"], ["build", "-t", "tools", "-f", "other"]]
        .map(|arguments| Running::start(host.command(&arguments)));
    for build in both {
        let (code, _, stderr) = build.end();
        assert_eq!(code, 0, "{stderr}");
    }
    // The record and the name tell of the same one.
    let record = |name: &str| host.state().join("image-metadata").join(format!("{name}.json"));
    let recorded: serde_json::Value = serde_json::from_slice(&fs::read(record("tools")).unwrap()).unwrap();
    assert_eq!(recorded["image_id"], id(&host));

    const CHARACTERS: &str =
        "Image name can only contain alphanumeric characters, hyphens, underscores, and dots\nhint: ";
    for (arguments, expected) in [
        (&["build", "-t", "", "."][..], "Image name cannot be empty\nhint: "),
        (&["build", "-t", "a:b", "."], CHARACTERS),
        (&["build", "-t", "a/../b", "."], CHARACTERS),
        (&["build", "-t", "ünï", "."], CHARACTERS),
        (&["build", "-t", "-x", "."], "Image name has separators where there must be none\nhint: "),
        (&["build", "-t", "Tools", "."], "Image name has upper-case letters\nhint: -t tools"),
        (&["create", "x", "--image", "-x"], "it begins with `-`\nhint: "),
        (&["build", "-t", "x", "nowhere"], "Build context 'nowhere' does not exist"),
        (&["build", "-t", "x", "-f", "none", "."], "Dockerfile 'none' does not exist"),
        (&["build", "-t", "x", "empty"], "No Dockerfile found in 'empty'. Specify one with --dockerfile"),
        (&["images", "inspect", "gone"], "Image 'gone' not found"),
    ] {
        fs::create_dir_all(host.project().join("empty")).unwrap();
        let said = finish(host.command(arguments), b"");
        said.expect(1);
        assert!(said.stderr.contains(expected), "{}", said.stderr);
    }
    // A record that cannot be read, and one of another image, are told by all that read them, until they are taken away.
    fs::write(record("broken"), "{").unwrap();
    fs::copy(record("tools"), record("other")).unwrap();
    for arguments in [&["build", "-t", "tools", "."][..], &["images", "list"], &["images", "sync"]] {
        let said = host.agentkernel(arguments);
        said.expect(1);
        assert!(said.stderr.contains("broken.json is damaged"), "{arguments:?}: {}", said.stderr);
        assert!(said.stderr.contains("hint: agentkernel images rm broken"), "{arguments:?}: {}", said.stderr);
    }
    host.agentkernel(&["images", "rm", "broken", "other"]).expect(0);
    host.agentkernel(&["images", "list"]).expect(0);
    assert!(record("tools").exists());
    // One whose image is gone is forgotten.
    fs::write(
        record("gone"),
        fs::read_to_string(record("tools")).unwrap().replace("\"name\": \"tools\"", "\"name\": \"gone\""),
    )
    .unwrap();
    assert_eq!(host.agentkernel(&["images", "sync"]).expect(0), "gone\n");
    assert!(!record("gone").exists() && record("tools").exists());
}

/// A program that has a signal of its own is asked to end with that alone; what it started is its own affair.
#[test]
fn an_image_says_how_its_program_is_asked_to_end() {
    let host = Host::new();
    base(&host);
    let wait = "while :; do sleep 1; done";
    host.write(
        "program",
        format!(
            "#!/bin/sh\ntrap 'echo asked > /asked; exit' USR1\ntrap 'echo TERM > /asked; exit' TERM\n\
             sh -c \"trap 'touch /child' TERM; {wait}\" &\necho ready\n{wait}\n"
        ),
    );
    set_mode(&host.project().join("program"), 0o755);
    host.write("Dockerfile", "FROM base\nCOPY program /\nSTOPSIGNAL SIGUSR1\nENTRYPOINT [\"/program\"]\n");
    host.agentkernel(&["build", "-t", "worker", "."]).expect(0);
    let mut run =
        Running::start(host.command(&["run", "-k", "-n", "dev", "--workspace", "none", "--image", "worker"]));
    assert_eq!(run.line(), "ready\n");
    let other = format!("trap 'touch /other; exit' TERM; touch /begun; {wait}");
    host.agentkernel(&["exec", "-d", "dev", "--", "sh", "-c", &other]).expect(0);
    let looked = ["exec", "dev", "--", "sh", "-c", "until ls /begun; do sleep 1; done"];
    host.agentkernel(&looked).expect(0);
    host.agentkernel(&["stop", "dev"]).expect(0);
    run.end();
    host.agentkernel(&["start", "dev"]).expect(0);
    let said = host.agentkernel(&[
        "exec",
        "dev",
        "--",
        "sh",
        "-c",
        "cat /asked; ls /other; ls /child 2>/dev/null; true",
    ]);
    assert_eq!(said.expect(0), "asked\n/other\n");
    host.agentkernel(&["rm", "--force", "dev"]).expect(0);
}

/// No machine is needed for any of this.
#[test]
fn a_project_says_how_it_is_built_and_what_cannot_be_built_is_named() {
    let host = Host::new();
    let configuration = "[build]\ndockerfile = 'docker/Dockerfile'\ncontext = 'sources'\ntarget = 'one'\n\
                         args = { WHO = 'file', OTHER = 'file' }\n";
    host.write("agentkernel.toml", configuration);
    fs::create_dir_all(host.project().join("sources")).unwrap();
    host.write("sources/f", "content");
    fs::create_dir_all(host.project().join("docker")).unwrap();
    host.write(
        "docker/Dockerfile",
        "FROM scratch AS one\nARG WHO OTHER\nCOPY f /\nLABEL who=$WHO other=$OTHER\nFROM nowhere\n",
    );
    host.agentkernel(&["build", "-t", "tools", "--build-arg", "WHO=flag"]).expect(0);
    let labels = || -> serde_json::Value {
        let record = fs::read_to_string(host.state().join("image-metadata/tools.json")).unwrap();
        serde_json::from_str::<serde_json::Value>(&record).unwrap()["labels"].clone()
    };
    assert_eq!((&labels()["who"], &labels()["other"]), (&"flag".into(), &"file".into()));

    // A stranger's project does not get at what lies beside it.
    std::os::unix::fs::symlink("/etc", host.project().join("out")).unwrap();
    host.write("agentkernel.toml", "[build]\ncontext = 'out'\n");
    let said = host.agentkernel(&["build", "-t", "tools"]);
    said.expect(1);
    assert!(said.stderr.contains("agentkernel.toml names out, which leads out of"), "{}", said.stderr);
    fs::remove_file(host.project().join("agentkernel.toml")).unwrap();

    let secret = host.project().join("sources/secret");
    fs::write(&secret, "x").unwrap();
    set_mode(&secret, 0);
    host.write("sources/Dockerfile", "FROM scratch\nCOPY . /\n");
    let said = host.agentkernel(&["build", "-t", "tools", "sources"]);
    if is_root() {
        said.expect(0);
    } else {
        said.expect(1);
        assert!(said.stderr.contains("sources/secret: Permission denied"), "{}", said.stderr);
    }
    fs::remove_file(secret).unwrap();

    // The disk is full: the former image stays, what was written does not, and a smaller one can be built.
    if is_root() {
        let host = Host::new();
        let images = Mounted::tmpfs(&host.state().join("images"), "8m");
        host.write("small", "small");
        host.write("Dockerfile", "FROM scratch\nCOPY small /\n");
        host.agentkernel(&["build", "-t", "tools", "."]).expect(0);
        let before = fs::read(host.state().join("image-metadata/tools.json")).unwrap();
        let blobs = || fs::read_dir(host.state().join("images/blobs/sha256")).unwrap().count();
        let count = blobs();
        fs::write(host.project().join("large"), noise(16 << 20)).unwrap();
        host.write("Dockerfile", "FROM scratch\nCOPY large /\n");
        let said = host.agentkernel(&["build", "-t", "tools", "."]);
        said.expect(1);
        assert!(said.stderr.contains("No space left"), "{}", said.stderr);
        assert!(fs::read(host.state().join("image-metadata/tools.json")).unwrap() == before);
        assert_eq!(blobs(), count);
        assert_store_is_sound(&host);
        host.write("Dockerfile", "FROM scratch\nCOPY small /again\n");
        host.agentkernel(&["build", "-t", "tools", "."]).expect(0);
        drop(images);
    }
}
