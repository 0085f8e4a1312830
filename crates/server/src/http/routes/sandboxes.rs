//! Sandboxes as wholes.

use agentkernel_sandbox::plain;
use axum::extract::State;

use super::super::App;
use super::super::answer::{Answer, Body, Made, Optional, Path, made, ok};
use crate::model::{
    CreateRequest, Envelope, ExtendRequest, Extended, ForkRequest, SandboxInfo, SandboxStats, StopRequest,
    UpdateRequest,
};

/// List sandboxes.
#[utoipa::path(get, path = "/sandboxes", tag = "sandboxes",
    responses((status = 200, description = "All, by name.", body = Envelope<Vec<SandboxInfo>>)))]
pub(crate) async fn list(State(app): State<App>) -> Answer<Vec<SandboxInfo>> {
    ok(app.engine.list().await?)
}

/// Make a sandbox and start it.
///
/// It lives until it is removed or its time is up, and keeps its writable layer over stop and start.
#[utoipa::path(post, path = "/sandboxes", tag = "sandboxes", request_body = CreateRequest,
    responses((status = 201, description = "It runs.", body = Envelope<SandboxInfo>)))]
pub(crate) async fn create(State(app): State<App>, Body(request): Body<CreateRequest>) -> Made<SandboxInfo> {
    made(app.engine.create(&request).await?)
}

/// Look a sandbox up by its UUID.
#[utoipa::path(get, path = "/sandboxes/by-uuid/{uuid}", tag = "sandboxes", params(("uuid" = String, Path)),
    responses((status = 200, description = "What is known of it.", body = Envelope<SandboxInfo>)))]
pub(crate) async fn by_uuid(State(app): State<App>, Path(uuid): Path<String>) -> Answer<SandboxInfo> {
    let info = app.engine.info(&uuid).await?;
    if info.uuid == uuid {
        return ok(info);
    }
    let message = format!("there is no sandbox with the UUID {}", agentkernel_sandbox::printable(&uuid));
    Err(plain("not-found", message, None).into())
}

/// Look a sandbox up by its name or UUID.
#[utoipa::path(get, path = "/sandboxes/{name}", tag = "sandboxes", params(("name" = String, Path)),
    responses((status = 200, description = "What is known of it.", body = Envelope<SandboxInfo>)))]
pub(crate) async fn info(State(app): State<App>, Path(name): Path<String>) -> Answer<SandboxInfo> {
    ok(app.engine.info(&name).await?)
}

/// Change a sandbox's labels or time to live.
#[utoipa::path(patch, path = "/sandboxes/{name}", tag = "sandboxes", params(("name" = String, Path)),
    request_body = UpdateRequest,
    responses((status = 200, description = "What is known of it now.", body = Envelope<SandboxInfo>)))]
pub(crate) async fn update(
    State(app): State<App>,
    Path(name): Path<String>,
    Body(request): Body<UpdateRequest>,
) -> Answer<SandboxInfo> {
    ok(app.engine.update(&name, &request).await?)
}

/// Remove a sandbox with all that is in it, also if it runs.
#[utoipa::path(delete, path = "/sandboxes/{name}", tag = "sandboxes", params(("name" = String, Path)),
    responses((status = 200, description = "It is gone.", body = Envelope<String>)))]
pub(crate) async fn remove(State(app): State<App>, Path(name): Path<String>) -> Answer<String> {
    app.engine.remove(&name).await?;
    ok(format!("{name} is removed"))
}

/// Start a sandbox that is stopped.
#[utoipa::path(post, path = "/sandboxes/{name}/start", tag = "sandboxes", params(("name" = String, Path)),
    responses((status = 200, description = "It runs.", body = Envelope<SandboxInfo>)))]
pub(crate) async fn start(State(app): State<App>, Path(name): Path<String>) -> Answer<SandboxInfo> {
    ok(app.engine.start(&name).await?)
}

/// Stop a sandbox. What is in it stays.
#[utoipa::path(post, path = "/sandboxes/{name}/stop", tag = "sandboxes", params(("name" = String, Path)),
    request_body = Option<StopRequest>,
    responses((status = 200, description = "It is stopped.", body = Envelope<SandboxInfo>)))]
pub(crate) async fn stop(
    State(app): State<App>,
    Path(name): Path<String>,
    Optional(request): Optional<StopRequest>,
) -> Answer<SandboxInfo> {
    ok(app.engine.stop(&name, &request).await?)
}

/// Stop a sandbox's processors; nothing is lost, and nothing of it runs meanwhile.
#[utoipa::path(post, path = "/sandboxes/{name}/pause", tag = "sandboxes", params(("name" = String, Path)),
    responses((status = 200, description = "It stands still.", body = Envelope<SandboxInfo>)))]
pub(crate) async fn pause(State(app): State<App>, Path(name): Path<String>) -> Answer<SandboxInfo> {
    ok(app.engine.set_paused(&name, true).await?)
}

/// Let a paused sandbox go on.
#[utoipa::path(post, path = "/sandboxes/{name}/resume", tag = "sandboxes", params(("name" = String, Path)),
    responses((status = 200, description = "It runs.", body = Envelope<SandboxInfo>)))]
pub(crate) async fn resume(State(app): State<App>, Path(name): Path<String>) -> Answer<SandboxInfo> {
    ok(app.engine.set_paused(&name, false).await?)
}

/// Make copies of a sandbox that runs: memory, processes and disk.
#[utoipa::path(post, path = "/sandboxes/{name}/fork", tag = "sandboxes", params(("name" = String, Path)),
    request_body = ForkRequest,
    responses((status = 201, description = "They run.", body = Envelope<Vec<SandboxInfo>>)))]
pub(crate) async fn fork(
    State(app): State<App>,
    Path(name): Path<String>,
    Body(request): Body<ForkRequest>,
) -> Made<Vec<SandboxInfo>> {
    made(app.engine.fork(&name, &request).await?)
}

/// Give a sandbox more time than it has left.
#[utoipa::path(post, path = "/sandboxes/{name}/extend", tag = "sandboxes", params(("name" = String, Path)),
    request_body = Option<ExtendRequest>,
    responses((status = 200, description = "Its new end.", body = Envelope<Extended>)))]
pub(crate) async fn extend(
    State(app): State<App>,
    Path(name): Path<String>,
    Optional(request): Optional<ExtendRequest>,
) -> Answer<Extended> {
    ok(app.engine.extend(&name, &request).await?)
}

/// What a sandbox takes from the host now.
#[utoipa::path(get, path = "/sandboxes/{name}/stats", tag = "sandboxes", params(("name" = String, Path)),
    responses((status = 200, description = "Memory, processor time, disk.", body = Envelope<Vec<SandboxStats>>)))]
pub(crate) async fn stats(State(app): State<App>, Path(name): Path<String>) -> Answer<Vec<SandboxStats>> {
    ok(app.engine.stats(Some(&name)).await?)
}
