//! Single files of a sandbox that runs, always looked up inside the guest.

use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};
use std::time::Duration;

use agentkernel_protocol::frame::{self, CHUNK};
use agentkernel_protocol::message::{FILE_LIMIT, FileFailure, FileInput, FileReply, Request};
use serde_bytes::ByteBuf;
use tokio::net::UnixStream;

use crate::client::Sandbox;
use crate::problem::{Problem, plain, printable, problem};
use crate::spec::Spec;

/// How long the guest may be silent, or take nothing.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest path of a file, bytes (PATH_MAX of Linux).
const PATH: usize = 4096;

/// Reads a file of at most 16 MiB. A relative path begins where commands start.
///
/// # Errors
/// Code `path-invalid`, `file-not-found`, `is-a-directory`, `not-a-file`, `file-too-large`; if the sandbox does not run.
pub async fn read(sandbox: &Sandbox, path: &Path) -> Result<Vec<u8>, Problem> {
    let path = located(sandbox, path)?;
    let mut stream = sandbox.guest(Request::FileRead { path }).await?;
    let mut content = Vec::new();
    loop {
        match reply(sandbox, &mut stream).await? {
            FileReply::Data(bytes) if !bytes.is_empty() && content.len() + bytes.len() <= FILE_LIMIT => {
                content.extend(bytes);
            }
            FileReply::Data(_) => {
                return Err(plain("guest-protocol", "the guest sends too much, or nothing", None));
            }
            FileReply::Done => return Ok(content),
            FileReply::Failed { kind, message } => return Err(failed(kind, &message)),
        }
    }
}

/// Writes a file of at most 16 MiB, whole or not at all, with the directories it is in. One that is there keeps its owner
/// and permissions; what is made is the user's who runs commands.
///
/// # Errors
/// As [`read`].
pub async fn write(sandbox: &Sandbox, path: &Path, content: &[u8]) -> Result<(), Problem> {
    if content.len() > FILE_LIMIT {
        let message = format!("the file is larger than {} MiB", FILE_LIMIT >> 20);
        return Err(plain("file-too-large", message, Some("agentkernel cp takes larger ones")));
    }
    let path = located(sandbox, path)?;
    let user = Spec::load(sandbox.directory().path())?.defaults.user;
    let mut stream = sandbox.guest(Request::FileWrite { path, user }).await?;
    let send = async {
        for bytes in content.chunks(CHUNK) {
            frame::write(&mut stream, &FileInput::Data(ByteBuf::from(bytes))).await?;
        }
        frame::write(&mut stream, &FileInput::End).await
    };
    // A guest that takes no more says why.
    let _ = tokio::time::timeout(PATIENCE, send).await;
    done(reply(sandbox, &mut stream).await?)
}

/// Removes a file or a symbolic link.
///
/// # Errors
/// As [`read`].
pub async fn remove(sandbox: &Sandbox, path: &Path) -> Result<(), Problem> {
    let path = located(sandbox, path)?;
    let mut stream = sandbox.guest(Request::FileRemove { path }).await?;
    done(reply(sandbox, &mut stream).await?)
}

/// A path as the guest is told it: absolute, and without what could mean another place than it says.
fn located(sandbox: &Sandbox, path: &Path) -> Result<ByteBuf, Problem> {
    let wrong = |why: &str| plain("path-invalid", format!("the path {why}"), Some("such as /tmp/file"));
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return Err(wrong("is empty"));
    }
    if bytes.len() > PATH {
        return Err(wrong("is longer than 4096 bytes"));
    }
    if bytes.contains(&0) {
        return Err(wrong("has a NUL in it"));
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(wrong("has a .. in it"));
    }
    if path.is_absolute() {
        return Ok(ByteBuf::from(bytes));
    }
    let spec = Spec::load(sandbox.directory().path())?;
    Ok(ByteBuf::from(spec.defaults.directory.join(path).as_os_str().as_bytes()))
}

async fn reply(sandbox: &Sandbox, stream: &mut UnixStream) -> Result<FileReply, Problem> {
    let read = tokio::time::timeout(PATIENCE, frame::read(stream)).await;
    match read.map_err(|_| plain("guest-slow", "the sandbox does not answer", None))? {
        Ok(reply) => Ok(reply),
        Err(error) if error.is_disconnect() => Err(sandbox.failure().await),
        Err(error) => Err(problem("guest-protocol", &error, None)),
    }
}

fn done(reply: FileReply) -> Result<(), Problem> {
    match reply {
        FileReply::Done => Ok(()),
        FileReply::Failed { kind, message } => Err(failed(kind, &message)),
        FileReply::Data(_) => Err(plain("guest-protocol", "the guest answered out of turn", None)),
    }
}

fn failed(kind: FileFailure, message: &str) -> Problem {
    let code = match kind {
        FileFailure::NotFound => "file-not-found",
        FileFailure::Directory => "is-a-directory",
        FileFailure::Special => "not-a-file",
        FileFailure::TooLarge => "file-too-large",
        FileFailure::Full => "guest-disk-full",
        FileFailure::Refused => "file-refused",
        FileFailure::Other => "file",
    };
    plain(code, format!("in the sandbox: {}", printable(message)), None)
}
