//! Layers as those know them who make and send them: whole items in place of tar entries and marker files.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;

use tar::{EntryType, Header};

use super::LayerError;
use super::path::{Marker, components, marker};
use super::tar::{EntryKind, Input, Metadata, TarReader};

const BLOCK: usize = 512;
/// Bytes of a name, and of a link's target, that a header itself holds (POSIX ustar).
const NAME_FIELD: usize = 100;
/// Largest owner, and largest time, that a header's field holds in octal digits.
const OWNER_FIELD: u32 = 0o7_777_777;
const SIZE_FIELD: u64 = 0o77_777_777_777;

/// One thing that a layer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerItem {
    /// There is an object here.
    Node {
        /// Relative to the root, without `.`, `..` and doubled slashes; empty for the root itself.
        path: Vec<u8>,
        /// Owner, mode, time, extended attributes.
        metadata: Metadata,
        /// What it is.
        kind: NodeKind,
    },
    /// Another name of an earlier object.
    HardLink {
        /// The other name.
        path: Vec<u8>,
        /// The earlier one.
        target: Vec<u8>,
    },
    /// What lower layers hold here is gone.
    Whiteout {
        /// The path.
        path: Vec<u8>,
    },
    /// What lower layers hold in this directory is gone.
    Opaque {
        /// The directory.
        path: Vec<u8>,
    },
}

/// What an object is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeKind {
    /// A regular file of so many bytes.
    File(u64),
    /// A directory.
    Directory,
    /// A symbolic link and where it points.
    Symlink(Vec<u8>),
    /// A character device.
    CharacterDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A FIFO.
    Fifo,
}

/// Bytes of a file, and a way past them.
struct Whole {
    file: Arc<File>,
    position: u64,
}

impl Read for Whole {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = std::os::unix::fs::FileExt::read_at(&*self.file, buffer, self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl Input for Whole {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        self.position += count;
        Ok(())
    }
}

/// Reads an uncompressed layer.
pub struct LayerReader {
    reader: TarReader<Whole>,
    /// Whiteouts are not what they are called in an archive that is no layer.
    markers: bool,
}

impl LayerReader {
    /// The layer in `file`, from its start.
    pub fn new(file: File) -> Self {
        Self { reader: TarReader::new(Whole { file: Arc::new(file), position: 0 }), markers: true }
    }

    /// The archive in `file`, uncompressed: no name has a meaning of its own.
    pub fn archive(file: File) -> Self {
        Self { markers: false, ..Self::new(file) }
    }

    /// The next item, or `None` at the end. Data that was not read is passed over.
    ///
    /// # Errors
    /// If the layer is damaged, or holds what no layer of ours does: sparse files.
    pub fn next_item(&mut self) -> Result<Option<LayerItem>, LayerError> {
        loop {
            let Some(entry) = self.reader.next_entry()? else { return Ok(None) };
            let parts = components(&entry.name)?;
            let path = parts.join(&b'/');
            if let (true, Some((last, parents))) = (self.markers, parts.split_last()) {
                let invalid = || LayerError::invalid(&entry.name, "bad name of a whiteout");
                match marker(last).ok_or_else(invalid)? {
                    Marker::None => {}
                    Marker::Whiteout(name) => {
                        let path = parents.iter().copied().chain([name]).collect::<Vec<_>>().join(&b'/');
                        return Ok(Some(LayerItem::Whiteout { path }));
                    }
                    Marker::Opaque => return Ok(Some(LayerItem::Opaque { path: parents.join(&b'/') })),
                    Marker::Ignored => continue,
                }
            }
            let kind = match entry.kind {
                EntryKind::HardLink(target) => {
                    let target = components(&target)?.join(&b'/');
                    return Ok(Some(LayerItem::HardLink { path, target }));
                }
                EntryKind::File { sparse: true, .. } => {
                    return Err(LayerError::invalid(&entry.name, "a sparse file"));
                }
                EntryKind::File { size, .. } => NodeKind::File(size),
                EntryKind::Directory => NodeKind::Directory,
                EntryKind::Symlink(target) => NodeKind::Symlink(target),
                EntryKind::CharacterDevice { major, minor } => NodeKind::CharacterDevice { major, minor },
                EntryKind::BlockDevice { major, minor } => NodeKind::BlockDevice { major, minor },
                EntryKind::Fifo => NodeKind::Fifo,
            };
            return Ok(Some(LayerItem::Node { path, metadata: entry.metadata, kind }));
        }
    }

    /// Where the current file's data begins in the layer; only before it is read.
    pub fn position(&self) -> u64 {
        self.reader.data_range().0
    }

    /// Data of the current file; 0 at its end.
    ///
    /// # Errors
    /// If the layer is damaged.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        self.reader.read(buffer)
    }
}

/// Writes a layer: a tar of which every byte follows from what is put in. Times are whole seconds, as in the layers of
/// other builders.
pub struct LayerWriter<W> {
    output: W,
    /// No time is later than this, seconds since 1970: `SOURCE_DATE_EPOCH`.
    latest: Option<i64>,
    /// Bytes of the current file still to come, and what fills its last block up.
    remaining: u64,
    padding: usize,
    items: u64,
}

impl<W: Write> LayerWriter<W> {
    /// A layer on `output`, with no time later than `latest`.
    pub fn new(output: W, latest: Option<i64>) -> Self {
        Self { output, latest, remaining: 0, padding: 0, items: 0 }
    }

    /// How many items were put in.
    pub fn items(&self) -> u64 {
        self.items
    }

    /// Puts an item in. Of a file, exactly its size must follow by [`LayerWriter::data`].
    ///
    /// # Errors
    /// If the output takes no more, the file before lacks data, or the name begins with `.wh.`.
    pub fn item(&mut self, item: &LayerItem) -> io::Result<()> {
        let marker = |path: &[u8], prefix: &[u8]| match path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => [&path[..=slash], prefix, &path[slash + 1..]].concat(),
            None => [prefix, path].concat(),
        };
        // In a layer it would take away what lower ones hold.
        if let LayerItem::Node { path, .. } | LayerItem::HardLink { path, .. } = item
            && path.split(|byte| *byte == b'/').any(|name| name.starts_with(b".wh."))
        {
            let shown = String::from_utf8_lossy(path).into_owned();
            let message = format!("`{shown}` is a name that no image can hold: it begins with `.wh.`");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let none = Metadata { mode: 0, ..Metadata::default() };
        match item {
            LayerItem::Node { path, metadata, kind } => {
                let (entry, target, size, device): (_, &[u8], _, _) = match kind {
                    NodeKind::File(size) => (EntryType::Regular, b"", *size, None),
                    NodeKind::Directory => (EntryType::Directory, b"", 0, None),
                    NodeKind::Symlink(target) => (EntryType::Symlink, target, 0, None),
                    NodeKind::CharacterDevice { major, minor } => {
                        (EntryType::Char, b"", 0, Some((*major, *minor)))
                    }
                    NodeKind::BlockDevice { major, minor } => {
                        (EntryType::Block, b"", 0, Some((*major, *minor)))
                    }
                    NodeKind::Fifo => (EntryType::Fifo, b"", 0, None),
                };
                let mut name = if path.is_empty() { b".".to_vec() } else { path.clone() };
                if entry == EntryType::Directory {
                    name.push(b'/');
                }
                self.header(entry, &name, target, metadata, size, device)
            }
            LayerItem::HardLink { path, target } => {
                self.header(EntryType::Link, path, target, &none, 0, None)
            }
            LayerItem::Whiteout { path } => {
                self.header(EntryType::Regular, &marker(path, b".wh."), b"", &none, 0, None)
            }
            LayerItem::Opaque { path } => {
                let mut name = path.clone();
                if !name.is_empty() {
                    name.push(b'/');
                }
                name.extend_from_slice(b".wh..wh..opq");
                self.header(EntryType::Regular, &name, b"", &none, 0, None)
            }
        }
    }

    /// The next bytes of the last file.
    ///
    /// # Errors
    /// If they are more than its size, or the output takes no more.
    pub fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() as u64 > self.remaining {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "more data than a file's size"));
        }
        self.output.write_all(bytes)?;
        self.remaining -= bytes.len() as u64;
        if self.remaining == 0 {
            let padding = std::mem::take(&mut self.padding);
            self.output.write_all(&[0; BLOCK][..padding])?;
        }
        Ok(())
    }

    /// Ends the layer.
    ///
    /// # Errors
    /// If the output takes no more, or the last file lacks data.
    pub fn finish(mut self) -> io::Result<W> {
        self.check_whole()?;
        self.output.write_all(&[0; 2 * BLOCK])?;
        self.output.flush()?;
        Ok(self.output)
    }

    fn check_whole(&self) -> io::Result<()> {
        if self.remaining > 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "less data than a file's size"));
        }
        Ok(())
    }

    fn header(
        &mut self,
        kind: EntryType,
        name: &[u8],
        target: &[u8],
        metadata: &Metadata,
        size: u64,
        device: Option<(u32, u32)>,
    ) -> io::Result<()> {
        self.check_whole()?;
        self.items += 1;
        let time = self.latest.map_or(metadata.mtime, |latest| metadata.mtime.min(latest));
        let mut records = Vec::new();
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(u32::from(metadata.mode));
        let fields = header.as_old_mut();
        for (field, value, key) in
            [(&mut fields.name, name, "path"), (&mut fields.linkname, target, "linkpath")]
        {
            let shown = value.len().min(NAME_FIELD);
            field[..shown].copy_from_slice(&value[..shown]);
            if value.len() > NAME_FIELD || !value.is_ascii() {
                record(&mut records, key.as_bytes(), value);
            }
        }
        let number = |value: u64, limit: u64, key: &str, records: &mut Vec<u8>| {
            if value > limit {
                record(records, key.as_bytes(), value.to_string().as_bytes());
            }
            value.min(limit)
        };
        let owner = u64::from(OWNER_FIELD);
        header.set_uid(number(metadata.user.into(), owner, "uid", &mut records));
        header.set_gid(number(metadata.group.into(), owner, "gid", &mut records));
        header.set_size(number(size, SIZE_FIELD, "size", &mut records));
        match u64::try_from(time) {
            Ok(time) if time <= SIZE_FIELD => header.set_mtime(time),
            _ => {
                record(&mut records, b"mtime", time.to_string().as_bytes());
                header.set_mtime(0);
            }
        }
        let (major, minor) = device.unwrap_or((0, 0));
        header.set_device_major(major)?;
        header.set_device_minor(minor)?;
        for (attribute, value) in &metadata.xattrs {
            record(&mut records, &[b"SCHILY.xattr.", attribute.as_slice()].concat(), value);
        }
        if !records.is_empty() {
            let mut extension = Header::new_ustar();
            extension.set_entry_type(EntryType::XHeader);
            extension.as_old_mut().name[..9].copy_from_slice(b"PaxHeader");
            extension.set_mode(0o644);
            extension.set_uid(0);
            extension.set_gid(0);
            extension.set_mtime(0);
            extension.set_size(records.len() as u64);
            extension.set_cksum();
            self.output.write_all(extension.as_bytes())?;
            records.resize(records.len().next_multiple_of(BLOCK), 0);
            self.output.write_all(&records)?;
        }
        header.set_cksum();
        self.output.write_all(header.as_bytes())?;
        self.remaining = size;
        self.padding = (size.next_multiple_of(BLOCK as u64) - size) as usize;
        Ok(())
    }
}

/// Appends a PAX record: its own length in decimal digits, a key, a value.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(format!("{length} ").as_bytes());
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn path() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            4 => prop::collection::vec(any::<u8>().prop_filter("", |byte| !matches!(byte, 0 | b'/' | b'.')), 1..9),
            1 => prop::collection::vec(b'a'..=b'z', 90..200),
        ];
        prop::collection::vec(part, 1..4).prop_map(|parts| parts.join(&b'/'))
    }

    fn item() -> impl Strategy<Value = (LayerItem, Vec<u8>)> {
        let xattrs =
            prop::collection::btree_map("user\\.[a-z]{1,9}", prop::collection::vec(any::<u8>(), 0..40), 0..3);
        let xattrs =
            xattrs.prop_map(|map| map.into_iter().map(|(key, value)| (key.into_bytes(), value)).collect());
        let metadata = (0u16..0o10000, any::<u32>(), any::<u32>(), any::<i64>(), xattrs);
        let metadata = metadata.prop_map(|(mode, user, group, mtime, xattrs)| Metadata {
            mode,
            user,
            group,
            mtime: mtime / 4,
            mtime_nanoseconds: 0,
            xattrs,
        });
        let kind = prop_oneof![
            prop::collection::vec(any::<u8>(), 0..1200)
                .prop_map(|data| (NodeKind::File(data.len() as u64), data)),
            Just((NodeKind::Directory, Vec::new())),
            path().prop_map(|target| (NodeKind::Symlink(target), Vec::new())),
            (0u32..4096, 0u32..1 << 20)
                .prop_map(|(major, minor)| (NodeKind::CharacterDevice { major, minor }, Vec::new())),
            Just((NodeKind::Fifo, Vec::new())),
        ];
        prop_oneof![
            6 => (path(), metadata, kind)
                .prop_map(|(path, metadata, (kind, data))| (LayerItem::Node { path, metadata, kind }, data)),
            1 => (path(), path()).prop_map(|(path, target)| (LayerItem::HardLink { path, target }, Vec::new())),
            1 => path().prop_map(|path| (LayerItem::Whiteout { path }, Vec::new())),
            1 => path().prop_map(|path| (LayerItem::Opaque { path }, Vec::new())),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_written_is_read(items in prop::collection::vec(item(), 0..12)) {
            let mut writer = LayerWriter::new(Vec::new(), None);
            for (item, data) in &items {
                writer.item(item).unwrap();
                data.chunks(700).try_for_each(|chunk| writer.data(chunk)).unwrap();
            }
            let bytes = writer.finish().unwrap();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            let mut reader = LayerReader::new(file);
            for (item, data) in &items {
                prop_assert_eq!(&reader.next_item().unwrap().unwrap(), item);
                let mut read = vec![0; data.len() + 1];
                let mut length = 0;
                loop {
                    match reader.read(&mut read[length..]).unwrap() {
                        0 => break,
                        count => length += count,
                    }
                }
                prop_assert_eq!(&read[..length], &data[..]);
            }
            prop_assert_eq!(reader.next_item().unwrap(), None);
        }
    }
}
