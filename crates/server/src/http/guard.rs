//! What happens around every request: it gets an id, is let in or not, is measured and logged, and what went wrong is put
//! into words.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use agentkernel_sandbox::state::random_word;
use agentkernel_sandbox::{Problem, plain};
use axum::Json;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::body::Body as _;
use tokio::sync::SemaphorePermit;

use super::App;
use super::access::{self, Way};
use super::answer::{BODY, FILES_BODY, Failed};
use crate::model::Failure;
use crate::problem::{hidden, shown};

/// Name of the header with a request's id.
const ID: &str = "x-request-id";
/// Longest id that a client may give, bytes.
const ID_LENGTH: usize = 128;
/// How long a request waits for room for its body.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often refusals are logged.
const REFUSALS: Duration = Duration::from_secs(1);

/// Refusals since the last that was logged: whoever tries keys does not fill the log.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    state: Mutex<(Option<Instant>, u64)>,
}

impl Refusals {
    /// How many there were, if it is time to say so.
    fn count(&self) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.1 += 1;
        let due = state.0.is_none_or(|last| last.elapsed() >= REFUSALS);
        due.then(|| {
            state.0 = Some(Instant::now());
            std::mem::take(&mut state.1)
        })
    }
}

/// Handles a request from its beginning to the head of its answer.
pub(super) async fn guard(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let in_flight = app.metrics.begin();
    let id = id(&request);
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("-", MatchedPath::as_str).to_owned();
    let way = request.extensions_mut().remove::<Way>().unwrap_or(Way::Tcp { own: false });
    // Whoever only asks whether it lives needs no key: so do those who watch over it.
    let open = route == "/health" && !app.keys.is_empty();
    let entry = if open { Ok(()) } else { access::check(&app.keys, way, request.uri(), request.headers()) };
    let size = size(&request, if takes_files(&route) { FILES_BODY } else { BODY });
    let mut response = match entry {
        // What bodies bring is in memory until they are answered.
        Ok(()) => match room(&app, size).await {
            Ok(_room) => next.run(request).await,
            Err(problem) => Failed(problem).into_response(),
        },
        Err(problem) => {
            app.metrics.refused();
            if let Some(count) = app.refused.count() {
                tracing::warn!("refused {count} requests: {}", problem.message);
            }
            Failed(problem).into_response()
        }
    };
    let status = response.status();
    if let Some(Failed(problem)) = response.extensions_mut().remove::<Failed>() {
        if status.is_server_error() {
            tracing::error!("{id} {method} {route}: {} ({})", problem.message, problem.code);
        }
        let failure = Failure {
            success: false,
            error: shown(&app.engine, &problem),
            code: problem.code,
            hint: problem.hint.map(|hint| hidden(&app.engine, &hint)),
            request_id: Some(id.clone()),
        };
        let (old, _) = response.into_parts();
        response = (status, Json(failure)).into_response();
        for name in [header::ALLOW] {
            if let Some(value) = old.headers.get(&name) {
                response.headers_mut().insert(name, value.clone());
            }
        }
    }
    if status == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if status == StatusCode::TOO_MANY_REQUESTS {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(ID, value);
    }
    // What clients put into sandboxes is no page of ours.
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    let time = begun.elapsed();
    app.metrics.answered(&method, &route, status.as_u16(), time);
    drop(in_flight);
    tracing::debug!("{id} {method} {route} {} {:.1} ms", status.as_u16(), time.as_secs_f64() * 1e3);
    response
}

/// Whether bodies of a route may carry files.
fn takes_files(route: &str) -> bool {
    route.contains("/files") || route.starts_with("/mcp")
}

/// How large a request's body may be, KiB.
fn size(request: &Request, limit: usize) -> u32 {
    // What is not said may be all that is taken; more is refused before it is read.
    let length = request.body().size_hint().exact().map_or(limit as u64, |length| length.min(limit as u64));
    u32::try_from(length.div_ceil(1024)).unwrap_or(u32::MAX)
}

/// Room for a request's body.
async fn room(app: &App, kib: u32) -> Result<SemaphorePermit<'_>, Problem> {
    match tokio::time::timeout(PATIENCE, app.bodies.acquire_many(kib)).await {
        Ok(Ok(permit)) => Ok(permit),
        _ => Err(plain("busy", "too much is sent at once", Some("try again in a moment"))),
    }
}

/// The client's id for a request, if it is one that can be logged; else one of ours.
fn id(request: &Request) -> String {
    let given = request.headers().get(ID).and_then(|id| id.to_str().ok());
    let fit = |id: &&str| {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        (1..=ID_LENGTH).contains(&id.len()) && id.bytes().all(good)
    };
    given.filter(fit).map_or_else(random_word, str::to_owned)
}

/// There is no such route.
pub(super) async fn no_route() -> Failed {
    Failed(plain("route", "there is no such route", Some("GET /openapi.json lists them")))
}

/// The route does not know the method.
pub(super) async fn no_method() -> Failed {
    Failed(plain("method", "the route does not know this method", Some("GET /openapi.json lists them")))
}
