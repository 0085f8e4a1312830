//! From an image on disk to a cached root file system.

use std::collections::HashSet;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::cache::{Cache, ENDING, Scratch};
use crate::config::{Descriptor, ImageConfig};
use crate::digest::{Digest, HashingReader};
use crate::error::ImageError;
use crate::layer::LayerError;
use crate::layer::pump::{self, Compression, PumpReader};
use crate::layer::tar::{Stream, TarReader};
use crate::layout::{Layer, Layout};
use crate::limits::Limits;
use crate::rootfs::erofs::{FORMAT_VERSION, looks_whole, write_metadata};
use crate::rootfs::flatten::{Usage, apply_layer};
use crate::rootfs::output::ImageOutput;
use crate::rootfs::tree::Tree;
use crate::store::Store;

/// How long a root file system is left alone after it was asked for.
const IN_USE: Duration = Duration::from_secs(3600);
const PROGRESS_STEP: u64 = 1 << 20;

/// How far the work is; only told when there is work, not on a cached image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The layer being read, counted from 1.
    pub layer: usize,
    /// How many there are.
    pub layers: usize,
    /// Bytes of layers read, as stored, all layers together.
    pub bytes: u64,
    /// Bytes of all layers, as stored.
    pub total_bytes: u64,
}

/// An image that a machine can start from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedImage {
    /// The EROFS image: read-only, shared, named by its content.
    pub root_file_system: PathBuf,
    /// What the image says about its process.
    pub config: ImageConfig,
    /// The manifest's digest, `sha256:…`; of a Docker archive, which has none, the configuration's.
    pub digest: String,
    /// The image's name as it calls itself, else the source's file name.
    pub name: String,
}

/// Makes root file systems.
#[derive(Debug, Clone, Copy)]
pub struct RootFileSystem;

impl RootFileSystem {
    /// Prepares the image at `source` (an OCI layout directory, an OCI archive, plain or compressed, or an archive of
    /// `docker save`) with the default [`Limits`].
    ///
    /// `tag` chooses among several images. The result lies in `cache_dir`, which is made if needed; a second call
    /// reads the image's manifest only. Blocking; safe to run in several processes at once.
    ///
    /// # Errors
    /// [`ImageError`], with a hint for the user where there is one. Nothing half-made is left.
    pub fn prepare(
        source: &Path,
        tag: Option<&str>,
        cache_dir: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<PreparedImage, ImageError> {
        Self::prepare_within(source, tag, cache_dir, progress, &Limits::default())
    }

    /// As [`RootFileSystem::prepare`], with bounds of the caller's.
    ///
    /// # Errors
    /// As [`RootFileSystem::prepare`].
    pub fn prepare_within(
        source: &Path,
        tag: Option<&str>,
        cache_dir: &Path,
        progress: &mut dyn FnMut(Progress),
        limits: &Limits,
    ) -> Result<PreparedImage, ImageError> {
        let cache = Cache::open(cache_dir)?;
        let layout = Layout::open(source, limits, &mut || cache.unnamed())?;
        let image = layout.image(tag)?;
        let target = prepare_layers(&layout, &image.layers, &cache, progress, limits)?;
        Ok(PreparedImage {
            root_file_system: target,
            digest: image.digest.to_string(),
            name: image.name,
            config: image.config,
        })
    }
}

/// The root file system of these layers, made if it is not there.
fn prepare_layers(
    layout: &Layout,
    layers: &[Layer],
    cache: &Cache,
    progress: &mut dyn FnMut(Progress),
    limits: &Limits,
) -> Result<PathBuf, ImageError> {
    let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id).collect();
    let key = key(&diff_ids);
    let target = cache.path(&key.hex());
    match File::open(&target) {
        // Told that it was used: `prune` leaves alone what was lately.
        Ok(file) if looks_whole(&file).unwrap_or(false) => drop(file.set_modified(SystemTime::now())),
        _ => flatten(layout, layers, &key, cache, progress, limits)?.publish(&target)?,
    }
    Ok(target)
}

impl RootFileSystem {
    /// Prepares the root file system of some of the store's layers, lowest first, each with its uncompressed digest.
    ///
    /// # Errors
    /// As [`RootFileSystem::prepare`].
    pub fn of_layers(
        store: &Store,
        layers: &[(Descriptor, Digest)],
        cache_dir: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<PathBuf, ImageError> {
        let cache = Cache::open(cache_dir)?;
        let limits = Limits::default();
        let layout = Layout::open(store.path(), &limits, &mut || cache.unnamed())?;
        let layers = layers.iter().map(|(descriptor, diff_id)| layout.layer(descriptor, *diff_id));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        prepare_layers(&layout, &layers, &cache, progress, &limits)
    }

    /// Where the root file system of these layers lies once it was prepared; layers by their uncompressed digest, lowest
    /// first.
    pub fn path(cache_dir: &Path, diff_ids: &[Digest]) -> PathBuf {
        cache_dir.join(format!("{}.{ENDING}", key(diff_ids).hex()))
    }

    /// Removes the root file systems that are not among `keep` and were not used within the last hour, in which a sandbox
    /// may be about to be made from them; how many, and their bytes on the disk.
    ///
    /// # Errors
    /// If the cache cannot be read or one cannot be removed.
    pub fn prune(
        cache_dir: &Path,
        keep: &HashSet<PathBuf>,
        dry_run: bool,
    ) -> Result<(usize, u64), ImageError> {
        let (mut count, mut bytes) = (0, 0);
        let failed = |source| ImageError::cache("read", cache_dir, source);
        for (path, metadata) in prepared(cache_dir).map_err(failed)? {
            let used = metadata.modified().ok().and_then(|time| time.elapsed().ok());
            if keep.contains(&path) || used.is_some_and(|since| since < IN_USE) {
                continue;
            }
            if !dry_run {
                std::fs::remove_file(&path).map_err(|source| ImageError::cache("remove", &path, source))?;
            }
            count += 1;
            bytes += metadata.blocks() * 512;
        }
        Ok((count, bytes))
    }

    /// Bytes on the disk of all that was prepared.
    ///
    /// # Errors
    /// If the cache cannot be read.
    pub fn disk_bytes(cache_dir: &Path) -> io::Result<u64> {
        Ok(prepared(cache_dir)?.iter().map(|(_, metadata)| metadata.blocks() * 512).sum())
    }
}

/// The whole root file systems of a cache; none if there is no cache yet.
fn prepared(cache_dir: &Path) -> io::Result<Vec<(PathBuf, Metadata)>> {
    let entries = match std::fs::read_dir(cache_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == ENDING)
            && let Ok(metadata) = path.symlink_metadata()
        {
            found.push((path, metadata));
        }
    }
    Ok(found)
}

/// Splits `PATH:TAG`. A path that exists as it stands has no tag.
pub fn split_reference(text: &str) -> (PathBuf, Option<String>) {
    let whole = PathBuf::from(text);
    if whole.exists() {
        return (whole, None);
    }
    // A tag may hold colons itself, if it is a full name: the shortest path that exists wins.
    for (place, _) in text.match_indices(':') {
        let (path, tag) = (&text[..place], &text[place + 1..]);
        if !tag.is_empty() && Path::new(path).exists() {
            return (path.into(), Some(tag.into()));
        }
    }
    (whole, None)
}

/// What the root file system is a function of.
fn key(diff_ids: &[Digest]) -> Digest {
    let mut text = format!("agentkernel root file system {FORMAT_VERSION}\n");
    for diff_id in diff_ids {
        text.push_str(&format!("{diff_id}\n"));
    }
    Digest::of(text.as_bytes())
}

fn flatten(
    layout: &Layout,
    image_layers: &[Layer],
    key: &Digest,
    cache: &Cache,
    progress: &mut dyn FnMut(Progress),
    limits: &Limits,
) -> Result<Scratch, ImageError> {
    let scratch = cache.scratch()?;
    let clone =
        scratch.file.try_clone().map_err(|source| ImageError::cache("open", cache.path("new"), source))?;
    let mut output = ImageOutput::new(clone, cache.unnamed()?);
    let mut tree = Tree::new(limits.metadata_bytes);
    let mut usage = Usage::default();
    let layers = image_layers.len();
    let mut state = Progress { layer: 0, layers, bytes: 0, total_bytes: 0 };
    state.total_bytes = image_layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add);
    for (index, layer) in image_layers.iter().enumerate() {
        state.layer = index + 1;
        let before = state.bytes;
        read_layer(layout, layer, &mut tree, &mut output, &mut usage, limits, &mut |bytes| {
            state.bytes = before + bytes;
            progress(state);
        })
        .map_err(|source| layer_error(cache, index, layers, layer, source))?;
        state.bytes = before.saturating_add(layer.size);
        progress(state);
    }
    let failed = |source| ImageError::cache("write", cache.path("new"), source);
    let (file, spool, end) = output.finish().map_err(failed)?;
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&key.bytes()[..16]);
    write_metadata(&tree, &file, &spool, end, uuid).map_err(failed)?;
    Ok(scratch)
}

fn layer_error(cache: &Cache, index: usize, layers: usize, layer: &Layer, source: LayerError) -> ImageError {
    match source {
        LayerError::Write { source } => ImageError::cache("write", cache.path("new"), source),
        source => ImageError::Layer { index: index + 1, layers, layer: layer.name.clone(), source },
    }
}

fn read_layer(
    layout: &Layout,
    layer: &Layer,
    tree: &mut Tree,
    output: &mut ImageOutput,
    usage: &mut Usage,
    limits: &Limits,
    progress: &mut dyn FnMut(u64),
) -> Result<(), LayerError> {
    let blob = layout.open_layer(layer)?;
    std::thread::scope(|scope| {
        let stream = pump::start(scope, blob, layer.digest.is_some(), *limits);
        let stream = Observed { stream, progress, told: 0 };
        // An uncompressed layer's two digests are one: it is hashed once.
        let hashed = layer.digest != Some(layer.diff_id);
        let hashing = if hashed { HashingReader::new(stream) } else { HashingReader::counting(stream) };
        let mut reader = TarReader::new(Stream(hashing));
        let applied = apply_layer(tree, &mut reader, output, usage, limits);
        let mut hashing = reader.into_input().0;
        if let Err(error) = applied {
            return Err(hashing.get_mut().stream.take_error().unwrap_or(error));
        }
        finish(layer, hashing)
    })
}

/// Reads what follows the tar's end and holds both digests against what was promised.
fn finish(layer: &Layer, mut hashing: HashingReader<Observed<'_>>) -> Result<(), LayerError> {
    if let Err(source) = io::copy(&mut hashing, &mut io::sink()) {
        return Err(hashing.get_mut().stream.take_error().unwrap_or(LayerError::Read { source }));
    }
    let (observed, actual_diff_id) = hashing.finish();
    let (actual, compression) = observed.stream.finish()?;
    if let (Some(expected), Some(actual)) = (layer.digest, actual)
        && expected != actual
    {
        return Err(LayerError::WrongDigest { expected, actual });
    }
    let expected = layer.diff_id;
    match actual_diff_id {
        Some(actual) if actual != expected => Err(LayerError::WrongDiffId { expected, actual }),
        // The blob's digest was taken for the content's, which holds only if the two are the same bytes.
        None if compression != Compression::None => match actual {
            Some(actual) => Err(LayerError::WrongDiffId { expected, actual }),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

/// Tells the progress while the stream is read.
struct Observed<'a> {
    stream: PumpReader,
    progress: &'a mut dyn FnMut(u64),
    told: u64,
}

impl Read for Observed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(buffer)?;
        let now = self.stream.blob_bytes();
        if now >= self.told + PROGRESS_STEP {
            self.told = now;
            (self.progress)(now);
        }
        Ok(read)
    }
}
