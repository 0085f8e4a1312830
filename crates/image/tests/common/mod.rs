//! Images written by the tests themselves, byte by byte where they must be wrong.

#![allow(dead_code, reason = "each test file uses its part")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use agentkernel_image::{Digest, ImageError, Limits, PreparedImage, RootFileSystem};

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// One tar entry, header and data, with nothing checked.
pub(crate) fn entry(kind: u8, name: &[u8], link: &[u8], data: &[u8]) -> Vec<u8> {
    sized_entry(kind, name, link, data, data.len() as u64)
}

/// As [`entry`], with a size field that may lie.
pub(crate) fn sized_entry(kind: u8, name: &[u8], link: &[u8], data: &[u8], size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::new(kind));
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_device_major(0).unwrap();
    header.set_device_minor(0).unwrap();
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

pub(crate) fn file(name: &str, data: &[u8]) -> Vec<u8> {
    entry(b'0', name.as_bytes(), b"", data)
}

/// A PAX header for the entry after it.
pub(crate) fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut data = Vec::new();
    for (key, value) in records {
        let rest = 3 + key.len() + value.len();
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length += 1;
        }
        data.extend_from_slice(format!("{length} {key}=").as_bytes());
        data.extend_from_slice(value);
        data.push(b'\n');
    }
    entry(b'x', b"pax", b"", &data)
}

/// Entries and the end of a tar.
pub(crate) fn tar(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = entries.concat();
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// A layout directory and a cache beside it, both gone when dropped.
pub(crate) struct Fixture {
    pub(crate) directory: tempfile::TempDir,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("layout/blobs/sha256")).unwrap();
        Self { directory }
    }

    /// An image of uncompressed layers.
    pub(crate) fn image(layers: &[Vec<u8>]) -> Self {
        let fixture = Self::new();
        let manifest = fixture.manifest(layers, |tar| (LAYER.into(), tar.to_vec()));
        fixture.index(&[&manifest]);
        fixture
    }

    pub(crate) fn layout(&self) -> PathBuf {
        self.directory.path().join("layout")
    }

    pub(crate) fn cache(&self) -> PathBuf {
        self.directory.path().join("cache")
    }

    /// Stores a blob; its descriptor without the closing brace.
    pub(crate) fn blob(&self, media_type: &str, bytes: &[u8]) -> String {
        let digest = Digest::of(bytes);
        fs::write(self.layout().join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":{}"#, bytes.len())
    }

    /// Stores layers as `pack` gives them, with configuration and manifest; the manifest's open descriptor.
    pub(crate) fn manifest(&self, layers: &[Vec<u8>], pack: impl Fn(&[u8]) -> (String, Vec<u8>)) -> String {
        self.manifest_for("amd64", layers, pack)
    }

    pub(crate) fn manifest_for(
        &self,
        architecture: &str,
        layers: &[Vec<u8>],
        pack: impl Fn(&[u8]) -> (String, Vec<u8>),
    ) -> String {
        let diff_ids: Vec<_> = layers.iter().map(|layer| format!("\"{}\"", Digest::of(layer))).collect();
        let config = format!(
            r#"{{"architecture":"{architecture}","os":"linux","config":{{"Cmd":["sh"],"Env":["A=b"]}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
            diff_ids.join(",")
        );
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.as_bytes());
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| {
                let (media_type, bytes) = pack(layer);
                self.blob(&media_type, &bytes) + "}"
            })
            .collect();
        let layers = layers.join(",");
        let manifest = format!(r#"{{"schemaVersion":2,"config":{config}}},"layers":[{layers}]}}"#);
        self.blob(MANIFEST, manifest.as_bytes())
    }

    pub(crate) fn index(&self, open_descriptors: &[&str]) {
        let manifests: Vec<_> = open_descriptors.iter().map(|open| format!("{open}}}")).collect();
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, manifests.join(","));
        fs::write(self.layout().join("index.json"), index).unwrap();
        fs::write(self.layout().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    }

    /// The layout as an archive.
    pub(crate) fn archive(&self) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_dir_all(".", self.layout()).unwrap();
        builder.into_inner().unwrap()
    }

    pub(crate) fn prepare(&self) -> Result<PreparedImage, ImageError> {
        self.prepare_from(&self.layout(), None)
    }

    pub(crate) fn prepare_from(&self, source: &Path, tag: Option<&str>) -> Result<PreparedImage, ImageError> {
        self.prepare_within(source, tag, &Limits::default())
    }

    pub(crate) fn prepare_within(
        &self,
        source: &Path,
        tag: Option<&str>,
        limits: &Limits,
    ) -> Result<PreparedImage, ImageError> {
        let prepared = RootFileSystem::prepare_within(source, tag, &self.cache(), &mut |_| {}, limits);
        self.assert_no_scratch();
        prepared
    }

    /// Whatever happened, only whole root file systems are left in the cache.
    pub(crate) fn assert_no_scratch(&self) {
        for entry in fs::read_dir(self.cache()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(name.ends_with(".erofs"), "{name} was left behind");
        }
    }
}

/// An error and all its causes, on one line.
pub(crate) fn chain(error: &ImageError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
