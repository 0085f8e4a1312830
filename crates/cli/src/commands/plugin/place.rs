//! Files of a project and of the home directory: read, replaced as a whole, removed.
//!
//! A project may be a stranger's: what leads out of it is not followed, and a file of it that is a symbolic link is left
//! alone. In the home directory links are the user's own, as people who keep their dot files elsewhere have them: the file
//! that is meant is where they lead.

use std::ffi::{OsStr, OsString};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use agentkernel_sandbox::{Problem, os, plain};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid, fchmod, fchown, fstat, mkdirat, openat,
    openat2, renameat, statat, unlinkat,
};
use rustix::io::Errno;

use crate::ui;

/// Largest file of a project that is read, bytes. The time to edit an object that is all on one line grows with the square
/// of its keys: seconds at most for a stranger's file of this size, minutes for one of a megabyte.
const LARGEST_OF_PROJECT: u64 = 64 << 10;
/// Largest of the user's own, bytes: Claude Code keeps what was typed in the same file.
const LARGEST_OF_HOME: u64 = 32 << 20;

/// Whose links there are on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// A stranger's.
    Project,
    /// The user's own.
    Home,
}

/// A file, which need not be there, in a directory that is.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// The directory.
    pub root: PathBuf,
    /// Plain names from there on.
    pub path: PathBuf,
    pub trust: Trust,
    /// Permissions of a new file, before the umask.
    pub mode: u32,
}

/// What a file had when it was read.
pub(super) struct Content {
    pub text: String,
    stat: Option<Stat>,
}

impl Place {
    pub(super) fn whole(&self) -> PathBuf {
        self.root.join(&self.path)
    }

    fn shown(&self) -> String {
        ui::path(&self.whole())
    }

    /// Reads the file; one that is not there is empty.
    pub(super) fn read(&self) -> Result<Content, Problem> {
        let nothing = Content { text: String::new(), stat: None };
        let Some((directory, name)) = self.directory(false)? else { return Ok(nothing) };
        // A pipe would otherwise make the open wait for its other end.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = match openat(&directory, &name, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(nothing),
            Err(Errno::LOOP) => return Err(self.link()),
            Err(error) => return Err(os(format!("open {}", self.shown()))(error)),
        };
        let stat = fstat(&file).map_err(os(format!("look at {}", self.shown())))?;
        let refused = |why: &str| plain("plugin-file", format!("{} {why}", self.shown()), None);
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(refused("is no regular file"));
        }
        let largest = match self.trust {
            Trust::Project => LARGEST_OF_PROJECT,
            Trust::Home => LARGEST_OF_HOME,
        };
        let mut bytes = Vec::new();
        let read = std::fs::File::from(file).take(largest + 1).read_to_end(&mut bytes);
        read.map_err(agentkernel_sandbox::io(format!("read {}", self.shown())))?;
        if bytes.len() as u64 > largest {
            return Err(refused(&format!("is larger than {} KiB", largest >> 10)));
        }
        let text = String::from_utf8(bytes).map_err(|_| refused("is not UTF-8 text"))?;
        Ok(Content { text, stat: Some(stat) })
    }

    /// Puts `text` in place of what was read, at once: no reader sees half of it. Permissions and owner stay.
    pub(super) fn write(&self, before: &Content, text: &str) -> Result<(), Problem> {
        let Some((directory, name)) = self.directory(true)? else {
            return Err(plain("plugin-file", format!("there is no directory for {}", self.shown()), None));
        };
        let failed = || os(format!("write {}", self.shown()));
        let mut draft = OsString::from(format!(".{}-", std::process::id()));
        draft.push(&name);
        draft.push(".new");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&directory, &draft, flags, Mode::from_raw_mode(self.mode)).map_err(failed())?;
        let written = keep_owner(&file, before.stat.as_ref()).map_err(failed()).and_then(|()| {
            let mut file = std::fs::File::from(file);
            let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
            written.map_err(agentkernel_sandbox::io(format!("write {}", self.shown())))?;
            self.check_unchanged(&directory, &name, before)?;
            renameat(&directory, &draft, &directory, &name).map_err(failed())
        });
        if written.is_err() {
            let _ = unlinkat(&directory, &draft, AtFlags::empty());
        }
        written
    }

    /// Removes the file that was read, and the directories below the root that are empty then.
    pub(super) fn remove(&self, before: &Content) -> Result<(), Problem> {
        let Some((directory, name)) = self.directory(false)? else { return Ok(()) };
        self.check_unchanged(&directory, &name, before)?;
        unlinkat(&directory, &name, AtFlags::empty()).map_err(os(format!("remove {}", self.shown())))?;
        for path in self.path.ancestors().skip(1).filter(|path| path.file_name().is_some()) {
            let parent = Self { path: path.to_owned(), ..self.clone() };
            // One with something else in it stays, and so does a link to one.
            let Ok(Some((directory, name))) = parent.parent(false) else { break };
            if unlinkat(&directory, &name, AtFlags::REMOVEDIR).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Whether the file itself is a link of the user's, which is then not removed but left with nothing in its file.
    pub(super) fn is_link(&self) -> bool {
        self.whole().is_symlink()
    }

    /// Fails if somebody else wrote the file since it was read: agents write their configurations themselves.
    fn check_unchanged(&self, directory: &OwnedFd, name: &OsStr, before: &Content) -> Result<(), Problem> {
        let now = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Some(stat),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(os(format!("look at {}", self.shown()))(error)),
        };
        let identity = |stat: &Stat| {
            (
                stat.st_dev,
                stat.st_ino,
                stat.st_size,
                stat.st_mtime,
                stat.st_mtime_nsec,
                stat.st_ctime,
                stat.st_ctime_nsec,
            )
        };
        if now.as_ref().map(identity) == before.stat.as_ref().map(identity) {
            return Ok(());
        }
        let message = format!("{} was changed by another program just now", self.shown());
        Err(plain("plugin-changed", message, Some("nothing was written; try again")))
    }

    /// The directory that really has the file, and the file's name in it. None if there is no such directory; with `make`
    /// it is made.
    fn directory(&self, make: bool) -> Result<Option<(OwnedFd, OsString)>, Problem> {
        if self.trust == Trust::Home && self.is_link() {
            let real = self.whole().canonicalize().map_err(|error| {
                let message = format!("{} is a symbolic link that leads nowhere: {error}", self.shown());
                plain("plugin-file", message, Some("remove the link, or make the file that it leads to"))
            })?;
            let (Some(root), Some(name)) = (real.parent(), real.file_name()) else { return Err(self.link()) };
            let place = Self { root: root.to_owned(), path: name.into(), ..self.clone() };
            return place.parent(make);
        }
        self.parent(make)
    }

    fn parent(&self, make: bool) -> Result<Option<(OwnedFd, OsString)>, Problem> {
        let failed = || os(format!("open {}", ui::path(&self.root)));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(rustix::fs::CWD, &self.root, flags, Mode::empty()).map_err(failed())?;
        let resolve = match self.trust {
            Trust::Project => ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
            Trust::Home => ResolveFlags::empty(),
        };
        let name = self.path.file_name().unwrap_or_default().to_owned();
        let mut so_far = PathBuf::new();
        let mut parent = openat2(&root, ".", flags, Mode::empty(), resolve).map_err(failed())?;
        for part in self.path.parent().into_iter().flat_map(Path::components) {
            so_far.push(part);
            let open = || openat2(&root, &so_far, flags, Mode::empty(), resolve);
            let shown = || ui::path(&self.root.join(&so_far));
            parent = match open() {
                Ok(directory) => directory,
                Err(Errno::NOENT) if !make => return Ok(None),
                Err(Errno::NOENT) => {
                    let mode = Mode::from_raw_mode(0o755);
                    mkdirat(&parent, part.as_os_str(), mode).map_err(os(format!("make {}", shown())))?;
                    open().map_err(os(format!("open {}", shown())))?
                }
                Err(Errno::XDEV | Errno::LOOP) => {
                    let message = format!("{} leads out of the project", shown());
                    return Err(plain("plugin-link", message, Some(LINK_HINT)));
                }
                Err(error) => return Err(os(format!("open {}", shown()))(error)),
            };
        }
        Ok(Some((parent, name)))
    }

    fn link(&self) -> Problem {
        let message = format!("{} is a symbolic link, which is not followed in a project", self.shown());
        plain("plugin-link", message, Some(LINK_HINT))
    }
}

const LINK_HINT: &str = "put a file or directory of its own there, or use --global";

/// Gives a file the owner and permissions of the one it replaces.
fn keep_owner(file: &OwnedFd, replaced: Option<&Stat>) -> rustix::io::Result<()> {
    let Some(replaced) = replaced else { return Ok(()) };
    let now = fstat(file)?;
    if (now.st_uid, now.st_gid) != (replaced.st_uid, replaced.st_gid) {
        fchown(file, Some(Uid::from_raw(replaced.st_uid)), Some(Gid::from_raw(replaced.st_gid)))?;
    }
    fchmod(file, Mode::from_raw_mode(replaced.st_mode & 0o7777))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_program_wrote_meanwhile_is_not_lost() {
        let directory = tempfile::tempdir().unwrap();
        let place = |path: &str, trust| Place {
            root: directory.path().into(),
            path: path.into(),
            trust,
            mode: 0o600,
        };
        for trust in [Trust::Project, Trust::Home] {
            let place = place("deep/file", trust);
            let before = place.read().unwrap();
            assert_eq!(before.text, "");
            place.write(&before, "one").unwrap();
            let changed =
                |result: Result<(), Problem>| assert_eq!(result.unwrap_err().code, "plugin-changed");
            changed(place.write(&before, "two"));
            let before = place.read().unwrap();
            assert_eq!(before.text, "one");
            std::fs::write(place.whole(), "six").unwrap();
            changed(place.write(&before, "two"));
            changed(place.remove(&before));
            let entries = std::fs::read_dir(directory.path().join("deep")).unwrap();
            assert_eq!(entries.count(), 1, "no draft is left");
            assert_eq!(std::fs::read_to_string(place.whole()).unwrap(), "six");
            place.remove(&place.read().unwrap()).unwrap();
            assert!(directory.path().is_dir() && !directory.path().join("deep").exists());
        }
    }

    #[test]
    fn sizes_are_bounded() {
        let directory = tempfile::tempdir().unwrap();
        for (trust, largest) in [(Trust::Project, LARGEST_OF_PROJECT), (Trust::Home, LARGEST_OF_HOME)] {
            let place = Place { root: directory.path().into(), path: "file".into(), trust, mode: 0o600 };
            let file = std::fs::File::create(place.whole()).unwrap();
            file.set_len(largest).unwrap();
            assert_eq!(place.read().unwrap().text.len() as u64, largest);
            file.set_len(largest + 1).unwrap();
            assert!(place.read().is_err_and(|problem| problem.message.contains("is larger than")));
        }
    }
}
