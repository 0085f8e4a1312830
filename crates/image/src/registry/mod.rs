//! Images from and to registries, by the OCI distribution protocol (`distribution-spec`, version 1.1) and Docker's token
//! authentication (`docs/spec/auth/token.md` of the distribution project).
//!
//! ```text
//! pull   manifest or index --verify--> manifest for linux/amd64 --> configuration --> layers, several at once --> name
//! push   blobs that the registry lacks, several at once --> manifest
//!
//! session       one registry: TLS or not, credentials and tokens, redirects, what is tried again
//! challenge     what `WWW-Authenticate` asks for
//! credentials   Docker's `config.json` and its credential helpers
//! ```
//! Registries are hostile: documents and bodies are bounded by what their descriptors say, everything is verified by
//! digest before it is used or named, credentials go to the registry and its token server only, and nothing goes from
//! HTTPS to HTTP. Whoever is killed leaves a store as [`crate::Store`] promises: no name, and at most whole blobs.
//!
//! This is `reqwest` and not `oci-client`: that one would have to be gone around for retries, broken blobs, redirects,
//! Docker's credentials and typed errors, and it brings the specification's crate and more.

mod challenge;
mod credentials;
mod error;
mod pull;
mod push;
mod session;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::config::Descriptor;
use crate::digest::Digest;

pub use error::RegistryError;
pub use pull::pull;
pub use push::push;

/// How to talk to registries. The default suits people; proxies are taken from the environment as usual.
#[derive(Clone, Debug)]
pub struct RegistryOptions {
    /// Docker's configuration with credentials, `~/.docker/config.json`; it need not exist.
    pub docker_config: Option<PathBuf>,
    /// Directories of credential helpers, as in `PATH`.
    pub helper_path: Option<OsString>,
    /// Whether a registry may go without TLS or a certificate that can be verified. Those on this machine may anyway.
    pub insecure: bool,
    /// Layers moved at a time.
    pub parallel: usize,
    /// How often something is tried before it is given up.
    pub attempts: u32,
    /// The pause after the first failure; it doubles with each, up to 30 seconds.
    pub backoff: Duration,
    /// The longest pause that a registry may ask for; if it asks for more, it is given up.
    pub longest_pause: Duration,
    /// How long a connection may take to come about, TLS included.
    pub connect_timeout: Duration,
    /// How long nothing may arrive.
    pub idle_timeout: Duration,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            docker_config: None,
            helper_path: None,
            insecure: false,
            parallel: 3,
            attempts: 5,
            backoff: Duration::from_millis(300),
            longest_pause: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(15),
            idle_timeout: Duration::from_secs(60),
        }
    }
}

/// What has been moved so far: of one layer, and of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The layer, counted from 1, lowest first.
    pub layer: usize,
    /// How many there are.
    pub layers: usize,
    /// Digest of the layer.
    pub digest: Digest,
    /// Bytes of the layer that are there; fewer than before if it had to begin anew.
    pub bytes: u64,
    /// Bytes of the layer, compressed as it is.
    pub size: u64,
    /// Whether it was there already.
    pub is_present: bool,
    /// Bytes of all layers that are there.
    pub sum_bytes: u64,
    /// Bytes of all layers.
    pub sum_size: u64,
}

/// Told of each piece that arrives or leaves, of several layers in turn: often, so it should be quick.
pub type OnTransfer<'a> = &'a (dyn Fn(Transfer) + Sync);

/// Counts what is moved, of all layers.
struct Meter<'a> {
    tell: OnTransfer<'a>,
    layers: usize,
    sum_bytes: AtomicU64,
    sum_size: u64,
}

/// Counts what is moved, of one blob.
struct BlobMeter<'a> {
    /// `None` for blobs that are not told of.
    whole: Option<(&'a Meter<'a>, usize)>,
    digest: Digest,
    size: u64,
    bytes: u64,
    is_present: bool,
}

impl<'a> Meter<'a> {
    fn new(layers: &[Descriptor], tell: OnTransfer<'a>) -> Self {
        let sum_size = layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add);
        Self { tell, layers: layers.len(), sum_bytes: AtomicU64::new(0), sum_size }
    }

    /// For a layer, counted from 0.
    fn layer(&'a self, index: usize, layer: &Descriptor) -> BlobMeter<'a> {
        BlobMeter { whole: Some((self, index + 1)), ..BlobMeter::silent(layer) }
    }
}

impl BlobMeter<'_> {
    fn silent(blob: &Descriptor) -> Self {
        Self { whole: None, digest: blob.digest, size: blob.size, bytes: 0, is_present: false }
    }

    /// It was there.
    fn present(&mut self) {
        self.is_present = true;
        self.moved(self.size);
    }

    /// So many bytes are there now.
    fn moved(&mut self, bytes: u64) {
        let Some((meter, layer)) = self.whole else { return };
        // Wraps where a blob begins anew, and the sum comes out right.
        let change = bytes.wrapping_sub(self.bytes);
        let sum_bytes = meter.sum_bytes.fetch_add(change, Ordering::Relaxed).wrapping_add(change);
        self.bytes = bytes;
        (meter.tell)(Transfer {
            layer,
            layers: meter.layers,
            digest: self.digest,
            bytes,
            size: self.size,
            is_present: self.is_present,
            sum_bytes,
            sum_size: meter.sum_size,
        });
    }
}

/// Work that waits for disks, off the threads that wait for networks.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is ending, and this with it.
            Err(_) => std::future::pending().await,
        },
    }
}
