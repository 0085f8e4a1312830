//! Files of sandboxes that run: always looked up inside the guest.

use std::path::Path;

use agentkernel_sandbox::{Problem, guest_files, plain, printable};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::{Capture, Engine};
use crate::model::{Encoding, FileContent, WriteManyRequest, WriteRequest, Written};

/// Most files of one request.
const FILES: usize = 1000;

fn cut(text: &str, limit: usize) -> String {
    let mut capture = Capture::new(limit);
    capture.take(text.as_bytes());
    capture.text()
}

impl Engine {
    /// Reads a file; of text longer than `limit` bytes head and tail.
    ///
    /// # Errors
    /// Code `file-not-found`, `is-a-directory`, `not-a-file`, `file-too-large`, `path-invalid`; if the sandbox does not run.
    pub async fn read_file(&self, name: &str, path: &str, limit: usize) -> Result<FileContent, Problem> {
        let (sandbox, _) = self.live(name).await?;
        let bytes = guest_files::read(&sandbox, Path::new(path)).await?;
        let size = bytes.len();
        Ok(match String::from_utf8(bytes) {
            Ok(content) => {
                let content = if size > limit { cut(&content, limit) } else { content };
                FileContent { content, encoding: Encoding::Utf8, size }
            }
            Err(_) if size > limit => {
                let message =
                    format!("the file has {size} bytes that are no text; at most {limit} are given");
                return Err(plain("file-too-large", message, None));
            }
            Err(error) => {
                let content = STANDARD.encode(error.as_bytes());
                FileContent { content, encoding: Encoding::Base64, size }
            }
        })
    }

    /// Writes a file, with the directories it is in; returns its size, bytes.
    ///
    /// # Errors
    /// As [`Engine::read_file`], and if the content is not what its encoding says.
    pub async fn write_file(&self, name: &str, path: &str, request: WriteRequest) -> Result<usize, Problem> {
        let bytes = match request.encoding.unwrap_or_default() {
            Encoding::Utf8 => request.content.into_bytes(),
            Encoding::Base64 => STANDARD
                .decode(request.content)
                .map_err(|error| plain("usage", format!("content is no base64: {error}"), None))?,
        };
        let (sandbox, _) = self.live(name).await?;
        let size = bytes.len();
        guest_files::write(&sandbox, Path::new(path), &bytes).await?;
        Ok(size)
    }

    /// Writes text files, each whole, one after the other.
    ///
    /// # Errors
    /// As [`Engine::write_file`]; those before the one that failed are written then, and the message says which it was.
    pub async fn write_files(&self, name: &str, request: WriteManyRequest) -> Result<Written, Problem> {
        if request.files.len() > FILES {
            return Err(plain("usage", format!("a request has at most {FILES} files"), None));
        }
        let (sandbox, _) = self.live(name).await?;
        let mut written = 0;
        for (path, content) in request.files {
            let done = guest_files::write(&sandbox, Path::new(&path), content.as_bytes()).await;
            done.map_err(|mut problem| {
                problem.message = format!("{}: {}", printable(&path), problem.message);
                problem
            })?;
            written += 1;
        }
        Ok(Written { written })
    }

    /// Removes a file or a symbolic link.
    ///
    /// # Errors
    /// As [`Engine::read_file`].
    pub async fn remove_file(&self, name: &str, path: &str) -> Result<(), Problem> {
        let (sandbox, _) = self.live(name).await?;
        guest_files::remove(&sandbox, Path::new(path)).await
    }
}
