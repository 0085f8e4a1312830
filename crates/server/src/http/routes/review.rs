//! What was changed in the project, seen and taken.

use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;

use super::super::App;
use super::super::answer::{Answer, Optional, Path, Query, ok};
use crate::model::{Applied, ApplyRequest, Diff, Envelope};

/// Which changes are shown.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(crate) struct DiffQuery {
    /// Only this path, relative to the project, and what is beneath it.
    path: Option<String>,
}

impl DiffQuery {
    fn paths(self) -> Vec<String> {
        self.path.into_iter().collect()
    }
}

/// What a sandbox changed in the project.
///
/// A sandbox that is stopped is started for a moment: only a guest may read a guest's disk.
#[utoipa::path(get, path = "/sandboxes/{name}/diff", tag = "review", params(("name" = String, Path), DiffQuery),
    responses((status = 200, description = "The changes.", body = Envelope<Diff>)))]
pub(crate) async fn diff(
    State(app): State<App>,
    Path(name): Path<String>,
    Query(query): Query<DiffQuery>,
) -> Answer<Diff> {
    ok(app.engine.diff(Some(&name), &query.paths()).await?)
}

/// Write a sandbox's changes to the project.
///
/// What conflicts with the project, and what could act on the host by itself, is left and reported.
#[utoipa::path(post, path = "/sandboxes/{name}/apply", tag = "review", params(("name" = String, Path)),
    request_body = Option<ApplyRequest>,
    responses((status = 200, description = "What became of the changes.", body = Envelope<Applied>)))]
pub(crate) async fn apply(
    State(app): State<App>,
    Path(name): Path<String>,
    Optional(request): Optional<ApplyRequest>,
) -> Answer<Applied> {
    ok(app.engine.apply(Some(&name), &request).await?)
}

/// What the last command in a temporary sandbox changed in the project.
#[utoipa::path(get, path = "/last/diff", tag = "review", params(DiffQuery),
    responses((status = 200, description = "The changes.", body = Envelope<Diff>)))]
pub(crate) async fn last_diff(State(app): State<App>, Query(query): Query<DiffQuery>) -> Answer<Diff> {
    ok(app.engine.diff(None, &query.paths()).await?)
}

/// Write the changes of the last command in a temporary sandbox to the project.
#[utoipa::path(post, path = "/last/apply", tag = "review", request_body = Option<ApplyRequest>,
    responses((status = 200, description = "What became of the changes.", body = Envelope<Applied>)))]
pub(crate) async fn last_apply(
    State(app): State<App>,
    Optional(request): Optional<ApplyRequest>,
) -> Answer<Applied> {
    ok(app.engine.apply(None, &request).await?)
}
