//! The bounds an image must stay within. They exist because every figure in an image is chosen by its author.

/// Largest JSON document read from an image, in bytes.
pub(crate) const DOCUMENT_BYTES: u64 = 4 << 20;
/// How many indexes may be nested before a manifest is reached.
pub(crate) const INDEX_DEPTH: usize = 4;
/// Most layers an image may have; Docker itself stops at 127.
pub(crate) const LAYERS: usize = 1024;
/// Most members an archive may have.
pub(crate) const ARCHIVE_MEMBERS: usize = 200_000;
/// Longest file name, in bytes (also EROFS's own bound).
pub(crate) const NAME_BYTES: usize = 255;
/// Longest path and longest link target, in bytes, as in Linux.
pub(crate) const PATH_BYTES: usize = 4095;
/// Largest value of one extended attribute, in bytes.
pub(crate) const XATTR_VALUE_BYTES: usize = 65_535;
/// All extended attributes of one entry as stored, in bytes.
pub(crate) const XATTRS_BYTES: usize = 128 << 10;
/// Largest PAX header or GNU long name, in bytes.
pub(crate) const EXTENSION_BYTES: u64 = 1 << 20;
/// Most data extents of one sparse file.
pub(crate) const SPARSE_EXTENTS: usize = 1 << 18;
/// Symbolic links followed while one path is resolved, as in Linux.
pub(crate) const SYMLINK_HOPS: usize = 40;

/// Bounds that a caller may want to change; the default suits images of any honest size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Entries in all layers together.
    pub entries: u64,
    /// Uncompressed bytes in all layers together, holes of sparse files included.
    pub total_bytes: u64,
    /// Bytes of names, link targets and extended attributes kept in memory.
    pub metadata_bytes: u64,
    /// How many times larger than its compressed form a layer may be; checked beyond [`Limits::ratio_floor_bytes`].
    pub compression_ratio: u64,
    /// Uncompressed bytes of a layer that are never subject to the ratio.
    pub ratio_floor_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 2_000_000,
            total_bytes: 64 << 30,
            metadata_bytes: 512 << 20,
            compression_ratio: 200,
            ratio_floor_bytes: 1 << 30,
        }
    }
}
