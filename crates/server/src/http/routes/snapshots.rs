//! Snapshots.

use axum::extract::State;

use super::super::App;
use super::super::answer::{Answer, Body, Made, Optional, Path, made, ok};
use crate::model::{Envelope, RestoreRequest, SandboxInfo, SnapshotInfo, SnapshotRequest};

/// List snapshots.
#[utoipa::path(get, path = "/snapshots", tag = "snapshots",
    responses((status = 200, description = "All, by name.", body = Envelope<Vec<SnapshotInfo>>)))]
pub(crate) async fn list(State(app): State<App>) -> Answer<Vec<SnapshotInfo>> {
    ok(app.engine.snapshots().await?)
}

/// Take a snapshot: memory, processes and disk of a sandbox that runs, the disk of one that is stopped.
#[utoipa::path(post, path = "/snapshots", tag = "snapshots", request_body = SnapshotRequest,
    responses((status = 201, description = "It is taken.", body = Envelope<SnapshotInfo>)))]
pub(crate) async fn take(State(app): State<App>, Body(request): Body<SnapshotRequest>) -> Made<SnapshotInfo> {
    made(app.engine.take_snapshot(&request).await?)
}

/// Look a snapshot up.
#[utoipa::path(get, path = "/snapshots/{name}", tag = "snapshots", params(("name" = String, Path)),
    responses((status = 200, description = "What is known of it.", body = Envelope<SnapshotInfo>)))]
pub(crate) async fn info(State(app): State<App>, Path(name): Path<String>) -> Answer<SnapshotInfo> {
    ok(app.engine.snapshot(&name).await?)
}

/// Remove a snapshot.
#[utoipa::path(delete, path = "/snapshots/{name}", tag = "snapshots", params(("name" = String, Path)),
    responses((status = 200, description = "It is gone.", body = Envelope<String>)))]
pub(crate) async fn remove(State(app): State<App>, Path(name): Path<String>) -> Answer<String> {
    app.engine.remove_snapshot(&name).await?;
    ok(format!("{name} is removed"))
}

/// Restore a snapshot: in place, giving up what the sandbox is now, or as another sandbox.
#[utoipa::path(post, path = "/snapshots/{name}/restore", tag = "snapshots", params(("name" = String, Path)),
    request_body = Option<RestoreRequest>,
    responses((status = 200, description = "The sandbox.", body = Envelope<SandboxInfo>)))]
pub(crate) async fn restore(
    State(app): State<App>,
    Path(name): Path<String>,
    Optional(request): Optional<RestoreRequest>,
) -> Answer<SandboxInfo> {
    ok(app.engine.restore(&name, &request).await?)
}
