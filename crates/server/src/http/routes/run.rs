//! Commands in temporary sandboxes.

use std::convert::Infallible;
use std::time::Duration;

use agentkernel_sandbox::Problem;
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures::Stream;
use serde_json::json;
use tokio::sync::mpsc;

use super::super::App;
use super::super::answer::{Answer, Body, Failed, ok};
use crate::engine::{OUTPUT, Pending, RunEvent, utf8_prefix};
use crate::model::{BatchOutput, BatchRequest, Envelope, RunOutput, RunRequest};
use crate::problem::shown;

/// Events that wait for a slow client.
const QUEUE: usize = 4;
/// How often a silent stream shows that it lives; so it is noticed that a client is gone.
pub(super) const ALIVE: Duration = Duration::from_secs(15);

/// Run a command in a temporary sandbox.
///
/// Its exit code is data: a command that fails is a request that succeeded.
#[utoipa::path(post, path = "/run", tag = "run", request_body = RunRequest,
    responses((status = 200, description = "The command has ended.", body = Envelope<RunOutput>)))]
pub(crate) async fn run(State(app): State<App>, Body(request): Body<RunRequest>) -> Answer<RunOutput> {
    ok(app.engine.run(&request, OUTPUT, &mut |_, _| {}).await?)
}

/// Run commands at once, each in a temporary sandbox of its own.
#[utoipa::path(post, path = "/batch/run", tag = "run", request_body = BatchRequest,
    responses((status = 200, description = "All have ended.", body = Envelope<BatchOutput>)))]
pub(crate) async fn batch(State(app): State<App>, Body(request): Body<BatchRequest>) -> Answer<BatchOutput> {
    ok(app.engine.batch(request).await?)
}

/// Run a command in a temporary sandbox and follow what it says.
///
/// Events: `started {sandbox}`; `output {data, stream}`; at the end `done {exit_code, ...}`, or `error {message, code}`. The
/// command is as slow as who reads; it is killed when the connection closes.
#[utoipa::path(post, path = "/run/stream", tag = "run", request_body = RunRequest,
    responses((status = 200, description = "Server-sent events.", body = String, content_type = "text/event-stream")))]
pub(crate) async fn stream(
    State(app): State<App>,
    Body(request): Body<RunRequest>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Failed> {
    let pending = app.engine.prepare(request)?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move { follow(app, pending, sender).await });
    let events = futures::stream::unfold(receiver, async |mut receiver| {
        receiver.recv().await.map(|event: Event| (Ok(event), receiver))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(ALIVE)))
}

/// Runs the command and tells of it. With the client gone, all of it is dropped.
async fn follow(app: App, pending: Pending, events: mpsc::Sender<Event>) {
    let tell = async |event: &str, data: serde_json::Value| {
        events.send(Event::default().event(event).data(data.to_string())).await.is_ok()
    };
    if !tell("started", json!({ "sandbox": pending.sandbox() })).await {
        return;
    }
    let (said, mut said_to_us) = mpsc::channel(QUEUE);
    // What says something goes with it: then there is nothing more to tell.
    let work = async move {
        let run = pending.start().await?;
        run.stream(&said).await
    };
    let tell_all = async {
        let mut decoders = [Decoder::default(), Decoder::default()];
        while let Some(event) = said_to_us.recv().await {
            match event {
                RunEvent::Said(bytes, error) => {
                    let text = decoders[usize::from(error)].text(&bytes);
                    let stream = if error { "stderr" } else { "stdout" };
                    if !text.is_empty() && !tell("output", json!({ "data": text, "stream": stream })).await {
                        return;
                    }
                }
                RunEvent::Done(output) => {
                    for (decoder, stream) in decoders.iter_mut().zip(["stdout", "stderr"]) {
                        let text = decoder.rest();
                        if !text.is_empty() {
                            tell("output", json!({ "data": text, "stream": stream })).await;
                        }
                    }
                    let mut data = serde_json::to_value(&output).unwrap_or_default();
                    if let Some(fields) = data.as_object_mut() {
                        // They were told already.
                        for name in ["output", "stdout", "stderr", "omitted_bytes"] {
                            fields.remove(name);
                        }
                    }
                    tell("done", data).await;
                    return;
                }
            }
        }
    };
    let failed: Result<(), Problem> = tokio::select! {
        result = async { tokio::join!(work, tell_all).0 } => result,
        () = events.closed() => return,
        // Streams end with the server.
        () = app.ending.cancelled() => Err(agentkernel_sandbox::plain("ending", "the server is ending", None)),
    };
    if let Err(problem) = failed {
        let data =
            json!({ "message": shown(&app.engine, &problem), "code": problem.code, "hint": problem.hint });
        tell("error", data).await;
    }
}

/// Makes text of bytes that come in pieces, which may end within a character.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    rest: Vec<u8>,
}

impl Decoder {
    /// The text of what has come whole; what is no UTF-8 is replaced.
    pub(crate) fn text(&mut self, bytes: &[u8]) -> String {
        self.rest.extend_from_slice(bytes);
        let whole = utf8_prefix(&self.rest);
        let text = String::from_utf8_lossy(&self.rest[..whole]).into_owned();
        self.rest.drain(..whole);
        text
    }

    /// What is left when nothing more comes.
    pub(crate) fn rest(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.rest)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_in_pieces_is_the_same_text(text in "[aé€😀]{0,40}", chunk in 1usize..7) {
            let mut decoder = Decoder::default();
            let mut whole: String = text.as_bytes().chunks(chunk).map(|bytes| decoder.text(bytes)).collect();
            whole.push_str(&decoder.rest());
            prop_assert_eq!(whole, text);
        }

        #[test]
        fn nothing_waits_that_is_no_beginning(bytes: Vec<u8>) {
            let mut decoder = Decoder::default();
            decoder.text(&bytes);
            prop_assert!(decoder.rest.len() < 4);
        }
    }
}
