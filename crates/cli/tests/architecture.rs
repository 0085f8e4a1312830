//! The direction of the rooms: which of our crates may know which, as docs/architecture.md draws it.
//!
//! Guards the one thing that no compiler checks: that nobody adds an edge in passing. A new crate, or a new edge, is a
//! decision and gets its line here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Each crate's directory, the crates it may use, and whether it may hold unsafe code.
const ROOMS: &[(&str, &[&str], Unsafe)] = &[
    ("build", &["image"], Unsafe::Forbidden),
    ("cli", &["image", "protocol", "sandbox", "server"], Unsafe::Forbidden),
    // System calls without a safe wrapper, each with its reason beside it.
    ("guest", &["protocol"], Unsafe::Allowed),
    ("image", &[], Unsafe::Forbidden),
    // The jail: unshare, and descriptors that arrive by number.
    ("machine", &[], Unsafe::Allowed),
    ("network", &[], Unsafe::Forbidden),
    ("protocol", &[], Unsafe::Forbidden),
    ("sandbox", &["build", "image", "machine", "network", "protocol"], Unsafe::Forbidden),
    ("server", &["image", "protocol", "sandbox"], Unsafe::Forbidden),
];

#[derive(Clone, Copy, PartialEq)]
enum Unsafe {
    Allowed,
    Forbidden,
}

/// A crate of the workspace, as cargo knows it.
struct Room {
    directory: PathBuf,
    /// Directory names of ours that it depends on, for whatever purpose.
    uses: BTreeSet<String>,
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn rooms() -> BTreeMap<String, Room> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(repository())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    packages.iter().map(room).collect()
}

fn room(package: &Value) -> (String, Room) {
    let manifest = Path::new(package["manifest_path"].as_str().unwrap());
    let directory = manifest.parent().unwrap().to_owned();
    let dependencies = package["dependencies"].as_array().unwrap();
    let uses = dependencies.iter().filter_map(|dependency| dependency["path"].as_str()).map(directory_name);
    let uses = uses.collect();
    (directory_name(directory.to_str().unwrap()), Room { directory, uses })
}

fn directory_name(path: &str) -> String {
    Path::new(path).file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn crates_know_only_those_they_may() {
    let rooms = rooms();
    let listed: BTreeSet<&str> = ROOMS.iter().map(|(name, ..)| *name).collect();
    let found: BTreeSet<&str> = rooms.keys().map(String::as_str).collect();
    assert_eq!(found, listed, "the crates of the workspace and those listed in this file");
    let forbidden: Vec<String> = ROOMS
        .iter()
        .flat_map(|(name, allowed, _)| {
            let uses = rooms[*name].uses.iter().filter(|used| !allowed.contains(&used.as_str()));
            uses.map(move |used| format!("{name} -> {used}"))
        })
        .collect();
    assert!(forbidden.is_empty(), "edges that the design forbids: {forbidden:?}");
}

#[test]
fn every_crate_directory_is_a_room() {
    let entries = std::fs::read_dir(repository().join("crates")).unwrap();
    let directories: BTreeSet<String> = entries
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    let listed: BTreeSet<String> = ROOMS.iter().map(|(name, ..)| (*name).to_owned()).collect();
    assert_eq!(directories, listed);
}

#[test]
fn unsafe_code_is_forbidden_but_where_it_is_earned() {
    let rooms = rooms();
    let lacking: Vec<&str> = ROOMS
        .iter()
        .filter(|(name, _, rule)| *rule == Unsafe::Forbidden && !forbids_unsafe(&rooms[*name].directory))
        .map(|(name, ..)| *name)
        .collect();
    assert!(lacking.is_empty(), "crates without #![forbid(unsafe_code)]: {lacking:?}");
}

/// Whether every root of the crate's own code says so.
fn forbids_unsafe(directory: &Path) -> bool {
    let roots = ["src/lib.rs", "src/main.rs"].map(|root| directory.join(root));
    let mut existing = roots.iter().filter(|root| root.exists()).peekable();
    existing.peek().is_some()
        && existing.all(|root| {
            let text = std::fs::read_to_string(root).unwrap();
            text.lines().any(|line| line.trim() == "#![forbid(unsafe_code)]")
        })
}
