//! A guest that lies, and a host that changes under our hands.

use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use agentkernel_sandbox::workspace::{ChangeLimits, RecordError, UpperEntry, apply};

use crate::project::*;

#[test]
fn lies_end_the_recording_and_leave_nothing() {
    let project = Project::with(&[("a", "1")]);
    let raw = |path: &[u8]| (path.to_vec(), UpperEntry::Removed, Vec::new());
    let table: Vec<Vec<Sent>> = vec![
        vec![raw(b"../escape")],
        vec![raw(b"/etc/passwd")],
        vec![raw(b"a/../../b")],
        vec![raw(b"")],
        vec![raw(b"nul\0")],
        vec![raw(&[b'x'; 256])],
        vec![removed("a"), file("a", b"2")],
        vec![link("d", "/etc"), file("d/passwd", b"x")],
        vec![file("d/x/y", b"x"), file("d/x", b"x")],
        vec![removed("d"), file("d/x", b"x")],
        vec![link("l", "")],
        vec![link("l", &"t".repeat(4096))],
        vec![link("l", "a\0b")],
        vec![(b"short".to_vec(), UpperEntry::File { mode: 0, size: 5, modified_ns: 0 }, b"1234".to_vec())],
        vec![(b"long".to_vec(), UpperEntry::File { mode: 0, size: 3, modified_ns: 0 }, b"1234".to_vec())],
        vec![(b"huge".to_vec(), UpperEntry::File { mode: 0, size: u64::MAX, modified_ns: 0 }, Vec::new())],
        vec![(b"stray".to_vec(), UpperEntry::Removed, b"data".to_vec())],
    ];
    for sent in table {
        assert!(project.try_record("set", &sent).is_err(), "{sent:?}");
        assert!(!project.state().join("set").exists());
    }
    assert_eq!(project.nodes().len(), 1);
}

#[test]
fn limits_hold_before_the_data_comes() {
    let project = Project::with(&[("d/1", ""), ("d/2", ""), ("d/3", "")]);
    let limits = ChangeLimits { entries: 3, bytes: 10 };
    let big = |size| UpperEntry::File { mode: 0o644, size, modified_ns: 0 };
    let mut recorder = project.recorder("bytes", limits);
    recorder.begin_entry(b"a", big(6)).unwrap();
    assert!(matches!(recorder.begin_entry(b"b", big(1)), Err(RecordError::Sequence)));
    recorder.data(b"123456").unwrap();
    recorder.end_entry().unwrap();
    assert!(matches!(recorder.begin_entry(b"b", big(5)), Err(RecordError::TooManyBytes { limit: 10 })));
    let mut recorder = project.recorder("entries", limits);
    for path in [b"a", b"b", b"c"] {
        recorder.begin_entry(path, UpperEntry::Removed).unwrap();
    }
    let more = recorder.begin_entry(b"x", UpperEntry::Removed);
    assert!(matches!(more, Err(RecordError::TooManyEntries { limit: 3 })));
    // One entry that stands for more than the limit.
    let mut recorder = project.recorder("expanded", limits);
    recorder.begin_entry(b"d", UpperEntry::Removed).unwrap();
    assert!(matches!(recorder.finish(), Err(RecordError::TooManyEntries { .. })));
}

#[test]
fn a_host_that_swaps_directories_for_links_is_never_followed_outside() {
    let outside = Project::with(&[("file", "outside"), ("gone", "outside")]);
    for round in 0..20 {
        let project = Project::with(&[("d/file", "1"), ("d/gone", "1")]);
        let sent: Vec<Sent> = (0..40).map(|index| file(&format!("d/n{index}"), b"guest")).collect();
        let mut set = project.record(&[&sent[..], &[file("d/file", b"guest"), removed("d/gone")]].concat());
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    std::fs::rename(project.path("d"), project.path("moved")).unwrap();
                    symlink(outside.root(), project.path("d")).unwrap();
                    std::thread::yield_now();
                    std::fs::remove_file(project.path("d")).unwrap();
                    std::fs::rename(project.path("moved"), project.path("d")).unwrap();
                }
            });
            for _ in 0..5 {
                let report = apply(&mut set, &take_all()).unwrap();
                assert!(report.failed.is_empty(), "{report:?}");
            }
            stop.store(true, Ordering::Relaxed);
        });
        let report = apply(&mut set, &take_all()).unwrap();
        assert!(report.is_complete(), "round {round}: {report:?}");
        let mut nodes = project.nodes();
        // While its directory was away it was gone, and so it was done.
        nodes.remove(std::path::Path::new("d/gone"));
        assert_eq!(nodes.len(), 42);
        project.assert_tidy();
        assert_eq!(outside.nodes().len(), 2);
        assert_eq!((outside.read("file"), outside.read("gone")), ("outside".into(), "outside".into()));
    }
}

#[test]
fn a_host_that_saves_at_the_same_moment_loses_nothing() {
    for remove in [false, true] {
        for round in 0..150_u32 {
            let project = Project::with(&[("f", "base")]);
            let mut set = project.record(&[if remove { removed("f") } else { file("f", b"guest") }]);
            let saved = std::thread::scope(|scope| {
                let saver = scope.spawn(|| {
                    for _ in 0..round * 20 {
                        std::hint::spin_loop();
                    }
                    // As editors save: only where the file still is what they opened.
                    project.write("f.new", b"host");
                    let mine = std::fs::read(project.path("f")).is_ok_and(|content| content == b"base");
                    if mine {
                        std::fs::rename(project.path("f.new"), project.path("f")).unwrap();
                    } else {
                        std::fs::remove_file(project.path("f.new")).unwrap();
                    }
                    mine
                });
                let report = apply(&mut set, &take_all()).unwrap();
                (saver.join().unwrap(), report)
            });
            let nodes = project.nodes();
            let host_there = nodes.values().any(|node| *node == Node::File(b"host".into(), 0o644));
            // The saver may have looked just before we replaced the file and saved just after: then its version wins
            // the name. Whatever the order, it is not lost.
            assert!(!saved.0 || host_there, "{saved:?} {nodes:?}");
            assert!(nodes.len() <= 2, "{nodes:?}");
        }
    }
}
