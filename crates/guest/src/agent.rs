//! Accepts the host's streams and hands each to what serves it.

use std::convert::Infallible;
use std::io::Error;
use std::rc::Rc;
use std::sync::Arc;

use agentkernel_protocol::frame::{self, FrameError};
use agentkernel_protocol::message::{Entry, ExecFailure, ExecOutput, LayerEntry, Programs, Reply, Request};
use agentkernel_protocol::mux::{self, Stream};
use agentkernel_protocol::record::Port;
use tokio::io::AsyncWriteExt;
use tokio::task::{LocalSet, spawn_blocking, spawn_local};

use crate::boot::{Booted, log};
use crate::configure::{self, Layout};
use crate::exec::cgroup::Frozen;
use crate::exec::{self, Reaper};
use crate::port::PortIo;
use crate::{copy, fuse, layers, shutdown, tree};

const NOT_CONFIGURED: &str = "the machine is not configured yet";

/// What all streams share.
struct Agent {
    reaper: Arc<Reaper>,
    file_systems: fuse::FileSystems,
    /// Set once, when the machine is configured.
    layout: std::sync::OnceLock<Arc<Layout>>,
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
    });
    let mut port = Port::new(PortIo::new(booted.port)?);
    loop {
        if let Err(error) = port.accept(&booted.kernel).await {
            return Err(Error::other(format!("the host's greeting: {error}")));
        }
        let agent = agent.clone();
        let ended = mux::guest(port.session(), move |stream| {
            let agent = agent.clone();
            spawn_local(async move {
                if let Err(error) = answer(&agent, stream).await
                    && !error.is_disconnect()
                {
                    log(&format!("a stream of the host was given up: {error}"));
                }
            });
        })
        .await;
        log(&format!("the host's session ended: {ended}"));
    }
}

async fn answer(agent: &Agent, mut stream: Stream) -> Result<(), FrameError> {
    match frame::read::<Request, _>(&mut stream).await? {
        Request::FileSystem { tag, read_only } => {
            if let Err(error) = agent.file_systems.serve(&tag, read_only, stream).await {
                log(&format!("file system {tag}: {error}"));
            }
            Ok(())
        }
        Request::Configure(wish) => {
            let file_systems = agent.file_systems.tags();
            let result = spawn_blocking(move || configure::configure(&wish, &file_systems)).await;
            let reply = match result {
                Ok(Ok(layout)) => match agent.layout.set(Arc::new(layout)) {
                    Ok(()) => Reply::Done,
                    Err(_) => Reply::Failed { message: "the machine is configured already".into() },
                },
                Ok(Err(message)) => Reply::Failed { message },
                Err(error) => Reply::Failed { message: error.to_string() },
            };
            reply_once(&mut stream, &reply).await
        }
        Request::Exec(wish) => match agent.layout.get() {
            Some(layout) => exec::serve(agent.reaper.clone(), layout.clone(), *wish, stream).await,
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
