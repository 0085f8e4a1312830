//! The rules of recording and applying, one by one.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

use agentkernel_sandbox::workspace::{
    ApplyAction, ApplyOptions, ApplyReport, ChangeKind, ChangeSet, ChangeStatus, ConflictReason, LastChanges,
    UpperEntry, apply,
};

use crate::project::*;

fn paths(set: &ChangeSet) -> Vec<&str> {
    set.entries().iter().map(|change| change.path.as_path().to_str().unwrap()).collect()
}

fn applied(report: &ApplyReport) -> Vec<&str> {
    report.applied.iter().map(|applied| applied.path.as_path().to_str().unwrap()).collect()
}

fn conflicts(report: &ApplyReport) -> Vec<(&str, ConflictReason)> {
    let pair = |conflict: &agentkernel_sandbox::workspace::Conflict| conflict.reason;
    report.conflicts.iter().map(|c| (c.path.as_path().to_str().unwrap(), pair(c))).collect()
}

#[test]
fn copies_that_equal_the_host_are_no_changes() {
    let project = Project::with(&[("touched", "same"), ("d/kept", "k"), ("d/edited", "old"), ("mode", "m")]);
    symlink("touched", project.path("link")).unwrap();
    project.serve();
    let set = project.record(&[
        file("touched", b"same"),
        directory("d"),
        file("d/edited", b"new"),
        file_with("mode", b"m", 0o755),
        link("link", "touched"),
        removed("never-there"),
    ]);
    assert_eq!(paths(&set), ["d/edited", "mode"]);
    assert_eq!(set.summary().to_string(), "2 files changed");
    assert_eq!(set.entries()[0].status, ChangeStatus::Modified);
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut set.content(&set.entries()[0]), &mut content).unwrap();
    assert_eq!(content, b"new");
    let again = ChangeSet::load(set.directory()).unwrap();
    assert_eq!(again.entries(), set.entries());
}

#[test]
fn every_kind_of_change_is_applied_once() {
    let project = Project::with(&[("edit", "old"), ("gone", "x"), ("dir/a", "1"), ("dir/sub/b", "2")]);
    let sent = [
        file_with("edit", b"new", 0o755),
        removed("gone"),
        removed("dir"),
        directory("fresh"),
        file("fresh/deep", b"!"),
        link("fresh/link", "../edit"),
        file("empty", b""),
        (b"odd\n\xff".to_vec(), UpperEntry::File { mode: 0o600, size: 1, modified_ns: 0 }, b"o".to_vec()),
    ];
    let (mut set, report) = project.take(&sent);
    assert!(report.is_complete(), "{report:?}");
    let mut expected = Nodes::new();
    expected.insert("edit".into(), Node::File(b"new".into(), 0o755));
    expected.insert("empty".into(), Node::File(b"".into(), 0o644));
    expected.insert("fresh".into(), Node::Directory(0o755));
    expected.insert("fresh/deep".into(), Node::File(b"!".into(), 0o644));
    expected.insert("fresh/link".into(), Node::Link("../edit".into()));
    let odd = PathBuf::from(std::ffi::OsStr::from_bytes(b"odd\n\xff"));
    expected.insert(odd, Node::File(b"o".into(), 0o600));
    assert_eq!(project.nodes(), expected);
    assert!(set.is_empty() && report.remaining == 0);
    assert_eq!(apply(&mut set, &take_all()).unwrap(), ApplyReport::default());
    // The same guest, recorded again: there is nothing left to see.
    let again = project.try_record("again", &sent).unwrap();
    assert!(again.is_empty(), "{:?}", again.entries());
}

#[test]
fn a_sandbox_that_lives_on_starts_from_what_was_applied() {
    let project = Project::with(&[("a", "1")]);
    let (_, report) = project.take(&[file("a", b"2"), file("b", b"1")]);
    for (path, base) in report.rebased() {
        project.bases.replace(path.as_path(), base);
    }
    let mut set = project.try_record("next", &[file("a", b"3"), removed("b")]).unwrap();
    assert!(apply(&mut set, &take_all()).unwrap().is_complete());
    assert_eq!(project.read("a"), "3");
    assert!(!project.path("b").exists());
}

#[test]
fn types_change_both_ways() {
    let project = Project::with(&[("file", "f"), ("dir/x", "1"), ("dir/y/z", "2"), ("gone/k", "3")]);
    let (_, report) = project.take(&[
        opaque("file"),
        file("file/inside", b"i"),
        file("dir", b"d"),
        link("gone", "file/inside"),
    ]);
    assert!(report.is_complete(), "{report:?}");
    assert_eq!(project.read("file/inside"), "i");
    assert_eq!(project.read("dir"), "d");
    assert_eq!(project.nodes().len(), 4);
}

#[test]
fn conflicts_leave_the_host_alone() {
    let project = Project::with(&[
        ("changed", "1"),
        ("mode", "1"),
        ("removed", "1"),
        ("kill", "1"),
        ("full/a", "1"),
        ("dir/a", "1"),
        ("swapped/a", "1"),
        ("filed/a", "1"),
        ("lost/a", "1"),
        ("typed", "1"),
        ("fine", "1"),
    ]);
    let mut set = project.record(&[
        file("changed", b"guest"),
        file("mode", b"guest"),
        file("removed", b"guest"),
        removed("kill"),
        removed("full"),
        file("both", b"guest"),
        file("swapped/a", b"guest"),
        file("filed/a", b"guest"),
        file("lost/a", b"guest"),
        removed("dir"),
        opaque("typed"),
        file("typed/x", b"guest"),
        file("fine", b"guest"),
    ]);
    project.write("changed", b"host!");
    std::fs::set_permissions(project.path("mode"), PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::remove_file(project.path("removed")).unwrap();
    project.write("kill", b"host");
    project.write("full/later", b"host");
    project.write("both", b"host");
    std::fs::rename(project.path("swapped"), project.state().join("elsewhere")).unwrap();
    symlink(project.state().join("elsewhere"), project.path("swapped")).unwrap();
    for directory in ["filed", "lost"] {
        std::fs::remove_dir_all(project.path(directory)).unwrap();
    }
    project.write("filed", b"host");
    symlink("/", project.path("dir/hole")).unwrap();
    project.write("typed", b"host");
    let dry = apply(&mut set, &ApplyOptions { dry_run: true, ..take_all() }).unwrap();
    let report = apply(&mut set, &take_all()).unwrap();
    project.assert_tidy();
    use ConflictReason::*;
    let expected = [
        ("both", ExistsOnHost),
        ("changed", ChangedOnHost),
        ("dir", DirectoryNotEmpty),
        ("filed/a", ParentNotDirectory),
        ("full", DirectoryNotEmpty),
        ("kill", ChangedOnHost),
        ("lost/a", ParentMissing),
        ("mode", ChangedOnHost),
        ("removed", RemovedOnHost),
        ("swapped/a", ParentIsSymlink),
        ("typed", ChangedOnHost),
        ("typed/x", ParentNotDirectory),
    ];
    assert_eq!(conflicts(&report), expected);
    assert_eq!(conflicts(&dry), expected);
    assert_eq!(applied(&dry), applied(&report));
    assert_eq!(applied(&report), ["dir/a", "fine", "full/a"]);
    assert_eq!(project.read("changed"), "host!");
    assert_eq!(project.read("swapped/a"), "1");
    assert_eq!(project.read("full/later"), "host");
    assert_eq!(set.entries().len(), expected.len());
    // They stay, and once the host's version is out of the way they can be taken.
    std::fs::remove_file(project.path("both")).unwrap();
    assert_eq!(applied(&apply(&mut set, &take_all()).unwrap()), ["both"]);
}

#[test]
fn what_the_host_has_already_is_done() {
    let project = Project::with(&[("a", "1"), ("b", "1")]);
    let mut set = project.record(&[file("a", b"2"), removed("b"), file("c", b"3"), directory("d")]);
    project.write("a", b"2");
    project.write("c", b"3");
    std::fs::remove_file(project.path("b")).unwrap();
    std::fs::create_dir(project.path("d")).unwrap();
    let report = apply(&mut set, &take_all()).unwrap();
    assert!(report.is_complete(), "{report:?}");
    assert!(report.applied.iter().all(|applied| applied.action == ApplyAction::AlreadyDone));
}

#[test]
fn what_could_run_by_itself_waits_to_be_named() {
    let project = Project::with(&[
        (".git/config", "c"),
        (".git/HEAD", "h"),
        ("bare/HEAD", "h"),
        ("bare/objects/x", ""),
        ("bare/refs/x", ""),
        ("kept/file", "k"),
    ]);
    let mut set = project.record(&[
        file(".git/config", b"evil"),
        file_with(".git/hooks/pre-commit", b"evil", 0o755),
        directory(".git/hooks"),
        file(".git/HEAD", b"ref"),
        directory(".husky"),
        file(".husky/pre-push", b"evil"),
        directory(".vscode"),
        file(".vscode/tasks.json", b"{}"),
        file(".vscode/notes", b"fine"),
        link(".cargo", "plain"),
        file("bare/config", b"evil"),
        link("out", "/etc"),
        link("up", "../x"),
        link("steps", "a/../b"),
        link("hook", ".git/hooks"),
        link("kept", "../outside"),
        link("in", "kept/x"),
    ]);
    let report = apply(&mut set, &take_all()).unwrap();
    let held: Vec<_> = report.held_back.iter().map(|held| held.path.as_path().to_str().unwrap()).collect();
    assert_eq!(
        held,
        [
            ".cargo",
            ".git/config",
            ".git/hooks",
            ".git/hooks/pre-commit",
            ".husky",
            ".husky/pre-push",
            ".vscode/tasks.json",
            "bare/config",
            "hook",
            "kept",
            "kept/file",
            "out",
            "steps",
            "up"
        ]
    );
    assert_eq!(applied(&report), [".git/HEAD", ".vscode", ".vscode/notes", "in"]);
    assert_eq!(project.read("kept/file"), "k");
    let named =
        |names: &[&str]| ApplyOptions { named: names.iter().map(PathBuf::from).collect(), ..take_all() };
    // A directory's name does not release what is in it.
    assert!(
        applied(&apply(&mut set, &named(&[".git", ".git/hooks", ".vscode"])).unwrap())
            .iter()
            .all(|path| *path == ".git/hooks")
    );
    let report = apply(&mut set, &named(&[".husky/pre-push", "out", "kept"])).unwrap();
    assert_eq!(applied(&report), [".husky", ".husky/pre-push", "kept", "kept/file", "out"]);
    assert_eq!(std::fs::read_link(project.path("out")).unwrap(), PathBuf::from("/etc"));
}

#[test]
fn special_files_and_bits_never_arrive() {
    let project = Project::with(&[("d/x", "1"), ("su", "1")]);
    let mut set = project.record(&[
        (b"node".to_vec(), UpperEntry::Special, Vec::new()),
        (b"d".to_vec(), UpperEntry::Special, Vec::new()),
        file_with("su", b"evil", 0o6755),
        file_with("new", b"n", 0o1777),
    ]);
    let report = apply(&mut set, &take_all()).unwrap();
    assert_eq!(
        report.refused.iter().map(|path| path.as_path().to_str().unwrap()).collect::<Vec<_>>(),
        ["d", "node"]
    );
    assert_eq!(applied(&report), ["new", "su"]);
    assert!(report.applied.iter().all(|applied| applied.special_bits_dropped));
    assert_eq!(project.nodes()[&PathBuf::from("su")], Node::File(b"evil".into(), 0o755));
    assert_eq!(project.nodes()[&PathBuf::from("new")], Node::File(b"n".into(), 0o777));
    assert_eq!(project.read("d/x"), "1");
}

#[test]
fn an_opaque_directory_removes_what_the_guest_saw() {
    let project = Project::with(&[("d/a", "1"), ("d/b/c", "1"), ("d/.secret", "s"), ("d/kept", "1")]);
    let set = project.record(&[opaque("d"), file("d/new", b"n"), file("d/kept", b"1")]);
    assert_eq!(paths(&set), ["d/a", "d/b", "d/b/c", "d/new"]);
    let mut set = set;
    assert!(apply(&mut set, &take_all()).unwrap().is_complete());
    assert_eq!(project.read("d/.secret"), "s");
    // A directory that holds what the guest cannot see cannot be removed by it.
    let mut set = project.try_record("two", &[removed("d")]).unwrap();
    let report = apply(&mut set, &take_all()).unwrap();
    assert!(conflicts(&report).contains(&("d", ConflictReason::DirectoryNotEmpty)), "{report:?}");
    assert_eq!(project.read("d/.secret"), "s");
}

#[test]
fn a_choice_takes_the_directories_it_needs_and_nothing_else() {
    let project = Project::with(&[("x", "1")]);
    let mut set = project.record(&[
        directory("a"),
        directory("a/b"),
        file("a/b/c", b"1"),
        file("a/b/d", b"1"),
        file("x", b"2"),
        file("y", b"1"),
    ]);
    let choice =
        ApplyOptions { paths: vec!["a".into(), "zzz".into()], exclude: vec!["a/b/d".into()], ..take_all() };
    let dry = apply(&mut set, &ApplyOptions { dry_run: true, ..choice.clone() }).unwrap();
    assert_eq!(applied(&dry), ["a", "a/b", "a/b/c"]);
    assert!(!project.path("a").exists());
    let report = apply(&mut set, &choice).unwrap();
    assert_eq!(
        (applied(&report), report.unmatched.clone()),
        (vec!["a", "a/b", "a/b/c"], vec![PathBuf::from("zzz")])
    );
    assert_eq!(report.remaining, 3);
    assert_eq!(project.read("x"), "1");
}

#[test]
fn a_closed_directory_is_filled_before_it_closes() {
    let project = Project::with(&[("open/x", "1")]);
    let closed = |path: &str| (path.into(), UpperEntry::Directory { mode: 0o555, opaque: false }, Vec::new());
    let (_, report) =
        project.take(&[closed("shut"), file("shut/in", b"1"), closed("open"), file("open/y", b"1")]);
    assert!(report.is_complete(), "{report:?}");
    for path in ["shut", "open"] {
        assert_eq!(project.nodes()[&PathBuf::from(path)], Node::Directory(0o555));
        std::fs::set_permissions(project.path(path), PermissionsExt::from_mode(0o755)).unwrap();
    }
}

#[test]
fn the_last_set_is_replaced_whole() {
    let project = Project::with(&[("a", "1")]);
    let last = LastChanges::new(project.state());
    assert!(last.load().unwrap().is_none());
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let (project, last) = (&project, &last);
            scope.spawn(move || {
                for _ in 0..10 {
                    let fresh = last.fresh().unwrap();
                    let name = fresh.file_name().unwrap().to_str().unwrap();
                    let set = project.try_record(name, &[file("a", &[thread; 100])]).unwrap();
                    last.keep(set).unwrap();
                    assert_eq!(last.load().unwrap().map(|set| set.entries().len()), Some(1));
                }
            });
        }
    });
    let mut set = last.load().unwrap().unwrap();
    assert!(matches!(set.entries()[0].change, ChangeKind::File { size: 100, .. }));
    assert!(apply(&mut set, &take_all()).unwrap().is_complete());
    assert!(last.load().unwrap().unwrap().is_empty());
    // A recording that is given up leaves nothing, and so does the sweep.
    drop(project.recorder("last.new-dropped", agentkernel_sandbox::workspace::ChangeLimits::for_disk(1)));
    last.sweep().unwrap();
    let names: Vec<_> =
        std::fs::read_dir(project.state()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    last.load().unwrap().unwrap().discard().unwrap();
    assert!(last.load().unwrap().is_none());
}
