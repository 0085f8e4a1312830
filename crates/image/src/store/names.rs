//! Names: `index.json`, and what the images they mean are.

use rustix::fs::FlockOperation;

use super::{LOCK_PATIENCE, Store, StoreError, Writing, replace};
use crate::config::{ConfigFile, Descriptor, ImageConfig, Index, Manifest, Platform};
use crate::digest::Digest;
use crate::layout::{FULL_NAME, LayoutError, REFERENCE, parse};
use crate::limits::DOCUMENT_BYTES;
use crate::reference::Reference;

/// Shortest beginning of an id that is taken for one.
const ID_DIGITS: usize = 4;

/// An image with a name.
#[derive(Clone, Debug)]
pub struct StoredImage {
    /// Its full name.
    pub name: String,
    /// Digest of its configuration.
    pub image_id: Digest,
    /// Digest of its manifest.
    pub digest: Digest,
    /// When its maker says that it was made, RFC 3339.
    pub created: Option<String>,
    /// Bytes of its layers as stored.
    pub size_bytes: u64,
    /// Layers as stored, lowest first.
    pub layers: Vec<Descriptor>,
    /// Layers once uncompressed, lowest first.
    pub diff_ids: Vec<Digest>,
    /// What it says about its process.
    pub config: ImageConfig,
    /// The manifest.
    pub manifest: Descriptor,
}

/// A name, and what it leads to.
#[derive(Debug)]
pub struct ListedImage {
    /// The full name.
    pub name: String,
    /// The image, or why it cannot be read.
    pub image: Result<StoredImage, StoreError>,
}

impl Store {
    /// Every name, sorted, with the image it means. One that cannot be read is an error of its own.
    ///
    /// # Errors
    /// If `index.json` cannot be read.
    pub fn list(&self) -> Result<Vec<ListedImage>, StoreError> {
        let mut images = Vec::new();
        for descriptor in self.index()?.manifests {
            if let Some(name) = descriptor.annotations.get(REFERENCE).cloned() {
                images.push(ListedImage { name: name.clone(), image: self.describe(name, descriptor) });
            }
        }
        images.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(images)
    }

    /// The image called `text`: a name, or the beginning of an id, `sha256:` before it or not.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Ambiguous`], or if it cannot be read.
    pub fn find(&self, text: &str) -> Result<StoredImage, StoreError> {
        let reference: Result<Reference, _> = text.parse();
        let named = reference.as_ref().ok().map(ToString::to_string);
        let index = self.index()?;
        let is_called = |descriptor: &&Descriptor| descriptor.annotations.get(REFERENCE) == named.as_ref();
        if let (Some(name), Some(descriptor)) = (&named, index.manifests.iter().find(is_called)) {
            return self.describe(name.clone(), descriptor.clone());
        }
        if let Some(found) = self.find_by_id(&index, text)? {
            return Ok(found);
        }
        let wanted = reference?.familiar_repository();
        let mut names = index.manifests.iter().filter_map(|descriptor| descriptor.annotations.get(REFERENCE));
        let near = |name: &&String| {
            let name = name.parse::<Reference>().map(|reference| reference.familiar_repository());
            name.is_ok_and(|name| strsim::damerau_levenshtein(&name, &wanted) <= 2)
        };
        let nearest = names.find(near).and_then(|name| name.parse::<Reference>().ok());
        let nearest = nearest.map(|reference| reference.familiar());
        Err(StoreError::NotFound { name: text.chars().take(200).collect(), nearest })
    }

    /// Takes a name away; its blobs stay until `prune`. True if it was there.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub fn untag(&self, reference: &Reference) -> Result<bool, StoreError> {
        let name = reference.to_string();
        self.change(|descriptors| {
            let before = descriptors.len();
            descriptors.retain(|descriptor| descriptor.annotations.get(REFERENCE) != Some(&name));
            descriptors.len() < before
        })
    }

    /// Gives the image that `existing` is another name, which it takes from whatever had it.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub fn tag(&self, existing: &StoredImage, reference: &Reference) -> Result<(), StoreError> {
        self.name(existing.manifest.clone(), reference)
    }

    fn name(&self, mut descriptor: Descriptor, reference: &Reference) -> Result<(), StoreError> {
        let name = reference.to_string();
        for key in [REFERENCE, FULL_NAME] {
            descriptor.annotations.insert(key.to_owned(), name.clone());
        }
        let platform = Platform { architecture: "amd64".into(), os: "linux".into(), ..Platform::default() };
        descriptor.platform = Some(platform);
        self.change(|descriptors| {
            descriptors.retain(|other| other.annotations.get(REFERENCE) != Some(&name));
            descriptors.push(descriptor.clone());
        })
    }

    /// Changes `index.json` while nobody else does.
    fn change<T>(&self, change: impl FnOnce(&mut Vec<Descriptor>) -> T) -> Result<T, StoreError> {
        let _alone = self.lock("lock", FlockOperation::NonBlockingLockExclusive, LOCK_PATIENCE)?;
        let mut index = self.index()?;
        let answer = change(&mut index.manifests);
        let name = |descriptor: &Descriptor| descriptor.annotations.get(REFERENCE).cloned();
        index.manifests.sort_by_key(name);
        let bytes = serde_json::to_vec(&index)
            .map_err(|source| LayoutError::InvalidDocument { what: "index.json".into(), source })?;
        replace(&self.root.join("index.json"), &bytes)?;
        Ok(answer)
    }

    pub(super) fn index(&self) -> Result<Index, StoreError> {
        let path = self.root.join("index.json");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let media_type = Some("application/vnd.oci.image.index.v1+json".to_owned());
                return Ok(Index { schema_version: 2, media_type, manifests: Vec::new(), layers: None });
            }
            Err(error) => return Err(StoreError::at("read", &path)(error)),
        };
        if bytes.len() as u64 > DOCUMENT_BYTES {
            let size = bytes.len() as u64;
            return Err(LayoutError::DocumentTooLarge { what: "index.json".into(), size }.into());
        }
        Ok(parse("index.json", &bytes)?)
    }

    /// The image that a name's descriptor leads to.
    fn describe(&self, name: String, manifest: Descriptor) -> Result<StoredImage, StoreError> {
        let document: Manifest = self.document("manifest", &manifest.digest)?;
        let file: ConfigFile = self.document("configuration", &document.config.digest)?;
        Ok(StoredImage {
            name,
            image_id: document.config.digest,
            digest: manifest.digest,
            created: file.created,
            size_bytes: document.layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add),
            layers: document.layers,
            diff_ids: file.rootfs.diff_ids,
            config: file.config,
            manifest,
        })
    }

    fn find_by_id(&self, index: &Index, text: &str) -> Result<Option<StoredImage>, StoreError> {
        let prefix = text.strip_prefix("sha256:").unwrap_or(text);
        let is_id = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if prefix.len() < ID_DIGITS || !prefix.bytes().all(is_id) {
            return Ok(None);
        }
        let mut found: Option<StoredImage> = None;
        for descriptor in &index.manifests {
            let Some(name) = descriptor.annotations.get(REFERENCE) else { continue };
            // One that is damaged is nobody's answer here; `list` reports it.
            let Ok(image) = self.describe(name.clone(), descriptor.clone()) else { continue };
            if !image.image_id.hex().starts_with(prefix) && !image.digest.hex().starts_with(prefix) {
                continue;
            }
            if found.as_ref().is_some_and(|other| other.image_id != image.image_id) {
                return Err(StoreError::Ambiguous { prefix: prefix.to_owned() });
            }
            found.get_or_insert(image);
        }
        Ok(found)
    }
}

impl Writing {
    /// Names the image whose manifest is `descriptor`; the name leaves whatever had it.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub fn tag(&self, descriptor: Descriptor, reference: &Reference) -> Result<StoredImage, StoreError> {
        // Nothing gets a name that could not be read again.
        self.store().describe(reference.to_string(), descriptor.clone())?;
        self.store().name(descriptor, reference)?;
        self.store().find(&reference.to_string())
    }
}
