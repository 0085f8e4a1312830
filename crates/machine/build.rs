//! Compiles the guest agent as a static program, so that the library can embed it.
//!
//! The guest is another package for another kind of target: static, small, without the flags of whoever builds us. So it
//! gets a cargo of its own with a target directory of its own; sharing one would wait for our own build for ever.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use sha2::{Digest, Sha256};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What an outer build (clippy, a fuzzer, a coverage run) puts into the environment for its own compiler.
const FOREIGN: &[&str] = &[
    "CARGO_BUILD_RUSTC",
    "CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_RUSTC_WRAPPER",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_MAKEFLAGS",
    "CARGO_TARGET_DIR",
    "CLIPPY_ARGS",
    "MAKEFLAGS",
    "MFLAGS",
    "RUSTC",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTDOC",
    "RUSTDOCFLAGS",
    "RUSTFLAGS",
    "__CARGO_DEFAULT_LIB_METADATA",
];

fn main() {
    let output = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let root = manifest.join("../..");
    for watched in
        ["crates/guest", "crates/protocol/src", "crates/protocol/Cargo.toml", "Cargo.lock", "Cargo.toml"]
    {
        println!("cargo::rerun-if-changed={}", root.join(watched).display());
    }
    println!("cargo::rerun-if-changed=build.rs");

    let program = build_guest(&root, &output.join("guest"));
    let bytes =
        fs::read(&program).unwrap_or_else(|error| panic!("cannot read {}: {error}", program.display()));
    let embedded = output.join("agentkernel-guest");
    fs::write(&embedded, &bytes)
        .unwrap_or_else(|error| panic!("cannot write {}: {error}", embedded.display()));
    println!("cargo::rustc-env=AGENTKERNEL_GUEST={}", embedded.display());
    let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    println!("cargo::rustc-env=AGENTKERNEL_GUEST_SHA256={digest}");
}

fn build_guest(root: &Path, target_directory: &Path) -> PathBuf {
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    for name in FOREIGN {
        cargo.env_remove(name);
    }
    for (name, _) in env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PROFILE_") || name.starts_with("CARGO_TARGET_"))
        {
            cargo.env_remove(name);
        }
    }
    cargo
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .args([
            "build",
            "--package",
            "agentkernel-guest",
            "--profile",
            "guest",
            "--target",
            TARGET,
            "--manifest-path",
        ])
        .arg(root.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target_directory);
    // A checkout that carries its lock file builds exactly that, and never waits for the network to change it.
    if root.join("Cargo.lock").exists() {
        cargo.arg("--locked");
    }
    let status =
        cargo.status().unwrap_or_else(|error| panic!("cannot start cargo for the guest agent: {error}"));
    assert!(status.success(), "the guest agent did not build ({status})");
    target_directory.join(TARGET).join("guest").join("agentkernel-guest")
}
