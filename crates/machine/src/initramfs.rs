//! The guest's first file system: our agent as `/init`, the modules it loads, and a console to speak on.
//!
//! A newc archive written here, so that no `cpio` is needed and the same input always gives the same bytes.

/// The guest agent, a static program, compiled and embedded by this crate's build script.
pub const GUEST: &[u8] = include_bytes!(env!("AGENTKERNEL_GUEST"));

/// The hash of [`GUEST`], in hexadecimal.
pub const GUEST_SHA256: &str = env!("AGENTKERNEL_GUEST_SHA256");

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const CHARACTER_DEVICE: u32 = 0o020_600;
const HEADER: usize = 110;
/// Archives are padded to whole blocks of this size.
const BLOCK: usize = 512;

/// Builds the archive. `modules` are (name, bytes) in the order in which they are to be loaded; they become
/// `/modules/00-name.ko` and so on, so that sorting their names restores that order.
#[must_use]
pub fn build<'a>(init: &[u8], modules: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    let mut archive = Archive::default();
    for directory in ["dev", "modules", "proc", "sys"] {
        archive.entry(directory, DIRECTORY, (0, 0), &[]);
    }
    archive.entry("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
    archive.entry("init", PROGRAM, (0, 0), init);
    for (index, (name, bytes)) in modules.into_iter().enumerate() {
        archive.entry(&format!("modules/{index:02}-{name}.ko"), FILE, (0, 0), bytes);
    }
    archive.finish()
}

/// How many bytes [`build`] makes of an init and of modules of these lengths.
pub(crate) fn size<'a>(init: usize, modules: impl IntoIterator<Item = (&'a str, usize)>) -> usize {
    let entry = |name: usize, length: usize| align(HEADER + name + 1) + align(length);
    let fixed: usize = ["dev", "modules", "proc", "sys", "dev/console", "TRAILER!!!"]
        .iter()
        .map(|name| entry(name.len(), 0))
        .sum();
    let files: usize =
        modules.into_iter().map(|(name, length)| entry("modules/00-.ko".len() + name.len(), length)).sum();
    (fixed + entry("init".len(), init) + files).next_multiple_of(BLOCK)
}

fn align(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        // Sizes are far below 4 GiB: the largest input is our own program and modules of at most 64 MiB.
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(content);
        self.pad(4);
    }

    fn pad(&mut self, unit: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(unit), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.pad(BLOCK);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn cpio_reads_what_we_write() {
        let archive = build(b"#!init", [("virtio_ring", &b"ring"[..]), ("virtio", &b"virtio!"[..])]);
        let mut cpio = Command::new("cpio")
            .args(["--list", "--quiet", "-F", "/dev/stdin"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("cpio is installed");
        cpio.stdin.take().expect("piped").write_all(&archive).expect("written");
        let output = cpio.wait_with_output().expect("cpio ends");
        assert!(output.status.success());
        let names = String::from_utf8(output.stdout).expect("names");
        let expected =
            "dev\nmodules\nproc\nsys\ndev/console\ninit\nmodules/00-virtio_ring.ko\nmodules/01-virtio.ko\n";
        assert_eq!(names, expected);
    }

    proptest! {
        #[test]
        fn the_size_is_known_beforehand(init in 0..5000_usize, modules in prop::collection::vec(("[a-z0-9_]{1,20}", 0..3000_usize), 0..30)) {
            let content = vec![0_u8; 5000];
            let archive = build(&content[..init], modules.iter().map(|(name, length)| (name.as_str(), &content[..*length])));
            prop_assert_eq!(archive.len(), size(init, modules.iter().map(|(name, length)| (name.as_str(), *length))));
        }
    }
}
