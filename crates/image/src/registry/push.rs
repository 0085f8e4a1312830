//! From the store to a registry.

use std::collections::HashSet;

use futures::stream::FuturesUnordered;
use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE};
use reqwest::{Body, Method, Response, StatusCode, Url};
use tokio::io::AsyncReadExt as _;
use tokio::sync::watch;
use tokio::time::timeout;

use super::session::{Failure, Retry, Session, header};
use super::{BlobMeter, Meter, OnTransfer, RegistryError, RegistryOptions, blocking};
use crate::config::{Descriptor, Manifest};
use crate::digest::Digest;
use crate::reference::Reference;
use crate::store::{Store, StoreError, StoredImage};

/// How many times longer than usual a registry may be silent once it has all of a blob, which it verifies then.
const PATIENCE_AT_END: u32 = 10;
/// Bytes read from a blob at a time.
const BUFFER_BYTES: usize = 64 << 10;

/// Pushes `image` as `to`; the digest of its manifest, which is the same there. What the registry has is not sent
/// again.
///
/// Must run on a Tokio runtime with time and I/O. Dropped unfinished, it leaves the registry without the name.
///
/// # Errors
/// If one may not write there, the store lacks a part of the image, or registry or network fail.
pub async fn push(
    store: &Store,
    image: &StoredImage,
    to: &Reference,
    options: &RegistryOptions,
    progress: OnTransfer<'_>,
) -> Result<Digest, RegistryError> {
    let actual = image.digest;
    if let Some(expected) = to.digest.filter(|expected| *expected != actual) {
        return Err(RegistryError::OtherDigest { expected, actual });
    }
    // What is being pushed stays, whatever else happens to its name.
    let holder = store.clone();
    let _writing = blocking(move || holder.writing()).await?;
    let reader = store.clone();
    let read = blocking(move || {
        Ok::<_, StoreError>((reader.read_blob(&actual)?, reader.document("manifest", &actual)?))
    });
    let (bytes, manifest): (Vec<u8>, Manifest) = read.await?;
    let push = Push { store, session: Session::open(to, options, "pull,push").await? };
    push.layers(&manifest.layers, progress).await?;
    push.blob(&manifest.config, BlobMeter::silent(&manifest.config)).await?;
    let media_type = match image.manifest.media_type.as_str() {
        "" => manifest.media_type.as_deref().unwrap_or(crate::store::MANIFEST),
        media_type => media_type,
    };
    push.manifest(actual, media_type, &bytes).await?;
    Ok(actual)
}

struct Push<'a> {
    store: &'a Store,
    session: Session<'a>,
}

impl Push<'_> {
    async fn manifest(&self, digest: Digest, media_type: &str, bytes: &[u8]) -> Result<(), RegistryError> {
        let reference = self.session.reference;
        let name = reference.tag.clone().unwrap_or_else(|| digest.to_string());
        let url = self.session.url(&format!("manifests/{name}"))?;
        let headers = [(CONTENT_TYPE, media_type.to_owned())];
        let response = self.session.send(Method::PUT, &url, &headers, Some(bytes)).await?;
        if !response.status().is_success() {
            return Err(self.session.unexpected(response, "take the manifest").await);
        }
        match header(response.headers(), "docker-content-digest").map(|own| own.parse::<Digest>()) {
            Some(Ok(actual)) if actual != digest => Err(RegistryError::WrongDigest {
                registry: self.session.registry(),
                expected: digest,
                actual,
            }),
            _ => Ok(()),
        }
    }

    /// All layers, some at a time.
    async fn layers(&self, layers: &[Descriptor], progress: OnTransfer<'_>) -> Result<(), RegistryError> {
        let meter = Meter::new(layers, progress);
        let mut seen = HashSet::new();
        let mut waiting = layers.iter().enumerate();
        let mut running = FuturesUnordered::new();
        loop {
            while running.len() < self.session.options.parallel.max(1) {
                let Some((index, layer)) = waiting.next() else { break };
                let mut meter = meter.layer(index, layer);
                match seen.insert(layer.digest) {
                    true => running.push(self.blob(layer, meter)),
                    false => meter.present(),
                }
            }
            match running.next().await {
                Some(done) => done?,
                None => return Ok(()),
            }
        }
    }

    /// One blob, unless the registry has it.
    async fn blob(&self, blob: &Descriptor, mut meter: BlobMeter<'_>) -> Result<(), RegistryError> {
        let url = self.session.url(&format!("blobs/{}", blob.digest))?;
        let response = self.session.send(Method::HEAD, &url, &[], None).await?;
        match response.status() {
            StatusCode::OK => {
                meter.present();
                return Ok(());
            }
            StatusCode::NOT_FOUND => {}
            _ => return Err(self.session.unexpected(response, "tell whether it has a blob").await),
        }
        let mut retry = Retry::new(self.session.options);
        loop {
            match self.upload(blob, &mut meter).await {
                Ok(()) => return Ok(()),
                Err(failure) => retry.wait(failure).await?,
            }
        }
    }

    /// Sends a blob in one piece: `POST` for a place, `PUT` to it.
    async fn upload(&self, blob: &Descriptor, meter: &mut BlobMeter<'_>) -> Result<(), Failure> {
        let url = self.session.url("blobs/uploads/")?;
        let response =
            self.session.try_send(Method::POST, &url, &[(CONTENT_LENGTH, "0".into())], None).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(self.session.unexpected(response, "take a blob").await.into());
        }
        let mut place = self.session.location(&response)?;
        place.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
        let response = match self.put(&place, blob, meter).await {
            Err(Failure::Unauthorized { challenges, used, error }) => {
                // The body is spent, and what comes next needs a token that is still good.
                let expired = Failure::transient(self.session.answer("its token ended too early".into()));
                self.session.authorize(&challenges, used, error).await?;
                return Err(expired);
            }
            answer => answer?,
        };
        match response.status() {
            StatusCode::CREATED => Ok(()),
            _ => Err(self.session.unexpected(response, "take a blob").await.into()),
        }
    }

    async fn put(
        &self,
        place: &Url,
        blob: &Descriptor,
        meter: &mut BlobMeter<'_>,
    ) -> Result<Response, Failure> {
        let idle = self.session.options.idle_timeout;
        let (store, Descriptor { digest, size, .. }) = (self.store.clone(), blob.clone());
        let file = blocking(move || {
            // A blob that is not what it should be would be refused, after all of it had been sent.
            match store.contains(&digest, size) {
                true => store.open_blob(&digest),
                false => Err(StoreError::MissingBlob { digest }),
            }
        });
        let file = tokio::fs::File::from_std(file.await.map_err(RegistryError::from)?);
        let (counter, mut count) = watch::channel(0_u64);
        let stream = tokio_util::io::ReaderStream::with_capacity(file.take(size), BUFFER_BYTES)
            .inspect_ok(move |bytes| counter.send_modify(|sent| *sent += bytes.len() as u64));
        let headers = [(CONTENT_TYPE, "application/octet-stream".into()), (CONTENT_LENGTH, size.to_string())];
        let mut request = self.session.request(Method::PUT, place.clone(), &headers);
        *request.body_mut() = Some(Body::wrap_stream(stream));
        meter.moved(0);
        let answer = self.session.execute(request);
        tokio::pin!(answer);
        let mut is_sending = true;
        loop {
            let patience = if is_sending { idle } else { idle.saturating_mul(PATIENCE_AT_END) };
            let changed = async {
                match is_sending {
                    true => count.changed().await.is_ok(),
                    false => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                answer = &mut answer => return answer,
                changed = timeout(patience, changed) => match changed {
                    Ok(true) => meter.moved(*count.borrow_and_update()),
                    Ok(false) => is_sending = false,
                    Err(_) => return Err(self.session.stalled(place)),
                },
            }
        }
    }
}
