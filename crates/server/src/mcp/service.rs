//! The server that has the tools, and the two ways to it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use agentkernel_sandbox::{Problem, plain};
use axum::body::Body;
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use http_body_util::BodyExt;
use rmcp::handler::server::router::tool::ToolRouter;
use rmcp::model::{Implementation, JsonObject, ServerCapabilities, ServerConfig};
use rmcp::transport::async_rw::AsyncRwTransport;
use rmcp::transport::io::stdio_pipes;
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use rmcp::{ServerHandler, ServiceExt, tool_handler};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::engine::Engine;

/// Longest message of a peer's over stdio, and largest body over HTTP, bytes: files are sent in them.
pub(super) const MESSAGE: usize = 32 << 20;
/// Sessions over HTTP at once.
const SESSIONS: usize = 1024;
/// How long a session over HTTP may be idle: those who use an agent have breaks, and a session costs little.
const IDLE: Duration = Duration::from_hours(8);

const INSTRUCTIONS: &str = "Runs commands in isolated microVMs. Run what you would not trust on this machine with \
sandbox_run (a fresh sandbox, removed afterwards), or make a sandbox that lives with sandbox_create and use sandbox_exec. \
Sandboxes see the project copy-on-write: review what was changed with sandbox_diff, take it with sandbox_apply. Before \
something risky take a snapshot (snapshot_take, snapshot_restore); to try several ways at once, sandbox_fork.";

/// The tools, made once.
static TOOLS: LazyLock<ToolRouter<Service>> = LazyLock::new(|| {
    let mut tools = Service::tool_router();
    for route in tools.map.values_mut() {
        let tool = &mut route.attr;
        tool.input_schema = portable(&tool.input_schema);
        tool.output_schema = tool.output_schema.as_ref().map(portable);
    }
    tools
});

/// A schema without the names of Rust's numbers: JSON Schema has no such formats, and clients complain of each.
fn portable(schema: &Arc<JsonObject>) -> Arc<JsonObject> {
    fn clean(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                fields.retain(|name, value| {
                    let format = if name == "format" { value.as_str() } else { None };
                    !format.is_some_and(|format| format.starts_with("uint") || format.starts_with("int"))
                });
                fields.values_mut().for_each(clean);
            }
            Value::Array(values) => values.iter_mut().for_each(clean),
            _ => {}
        }
    }
    let mut schema = schema.as_ref().clone();
    schema.values_mut().for_each(clean);
    Arc::new(schema)
}

/// A server for one peer.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(super) engine: Engine,
    /// Counted as long as it lives.
    _session: Option<Arc<Session>>,
}

#[derive(Debug)]
struct Session(Arc<AtomicUsize>);

impl Drop for Session {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[tool_handler(router = TOOLS)]
impl ServerHandler for Service {
    fn get_info(&self) -> ServerConfig {
        let mut info = ServerConfig::new(ServerCapabilities::builder().enable_tools().build());
        info.server_info = Implementation::new("agentkernel", env!("CARGO_PKG_VERSION"));
        info.instructions = Some(INSTRUCTIONS.to_owned());
        info
    }
}

/// Serves the peer at standard input and output until it is gone. Nothing else may be written to standard output.
///
/// # Errors
/// Code `mcp` if the peer does not speak the protocol.
pub async fn serve_stdio(engine: Engine) -> Result<(), Problem> {
    let (reader, writer) = stdio_pipes();
    serve(engine, reader, writer).await
}

pub(super) async fn serve<R, W>(engine: Engine, reader: R, writer: W) -> Result<(), Problem>
where
    R: tokio::io::AsyncRead + Send + Unpin + 'static,
    W: tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let transport = AsyncRwTransport::new(reader, writer).with_max_line_length(MESSAGE);
    let service = Service { engine, _session: None };
    let running = match service.serve(transport).await {
        Ok(running) => running,
        // A peer that leaves before it said anything.
        Err(rmcp::service::ServerInitializeError::ConnectionClosed(_)) => return Ok(()),
        Err(error) => {
            return Err(plain("mcp", format!("the peer does not speak MCP: {error}"), None));
        }
    };
    let ended = running.waiting().await;
    ended.map(drop).map_err(|error| plain("mcp", format!("the server ended: {error}"), None))
}

/// Ends with whoever waits for the answer to a request over HTTP.
#[derive(Clone, Debug)]
pub(super) struct Waiting(pub CancellationToken);

/// Notices that nobody waits for an answer any more: a session may outlive its client for long, what a client began may not.
pub(crate) async fn attend(mut request: Request, next: Next) -> Response {
    let waiting = CancellationToken::new();
    request.extensions_mut().insert(Waiting(waiting.clone()));
    let guard = waiting.drop_guard();
    let (head, body) = next.run(request).await.into_parts();
    let body = body.map_frame(move |frame| {
        // It has the body's life.
        let _ = &guard;
        frame
    });
    Response::from_parts(head, Body::new(body))
}

/// The service of `/mcp`, to be wrapped in [`attend`]. Who may come in, and from where, is settled before it.
pub(crate) fn service(
    engine: Engine,
    ending: CancellationToken,
) -> StreamableHttpService<Service, LocalSessionManager> {
    let sessions = Arc::new(AtomicUsize::new(0));
    let make = move || {
        let session = Session(sessions.clone());
        if sessions.fetch_add(1, Ordering::Relaxed) >= SESSIONS {
            return Err(std::io::Error::other(format!("{SESSIONS} sessions are open already")));
        }
        Ok(Service { engine: engine.clone(), _session: Some(Arc::new(session)) })
    };
    let mut manager = LocalSessionManager::default();
    manager.session_config.keep_alive = Some(IDLE);
    let config = StreamableHttpServerConfig::default()
        .disable_allowed_hosts()
        .with_max_request_body_bytes(MESSAGE)
        .with_cancellation_token(ending);
    StreamableHttpService::new(make, Arc::new(manager), config)
}
