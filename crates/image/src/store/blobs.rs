//! Blobs: written once, verified, never changed.

use std::fs::File;
use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::{Store, StoreError, Writing};
use crate::cache::Scratch;
use crate::config::Descriptor;
use crate::digest::Digest;
use crate::layer::pump::{Compression, Decoder};
use crate::layout::{LayoutError, parse};
use crate::limits::DOCUMENT_BYTES;

/// A blob being written. Dropped unfinished, nothing is left of it.
#[derive(Debug)]
pub struct BlobWriter {
    store: Store,
    scratch: Scratch,
    hasher: Sha256,
    size: u64,
}

impl Store {
    /// Whether there is a blob of that digest and size.
    pub fn contains(&self, digest: &Digest, size: u64) -> bool {
        // Only verified content ever gets such a name, so its size tells whether the disk kept it.
        self.blob_path(digest).metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() == size)
    }

    /// Opens a blob; whoever reads it to its end verifies it.
    ///
    /// # Errors
    /// [`StoreError::MissingBlob`], or whatever keeps it from being opened.
    pub fn open_blob(&self, digest: &Digest) -> Result<File, StoreError> {
        let path = self.blob_path(digest);
        match File::open(&path) {
            Ok(file) => Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(StoreError::MissingBlob { digest: *digest })
            }
            Err(error) => Err(StoreError::at("open", &path)(error)),
        }
    }

    /// A small blob, whole and verified.
    ///
    /// # Errors
    /// If it is missing, damaged or larger than 4 MiB.
    pub fn read_blob(&self, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        let mut bytes = Vec::new();
        let path = self.blob_path(digest);
        let read = self.open_blob(digest)?.take(DOCUMENT_BYTES + 1).read_to_end(&mut bytes);
        read.map_err(StoreError::at("read", &path))?;
        if bytes.len() as u64 > DOCUMENT_BYTES {
            let what = digest.to_string();
            return Err(LayoutError::DocumentTooLarge { what, size: bytes.len() as u64 }.into());
        }
        let actual = Digest::of(&bytes);
        if actual != *digest {
            return Err(StoreError::WrongDigest { expected: *digest, actual });
        }
        Ok(bytes)
    }

    /// Bytes of a layer once uncompressed.
    ///
    /// # Errors
    /// If it is missing or damaged.
    pub fn uncompressed_size(&self, layer: &Descriptor) -> Result<u64, StoreError> {
        let path = self.blob_path(&layer.digest);
        let failed = StoreError::at("read", &path);
        let size = Decoder::new(self.open_blob(&layer.digest)?).and_then(|mut decoder| {
            match decoder.compression() {
                Compression::None => Ok(layer.size),
                _ => io::copy(&mut decoder, &mut io::sink()),
            }
        });
        size.map_err(failed)
    }

    /// A JSON document, verified.
    ///
    /// # Errors
    /// As [`Store::read_blob`], or if it is not what it should be.
    pub(crate) fn document<T: DeserializeOwned>(&self, what: &str, digest: &Digest) -> Result<T, StoreError> {
        Ok(parse(what, &self.read_blob(digest)?)?)
    }
}

impl Writing {
    /// Starts a blob.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub fn blob(&self) -> Result<BlobWriter, StoreError> {
        let scratch = self.ingest.scratch()?;
        Ok(BlobWriter { store: self.store.clone(), scratch, hasher: Sha256::new(), size: 0 })
    }

    /// Adds a whole document.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub fn document(&self, media_type: &str, bytes: &[u8]) -> Result<Descriptor, StoreError> {
        let digest = Digest::of(bytes);
        let size = bytes.len() as u64;
        if !self.store.contains(&digest, size) {
            let mut blob = self.blob()?;
            let path = self.store.blob_path(&digest);
            blob.write_all(bytes).map_err(StoreError::at("write", &path))?;
            blob.finish(Some((digest, size)))?;
        }
        let media_type = media_type.to_owned();
        Ok(Descriptor { media_type, digest, size, annotations: Default::default(), platform: None })
    }

    /// Adds what `source` gives, which must be `expected` if that is known. More than it promises is not read.
    ///
    /// # Errors
    /// If it is something else, cannot be read, or the store cannot be written.
    pub fn copy(
        &self,
        source: impl Read,
        expected: Option<(Digest, u64)>,
    ) -> Result<(Digest, u64), StoreError> {
        let mut blob = self.blob()?;
        let limit = expected.map_or(u64::MAX, |(_, size)| size + 1);
        let path = self.ingest.directory().join("blob");
        io::copy(&mut source.take(limit), &mut blob).map_err(StoreError::at("write", &path))?;
        blob.finish(expected)
    }
}

impl BlobWriter {
    /// Bytes written so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Adds to its end.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.write_all(bytes).map_err(StoreError::at("write", &self.store.root.join("ingest/blob")))
    }

    /// Verifies the blob and makes it visible under its digest.
    ///
    /// # Errors
    /// If it is not what was `expected`, or the store cannot be written; nothing is left of it then.
    pub fn finish(self, expected: Option<(Digest, u64)>) -> Result<(Digest, u64), StoreError> {
        let digest = Digest::from_bytes(self.hasher.finalize().into());
        if let Some((expected, size)) = expected {
            if self.size != size {
                return Err(StoreError::WrongSize { digest: expected, expected: size, actual: self.size });
            }
            if digest != expected {
                return Err(StoreError::WrongDigest { expected, actual: digest });
            }
        }
        if !self.store.contains(&digest, self.size) {
            self.scratch.publish(&self.store.blob_path(&digest))?;
        }
        Ok((digest, self.size))
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.scratch.file.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
