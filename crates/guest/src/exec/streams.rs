//! A program's standard streams as the agent holds them.

use std::collections::VecDeque;
use std::io::{Error, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use agentkernel_protocol::frame::CHUNK;
use agentkernel_protocol::message::{ExecOutput, STDIN_WINDOW, WindowSize};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_bytes::ByteBuf;
use std::cell::RefCell;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, spawn_local};

use super::Event;
use crate::system;

/// The character that ends a terminal's input: ^D.
const END_OF_TRANSMISSION: u8 = 4;
/// Most bytes read from a terminal after its program ended, while background processes still write to it.
const TERMINAL_REST: usize = 1 << 20;

/// Which stream a pipe is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    Stdout,
    Stderr,
}

/// Something a program writes to. The descriptor enters the event loop only when its pump runs there.
pub(super) struct Output {
    descriptor: OwnedFd,
    which: Which,
    terminal: bool,
}

impl Output {
    pub(super) fn pipe(descriptor: OwnedFd, which: Which) -> Result<Self, Error> {
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        Ok(Self { descriptor, which, terminal: false })
    }

    pub(super) fn terminal(descriptor: OwnedFd) -> Result<Self, Error> {
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        Ok(Self { descriptor, which: Which::Stdout, terminal: true })
    }

    /// Sends what the program writes until every writer is gone, or the program has ended and its part is read.
    pub(super) async fn pump(self, events: mpsc::Sender<Event>, mut end: watch::Receiver<bool>) {
        let Ok(source) = system::register(self.descriptor) else { return };
        let mut buffer = vec![0; CHUNK];
        let mut rest = None;
        loop {
            if rest.is_none() && *end.borrow() {
                // What is in the pipe now the program wrote; what comes later is from others.
                let waiting = system::readable_bytes(source.get_ref().as_fd());
                rest = Some(if self.terminal { TERMINAL_REST } else { waiting });
            }
            let read = rustix::io::read(source.get_ref(), &mut buffer[..rest.unwrap_or(CHUNK).min(CHUNK)]);
            match read {
                // At a terminal, EIO says that nobody has the other side open.
                Ok(0) | Err(rustix::io::Errno::IO) => return,
                Ok(count) => {
                    let bytes = ByteBuf::from(&buffer[..count]);
                    let message = match self.which {
                        Which::Stdout => ExecOutput::Stdout(bytes),
                        Which::Stderr => ExecOutput::Stderr(bytes),
                    };
                    if events.send(Event::Say(message)).await.is_err() {
                        return;
                    }
                    rest = rest.map(|rest| rest - count);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) if rest.is_some() => return,
                Err(rustix::io::Errno::AGAIN) => wait(&source, &mut end).await,
                Err(_) => return,
            }
        }
    }
}

/// Waits until there is something to read or the program has ended.
async fn wait(source: &AsyncFd<OwnedFd>, end: &mut watch::Receiver<bool>) {
    let ended = end.changed();
    let readable = async {
        if let Ok(mut guard) = source.readable().await {
            // Only a later event counts; whether there is something now is asked right after, by reading.
            guard.clear_ready();
        }
    };
    let (mut ended, mut readable) = (std::pin::pin!(ended), std::pin::pin!(readable));
    std::future::poll_fn(|context| {
        if ended.as_mut().poll(context).is_ready() || readable.as_mut().poll(context).is_ready() {
            return std::task::Poll::Ready(());
        }
        std::task::Poll::Pending
    })
    .await;
}

/// What a program reads from.
pub(super) struct Stdin {
    descriptor: OwnedFd,
    terminal: bool,
}

impl Stdin {
    pub(super) fn pipe(descriptor: OwnedFd) -> Result<Self, Error> {
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        Ok(Self { descriptor, terminal: false })
    }

    pub(super) fn terminal(descriptor: OwnedFd) -> Result<Self, Error> {
        Ok(Self { descriptor, terminal: true })
    }

    pub(super) fn resize(&self, size: WindowSize) {
        resize(&self.descriptor, size);
    }

    /// Starts writing what will be queued.
    pub(super) fn start(self, events: mpsc::Sender<Event>) -> StdinQueue {
        let terminal = if self.terminal { self.descriptor.try_clone().ok() } else { None };
        let queue = Rc::new(Queue::default());
        let task = spawn_local(write(self, queue.clone(), events));
        StdinQueue { queue, terminal, task: task.abort_handle() }
    }
}

#[derive(Default)]
struct Queue {
    bytes: RefCell<VecDeque<u8>>,
    ended: std::cell::Cell<bool>,
    changed: Notify,
}

/// Input on its way to a program; dropping it closes the program's standard input.
pub(super) struct StdinQueue {
    queue: Rc<Queue>,
    terminal: Option<OwnedFd>,
    task: AbortHandle,
}

impl StdinQueue {
    /// Queues input; false if the host sends more than its window allows.
    pub(super) fn write(&mut self, bytes: Vec<u8>) -> bool {
        let mut queue = self.queue.bytes.borrow_mut();
        if queue.len() + bytes.len() > STDIN_WINDOW {
            return false;
        }
        queue.extend(bytes);
        self.queue.changed.notify_one();
        true
    }

    /// No more input will come.
    pub(super) fn end(&mut self) {
        self.queue.ended.set(true);
        self.queue.changed.notify_one();
    }

    pub(super) fn resize(&self, size: WindowSize) {
        if let Some(terminal) = &self.terminal {
            resize(terminal, size);
        }
    }

    /// The process group in the foreground of the terminal, if there is one.
    pub(super) fn foreground_group(&self) -> Option<i32> {
        self.terminal.as_ref().and_then(|terminal| system::foreground_group(terminal.as_fd()))
    }
}

impl Drop for StdinQueue {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn resize(terminal: &OwnedFd, size: WindowSize) {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    let _ = tcsetwinsize(terminal, size);
}

/// Writes the queue to the program and tells the host what was taken. A program that closed its input takes everything.
async fn write(stdin: Stdin, queue: Rc<Queue>, events: mpsc::Sender<Event>) {
    let terminal = stdin.terminal;
    let Ok(target) = system::register(stdin.descriptor) else { return };
    let mut broken = false;
    loop {
        let chunk: Vec<u8> = {
            let mut bytes = queue.bytes.borrow_mut();
            let count = bytes.len().min(CHUNK);
            bytes.drain(..count).collect()
        };
        if chunk.is_empty() {
            if queue.ended.get() {
                if terminal {
                    let _ = write_all(&target, &[END_OF_TRANSMISSION]).await;
                    // The terminal stays: closing it would hang the program up.
                    std::future::pending::<()>().await;
                }
                return;
            }
            queue.changed.notified().await;
            continue;
        }
        broken = broken || write_all(&target, &chunk).await.is_err();
        let taken = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
        if events.send(Event::Say(ExecOutput::StdinTaken(taken))).await.is_err() {
            return;
        }
    }
}

async fn write_all(target: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> Result<(), Error> {
    while !bytes.is_empty() {
        let mut guard = target.writable().await?;
        match guard.try_io(|target| Ok(rustix::io::write(target.get_ref(), bytes)?)) {
            Ok(Ok(count)) => bytes = &bytes[count..],
            Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
    Ok(())
}
