//! The HTTP API.
//!
//! ```text
//! connection ─► listen ─► guard: request id, who is it, how long did it take, what went wrong ─► route ─► Engine
//!                              └► idempotency, for what creates
//! ```
//! One file a group of routes; each says in its attribute what it takes and gives, and `/openapi.json` is made of that.

mod access;
mod answer;
mod guard;
mod idempotency;
mod listen;
mod metrics;
mod openapi;
mod routes;
mod terminal;

use std::ops::Deref;
use std::sync::Arc;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower::Layer;

pub use self::access::Keys;
#[cfg(fuzzing)]
pub(crate) use self::access::{Way, check};
pub use self::listen::{Listening, Place, listen};
use self::metrics::Metrics;
use crate::engine::Engine;
use crate::mcp;

/// Bodies of all requests that are not answered yet, KiB.
const BODIES_KIB: usize = 256 << 10;
/// Terminals at once.
const TERMINALS: usize = 512;

/// What all requests share.
#[derive(Clone, Debug)]
pub(crate) struct App {
    shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    engine: Engine,
    keys: Keys,
    metrics: Metrics,
    answers: idempotency::Answers,
    refused: guard::Refusals,
    /// KiB of bodies that may still be taken.
    bodies: Semaphore,
    /// Terminals that may still be opened.
    terminals: Arc<Semaphore>,
    /// The API's description, JSON.
    openapi: String,
    /// Streams without an end of their own end with this.
    ending: CancellationToken,
}

impl Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

/// The router of all routes, and what ends its streams.
fn router(engine: Engine, keys: Keys) -> (Router, CancellationToken) {
    let (creating, creating_document) = routes::creating().split_for_parts();
    let (other, document) = routes::other().split_for_parts();
    let ending = CancellationToken::new();
    let shared = Shared {
        engine: engine.clone(),
        keys,
        metrics: Metrics::new(),
        answers: idempotency::Answers::default(),
        refused: guard::Refusals::default(),
        bodies: Semaphore::new(BODIES_KIB),
        terminals: Arc::new(Semaphore::new(TERMINALS)),
        openapi: openapi::complete(document, creating_document),
        ending: ending.clone(),
    };
    let app = App { shared: Arc::new(shared) };
    let creating = creating.route_layer(from_fn_with_state(app.clone(), idempotency::once));
    let tools = from_fn(mcp::attend).layer(mcp::service(engine.clone(), ending.clone()));
    let tools = from_fn(answer::whole).layer(tools);
    let router = Router::new()
        .merge(creating)
        .merge(other)
        .nest_service("/mcp", tools)
        .fallback(guard::no_route)
        .method_not_allowed_fallback(guard::no_method)
        .layer(from_fn_with_state(app.clone(), guard::guard))
        .with_state(app);
    (router, ending)
}

/// The API's description, JSON.
#[cfg(test)]
pub(crate) fn description() -> String {
    let [creating, document] = [routes::creating(), routes::other()].map(|router| router.split_for_parts().1);
    openapi::complete(document, creating)
}
