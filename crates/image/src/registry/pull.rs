//! From a registry into the store.

use std::collections::HashSet;
use std::sync::Arc;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use reqwest::header::{CONTENT_RANGE, RANGE};
use reqwest::{Method, Response, StatusCode, Url};
use serde::Deserialize;

use super::session::{Failure, Retry, Session, header};
use super::{BlobMeter, Meter, OnTransfer, RegistryError, RegistryOptions, blocking};
use crate::config::{Descriptor, Manifest};
use crate::digest::Digest;
use crate::layout::{
    Document, LayoutError, check_types, document_kind, for_platform, read_config, read_document,
};
use crate::limits::{DOCUMENT_BYTES, INDEX_DEPTH, Limits};
use crate::reference::Reference;
use crate::store::{BlobWriter, Store, StoreError, StoredImage, Writing};

/// Documents that lead to an image, the usual ones first.
const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
/// Bytes of a layer that are gathered before they are written.
const BATCH_BYTES: usize = 1 << 20;
/// Bytes of a layer that count as progress between two failures.
const PROGRESS_BYTES: u64 = 4 << 20;

/// What a manifest says of its layers that [`Descriptor`] does not keep.
#[derive(Deserialize)]
struct Sources {
    layers: Vec<Source>,
}

#[derive(Deserialize)]
struct Source {
    digest: Digest,
    urls: Option<Vec<serde::de::IgnoredAny>>,
}

/// Pulls the image called `reference` for `linux/amd64` into `store` and names it so there. What the store has is not
/// fetched again.
///
/// Must run on a Tokio runtime with time and I/O. Dropped unfinished, it leaves no name and no part of a blob.
///
/// # Errors
/// If there is no such image, one may not have it, it is damaged, or registry, network or store fail.
pub async fn pull(
    store: &Store,
    reference: &Reference,
    options: &RegistryOptions,
    progress: OnTransfer<'_>,
) -> Result<StoredImage, RegistryError> {
    let session = Session::open(reference, options, "pull").await?;
    let pull = Pull { writing: open(store).await?, session };
    let (descriptor, bytes, manifest) = pull.manifest().await?;
    let config = pull.config(&manifest).await?;
    pull.layers(&manifest.layers, progress).await?;
    let writing = pull.writing;
    let (media_type, config_type) = (descriptor.media_type, manifest.config.media_type);
    let reference = reference.clone();
    let stored = blocking(move || {
        writing.document(&config_type, &config)?;
        let descriptor = writing.document(&media_type, &bytes)?;
        writing.tag(descriptor, &reference)
    });
    Ok(stored.await?)
}

async fn open(store: &Store) -> Result<Arc<Writing>, RegistryError> {
    let store = store.clone();
    Ok(Arc::new(blocking(move || store.writing()).await?))
}

struct Pull<'a> {
    session: Session<'a>,
    writing: Arc<Writing>,
}

impl Pull<'_> {
    /// The manifest for this platform, everything on the way to it verified.
    async fn manifest(&self) -> Result<(Descriptor, Vec<u8>, Manifest), RegistryError> {
        let reference = self.session.reference;
        let (mut descriptor, mut bytes) = self.first().await?;
        for _ in 0..INDEX_DEPTH {
            match read_document(&descriptor, &bytes)? {
                Document::Manifest(manifest) => {
                    self.check(&manifest, &bytes)?;
                    return Ok((descriptor, bytes, manifest));
                }
                Document::Index(descriptors) => {
                    descriptor = for_platform(descriptors).map_err(|error| self.no_platform(error))?;
                    let what = document_kind(&descriptor.media_type)?;
                    let url = self.session.url(&format!("manifests/{}", descriptor.digest))?;
                    tracing::debug!(%reference, digest = %descriptor.digest, what, "chosen from an index");
                    bytes = self.part(&descriptor, &url, &[&descriptor.media_type]).await?;
                }
            }
        }
        Err(LayoutError::TooDeep.into())
    }

    /// What the name leads to.
    async fn first(&self) -> Result<(Descriptor, Vec<u8>), RegistryError> {
        let Reference { tag, digest, .. } = self.session.reference;
        let pinned = digest.map(|digest| digest.to_string());
        let wanted = pinned.as_deref().or(tag.as_deref()).unwrap_or("latest");
        let url = self.session.url(&format!("manifests/{wanted}"))?;
        let found = self.session.document(&url, &ACCEPTED, DOCUMENT_BYTES).await?;
        let (media_type, bytes) = found.ok_or_else(|| RegistryError::NotFound {
            name: self.session.reference.familiar(),
            registry: self.session.registry(),
        })?;
        let actual = Digest::of(&bytes);
        if let Some(expected) = *digest {
            self.is_digest(expected, actual)?;
        }
        let (digest, size) = (actual, bytes.len() as u64);
        Ok((Descriptor { media_type, digest, size, annotations: Default::default(), platform: None }, bytes))
    }

    /// What a manifest must be before anything of it is fetched.
    fn check(&self, manifest: &Manifest, bytes: &[u8]) -> Result<(), RegistryError> {
        let name = || self.session.reference.familiar();
        check_types(manifest)?;
        let sources: Sources = serde_json::from_slice(bytes)
            .map_err(|source| LayoutError::InvalidDocument { what: "manifest".into(), source })?;
        let is_foreign = |source: &&Source| source.urls.as_ref().is_some_and(|urls| !urls.is_empty());
        if let Some(source) = sources.layers.iter().find(is_foreign) {
            return Err(RegistryError::ForeignLayer { name: name(), digest: source.digest });
        }
        let bytes = manifest.layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add);
        if bytes > Limits::default().total_bytes {
            return Err(RegistryError::TooLarge { name: name(), bytes });
        }
        Ok(())
    }

    /// The configuration, which must fit the manifest.
    async fn config(&self, manifest: &Manifest) -> Result<Vec<u8>, RegistryError> {
        let url = self.session.url(&format!("blobs/{}", manifest.config.digest))?;
        let bytes = self.part(&manifest.config, &url, &[]).await?;
        read_config(manifest, &bytes).map_err(|error| self.no_platform(error))?;
        Ok(bytes)
    }

    /// A document by descriptor, from the store if that has it.
    async fn part(
        &self,
        descriptor: &Descriptor,
        url: &Url,
        accept: &[&str],
    ) -> Result<Vec<u8>, RegistryError> {
        let Descriptor { digest, size, .. } = *descriptor;
        if size > DOCUMENT_BYTES {
            return Err(LayoutError::DocumentTooLarge { what: digest.to_string(), size }.into());
        }
        let store = self.writing.store().clone();
        let known = blocking(move || store.contains(&digest, size).then(|| store.read_blob(&digest))).await;
        // One that is damaged is fetched again.
        if let Some(Ok(bytes)) = known {
            return Ok(bytes);
        }
        let found = self.session.document(url, accept, size).await;
        let registry = self.session.registry();
        let (_, bytes) =
            found?.ok_or_else(|| RegistryError::MissingBlob { registry: registry.clone(), digest })?;
        if (bytes.len() as u64) < size {
            return Err(RegistryError::WrongSize { registry, digest, size, is_more: false });
        }
        self.is_digest(digest, Digest::of(&bytes))?;
        Ok(bytes)
    }

    fn is_digest(&self, expected: Digest, actual: Digest) -> Result<(), RegistryError> {
        if expected == actual {
            return Ok(());
        }
        Err(RegistryError::WrongDigest { registry: self.session.registry(), expected, actual })
    }

    fn no_platform(&self, error: LayoutError) -> RegistryError {
        match error {
            LayoutError::NoPlatform { mut available } => {
                // `unknown/unknown` is what attestations are for.
                available.retain(|platform| platform != "unknown/unknown");
                available.dedup();
                RegistryError::NoPlatform { name: self.session.reference.familiar(), available }
            }
            other => other.into(),
        }
    }

    /// All layers, some at a time.
    async fn layers(&self, layers: &[Descriptor], progress: OnTransfer<'_>) -> Result<(), RegistryError> {
        let meter = Meter::new(layers, progress);
        let mut seen = HashSet::new();
        let mut missing = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            let mut meter = meter.layer(index, layer);
            // One that is there twice is fetched once.
            if !seen.insert((layer.digest, layer.size))
                || self.writing.store().contains(&layer.digest, layer.size)
            {
                meter.present();
            } else {
                missing.push((layer, meter));
            }
        }
        let mut missing = missing.into_iter();
        let mut running = FuturesUnordered::new();
        loop {
            while running.len() < self.session.options.parallel.max(1) {
                let Some((layer, meter)) = missing.next() else { break };
                running.push(self.layer(layer, meter));
            }
            match running.next().await {
                Some(done) => done?,
                None => return Ok(()),
            }
        }
    }

    /// One layer, to its end, however often the connection breaks.
    async fn layer(&self, layer: &Descriptor, mut meter: BlobMeter<'_>) -> Result<(), RegistryError> {
        let url = self.session.url(&format!("blobs/{}", layer.digest))?;
        let mut retry = Retry::new(self.session.options);
        let mut blob = None;
        let mut last_failure = 0;
        loop {
            match self.try_layer(&url, layer, &mut blob, &mut meter).await {
                Ok(()) => break,
                Err(failure) => {
                    let reached = blob.as_ref().map_or(0, BlobWriter::size);
                    if reached >= last_failure + PROGRESS_BYTES {
                        retry.forget();
                        last_failure = reached;
                    }
                    retry.wait(failure).await?;
                }
            }
        }
        let expected = (layer.digest, layer.size);
        let finished = match blob {
            Some(blob) => blocking(move || blob.finish(Some(expected))).await,
            None => return Ok(()),
        };
        match finished {
            Err(StoreError::WrongDigest { expected, actual }) => self.is_digest(expected, actual),
            finished => finished.map(drop).map_err(RegistryError::from),
        }
    }

    /// Fetches what `blob` lacks of a layer.
    async fn try_layer(
        &self,
        url: &Url,
        layer: &Descriptor,
        blob: &mut Option<BlobWriter>,
        meter: &mut BlobMeter<'_>,
    ) -> Result<(), Failure> {
        let start = blob.as_ref().map_or(0, BlobWriter::size);
        let range = (start > 0).then(|| (RANGE, format!("bytes={start}-")));
        let mut response = self.session.try_send(Method::GET, url, range.as_slice(), None).await?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if start > 0 && begins_at(&response, start) => {}
            // It does not know of ranges, or not of this one: all anew.
            StatusCode::OK => *blob = None,
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE if start > 0 => {
                *blob = None;
                let error = self.session.unexpected(response, "continue a layer").await;
                return Err(Failure::transient(error));
            }
            StatusCode::NOT_FOUND => {
                let registry = self.session.registry();
                return Err(RegistryError::MissingBlob { registry, digest: layer.digest }.into());
            }
            _ => return Err(self.session.unexpected(response, "give a layer").await.into()),
        }
        let mut writer = match blob.take() {
            Some(blob) => blob,
            None => {
                let writing = self.writing.clone();
                blocking(move || writing.blob()).await.map_err(RegistryError::from)?
            }
        };
        let mut received = writer.size();
        meter.moved(received);
        let mut batch = Vec::new();
        let outcome = loop {
            let chunk = match self.session.chunk(&mut response).await {
                Ok(Some(chunk)) => chunk,
                Ok(None) if received < layer.size => {
                    break Err(Failure::transient(self.wrong_size(layer, false)));
                }
                Ok(None) => break Ok(()),
                // All of it is there, however the connection ended.
                Err(Failure::Transient { .. }) if received == layer.size => break Ok(()),
                Err(failure) => break Err(failure),
            };
            received = received.saturating_add(chunk.len() as u64);
            if received > layer.size {
                return Err(self.wrong_size(layer, true).into());
            }
            batch.extend_from_slice(&chunk);
            meter.moved(received);
            if batch.len() >= BATCH_BYTES {
                writer = write(writer, std::mem::take(&mut batch)).await?;
            }
        };
        *blob = Some(write(writer, batch).await?);
        outcome
    }

    fn wrong_size(&self, layer: &Descriptor, is_more: bool) -> RegistryError {
        let registry = self.session.registry();
        RegistryError::WrongSize { registry, digest: layer.digest, size: layer.size, is_more }
    }
}

/// Writes and hashes where that may take its time.
async fn write(mut blob: BlobWriter, bytes: Vec<u8>) -> Result<BlobWriter, RegistryError> {
    Ok(blocking(move || blob.append(&bytes).map(|()| blob)).await?)
}

/// Whether a part of a body begins where it should.
fn begins_at(response: &Response, start: u64) -> bool {
    let range = header(response.headers(), CONTENT_RANGE.as_str());
    let range = range.as_deref().and_then(|range| range.trim().strip_prefix("bytes "));
    range.and_then(|range| range.split('-').next()).is_some_and(|first| first.trim().parse() == Ok(start))
}
