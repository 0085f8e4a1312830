//! The diff of a change set, and renames in it.

use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};

use agentkernel_sandbox::workspace::{
    ChangeSet, DiffOptions, DiffStatus, DiffSummary, FileDiff, Palette, apply, diff,
};
use proptest::prelude::*;

use crate::project::*;

/// The unified text, what is known of each file, and the sum.
fn render(set: &mut ChangeSet, options: &DiffOptions) -> (String, Vec<FileDiff>, DiffSummary) {
    let (mut text, mut files) = (Vec::new(), Vec::new());
    let summary = diff(set, options, &mut |file| {
        files.push(file.clone());
        file.write_unified(&mut text, &Palette::default())
    });
    (String::from_utf8_lossy(&text).into_owned(), files, summary.unwrap())
}

#[test]
fn a_diff_is_gits() {
    let project =
        Project::with(&[("edit", "one\ntwo\nthree\n"), ("gone", "bye"), ("old name", "some text\nmore\n")]);
    project.serve();
    let mut set = project.record(&[
        file_with("edit", b"one\n2\nthree\n", 0o755),
        removed("gone"),
        removed("old name"),
        file("new\tname", b"some text\nmore\n"),
        file("binary", b"\0\x01"),
        link("link", "edit"),
        directory("empty"),
    ]);
    let (text, files, summary) = render(&mut set, &DiffOptions::default());
    let expected = "diff --git a/binary b/binary
new file mode 100644
Binary files /dev/null and b/binary differ
diff --git a/edit b/edit
old mode 100644
new mode 100755
--- a/edit
+++ b/edit
@@ -1,3 +1,3 @@
 one
-two
+2
 three
diff --git a/gone b/gone
deleted file mode 100644
--- a/gone
+++ /dev/null
@@ -1 +0,0 @@
-bye
\\ No newline at end of file
diff --git a/link b/link
new file mode 120000
--- /dev/null
+++ b/link
@@ -0,0 +1 @@
+edit
\\ No newline at end of file
diff --git a/old name \"b/new\\tname\"
similarity index 100%
rename from old name
rename to \"new\\tname\"
";
    assert_eq!(text, expected);
    assert_eq!(summary.to_string(), "5 files changed, 2 insertions(+), 2 deletions(-)");
    let statuses: Vec<_> = files.iter().map(FileDiff::letter).collect();
    assert_eq!(statuses, ['A', 'M', 'A', 'D', 'A', 'R']);
    let renamed = files.iter().find(|file| file.status == DiffStatus::Renamed).unwrap();
    assert_eq!(renamed.stat_line(40), " old name => \"new\\tname\" | 0");

    let only = DiffOptions { paths: vec!["edit".into(), "nowhere".into()], exclude: Vec::new() };
    let (text, _, summary) = render(&mut set, &only);
    assert!(text.starts_with("diff --git a/edit") && summary.files == 1);
    assert_eq!(summary.unmatched, [std::path::PathBuf::from("nowhere")]);
}

#[test]
fn what_apply_would_not_take_is_told() {
    let project = Project::with(&[("edit", "one\n")]);
    project.serve();
    project.write("edit", b"another's");
    let mut set = project.record(&[file("edit", b"mine\n"), file(".envrc", b"x"), link("up", "../../x")]);
    let (_, files, _) = render(&mut set, &DiffOptions::default());
    let of = |path: &str| files.iter().find(|file| file.path.as_bytes() == path.as_bytes()).unwrap();
    assert!(of("edit").conflict.as_ref().unwrap().contains("changed on the host"));
    assert!(of(".envrc").held_back.is_some() && of("up").held_back.is_some());
}

#[test]
fn a_terminal_is_shown_control_characters_and_not_sent_them() {
    let project = Project::new();
    let mut set = project.record(&[file("x\x1b[2Jy", "evil \x1b]0;title\x07\tfine \u{202e}\n".as_bytes())]);
    let mut text = Vec::new();
    let palette = Palette { escape: true, added: "<", reset: ">", ..Palette::default() };
    diff(&mut set, &DiffOptions::default(), &mut |file| file.write_unified(&mut text, &palette)).unwrap();
    let text = String::from_utf8(text).unwrap();
    assert!(!text.contains(['\x1b', '\x07']), "{text:?}");
    assert!(text.contains("<+evil \\u{1b}]0;title\\u{7}\tfine \\u{202e}>"), "{text:?}");
}

#[test]
fn files_too_large_to_compare_are_summed_up() {
    let project = Project::with(&[("big", "x")]);
    project.serve();
    let mut set = project.record(&[file("big", &vec![b'a'; 2 << 20])]);
    let (text, files, _) = render(&mut set, &DiffOptions::default());
    assert!(files[0].too_large && text.contains("Binary files a/big and b/big differ"), "{text}");
}

#[test]
fn a_moved_and_edited_file_is_a_rename_and_apply_says_so() {
    let lines: String = (0..40).map(|line| format!("line {line}\n")).collect();
    let project =
        Project::with(&[("src/a.rs", lines.as_str()), ("src/same.rs", "same\n"), ("other", "unlike\n")]);
    project.serve();
    let edited = lines.replace("line 7\n", "line seven\n");
    let sent = [
        removed("other"),
        directory("lib"),
        file("lib/a.rs", edited.as_bytes()),
        file("lib/same.rs", b"same\n"),
        removed("src/a.rs"),
        removed("src/same.rs"),
        directory("src"),
    ];
    let mut set = project.record(&sent);
    let (text, _, summary) = render(&mut set, &DiffOptions::default());
    assert!(
        text.contains("rename from src/a.rs\nrename to lib/a.rs\n") && text.contains("+line seven"),
        "{text}"
    );
    assert_eq!((summary.files, summary.added_lines, summary.removed_lines), (3, 1, 2));
    let report = apply(&mut set, &take_all()).unwrap();
    let renames: Vec<_> = report
        .renames
        .iter()
        .map(|rename| (rename.from.as_path().to_str().unwrap(), rename.to.as_path().to_str().unwrap()))
        .collect();
    assert_eq!(renames, [("src/a.rs", "lib/a.rs"), ("src/same.rs", "lib/same.rs")]);
    assert!(report.is_complete());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// What the diff says, `git apply` does: the host's tree becomes the guest's.
    #[test]
    fn git_takes_the_diff(
        before in prop::collection::btree_map("[a-c]{1,2}", "([ab]{0,3}\n){0,8}[ab]{0,2}", 0..5),
        after in prop::collection::btree_map("[a-c]{1,2}", "([ab]{0,3}\n){0,8}[ab]{0,2}", 0..5)) {
        let project = Project::new();
        for (path, content) in &before {
            project.write(path, content.as_bytes());
        }
        project.serve();
        let mut sent = Vec::new();
        for path in before.keys().chain(after.keys()).collect::<std::collections::BTreeSet<_>>() {
            match after.get(path) {
                Some(content) => sent.push(file(path, content.as_bytes())),
                None => sent.push(removed(path)),
            }
        }
        let mut set = project.record(&sent);
        let (text, _, summary) = render(&mut set, &DiffOptions::default());
        if summary.files > 0 {
            let mut git = Command::new("git")
                .args(["apply", "--unsafe-paths", "--whitespace=nowarn", "-"])
                .current_dir(project.root())
                .env("GIT_CEILING_DIRECTORIES", project.root().parent().unwrap())
                .stdin(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            std::io::Write::write_all(&mut git.stdin.take().unwrap(), text.as_bytes()).unwrap();
            let output = git.wait_with_output().unwrap();
            prop_assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), text);
        }
        for path in before.keys().chain(after.keys()) {
            let now = std::fs::read(project.path(std::ffi::OsStr::from_bytes(path.as_bytes()))).ok();
            prop_assert_eq!(now.as_deref(), after.get(path).map(String::as_bytes), "{}\n{}", path, text);
        }
    }
}
