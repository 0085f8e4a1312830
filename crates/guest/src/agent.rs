//! Accepts the host's streams and hands each to what serves it.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io::Error;
use std::rc::Rc;
use std::sync::Arc;

use agentkernel_protocol::frame::{self, FrameError};
use agentkernel_protocol::message::{
    Configure, Entry, ExecFailure, ExecOutput, LayerEntry, Programs, Reply, Request, Root,
};
use agentkernel_protocol::mux::{self, Stream};
use agentkernel_protocol::record::Port;
use tokio::io::AsyncWriteExt;
use tokio::task::{LocalSet, spawn_blocking, spawn_local};

use crate::boot::{Booted, log};
use crate::configure::{self, Layout};
use crate::exec::cgroup::Frozen;
use crate::exec::{self, Reaper};
use crate::port::PortIo;
use crate::{copy, file, fuse, layers, shutdown, tree};

/// How long the mounts may take that the machine is configured with.
const MOUNT_PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);
const NOT_CONFIGURED: &str = "the machine is not configured yet";

/// What all streams share.
struct Agent {
    reaper: Arc<Reaper>,
    file_systems: fuse::FileSystems,
    /// Set once, when the machine is assembled.
    layout: std::sync::OnceLock<Arc<Layout>>,
    session: Sessions,
}

/// Counts the host's sessions. One ends when the machine is restored, or the host breaks the stream: never because a
/// single client is gone.
#[derive(Clone, Default)]
struct Sessions(Rc<Cell<u64>>);

impl Sessions {
    fn ended(&self) {
        self.0.set(self.0.get() + 1);
    }

    fn watch(&self) -> Session {
        Session { all: self.clone(), number: self.0.get() }
    }
}

/// One of the host's sessions.
#[derive(Clone)]
pub(crate) struct Session {
    all: Sessions,
    number: u64,
}

impl Session {
    /// Whether its streams broke because all of it ended.
    pub(crate) fn is_over(&self) -> bool {
        self.all.0.get() != self.number
    }
}

/// Carries out the steps that are wished, on a thread that may wait.
fn configure(
    layout: Option<Arc<Layout>>,
    wish: &Configure,
    file_systems: &BTreeSet<String>,
) -> Result<Arc<Layout>, String> {
    let layout = match (&wish.assemble, layout) {
        (Some(_), Some(_)) => return Err("the machine is assembled already".into()),
        (None, None) => return Err("the machine is not assembled yet".into()),
        (Some(assemble), None) => Arc::new(configure::assemble(assemble, file_systems)?),
        (None, Some(layout)) => layout,
    };
    configure::identify(&layout, &wish.identity)?;
    if let Some(furnish) = &wish.furnish {
        configure::furnish(&layout, furnish, file_systems)?;
    }
    Ok(layout)
}

/// Serves the host for ever.
pub(crate) fn run(booted: Booted) -> Result<Infallible, Error> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(512).build()?;
    let local = LocalSet::new();
    local.block_on(&runtime, serve(booted))
}

async fn serve(booted: Booted) -> Result<Infallible, Error> {
    let reaper = Reaper::start()?;
    let agent = Rc::new(Agent {
        reaper,
        file_systems: fuse::FileSystems::default(),
        layout: std::sync::OnceLock::new(),
        session: Sessions::default(),
    });
    let mut port = Port::new(PortIo::new(booted.port)?);
    loop {
        if let Err(error) = port.accept(&booted.kernel).await {
            return Err(Error::other(format!("the host's greeting: {error}")));
        }
        let shared = agent.clone();
        mux::guest(port.session(), move |stream| {
            let agent = shared.clone();
            spawn_local(async move {
                if let Err(error) = answer(&agent, stream).await
                    && !error.is_disconnect()
                {
                    log(&format!("a stream of the host was given up: {error}"));
                }
            });
        })
        .await;
        // Before anything that served its streams finds them broken.
        agent.session.ended();
    }
}

async fn answer(agent: &Agent, mut stream: Stream) -> Result<(), FrameError> {
    match frame::read::<Request, _>(&mut stream).await? {
        Request::FileSystem { tag, read_only } => {
            let initial = agent.layout.get().map(|layout| layout.initial());
            if let Err(error) = agent.file_systems.serve(&tag, read_only, initial, stream).await {
                log(&format!("file system {tag}: {error}"));
            }
            Ok(())
        }
        Request::Configure(wish) => {
            if let Some(layout) = agent.layout.get().cloned().filter(|_| wish.rehearse) {
                let reaper = agent.reaper.clone();
                drop(spawn_blocking(move || exec::rehearse(&reaper, &layout)));
            }
            let root = wish.assemble.iter().filter_map(|assemble| match &assemble.root {
                Root::FileSystem { tag } => Some(tag.as_str()),
                Root::Disk { .. } => None,
            });
            let prepare = wish.assemble.iter().map(|assemble| assemble.prepare.as_str());
            let root = root.chain(prepare.filter(|tag| !tag.is_empty()));
            let mounts = wish.furnish.iter().flat_map(|furnish| &furnish.mounts);
            let tags: Vec<&str> = root.chain(mounts.map(|mount| mount.tag.as_str())).collect();
            let present = agent.file_systems.present(&tags);
            // What is missing after that is named by whoever needs it.
            let _ = tokio::time::timeout(MOUNT_PATIENCE, present).await;
            let file_systems = agent.file_systems.tags();
            let layout = agent.layout.get().cloned();
            let result = spawn_blocking(move || configure(layout, &wish, &file_systems)).await;
            let reply = match result {
                // The first to come stays; it is the same one after that.
                Ok(Ok(layout)) => {
                    let _ = agent.layout.set(layout);
                    Reply::Done
                }
                Ok(Err(message)) => Reply::Failed { message },
                Err(error) => Reply::Failed { message: error.to_string() },
            };
            reply_once(&mut stream, &reply).await
        }
        Request::Clock { unix_time_ns } => {
            let reply = match configure::set_clock(unix_time_ns) {
                Ok(()) => Reply::Done,
                Err(message) => Reply::Failed { message },
            };
            reply_once(&mut stream, &reply).await
        }
        Request::Quiesce { programs } => {
            if programs == Some(Programs::End) {
                shutdown::end_programs(std::time::Duration::ZERO).await;
            }
            let quiet = agent.file_systems.quiet();
            quiet.wait().await;
            frame::write(&mut stream, &Reply::Done).await?;
            // Until the host is done with it, or this is another machine.
            let mut end = [0];
            let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut end).await;
            Ok(())
        }
        Request::Exec(wish) => match agent.layout.get() {
            Some(layout) => {
                let session = agent.session.watch();
                exec::serve(agent.reaper.clone(), layout.clone(), *wish, session, stream).await
            }
            None => {
                let message = NOT_CONFIGURED.into();
                reply_once(&mut stream, &ExecOutput::Failed { kind: ExecFailure::Other, message }).await
            }
        },
        Request::Changes { mount, programs } => {
            let layout = agent.layout.get();
            let Some((layout, upper)) = layout.and_then(|layout| Some((layout, layout.upper(mount)?))) else {
                let message = format!("mount {mount} is not copy-on-write");
                return reply_once(&mut stream, &Entry::Failed { message }).await;
            };
            // What still runs in the background would change what is being listed.
            let frozen = match programs {
                Programs::End => {
                    shutdown::end_programs(std::time::Duration::from_millis(500)).await;
                    None
                }
                Programs::Freeze => {
                    let layout = layout.clone();
                    spawn_blocking(move || Frozen::freeze(&layout.cgroups)).await.ok().and_then(Result::ok)
                }
            };
            let result = tree::send_layer(upper, stream).await;
            drop(frozen);
            result
        }
        Request::CopyOut { path } => match agent.layout.get() {
            Some(_) => tree::send_copy(path.into_vec(), stream).await,
            None => reply_once(&mut stream, &Entry::Failed { message: NOT_CONFIGURED.into() }).await,
        },
        Request::CopyIn { path, name, user } => match agent.layout.get() {
            Some(_) => copy::receive(path.into_vec(), name.into_vec(), user, stream).await,
            None => reply_once(&mut stream, &Reply::Failed { message: NOT_CONFIGURED.into() }).await,
        },
        Request::FileRead { path } => match agent.layout.get() {
            Some(_) => file::read(path.into_vec(), stream).await,
            None => reply_once(&mut stream, &file::not_configured()).await,
        },
        Request::FileWrite { path, user } => match agent.layout.get() {
            Some(_) => file::write(path.into_vec(), user, stream).await,
            None => reply_once(&mut stream, &file::not_configured()).await,
        },
        Request::FileRemove { path } => match agent.layout.get() {
            Some(_) => file::remove(path.into_vec(), stream).await,
            None => reply_once(&mut stream, &file::not_configured()).await,
        },
        Request::LayerOut { layer } => match agent.layout.get() {
            Some(layout) => layers::send(layout.layers.clone(), layer, stream).await,
            None => reply_once(&mut stream, &LayerEntry::Failed { message: NOT_CONFIGURED.into() }).await,
        },
        Request::LayerIn { layer } => match agent.layout.get() {
            Some(layout) => layers::receive(layout.layers.clone(), layer, stream).await,
            None => reply_once(&mut stream, &Reply::Failed { message: NOT_CONFIGURED.into() }).await,
        },
        Request::Shutdown { grace_ms } => {
            shutdown::end_programs(std::time::Duration::from_millis(u64::from(grace_ms))).await;
            // Writing back may need the host's file servers, so not on this thread.
            let _ = spawn_blocking(shutdown::write_back).await;
            let _ = reply_once(&mut stream, &Reply::Done).await;
            // The reply leaves through the port's queue.
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            shutdown::end_machine();
            Ok(())
        }
    }
}

async fn reply_once<T: serde::Serialize>(stream: &mut Stream, reply: &T) -> Result<(), FrameError> {
    frame::write(stream, reply).await?;
    Ok(stream.shutdown().await?)
}
