//! Copies between the host and a guest: files, directories, and tar streams.
//!
//! ```text
//! host path ─► HostSource ─┐                        ┌─► HostTarget ─► host path
//! tar       ─► TarSource  ─┴─► entries ══ guest ══► ┴─► TarTarget  ─► tar
//! ```
//! What comes from a guest is hostile: names are checked, nothing is written outside the destination, no symbolic link
//! is followed, and all of it is bounded. What goes to a guest is the user's; links in it are sent, not followed.

mod host;
mod tape;

use agentkernel_protocol::frame::{self, FrameError};
use agentkernel_protocol::message::{Entry, Reply};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

pub use host::{HostSource, HostTarget};
pub use tape::{TarSource, TarTarget};

/// Entries under way between a stream and the disk.
const QUEUE: usize = 16;

/// How much may be copied at once.
#[derive(Clone, Copy, Debug)]
pub struct CopyLimits {
    /// Files, directories and links.
    pub entries: u64,
    /// Sum of all file sizes, bytes.
    pub bytes: u64,
}

/// What was copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CopySummary {
    /// Regular files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Device nodes, FIFOs and sockets, which are not copied.
    pub skipped: u64,
    /// Bytes of all files.
    pub bytes: u64,
}

/// Why a copy was broken off. What was copied until then stays.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// A path of this machine.
    #[error("{path}")]
    Path {
        /// Which.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The guest cannot read or write something.
    #[error("in the guest: {0}")]
    Guest(String),
    /// More than may be copied at once.
    #[error("the copy exceeds {0}")]
    Limit(String),
    /// The sender broke the rules of a copy: a hostile guest, or a hostile archive.
    #[error("refused: {0}")]
    Refused(String),
    /// The archive cannot be read or written.
    #[error("the tar archive")]
    Archive(#[source] std::io::Error),
    /// The sandbox died, or is dying.
    #[error("the stream to the guest broke")]
    Broken,
}

impl CopyError {
    fn path(path: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_string();
        move |source| Self::Path { path, source }
    }
}

/// Something that sends a tree, on a thread that may wait.
pub trait Source: Send + 'static {
    /// Hands every entry to `send`, the root with its empty path first, without `End`.
    ///
    /// # Errors
    /// Why it could not send all; those of `send`.
    fn send(self, send: &mut dyn FnMut(Entry) -> Result<(), CopyError>) -> Result<(), CopyError>;
}

/// Something that takes a tree in, on a thread that may wait.
pub trait Target: Send + 'static {
    /// Takes entries until there are no more.
    ///
    /// # Errors
    /// Why it could not take all.
    fn take(self, entries: &mut Entries) -> Result<(), CopyError>;
}

/// Entries as they come from a guest, checked and counted.
#[derive(Debug)]
pub struct Entries {
    receiver: mpsc::Receiver<Result<Entry, CopyError>>,
    limits: CopyLimits,
    summary: CopySummary,
    /// Bytes of the open file still to come.
    left: u64,
    begun: bool,
}

impl Entries {
    fn new(receiver: mpsc::Receiver<Result<Entry, CopyError>>, limits: CopyLimits) -> Self {
        Self { receiver, limits, summary: CopySummary::default(), left: 0, begun: false }
    }

    /// The next entry that is no content; what the last file has left is skipped. `None` at the end.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, CopyError> {
        while self.next_data()?.is_some() {}
        let entry = match self.receiver.blocking_recv() {
            None => return Err(CopyError::Broken),
            Some(Err(error)) => return Err(error),
            Some(Ok(entry)) => entry,
        };
        let is_root = |path: &serde_bytes::ByteBuf| path.is_empty();
        let root = match &entry {
            Entry::Directory { path, .. } => {
                self.summary.directories += 1;
                is_root(path)
            }
            Entry::File { path, size, .. } => {
                self.summary.files += 1;
                self.summary.bytes = self.summary.bytes.saturating_add(*size);
                self.left = *size;
                is_root(path)
            }
            Entry::Symlink { path, .. } => {
                self.summary.symlinks += 1;
                is_root(path)
            }
            Entry::Special { path } => {
                self.summary.skipped += 1;
                is_root(path)
            }
            Entry::End if self.begun => return Ok(None),
            Entry::Failed { message } => return Err(CopyError::Guest(crate::printable(message))),
            Entry::End | Entry::Data(_) | Entry::Removed { .. } => {
                return Err(CopyError::Refused("the guest sent what is no copy".into()));
            }
        };
        if root == std::mem::replace(&mut self.begun, true) {
            return Err(CopyError::Refused("the guest sent a tree without a root, or with two".into()));
        }
        let CopySummary { files, directories, symlinks, skipped, bytes } = self.summary;
        if files + directories + symlinks + skipped > self.limits.entries {
            return Err(CopyError::Limit(format!("{} entries", self.limits.entries)));
        }
        if bytes > self.limits.bytes {
            return Err(CopyError::Limit(format!("{} MiB", self.limits.bytes >> 20)));
        }
        Ok(Some(entry))
    }

    /// The next piece of the last file's content; `None` once it has come whole.
    pub(crate) fn next_data(&mut self) -> Result<Option<Vec<u8>>, CopyError> {
        if self.left == 0 {
            return Ok(None);
        }
        match self.receiver.blocking_recv() {
            Some(Ok(Entry::Data(bytes))) if !bytes.is_empty() && bytes.len() as u64 <= self.left => {
                self.left -= bytes.len() as u64;
                Ok(Some(bytes.into_vec()))
            }
            Some(Ok(Entry::Failed { message })) => Err(CopyError::Guest(crate::printable(&message))),
            Some(Ok(_)) => {
                Err(CopyError::Refused("a file has more or less content than was announced".into()))
            }
            Some(Err(error)) => Err(error),
            None => Err(CopyError::Broken),
        }
    }
}

/// Reads what a guest sends over `stream` (after [`CopyOut`](agentkernel_protocol::message::Request::CopyOut)) into
/// `target`.
///
/// # Errors
/// Why it was broken off.
pub async fn copy_out<S, T>(mut stream: S, target: T, limits: CopyLimits) -> Result<CopySummary, CopyError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: Target,
{
    let (sender, receiver) = mpsc::channel(QUEUE);
    let work = tokio::task::spawn_blocking(move || {
        let mut entries = Entries::new(receiver, limits);
        target.take(&mut entries).map(|()| entries.summary)
    });
    loop {
        let entry = match frame::read::<Entry, _>(&mut stream).await {
            Ok(entry) => Ok(entry),
            Err(error) if error.is_disconnect() => Err(CopyError::Broken),
            Err(error) => Err(CopyError::Refused(error.to_string())),
        };
        let last = matches!(entry, Err(_) | Ok(Entry::End | Entry::Failed { .. }));
        // A target that failed takes no more, and says why.
        if sender.send(entry).await.is_err() || last {
            break;
        }
    }
    drop(sender);
    work.await.map_err(|_| CopyError::Broken)?
}

/// Sends `source` over `stream` (after [`CopyIn`](agentkernel_protocol::message::Request::CopyIn)) to a guest.
///
/// # Errors
/// Why it was broken off.
pub async fn copy_in<S, T>(stream: S, source: T) -> Result<CopySummary, CopyError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: Source,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (sender, mut receiver) = mpsc::channel::<Entry>(QUEUE);
    let work = tokio::task::spawn_blocking(move || {
        let mut summary = CopySummary::default();
        let result = source.send(&mut |entry| {
            match &entry {
                Entry::Directory { .. } => summary.directories += 1,
                Entry::File { size, .. } => {
                    summary.files += 1;
                    summary.bytes += size;
                }
                Entry::Symlink { .. } => summary.symlinks += 1,
                Entry::Special { .. } => summary.skipped += 1,
                _ => {}
            }
            sender.blocking_send(entry).map_err(|_| CopyError::Broken)
        });
        let last = match &result {
            Ok(()) => Entry::End,
            Err(error) => Entry::Failed { message: error.to_string() },
        };
        let _ = sender.blocking_send(last);
        result.map(|()| summary)
    });
    let reply = {
        let send = async {
            while let Some(entry) = receiver.recv().await {
                frame::write(&mut writer, &entry).await?;
            }
            Ok::<(), FrameError>(())
        };
        let answer = async { frame::read::<Reply, _>(&mut reader).await };
        tokio::pin!(send, answer);
        tokio::select! {
            // Before all was sent: the guest refuses the rest.
            reply = &mut answer => reply,
            _ = &mut send => answer.await,
        }
    };
    drop(receiver);
    let _ = writer.shutdown().await;
    let sent = work.await.map_err(|_| CopyError::Broken)?;
    match (reply, sent) {
        (Ok(Reply::Done), Ok(summary)) => Ok(summary),
        (Ok(Reply::Failed { message }), Ok(_) | Err(CopyError::Broken)) => {
            Err(CopyError::Guest(crate::printable(&message)))
        }
        (_, Err(error)) => Err(error),
        (Err(_), Ok(_)) => Err(CopyError::Broken),
    }
}

#[cfg(test)]
mod tests;
