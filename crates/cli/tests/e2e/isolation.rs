//! What guest root cannot reach, by any means of its own.

use std::fs;

use crate::host::{Host, is_root, set_mode};

/// Searches everything the guest has, block devices and other mounts of its own included, for marked secrets.
#[test]
fn guest_root_cannot_read_what_is_not_shared() {
    let host = Host::new();
    let marker = format!("marker-{}", std::process::id());
    for path in [".ssh/id_ed25519", ".aws/credentials", "private.txt", "other-project/file"] {
        let path = host.home().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, &marker).unwrap();
    }
    let secret = host.path().join("etc-like");
    fs::write(&secret, &marker).unwrap();
    set_mode(&secret, 0o600);
    // Not beside what every machine reads: the templates of the other tests would be outdated.
    let etc = "/etc/apt/agentkernel-test-secret";
    if is_root() {
        fs::write(etc, &marker).unwrap();
        set_mode(etc.as_ref(), 0o600);
    }
    host.write("hunt.py", include_bytes!("hunt.py"));
    let home = host.home();
    let state = host.state();
    let said = host.agentkernel(&[
        "run".as_ref(),
        "-q".as_ref(),
        "-u".as_ref(),
        "root".as_ref(),
        "--".as_ref(),
        "python3".as_ref(),
        "hunt.py".as_ref(),
        marker.as_ref(),
        home.as_os_str(),
        state.as_os_str(),
        secret.as_os_str(),
    ]);
    if is_root() {
        fs::remove_file(etc).unwrap();
    }
    let lines: Vec<&str> = said.expect(0).lines().collect();
    assert_eq!(lines[0], "control: the workspace is readable");
    assert_eq!(lines[1..], ["nothing found"], "{}", said.stderr);
}

#[test]
fn the_guest_reaches_neither_this_machine_nor_its_networks() {
    let host = Host::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let script = format!(
        "import socket\nfor address in ('127.0.0.1', '192.0.0.1', '10.0.2.2', '169.254.169.254'):\n try:\n  \
         socket.create_connection((address, {port}), 2); print('connected')\n except OSError: print('no')"
    );
    for network in ["public", "none"] {
        let run = ["run", "-q", "--workspace", "none", "--network", network, "--", "python3", "-c", &script];
        assert_eq!(host.agentkernel(&run).expect(0), "no\nno\nno\nno\n", "{network}");
    }
}
