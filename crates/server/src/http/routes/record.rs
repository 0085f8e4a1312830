//! What happened, and what happens.

use std::convert::Infallible;

use agentkernel_sandbox::plain;
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures::Stream;
use serde::Deserialize;
use serde_json::json;
use utoipa::IntoParams;

use super::super::App;
use super::super::answer::{Answer, Path, Query, ok};
use super::run::ALIVE;
use crate::model::{Envelope, LogEntry};

/// Entries of all sandboxes where no number is said.
const ENTRIES: usize = 1000;
/// Most entries of all sandboxes.
const MOST: usize = 10_000;

/// A sandbox's record: console, lifecycle, refusals, oldest first.
#[utoipa::path(get, path = "/sandboxes/{name}/logs", tag = "record", params(("name" = String, Path)),
    responses((status = 200, description = "As far as it is kept.", body = Envelope<Vec<LogEntry>>)))]
pub(crate) async fn logs(State(app): State<App>, Path(name): Path<String>) -> Answer<Vec<LogEntry>> {
    ok(app.engine.record(Some(&name)).await?)
}

/// Which entries are shown.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(crate) struct AuditQuery {
    /// The newest so many; 1000 if nothing is said.
    #[param(minimum = 1, maximum = 10000)]
    limit: Option<usize>,
}

/// What happened in all sandboxes that there are, without their consoles, oldest first.
#[utoipa::path(get, path = "/audit", tag = "record", params(AuditQuery),
    responses((status = 200, description = "The newest entries.", body = Envelope<Vec<LogEntry>>)))]
pub(crate) async fn audit(State(app): State<App>, Query(query): Query<AuditQuery>) -> Answer<Vec<LogEntry>> {
    if query.limit.is_some_and(|limit| limit == 0 || limit > MOST) {
        return Err(plain("query", format!("limit is 1 to {MOST}"), None).into());
    }
    let mut entries = app.engine.record(None).await?;
    entries.retain(|entry| entry.event != "console");
    let limit = query.limit.unwrap_or(ENTRIES);
    let skip = entries.len().saturating_sub(limit);
    ok(entries.split_off(skip))
}

/// Follow what happens in all sandboxes from now on.
///
/// Each event is named after what happened and has an entry of the record as its data; `missed {count}` tells a client that
/// was too slow.
#[utoipa::path(get, path = "/events", tag = "record",
    responses((status = 200, description = "Server-sent events.", body = String, content_type = "text/event-stream")))]
pub(crate) async fn events(State(app): State<App>) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let watch = app.engine.watch().await;
    let events = futures::stream::unfold((watch, app), async |(mut watch, app)| {
        let next = tokio::select! {
            next = watch.next() => next?,
            () = app.ending.cancelled() => return None,
        };
        let event = match next {
            Ok(entry) => {
                let data = serde_json::to_string(&*entry).unwrap_or_default();
                Event::default().event(name(&entry.event)).data(data)
            }
            Err(count) => Event::default().event("missed").data(json!({ "count": count }).to_string()),
        };
        Some((Ok(event), (watch, app)))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(ALIVE))
}

/// An event's name on one line.
fn name(event: &str) -> String {
    event.chars().filter(|character| character.is_ascii_alphanumeric() || *character == '-').collect()
}
