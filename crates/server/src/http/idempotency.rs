//! `Idempotency-Key`: a creating request that is sent again, because its answer was lost, is answered again instead of done
//! again.
//!
//! What a request with a key began goes on when its client is gone, so that whoever asks again finds it done. Answers are
//! kept in memory for a day, as far as there is room.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agentkernel_sandbox::plain;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use tokio::sync::OnceCell;

use super::App;
use super::answer::{BODY, Failed, collect};

/// Name of the header.
pub(super) const HEADER: &str = "idempotency-key";
/// Longest key, bytes.
const KEY: usize = 255;
/// Answers that are kept.
const KEPT: usize = 1024;
/// Bytes of all of them that are kept.
const BYTES: usize = 64 << 20;
/// Largest answer: that of a command, see `engine::run`, with what JSON makes of it.
const ANSWER: usize = 160 << 20;
/// How long they are kept.
const AGE: Duration = Duration::from_secs(24 * 3600);
/// How long a request's body may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// The answers.
#[derive(Debug, Default)]
pub(super) struct Answers {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    answers: HashMap<[u8; 32], Arc<Promise>>,
    /// In the order in which they were begun.
    order: VecDeque<[u8; 32]>,
    bytes: usize,
}

#[derive(Debug)]
struct Promise {
    request: [u8; 32],
    since: Instant,
    answer: OnceCell<Kind>,
}

#[derive(Clone, Debug)]
enum Kind {
    Failed(Failed),
    Answer { status: StatusCode, headers: HeaderMap, body: axum::body::Bytes },
}

impl Answers {
    /// The promise for a key, which may be another request's of before.
    fn promise(&self, key: [u8; 32], request: [u8; 32]) -> Arc<Promise> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.forget();
        if let Some(promise) = kept.answers.get(&key) {
            return promise.clone();
        }
        let promise = Arc::new(Promise { request, since: Instant::now(), answer: OnceCell::new() });
        kept.answers.insert(key, promise.clone());
        kept.order.push_back(key);
        promise
    }

    /// Forgets a promise, if it is still the one of its key.
    fn forget_one(&self, key: [u8; 32], promise: &Arc<Promise>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.answers.get(&key).is_some_and(|known| Arc::ptr_eq(known, promise)) {
            kept.answers.remove(&key);
            kept.order.retain(|other| *other != key);
        }
    }

    fn count(&self, bytes: usize) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.bytes += bytes;
        kept.forget();
    }
}

impl Kept {
    /// Makes room: the oldest go.
    fn forget(&mut self) {
        while let Some(key) = self.order.front().copied() {
            let old = self.answers.get(&key).is_none_or(|promise| promise.since.elapsed() > AGE);
            if !old && self.order.len() < KEPT && self.bytes <= BYTES {
                return;
            }
            self.order.pop_front();
            if let Some(Kind::Answer { body, .. }) =
                self.answers.remove(&key).and_then(|promise| promise.answer.get().cloned())
            {
                self.bytes = self.bytes.saturating_sub(body.len());
            }
        }
        self.bytes = 0;
    }
}

/// Answers a creating request once.
pub(super) async fn once(State(app): State<App>, request: Request, next: Next) -> Response {
    let Some(key) = request.headers().get(HEADER) else { return next.run(request).await };
    if key.is_empty() || key.len() > KEY {
        let message = format!("the idempotency key has 1 to {KEY} characters");
        return Failed(plain("usage", message, None)).into_response();
    }
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let name = [request.method().as_str().as_bytes(), path.as_bytes(), key.as_bytes()].join(&0);
    let name: [u8; 32] = Sha256::digest(name).into();
    let (parts, body) = request.into_parts();
    let body = match collect(body, BODY, PATIENCE).await {
        Ok(body) => body,
        Err(failed) => return failed.into_response(),
    };
    let hash: [u8; 32] = Sha256::digest(&body).into();
    let promise = app.answers.promise(name, hash);
    if promise.request != hash {
        let message = "this idempotency key was sent with another request before";
        return Failed(plain("idempotency-key-reused", message, Some("take a new key"))).into_response();
    }
    let request = Request::from_parts(parts, Body::from(body));
    // A task of its own: the client may go, what was begun goes on.
    let task = tokio::spawn(async move {
        // Who waits for another's to be done has not done it either.
        let mut did = false;
        let answer = promise.answer.get_or_init(|| {
            did = true;
            async { kept(next.run(request).await).await }
        });
        let kind = answer.await.clone();
        match &kind {
            // What failed may be tried again.
            Kind::Failed(_) => app.answers.forget_one(name, &promise),
            Kind::Answer { status, .. } if !status.is_success() => app.answers.forget_one(name, &promise),
            Kind::Answer { body, .. } if did => app.answers.count(body.len()),
            Kind::Answer { .. } => {}
        }
        (kind, did)
    });
    match task.await {
        Ok((Kind::Failed(failed), _)) => failed.into_response(),
        Ok((Kind::Answer { status, headers, body }, did)) => {
            let mut response = (status, headers, body).into_response();
            if !did {
                response.headers_mut().insert("idempotency-replayed", HeaderValue::from_static("true"));
            }
            response
        }
        Err(error) => Failed(plain("internal", error.to_string(), None)).into_response(),
    }
}

/// An answer as it is kept.
async fn kept(mut response: Response) -> Kind {
    if let Some(failed) = response.extensions_mut().remove::<Failed>() {
        return Kind::Failed(failed);
    }
    let status = response.status();
    let mut headers = response.headers().clone();
    headers.remove(header::CONTENT_LENGTH);
    match collect(response.into_body(), ANSWER, AGE).await {
        Ok(body) => Kind::Answer { status, headers, body: body.into() },
        Err(failed) => Kind::Failed(failed),
    }
}
