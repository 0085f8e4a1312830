//! The server itself, its images, its garbage.

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;

use super::super::App;
use super::super::answer::{Answer, Path, Query, ok};
use crate::model::{BackendDiscovery, Envelope, Garbage, ImageInfo, SandboxStats, ServerStatus};

/// Whether the server lives. Needs no key.
#[utoipa::path(get, path = "/health", tag = "server",
    responses((status = 200, description = "It lives: the word is ok.", body = Envelope<String>)))]
pub(crate) async fn health() -> Answer<&'static str> {
    ok("ok")
}

/// What the server is and does.
#[utoipa::path(get, path = "/status", tag = "server",
    responses((status = 200, description = "What it is and does.", body = Envelope<ServerStatus>)))]
pub(crate) async fn status(State(app): State<App>) -> Answer<ServerStatus> {
    ok(app.engine.status().await?)
}

/// What all sandboxes that run take from the host now.
#[utoipa::path(get, path = "/stats", tag = "server",
    responses((status = 200, description = "Memory, processor time, disk.", body = Envelope<Vec<SandboxStats>>)))]
pub(crate) async fn stats(State(app): State<App>) -> Answer<Vec<SandboxStats>> {
    ok(app.engine.stats(None).await?)
}

/// What sandboxes may run on.
#[utoipa::path(get, path = "/backends", tag = "server",
    responses((status = 200, description = "All of them.", body = Envelope<BackendDiscovery>)))]
pub(crate) async fn backends(State(app): State<App>) -> Answer<BackendDiscovery> {
    ok(app.engine.backends().await?)
}

/// What the server counts, in the format of Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "server",
    responses((status = 200, description = "Counters.", body = String,
        content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8")))]
pub(crate) async fn metrics(State(app): State<App>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], app.metrics.text(&app.engine).await).into_response()
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "server",
    responses((status = 200, description = "OpenAPI 3.1.", body = Object)))]
pub(crate) async fn openapi(State(app): State<App>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], app.openapi.clone()).into_response()
}

/// List the images of the local store.
#[utoipa::path(get, path = "/images", tag = "images",
    responses((status = 200, description = "All, by name.", body = Envelope<Vec<ImageInfo>>)))]
pub(crate) async fn images(State(app): State<App>) -> Answer<Vec<ImageInfo>> {
    ok(app.engine.images().await?)
}

/// Take an image's name away, and free what nothing needs any more.
#[utoipa::path(delete, path = "/images/{*id}", tag = "images",
    params(("id" = String, Path, description = "Its name or id.")),
    responses((status = 200, description = "It is gone.", body = Envelope<String>)))]
pub(crate) async fn remove_image(State(app): State<App>, Path(id): Path<String>) -> Answer<String> {
    app.engine.remove_image(&id).await?;
    ok(format!("{id} is removed"))
}

/// How much is done.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(crate) struct GcQuery {
    /// Only look.
    #[serde(default)]
    dry_run: bool,
}

/// Put right what dead processes left behind, and remove what is past its time.
#[utoipa::path(post, path = "/gc", tag = "server", params(GcQuery),
    responses((status = 200, description = "What was found.", body = Envelope<Garbage>)))]
pub(crate) async fn gc(State(app): State<App>, Query(query): Query<GcQuery>) -> Answer<Garbage> {
    ok(app.engine.gc(query.dry_run).await?)
}
