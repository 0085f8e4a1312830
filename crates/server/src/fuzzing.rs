//! What the fuzz targets drive: a request's head and body, as far as it gets without a machine.

use std::path::Path;

use agentkernel_sandbox::network::Rule;
use agentkernel_sandbox::options::Surroundings;
use agentkernel_sandbox::spec::{HostUser, MountSource};
use agentkernel_sandbox::state::Home;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Uri, header};
use serde::de::DeserializeOwned;

use crate::engine::{Engine, Grants, Limits, Settings};
use crate::http::{Keys, Way, check};
use crate::model::{
    ApplyRequest, BatchRequest, CreateRequest, ExecRequest, ForkRequest, RestoreRequest, RunRequest,
    SnapshotRequest, UpdateRequest, WriteManyRequest, WriteRequest,
};

/// An engine with a state directory at `path`; on a runtime.
pub fn engine(path: &Path) -> Engine {
    let home = Home::open(path).expect("a state directory can be made");
    let user = HostUser { name: "user".into(), uid: 1000, gid: 1000, home: "/home/user".into() };
    Engine::new(Settings {
        home,
        program: "/bin/false".into(),
        surroundings: Surroundings {
            user,
            current_directory: "/home/user/project".into(),
            environment: vec![("SECRET".into(), "secret".into())],
            certificates: None,
        },
        configuration: None,
        registry: Default::default(),
        grants: Grants::default(),
        limits: Limits { runs: 1, queue: 1, sandboxes: 1 },
    })
}

/// Lines of a head: the first is a URI, the others are headers.
pub fn head(text: &[u8]) {
    let mut lines = text.split(|byte| *byte == b'\n');
    let uri = lines.next().and_then(|line| Uri::try_from(line).ok()).unwrap_or_default();
    let mut headers = HeaderMap::new();
    for line in lines.take(20) {
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let name = HeaderName::try_from(&line[..colon]);
        let value = HeaderValue::from_bytes(line.get(colon + 1..).unwrap_or_default().trim_ascii());
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    let mut keys = Keys::default();
    if check(&keys, Way::Tcp { own: true }, &uri, &headers).is_ok() {
        let host = headers[header::HOST].to_str().expect("it was read").to_ascii_lowercase();
        assert!(["localhost", "127.", "["].iter().any(|local| host.starts_with(local)));
        let origins = headers.get_all(header::ORIGIN).iter();
        assert!({ origins }.all(|origin| origin.as_bytes().starts_with(b"http")));
    }
    assert!(check(&keys, Way::Tcp { own: false }, &uri, &headers).is_err());
    keys.add(&"0123456789".parse().expect("it is a key"));
    let sent = headers.values().any(|value| value.as_bytes().windows(10).any(|part| part == b"0123456789"));
    assert!(sent || check(&keys, Way::Unix, &uri, &headers).is_err());
}

/// A body, read as each request.
pub fn body(engine: &Engine, text: &[u8]) {
    fn is<T: DeserializeOwned>(text: &[u8]) {
        drop(serde_json::from_slice::<T>(text));
    }
    is::<BatchRequest>(text);
    is::<ExecRequest>(text);
    is::<ForkRequest>(text);
    is::<RestoreRequest>(text);
    is::<SnapshotRequest>(text);
    is::<UpdateRequest>(text);
    is::<WriteManyRequest>(text);
    is::<WriteRequest>(text);
    is::<ApplyRequest>(text);
    is::<CreateRequest>(text);
    let Ok(request) = serde_json::from_slice::<RunRequest>(text) else { return };
    let Ok(options) = engine.options(&request.machine()) else { return };
    assert!(options.mounts.iter().all(|mount| matches!(mount.source, MountSource::Volume(_))));
    for (name, value) in &options.environment {
        let bytes = name.as_encoded_bytes();
        assert!(!bytes.is_empty() && !bytes.contains(&b'=') && !bytes.contains(&0));
        assert!(!value.as_encoded_bytes().contains(&0));
    }
    assert!(options.directory.is_none_or(|directory| directory.is_absolute()));
    for rule in options.allow {
        // What was read is written so that it is read again.
        assert_eq!(rule.to_string().parse::<Rule>().ok(), Some(rule));
    }
}
