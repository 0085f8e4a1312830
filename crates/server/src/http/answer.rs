//! Bodies and answers: JSON that is read within bounds, and problems that know their status.

use std::time::Duration;

use agentkernel_sandbox::{Problem, plain};
use axum::Json;
use axum::body::Body as HttpBody;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::model::Envelope;
use crate::problem::status;

/// Largest body of a request, bytes, but for those that carry files.
pub(super) const BODY: usize = 2 << 20;
/// Largest body that carries files, bytes: what is allowed of them, in base64, and JSON around it.
pub(super) const FILES_BODY: usize = 32 << 20;
/// Longest message about a body, characters: it lists the fields that there are.
const WORDS: usize = 1000;
/// How long a body may take to arrive.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same for one that carries files.
const FILES_PATIENCE: Duration = Duration::from_secs(120);

/// A request that failed. Its words are written where it is known what must not be in them: see [`super::guard`].
#[derive(Clone, Debug)]
pub(super) struct Failed(pub Problem);

impl From<Problem> for Failed {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let mut response = status(&self.0).into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// What a handler answers with.
pub(super) type Answer<T> = Result<Json<Envelope<T>>, Failed>;

/// An answer with data.
pub(super) fn ok<T>(data: T) -> Answer<T> {
    Ok(Json(Envelope { success: true, data }))
}

/// An answer about something that was made.
pub(super) type Made<T> = Result<(StatusCode, Json<Envelope<T>>), Failed>;

/// An answer about something that was made.
pub(super) fn made<T: Serialize>(data: T) -> Made<T> {
    Ok((StatusCode::CREATED, Json(Envelope { success: true, data })))
}

/// A JSON body of at most [`BODY`] bytes.
pub(super) struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Sync> FromRequest<S> for Body<T> {
    type Rejection = Failed;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failed> {
        read(request, BODY, PATIENCE).await.and_then(|bytes| parse(&bytes)).map(Self)
    }
}

/// A JSON body that may be left out.
pub(super) struct Optional<T>(pub T);

impl<T: DeserializeOwned + Default, S: Sync> FromRequest<S> for Optional<T> {
    type Rejection = Failed;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failed> {
        let empty = hyper::body::Body::size_hint(request.body()).exact() == Some(0);
        if empty {
            return Ok(Self(T::default()));
        }
        let bytes = read(request, BODY, PATIENCE).await?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        parse::<Option<T>>(&bytes).map(|given| Self(given.unwrap_or_default()))
    }
}

/// A JSON body of at most [`FILES_BODY`] bytes.
pub(super) struct Files<T>(pub T);

impl<T: DeserializeOwned, S: Sync> FromRequest<S> for Files<T> {
    type Rejection = Failed;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failed> {
        read(request, FILES_BODY, FILES_PATIENCE).await.and_then(|bytes| parse(&bytes)).map(Self)
    }
}

/// Reads a body that says that it is JSON.
pub(super) async fn read(request: Request, limit: usize, patience: Duration) -> Result<Vec<u8>, Failed> {
    let (parts, body) = request.into_parts();
    if !is_json(&parts.headers) {
        let hint = Some("send content-type: application/json");
        return Err(plain("media-type", "the body is not said to be JSON", hint).into());
    }
    collect(body, limit, patience).await
}

/// Reads a body whatever it is; one that is said to be too large is refused before it comes.
pub(super) async fn collect(body: HttpBody, limit: usize, patience: Duration) -> Result<Vec<u8>, Failed> {
    if hyper::body::Body::size_hint(&body).lower() > limit as u64 {
        return Err(too_large(limit));
    }
    let collected = Limited::new(body, limit).collect();
    match tokio::time::timeout(patience, collected).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes().to_vec()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large(limit)),
        Ok(Err(_)) => Err(plain("request", "the body broke off", None).into()),
        Err(_) => {
            let message = format!("the body did not arrive within {} s", patience.as_secs());
            Err(plain("slow", message, None).into())
        }
    }
}

/// Reads a body, within bounds, before it is passed on to who knows none of time.
pub(super) async fn whole(request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    match collect(body, FILES_BODY, FILES_PATIENCE).await {
        Ok(bytes) => next.run(Request::from_parts(parts, HttpBody::from(bytes))).await,
        Err(failed) => failed.into_response(),
    }
}

fn too_large(limit: usize) -> Failed {
    plain("body-too-large", format!("the body is larger than {} MiB", limit >> 20), None).into()
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()) else {
        return false;
    };
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failed> {
    // Its words are the client's own, escaped by whoever wrote the message.
    serde_json::from_slice(bytes).map_err(|error| plain("json", words(&error.to_string()), None).into())
}

/// Words that quote a client's, short and without what a terminal would act upon.
pub(super) fn words(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(WORDS).collect()
}

/// Parameters of a path, decoded once.
pub(super) struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failed> {
        match axum::extract::Path::<T>::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(value)) => Ok(Self(value)),
            Err(error) => Err(plain("path", words(&error.body_text()), None).into()),
        }
    }
}

/// Parameters of a query.
pub(super) struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failed> {
        match axum::extract::Query::<T>::from_request_parts(parts, state).await {
            Ok(axum::extract::Query(value)) => Ok(Self(value)),
            Err(error) => Err(plain("query", words(&error.body_text()), None).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(result: Result<Vec<u8>, Failed>) -> String {
        result.map_or_else(|failed| failed.0.code, |bytes| format!("{} bytes", bytes.len()))
    }

    #[tokio::test]
    async fn bodies_are_bounded_in_size_and_time() {
        let second = Duration::from_secs(1);
        assert_eq!(code(collect(HttpBody::from("four"), 4, second).await), "4 bytes");
        assert_eq!(code(collect(HttpBody::from("five!"), 4, second).await), "body-too-large");
        let piece = || Ok::<_, std::io::Error>("xxx");
        let pieces = HttpBody::from_stream(futures::stream::iter([piece(), piece()]));
        assert_eq!(code(collect(pieces, 4, second).await), "body-too-large");
        let broken =
            HttpBody::from_stream(futures::stream::iter([piece(), Err(std::io::Error::other("gone"))]));
        assert_eq!(code(collect(broken, 4, second).await), "request");
        let silent = HttpBody::from_stream(futures::stream::pending::<Result<&str, std::io::Error>>());
        assert_eq!(code(collect(silent, 4, Duration::from_millis(20)).await), "slow");
    }
}
