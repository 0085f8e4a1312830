//! From `index.json` to one manifest.

use super::{ARCHITECTURE, Image, Layout, LayoutError, OPERATING_SYSTEM, parse};
use crate::config::{Descriptor, Index, Manifest};
use crate::limits::INDEX_DEPTH;

pub(crate) const REFERENCE: &str = "org.opencontainers.image.ref.name";
pub(crate) const FULL_NAME: &str = "io.containerd.image.name";

/// The image called `tag`, or the only one.
pub(super) fn image(layout: &Layout, tag: Option<&str>) -> Result<Image, LayoutError> {
    let index: Index = layout.named_document("index.json")?;
    check_index(&index)?;
    let candidates = tagged(layout, index.manifests, tag)?;
    let name = candidates.iter().find_map(|descriptor| own_name(descriptor)).map(str::to_owned);
    descend(layout, name, candidates)
}

/// Every image: each name's, or the only one if there is no name.
pub(super) fn images(layout: &Layout) -> Result<Vec<Image>, LayoutError> {
    let index: Index = layout.named_document("index.json")?;
    check_index(&index)?;
    let mut names: Vec<Option<String>> = Vec::new();
    for descriptor in &index.manifests {
        let name = own_name(descriptor).map(str::to_owned);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if names.is_empty() {
        return Err(LayoutError::Empty { path: layout.storage.path().to_owned() });
    }
    let image = |name: Option<String>| {
        let candidates = index.manifests.iter().filter(|descriptor| own_name(descriptor) == name.as_deref());
        descend(layout, name.clone(), candidates.cloned().collect())
    };
    names.into_iter().map(image).collect()
}

/// Follows indexes down to a manifest for this platform.
fn descend(
    layout: &Layout,
    name: Option<String>,
    mut candidates: Vec<Descriptor>,
) -> Result<Image, LayoutError> {
    for _ in 0..INDEX_DEPTH {
        let chosen = for_platform(candidates)?;
        let bytes = layout.document_bytes(document_kind(&chosen.media_type)?, &chosen)?;
        match read_document(&chosen, &bytes)? {
            Document::Index(descriptors) => candidates = descriptors,
            Document::Manifest(manifest) => return layout.resolve(name, &chosen, bytes, &manifest),
        }
    }
    Err(LayoutError::TooDeep)
}

/// What the descriptor of an image leads to.
pub(crate) enum Document {
    /// One manifest for each platform.
    Index(Vec<Descriptor>),
    /// The image's own.
    Manifest(Manifest),
}

/// What to call a document of that type: `index` or `manifest`.
///
/// # Errors
/// If it is neither.
pub(crate) fn document_kind(media_type: &str) -> Result<&'static str, LayoutError> {
    match media_type {
        "application/vnd.oci.image.index.v1+json"
        | "application/vnd.docker.distribution.manifest.list.v2+json" => Ok("index"),
        "application/vnd.oci.image.manifest.v1+json"
        | "application/vnd.docker.distribution.manifest.v2+json" => Ok("manifest"),
        _ => Err(LayoutError::UnsupportedMediaType { what: "manifest", media_type: media_type.to_owned() }),
    }
}

/// Reads the document that `descriptor` leads to, whose digest is verified already.
///
/// # Errors
/// If it is not what its descriptor says.
pub(crate) fn read_document(descriptor: &Descriptor, bytes: &[u8]) -> Result<Document, LayoutError> {
    let what = document_kind(&descriptor.media_type)?;
    if what == "index" {
        let index: Index = parse(what, bytes)?;
        check_index(&index)?;
        check_type(index.media_type.as_deref(), descriptor, what)?;
        return Ok(Document::Index(index.manifests));
    }
    let manifest: Manifest = parse(what, bytes)?;
    check_manifest(&manifest)?;
    check_type(manifest.media_type.as_deref(), descriptor, what)?;
    Ok(Document::Manifest(manifest))
}

/// The descriptors a tag means; without one, all of them if they are one image.
fn tagged(
    layout: &Layout,
    descriptors: Vec<Descriptor>,
    tag: Option<&str>,
) -> Result<Vec<Descriptor>, LayoutError> {
    let path = || layout.storage.path().to_owned();
    if descriptors.is_empty() {
        return Err(LayoutError::Empty { path: path() });
    }
    let Some(tag) = tag else {
        if is_one_image(&descriptors) {
            return Ok(descriptors);
        }
        return Err(LayoutError::SeveralImages { path: path(), names: names(&descriptors) });
    };
    let names = names(&descriptors);
    let chosen: Vec<_> = descriptors.into_iter().filter(|descriptor| is_called(descriptor, tag)).collect();
    match chosen.is_empty() {
        true => Err(LayoutError::UnknownTag { path: path(), tag: tag.chars().take(200).collect(), names }),
        false if is_one_image(&chosen) => Ok(chosen),
        false => Err(LayoutError::SeveralImages { path: path(), names: self::names(&chosen) }),
    }
}

/// Whether descriptors differ in nothing but the platform.
fn is_one_image(descriptors: &[Descriptor]) -> bool {
    let Some(first) = descriptors.first() else { return false };
    let rest = &descriptors[1..];
    rest.iter().all(|other| other.digest == first.digest)
        || (rest.iter().all(|other| own_name(other) == own_name(first))
            && descriptors.iter().all(|descriptor| descriptor.platform.is_some()))
}

/// The full name if there is one: two images may share the tag `latest`.
fn own_name(descriptor: &Descriptor) -> Option<&str> {
    let annotation =
        |key| descriptor.annotations.get(key).map(String::as_str).filter(|name| !name.is_empty());
    annotation(FULL_NAME).or_else(|| annotation(REFERENCE))
}

fn is_called(descriptor: &Descriptor, tag: &str) -> bool {
    let reference = descriptor.annotations.get(REFERENCE).is_some_and(|name| name == tag);
    let full = descriptor.annotations.get(FULL_NAME).is_some_and(|name| {
        name == tag || name.strip_suffix(tag).is_some_and(|rest| rest.ends_with(['/', ':']))
    });
    reference || full || descriptor.digest.to_string() == tag
}

/// What images are called, for a message: short names where they tell the images apart.
fn names(descriptors: &[Descriptor]) -> Vec<String> {
    let reference = |descriptor: &Descriptor| descriptor.annotations.get(REFERENCE).cloned();
    let mut names: Vec<String> = Vec::new();
    for descriptor in descriptors {
        let short = reference(descriptor).filter(|name| {
            descriptors.iter().filter(|other| reference(other).as_ref() == Some(name)).count() == 1
        });
        let name = short.or_else(|| own_name(descriptor).map(str::to_owned));
        let name = name.unwrap_or_else(|| descriptor.digest.to_string());
        if !names.contains(&name) {
            names.push(name.chars().take(200).collect());
        }
        if names.len() == 50 {
            break;
        }
    }
    names
}

/// The descriptor for this platform. One that names no platform may be anything: its configuration will tell.
pub(crate) fn for_platform(candidates: Vec<Descriptor>) -> Result<Descriptor, LayoutError> {
    let rank = |descriptor: &Descriptor| match &descriptor.platform {
        Some(platform) if platform.os != OPERATING_SYSTEM || platform.architecture != ARCHITECTURE => None,
        // Of several for amd64, the one that asks for the least.
        Some(platform) if platform.variant.is_empty() || platform.variant == "v1" => Some((0, String::new())),
        Some(platform) => Some((1, platform.variant.clone())),
        None => Some((2, String::new())),
    };
    let available = candidates.iter().filter_map(|descriptor| descriptor.platform.as_ref()).take(50);
    let available: Vec<_> =
        available.map(|platform| format!("{}/{}", platform.os, platform.architecture)).collect();
    candidates
        .into_iter()
        .filter_map(|descriptor| rank(&descriptor).map(|rank| (rank, descriptor)))
        .min_by(|(left, _), (right, _)| left.cmp(right))
        .map(|(_, descriptor)| descriptor)
        .ok_or(LayoutError::NoPlatform { available })
}

fn check_index(index: &Index) -> Result<(), LayoutError> {
    check_schema(index.schema_version, index.layers.is_some(), "index")
}

fn check_manifest(manifest: &Manifest) -> Result<(), LayoutError> {
    check_schema(manifest.schema_version, manifest.manifests.is_some(), "manifest")
}

fn check_schema(version: u32, is_both: bool, what: &'static str) -> Result<(), LayoutError> {
    if version != 2 {
        return Err(LayoutError::Contradiction { what, reason: "its schema version is not 2" });
    }
    if is_both {
        return Err(LayoutError::Contradiction { what, reason: "it is an index and a manifest at once" });
    }
    Ok(())
}

/// A document that says what it is must say what its descriptor says.
fn check_type(own: Option<&str>, descriptor: &Descriptor, what: &'static str) -> Result<(), LayoutError> {
    match own {
        Some(own) if own != descriptor.media_type => {
            Err(LayoutError::Contradiction { what, reason: "its media type is not its descriptor's" })
        }
        _ => Ok(()),
    }
}
