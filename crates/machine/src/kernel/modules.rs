//! Which kernel modules the guest needs, and in which order.
//!
//! A package that was only unpacked has no `modules.dep`, for `depmod` runs at installation. What a module needs is
//! written in the module itself (its `.modinfo`), so that is what is read, wherever the modules come from.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::decompress::{DecompressError, decompress};

/// No module comes near; the largest of Debian's is 12 MB.
const MODULE_LIMIT: usize = 64 << 20;
const SIGNATURE_MAGIC: &[u8] = b"~Module signature appended~\n";

/// A module the guest is to load.
pub(crate) struct Root {
    name: &'static str,
    /// A kernel may do without it: compiled in under another name, or gone from newer kernels.
    optional: bool,
}

const fn required(name: &'static str) -> Root {
    Root { name, optional: false }
}

const fn optional(name: &'static str) -> Root {
    Root { name, optional: true }
}

/// What a machine and its file systems need: the transport, the port, disks, network, then file systems. Checksums come
/// before the file systems that look them up by name, since no `modprobe` answers the kernel's request in the guest.
pub(crate) const ROOTS: &[Root] = &[
    required("virtio_mmio"),
    required("virtio_console"),
    required("virtio_blk"),
    required("virtio_net"),
    required("fuse"),
    required("overlay"),
    optional("crc32c_generic"),
    required("erofs"),
    required("ext4"),
];

/// Why the modules could not be gathered.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// A needed module is neither a file nor compiled in.
    #[error("the kernel has no module {name}, neither as a file under {} nor built in", directory.display())]
    Missing {
        /// The module's name.
        name: String,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// A file or directory cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A compressed module does not unpack.
    #[error("cannot unpack {}", path.display())]
    Unpack {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        source: DecompressError,
    },
    /// Modules that need each other.
    #[error("the module {name} needs itself")]
    Cycle {
        /// One of the circle.
        name: String,
    },
}

/// One module, unpacked, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    pub name: String,
    pub bytes: Vec<u8>,
}

/// The modules of one kernel release: `<directory>/kernel/**.ko[.xz|.zst|.gz]` and `modules.builtin`.
pub(crate) struct Library {
    directory: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
    /// Signatures are cut off where the kernel does not insist on them: checking one costs 20 ms under emulation, and
    /// what is loaded is recorded by hash when it is gathered.
    strip_signatures: bool,
}

/// Module names are the same with `-` and `_`.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn module_name(file_name: &str) -> Option<String> {
    let stem =
        ["", ".xz", ".zst", ".gz"].iter().find_map(|end| file_name.strip_suffix(&format!(".ko{end}")))?;
    Some(canonical(stem))
}

impl Library {
    /// Lists what `directory` (a `/lib/modules/<release>`) has.
    pub(crate) fn open(directory: &Path, strip_signatures: bool) -> Result<Self, ModulesError> {
        let mut files = BTreeMap::new();
        let mut pending = vec![directory.join("kernel")];
        while let Some(folder) = pending.pop() {
            let entries = std::fs::read_dir(&folder)
                .map_err(|source| ModulesError::Read { path: folder.clone(), source })?;
            for entry in entries.flatten() {
                let path = entry.path();
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => pending.push(path),
                    Ok(kind) if kind.is_file() => {
                        if let Some(name) = entry.file_name().to_str().and_then(module_name) {
                            files.insert(name, path);
                        }
                    }
                    _ => {}
                }
            }
        }
        let builtin = std::fs::read_to_string(directory.join("modules.builtin")).unwrap_or_default();
        let builtin =
            builtin.lines().filter_map(|line| module_name(line.rsplit('/').next().unwrap_or(line))).collect();
        Ok(Self { directory: directory.to_owned(), files, builtin, strip_signatures })
    }

    /// `roots` and all they need, each after what it needs.
    pub(crate) fn gather(&self, roots: &[Root]) -> Result<Vec<Module>, ModulesError> {
        let mut gathered = Gathered::default();
        for root in roots {
            self.visit(root.name, root.optional, &mut gathered)?;
        }
        Ok(gathered.modules)
    }

    fn visit(&self, name: &str, optional: bool, gathered: &mut Gathered) -> Result<(), ModulesError> {
        let name = canonical(name);
        if gathered.done.contains(&name) || self.builtin.contains(&name) {
            return Ok(());
        }
        let Some(path) = self.files.get(&name) else {
            if optional {
                return Ok(());
            }
            return Err(ModulesError::Missing { name, directory: self.directory.clone() });
        };
        if !gathered.visiting.insert(name.clone()) {
            return Err(ModulesError::Cycle { name });
        }
        let bytes = self.read(path)?;
        let needs = Needs::read(&bytes);
        for needed in &needs.hard {
            self.visit(needed, false, gathered)?;
        }
        // A soft dependency may name an alias; those that matter are roots of their own.
        for needed in &needs.soft {
            self.visit(needed, true, gathered)?;
        }
        gathered.visiting.remove(&name);
        gathered.done.insert(name.clone());
        gathered.modules.push(Module { name, bytes });
        Ok(())
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>, ModulesError> {
        let bytes = crate::atomic::read(path, MODULE_LIMIT as u64)
            .map_err(|source| ModulesError::Read { path: path.to_owned(), source })?;
        let mut bytes = match path.extension().and_then(|end| end.to_str()) {
            Some("ko") => bytes,
            _ => decompress(&bytes, MODULE_LIMIT)
                .map_err(|source| ModulesError::Unpack { path: path.to_owned(), source })?,
        };
        if self.strip_signatures {
            bytes.truncate(unsigned_length(&bytes));
        }
        Ok(bytes)
    }
}

#[derive(Default)]
struct Gathered {
    modules: Vec<Module>,
    done: BTreeSet<String>,
    visiting: BTreeSet<String>,
}

/// What `.modinfo` says a module needs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Needs {
    hard: Vec<String>,
    soft: Vec<String>,
}

impl Needs {
    /// The section is a row of NUL-ended `key=value` strings; the two keys are told from other bytes by the NUL before
    /// them, which saves reading the ELF section table.
    fn read(module: &[u8]) -> Self {
        let mut needs = Self::default();
        for entry in module.split(|byte| *byte == 0) {
            if let Some(list) = entry.strip_prefix(b"depends=") {
                let list = String::from_utf8_lossy(list);
                needs.hard.extend(list.split(',').filter(|name| !name.is_empty()).map(str::to_owned));
            } else if let Some(list) = entry.strip_prefix(b"softdep=pre: ") {
                let list = String::from_utf8_lossy(list);
                let before = list.split(" post:").next().unwrap_or_default();
                needs.soft.extend(before.split_ascii_whitespace().map(str::to_owned));
            }
        }
        needs
    }
}

/// The length of a module without the signature that may be appended to it.
fn unsigned_length(module: &[u8]) -> usize {
    let cut = || {
        let body = module.strip_suffix(SIGNATURE_MAGIC)?;
        // `struct module_signature`: eight bytes, then the length of the signature before it, big-endian.
        let (body, header) = body.split_last_chunk::<12>()?;
        let length = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
        body.len().checked_sub(length as usize)
    };
    cut().unwrap_or(module.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn module(needs: &str) -> Vec<u8> {
        format!("\x7fELF\0depends={needs}\0license=GPL\0").into_bytes()
    }

    fn library(files: &[(&str, &str)], builtin: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let folder = directory.path().join("kernel/drivers");
        std::fs::create_dir_all(&folder).expect("folders");
        for (name, needs) in files {
            std::fs::write(folder.join(format!("{name}.ko")), module(needs)).expect("a module");
        }
        std::fs::write(directory.path().join("modules.builtin"), builtin).expect("modules.builtin");
        directory
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let directory = library(&[("a-x", "b,c"), ("b", "c"), ("c", "")], "kernel/lib/d.ko\n");
        let library = Library::open(directory.path(), true).expect("opens");
        let order =
            library.gather(&[required("a_x"), required("d"), required("c"), optional("e")]).expect("gathers");
        let names: Vec<_> = order.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["c", "b", "a_x"]);
    }

    #[test]
    fn a_missing_module_and_a_circle_are_named() {
        let directory = library(&[("a", "b"), ("x", "y"), ("y", "x")], "");
        let library = Library::open(directory.path(), true).expect("opens");
        assert!(
            matches!(library.gather(&[required("a")]), Err(ModulesError::Missing { name, .. }) if name == "b")
        );
        assert!(matches!(library.gather(&[required("x")]), Err(ModulesError::Cycle { .. })));
    }

    proptest! {
        #[test]
        fn only_the_signature_is_cut(body in prop::collection::vec(any::<u8>(), 0..200), signature in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut module = body.clone();
            module.extend(&signature);
            module.extend([0; 8]);
            module.extend((signature.len() as u32).to_be_bytes());
            module.extend(SIGNATURE_MAGIC);
            prop_assert_eq!(unsigned_length(&module), body.len());
        }

        #[test]
        fn any_bytes_have_an_unsigned_length(module in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(unsigned_length(&module) <= module.len());
            let _ = Needs::read(&module);
        }
    }
}
