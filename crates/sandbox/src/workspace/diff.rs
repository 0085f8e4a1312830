//! What a change set would do to the host's tree, for eyes and for programs.
//!
//! The text is git's unified format, so that `git apply` takes it. All of it is a guest's: names are quoted, and for a
//! terminal control characters are shown instead of sent.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use similar::{Algorithm, ChangeTag, TextDiff};

use super::RelativePath;
use super::apply::{ApplyError, ApplyOptions, ApplyReport, apply};
use super::changes::{Change, ChangeKind, ChangeSet, ChangeStatus};
use super::rename::{Rename, renames};
use super::tree::{self, Tree};

/// Largest file whose lines are compared, bytes.
const TEXT_LIMIT: u64 = 1 << 20;
/// Time for one file's comparison; what is found by then is right, if longer than need be.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes in which a NUL tells a binary file, as git has it.
const BINARY_PROBE: usize = 8000;
const CONTEXT_LINES: usize = 3;

/// What to show.
#[derive(Clone, Debug, Default)]
pub struct DiffOptions {
    /// Only these paths and what is beneath them; empty: all. Relative to the workspace.
    pub paths: Vec<PathBuf>,
    /// Not these paths, nor what is beneath them.
    pub exclude: Vec<PathBuf>,
}

/// What becomes of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DiffStatus {
    /// The host has nothing there.
    Added,
    /// The host has another version, or other permissions.
    Modified,
    /// It is gone.
    Removed,
    /// It was moved there, and maybe changed.
    Renamed,
    /// It is of another kind than on the host.
    TypeChanged,
}

/// Kinds of things a path can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device node, FIFO or socket.
    Special,
}

/// One side of a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Side {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits, octal as in `0644`.
    pub mode: String,
    /// Bytes; 0 for directories.
    pub size: u64,
    #[serde(skip)]
    bits: u32,
}

/// One changed path.
#[derive(Clone, Debug, Serialize)]
pub struct FileDiff {
    /// Relative to the workspace.
    pub path: RelativePath,
    /// What becomes of it.
    pub status: DiffStatus,
    /// Where it was before, if it was moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renamed_from: Option<RelativePath>,
    /// What old and new version have in common if it was moved, percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub similarity: Option<u8>,
    /// The host's version.
    pub old: Option<Side>,
    /// The guest's version.
    pub new: Option<Side>,
    /// Its content is no text.
    pub binary: bool,
    /// Its content is text, but too much to compare.
    pub too_large: bool,
    /// Lines that are new.
    pub added_lines: usize,
    /// Lines that are gone.
    pub removed_lines: usize,
    /// Why `apply` would not take it unless it is named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_back: Option<&'static str>,
    /// Why `apply` could not take it now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conflict: Option<String>,
    #[serde(skip)]
    texts: Option<(Vec<u8>, Vec<u8>)>,
}

/// What all files together come to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DiffSummary {
    /// Changed paths, directories left out.
    pub files: usize,
    /// Lines that are new.
    pub added_lines: usize,
    /// Lines that are gone.
    pub removed_lines: usize,
    /// Asked for, but nothing in the set is at or beneath them.
    pub unmatched: Vec<PathBuf>,
}

impl std::fmt::Display for DiffSummary {
    /// As `git diff --stat` ends.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        write!(formatter, "{} file{} changed", self.files, plural(self.files))?;
        if self.added_lines > 0 {
            write!(formatter, ", {} insertion{}(+)", self.added_lines, plural(self.added_lines))?;
        }
        if self.removed_lines > 0 {
            write!(formatter, ", {} deletion{}(-)", self.removed_lines, plural(self.removed_lines))?;
        }
        Ok(())
    }
}

/// Hands each changed path to `show`, in order; only one file's text is in memory at a time.
///
/// # Errors
/// The workspace or the set cannot be read; those of `show`.
pub fn diff(
    set: &mut ChangeSet,
    options: &DiffOptions,
    show: &mut dyn FnMut(&FileDiff) -> io::Result<()>,
) -> Result<DiffSummary, DiffError> {
    let selection = ApplyOptions {
        paths: options.paths.clone(),
        exclude: options.exclude.clone(),
        named: Vec::new(),
        dry_run: true,
    };
    let report = apply(set, &selection)?;
    let tree = Tree::open(set.workspace())
        .map_err(|source| ApplyError::Workspace { path: set.workspace().to_owned(), source })?;
    let chosen = |change: &Change| selection.chooses(&change.path);
    let renames: Vec<Rename> = renames(&tree, set)
        .into_iter()
        .filter(|rename| selection.chooses(&rename.from) && selection.chooses(&rename.to))
        .collect();
    let by_target: HashMap<&RelativePath, &Rename> =
        renames.iter().map(|rename| (&rename.to, rename)).collect();
    let moved: HashSet<&RelativePath> = renames.iter().map(|rename| &rename.from).collect();
    let verdicts = Verdicts::of(&report);
    let mut summary = DiffSummary { unmatched: report.unmatched.clone(), ..DiffSummary::default() };
    for change in set.entries().iter().filter(|change| chosen(change) && !moved.contains(&change.path)) {
        let file = examine(&tree, set, change, by_target.get(&change.path).copied(), &verdicts)?;
        if !file.is_directory() {
            summary.files += 1;
        }
        summary.added_lines += file.added_lines;
        summary.removed_lines += file.removed_lines;
        show(&file)?;
    }
    Ok(summary)
}

/// Why there is no diff.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// The workspace or the set cannot be used.
    #[error(transparent)]
    Set(#[from] ApplyError),
    /// Reading a file, or writing the diff.
    #[error("cannot show the changes")]
    Io(#[from] io::Error),
}

/// What `apply` would say of the paths it does not take.
struct Verdicts<'a> {
    held_back: HashMap<&'a RelativePath, &'static str>,
    conflicts: HashMap<&'a RelativePath, String>,
}

impl<'a> Verdicts<'a> {
    fn of(report: &'a ApplyReport) -> Self {
        let conflicts = report.conflicts.iter().map(|conflict| (&conflict.path, conflict.reason.to_string()));
        let failed = report.failed.iter().map(|failure| (&failure.path, failure.error.clone()));
        let refused =
            report.refused.iter().map(|path| (path, "device nodes, FIFOs and sockets stay in the guest"));
        Self {
            held_back: report.held_back.iter().map(|held| (&held.path, held.reason)).chain(refused).collect(),
            conflicts: conflicts.chain(failed).collect(),
        }
    }
}

fn examine(
    tree: &Tree,
    set: &ChangeSet,
    change: &Change,
    rename: Option<&Rename>,
    verdicts: &Verdicts<'_>,
) -> io::Result<FileDiff> {
    let old_path = rename.map_or(&change.path, |rename| &rename.from);
    let old = host_side(tree, old_path)?;
    let new = guest_side(change);
    let status = match (&old, &new) {
        _ if rename.is_some() => DiffStatus::Renamed,
        (_, None) => DiffStatus::Removed,
        (None, Some(_)) => DiffStatus::Added,
        (Some(old), Some(new)) if old.kind != new.kind => DiffStatus::TypeChanged,
        (Some(_), Some(_)) => DiffStatus::Modified,
    };
    let mut file = FileDiff {
        path: change.path.clone(),
        status,
        renamed_from: rename.map(|rename| rename.from.clone()),
        similarity: rename.map(|rename| rename.similarity),
        binary: false,
        too_large: false,
        added_lines: 0,
        removed_lines: 0,
        held_back: verdicts.held_back.get(&change.path).copied(),
        conflict: verdicts.conflicts.get(&change.path).cloned(),
        texts: None,
        old,
        new,
    };
    if file.status == DiffStatus::Removed && change.status == ChangeStatus::Removed && file.old.is_none() {
        // The host has removed it, too.
        return Ok(file);
    }
    let too_large = [&file.old, &file.new]
        .into_iter()
        .flatten()
        .any(|side| side.kind == FileKind::File && side.size > TEXT_LIMIT);
    let old_text = content_of_host(tree, old_path, file.old.as_ref())?;
    let new_text = content_of_guest(set, change, file.new.as_ref())?;
    file.binary = is_binary(&old_text) || is_binary(&new_text);
    file.too_large = too_large && !file.binary;
    if !file.binary && !too_large && old_text != new_text {
        for line in compare(&old_text, &new_text).iter_all_changes() {
            match line.tag() {
                ChangeTag::Insert => file.added_lines += 1,
                ChangeTag::Delete => file.removed_lines += 1,
                ChangeTag::Equal => {}
            }
        }
    }
    file.texts = Some((old_text, new_text));
    Ok(file)
}

fn compare<'a>(old: &'a [u8], new: &'a [u8]) -> TextDiff<'a, 'a, 'a, [u8]> {
    TextDiff::configure().algorithm(Algorithm::Myers).timeout(PATIENCE).diff_lines(old, new)
}

/// Changed lines with those around them.
struct Hunk<'a> {
    /// Lines before the hunk in the old and in the new text.
    before: (usize, usize),
    lines: Vec<(ChangeTag, &'a [u8])>,
}

impl Hunk<'_> {
    fn header(&self) -> String {
        let count = |unlike: ChangeTag| self.lines.iter().filter(|(tag, _)| *tag != unlike).count();
        let range = |before: usize, count: usize| match count {
            0 => format!("{before},0"),
            1 => format!("{}", before + 1),
            _ => format!("{},{count}", before + 1),
        };
        let (old, new) = (count(ChangeTag::Insert), count(ChangeTag::Delete));
        format!("@@ -{} +{} @@", range(self.before.0, old), range(self.before.1, new))
    }
}

/// Puts changes that are near each other together. Line numbers are counted here: the crate's own are wrong where it
/// moved a change to a nicer place.
fn hunks<'a>(comparison: &TextDiff<'a, 'a, 'a, [u8]>) -> Vec<Hunk<'a>> {
    let mut hunks: Vec<Hunk<'a>> = Vec::new();
    let mut context: std::collections::VecDeque<&[u8]> = std::collections::VecDeque::new();
    let (mut old, mut new) = (0, 0);
    // Equal lines since the last change, while a hunk is open.
    let mut quiet = None;
    for change in comparison.iter_all_changes() {
        let (tag, text) = (change.tag(), change.value());
        if tag == ChangeTag::Equal {
            context.push_back(text);
            (old, new) = (old + 1, new + 1);
            quiet = quiet.map(|lines: usize| lines + 1);
            if quiet.is_some_and(|lines| lines > 2 * CONTEXT_LINES) {
                close(&mut hunks, &mut context);
                quiet = None;
            }
            if quiet.is_none() && context.len() > CONTEXT_LINES {
                context.pop_front();
            }
            continue;
        }
        if quiet.is_none() {
            hunks.push(Hunk { before: (old - context.len(), new - context.len()), lines: Vec::new() });
        }
        quiet = Some(0);
        if let Some(hunk) = hunks.last_mut() {
            hunk.lines.extend(context.drain(..).map(|text| (ChangeTag::Equal, text)));
            hunk.lines.push((tag, text));
        }
        match tag {
            ChangeTag::Delete => old += 1,
            _ => new += 1,
        }
    }
    if quiet.is_some() {
        close(&mut hunks, &mut context);
    }
    hunks
}

/// Ends a hunk with the lines behind its last change; the others may be the next one's.
fn close<'a>(hunks: &mut [Hunk<'a>], context: &mut std::collections::VecDeque<&'a [u8]>) {
    if let Some(hunk) = hunks.last_mut() {
        hunk.lines.extend(context.iter().take(CONTEXT_LINES).map(|text| (ChangeTag::Equal, *text)));
    }
    while context.len() > CONTEXT_LINES {
        context.pop_front();
    }
}

fn side(kind: FileKind, mode: u32, size: u64) -> Side {
    Side { kind, mode: format!("{:04o}", mode & 0o7777), size, bits: mode & 0o7777 }
}

fn host_side(tree: &Tree, path: &RelativePath) -> io::Result<Option<Side>> {
    Ok(tree.stat(path)?.map(|stat| {
        let kind = match () {
            () if tree::is_file(&stat) => FileKind::File,
            () if tree::is_directory(&stat) => FileKind::Directory,
            () if tree::is_symlink(&stat) => FileKind::Symlink,
            () => FileKind::Special,
        };
        let size = if kind == FileKind::Directory { 0 } else { tree::size_of(&stat) };
        side(kind, stat.st_mode, size)
    }))
}

fn guest_side(change: &Change) -> Option<Side> {
    match &change.change {
        ChangeKind::File { size, mode, .. } => Some(side(FileKind::File, *mode, *size)),
        ChangeKind::Directory { mode } => Some(side(FileKind::Directory, *mode, 0)),
        ChangeKind::Symlink { target } => {
            Some(side(FileKind::Symlink, 0o777, target.as_os_str().len() as u64))
        }
        ChangeKind::Special => Some(side(FileKind::Special, 0, 0)),
        ChangeKind::Removed { .. } => None,
    }
}

/// What is compared of the host's version: at most a little more than is shown.
fn content_of_host(tree: &Tree, path: &RelativePath, side: Option<&Side>) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    match side.map(|side| side.kind) {
        Some(FileKind::File) => {
            let Some(file) = tree.open_file(path) else {
                return Err(io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    format!("{} cannot be read on the host", path.as_path().display()),
                ));
            };
            file.take(TEXT_LIMIT + 1).read_to_end(&mut text)?;
        }
        Some(FileKind::Symlink) => text = tree.read_link(path).unwrap_or_default(),
        _ => {}
    }
    Ok(text)
}

fn content_of_guest(set: &ChangeSet, change: &Change, side: Option<&Side>) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    match (&change.change, side) {
        (ChangeKind::Symlink { target }, _) => text = target.as_os_str().as_bytes().to_vec(),
        (ChangeKind::File { .. }, _) => {
            set.content(change).take(TEXT_LIMIT + 1).read_to_end(&mut text)?;
        }
        _ => {}
    }
    Ok(text)
}

fn is_binary(text: &[u8]) -> bool {
    text.iter().take(BINARY_PROBE).any(|byte| *byte == 0)
}

/// What surrounds the parts of a diff: escape sequences of a terminal, or nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Palette {
    /// Before a file's header.
    pub header: &'static str,
    /// Before `@@`.
    pub hunk: &'static str,
    /// Before a line that is new.
    pub added: &'static str,
    /// Before a line that is gone.
    pub removed: &'static str,
    /// After each of them.
    pub reset: &'static str,
    /// Show control characters instead of sending them.
    pub escape: bool,
}

impl FileDiff {
    /// True if both sides are directories or nothing.
    pub fn is_directory(&self) -> bool {
        let directory =
            |side: &Option<Side>| side.as_ref().is_none_or(|side| side.kind == FileKind::Directory);
        directory(&self.old) && directory(&self.new)
    }

    /// The letter by which git knows the status.
    pub fn letter(&self) -> char {
        match self.status {
            DiffStatus::Added => 'A',
            DiffStatus::Modified => 'M',
            DiffStatus::Removed => 'D',
            DiffStatus::Renamed => 'R',
            DiffStatus::TypeChanged => 'T',
        }
    }

    /// Writes the file's part of a unified diff. Directories have none.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_unified(&self, out: &mut dyn Write, palette: &Palette) -> io::Result<()> {
        if self.is_directory() {
            return Ok(());
        }
        if self.status == DiffStatus::TypeChanged {
            // As git has it: one file goes, another comes.
            self.write_part(out, palette, self.old.as_ref(), None)?;
            return self.write_part(out, palette, None, self.new.as_ref());
        }
        self.write_part(out, palette, self.old.as_ref(), self.new.as_ref())
    }

    fn write_part(
        &self,
        out: &mut dyn Write,
        palette: &Palette,
        old: Option<&Side>,
        new: Option<&Side>,
    ) -> io::Result<()> {
        let old_path = self.renamed_from.as_ref().unwrap_or(&self.path);
        let (a, b) = (quoted(b"a/", old_path), quoted(b"b/", &self.path));
        let mut header = vec![[b"diff --git ", a.as_slice(), b" ", &b].concat()];
        let git_mode = |side: &Side| match side.kind {
            FileKind::Symlink => "120000".to_owned(),
            _ => format!("100{:03o}", side.bits & 0o777),
        };
        match (old, new) {
            (None, Some(new)) => header.push(format!("new file mode {}", git_mode(new)).into_bytes()),
            (Some(old), None) => header.push(format!("deleted file mode {}", git_mode(old)).into_bytes()),
            (Some(old), Some(new)) if git_mode(old) != git_mode(new) => {
                header.push(format!("old mode {}", git_mode(old)).into_bytes());
                header.push(format!("new mode {}", git_mode(new)).into_bytes());
            }
            _ => {}
        }
        if let Some(similarity) = self.similarity {
            header.push(format!("similarity index {similarity}%").into_bytes());
            header.push([b"rename from ".as_slice(), &quoted(b"", old_path)].concat());
            header.push([b"rename to ".as_slice(), &quoted(b"", &self.path)].concat());
        }
        for line in header {
            write_line(out, palette.header, &line, palette)?;
        }
        let empty = (Vec::new(), Vec::new());
        let (old_text, new_text) = self.texts.as_ref().unwrap_or(&empty);
        let old_text: &[u8] = if old.is_some() { old_text } else { b"" };
        let new_text: &[u8] = if new.is_some() { new_text } else { b"" };
        let special = [old, new].into_iter().flatten().any(|side| side.kind == FileKind::Special);
        let null = || b"/dev/null".to_vec();
        let a = if old.is_some() { a } else { null() };
        let b = if new.is_some() { b } else { null() };
        if self.binary || self.too_large || special {
            // In git's words for what has no lines, so that it refuses the file instead of making an empty one.
            if old_text != new_text || self.too_large || special {
                let line = [b"Binary files ", a.as_slice(), b" and ", &b, b" differ"].concat();
                write_line(out, "", &line, palette)?;
            }
            return Ok(());
        }
        if old_text == new_text {
            return Ok(());
        }
        // A tab ends a name with spaces, for programs that take what follows for a time.
        let end =
            |name: &[u8]| if name.contains(&b' ') && !name.starts_with(b"\"") { &b"\t"[..] } else { b"" };
        write_line(out, palette.header, &[b"--- ", a.as_slice(), end(&a)].concat(), palette)?;
        write_line(out, palette.header, &[b"+++ ", b.as_slice(), end(&b)].concat(), palette)?;
        for hunk in hunks(&compare(old_text, new_text)) {
            write_line(out, palette.hunk, hunk.header().as_bytes(), palette)?;
            for (tag, text) in hunk.lines {
                let (sign, colour) = match tag {
                    ChangeTag::Insert => (b'+', palette.added),
                    ChangeTag::Delete => (b'-', palette.removed),
                    ChangeTag::Equal => (b' ', ""),
                };
                let whole = text.ends_with(b"\n");
                let text = text.strip_suffix(b"\n").unwrap_or(text);
                write_line(out, colour, &[&[sign], text].concat(), palette)?;
                if !whole {
                    out.write_all(b"\\ No newline at end of file\n")?;
                }
            }
        }
        Ok(())
    }

    /// The file's line of a `--stat`, with a graph at most `width` wide.
    pub fn stat_line(&self, width: usize) -> String {
        let name = match &self.renamed_from {
            Some(from) => format!("{} => {}", shown(from), shown(&self.path)),
            None => shown(&self.path),
        };
        let size = |side: &Option<Side>| side.as_ref().map_or(0, |side| side.size);
        if self.binary || self.too_large {
            return format!(" {name} | {} -> {} bytes", size(&self.old), size(&self.new));
        }
        let total = self.added_lines + self.removed_lines;
        let scaled = |count: usize| if total > width { (count * width).div_ceil(total) } else { count };
        let graph = "+".repeat(scaled(self.added_lines)) + &"-".repeat(scaled(self.removed_lines));
        format!(" {name} | {total} {graph}").trim_end().to_owned()
    }
}

/// A name for people: control characters escaped.
fn shown(path: &RelativePath) -> String {
    String::from_utf8_lossy(&quoted(b"", path)).into_owned()
}

fn write_line(out: &mut dyn Write, colour: &str, line: &[u8], palette: &Palette) -> io::Result<()> {
    let reset = if colour.is_empty() { "" } else { palette.reset };
    out.write_all(colour.as_bytes())?;
    if palette.escape {
        let text = String::from_utf8_lossy(line);
        let escaped: String = text
            .chars()
            .flat_map(|character| {
                let plain = character == '\t' || !(character.is_control() || turns_text(character));
                let escape = character.escape_default().filter(move |_| !plain);
                plain.then_some(character).into_iter().chain(escape)
            })
            .collect();
        out.write_all(escaped.as_bytes())?;
    } else {
        out.write_all(line)?;
    }
    out.write_all(reset.as_bytes())?;
    out.write_all(b"\n")
}

/// Characters that change the direction of what follows, and so what a line seems to say.
fn turns_text(character: char) -> bool {
    matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A name as git writes it: in quotes with octal escapes if it has anything unusual.
fn quoted(prefix: &[u8], path: &RelativePath) -> Vec<u8> {
    let name = OsStr::as_bytes(Path::as_os_str(path.as_path()));
    let unusual = |byte: &u8| !(0x20..0x7f).contains(byte) || matches!(byte, b'"' | b'\\');
    if !name.iter().any(unusual) {
        return [prefix, name].concat();
    }
    let mut text = vec![b'"'];
    text.extend_from_slice(prefix);
    for &byte in name {
        match byte {
            b'"' | b'\\' => text.extend([b'\\', byte]),
            b'\n' => text.extend(b"\\n"),
            b'\t' => text.extend(b"\\t"),
            0x20..0x7f => text.push(byte),
            _ => text.extend(format!("\\{byte:03o}").bytes()),
        }
    }
    text.push(b'"');
    text
}
