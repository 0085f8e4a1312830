//! Entrances for the fuzz targets in `fuzz/`; built only with `--cfg fuzzing`, as cargo-fuzz does.

use std::fs::File;

use crate::config::{ConfigFile, DockerImage, Index, Manifest};
use crate::layer::LayerError;
use crate::layer::tar::{Input, Stream, TarReader};
use crate::limits::Limits;
use crate::rootfs::erofs::{looks_whole, write_metadata};
use crate::rootfs::flatten::{Usage, apply_layer};
use crate::rootfs::output::{FileShape, FileSink, ImageOutput};
use crate::rootfs::tree::{Data, DeadData, Tree};

/// Small bounds, so that inputs that merely ask for much do not slow the search down.
const LIMITS: Limits = Limits {
    entries: 2000,
    total_bytes: 1 << 22,
    metadata_bytes: 1 << 22,
    compression_ratio: 200,
    ratio_floor_bytes: 1 << 22,
};

/// Reads `data` as up to four layers (split in equal parts, the first byte says how many) into one tree. If all are
/// accepted, the image that comes of it is written to the two scratch files and must be whole.
pub fn layers(data: &[u8], image: &File, spool: &File) {
    let Some((first, data)) = data.split_first() else { return };
    let count = usize::from(first % 4) + 1;
    let mut tree = Tree::new(LIMITS.metadata_bytes);
    let mut usage = Usage::default();
    let (Ok(image_clone), Ok(spool_clone)) = (image.try_clone(), spool.try_clone()) else { return };
    let mut output = Watched(ImageOutput::new(image_clone, spool_clone));
    // Whole blocks: otherwise only the first layer would ever be well-formed.
    for layer in data.chunks((data.len() / count).next_multiple_of(512).max(512)) {
        let mut reader = TarReader::new(Stream(layer));
        if apply_layer(&mut tree, &mut reader, &mut output, &mut usage, &LIMITS).is_err() {
            return;
        }
    }
    let Ok((file, tails, end)) = output.0.finish() else { return };
    if write_metadata(&tree, &file, &tails, end, [0; 16]).is_ok() {
        assert!(looks_whole(&file).unwrap_or(false), "an accepted image is not whole");
    }
}

/// Reads `data` as each of an image's documents.
pub fn documents(data: &[u8]) {
    let _ = serde_json::from_slice::<Index>(data);
    let _ = serde_json::from_slice::<Manifest>(data);
    let _ = serde_json::from_slice::<Vec<DockerImage>>(data);
    let _ = serde_json::from_slice::<ConfigFile>(data);
}

/// Holds the sink's caller to its contract.
struct Watched(ImageOutput);

impl FileSink for Watched {
    type Data = Data;

    fn store<I: Input>(
        &mut self,
        reader: &mut TarReader<I>,
        file: &FileShape<'_>,
        xattr_bytes: u64,
    ) -> Result<Data, LayerError> {
        assert!(file.extents.iter().all(|extent| extent.offset + extent.length <= file.size));
        self.0.store(reader, file, xattr_bytes)
    }

    fn discard(&mut self, dead: DeadData) -> Result<(), LayerError> {
        self.0.discard(dead)
    }
}
