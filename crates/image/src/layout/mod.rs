//! Images as they lie on disk: OCI image layouts in a directory or an archive, and archives of `docker save`.
//!
//! Flow: [`Layout::open`] finds out what the source is ([`storage`] hides the difference), [`Layout::image`] follows
//! `index.json` to one manifest ([`select`] or [`docker`]) and its configuration, [`Layout::open_layer`] gives a
//! layer's bytes. Documents are verified when read; layers by whoever reads them to the end.
//!
//! Blobs are opened by validated digest only, below the layout, following no link.

mod docker;
mod error;
mod select;
mod storage;

use std::fs::File;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::config::{ConfigFile, Descriptor, ImageConfig, Manifest};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::layer::LayerError;
use crate::limits::{DOCUMENT_BYTES, LAYERS, Limits};

pub use error::LayoutError;
pub(crate) use select::{Document, FULL_NAME, REFERENCE, document_kind, for_platform, read_document};
use storage::{Section, SectionReader, Storage};

/// The system that images are chosen for.
const ARCHITECTURE: &str = "amd64";
const OPERATING_SYSTEM: &str = "linux";

/// An opened source of images.
pub(crate) struct Layout {
    storage: Storage,
    /// The source's file name, for images without one.
    name: String,
}

/// One image, resolved.
#[derive(Debug)]
pub(crate) struct Image {
    /// What it is called here, at least its source's file name.
    pub(crate) name: String,
    /// What it calls itself.
    pub(crate) own_name: Option<String>,
    /// Of the manifest; of the configuration in a Docker archive.
    pub(crate) digest: Digest,
    pub(crate) config: ImageConfig,
    /// The configuration as it was read.
    pub(crate) config_document: Vec<u8>,
    /// The manifest's media type, and itself as it was read; a Docker archive has none.
    pub(crate) manifest_document: Option<(String, Vec<u8>)>,
    /// Lowest first.
    pub(crate) layers: Vec<Layer>,
}

/// A layer, not read yet.
#[derive(Debug)]
pub(crate) struct Layer {
    /// For messages.
    pub(crate) name: String,
    /// Of the blob as stored; unknown in a Docker archive.
    pub(crate) digest: Option<Digest>,
    /// Of the content once uncompressed.
    pub(crate) diff_id: Digest,
    /// Bytes as stored.
    pub(crate) size: u64,
    section: Section,
}

impl Layout {
    /// Opens a directory or an archive. A compressed archive is unpacked into a file that `scratch` gives.
    pub(crate) fn open(
        path: &Path,
        limits: &Limits,
        scratch: &mut dyn FnMut() -> Result<File, ImageError>,
    ) -> Result<Self, ImageError> {
        let storage = Storage::open(path, limits, scratch)?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Ok(Self { storage, name })
    }

    /// The image called `tag`, or the only one.
    pub(crate) fn image(&self, tag: Option<&str>) -> Result<Image, LayoutError> {
        if self.storage.find("index.json")?.is_some() {
            return select::image(self, tag);
        }
        if self.storage.is_archive() && self.storage.find("manifest.json")?.is_some() {
            return docker::image(self, tag);
        }
        Err(LayoutError::NotAnImage { path: self.storage.path().to_owned() })
    }

    /// Every image that has a name, or the only one.
    pub(crate) fn images(&self) -> Result<Vec<Image>, LayoutError> {
        if self.storage.find("index.json")?.is_some() {
            return select::images(self);
        }
        if self.storage.is_archive() && self.storage.find("manifest.json")?.is_some() {
            return docker::images(self);
        }
        Err(LayoutError::NotAnImage { path: self.storage.path().to_owned() })
    }

    /// The bytes of a layer as stored.
    pub(crate) fn open_layer(&self, layer: &Layer) -> Result<SectionReader, LayerError> {
        layer.section.reader().map_err(|source| LayerError::Read { source })
    }

    /// A document without a digest, by name.
    fn named_document<T: DeserializeOwned>(&self, name: &'static str) -> Result<T, LayoutError> {
        let section = self.storage.find(name)?.ok_or_else(|| LayoutError::Missing { what: name.into() })?;
        parse(name, &read_section(name, &section)?)
    }

    /// A document by descriptor, verified.
    fn document_bytes(&self, what: &str, descriptor: &Descriptor) -> Result<Vec<u8>, LayoutError> {
        let section = self.blob(descriptor)?;
        let bytes = read_section(what, &section)?;
        let actual = Digest::of(&bytes);
        if actual != descriptor.digest {
            return Err(LayoutError::WrongDigest { expected: descriptor.digest, actual });
        }
        Ok(bytes)
    }

    /// A blob of the size its descriptor promises.
    fn blob(&self, descriptor: &Descriptor) -> Result<Section, LayoutError> {
        let path = format!("blobs/sha256/{}", descriptor.digest.hex());
        let section = self
            .storage
            .find(&path)?
            .ok_or_else(|| LayoutError::Missing { what: format!("blob {}", descriptor.digest) })?;
        if section.length() != descriptor.size {
            return Err(LayoutError::WrongSize {
                digest: descriptor.digest,
                expected: descriptor.size,
                actual: section.length(),
            });
        }
        Ok(section)
    }

    /// A manifest's configuration and layers.
    fn resolve(
        &self,
        own_name: Option<String>,
        descriptor: &Descriptor,
        document: Vec<u8>,
        manifest: &Manifest,
    ) -> Result<Image, LayoutError> {
        check_types(manifest)?;
        let config_document = self.document_bytes("configuration", &manifest.config)?;
        let file = read_config(manifest, &config_document)?;
        let layers = manifest
            .layers
            .iter()
            .zip(&file.rootfs.diff_ids)
            .map(|(descriptor, diff_id)| self.layer(descriptor, *diff_id))
            .collect::<Result<_, _>>()?;
        Ok(Image {
            name: own_name.clone().unwrap_or_else(|| self.name.clone()),
            own_name,
            digest: descriptor.digest,
            config: file.config,
            config_document,
            manifest_document: Some((descriptor.media_type.clone(), document)),
            layers,
        })
    }

    pub(crate) fn layer(&self, descriptor: &Descriptor, diff_id: Digest) -> Result<Layer, LayoutError> {
        Ok(Layer {
            name: descriptor.digest.to_string(),
            digest: Some(descriptor.digest),
            diff_id,
            size: descriptor.size,
            section: self.blob(descriptor)?,
        })
    }
}

/// A whole file as an input that can pass over what is not wanted.
pub(crate) fn section_of(file: std::sync::Arc<File>) -> std::io::Result<SectionReader> {
    Section::whole(file)?.reader()
}

/// Whether a manifest names nothing but a configuration and layers, of kinds that can be read.
///
/// # Errors
/// If it does not.
pub(crate) fn check_types(manifest: &Manifest) -> Result<(), LayoutError> {
    let unsupported = |what, descriptor: &Descriptor| {
        let media_type = descriptor.media_type.clone();
        Err(LayoutError::UnsupportedMediaType { what, media_type })
    };
    if !is_config(&manifest.config.media_type) {
        return unsupported("configuration", &manifest.config);
    }
    for layer in &manifest.layers {
        if layer.media_type.ends_with("+encrypted") {
            return Err(LayoutError::EncryptedLayer { digest: layer.digest });
        }
        if !is_layer(&layer.media_type) {
            return unsupported("layer", layer);
        }
    }
    Ok(())
}

/// Reads a manifest's configuration, whose digest is verified already.
///
/// # Errors
/// If it is invalid, for another system, or does not fit the manifest.
pub(crate) fn read_config(manifest: &Manifest, bytes: &[u8]) -> Result<ConfigFile, LayoutError> {
    let file: ConfigFile = parse("configuration", bytes)?;
    check_platform(&file)?;
    check_layers(manifest.layers.len(), file.rootfs.diff_ids.len())?;
    Ok(file)
}

fn check_platform(file: &ConfigFile) -> Result<(), LayoutError> {
    if file.architecture == ARCHITECTURE && file.os == OPERATING_SYSTEM {
        return Ok(());
    }
    let available = vec![format!("{}/{}", file.os, file.architecture)];
    Err(LayoutError::NoPlatform { available })
}

fn check_layers(layers: usize, diff_ids: usize) -> Result<(), LayoutError> {
    if layers > LAYERS {
        return Err(LayoutError::TooManyLayers { layers });
    }
    if layers != diff_ids {
        return Err(LayoutError::LayerCount { layers, diff_ids });
    }
    Ok(())
}

fn is_config(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json"
    )
}

fn is_layer(media_type: &str) -> bool {
    const OCI: [&str; 2] =
        ["application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.nondistributable.v1.tar"];
    const DOCKER: [&str; 2] = [
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    ];
    let compressed = |base: &[&str], endings: &[&str]| {
        base.iter().any(|base| media_type.strip_prefix(base).is_some_and(|rest| endings.contains(&rest)))
    };
    compressed(&OCI, &["", "+gzip", "+zstd"]) || compressed(&DOCKER, &["", ".gzip", ".zstd"])
}

fn read_section(what: &str, section: &Section) -> Result<Vec<u8>, LayoutError> {
    use std::io::Read;
    if section.length() > DOCUMENT_BYTES {
        return Err(LayoutError::DocumentTooLarge { what: what.into(), size: section.length() });
    }
    let mut bytes = Vec::new();
    let read = section.reader().and_then(|mut reader| reader.read_to_end(&mut bytes));
    read.map_err(|source| LayoutError::Read { what: what.into(), source })?;
    Ok(bytes)
}

pub(crate) fn parse<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, LayoutError> {
    serde_json::from_slice(bytes).map_err(|source| LayoutError::InvalidDocument { what: what.into(), source })
}
