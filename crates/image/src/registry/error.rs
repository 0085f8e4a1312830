//! What can go wrong with a registry.

use std::path::PathBuf;
use std::time::Duration;

use crate::digest::Digest;
use crate::layout::LayoutError;
use crate::store::StoreError;

/// Why an image could not be pulled or pushed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The store is at fault, or one of the image's documents.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No image of that name.
    #[error("Image '{name}' not found in the registry {registry}")]
    NotFound {
        /// As it was asked for, in short.
        name: String,
        /// Where it was looked for.
        registry: String,
    },
    /// A part of the image is not there.
    #[error("the registry {registry} lacks {digest}, which is a part of the image")]
    MissingBlob {
        /// The registry.
        registry: String,
        /// The part.
        digest: Digest,
    },
    /// The registry does not let one in. Most say so of names that do not exist, too.
    #[error("the registry {registry} refuses {}access to {repository}{}", with(*.is_signed_in), because(.reason))]
    Denied {
        /// The registry.
        registry: String,
        /// What was to be read or written.
        repository: String,
        /// Whether there were credentials for it.
        is_signed_in: bool,
        /// The registry's words.
        reason: String,
    },
    /// Docker's configuration cannot be read.
    #[error("cannot read {}: {reason}", path.display())]
    DockerConfig {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A credential helper fails.
    #[error("the credential helper {helper:?} failed: {reason}")]
    CredentialHelper {
        /// Its name, as in Docker's configuration.
        helper: String,
        /// How.
        reason: String,
    },
    /// The registry's certificate is not trusted, or TLS fails otherwise.
    #[error("the TLS connection to {host} failed: {reason}")]
    Tls {
        /// The registry, or where it keeps its blobs.
        host: String,
        /// How.
        reason: String,
    },
    /// The registry answers, but not in TLS.
    #[error("the registry {registry} does not speak HTTPS")]
    PlainHttp {
        /// The registry.
        registry: String,
    },
    /// No connection comes about.
    #[error("cannot reach {host}: {reason}")]
    Connect {
        /// The registry, or where it keeps its blobs.
        host: String,
        /// Why not.
        reason: String,
    },
    /// A connection broke off.
    #[error("the connection to {host} broke: {reason}")]
    Broken {
        /// The registry, or where it keeps its blobs.
        host: String,
        /// How.
        reason: String,
    },
    /// Too many requests.
    #[error("the registry {registry} limits how often it may be asked{}", because(.reason))]
    RateLimited {
        /// The registry.
        registry: String,
        /// How long it asks to wait.
        pause: Option<Duration>,
        /// The registry's words.
        reason: String,
    },
    /// The registry has a failure of its own, or refuses a request.
    #[error("the registry {registry} answers {status} when asked to {action}{}", because(.reason))]
    Status {
        /// The registry.
        registry: String,
        /// What was asked.
        action: &'static str,
        /// HTTP's status.
        status: u16,
        /// The registry's words.
        reason: String,
    },
    /// The registry sends one to a place that is not safe.
    #[error("the registry {registry} redirects to where nothing may go: {reason}")]
    Redirect {
        /// The registry.
        registry: String,
        /// Why not.
        reason: String,
    },
    /// The registry does not keep to the protocol.
    #[error("the registry {registry} gave an answer that makes no sense: {reason}")]
    Answer {
        /// The registry.
        registry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// What came is not what was promised.
    #[error("what the registry {registry} sent has the digest {actual}, not {expected}")]
    WrongDigest {
        /// The registry.
        registry: String,
        /// As promised.
        expected: Digest,
        /// As read.
        actual: Digest,
    },
    /// More came than was promised, or less however often it was asked for.
    #[error("the registry {registry} sent {} than the {size} bytes of {digest}", if *.is_more { "more" } else { "less" })]
    WrongSize {
        /// The registry.
        registry: String,
        /// The part.
        digest: Digest,
        /// Its bytes, as promised.
        size: u64,
        /// Whether more came; otherwise less.
        is_more: bool,
    },
    /// An image larger than any that could be used.
    #[error("the layers of {name} have {bytes} bytes, which is too many")]
    TooLarge {
        /// The image.
        name: String,
        /// Its bytes, as its manifest says.
        bytes: u64,
    },
    /// Made for other systems only.
    #[error("{name} is not made for linux/amd64{}", there_is(.available))]
    NoPlatform {
        /// The image.
        name: String,
        /// What it is made for.
        available: Vec<String>,
    },
    /// A layer that is to be had elsewhere.
    #[error("layer {digest} of {name} is not kept in the registry")]
    ForeignLayer {
        /// The image.
        name: String,
        /// The layer.
        digest: Digest,
    },
    /// The name to push to pins another image.
    #[error("the image's digest is {actual}, but the name asks for {expected}")]
    OtherDigest {
        /// As in the name.
        expected: Digest,
        /// The image's.
        actual: Digest,
    },
    /// The client for HTTP could not be made.
    #[error("cannot prepare for HTTPS: {reason}")]
    Client {
        /// Why not.
        reason: String,
    },
}

impl RegistryError {
    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Store(error) => error.hint(),
            Self::NotFound { .. } => Some("check the name and the tag; the registry has no such image".into()),
            Self::MissingBlob { .. } => Some("the image in the registry is damaged; it has to be pushed again".into()),
            Self::Denied { registry, is_signed_in: false, .. } => {
                Some(format!("check the name; if it is private, sign in: docker login {registry}"))
            }
            Self::Denied { registry, is_signed_in: true, .. } => Some(format!(
                "check the name and your rights; to sign in as another or again: docker login {registry}"
            )),
            Self::DockerConfig { path, .. } => Some(format!("repair or remove {}", path.display())),
            Self::CredentialHelper { helper, .. } => Some(format!(
                "install docker-credential-{helper}, or take it out of Docker's config.json (credsStore, credHelpers)"
            )),
            Self::Tls { .. } => Some(
                "if a proxy or the registry has a certificate authority of its own, add it to this machine's \
                 (update-ca-certificates), or name its file in SSL_CERT_FILE; to trust the registry unseen: --insecure"
                    .into(),
            ),
            Self::PlainHttp { .. } => {
                Some("if it is meant to go without encryption, allow that: --insecure".into())
            }
            Self::Connect { .. } => {
                Some("check the registry's name and the network; a proxy is taken from HTTPS_PROXY and NO_PROXY".into())
            }
            Self::Broken { .. } => Some("try again: what has arrived whole is kept".into()),
            Self::RateLimited { pause: Some(pause), registry, .. } => Some(format!(
                "try again in {} seconds, or sign in: docker login {registry}",
                pause.as_secs()
            )),
            Self::RateLimited { pause: None, registry, .. } => {
                Some(format!("try again later, or sign in: docker login {registry}"))
            }
            Self::Status { status: 500.., .. } => Some("try again later: the fault is the registry's".into()),
            Self::WrongDigest { .. } | Self::WrongSize { .. } => Some(
                "nothing of it was kept; try again, and if it stays so, the registry or a proxy alters content".into(),
            ),
            Self::NoPlatform { .. } => Some("choose an image or a tag that is made for linux/amd64".into()),
            Self::ForeignLayer { .. } => {
                Some("layers that are fetched from elsewhere are refused; rebuild the image without them".into())
            }
            _ => None,
        }
    }
}

impl From<LayoutError> for RegistryError {
    fn from(error: LayoutError) -> Self {
        Self::Store(error.into())
    }
}

fn with(is_signed_in: bool) -> &'static str {
    if is_signed_in { "these credentials " } else { "" }
}

fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

fn there_is(available: &[String]) -> String {
    if available.is_empty() { String::new() } else { format!(", but for {}", available.join(", ")) }
}
