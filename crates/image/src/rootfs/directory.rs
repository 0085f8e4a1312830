//! EROFS directories: blocks of fixed-size records followed by their names, sorted by bytes over the whole directory.
//!
//! `.` and `..` are names like any other and take their sorted place, because the kernel searches by bisection.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::erofs::BLOCK;
use super::tree::Link;

const RECORD: usize = 12;

/// One name of a directory.
#[derive(Clone, Copy)]
pub(super) enum Name<'a> {
    This,
    Parent,
    Child(&'a [u8], Link),
}

impl<'a> Name<'a> {
    fn bytes(&self) -> &'a [u8] {
        match self {
            Self::This => b".",
            Self::Parent => b"..",
            Self::Child(name, _) => name,
        }
    }
}

/// All names in the order of the disk.
pub(super) fn names(children: &BTreeMap<Box<[u8]>, Link>) -> impl Iterator<Item = Name<'_>> {
    let range = move |from: Bound<&'static [u8]>, to: Bound<&'static [u8]>| {
        children.range::<[u8], _>((from, to)).map(|(name, link)| Name::Child(name, *link))
    };
    let (this, parent): (&'static [u8], &'static [u8]) = (b".", b"..");
    range(Bound::Unbounded, Bound::Excluded(this))
        .chain([Name::This])
        .chain(range(Bound::Excluded(this), Bound::Excluded(parent)))
        .chain([Name::Parent])
        .chain(range(Bound::Excluded(parent), Bound::Unbounded))
}

/// The size in bytes: whole blocks, then what the last one uses.
pub(super) fn size(children: &BTreeMap<Box<[u8]>, Link>) -> u64 {
    let mut blocks = 0;
    let mut used = 0;
    for name in names(children) {
        let needed = (RECORD + name.bytes().len()) as u64;
        if used + needed > BLOCK {
            blocks += 1;
            used = 0;
        }
        used += needed;
    }
    blocks * BLOCK + used
}

/// The content: each item is one block, all but the last filled up to [`BLOCK`] bytes.
///
/// `locate` tells where a name leads (its node number) and of which type it is.
pub(super) fn blocks<'a>(
    children: &'a BTreeMap<Box<[u8]>, Link>,
    locate: impl Fn(&Name<'a>) -> (u64, u8) + 'a,
) -> impl Iterator<Item = Vec<u8>> + 'a {
    let mut names = names(children).peekable();
    std::iter::from_fn(move || {
        let mut group = Vec::new();
        let mut used = 0;
        while let Some(name) = names.next_if(|name| used + RECORD + name.bytes().len() <= BLOCK as usize) {
            used += RECORD + name.bytes().len();
            group.push(name);
        }
        if group.is_empty() {
            return None;
        }
        let mut block = encode(&group, &locate);
        if names.peek().is_some() {
            block.resize(BLOCK as usize, 0);
        }
        Some(block)
    })
}

fn encode<'a>(group: &[Name<'a>], locate: &impl Fn(&Name<'a>) -> (u64, u8)) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK as usize);
    let mut name_offset = group.len() * RECORD;
    for name in group {
        let (node, file_type) = locate(name);
        block.extend_from_slice(&node.to_le_bytes());
        // Fits: a block has 4096 bytes.
        block.extend_from_slice(&(name_offset as u16).to_le_bytes());
        block.extend_from_slice(&[file_type, 0]);
        name_offset += name.bytes().len();
    }
    for name in group {
        block.extend_from_slice(name.bytes());
    }
    block
}
