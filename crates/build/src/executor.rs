//! What the solver needs of the world: machines for its steps, and images by name. Whoever runs the steps implements it; the
//! solver never knows what does.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use agentkernel_image::{Descriptor, Digest, LayerItem};

use crate::configuration::Configuration;
use crate::solve::OnEvent;

/// Why something outside the solver failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What failed and why, lower case, no final period.
    pub message: String,
    /// What the user can do about it.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure without a remedy.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None }
    }
}

/// An image to build on.
#[derive(Debug, Clone)]
pub struct Base {
    /// Its configuration.
    pub configuration: Configuration,
    /// Its layers, lowest first: as stored, and their digests once uncompressed.
    pub layers: Vec<(Descriptor, Digest)>,
}

/// Gives images and machines.
pub trait Executor {
    /// What runs steps.
    type Machine: Machine;

    /// The image called `name`, pulled if it is not here; how that goes on is told.
    ///
    /// # Errors
    /// If there is none, or it is damaged.
    fn image(&mut self, name: &str, on_event: OnEvent<'_>) -> Result<Base, Failure>;

    /// Writes what is at an address, `http://` or `https://`, to `target`, an empty file; how that goes on is told.
    ///
    /// # Errors
    /// If it may not be reached, cannot be fetched whole, or the disk is full.
    fn fetch(&mut self, address: &str, target: &mut File, on_event: OnEvent<'_>) -> Result<(), Failure>;

    /// The root file system of these layers as one file.
    ///
    /// # Errors
    /// If they cannot be read or the disk is full.
    fn root_file_system(&mut self, layers: &[(Descriptor, Digest)]) -> Result<PathBuf, Failure>;

    /// Starts a machine over a root file system.
    ///
    /// # Errors
    /// If it does not start.
    fn start(&mut self, root_file_system: &Path) -> Result<Self::Machine, Failure>;
}

/// A machine with numbered layers over its root file system.
pub trait Machine {
    /// Makes layer number `layer` of what `source` gives.
    ///
    /// # Errors
    /// If the machine dies or its disk is full.
    fn put_layer(&mut self, layer: u32, source: &mut dyn LayerSource) -> Result<(), Failure>;

    /// Gives all that is in a layer.
    ///
    /// # Errors
    /// If the machine dies, or what it sends makes no sense.
    fn take_layer(&mut self, layer: u32, target: &mut dyn LayerTarget) -> Result<(), Failure>;

    /// Runs a program and tells what it says as it comes.
    ///
    /// # Errors
    /// If the machine dies. A program that cannot be started ends with 126 or 127.
    fn run(&mut self, step: &Step, output: &mut dyn FnMut(&[u8])) -> Result<StepEnd, Failure>;
}

/// Items of a layer, and the data of its files.
pub trait LayerSource {
    /// The next item.
    ///
    /// # Errors
    /// If the source is damaged.
    fn next_item(&mut self) -> io::Result<Option<LayerItem>>;

    /// Data of the last file; 0 at its end.
    ///
    /// # Errors
    /// If the source is damaged.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
}

/// Takes items of a layer, and the data of its files.
pub trait LayerTarget {
    /// Takes an item.
    ///
    /// # Errors
    /// If it cannot be kept.
    fn item(&mut self, item: LayerItem) -> io::Result<()>;

    /// Takes data of the last file.
    ///
    /// # Errors
    /// If it cannot be kept.
    fn data(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// One program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The program and its arguments.
    pub arguments: Vec<String>,
    /// The whole environment.
    pub environment: Vec<(String, String)>,
    /// Where it starts.
    pub directory: String,
    /// Who it runs as, as in `USER`.
    pub user: String,
    /// Layers over the machine's root file system, lowest first.
    pub lower: Vec<u32>,
    /// The layer that takes what it writes.
    pub upper: u32,
    /// Whether it has the machine's network.
    pub network: bool,
    /// What is mounted.
    pub mounts: Vec<StepMount>,
}

/// Something mounted for one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepMount {
    /// Absolute path.
    pub target: String,
    /// What.
    pub source: StepSource,
    /// Writes are refused.
    pub read_only: bool,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepSource {
    /// Memory, of so many bytes at most.
    Memory(Option<u64>),
    /// A layer's directory or file.
    Layer {
        /// Its number.
        layer: u32,
        /// Relative to it; empty for all of it.
        path: Vec<u8>,
    },
    /// A file in memory.
    File {
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// The whole content.
        content: Vec<u8>,
    },
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepEnd {
    /// Its exit code, as a shell has it: 128 and the signal's number if one killed it.
    pub code: u8,
    /// The machine ran out of memory.
    pub out_of_memory: bool,
}
