//! Credentials as Docker keeps them: `config.json`, and the helpers it names.
//!
//! A helper is a program `docker-credential-NAME`: `get` reads the server from its input and writes JSON
//! (`docker-credential-helpers` of the Docker project).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{RegistryError, RegistryOptions, blocking};

/// Largest `config.json`, bytes.
const CONFIG_BYTES: u64 = 1 << 20;
/// Largest answer of a helper, bytes.
const ANSWER_BYTES: u64 = 64 << 10;
/// How long a helper may take; it may ask its user something.
const HELPER_PATIENCE: Duration = Duration::from_secs(60);
/// How Docker's own tools call Docker Hub in their configuration.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// What a registry gets to see.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    Password {
        user: String,
        secret: String,
    },
    /// To be exchanged for a token.
    Identity {
        token: String,
    },
}

impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Password { user, .. } => write!(formatter, "Password({user:?})"),
            Self::Identity { .. } => write!(formatter, "Identity"),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct DockerConfig {
    auths: BTreeMap<String, Auth>,
    creds_store: String,
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// What there is for `registry`, a host as in [`crate::Reference::registry`].
pub(super) async fn find(
    registry: &str,
    options: &RegistryOptions,
) -> Result<Option<Credentials>, RegistryError> {
    let Some(path) = options.docker_config.clone() else { return Ok(None) };
    let Some(config) = blocking(move || read(&path)).await? else { return Ok(None) };
    let helper = match entry(&config.cred_helpers, registry) {
        Some(helper) => Some(helper),
        None => Some(&config.creds_store).filter(|helper| !helper.is_empty()),
    };
    let found = match helper {
        Some(helper) => ask(helper, registry, options).await?,
        None => None,
    };
    match (found, entry(&config.auths, registry)) {
        (Some(found), _) => Ok(Some(found)),
        (None, Some(auth)) => decode(auth).map_err(|reason| RegistryError::DockerConfig {
            path: options.docker_config.clone().unwrap_or_default(),
            reason: format!("the entry for {registry} {reason}"),
        }),
        (None, None) => Ok(None),
    }
}

fn read(path: &Path) -> Result<Option<DockerConfig>, RegistryError> {
    let wrong = |reason: String| RegistryError::DockerConfig { path: path.to_owned(), reason };
    let mut bytes = Vec::new();
    match File::open(path).and_then(|file| file.take(CONFIG_BYTES + 1).read_to_end(&mut bytes)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(wrong(error.to_string())),
        Ok(read) if read as u64 > CONFIG_BYTES => return Err(wrong("it is larger than 1 MiB".into())),
        Ok(_) => {}
    }
    // The parser's own words could quote a secret; where it stumbled says enough.
    let invalid = |error: serde_json::Error| {
        wrong(format!("it is invalid at line {}, column {}", error.line(), error.column()))
    };
    serde_json::from_slice(&bytes).map(Some).map_err(invalid)
}

/// The entry of a registry, whose key may be a host or an address with scheme and path.
fn entry<'a, T>(map: &'a BTreeMap<String, T>, registry: &str) -> Option<&'a T> {
    let is_hub = registry == "docker.io";
    if let Some(found) = map.get(server(registry)) {
        return Some(found);
    }
    let host = |key: &str| {
        let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
        rest.split('/').next().unwrap_or(rest).to_ascii_lowercase()
    };
    let names: &[&str] =
        if is_hub { &["docker.io", "index.docker.io", "registry-1.docker.io"] } else { &[registry] };
    map.iter().find(|(key, _)| names.contains(&host(key).as_str())).map(|(_, entry)| entry)
}

/// What Docker calls a registry.
fn server(registry: &str) -> &str {
    if registry == "docker.io" { DOCKER_HUB_KEY } else { registry }
}

fn decode(auth: &Auth) -> Result<Option<Credentials>, &'static str> {
    if !auth.identitytoken.is_empty() {
        return Ok(Some(Credentials::Identity { token: auth.identitytoken.clone() }));
    }
    if !auth.username.is_empty() {
        return Ok(Some(Credentials::Password {
            user: auth.username.clone(),
            secret: auth.password.clone(),
        }));
    }
    if auth.auth.is_empty() {
        return Ok(None);
    }
    let bytes = BASE64_STANDARD.decode(&auth.auth).map_err(|_| "is not base64")?;
    let text = String::from_utf8(bytes).map_err(|_| "is not UTF-8")?;
    let (user, secret) = text.split_once(':').ok_or("has no colon")?;
    let secret = secret.trim_end_matches('\0').to_owned();
    Ok(Some(Credentials::Password { user: user.to_owned(), secret }))
}

/// Asks a helper; `None` if it knows nothing.
async fn ask(
    helper: &str,
    registry: &str,
    options: &RegistryOptions,
) -> Result<Option<Credentials>, RegistryError> {
    let failed = |reason: String| {
        let helper = helper.chars().take(60).collect();
        RegistryError::CredentialHelper { helper, reason }
    };
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if helper.is_empty() || helper.len() > 60 || !helper.bytes().all(is_word) {
        return Err(failed("that is not a name".into()));
    }
    let program = format!("docker-credential-{helper}");
    let path = options.helper_path.as_deref().and_then(|path| program_in(path, &program));
    let path = path.ok_or_else(|| failed(format!("there is no program {program}")))?;
    let answer = tokio::time::timeout(HELPER_PATIENCE, run(&path, server(registry))).await;
    let answer = answer.map_err(|_| failed("it takes too long".into()))?;
    let (success, output) = answer.map_err(|error| failed(error.to_string()))?;
    if output.len() as u64 > ANSWER_BYTES {
        return Err(failed("it writes too much".into()));
    }
    if !success {
        let text = String::from_utf8_lossy(&output);
        // The one failure that every helper words alike.
        if text.contains("credentials not found") {
            return Ok(None);
        }
        return Err(failed(crate::http::printable(text.trim())));
    }
    let answer: Answer =
        serde_json::from_slice(&output).map_err(|_| failed("its answer is not JSON".into()))?;
    Ok(match (answer.username.as_str(), answer.secret.is_empty()) {
        ("", true) => None,
        ("<token>", _) => Some(Credentials::Identity { token: answer.secret }),
        _ => Some(Credentials::Password { user: answer.username, secret: answer.secret }),
    })
}

fn program_in(path: &OsStr, program: &str) -> Option<PathBuf> {
    let directories = std::env::split_paths(path).filter(|directory| directory.is_absolute());
    directories.map(|directory| directory.join(program)).find(|path| path.is_file())
}

/// Whether it succeeded, and the beginning of what it wrote.
async fn run(program: &Path, server: &str) -> std::io::Result<(bool, Vec<u8>)> {
    let mut child = tokio::process::Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut input) = child.stdin.take() {
        // One that ends without reading tells why in its answer.
        let _ = input.write_all(server.as_bytes()).await;
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(ANSWER_BYTES + 1).read_to_end(&mut output).await?;
    }
    if output.len() as u64 > ANSWER_BYTES {
        child.kill().await?;
    }
    Ok((child.wait().await?.success(), output))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn password(user: &str, secret: &str) -> Option<Credentials> {
        Some(Credentials::Password { user: user.into(), secret: secret.into() })
    }

    fn look_up(directory: &Path, config: &str, registry: &str) -> Result<Option<Credentials>, RegistryError> {
        let path = directory.join("config.json");
        std::fs::write(&path, config).unwrap();
        let options = RegistryOptions {
            docker_config: Some(path),
            helper_path: Some(directory.into()),
            ..RegistryOptions::default()
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(find(registry, &options))
    }

    #[test]
    fn registries_are_found_by_all_their_names() {
        let directory = tempfile::tempdir().unwrap();
        let config = |key: &str| format!(r#"{{"auths":{{"{key}":{{"auth":"dTpwOnE="}}}}}}"#);
        for (key, registry, is_found) in [
            ("https://index.docker.io/v1/", "docker.io", true),
            ("docker.io", "docker.io", true),
            ("https://registry.example/v2/", "registry.example", true),
            ("registry.example", "registry.example", true),
            ("registry.example:5000", "registry.example:5000", true),
            ("registry.example:5000", "registry.example", false),
            ("https://index.docker.io/v1/", "registry.example", false),
            ("registry.example.evil", "registry.example", false),
        ] {
            let expected = password("u", "p:q").filter(|_| is_found);
            assert_eq!(
                look_up(directory.path(), &config(key), registry).unwrap(),
                expected,
                "{key} {registry}"
            );
        }
        let identity = r#"{"auths":{"a.example":{"auth":"dTpw","identitytoken":"t"}}}"#;
        let expected = Credentials::Identity { token: "t".into() };
        assert_eq!(look_up(directory.path(), identity, "a.example").unwrap(), Some(expected));
        for wrong in
            [r#"{"auths":{"a.example":{"auth":"secret!"}}}"#, r#"{"auths":{"a.example":"secret"}}"#, "{"]
        {
            let error = look_up(directory.path(), wrong, "a.example").unwrap_err();
            assert!(matches!(&error, RegistryError::DockerConfig { .. }), "{error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        let nowhere = RegistryOptions {
            docker_config: Some("/nonexistent/config.json".into()),
            ..RegistryOptions::default()
        };
        assert!(read(nowhere.docker_config.as_deref().unwrap()).unwrap().is_none());
    }

    #[test]
    fn helpers_are_asked() {
        let directory = tempfile::tempdir().unwrap();
        let helper = |name: &str, script: &str| {
            let path = directory.path().join(format!("docker-credential-{name}"));
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        helper("good", r#"read server; echo "{\"Username\":\"$1 $server\",\"Secret\":\"s\"}""#);
        helper("token", r#"echo '{"Username":"<token>","Secret":"t"}'"#);
        helper("empty", "echo 'credentials not found in native keychain'; exit 1");
        helper("broken", "echo 'the keyring is locked'; exit 1");
        helper(
            "endless",
            "while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done",
        );
        let store =
            |name: &str| format!(r#"{{"credsStore":"{name}","auths":{{"b.example":{{"auth":"dTpw"}}}}}}"#);
        let ask = |config: &str, registry: &str| look_up(directory.path(), config, registry);
        assert_eq!(ask(&store("good"), "a.example").unwrap(), password("get a.example", "s"));
        assert_eq!(
            ask(&store("good"), "docker.io").unwrap(),
            password("get https://index.docker.io/v1/", "s")
        );
        assert_eq!(ask(&store("token"), "x").unwrap(), Some(Credentials::Identity { token: "t".into() }));
        assert_eq!(ask(&store("empty"), "a.example").unwrap(), None);
        assert_eq!(ask(&store("empty"), "b.example").unwrap(), password("u", "p"));
        let own = r#"{"credsStore":"broken","credHelpers":{"a.example":"good"}}"#;
        assert_eq!(ask(own, "a.example").unwrap(), password("get a.example", "s"));
        for (name, reason) in [
            ("broken", "the keyring is locked"),
            ("endless", "it writes too much"),
            ("absent", "there is no program docker-credential-absent"),
            ("../good", "that is not a name"),
        ] {
            match ask(&store(name), "a.example").unwrap_err() {
                RegistryError::CredentialHelper { reason: told, .. } => assert_eq!(told, reason),
                other => panic!("{other}"),
            }
        }
    }
}
