//! One registry, as long as an image takes.

use std::hash::{BuildHasher as _, Hasher as _};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use reqwest::header::{
    ACCEPT, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{Client, Method, Request, Response, StatusCode, Url, redirect};
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::challenge::{self, Challenge};
use super::credentials::{self, Credentials};
use super::{RegistryError, RegistryOptions};
use crate::http::{self, Reason, place, printable};
use crate::reference::Reference;

/// The longest pause that is made without being asked for.
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);
/// Most redirects of one request.
const REDIRECTS: usize = 5;
/// Largest answer of a token server, and most that is read of a failure, bytes.
const ANSWER_BYTES: u64 = 256 << 10;

/// A registry, and what it lets one do.
pub(super) struct Session<'a> {
    pub(super) reference: &'a Reference,
    pub(super) options: &'a RegistryOptions,
    http: Client,
    /// Follows no redirects: what it sends is secret.
    tokens: Client,
    /// `https://HOST/v2/`.
    base: Url,
    /// What is to be done, as token servers call it: `pull` or `pull,push`.
    actions: &'static str,
    credentials: Option<Credentials>,
    authorization: Mutex<Option<HeaderValue>>,
}

/// Why one try failed.
pub(super) enum Failure {
    /// It would fail again.
    Final(RegistryError),
    /// It is worth another try, after a pause if one is asked for.
    Transient { error: RegistryError, pause: Option<Duration> },
    /// Without, or with another, authorization than this it may go.
    Unauthorized { challenges: Vec<Challenge>, used: Option<HeaderValue>, error: RegistryError },
}

impl From<RegistryError> for Failure {
    fn from(error: RegistryError) -> Self {
        Self::Final(error)
    }
}

impl Failure {
    pub(super) fn transient(error: RegistryError) -> Self {
        Self::Transient { error, pause: None }
    }
}

/// Counts failures, and waits after each.
pub(super) struct Retry<'a> {
    options: &'a RegistryOptions,
    failures: u32,
}

impl<'a> Retry<'a> {
    pub(super) fn new(options: &'a RegistryOptions) -> Self {
        Self { options, failures: 0 }
    }

    /// There was progress: earlier failures do not count.
    pub(super) fn forget(&mut self) {
        self.failures = 0;
    }

    /// Waits until it is time for another try.
    ///
    /// # Errors
    /// The failure, if there is none.
    pub(super) async fn wait(&mut self, failure: Failure) -> Result<(), RegistryError> {
        let (error, pause) = match failure {
            Failure::Final(error) | Failure::Unauthorized { error, .. } => return Err(error),
            Failure::Transient { error, pause } => (error, pause),
        };
        self.failures += 1;
        if self.failures >= self.options.attempts
            || pause.is_some_and(|pause| pause > self.options.longest_pause)
        {
            return Err(error);
        }
        let doubled =
            self.options.backoff.saturating_mul(1 << (self.failures - 1).min(16)).min(LONGEST_BACKOFF);
        // Between half of it and all: many who fail together shall not come back together.
        let jitter = std::hash::RandomState::new().build_hasher().finish() % 512;
        let backoff = doubled.mul_f64(0.5 + jitter as f64 / 1024.0);
        let pause = pause.unwrap_or_default().max(backoff);
        tracing::debug!(%error, ?pause, "will be tried again");
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// The distribution specification's form of failures.
#[derive(Deserialize)]
struct Failures {
    errors: Vec<FailureText>,
}

#[derive(Deserialize)]
struct FailureText {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

impl<'a> Session<'a> {
    /// Finds out how to talk to the registry of `reference`.
    pub(super) async fn open(
        reference: &'a Reference,
        options: &'a RegistryOptions,
        actions: &'static str,
    ) -> Result<Self, RegistryError> {
        let credentials = credentials::find(&reference.registry, options).await?;
        // Docker Hub answers elsewhere than its name says.
        let host = match reference.registry.as_str() {
            "docker.io" => "registry-1.docker.io",
            host => host,
        };
        let base = |scheme: &str| {
            Url::parse(&format!("{scheme}://{host}/v2/"))
                .map_err(|error| RegistryError::Client { reason: format!("{host}: {error}") })
        };
        let mut session = Self {
            reference,
            options,
            http: client(reference, options, redirects())?,
            tokens: client(reference, options, redirect::Policy::none())?,
            base: base("https")?,
            actions,
            credentials,
            authorization: Mutex::new(None),
        };
        // As Docker does it: whoever may go without TLS may have it all the same.
        if is_lenient(reference, options) {
            let probe = session.tokens.get(session.base.clone()).send();
            if !matches!(timeout(options.idle_timeout, probe).await, Ok(Ok(_))) {
                session.base = base("http")?;
            }
        }
        Ok(session)
    }

    /// Where something of the repository is.
    pub(super) fn url(&self, rest: &str) -> Result<Url, RegistryError> {
        let text = format!("{}{}/{rest}", self.base, self.reference.repository);
        Url::parse(&text).map_err(|error| self.answer(format!("{rest}: {error}")))
    }

    /// An address that the registry gave, which may be relative to that of the request.
    pub(super) fn location(&self, response: &Response) -> Result<Url, RegistryError> {
        let location = response.headers().get("location").and_then(|value| value.to_str().ok());
        let location = location.ok_or_else(|| self.answer("it names no location to write to".into()))?;
        let url =
            response.url().join(location).map_err(|_| self.answer("its location is no address".into()))?;
        if self.is_weaker(&url) {
            let reason = format!("it names a location that is not HTTPS ({})", place(&url));
            return Err(RegistryError::Redirect { registry: self.registry(), reason });
        }
        Ok(url)
    }

    pub(super) fn registry(&self) -> String {
        self.reference.registry.clone()
    }

    /// An answer that breaks the protocol.
    pub(super) fn answer(&self, reason: String) -> RegistryError {
        RegistryError::Answer { registry: self.registry(), reason }
    }

    /// A status that nothing was known of.
    pub(super) async fn unexpected(&self, response: Response, action: &'static str) -> RegistryError {
        let status = response.status().as_u16();
        let reason = self.reason(response).await;
        RegistryError::Status { registry: self.registry(), action, status, reason }
    }

    pub(super) fn request(&self, method: Method, url: Url, headers: &[(HeaderName, String)]) -> Request {
        let mut request = Request::new(method, url);
        for (name, value) in headers {
            if let Ok(value) = HeaderValue::from_str(value) {
                request.headers_mut().append(name, value);
            }
        }
        request
    }

    /// Sends a request without a body, authorized anew if need be, and waits for the head of the answer. Any status
    /// but those of failures that are handled here is an answer.
    pub(super) async fn try_send(
        &self,
        method: Method,
        url: &Url,
        headers: &[(HeaderName, String)],
        body: Option<&[u8]>,
    ) -> Result<Response, Failure> {
        let send = async || {
            let mut request = self.request(method.clone(), url.clone(), headers);
            *request.body_mut() = body.map(|body| body.to_vec().into());
            match timeout(self.options.idle_timeout, self.execute(request)).await {
                Ok(answer) => answer,
                Err(_) => Err(self.stalled(url)),
            }
        };
        match send().await {
            Err(Failure::Unauthorized { challenges, used, error }) => {
                self.authorize(&challenges, used, error).await?;
                send().await
            }
            answer => answer,
        }
    }

    /// As [`Session::try_send`], until it succeeds or is given up.
    pub(super) async fn send(
        &self,
        method: Method,
        url: &Url,
        headers: &[(HeaderName, String)],
        body: Option<&[u8]>,
    ) -> Result<Response, RegistryError> {
        let mut retry = Retry::new(self.options);
        loop {
            match self.try_send(method.clone(), url, headers, body).await {
                Ok(response) => return Ok(response),
                Err(failure) => retry.wait(failure).await?,
            }
        }
    }

    /// A small body, whole, and its media type. `None` if it is not there.
    pub(super) async fn document(
        &self,
        url: &Url,
        accept: &[&str],
        limit: u64,
    ) -> Result<Option<(String, Vec<u8>)>, RegistryError> {
        let headers: Vec<_> = accept.iter().map(|accept| (ACCEPT, (*accept).to_owned())).collect();
        let mut retry = Retry::new(self.options);
        loop {
            match self.try_document(url, &headers, limit).await {
                Ok(found) => return Ok(found),
                Err(failure) => retry.wait(failure).await?,
            }
        }
    }

    async fn try_document(
        &self,
        url: &Url,
        headers: &[(HeaderName, String)],
        limit: u64,
    ) -> Result<Option<(String, Vec<u8>)>, Failure> {
        let mut response = self.try_send(Method::GET, url, headers, None).await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(None),
            _ => return Err(self.unexpected(response, "give a document").await.into()),
        }
        let media_type = header(response.headers(), "content-type").unwrap_or_default();
        let media_type = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let bytes = self.body(&mut response, limit).await?;
        if bytes.len() as u64 > limit {
            return Err(self.answer(format!("a document has more than {limit} bytes")).into());
        }
        Ok(Some((media_type, bytes)))
    }

    /// A body; of one that is longer than `limit`, at least a byte more than that.
    async fn body(&self, response: &mut Response, limit: u64) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        while bytes.len() as u64 <= limit {
            match self.chunk(response).await? {
                Some(chunk) => bytes.extend_from_slice(&chunk),
                None => break,
            }
        }
        Ok(bytes)
    }

    /// The next part of a body.
    pub(super) async fn chunk(
        &self,
        response: &mut Response,
    ) -> Result<Option<impl std::ops::Deref<Target = [u8]> + use<>>, Failure> {
        match timeout(self.options.idle_timeout, response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(self.failure(error, response.url())),
            Err(_) => Err(self.stalled(response.url())),
        }
    }

    pub(super) fn stalled(&self, url: &Url) -> Failure {
        let reason = format!("nothing came for {} seconds", self.options.idle_timeout.as_secs_f32());
        Failure::transient(RegistryError::Broken { host: place(url), reason })
    }

    /// Sends a request once, with what authorization there is.
    pub(super) async fn execute(&self, mut request: Request) -> Result<Response, Failure> {
        let url = request.url().clone();
        let used = self.authorization.lock().await.clone();
        if let Some(value) = used.clone().filter(|_| self.is_own(&url)) {
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        let response = self.http.execute(request).await.map_err(|error| self.failure(error, &url))?;
        match response.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(self.denied(response, used).await),
            status => match is_transient(status) {
                true => Err(self.refused(response).await),
                false => Ok(response),
            },
        }
    }

    async fn denied(&self, response: Response, used: Option<HeaderValue>) -> Failure {
        let may_ask = response.status() == StatusCode::UNAUTHORIZED && self.is_own(response.url());
        let values = response.headers().get_all(WWW_AUTHENTICATE).iter();
        let challenges: Vec<_> =
            values.filter_map(|value| value.to_str().ok()).flat_map(challenge::parse).collect();
        let error = self.denial(self.reason(response).await);
        match may_ask && !challenges.is_empty() {
            true => Failure::Unauthorized { challenges, used, error },
            false => Failure::Final(error),
        }
    }

    fn denial(&self, reason: String) -> RegistryError {
        let is_signed_in = self.credentials.is_some();
        let repository = self.reference.familiar_repository();
        RegistryError::Denied { registry: self.registry(), repository, is_signed_in, reason }
    }

    /// A failure that passes.
    async fn refused(&self, response: Response) -> Failure {
        let status = response.status();
        let pause =
            header(response.headers(), RETRY_AFTER.as_str()).and_then(|value| value.trim().parse().ok());
        let pause = pause.map(Duration::from_secs);
        let reason = self.reason(response).await;
        let registry = self.registry();
        let error = match status {
            StatusCode::TOO_MANY_REQUESTS => RegistryError::RateLimited { registry, pause, reason },
            _ => {
                RegistryError::Status { registry, action: "serve the image", status: status.as_u16(), reason }
            }
        };
        Failure::Transient { error, pause }
    }

    /// Gets what the challenges ask for, unless another request did already.
    pub(super) async fn authorize(
        &self,
        challenges: &[Challenge],
        used: Option<HeaderValue>,
        error: RegistryError,
    ) -> Result<(), Failure> {
        let mut current = self.authorization.lock().await;
        if *current != used {
            return Ok(());
        }
        let of = |scheme: &str| challenges.iter().find(|challenge| challenge.scheme == scheme);
        let value = match (of("bearer"), of("basic"), &self.credentials) {
            (Some(bearer), _, _) => format!("Bearer {}", self.token(bearer).await?),
            // The same credentials would be refused again.
            (None, Some(_), Some(Credentials::Password { user, secret })) if used.is_none() => {
                basic(user, secret)
            }
            _ => return Err(Failure::Final(error)),
        };
        let mut value = HeaderValue::from_str(&value)
            .map_err(|_| self.answer("its token has characters that no header can have".into()))?;
        value.set_sensitive(true);
        *current = Some(value);
        Ok(())
    }

    /// A token from the server that a challenge names.
    async fn token(&self, challenge: &Challenge) -> Result<String, Failure> {
        let realm = challenge.parameter("realm").and_then(|realm| Url::parse(realm).ok());
        let realm = realm.filter(|realm| matches!(realm.scheme(), "http" | "https"));
        let mut url = realm.ok_or_else(|| self.answer("it names no token server".into()))?;
        if self.is_weaker(&url) {
            let reason = format!("its token server is not HTTPS ({})", place(&url));
            return Err(RegistryError::Redirect { registry: self.registry(), reason }.into());
        }
        // What is needed is known better here than there.
        let scope = format!("repository:{}:{}", self.reference.repository, self.actions);
        let mut fields = vec![("scope", scope.as_str())];
        fields.extend(challenge.parameter("service").map(|service| ("service", service)));
        let mut request = match &self.credentials {
            Some(Credentials::Identity { token }) => {
                fields.extend([
                    ("grant_type", "refresh_token"),
                    ("client_id", "agentkernel"),
                    ("refresh_token", token),
                ]);
                let mut form = url.clone();
                form.set_query(None);
                form.query_pairs_mut().extend_pairs(fields);
                let mut request = Request::new(Method::POST, url.clone());
                let kind = HeaderValue::from_static("application/x-www-form-urlencoded");
                request.headers_mut().insert("content-type", kind);
                *request.body_mut() = form.query().map(|form| form.to_owned().into());
                request
            }
            _ => {
                url.query_pairs_mut().extend_pairs(fields);
                Request::new(Method::GET, url.clone())
            }
        };
        if let Some(Credentials::Password { user, secret }) = &self.credentials
            && let Ok(mut value) = HeaderValue::from_str(&basic(user, secret))
        {
            value.set_sensitive(true);
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        let answer = timeout(self.options.idle_timeout, self.tokens.execute(request)).await;
        let mut response =
            answer.map_err(|_| self.stalled(&url))?.map_err(|error| self.failure(error, &url))?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::BAD_REQUEST
            | StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::NOT_FOUND => {
                return Err(self.denial(self.reason(response).await).into());
            }
            status if is_transient(status) => return Err(self.refused(response).await),
            _ => return Err(self.unexpected(response, "give a token").await.into()),
        }
        let body = self.body(&mut response, ANSWER_BYTES).await?;
        let token: Option<Token> = serde_json::from_slice(&body).ok();
        let token =
            token.and_then(|token| token.token.or(token.access_token)).filter(|token| !token.is_empty());
        Ok(token.ok_or_else(|| self.answer("its token server gave no token".into()))?)
    }

    /// What a failure says about itself, fit to be shown.
    async fn reason(&self, mut response: Response) -> String {
        let body = self.body(&mut response, ANSWER_BYTES).await.unwrap_or_default();
        let failures: Option<Failures> = serde_json::from_slice(&body).ok();
        let Some(first) = failures.and_then(|failures| failures.errors.into_iter().next()) else {
            return String::new();
        };
        printable(if first.message.is_empty() { &first.code } else { &first.message })
    }

    /// Whether an address is the registry's own, where credentials may go.
    fn is_own(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }

    /// Whether an address would give up encryption that there was.
    fn is_weaker(&self, url: &Url) -> bool {
        self.base.scheme() == "https" && url.scheme() != "https"
    }

    /// Tells failures of the connection apart.
    pub(super) fn failure(&self, error: reqwest::Error, url: &Url) -> Failure {
        let host = place(error.url().unwrap_or(url));
        let error = error.without_url();
        let reason = Reason::of(&error);
        let (is_tls, is_plain, reason) = (reason.is_tls, reason.is_plain, reason.text);
        if is_plain && place(&self.base) == host {
            Failure::Final(RegistryError::PlainHttp { registry: self.registry() })
        } else if is_tls {
            Failure::Final(RegistryError::Tls { host, reason })
        } else if error.is_redirect() {
            Failure::Final(RegistryError::Redirect { registry: self.registry(), reason })
        } else if error.is_builder() {
            Failure::Final(RegistryError::Client { reason })
        } else if error.is_connect() {
            Failure::transient(RegistryError::Connect { host, reason })
        } else {
            Failure::transient(RegistryError::Broken { host, reason })
        }
    }
}

/// Whether a registry may go without TLS.
fn is_lenient(reference: &Reference, options: &RegistryOptions) -> bool {
    options.insecure || reference.is_loopback()
}

fn client(
    reference: &Reference,
    options: &RegistryOptions,
    redirects: redirect::Policy,
) -> Result<Client, RegistryError> {
    let mut builder = http::client(options.connect_timeout)
        .redirect(redirects)
        .tls_danger_accept_invalid_certs(is_lenient(reference, options));
    if reference.is_loopback() {
        builder = builder.no_proxy();
    }
    builder.build().map_err(|error| RegistryError::Client { reason: error.to_string() })
}

/// Follows redirects that stay encrypted. That credentials stay behind is the client's own rule.
fn redirects() -> redirect::Policy {
    redirect::Policy::custom(|attempt| {
        let was_https = attempt.previous().iter().any(|url| url.scheme() == "https");
        if was_https && attempt.url().scheme() != "https" {
            let host = place(attempt.url());
            return attempt.error(format!("{host} is not HTTPS"));
        }
        match attempt.previous().len() > REDIRECTS {
            true => attempt.error("there are too many redirects"),
            false => attempt.follow(),
        }
    })
}

fn is_transient(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

fn basic(user: &str, secret: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{secret}")))
}

pub(super) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}
