//! Registries: what comes from one is verified, what breaks is tried again, and credentials go where they belong.
//!
//! One file though it is long: every test stands on the registry that its first part makes.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use agentkernel_image::registry::{RegistryError, RegistryOptions, Transfer, pull, push};
use agentkernel_image::{Digest, Reference, Store, StoredImage};
use common::{Fixture, INDEX, LAYER, MANIFEST, file, gzip, tar, zstd};

/// What a client asked.
#[derive(Clone, Debug, Default)]
struct Request {
    method: String,
    /// With its query.
    path: String,
    /// Names in lower case.
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// What it is told.
#[derive(Clone, Default)]
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Bytes of the body after which the connection breaks.
    cut: Option<usize>,
}

fn answer(status: u16) -> Answer {
    Answer { status, ..Answer::default() }
}

impl Answer {
    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn body(self, body: impl Into<Vec<u8>>) -> Self {
        Self { body: body.into(), ..self }
    }
}

/// A small HTTP server; `handle` runs in a thread for each connection.
struct Server {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    is_over: Arc<AtomicBool>,
}

impl Server {
    fn start(handle: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::start_with(handle, None)
    }

    /// With TLS, and a certificate that nobody trusts.
    fn start_tls(handle: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let names = ["localhost".into(), "127.0.0.1".into(), "0.0.0.0".into()];
        let rcgen::CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(names).unwrap();
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(signing_key.serialize_der());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key.into())
            .unwrap();
        Self::start_with(handle, Some(Arc::new(config)))
    }

    fn start_with(
        handle: impl Fn(&Request) -> Answer + Send + Sync + 'static,
        tls: Option<Arc<rustls::ServerConfig>>,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = Self { address, requests: Arc::default(), is_over: Arc::default() };
        let (requests, is_over) = (server.requests.clone(), server.is_over.clone());
        let handle = Arc::new(handle);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if is_over.load(Ordering::SeqCst) {
                    return;
                }
                let (requests, handle, tls) = (requests.clone(), handle.clone(), tls.clone());
                let stream = stream.unwrap();
                std::thread::spawn(move || {
                    let mut stream: Box<dyn Stream> = match tls {
                        Some(tls) => {
                            let connection = rustls::ServerConnection::new(tls).unwrap();
                            Box::new(rustls::StreamOwned::new(connection, stream))
                        }
                        None => Box::new(stream),
                    };
                    if let Some(request) = receive(&mut stream) {
                        requests.lock().unwrap().push(request.clone());
                        reply(&mut stream, &request, &handle(&request));
                    }
                });
            }
        });
        server
    }

    fn reference(&self, rest: &str) -> Reference {
        format!("{}/{rest}", self.address).parse().unwrap()
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// The requests whose path has `part` in it.
    fn seen(&self, part: &str) -> Vec<Request> {
        self.requests.lock().unwrap().iter().filter(|request| request.path.contains(part)).cloned().collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

trait Stream: Read + Write {}

impl<T: Read + Write> Stream for T {}

/// `None` if it is not HTTP, as when a client tries TLS first.
fn receive(stream: &mut impl Stream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    if reader.fill_buf().ok()?.first()? == &0x16 {
        return None;
    }
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let length = headers.get("content-length").map_or(0, |length: &String| length.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Request { method, path, headers, body })
}

fn reply(stream: &mut impl Stream, request: &Request, answer: &Answer) {
    let mut text = format!("HTTP/1.1 {} x\r\nConnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        text += &format!("{name}: {value}\r\n");
    }
    text += &format!("Content-Length: {}\r\n\r\n", answer.body.len());
    let body = if request.method == "HEAD" { &[] } else { &answer.body[..] };
    // A client that has what it wants may be gone.
    let _ = stream.write_all(text.as_bytes());
    let _ = stream.write_all(&body[..answer.cut.unwrap_or(body.len())]);
    let _ = stream.flush();
}

/// A registry's content: blobs and manifests of a fixture, by tag and digest.
#[derive(Clone)]
struct Content {
    blobs: BTreeMap<String, Vec<u8>>,
    tags: BTreeMap<String, (String, Vec<u8>)>,
}

impl Content {
    /// Of everything in a fixture, with the document `open` describes as tag `1`.
    fn new(fixture: &Fixture, open: &str) -> Self {
        let mut blobs = BTreeMap::new();
        for entry in fs::read_dir(fixture.layout().join("blobs/sha256")).unwrap() {
            let entry = entry.unwrap();
            let digest = format!("sha256:{}", entry.file_name().into_string().unwrap());
            blobs.insert(digest, fs::read(entry.path()).unwrap());
        }
        let media_type = between(open, r#""mediaType":""#);
        let bytes = blobs[&digest(open).to_string()].clone();
        Self { blobs, tags: BTreeMap::from([("1".into(), (media_type, bytes))]) }
    }

    fn serve(&self, request: &Request) -> Answer {
        let path = request.path.as_str();
        let Some((_, name)) = path.rsplit_once('/') else { return answer(404) };
        if path == "/v2/" {
            return answer(200);
        }
        if path.contains("/manifests/") {
            let found = self.tags.get(name).cloned().or_else(|| {
                let bytes = self.blobs.get(name)?.clone();
                let kind =
                    if bytes.windows(11).any(|part| part == b"\"manifests\"") { INDEX } else { MANIFEST };
                Some((kind.to_owned(), bytes))
            });
            return match found {
                Some((media_type, bytes)) => answer(200).with("Content-Type", media_type).body(bytes),
                None => answer(404)
                    .body(r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#),
            };
        }
        match self.blobs.get(name) {
            Some(blob) => match request.header("range").map(|range| between(range, "bytes=")) {
                Some(start) => {
                    let start: usize = start.parse().unwrap();
                    let range = format!("bytes {start}-{}/{}", blob.len() - 1, blob.len());
                    answer(206).with("Content-Range", range).body(&blob[start..])
                }
                None => answer(200).body(blob.clone()),
            },
            None => answer(404),
        }
    }
}

/// What stands after `before`, up to a quote or a dash.
fn between(text: &str, before: &str) -> String {
    let rest = text.split_once(before).unwrap().1;
    let end = if before.ends_with('"') { '"' } else { '-' };
    rest.split(end).next().unwrap().to_owned()
}

fn digest(open_descriptor: &str) -> Digest {
    between(open_descriptor, r#""digest":""#).parse().unwrap()
}

/// Bytes that no compression makes small.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let step = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..length).map(step).collect()
}

fn plain(tar: &[u8]) -> (String, Vec<u8>) {
    (LAYER.into(), tar.to_vec())
}

/// An image of `count` layers of 3 MiB, as one manifest; its open descriptor.
fn image(fixture: &Fixture, count: u64) -> String {
    let layers: Vec<_> = (0..count).map(|seed| tar(&[file("noise", &noise(3 << 20, seed * 2))])).collect();
    fixture.manifest(&layers, plain)
}

/// An index of `open` for amd64, after one for arm64; its open descriptor.
fn index(fixture: &Fixture, open: &str) -> String {
    let arm = fixture.manifest_for("arm64", &[tar(&[file("arm", b"arm")])], plain);
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[
            {arm},"platform":{{"architecture":"arm64","os":"linux"}}}},
            {open},"platform":{{"architecture":"amd64","os":"linux"}}}},
            {arm},"platform":{{"architecture":"unknown","os":"unknown"}}}}]}}"#
    );
    fixture.blob(INDEX, index.as_bytes())
}

fn layers(content: &Content) -> Vec<String> {
    let manifest = &content.tags["1"].1;
    let manifest: serde_json::Value = serde_json::from_slice(manifest).unwrap();
    let digests =
        manifest["layers"].as_array().unwrap().iter().map(|layer| layer["digest"].as_str().unwrap().into());
    digests.collect()
}

fn options() -> RegistryOptions {
    RegistryOptions {
        attempts: 4,
        backoff: Duration::from_millis(1),
        connect_timeout: Duration::from_secs(5),
        idle_timeout: Duration::from_secs(10),
        ..RegistryOptions::default()
    }
}

struct Local {
    directory: tempfile::TempDir,
    store: Store,
}

impl Local {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("images")).unwrap();
        Self { directory, store }
    }

    async fn pull(&self, reference: &Reference) -> Result<StoredImage, RegistryError> {
        pull(&self.store, reference, &options(), &|_| {}).await
    }

    /// Options with credentials for `registry`.
    fn signed_in(&self, registry: &SocketAddr) -> RegistryOptions {
        let path = self.directory.path().join("config.json");
        // me:secret
        fs::write(&path, format!(r#"{{"auths":{{"{registry}":{{"auth":"bWU6c2VjcmV0"}}}}}}"#)).unwrap();
        RegistryOptions { docker_config: Some(path), ..options() }
    }

    /// Nothing has a name, and nothing is half there.
    fn assert_clean(&self) {
        assert!(self.store.list().unwrap().is_empty());
        self.store.verify().unwrap();
        assert_eq!(fs::read_dir(self.store.path().join("ingest")).unwrap().count(), 0);
    }
}

/// Wraps `serve` in token authentication; the realm is `/token` of the same server.
fn guarded(serve: impl Fn(&Request) -> Answer, scope: &'static str) -> impl Fn(&Request) -> Answer {
    move |request| {
        let host = request.header("host").unwrap();
        if let Some(query) = request.path.strip_prefix("/token?") {
            assert_eq!(query, format!("scope=repository%3Ame%2Fapp%3A{scope}&service=the+registry"));
            return match request.header("authorization") {
                Some("Basic bWU6c2VjcmV0") => answer(200).body(r#"{"token":"good","expires_in":300}"#),
                _ => answer(401).body(r#"{"errors":[{"code":"X","message":"who are\n\u001b[1m you?"}]}"#),
            };
        }
        if request.header("authorization") != Some("Bearer good") {
            let challenge = format!(
                r#"Bearer realm="http://{host}/token",service="the registry",scope="repository:x:pull""#
            );
            return answer(401).with("WWW-Authenticate", challenge);
        }
        serve(request)
    }
}

#[tokio::test]
async fn an_image_comes_through_index_and_token_and_only_once() {
    let fixture = Fixture::new();
    type Pack = fn(&[u8]) -> (String, Vec<u8>);
    let packs: [Pack; 3] =
        [plain, |tar| (format!("{LAYER}+gzip"), gzip(tar)), |tar| (format!("{LAYER}+zstd"), zstd(tar))];
    for pack in packs {
        // The last layer is the first again.
        let layers: Vec<_> = [1, 3, 5, 1].map(|seed| tar(&[file("noise", &noise(100_000, seed))])).into();
        let open = fixture.manifest(&layers, pack);
        let content = Content::new(&fixture, &index(&fixture, &open));
        let server = Server::start(guarded(move |request| content.serve(request), "pull"));
        let (local, reference) = (Local::new(), server.reference("me/app:1"));
        let options = local.signed_in(&server.address);
        let steps: Mutex<Vec<Transfer>> = Mutex::default();
        let note = |step| steps.lock().unwrap().push(step);
        let pulled = pull(&local.store, &reference, &options, &note).await.unwrap();
        assert_eq!((pulled.digest, pulled.name), (digest(&open), reference.to_string()));
        assert_eq!(pulled.layers.len(), 4);
        local.store.verify().unwrap();
        assert_eq!(local.store.find(&reference.to_string()).unwrap().digest, digest(&open));
        assert_eq!(server.seen("/blobs/").len(), 4, "three layers and the configuration");
        assert_eq!(server.seen("/token").len(), 1);

        let steps = steps.into_inner().unwrap();
        let last = steps.last().unwrap();
        assert_eq!((last.sum_bytes, last.sum_size), (pulled.size_bytes, pulled.size_bytes));
        for layer in 1..=4 {
            let last = steps.iter().rfind(|step| step.layer == layer).unwrap();
            assert_eq!((last.bytes, last.layers, last.is_present), (last.size, 4, layer == 4));
            assert_eq!(last.digest, pulled.layers[layer - 1].digest);
        }

        let again = pull(&local.store, &reference, &options, &|step| assert!(step.is_present)).await.unwrap();
        assert_eq!(again.digest, pulled.digest);
        assert_eq!(server.seen("/blobs/").len(), 4);
        assert_eq!(server.seen("/manifests/").len(), 5, "two challenges, the index twice, the manifest once");
    }
}

#[tokio::test]
async fn who_may_not_is_told() {
    let server = Server::start(guarded(|_| answer(200), "pull"));
    let local = Local::new();
    let error = local.pull(&server.reference("me/app:1")).await.unwrap_err();
    let expected = format!("the registry {0} refuses access to {0}/me/app: who are [1m you?", server.address);
    assert_eq!(error.to_string(), expected);
    assert!(error.hint().unwrap().contains("docker login"));
    assert_eq!(server.seen("/token").len(), 1, "it is not tried again");

    let basic = Server::start(|request| match request.header("authorization") {
        Some("Basic bWU6c2VjcmV0") => answer(403),
        _ => answer(401).with("WWW-Authenticate", "Basic realm=\"x\""),
    });
    let options = local.signed_in(&basic.address);
    let error = pull(&local.store, &basic.reference("me/app:1"), &options, &|_| {}).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Denied { is_signed_in: true, .. }), "{error}");
    assert_eq!(basic.seen("/manifests/").len(), 2);
    local.assert_clean();
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let fixture = Fixture::new();
    let content = Content::new(&fixture, &image(&fixture, 1));
    let server = Server::start(move |request| {
        if request.path == "/token?a=b" {
            let form = String::from_utf8_lossy(&request.body);
            assert!(
                form.contains("grant_type=refresh_token") && form.contains("&refresh_token=it%26"),
                "{form}"
            );
            return answer(200).body(r#"{"access_token":"good"}"#);
        }
        match request.header("authorization") {
            Some("Bearer good") => content.serve(request),
            _ => {
                let realm = format!("http://{}/token?a=b", request.header("host").unwrap());
                answer(401).with("WWW-Authenticate", format!(r#"Bearer realm="{realm}""#))
            }
        }
    });
    let local = Local::new();
    let path = local.directory.path().join("config.json");
    fs::write(&path, format!(r#"{{"auths":{{"{}":{{"identitytoken":"it&"}}}}}}"#, server.address)).unwrap();
    let options = RegistryOptions { docker_config: Some(path), ..options() };
    pull(&local.store, &server.reference("me/app:1"), &options, &|_| {}).await.unwrap();
}

#[tokio::test]
async fn credentials_stay_behind_at_redirects() {
    let fixture = Fixture::new();
    let content = Content::new(&fixture, &image(&fixture, 2));
    let elsewhere = content.clone();
    let storage = Server::start(move |request| elsewhere.serve(request));
    let target = storage.url("");
    let serve = move |request: &Request| match request.path.contains("/blobs/") {
        true => answer(307).with("Location", format!("{target}{}", request.path)),
        false => content.serve(request),
    };
    let server = Server::start(guarded(serve, "pull"));
    let local = Local::new();
    let options = local.signed_in(&server.address);
    pull(&local.store, &server.reference("me/app:1"), &options, &|_| {}).await.unwrap();
    let fetched = storage.seen("/blobs/");
    assert_eq!(fetched.len(), 3);
    assert!(fetched.iter().all(|request| request.header("authorization").is_none()));
    assert!(server.seen("/blobs/").iter().all(|request| request.header("authorization").is_some()));

    let round = Server::start(|request| answer(302).with("Location", request.path.clone()));
    let error = local.pull(&round.reference("me/app:1")).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Redirect { .. }), "{error}");
}

#[tokio::test]
async fn what_passes_is_tried_again_and_what_stays_is_not() {
    let fixture = Fixture::new();
    let content = Content::new(&fixture, &image(&fixture, 1));
    let seen: Mutex<BTreeMap<String, usize>> = Mutex::default();
    let server = Server::start(move |request| {
        let mut seen = seen.lock().unwrap();
        let count = seen.entry(request.path.clone()).or_default();
        *count += 1;
        match count {
            1 => answer(503).with("Retry-After", "0"),
            2 => answer(429),
            // No answer at all.
            3 => Answer { cut: Some(0), ..answer(200).body("x") },
            _ => content.serve(request),
        }
    });
    let local = Local::new();
    local.pull(&server.reference("me/app:1")).await.unwrap();
    assert_eq!(server.seen("/manifests/").len(), 4);

    let local = Local::new();
    let server = Server::start(|_| answer(500).body(r#"{"errors":[{"code":"UNKNOWN"}]}"#));
    let error = local.pull(&server.reference("me/app:1")).await.unwrap_err();
    assert!(
        matches!(&error, RegistryError::Status { status: 500, reason, .. } if reason == "UNKNOWN"),
        "{error}"
    );
    assert_eq!(server.seen("/manifests/").len(), 4);

    let server = Server::start(|_| answer(429).with("Retry-After", "3600"));
    let error = local.pull(&server.reference("me/app:1")).await.unwrap_err();
    assert!(matches!(&error, RegistryError::RateLimited { .. }), "{error}");
    assert_eq!(server.seen("/manifests/").len(), 1);

    let server = Server::start(|_| answer(404));
    let error = local.pull(&server.reference("me/app:1")).await.unwrap_err();
    let expected = format!("Image '{0}/me/app:1' not found in the registry {0}", server.address);
    assert_eq!(error.to_string(), expected);
    assert_eq!(server.seen("/manifests/").len(), 1);

    let reference = server.reference("me/app:1");
    drop(server);
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let reference = Reference { registry: gone.to_string(), ..reference };
    let error = local.pull(&reference).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Connect { .. }), "{error}");
    assert!(error.to_string().contains("onnection refused"), "{error}");
    local.assert_clean();
}

#[tokio::test]
async fn a_broken_layer_goes_on_where_it_broke() {
    let fixture = Fixture::new();
    let content = Content::new(&fixture, &image(&fixture, 1));
    let layer = layers(&content).remove(0);
    let size = content.blobs[&layer].len();
    for knows_ranges in [true, false] {
        let (content, broken, tries) = (content.clone(), layer.clone(), AtomicUsize::new(0));
        let server = Server::start(move |request| {
            let mut request = request.clone();
            if !knows_ranges {
                request.headers.remove("range");
            }
            let answer = content.serve(&request);
            match request.path.ends_with(&broken) && tries.fetch_add(1, Ordering::SeqCst) == 0 {
                true => Answer { cut: Some(2_000_000), ..answer },
                false => answer,
            }
        });
        let local = Local::new();
        let sum = Mutex::new(0);
        let note = |step: Transfer| *sum.lock().unwrap() = step.sum_bytes;
        pull(&local.store, &server.reference("me/app:1"), &options(), &note).await.unwrap();
        local.store.verify().unwrap();
        assert_eq!(sum.into_inner().unwrap(), size as u64);
        let asked = server.seen(&layer);
        assert_eq!(asked.len(), 2);
        let start: usize = between(asked[1].header("range").unwrap(), "bytes=").parse().unwrap();
        assert!(start > 0 && start <= 2_000_000, "{start}");
    }

    // However often it is asked, there is no more.
    let (content, layer) = (content.clone(), layer.clone());
    let server = Server::start(move |request| match request.path.ends_with(&layer) {
        true => answer(200).body(&content.blobs[&layer][..1000]),
        false => content.serve(request),
    });
    let local = Local::new();
    let error = local.pull(&server.reference("me/app:1")).await.unwrap_err();
    assert!(matches!(&error, RegistryError::WrongSize { is_more: false, .. }), "{error}");
    local.assert_clean();
}

#[tokio::test]
async fn what_is_not_as_promised_is_refused() {
    let fixture = Fixture::new();
    let content = Content::new(&fixture, &image(&fixture, 1));
    let layer = layers(&content).remove(0);
    let local = Local::new();
    let refused = async |content: Content, rest: &str| {
        let server = Server::start(move |request| content.serve(request));
        let error = local.pull(&server.reference(rest)).await.unwrap_err();
        local.assert_clean();
        error
    };

    let mut altered = content.clone();
    altered.blobs.get_mut(&layer).unwrap()[5] ^= 1;
    let error = refused(altered, "me/app:1").await;
    assert!(
        matches!(&error, RegistryError::WrongDigest { expected, .. } if expected.to_string() == layer),
        "{error}"
    );

    let mut longer = content.clone();
    longer.blobs.get_mut(&layer).unwrap().push(0);
    let error = refused(longer, "me/app:1").await;
    assert!(matches!(&error, RegistryError::WrongSize { is_more: true, .. }), "{error}");

    let mut without = content.clone();
    without.blobs.remove(&layer);
    let error = refused(without, "me/app:1").await;
    assert!(
        matches!(&error, RegistryError::MissingBlob { digest, .. } if digest.to_string() == layer),
        "{error}"
    );

    let mut pinned = content.clone();
    let pin = Digest::of(b"another").to_string();
    pinned.blobs.insert(pin.clone(), content.tags["1"].1.clone());
    let error = refused(pinned, &format!("me/app@{pin}")).await;
    assert!(
        matches!(&error, RegistryError::WrongDigest { expected, .. } if expected.to_string() == pin),
        "{error}"
    );

    // A manifest of an index whose content is another.
    let open = image(&fixture, 2);
    let mut swapped = Content::new(&fixture, &index(&fixture, &open));
    let manifest = swapped.blobs.get_mut(&digest(&open).to_string()).unwrap();
    let last = manifest.len() - 1;
    manifest[last] = b' ';
    let error = refused(swapped, "me/app:1").await;
    assert!(matches!(&error, RegistryError::WrongDigest { .. }), "{error}");

    let mut foreign = content.clone();
    let text = String::from_utf8(content.tags["1"].1.clone()).unwrap();
    let text = text.replace(r#""layers":[{"#, r#""layers":[{"urls":["https://elsewhere.example/x"],"#);
    foreign.tags.insert("1".into(), (MANIFEST.into(), text.into_bytes()));
    let error = refused(foreign, "me/app:1").await;
    assert!(
        matches!(&error, RegistryError::ForeignLayer { digest, .. } if digest.to_string() == layer),
        "{error}"
    );

    let mut huge = content.clone();
    huge.tags.insert("1".into(), (MANIFEST.into(), vec![b' '; (4 << 20) + 1]));
    let error = refused(huge, "me/app:1").await;
    assert!(matches!(&error, RegistryError::Answer { .. }), "{error}");

    let arm = fixture.manifest_for("arm64", &[tar(&[file("arm", b"arm")])], plain);
    let list = format!(
        r#"{{"schemaVersion":2,"manifests":[{arm},"platform":{{"architecture":"arm64","os":"linux"}}}},
            {arm},"platform":{{"architecture":"unknown","os":"unknown"}}}}]}}"#
    );
    for open in [fixture.blob(INDEX, list.as_bytes()), arm] {
        let error = refused(Content::new(&fixture, &open), "me/app:1").await;
        let text = error.to_string();
        assert!(text.ends_with("me/app:1 is not made for linux/amd64, but for linux/arm64"), "{text}");
    }
}

#[tokio::test]
async fn pins_of_indexes_and_manifests_hold() {
    let fixture = Fixture::new();
    let open = image(&fixture, 1);
    let index = index(&fixture, &open);
    let content = Content::new(&fixture, &index);
    let server = Server::start(move |request| content.serve(request));
    for pin in [digest(&index), digest(&open)] {
        let local = Local::new();
        let reference = server.reference(&format!("me/app@{pin}"));
        let pulled = local.pull(&reference).await.unwrap();
        assert_eq!((pulled.digest, pulled.name), (digest(&open), reference.to_string()));
    }
}

#[tokio::test]
async fn docker_documents_are_understood() {
    let fixture = Fixture::new();
    let open = image(&fixture, 1);
    let text = String::from_utf8(Content::new(&fixture, &open).tags["1"].1.clone()).unwrap();
    let kind = "application/vnd.docker.distribution.manifest.v2+json";
    let text = text
        .replace(LAYER, "application/vnd.docker.image.rootfs.diff.tar")
        .replace("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
        .replace(r#""schemaVersion":2"#, &format!(r#""schemaVersion":2,"mediaType":"{kind}""#));
    let open = fixture.blob(kind, text.as_bytes());
    let list_kind = "application/vnd.docker.distribution.manifest.list.v2+json";
    let list = format!(
        r#"{{"schemaVersion":2,"mediaType":"{list_kind}","manifests":[
            {open},"platform":{{"architecture":"amd64","os":"linux"}}}}]}}"#
    );
    let list = fixture.blob(list_kind, list.as_bytes());
    let content = Content::new(&fixture, &list);
    let server = Server::start(move |request| content.serve(request));
    let local = Local::new();
    let pulled = local.pull(&server.reference("me/app:1")).await.unwrap();
    assert_eq!((pulled.digest, pulled.manifest.media_type.as_str()), (digest(&open), kind));
}

#[tokio::test]
async fn layers_come_side_by_side_but_not_all() {
    let fixture = Fixture::new();
    let content = Content::new(&fixture, &image(&fixture, 7));
    let layers = layers(&content);
    // Layers being fetched now, and the most at any time.
    let state = Arc::new((Mutex::new((0_usize, 0_usize)), Condvar::new()));
    let shared = state.clone();
    let server = Server::start(move |request| {
        if layers.iter().any(|layer| request.path.ends_with(layer)) {
            let (counts, changed) = &*shared;
            let mut counts = counts.lock().unwrap();
            counts.0 += 1;
            counts.1 = counts.1.max(counts.0);
            changed.notify_all();
            // Until three are here, which they never are if they come one by one.
            let alone = |counts: &mut (usize, usize)| counts.1 < 3;
            let (mut counts, waited) =
                changed.wait_timeout_while(counts, Duration::from_secs(10), alone).unwrap();
            assert!(!waited.timed_out());
            counts.0 -= 1;
        }
        content.serve(request)
    });
    Local::new().pull(&server.reference("me/app:1")).await.unwrap();
    assert_eq!(state.0.lock().unwrap().1, 3);
}

#[tokio::test]
async fn a_pull_that_is_dropped_leaves_no_trace() {
    let fixture = Fixture::new();
    let content = Content::new(&fixture, &image(&fixture, 2));
    let server = Server::start(move |request| content.serve(request));
    let local = Local::new();
    let reference = server.reference("me/app:1");
    let begun = tokio::sync::Notify::new();
    let note = |_| begun.notify_one();
    let options = options();
    tokio::select! {
        biased;
        _ = begun.notified() => {}
        _ = pull(&local.store, &reference, &options, &note) => panic!("it came to its end"),
    }
    // What is being written ends in another thread.
    for _ in 0..100 {
        if fs::read_dir(local.store.path().join("ingest")).unwrap().count() == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    local.assert_clean();
    fn is_send(_: impl Send) {}
    is_send(pull(&local.store, &reference, &options, &|_| {}));
}

#[tokio::test]
async fn only_registries_of_this_machine_may_go_without_tls() {
    let fixture = Fixture::new();
    let content = Content::new(&fixture, &image(&fixture, 1));
    let server = Server::start(move |request| content.serve(request));
    // Leads here, but says nothing of the kind.
    let reference: Reference = format!("0.0.0.0:{}/me/app:1", server.address.port()).parse().unwrap();
    let local = Local::new();
    let error = local.pull(&reference).await.unwrap_err();
    assert!(matches!(&error, RegistryError::PlainHttp { .. } | RegistryError::Connect { .. }), "{error}");
    assert!(server.requests.lock().unwrap().is_empty());
    let insecure = RegistryOptions { insecure: true, ..options() };
    pull(&local.store, &reference, &insecure, &|_| {}).await.unwrap();
}

#[tokio::test]
async fn what_was_encrypted_stays_so() {
    let fixture = Fixture::new();
    let content = Content::new(&fixture, &image(&fixture, 1));
    let serve = content.clone();
    let server = Server::start_tls(move |request| serve.serve(request));
    // On this machine a certificate is not asked for, elsewhere it is.
    Local::new().pull(&server.reference("me/app:1")).await.unwrap();
    let reference: Reference = format!("0.0.0.0:{}/me/app:1", server.address.port()).parse().unwrap();
    let local = Local::new();
    let before = server.requests.lock().unwrap().len();
    let error = local.pull(&reference).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Tls { .. }), "{error}");
    assert!(error.hint().unwrap().contains("update-ca-certificates"));
    assert_eq!(server.requests.lock().unwrap().len(), before);
    let insecure = RegistryOptions { insecure: true, ..options() };
    pull(&Local::new().store, &reference, &insecure, &|_| {}).await.unwrap();

    let plain = Server::start(|_| answer(200));
    let (blobs, tokens) = (plain.url("/blob"), plain.url("/token"));
    let redirecting = Server::start_tls(move |request| match request.path.contains("/blobs/") {
        true => answer(307).with("Location", blobs.clone()),
        false => content.serve(request),
    });
    let challenging = Server::start_tls(move |_| {
        answer(401).with("WWW-Authenticate", format!(r#"Bearer realm="{tokens}""#))
    });
    for server in [redirecting, challenging] {
        let options = local.signed_in(&server.address);
        let error = pull(&local.store, &server.reference("me/app:1"), &options, &|_| {}).await.unwrap_err();
        assert!(matches!(&error, RegistryError::Redirect { .. }), "{error}");
        assert!(error.to_string().contains("not HTTPS"), "{error}");
    }
    assert!(plain.requests.lock().unwrap().is_empty());
    local.assert_clean();
}

/// A store with one image, called `one:1`.
fn stored(layers: u64) -> (Local, StoredImage) {
    let fixture = Fixture::new();
    let open = image(&fixture, layers);
    fixture.index(&[&open]);
    let local = Local::new();
    let name = "one:1".parse().unwrap();
    let image = local.store.load(&fixture.layout(), None, Some(&name), &mut |_| {}).unwrap().remove(0);
    (local, image)
}

#[tokio::test]
async fn a_push_sends_what_is_missing_and_nothing_else() {
    let (local, image) = stored(2);
    let storage = Server::start({
        let tries = AtomicUsize::new(0);
        move |request| match tries.fetch_add(1, Ordering::SeqCst) {
            0 => answer(503),
            _ => answer(if request.method == "PUT" { 201 } else { 405 }),
        }
    });
    let present = image.layers[0].digest.to_string();
    let target = storage.url("/upload?state=a%2Fb");
    let serve = move |request: &Request| match request.method.as_str() {
        "HEAD" if request.path.ends_with(&present) => answer(200),
        "HEAD" => answer(404),
        "POST" => answer(202).with("Location", target.clone()),
        "PUT" => answer(201).with("Docker-Content-Digest", Digest::of(&request.body).to_string()),
        _ => answer(405),
    };
    let server = Server::start(guarded(serve, "pull%2Cpush"));
    let to = server.reference("me/app:2");
    let options = local.signed_in(&server.address);
    let last: Mutex<BTreeMap<usize, Transfer>> = Mutex::default();
    let note = |step: Transfer| {
        last.lock().unwrap().insert(step.layer, step);
    };
    assert_eq!(push(&local.store, &image, &to, &options, &note).await.unwrap(), image.digest);
    let puts = storage.seen("/upload?state=a%2Fb&digest=sha256%3A");
    assert_eq!(puts.len(), 3, "a layer twice, and the configuration");
    assert!(puts.iter().all(|put| put.header("authorization").is_none()));
    assert_eq!(Digest::of(&puts[1].body), image.layers[1].digest);
    assert_eq!(Digest::of(&puts[2].body), image.image_id);
    let manifest = server.seen("/v2/me/app/manifests/2").remove(0);
    assert_eq!(manifest.header("content-type"), Some(MANIFEST));
    assert_eq!(Digest::of(&manifest.body), image.digest);
    let last = last.into_inner().unwrap();
    assert_eq!((last[&1].is_present, last[&2].is_present), (true, false));
    assert_eq!(last[&2].sum_bytes, image.size_bytes);

    let lying = Server::start(|request| match request.method.as_str() {
        "PUT" => answer(201).with("Docker-Content-Digest", Digest::of(b"x").to_string()),
        _ => answer(200),
    });
    let error = push(&local.store, &image, &lying.reference("a:1"), &options, &|_| {}).await.unwrap_err();
    assert!(matches!(&error, RegistryError::WrongDigest { .. }), "{error}");
    let other = lying.reference(&format!("a@{}", Digest::of(b"x")));
    let error = push(&local.store, &image, &other, &options, &|_| {}).await.unwrap_err();
    assert!(matches!(&error, RegistryError::OtherDigest { .. }), "{error}");
}

/// Debian's registry, on a port of its own choice.
struct DebianRegistry {
    process: Child,
    address: String,
}

impl DebianRegistry {
    fn start(directory: &std::path::Path) -> Self {
        let config = directory.join("registry.yml");
        let storage = directory.join("registry");
        let text = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '127.0.0.1:0'}}\n",
            storage.display()
        );
        fs::write(&config, text).unwrap();
        let mut process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("docker-registry: {error}; install Debian's package docker-registry")
            });
        let mut output = BufReader::new(process.stderr.take().unwrap());
        let mut registry = Self { process, address: String::new() };
        let mut line = String::new();
        while output.read_line(&mut line).unwrap() > 0 {
            if let Some((_, rest)) = line.split_once("listening on ") {
                registry.address = rest.split(['"', ' ', ',']).next().unwrap().to_owned();
                // Its log must go somewhere.
                std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
                return registry;
            }
            line.clear();
        }
        panic!("docker-registry ended before it listened");
    }
}

impl Drop for DebianRegistry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn a_real_registry_gives_back_what_it_got() {
    let (local, image) = stored(2);
    let registry = DebianRegistry::start(local.directory.path());
    let to: Reference = format!("{}/me/app:1", registry.address).parse().unwrap();
    assert_eq!(push(&local.store, &image, &to, &options(), &|_| {}).await.unwrap(), image.digest);
    push(&local.store, &image, &to, &options(), &|step| assert!(step.is_present)).await.unwrap();

    let other = Local::new();
    let pulled = other.pull(&to).await.unwrap();
    assert_eq!((pulled.digest, pulled.image_id, pulled.layers), (image.digest, image.image_id, image.layers));
    other.store.verify().unwrap();
    let pinned: Reference = format!("{}/me/app@{}", registry.address, image.digest).parse().unwrap();
    assert_eq!(other.pull(&pinned).await.unwrap().digest, image.digest);
    let absent = Reference { tag: Some("2".into()), ..to };
    let error = other.pull(&absent).await.unwrap_err();
    assert!(matches!(&error, RegistryError::NotFound { .. }), "{error}");
}
