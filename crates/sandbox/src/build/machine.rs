//! The machine of a build: a temporary sandbox like any other, whose programs run in roots made of layers.

use std::rc::Rc;
use std::time::Duration;

use agentkernel_build::executor::{Failure, LayerSource, LayerTarget, Machine, Step, StepEnd, StepSource};
use agentkernel_image::{LayerItem, Metadata, NodeKind as ImageNode};
use agentkernel_protocol::frame::{self, CHUNK};
use agentkernel_protocol::message::{
    Attributes, Exec, ExecFailure, ExecInput, ExecOutput, LayerEntry, LayeredRoot, NodeKind, Reply, Request,
    RootMount, RootSource,
};
use serde_bytes::ByteBuf;
use tokio::runtime::Runtime;

use crate::client::Lease;
use crate::executions::exit_code;
use crate::problem::Problem;

/// Longest silence of a guest that sends a layer.
const PATIENCE: Duration = Duration::from_secs(120);
/// Most entries of a layer.
const ENTRIES_LIMIT: u64 = 2_000_000;
const NANOSECONDS: i64 = 1_000_000_000;

/// A build's machine; ended when dropped.
pub(super) struct BuildMachine {
    pub(super) lease: Option<Lease>,
    pub(super) runtime: Rc<Runtime>,
    /// Most bytes of one layer: the disk's size.
    pub(super) layer_limit: u64,
}

impl Drop for BuildMachine {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            let _inside = self.runtime.enter();
            lease.release();
        }
    }
}

impl BuildMachine {
    fn lease(&self) -> Result<&Lease, Failure> {
        self.lease.as_ref().ok_or_else(|| Failure::new("the machine is gone"))
    }
}

pub(super) fn failure(problem: Problem) -> Failure {
    Failure { message: problem.message, hint: problem.hint }
}

fn broken(error: &dyn std::error::Error) -> Failure {
    Failure::new(format!("the machine broke off: {error}"))
}

impl Machine for BuildMachine {
    fn put_layer(&mut self, layer: u32, source: &mut dyn LayerSource) -> Result<(), Failure> {
        let damaged = |error: std::io::Error| Failure::new(format!("cannot read a layer: {error}"));
        let sandbox = self.lease()?.sandbox().clone();
        self.runtime.block_on(async {
            let mut stream = sandbox.guest(Request::LayerIn { layer }).await.map_err(failure)?;
            let mut buffer = vec![0; CHUNK];
            while let Some(item) = source.next_item().map_err(damaged)? {
                let is_file = matches!(item, LayerItem::Node { kind: ImageNode::File(_), .. });
                frame::write(&mut stream, &entry(item)).await.map_err(|error| broken(&error))?;
                if !is_file {
                    continue;
                }
                loop {
                    let count = source.read(&mut buffer).map_err(damaged)?;
                    if count == 0 {
                        break;
                    }
                    let data = LayerEntry::Data(ByteBuf::from(&buffer[..count]));
                    frame::write(&mut stream, &data).await.map_err(|error| broken(&error))?;
                }
            }
            frame::write(&mut stream, &LayerEntry::End).await.map_err(|error| broken(&error))?;
            match frame::read(&mut stream).await.map_err(|error| broken(&error))? {
                Reply::Done => Ok(()),
                Reply::Failed { message } => Err(Failure::new(crate::printable(&message))),
            }
        })
    }

    fn take_layer(&mut self, layer: u32, target: &mut dyn LayerTarget) -> Result<(), Failure> {
        let sandbox = self.lease()?.sandbox().clone();
        let limit = self.layer_limit;
        self.runtime.block_on(async {
            let mut stream = sandbox.guest(Request::LayerOut { layer }).await.map_err(failure)?;
            let (mut entries, mut bytes) = (0, 0);
            loop {
                let entry = tokio::time::timeout(PATIENCE, frame::read::<LayerEntry, _>(&mut stream)).await;
                let entry = entry.map_err(|_| Failure::new("the machine stopped sending a layer"))?;
                let kept = match entry.map_err(|error| broken(&error))? {
                    LayerEntry::Data(data) => {
                        bytes += data.len() as u64;
                        target.data(&data)
                    }
                    LayerEntry::End => return Ok(()),
                    LayerEntry::Failed { message } => return Err(Failure::new(crate::printable(&message))),
                    entry => {
                        entries += 1;
                        target.item(item(entry)?)
                    }
                };
                kept.map_err(|error| Failure::new(format!("cannot keep a layer: {error}")))?;
                if entries > ENTRIES_LIMIT || bytes > limit {
                    return Err(Failure::new("the step wrote more than a layer may hold"));
                }
            }
        })
    }

    fn run(&mut self, step: &Step, output: &mut dyn FnMut(&[u8])) -> Result<StepEnd, Failure> {
        let sandbox = self.lease()?.sandbox().clone();
        let exec = exec(step);
        self.runtime.block_on(async {
            let mut execution = sandbox.exec(exec).await.map_err(failure)?;
            // A build has nobody who could type.
            let _ = execution.input.send(&ExecInput::StdinEnd).await;
            loop {
                match execution.output.next().await {
                    Ok(ExecOutput::Stdout(bytes) | ExecOutput::Stderr(bytes)) => output(&bytes),
                    Ok(ExecOutput::Exited(exit)) => {
                        return Ok(StepEnd { code: exit_code(&exit), out_of_memory: exit.out_of_memory });
                    }
                    Ok(ExecOutput::Failed { kind, message }) => {
                        let code = match kind {
                            ExecFailure::NotFound => 127,
                            ExecFailure::NotExecutable => 126,
                            _ => return Err(Failure::new(crate::printable(&message))),
                        };
                        output(format!("{}\n", crate::printable(&message)).as_bytes());
                        return Ok(StepEnd { code, out_of_memory: false });
                    }
                    Ok(ExecOutput::Started { .. } | ExecOutput::StdinTaken(_)) => {}
                    Err(_) => return Err(failure(sandbox.failure().await)),
                }
            }
        })
    }
}

fn exec(step: &Step) -> Exec {
    let bytes = |text: &String| ByteBuf::from(text.as_bytes());
    let mount = |mount: &agentkernel_build::executor::StepMount| RootMount {
        target: bytes(&mount.target),
        source: match &mount.source {
            StepSource::Memory(size) => RootSource::Memory { size: *size },
            StepSource::Layer { layer, path } => {
                RootSource::Layer { layer: *layer, path: ByteBuf::from(path.as_slice()) }
            }
            StepSource::File { mode, uid, gid, content } => RootSource::File {
                mode: *mode,
                uid: *uid,
                gid: *gid,
                content: ByteBuf::from(content.as_slice()),
            },
        },
        read_only: mount.read_only,
    };
    Exec {
        arguments: step.arguments.iter().map(bytes).collect(),
        environment: step.environment.iter().map(|(name, value)| (bytes(name), bytes(value))).collect(),
        directory: bytes(&step.directory),
        user: step.user.clone(),
        terminal: None,
        timeout_ms: None,
        stop_signal: None,
        root: Some(LayeredRoot {
            lower: step.lower.clone(),
            upper: step.upper,
            network: step.network,
            mounts: step.mounts.iter().map(mount).collect(),
        }),
    }
}

fn entry(item: LayerItem) -> LayerEntry {
    match item {
        LayerItem::Node { path, metadata, kind } => LayerEntry::Node {
            path: ByteBuf::from(path),
            attributes: Attributes {
                mode: metadata.mode.into(),
                uid: metadata.user,
                gid: metadata.group,
                modified_ns: metadata
                    .mtime
                    .saturating_mul(NANOSECONDS)
                    .saturating_add(metadata.mtime_nanoseconds.into()),
                xattrs: metadata
                    .xattrs
                    .into_iter()
                    .map(|(name, value)| (ByteBuf::from(name), ByteBuf::from(value)))
                    .collect(),
            },
            kind: match kind {
                ImageNode::File(size) => NodeKind::File { size },
                ImageNode::Directory => NodeKind::Directory,
                ImageNode::Symlink(target) => NodeKind::Symlink { target: ByteBuf::from(target) },
                ImageNode::CharacterDevice { major, minor } => NodeKind::CharacterDevice { major, minor },
                ImageNode::BlockDevice { major, minor } => NodeKind::BlockDevice { major, minor },
                ImageNode::Fifo => NodeKind::Fifo,
            },
        },
        LayerItem::HardLink { path, target } => {
            LayerEntry::HardLink { path: ByteBuf::from(path), target: ByteBuf::from(target) }
        }
        LayerItem::Whiteout { path } => LayerEntry::Removed { path: ByteBuf::from(path) },
        LayerItem::Opaque { path } => LayerEntry::Opaque { path: ByteBuf::from(path) },
    }
}

/// What a guest, who is hostile, says of one entry.
fn item(entry: LayerEntry) -> Result<LayerItem, Failure> {
    Ok(match entry {
        LayerEntry::Node { path, attributes, kind } => {
            let metadata = Metadata {
                mode: (attributes.mode & 0o7777) as u16,
                user: attributes.uid,
                group: attributes.gid,
                mtime: attributes.modified_ns.div_euclid(NANOSECONDS),
                mtime_nanoseconds: 0,
                xattrs: attributes
                    .xattrs
                    .into_iter()
                    .map(|(name, value)| (name.into_vec(), value.into_vec()))
                    .filter(|(name, _)| is_attribute(name))
                    .collect(),
            };
            let kind = match kind {
                NodeKind::File { size } => ImageNode::File(size),
                NodeKind::Directory => ImageNode::Directory,
                NodeKind::Symlink { target }
                    if target.is_empty() || target.len() > 4095 || target.contains(&0) =>
                {
                    return Err(Failure::new("the machine sent a symbolic link that no system has"));
                }
                NodeKind::Symlink { target } => ImageNode::Symlink(target.into_vec()),
                NodeKind::CharacterDevice { major, minor } => ImageNode::CharacterDevice { major, minor },
                NodeKind::BlockDevice { major, minor } => ImageNode::BlockDevice { major, minor },
                NodeKind::Fifo => ImageNode::Fifo,
            };
            LayerItem::Node { path: checked(path)?, metadata, kind }
        }
        LayerEntry::HardLink { path, target } => {
            LayerItem::HardLink { path: checked(path)?, target: checked(target)? }
        }
        LayerEntry::Removed { path } => LayerItem::Whiteout { path: checked(path)? },
        LayerEntry::Opaque { path } => LayerItem::Opaque { path: checked(path)? },
        LayerEntry::Data(_) | LayerEntry::End | LayerEntry::Failed { .. } => {
            return Err(Failure::new("the machine sent entries out of turn"));
        }
    })
}

/// Whether an extended attribute belongs into a layer. Those of overlayfs would speak to the one it is mounted in.
fn is_attribute(name: &[u8]) -> bool {
    !name.is_empty() && !name.contains(&0) && !name.contains(&b'=') && !name.starts_with(b"trusted.overlay.")
}

/// A path that stays within a layer and means nothing else there.
fn checked(path: ByteBuf) -> Result<Vec<u8>, Failure> {
    let path = path.into_vec();
    let sound = !path.is_empty()
        && path.len() <= 4095
        && !path.contains(&0)
        && path
            .split(|byte| *byte == b'/')
            .all(|part| !matches!(part, b"" | b"." | b"..") && part.len() <= 255);
    let shown = crate::printable(&String::from_utf8_lossy(&path));
    if !sound {
        return Err(Failure::new(format!("the machine sent an entry that no layer holds: {shown}")));
    }
    if path.split(|byte| *byte == b'/').any(|part| part.starts_with(b".wh.")) {
        return Err(Failure {
            message: format!(
                "a layer cannot hold {shown}: names that begin with .wh. stand for removed files"
            ),
            hint: Some("remove it in the step that makes it, or call it otherwise".into()),
        });
    }
    Ok(path)
}
