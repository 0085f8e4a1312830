//! Commands in sandboxes that run.

use axum::extract::State;

use super::super::App;
use super::super::answer::{Answer, Body, Path, ok};
use crate::engine::OUTPUT;
use crate::model::{Envelope, ExecRequest, RunOutput};

/// Run a command in a sandbox.
///
/// Its exit code is data: a command that fails is a request that succeeded. It is killed when the connection closes.
#[utoipa::path(post, path = "/sandboxes/{name}/exec", tag = "exec", params(("name" = String, Path)),
    request_body = ExecRequest,
    responses((status = 200, description = "The command has ended.", body = Envelope<RunOutput>)))]
pub(crate) async fn exec(
    State(app): State<App>,
    Path(name): Path<String>,
    Body(request): Body<ExecRequest>,
) -> Answer<RunOutput> {
    ok(app.engine.exec(&name, &request, OUTPUT, &mut |_, _| {}).await?)
}
