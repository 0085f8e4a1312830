//! An apply that is killed at any moment is finished by the next one.

use std::os::unix::fs::DirBuilderExt;
use std::process::Command;
use std::time::Duration;

use agentkernel_sandbox::workspace::{ChangeSet, apply, repair};

use crate::project::*;

const SET: &str = "AGENTKERNEL_TEST_APPLY_SET";

/// Not a test of its own: the process that is killed.
#[test]
fn apply_in_a_child() {
    if let Some(set) = std::env::var_os(SET) {
        apply(&mut ChangeSet::load(set.as_ref()).unwrap(), &take_all()).unwrap();
    }
}

fn changes() -> (Project, Vec<Sent>, Nodes) {
    let project = Project::new();
    let mut sent = vec![directory("new")];
    for index in 0..30 {
        project.write(format!("edit{index}"), b"old");
        project.write(format!("gone{index}"), b"old");
        project.write(format!("turn{index}"), b"old");
        project.write(format!("flat{index}/x"), b"old");
        sent.push(file(&format!("edit{index}"), &vec![b'n'; 3000]));
        sent.push(removed(&format!("gone{index}")));
        sent.push(opaque(&format!("turn{index}")));
        sent.push(file(&format!("turn{index}/y"), b"new"));
        sent.push(file(&format!("flat{index}"), b"new"));
        sent.push(file(&format!("new/{index}"), b"new"));
        sent.push(link(&format!("link{index}"), "new"));
    }
    project.serve();
    let reference = Project::new();
    reference.build(&project.nodes());
    reference.serve();
    assert!(reference.take(&sent).1.is_complete());
    (project, sent, reference.nodes())
}

#[test]
fn a_killed_apply_is_finished_by_the_next() {
    let mut killed = 0;
    for round in 0..12_u64 {
        let (project, sent, expected) = changes();
        let set = project.record(&sent).directory().to_owned();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash::apply_in_a_child"])
            .env(SET, &set)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let marker = set.join("applying");
        while !marker.exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_micros(100));
        }
        std::thread::sleep(Duration::from_millis(round * round));
        child.kill().unwrap();
        killed += usize::from(!child.wait().unwrap().success());
        if round % 2 == 0 {
            repair(&set).unwrap();
            project.assert_tidy();
        }
        let mut set = ChangeSet::load(&set).unwrap();
        let report = apply(&mut set, &take_all()).unwrap();
        assert!(report.is_complete(), "round {round}: {report:?}");
        assert_eq!(project.nodes(), expected, "round {round}");
        assert!(!set.directory().join("applying").exists());
    }
    assert!(killed > 0, "no apply was killed in time");
}

/// What the steps of an apply leave if it dies between them, made by hand: kills seldom meet these moments.
#[test]
fn every_step_between_two_names_is_repaired() {
    #[derive(Clone, Copy, Debug)]
    enum Died {
        Writing,
        Exchanged,
        ExchangedWithHosts,
        MovedAside,
        MovedAsideHosts,
        MadeDirectory,
    }
    use Died::*;
    for died in [Writing, Exchanged, ExchangedWithHosts, MovedAside, MovedAsideHosts, MadeDirectory] {
        let project = Project::with(&[("edit", "old"), ("gone", "old")]);
        let mut set = project.record(&[file("edit", b"new"), removed("gone"), directory("made")]);
        let manifest = std::fs::read_to_string(set.directory().join("changes.json")).unwrap();
        let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
        let temporary = |path: &str| {
            let entry = set.entries().iter().find(|entry| entry.path.as_path().ends_with(path)).unwrap();
            format!(".agentkernel-{}-{}", manifest["id"].as_str().unwrap(), entry.id)
        };
        let rename = |from: &str, to: &str| std::fs::rename(project.path(from), project.path(to)).unwrap();
        match died {
            Writing => project.write(temporary("edit"), b"n"),
            Exchanged | ExchangedWithHosts => {
                if matches!(died, ExchangedWithHosts) {
                    project.write("edit", b"host");
                }
                rename("edit", &temporary("edit"));
                project.write("edit", b"new");
            }
            MovedAside | MovedAsideHosts => {
                if matches!(died, MovedAsideHosts) {
                    project.write("gone", b"host");
                }
                rename("gone", &temporary("gone"));
            }
            MadeDirectory => {
                std::fs::DirBuilder::new().mode(0o700).create(project.path(temporary("made"))).unwrap();
            }
        }
        std::fs::write(set.directory().join("applying"), "").unwrap();
        let report = apply(&mut set, &take_all()).unwrap();
        project.assert_tidy();
        match died {
            ExchangedWithHosts => {
                assert_eq!((report.conflicts.len(), project.read("edit")), (1, "host".into()))
            }
            MovedAsideHosts => assert_eq!((report.conflicts.len(), project.read("gone")), (1, "host".into())),
            _ => assert!(report.is_complete() && !project.path("gone").exists(), "{died:?} {report:?}"),
        }
    }
}

#[test]
fn a_failed_write_is_reported_and_nothing_is_removed() {
    let project = Project::with(&[("old-name", "content")]);
    let mut set = project.record(&[removed("old-name"), file("new-name", b"content")]);
    // The set's own bytes are gone, which stands for any error in the middle of a file.
    std::fs::write(set.directory().join("content"), b"con").unwrap();
    let report = apply(&mut set, &take_all()).unwrap();
    assert_eq!((report.failed.len(), report.not_applied.len(), report.remaining), (1, 1, 2));
    assert_eq!(project.read("old-name"), "content");
    assert!(!project.path("new-name").exists());
    project.assert_tidy();
}
