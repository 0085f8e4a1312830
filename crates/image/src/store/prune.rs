//! What no name leads to is removed; what is there is checked.

use std::collections::HashSet;
use std::fs;
use std::io;

use rustix::fs::FlockOperation;
use serde::Serialize;

use super::{PRUNE_PATIENCE, Store, StoreError};
use crate::config::Manifest;
use crate::digest::{Digest, HashingReader};

/// What [`Store::prune`] removed, or would remove.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// Blobs.
    pub blobs: usize,
    /// Their bytes.
    pub bytes: u64,
}

impl Store {
    /// Removes every blob that neither a name leads to nor `keep` holds.
    ///
    /// # Errors
    /// [`StoreError::Busy`] while blobs are being added; if an image cannot be read, for then nobody knows what it
    /// needs: nothing is removed then.
    pub fn prune(&self, keep: &HashSet<Digest>, dry_run: bool) -> Result<Pruned, StoreError> {
        let _alone = self.lock("in-use", FlockOperation::NonBlockingLockExclusive, PRUNE_PATIENCE)?;
        let mut live = keep.clone();
        for descriptor in self.index()?.manifests {
            let manifest: Manifest = self.document("manifest", &descriptor.digest)?;
            live.extend([descriptor.digest, manifest.config.digest]);
            live.extend(manifest.layers.iter().map(|layer| layer.digest));
        }
        let mut pruned = Pruned::default();
        self.each_blob(|digest, metadata| {
            if !live.contains(&digest) {
                let path = self.blob_path(&digest);
                if !dry_run {
                    fs::remove_file(&path).map_err(StoreError::at("remove", &path))?;
                }
                pruned.blobs += 1;
                pruned.bytes += metadata.len();
            }
            Ok(())
        })?;
        Ok(pruned)
    }

    /// Bytes of all blobs on the disk.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn disk_bytes(&self) -> Result<u64, StoreError> {
        let mut bytes = 0;
        self.each_blob(|_, metadata| {
            bytes += metadata.len();
            Ok(())
        })?;
        Ok(bytes)
    }

    /// Reads every blob and holds its content against its name.
    ///
    /// # Errors
    /// The first that is damaged.
    pub fn verify(&self) -> Result<(), StoreError> {
        self.each_blob(|expected, _| {
            let mut reader = HashingReader::new(self.open_blob(&expected)?);
            io::copy(&mut reader, &mut io::sink())
                .map_err(StoreError::at("read", &self.blob_path(&expected)))?;
            match reader.finish().1 {
                Some(actual) if actual != expected => Err(StoreError::WrongDigest { expected, actual }),
                _ => Ok(()),
            }
        })
    }

    fn each_blob(
        &self,
        mut visit: impl FnMut(Digest, fs::Metadata) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let directory = self.root.join("blobs/sha256");
        for entry in fs::read_dir(&directory).map_err(StoreError::at("read", &directory))? {
            let entry = entry.map_err(StoreError::at("read", &directory))?;
            let digest = format!("sha256:{}", entry.file_name().to_string_lossy()).parse();
            // Nothing else is ever put there; what is, is not ours to judge.
            let (Ok(digest), Ok(metadata)) = (digest, entry.metadata()) else { continue };
            visit(digest, metadata)?;
        }
        Ok(())
    }
}
