//! Images out of the store: an OCI archive that `docker load` reads as well.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::path::Path;

use serde_json::json;

use super::{OCI_LAYOUT, Store, StoreError, StoredImage};
use crate::config::Manifest;
use crate::digest::{Digest, HashingReader};
use crate::layout::{FULL_NAME, LayoutError, REFERENCE};
use crate::reference::Reference;

impl Store {
    /// Writes `images` as one OCI archive. Beside `index.json` it has the `manifest.json` that Docker's older versions
    /// ask for. The same images give the same bytes.
    ///
    /// # Errors
    /// If a blob is missing or damaged, or `output` takes no more.
    pub fn save(&self, images: &[StoredImage], output: impl Write) -> Result<(), StoreError> {
        let mut index = self.index()?;
        index.manifests.clear();
        let mut docker = Vec::new();
        let mut blobs = BTreeSet::new();
        for image in images {
            let reference: Reference = image.name.parse()?;
            let mut descriptor = image.manifest.clone();
            // As other tools have it: the tag alone, and the full name beside it.
            descriptor.annotations.insert(FULL_NAME.into(), image.name.clone());
            descriptor.annotations.insert(REFERENCE.into(), reference.tag.clone().unwrap_or_default());
            index.manifests.push(descriptor);
            let manifest: Manifest = self.document("manifest", &image.digest)?;
            let path = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
            docker.push(json!({
                "Config": path(&manifest.config.digest),
                "RepoTags": reference.tag.is_some().then(|| vec![reference.familiar()]),
                "Layers": manifest.layers.iter().map(|layer| path(&layer.digest)).collect::<Vec<_>>(),
            }));
            blobs.extend([image.digest, manifest.config.digest]);
            blobs.extend(manifest.layers.iter().map(|layer| layer.digest));
        }
        let mut archive = Archive(tar::Builder::new(output));
        archive.document("oci-layout", OCI_LAYOUT.as_bytes())?;
        let invalid = |source| LayoutError::InvalidDocument { what: "index".into(), source };
        archive.document("index.json", &serde_json::to_vec(&index).map_err(invalid)?)?;
        archive.document("manifest.json", &serde_json::to_vec(&docker).map_err(invalid)?)?;
        for digest in blobs {
            self.save_blob(&digest, &mut archive)?;
        }
        archive.0.finish().map_err(StoreError::at("write", Path::new("the archive")))
    }

    fn save_blob<W: Write>(&self, digest: &Digest, archive: &mut Archive<W>) -> Result<(), StoreError> {
        let file = self.open_blob(digest)?;
        let size = file.metadata().map_err(StoreError::at("read", &self.blob_path(digest)))?.len();
        let mut reader = HashingReader::new(file.take(size));
        archive.member(&format!("blobs/sha256/{}", digest.hex()), size, &mut reader)?;
        match reader.finish().1 {
            Some(actual) if actual != *digest => Err(StoreError::WrongDigest { expected: *digest, actual }),
            _ => Ok(()),
        }
    }
}

struct Archive<W: Write>(tar::Builder<W>);

impl<W: Write> Archive<W> {
    fn document(&mut self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.member(name, bytes.len() as u64, &mut io::Cursor::new(bytes))
    }

    fn member(&mut self, name: &str, size: u64, content: &mut dyn Read) -> Result<(), StoreError> {
        let mut header = tar::Header::new_ustar();
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        self.0
            .append_data(&mut header, name, content)
            .map_err(StoreError::at("write", Path::new("the archive")))
    }
}
