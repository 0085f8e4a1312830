//! COPY, ADD and WORKDIR: layers made here. What ADD takes from addresses is fetched by [`super::remote`].

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use agentkernel_image::{FileSystem, decompressed};

use super::names::owner;
use super::remote::{Pinned, Remote};
use super::{Build, Executor, Layer, Solver, State};
use crate::dockerfile::{Instruction, Place, Transfer, TransferSource, Word};
use crate::executor::Failure;
use crate::ignore::{IgnoreFile, Pattern};
use crate::place::{Ownership, Plan};
use crate::source::{self, Selection, Tree};

/// Most bytes that an archive of ADD may unpack to.
const ARCHIVE_LIMIT: u64 = 64 << 30;
/// Bytes of the header of a tar's entry.
const HEADER: usize = 512;

impl<E: Executor> Solver<'_, E> {
    /// COPY and ADD; true if it was done before.
    pub(super) fn transfer(
        &mut self,
        state: &mut State<E::Machine>,
        instruction: &Instruction,
        transfer: &Transfer,
        is_add: bool,
    ) -> Build<bool> {
        let refused = [&transfer.parents, &transfer.keep_git_directory, &transfer.unpack];
        if let Some(flag) = refused.into_iter().flatten().next() {
            return self.refuse(flag.place, format!("{} is not supported", flag.text), None);
        }
        let mut exclude = IgnoreFile::default();
        for word in &transfer.exclude {
            let text = self.expand(state, word)?;
            let pattern = Pattern::parse(&text);
            exclude.push(pattern.map_err(|error| self.at(word.place, Failure::new(error.reason)))?);
        }
        let ownership = self.ownership(state, transfer)?;
        let destination = self.destination(state, &transfer.destination)?;
        if let Some(pinned) = self.pinned(state, transfer)? {
            return self.add_pinned(state, instruction, &pinned, ownership, transfer.link, &destination);
        }
        // Taken out meanwhile: another stage is looked at while this one changes.
        let other = match &transfer.from {
            Some(word) => Some(self.take_source(word)?),
            None => None,
        };
        let result = self.transfer_from(
            state,
            instruction,
            transfer,
            is_add,
            &exclude,
            ownership,
            &destination,
            other.as_ref().map(|(_, state)| state),
        );
        if let Some((place, state)) = other {
            self.put_back(place, state);
        }
        result
    }

    #[allow(clippy::too_many_arguments)]
    fn transfer_from(
        &mut self,
        state: &mut State<E::Machine>,
        instruction: &Instruction,
        transfer: &Transfer,
        is_add: bool,
        exclude: &IgnoreFile,
        ownership: Ownership,
        destination: &str,
        other: Option<&State<E::Machine>>,
    ) -> Build<bool> {
        let context = self.context;
        let tree = match other {
            Some(other) => {
                let files = other.files.as_ref();
                Tree::FileSystem(files.ok_or_else(|| Failure::new("a stage's files were not read"))?)
            }
            None => Tree::Context(context),
        };
        let mut selections = Vec::new();
        for item in &transfer.sources {
            match item {
                TransferSource::Document(heredoc) => {
                    let mut text = heredoc.text();
                    if heredoc.expand {
                        let mut lookup = |name: &str| state.variable(name);
                        text = self.lexer().document(&text, &mut lookup).map_err(|error| {
                            let hint = Some(error.hint());
                            self.at(heredoc.place, Failure { message: error.to_string(), hint })
                        })?;
                    }
                    selections.push(source::document(&heredoc.name, text));
                }
                TransferSource::Path(word) => {
                    let text = self.expand(state, word)?;
                    if let Some(remote) = Remote::of(&text) {
                        let remote = remote.map_err(|failure| self.at(word.place, failure))?;
                        if !is_add {
                            let hint = Some("ADD does");
                            return self.refuse(word.place, "COPY takes nothing from addresses", hint);
                        }
                        selections.push(self.fetch(&remote, word.place, destination)?);
                        continue;
                    }
                    let selected =
                        tree.select(&text, exclude).map_err(|failure| self.at(word.place, failure))?;
                    for selection in selected {
                        let unpacked =
                            if is_add { self.unpacked(&tree, &selection, word.place)? } else { None };
                        selections.push(unpacked.unwrap_or(selection));
                    }
                }
            }
        }
        let at = instruction.place;
        let content = source::digest(&tree, &selections).map_err(|failure| self.at(at, failure))?;
        let link = transfer.link;
        let how = format!("{ownership:?} {link}");
        let content = content.to_string();
        let parts = [destination.as_bytes(), how.as_bytes(), content.as_bytes()];
        let key = state.key.with(if is_add { "ADD" } else { "COPY" }, parts);
        self.cached(state, key, |solver, state| {
            solver.placed(state, at, &tree, &selections, destination, ownership, link)
        })
    }

    /// ADD of an address whose content is known beforehand: nothing is fetched if it was done before.
    fn add_pinned(
        &mut self,
        state: &mut State<E::Machine>,
        instruction: &Instruction,
        pinned: &Pinned,
        ownership: Ownership,
        link: bool,
        destination: &str,
    ) -> Build<bool> {
        let how = format!("{ownership:?} {link}");
        let checksum = pinned.checksum.to_string();
        let parts = [destination.as_bytes(), how.as_bytes(), &pinned.remote.name, checksum.as_bytes()];
        let key = state.key.with("ADD --checksum", parts);
        let tree = Tree::Context(self.context);
        self.cached(state, key, |solver, state| {
            let selections = [solver.fetch_pinned(pinned, destination)?];
            solver.placed(state, instruction.place, &tree, &selections, destination, ownership, link)
        })
    }

    /// The layer with what was selected.
    #[allow(clippy::too_many_arguments)]
    fn placed(
        &mut self,
        state: &mut State<E::Machine>,
        at: Place,
        tree: &Tree<'_>,
        selections: &[Selection],
        destination: &str,
        ownership: Ownership,
        link: bool,
    ) -> Build<Option<Layer>> {
        let time = self.time();
        let store = self.writing.store().clone();
        // A linked layer knows nothing of what lies below it: no link of the image is followed.
        let bare = FileSystem::new();
        let files = if link { &bare } else { state.files(&mut *self.executor, &store)? };
        let mut plan = Plan::default();
        let placed = plan.transfer(files, selections, destination, ownership, time);
        placed.map_err(|failure| self.at(at, failure))?;
        self.layer(|writer| plan.write(tree, writer)).map_err(|failure| self.at(at, failure))
    }

    /// An absolute destination, which keeps its slash at the end.
    fn destination(&self, state: &State<E::Machine>, word: &Word) -> Build<String> {
        let text = self.expand(state, word)?;
        if text.starts_with('/') {
            return Ok(text);
        }
        let directory = state.configuration.config.working_dir.trim_end_matches('/');
        let is_directory = matches!(text.as_str(), "" | ".") || text.ends_with('/') || text.ends_with("/.");
        let text = text.trim_start_matches("./");
        let whole = format!("{directory}/{text}");
        Ok(if is_directory && !whole.ends_with('/') { format!("{whole}/") } else { whole })
    }

    fn ownership(&mut self, state: &mut State<E::Machine>, transfer: &Transfer) -> Build<Ownership> {
        let mut ownership = Ownership::default();
        if let Some(word) = &transfer.owner {
            let text = self.expand(state, word)?;
            let store = self.writing.store().clone();
            let files = state.files(&mut *self.executor, &store)?;
            ownership.owner = Some(owner(&text, files).map_err(|failure| self.at(word.place, failure))?);
        }
        if let Some(word) = &transfer.mode {
            let text = self.expand(state, word)?;
            let mode = u16::from_str_radix(&text, 8).ok().filter(|mode| *mode <= 0o7777);
            let Some(mode) = mode else {
                let hint = Some("write it in octal digits: --chmod=755");
                return self.refuse(word.place, format!("`{text}` is no mode"), hint);
            };
            ownership.mode = Some(mode);
        }
        Ok(ownership)
    }

    /// The stage or image that `--from` names, with its files read. It is to be put back.
    pub(super) fn take_source(&mut self, word: &Word) -> Build<(Origin, State<E::Machine>)> {
        let stage =
            self.stage_called(&word.text, self.stages.len()).filter(|index| self.stages[*index].is_some());
        let (place, mut state) = match stage {
            Some(index) => {
                let state = self.stages[index].take().ok_or_else(|| Failure::new("a stage was not built"))?;
                (Origin::Stage(index), state)
            }
            None => {
                let name = word.text.clone();
                let state = match self.images.remove(&name) {
                    Some(state) => state,
                    None => {
                        let base = self.executor.image(&name, &mut *self.on_event);
                        State::of(base.map_err(|failure| self.at(word.place, failure))?)
                    }
                };
                (Origin::Image(name), state)
            }
        };
        let store = self.writing.store().clone();
        if let Err(failure) = state.files(&mut *self.executor, &store) {
            self.put_back(place, state);
            return Err(self.at(word.place, failure));
        }
        Ok((place, state))
    }

    pub(super) fn put_back(&mut self, place: Origin, state: State<E::Machine>) {
        match place {
            Origin::Stage(index) => self.stages[index] = Some(state),
            Origin::Image(name) => drop(self.images.insert(name, state)),
        }
    }

    /// What an archive holds; `None` if the file is none.
    fn unpacked(&self, tree: &Tree<'_>, selection: &Selection, place: Place) -> Build<Option<Selection>> {
        let Some(item) = selection.items.first().filter(|_| !selection.is_directory()) else {
            return Ok(None);
        };
        let at = |failure: Failure| self.at(place, failure);
        let broken = |error: std::io::Error| Failure::new(format!("cannot read the archive: {error}"));
        let mut head = Vec::new();
        tree.open(item)
            .map_err(at)?
            .take(HEADER as u64)
            .read_to_end(&mut head)
            .map_err(|error| at(broken(error)))?;
        let (is_xz, is_bzip2) = (head.starts_with(b"\xfd7zXZ\0"), head.starts_with(b"BZh"));
        let is_compressed =
            is_xz || is_bzip2 || head.starts_with(b"\x1f\x8b") || head.starts_with(b"\x28\xb5\x2f\xfd");
        if !is_compressed && !is_header(&head) {
            return Ok(None);
        }
        let scratch = || self.writing.scratch().map_err(|error| at(Failure::new(error.to_string())));
        let mut whole = scratch()?;
        std::io::copy(&mut tree.open(item).map_err(at)?, &mut whole).map_err(|error| at(broken(error)))?;
        whole.seek(SeekFrom::Start(0)).map_err(|error| at(broken(error)))?;
        let plain = if is_xz || is_bzip2 {
            let mut target = scratch()?;
            // What the store's own decoder does not know: no layer is compressed like this.
            let reader: Box<dyn Read> = match is_xz {
                true => Box::new(lzma_rust2::XzReader::new(whole, true)),
                false => Box::new(bzip2::read::MultiBzDecoder::new(whole)),
            };
            let length = std::io::copy(&mut reader.take(ARCHIVE_LIMIT + 1), &mut target);
            if length.map_err(|error| at(broken(error)))? > ARCHIVE_LIMIT {
                let message = format!("the archive holds more than {} GiB", ARCHIVE_LIMIT >> 30);
                return Err(at(Failure::new(message)));
            }
            target
        } else {
            let target = scratch()?;
            decompressed(whole, target, ARCHIVE_LIMIT).map_err(|error| at(Failure::new(error.to_string())))?
        };
        if !begins_like_a_tar(&plain) {
            return Ok(None);
        }
        source::unpack(plain).map(Some).map_err(at)
    }

    /// WORKDIR: the directory is made if it is not there, and belongs to the user of the stage.
    pub(super) fn workdir(
        &mut self,
        state: &mut State<E::Machine>,
        instruction: &Instruction,
        word: &Word,
    ) -> Build<bool> {
        let text = self.expand(state, word)?;
        if text.is_empty() {
            return self.refuse(word.place, "WORKDIR needs a path", None);
        }
        let whole = match text.starts_with('/') {
            true => text,
            false => format!("{}/{text}", state.configuration.config.working_dir),
        };
        let path = clean(&whole);
        state.process().working_dir.clone_from(&path);
        let user = state.configuration.config.user.clone();
        let key = state.key.with("WORKDIR", [path.as_bytes(), user.as_bytes()]);
        let time = self.time();
        let at = instruction.place;
        self.cached(state, key, |solver, state| {
            let store = solver.writing.store().clone();
            let files = state.files(&mut *solver.executor, &store)?;
            let owner = match user.as_str() {
                "" => (0, 0),
                user => owner(user, files).map_err(|failure| solver.at(at, failure))?,
            };
            let mut plan = Plan::default();
            plan.directory(files, path.as_bytes(), owner, time).map_err(|failure| solver.at(at, failure))?;
            if plan.is_empty() {
                return Ok(None);
            }
            let tree = Tree::Context(solver.context);
            solver.layer(|writer| plan.write(&tree, writer)).map_err(|failure| solver.at(at, failure))
        })
    }
}

/// Where a state was taken from.
pub(super) enum Origin {
    Stage(usize),
    Image(String),
}

fn begins_like_a_tar(file: &File) -> bool {
    let mut head = [0; HEADER];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut head, 0).is_ok() && is_header(&head)
}

/// Whether this is the header of a tar's entry, by its own checksum: what the entry says is another question, for an archive
/// with a first entry that is refused must not pass for a file that is none.
fn is_header(head: &[u8]) -> bool {
    const CHECKSUM: std::ops::Range<usize> = 148..156;
    let Some(field) = head.get(CHECKSUM).filter(|_| head.len() == HEADER) else { return false };
    let digits = String::from_utf8_lossy(field);
    let digits = digits.trim_matches(|character: char| character == ' ' || character == '\0');
    let sum = |value: &dyn Fn(u8) -> i64| -> i64 {
        let bytes = head.iter().enumerate();
        bytes.map(|(index, byte)| value(if CHECKSUM.contains(&index) { b' ' } else { *byte })).sum()
    };
    // Old programs took bytes for signed.
    i64::from_str_radix(digits, 8).is_ok_and(|told| {
        told == sum(&|byte| i64::from(byte)) || told == sum(&|byte| i64::from(byte.cast_signed()))
    })
}

/// A path without `.`, `..` and doubled slashes.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}
