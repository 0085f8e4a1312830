//! Images from layouts and archives into the store.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::{Store, StoreError, StoredImage, Writing};
use crate::cache::Cache;
use crate::config::{Descriptor, Manifest};
use crate::error::ImageError;
use crate::layer::pump::Compression;
use crate::layout::{Image, Layer, Layout, LayoutError};
use crate::limits::Limits;
use crate::prepare::Progress;
use crate::reference::Reference;

/// Media type of an image manifest.
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an image configuration.
pub(crate) const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of an uncompressed layer.
pub(crate) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

impl Store {
    /// Brings the images at `source` in: an OCI layout directory, an OCI archive, plain or compressed, or an archive of
    /// `docker save`. `tag` chooses one of several; `name` is for an image that has no full name of its own, or another
    /// than that.
    ///
    /// # Errors
    /// If one of them is damaged, is for other systems only, or has no name; none is named then.
    pub fn load(
        &self,
        source: &Path,
        tag: Option<&str>,
        name: Option<&Reference>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<StoredImage>, StoreError> {
        let writing = self.writing()?;
        let ingest: &Cache = &writing.ingest;
        let layout = Layout::open(source, &Limits::default(), &mut || ingest.unnamed())?;
        let images = match (tag, name) {
            (None, None) => layout.images()?,
            _ => vec![layout.image(tag)?],
        };
        let mut loaded = Vec::new();
        for image in &images {
            let reference = match (name, &image.own_name) {
                (Some(name), _) => name.clone(),
                // A layout may know a tag only, which says nothing about the repository.
                (None, Some(own)) if own.contains(['/', ':']) => own.parse()?,
                _ => {
                    let image = image.name.clone();
                    return Err(LayoutError::NoName { path: source.to_owned(), image }.into());
                }
            };
            loaded.push((writing.import(&layout, image, progress)?, reference));
        }
        loaded.into_iter().map(|(manifest, reference)| writing.tag(manifest, &reference)).collect()
    }
}

impl Writing {
    /// Copies an image's blobs; its manifest's descriptor.
    fn import(
        &self,
        layout: &Layout,
        image: &Image,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Descriptor, StoreError> {
        let layers = image.layers.len();
        let total_bytes = image.layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add);
        let mut state = Progress { layer: 0, layers, bytes: 0, total_bytes };
        let mut descriptors = Vec::new();
        for (index, layer) in image.layers.iter().enumerate() {
            state.layer = index + 1;
            progress(state);
            let wrong =
                |source| ImageError::Layer { index: index + 1, layers, layer: layer.name.clone(), source };
            let open = || layout.open_layer(layer).map_err(wrong);
            descriptors.push(self.import_layer(layer, &open)?);
            state.bytes = state.bytes.saturating_add(layer.size);
        }
        progress(state);
        let config = self.document(CONFIG, &image.config_document)?;
        match &image.manifest_document {
            Some((media_type, manifest)) => self.document(media_type, manifest),
            // An archive of Docker's own form has none.
            None => {
                let media_type = Some(MANIFEST.to_owned());
                let manifest =
                    Manifest { schema_version: 2, media_type, config, layers: descriptors, manifests: None };
                let bytes = serde_json::to_vec(&manifest)
                    .map_err(|source| LayoutError::InvalidDocument { what: "manifest".into(), source })?;
                self.document(MANIFEST, &bytes)
            }
        }
    }

    fn import_layer<R: Read>(
        &self,
        layer: &Layer,
        open: &dyn Fn() -> Result<R, ImageError>,
    ) -> Result<Descriptor, StoreError> {
        let mut head = Vec::new();
        let read = open()?.take(4).read_to_end(&mut head);
        read.map_err(StoreError::at("read", Path::new(&layer.name)))?;
        let compression = Compression::detect(&head);
        let expected = match (layer.digest, compression) {
            (Some(digest), _) => Some((digest, layer.size)),
            (None, Compression::None) => Some((layer.diff_id, layer.size)),
            // Verified against the configuration once it is uncompressed.
            (None, _) => None,
        };
        let known = expected.filter(|(digest, size)| self.store.contains(digest, *size));
        let (digest, size) = match known {
            Some(known) => known,
            None => self.copy(open()?, expected)?,
        };
        let media_type = format!("{LAYER}{}", compression.media_type_suffix());
        Ok(Descriptor { media_type, digest, size, annotations: Default::default(), platform: None })
    }

    /// A file that is gone with its last descriptor, on the store's disk.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub fn scratch(&self) -> Result<File, StoreError> {
        Ok(self.ingest.unnamed()?)
    }
}
