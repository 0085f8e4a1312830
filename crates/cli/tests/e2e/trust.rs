//! The host's certificate authorities in every guest, and in nothing that outlives it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::build::base;
use crate::host::{Host, Said, finish};

fn openssl(directory: &Path, arguments: &str) {
    let output = Command::new("openssl").args(arguments.split(' ')).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

const CONFIGURATION: &str = "[ca]\ndefault_ca = default\n[default]\ndatabase = index\ndefault_md = sha256\n\
                             default_crl_days = 30\n[ext]\nsubjectAltName = DNS:localhost\nbasicConstraints = CA:FALSE\n";

/// An authority NAME-ca.pem in the project, and the server NAME.server that it signed.
fn authority(host: &Host, name: &str) -> PathBuf {
    let project = host.project();
    host.write("openssl.cnf", CONFIGURATION);
    host.write("index", "");
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(
        &project,
        &format!(
            "req -x509 {key} -keyout {name}-ca.key -out {name}-ca.pem -subj /CN={name}-authority -days 30 \
             -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign"
        ),
    );
    openssl(&project, &format!("req {key} -keyout {name}.key -out {name}.csr -subj /CN=localhost"));
    openssl(
        &project,
        &format!(
            "x509 -req -in {name}.csr -CA {name}-ca.pem -CAkey {name}-ca.key -CAcreateserial -out {name}.pem \
             -days 30 -extfile openssl.cnf -extensions ext"
        ),
    );
    // One file: a project's keys are not served under names that say so.
    let read = |kind: &str| host.read(&format!("{name}.{kind}"));
    host.write(&format!("{name}.server"), read("pem") + &read("key"));
    project.join(format!("{name}-ca.pem"))
}

/// Runs the program as somebody who trusts `bundle`.
#[track_caller]
fn trusting(host: &Host, bundle: &Path, arguments: &[&str]) -> Said {
    let mut command = host.command(arguments);
    command.env("SSL_CERT_FILE", bundle);
    finish(command, b"")
}

/// A line of the file's first certificate that no other has: of its key.
fn mark(path: &Path) -> String {
    fs::read_to_string(path).unwrap().lines().nth(5).unwrap().to_owned()
}

/// The clients that people use reach a server of an authority that only the host knows, and no other.
#[test]
fn programs_trust_whom_the_host_trusts() {
    let host = Host::new();
    let known = authority(&host, "known");
    openssl(
        &host.project(),
        "ca -config openssl.cnf -gencrl -keyfile known-ca.key -cert known-ca.pem -out list.crl",
    );
    authority(&host, "unknown");
    host.write("trust.py", include_str!("trust.py"));
    // A key in the bundle, as a careless administrator leaves it there, stays on the host.
    let bundle = host.path().join("bundle.pem");
    let key = fs::read_to_string(host.project().join("known-ca.key")).unwrap();
    fs::write(&bundle, fs::read_to_string(&known).unwrap() + &key).unwrap();
    // They are other names in the guest: the bundle has to be what they trust.
    let said = trusting(&host, &bundle, &["run", "-q", "--", "python3", "trust.py"]);
    let clients = ["python", "pip", "node", "npm", "git", "curl", "java", "bare curl", "bare git"];
    let expected: String = clients.iter().map(|name| format!("{name}: works refused\n")).collect();
    assert_eq!(said.expect(0), expected, "{}", said.stderr);
    let script = "! grep -l 'PRIVATE KEY' /run/agentkernel/certificates.pem /etc/ssl/certs/ca-certificates.crt && \
                  echo $SSL_CERT_FILE $PIP_CERT";
    let said = trusting(&host, &bundle, &["run", "-q", "-e", "PIP_CERT=/mine", "--", "sh", "-c", script]);
    assert_eq!(said.expect(0), "/run/agentkernel/certificates.pem /mine\n");
    // Of somebody who names no bundle the guest knows the host's own; the template of the other is not theirs.
    let script = format!("grep -c '{}' /run/agentkernel/certificates.pem", mark(&known));
    assert_eq!(host.sh(&[], &script).expect(1), "0\n");
    let said = trusting(&host, &bundle, &["doctor"]);
    let line = said.expect_any().lines().find(|line| line.contains("certificates:")).unwrap().to_owned();
    assert!(line.contains(bundle.to_str().unwrap()), "{line}");
    let said = trusting(&host, Path::new("/nowhere"), &["doctor"]);
    assert!(said.expect_any().contains("the certificates in /nowhere cannot be read"), "{said:?}");
    host.assert_nothing_is_left();
}

/// An image's own bundle has the host's authorities besides, what programs write there is kept, and no layer of an
/// image has anything of the host.
#[test]
fn an_images_bundle_is_added_to_and_never_written() {
    let host = Host::new();
    let [mine, other, later] = ["image", "host", "later"].map(|name| authority(&host, name));
    let [of_image, of_host, of_later] = [&mine, &other, &later].map(|path| mark(path));
    let bundle = host.path().join("bundle.pem");
    fs::copy(&other, &bundle).unwrap();
    base(&host);
    let path = "/etc/ssl/certs/ca-certificates.crt";
    let count = |mark: &str, path: &str| format!("busybox grep -c '{mark}' {path}");
    // What is looked for comes from files: an image's history has its commands.
    host.write("of-host", &of_host);
    host.write("of-image", &of_image);
    let has = |what: &str, path: &str| format!("busybox grep -c -f /marks/{what} {path}");
    host.write(
        "Dockerfile",
        format!(
            "FROM base\nCOPY image-ca.pem {path}\nRUN mkdir -p /usr/local/share && ln -s certs/ca-certificates.crt \
             /etc/ssl/cert.pem\n\
             RUN --mount=type=bind,target=/marks {} && {} && {} && {} && echo seen\n\
             RUN echo touched > /touched\n\
             RUN echo '# mine' >> {path}\n",
            has("of-host", path),
            has("of-host", "$SSL_CERT_FILE"),
            has("of-image", "$NODE_EXTRA_CA_CERTS"),
            has("of-host", "/etc/ssl/cert.pem"),
        ),
    );
    let said = trusting(&host, &bundle, &["build", "-t", "mine", "."]);
    said.expect(0);
    assert!(said.stderr.contains("seen"), "{}", said.stderr);
    // Not in any blob, whatever is in it.
    for entry in fs::read_dir(host.state().join("images/blobs/sha256")).unwrap().flatten() {
        let output = Command::new("gzip").args(["-cdf"]).arg(entry.path()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(!text.contains(&of_host), "{:?} has the host's authority", entry.file_name());
        assert!(!text.contains("agentkernel-certificates"), "{:?}", entry.file_name());
    }
    let whole = format!("cat {path}; ls /etc/ssl/certs /dev/agentkernel-certificates.pem /usr/local/share");
    let create = ["create", "dev", "-q", "--image", "mine", "--workspace", "none"];
    trusting(&host, &bundle, &create).expect(0);
    let exec = |script: &str| host.agentkernel(&["exec", "dev", "--", "sh", "-c", script]);
    let said = exec(&whole).expect_any();
    for needle in [&of_image, &of_host, "# mine", "ca-certificates"] {
        assert!(said.contains(needle), "{needle}: {said}");
    }
    let script = format!("cat /usr/local/share/ca-certificates/* | {}", count(&of_host, "-"));
    assert_eq!(exec(&script).expect(0), "1\n");
    // As update-ca-certificates does: another file in its place. It is what programs see from then on.
    exec(&format!("echo new > {path}.new && mv {path}.new {path}")).expect(0);
    assert_eq!(exec(&format!("cat {path}")).expect(0), "new\n");
    // An authority that the host gets to know later holds from the next start.
    let mut both = fs::read(&other).unwrap();
    both.extend(fs::read(&later).unwrap());
    fs::write(&bundle, both).unwrap();
    host.agentkernel(&["stop", "dev"]).expect(0);
    host.agentkernel(&["start", "dev"]).expect(0);
    assert_eq!(exec(&format!("cat {path}")).expect(0), "new\n");
    assert_eq!(exec(&count(&of_later, "$SSL_CERT_FILE")).expect(0), "1\n");
    // A fork has what its parent had.
    host.agentkernel(&["fork", "dev", "--as", "other"]).expect(0);
    let script = count(&of_later, "$SSL_CERT_FILE");
    assert_eq!(host.agentkernel(&["exec", "other", "--", "sh", "-c", &script]).expect(0), "1\n");
    host.agentkernel(&["rm", "--force", "dev", "other"]).expect(0);
    // Of nobody's bundle nothing of it is left in the image.
    let script = format!("! {} && {}", count(&of_host, path), count(&of_image, path));
    let image = ["--image", "mine", "--workspace", "none"];
    assert_eq!(host.sh(&image, &script).expect(0), "0\n1\n");
    host.assert_nothing_is_left();
}
