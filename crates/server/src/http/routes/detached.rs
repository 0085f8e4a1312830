//! Commands that run on without a client.

use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;

use super::super::App;
use super::super::answer::{Answer, Body, Made, Path, Query, made, ok};
use crate::engine::OUTPUT;
use crate::model::{DetachedCommand, DetachedLogs, Envelope, ExecRequest, Stream};

/// Start a command that runs on.
#[utoipa::path(post, path = "/sandboxes/{name}/exec/detach", tag = "exec", params(("name" = String, Path)),
    request_body = ExecRequest,
    responses((status = 201, description = "It runs.", body = Envelope<DetachedCommand>)))]
pub(crate) async fn detach(
    State(app): State<App>,
    Path(name): Path<String>,
    Body(request): Body<ExecRequest>,
) -> Made<DetachedCommand> {
    made(app.engine.detach(&name, &request).await?)
}

/// List a sandbox's detached commands.
#[utoipa::path(get, path = "/sandboxes/{name}/exec/detached", tag = "exec", params(("name" = String, Path)),
    responses((status = 200, description = "All, oldest first.", body = Envelope<Vec<DetachedCommand>>)))]
pub(crate) async fn list(State(app): State<App>, Path(name): Path<String>) -> Answer<Vec<DetachedCommand>> {
    ok(app.engine.detached(&name).await?)
}

/// What became of a detached command.
#[utoipa::path(get, path = "/sandboxes/{name}/exec/detached/{id}", tag = "exec",
    params(("name" = String, Path), ("id" = String, Path)),
    responses((status = 200, description = "What became of it.", body = Envelope<DetachedCommand>)))]
pub(crate) async fn status(
    State(app): State<App>,
    Path((name, id)): Path<(String, String)>,
) -> Answer<DetachedCommand> {
    ok(app.engine.detached_status(&name, &id).await?)
}

/// Which part of what a command said.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(crate) struct LogsQuery {
    /// One stream; both if nothing is said.
    #[param(inline)]
    stream: Option<Stream>,
}

/// What a detached command said, as far as it is kept.
#[utoipa::path(get, path = "/sandboxes/{name}/exec/detached/{id}/logs", tag = "exec",
    params(("name" = String, Path), ("id" = String, Path), LogsQuery),
    responses((status = 200, description = "What it said.", body = Envelope<DetachedLogs>)))]
pub(crate) async fn logs(
    State(app): State<App>,
    Path((name, id)): Path<(String, String)>,
    Query(query): Query<LogsQuery>,
) -> Answer<DetachedLogs> {
    ok(app.engine.detached_logs(&name, &id, query.stream, OUTPUT).await?)
}

/// Kill a detached command with all it started.
#[utoipa::path(delete, path = "/sandboxes/{name}/exec/detached/{id}", tag = "exec",
    params(("name" = String, Path), ("id" = String, Path)),
    responses((status = 200, description = "It does not run.", body = Envelope<String>)))]
pub(crate) async fn kill(State(app): State<App>, Path((name, id)): Path<(String, String)>) -> Answer<String> {
    let command = app.engine.detached_kill(&name, &id).await?;
    ok(format!("{} does not run", command.id))
}
