//! What a boot file holds: a bzImage's setup header, the ELF kernel packed inside it, and whether that can be booted directly.
//!
//! A bzImage unpacks itself in the guest, which under emulation costs seconds (xz: 2.5 s). Unpacked once on the host, the
//! ELF starts through PVH at once. A kernel built without PVH is booted as the bzImage it is.

use super::decompress::{DecompressError, decompress};

/// No kernel comes near; Debian's unpacks to 66 MB.
pub(crate) const KERNEL_LIMIT: usize = 512 << 20;
const BOOT_SECTOR: usize = 512;
const PVH_NOTE: u32 = 18;
const PT_NOTE: u32 = 4;

/// Why a file is no kernel that can be booted.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Neither a bzImage nor an x86-64 ELF file.
    #[error("this is no x86-64 linux kernel")]
    NotAKernel,
    /// An ELF kernel that can only be entered by its own unpacking code.
    #[error("the kernel has no PVH entry (CONFIG_PVH)")]
    NoPvh,
}

/// A kernel as it will be booted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BootImage {
    /// The `uname -r` it was built with.
    pub release: String,
    /// The unpacked ELF; `None`: boot the file as it is.
    pub unpacked: Option<Vec<u8>>,
    /// Why it was not unpacked, for the log.
    pub note: Option<String>,
}

/// Reads `file`, a bzImage or an uncompressed ELF kernel.
pub(crate) fn parse(file: &[u8]) -> Result<BootImage, ImageError> {
    if file.starts_with(b"\x7fELF") {
        if !has_pvh_entry(file) {
            return Err(ImageError::NoPvh);
        }
        let release = banner_release(file).ok_or(ImageError::NotAKernel)?;
        return Ok(BootImage { release, unpacked: None, note: None });
    }
    let release = setup_release(file).ok_or(ImageError::NotAKernel)?;
    let (unpacked, note) = match unpack(file) {
        Ok(elf) if has_pvh_entry(&elf) => (Some(elf), None),
        Ok(_) => (None, Some("it has no PVH entry".to_owned())),
        Err(error) => (None, Some(error.to_string())),
    };
    Ok(BootImage { release, unpacked, note })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// The version string of the setup header: `6.1.0-56-amd64 (debian-kernel@…) …`.
fn setup_release(file: &[u8]) -> Option<String> {
    if file.get(0x202..0x206)? != b"HdrS" && file.get(0x202..0x206)? != b"SrdH" {
        return None;
    }
    let start = usize::from(u16_at(file, 0x20e)?) + BOOT_SECTOR;
    release_at(file, start)
}

/// The banner every kernel carries: `Linux version 6.1.0-56-amd64 (…`.
fn banner_release(elf: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let mut from = 0;
    while let Some(found) = elf[from..].windows(BANNER.len()).position(|window| window == BANNER) {
        from += found + BANNER.len();
        if let Some(release) = release_at(elf, from) {
            return Some(release);
        }
    }
    None
}

fn release_at(bytes: &[u8], start: usize) -> Option<String> {
    let word: Vec<u8> =
        bytes.get(start..)?.iter().copied().take(65).take_while(|byte| byte.is_ascii_graphic()).collect();
    let valid = word.first().is_some_and(u8::is_ascii_digit)
        && word.len() <= 64
        && word.iter().all(|byte| byte.is_ascii_alphanumeric() || b".-_+~".contains(byte));
    valid.then(|| String::from_utf8_lossy(&word).into_owned())
}

/// The payload of boot protocol 2.08 and later.
fn unpack(file: &[u8]) -> Result<Vec<u8>, DecompressError> {
    let payload = payload(file).ok_or(DecompressError::UnknownFormat)?;
    if payload.starts_with(b"\x7fELF") {
        return Ok(payload.to_vec());
    }
    decompress(payload, KERNEL_LIMIT)
}

fn payload(file: &[u8]) -> Option<&[u8]> {
    if u16_at(file, 0x206)? < 0x208 {
        return None;
    }
    let sectors = match *file.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = ((sectors + 1) * BOOT_SECTOR).checked_add(u32_at(file, 0x248)? as usize)?;
    file.get(start..start.checked_add(u32_at(file, 0x24c)? as usize)?)
}

/// Whether an ELF kernel tells where to enter it without its boot code (the note Xen's PVH defined).
pub(crate) fn has_pvh_entry(elf: &[u8]) -> bool {
    pvh_note(elf).is_some()
}

fn pvh_note(elf: &[u8]) -> Option<()> {
    let x86_64 = elf.get(4) == Some(&2) && u16_at(elf, 18)? == 62;
    if !x86_64 {
        return None;
    }
    let table = usize::try_from(u64_at(elf, 32)?).ok()?;
    let (size, count) = (usize::from(u16_at(elf, 54)?), usize::from(u16_at(elf, 56)?));
    (0..count).find_map(|index| {
        let header = elf.get(table.checked_add(index * size)?..)?;
        (u32_at(header, 0)? == PT_NOTE).then_some(())?;
        let offset = usize::try_from(u64_at(header, 8)?).ok()?;
        let length = usize::try_from(u64_at(header, 32)?).ok()?;
        pvh_in_notes(elf.get(offset..offset.checked_add(length)?)?)
    })
}

fn pvh_in_notes(mut notes: &[u8]) -> Option<()> {
    loop {
        let (name, description, kind) = (u32_at(notes, 0)?, u32_at(notes, 4)?, u32_at(notes, 8)?);
        if kind == PVH_NOTE && notes.get(12..16)? == b"Xen\0" {
            return Some(());
        }
        let padded = |length: u32| (length as usize).checked_next_multiple_of(4);
        let next = 12_usize.checked_add(padded(name)?)?.checked_add(padded(description)?)?;
        notes = notes.get(next..)?;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The least ELF file that has the note.
    pub(in crate::kernel) fn elf_with_note(kind: u32) -> Vec<u8> {
        let mut elf = vec![0_u8; 64 + 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18..20].copy_from_slice(&62_u16.to_le_bytes());
        elf[32..40].copy_from_slice(&64_u64.to_le_bytes());
        elf[54..56].copy_from_slice(&56_u16.to_le_bytes());
        elf[56..58].copy_from_slice(&1_u16.to_le_bytes());
        elf[64..68].copy_from_slice(&PT_NOTE.to_le_bytes());
        elf[72..80].copy_from_slice(&120_u64.to_le_bytes());
        elf[96..104].copy_from_slice(&24_u64.to_le_bytes());
        elf.extend([4_u32, 8, kind].iter().flat_map(|word| word.to_le_bytes()));
        elf.extend(b"Xen\0\x00\x00\x00\x01\x00\x00\x00\x00");
        elf
    }

    #[test]
    fn finds_the_pvh_note() {
        assert!(has_pvh_entry(&elf_with_note(18)));
        assert!(!has_pvh_entry(&elf_with_note(17)));
    }

    #[test]
    fn reads_the_release_of_an_elf_kernel() {
        let mut elf = elf_with_note(18);
        elf.extend(b"Linux version %s Linux version 6.1.0-56-amd64 (debian)");
        assert_eq!(parse(&elf).expect("a kernel").release, "6.1.0-56-amd64");
    }

    proptest! {
        #[test]
        fn garbage_is_refused_without_a_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..2048), kind in 0..3) {
            if kind == 1 && bytes.len() > 0x206 { bytes[0x202..0x206].copy_from_slice(b"HdrS"); }
            if kind == 2 && bytes.len() > 20 { bytes[..5].copy_from_slice(b"\x7fELF\x02"); bytes[18..20].copy_from_slice(&[62, 0]); }
            let _ = parse(&bytes);
        }
    }
}
