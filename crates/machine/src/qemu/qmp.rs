//! QEMU's control protocol, as far as it is needed: commands one at a time, answers that only say yes or no.
//!
//! What comes back is not trusted more than the guest: a line is bounded, an answer awaited for a bounded time, and
//! whatever breaks the protocol ends the connection (and not the machine, which is ended by its process).

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, mpsc};

use crate::console::printable;
use crate::machine::MachineError;

/// The greeting has 200 bytes, events fewer.
const LINE_LIMIT: u64 = 64 << 10;
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A connection.
#[derive(Debug)]
pub(super) struct Qmp {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    writer: OwnedWriteHalf,
    answers: mpsc::Receiver<Answer>,
    /// The next command's id: an answer that came too late must not be taken for the next one's.
    next: u64,
    greeted: bool,
}

/// A line from QEMU; whatever else it holds does not matter.
#[derive(Debug, Deserialize)]
struct Line {
    id: Option<u64>,
    #[serde(rename = "return")]
    result: Option<serde::de::IgnoredAny>,
    error: Option<Refusal>,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    #[serde(default)]
    desc: String,
}

#[derive(Debug)]
struct Answer {
    id: u64,
    refusal: Option<String>,
}

impl Qmp {
    /// Takes the socket over. QEMU may still be starting, or have been `greeted` in another's life.
    pub(super) fn connect(socket: UnixStream, greeted: bool) -> Self {
        let (reader, writer) = socket.into_split();
        let (answers_in, answers) = mpsc::channel(4);
        tokio::spawn(read(reader, answers_in));
        Self { inner: Arc::new(Mutex::new(Inner { writer, answers, next: 0, greeted })) }
    }

    /// Executes a command and waits for its answer. `action` names it in errors.
    pub(super) async fn execute(
        &self,
        command: &'static str,
        action: &'static str,
    ) -> Result<(), MachineError> {
        self.execute_with(command, &serde_json::json!({}), action).await
    }

    /// The same with arguments.
    pub(super) async fn execute_with(
        &self,
        command: &'static str,
        arguments: &serde_json::Value,
        action: &'static str,
    ) -> Result<(), MachineError> {
        let mut inner = self.inner.lock().await;
        let work = async {
            if !inner.greeted {
                inner.ask("qmp_capabilities", &serde_json::json!({}), action).await?;
                inner.greeted = true;
            }
            inner.ask(command, arguments, action).await
        };
        let late = || MachineError::NoAnswer { reason: format!("no answer to {command} in time") };
        tokio::time::timeout(ANSWER_LIMIT, work).await.map_err(|_| late())?
    }
}

impl Inner {
    async fn ask(
        &mut self,
        command: &str,
        arguments: &serde_json::Value,
        action: &'static str,
    ) -> Result<(), MachineError> {
        let id = self.next;
        self.next += 1;
        let command = serde_json::json!({ "execute": command, "arguments": arguments, "id": id });
        let line = format!("{command}\n");
        self.writer.write_all(line.as_bytes()).await.map_err(|_| MachineError::Ended)?;
        loop {
            let answer = self.answers.recv().await.ok_or(MachineError::Ended)?;
            if answer.id == id {
                return answer.refusal.map_or(Ok(()), |reason| Err(MachineError::Refused { action, reason }));
            }
        }
    }
}

/// Reads lines until the end or the first that is none. Events and answers nobody waits for are dropped: QEMU is never
/// kept waiting.
async fn read(reader: OwnedReadHalf, answers: mpsc::Sender<Answer>) {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(LINE_LIMIT).read_until(b'\n', &mut line).await {
            Ok(1..) if line.ends_with(b"\n") => {}
            Ok(0) | Err(_) => return,
            Ok(_) => {
                tracing::warn!("the machine sent a control line of more than {LINE_LIMIT} bytes");
                // Dropping this half would leave the socket open, and its sender waiting for room.
                let socket: &UnixStream = reader.get_ref().as_ref();
                let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
                return;
            }
        }
        let Some(answer) = parse(&line) else { continue };
        let _ = answers.try_send(answer);
    }
}

fn parse(line: &[u8]) -> Option<Answer> {
    let line: Line = serde_json::from_slice(line).ok()?;
    let refusal = line.error.map(|refusal| printable(&refusal.desc));
    (line.result.is_some() || refusal.is_some()).then_some(())?;
    Some(Answer { id: line.id?, refusal })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
    }

    #[test]
    fn answers_are_matched_by_id_between_events() {
        runtime().block_on(async {
            let (ours, theirs) = UnixStream::pair().expect("a pair");
            let qmp = Qmp::connect(ours, false);
            let (reader, mut writer) = theirs.into_split();
            let server = async move {
                let mut lines = BufReader::new(reader).lines();
                writer
                    .write_all(b"{\"QMP\": {}}\n{\"event\": \"RESUME\"}\nnonsense\n")
                    .await
                    .expect("written");
                lines.next_line().await.expect("a line");
                writer.write_all(b"{\"return\": {}, \"id\": 0}\n").await.expect("written");
                lines.next_line().await.expect("a line");
                writer.write_all(b"{\"return\": {}, \"id\": 0}\n").await.expect("written");
                writer
                    .write_all(b"{\"error\": {\"class\": \"x\", \"desc\": \"no\"}, \"id\": 1}\n")
                    .await
                    .expect("written");
            };
            let (result, ()) = tokio::join!(qmp.execute("stop", "pause"), server);
            assert!(
                matches!(result, Err(MachineError::Refused { action: "pause", reason }) if reason == "no")
            );
        });
    }

    #[test]
    fn an_endless_line_ends_the_connection() {
        runtime().block_on(async {
            let (ours, mut theirs) = UnixStream::pair().expect("a pair");
            let qmp = Qmp::connect(ours, false);
            let flood = async move { while theirs.write_all(&[b'x'; 4096]).await.is_ok() {} };
            let (result, ()) = tokio::join!(qmp.execute("stop", "pause"), flood);
            assert!(matches!(result, Err(MachineError::Ended)));
        });
    }

    proptest! {
        #[test]
        fn any_line_is_read(line in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&line);
        }
    }
}
