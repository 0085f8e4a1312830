//! Bytes between a guest's connection and a socket of the host's; what the guest says first is looked at where a rule is
//! about names.

use std::io;
use std::time::{Duration, Instant};

use smoltcp::socket::tcp::State;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::stack::Stack;
use super::{Connection, Outcome};
use crate::network::Inner;
use crate::network::decide::{Permit, Scrutiny};
use crate::network::inspect::{self, Beginning};

/// How long the guest may take to acknowledge the last byte after the host's end is closed.
const LINGER: Duration = Duration::from_secs(60);

/// What is left to do on a connection.
struct Progress {
    /// The host said its last.
    host_ended: bool,
    /// The host was told that the guest said its last.
    guest_ended: bool,
    /// The host's socket takes no more for now.
    host_is_full: bool,
    /// What the guest begins with was looked at.
    judged: bool,
}

/// Passes bytes between guest and host until both have said all.
pub(super) async fn pass(
    inner: &Inner,
    connection: &Connection,
    host: &TcpStream,
    permit: Option<&Permit>,
) -> Outcome {
    let watched = permit.filter(|permit| permit.scrutiny != Scrutiny::None);
    let mut progress =
        Progress { host_ended: false, guest_ended: false, host_is_full: false, judged: watched.is_none() };
    let mut lingers = None;
    loop {
        if let Some(why) = connection.given_up.get() {
            let _ = host.set_zero_linger();
            return Outcome::GivenUp(why);
        }
        let (delay, interest, waits) = {
            let mut stack = connection.stack.borrow_mut();
            let Some(stack) = stack.as_mut() else { return Outcome::Complete };
            // A stack that was reset before it was open listens again.
            let is_reset = matches!(stack.socket().state(), State::Closed | State::Listen);
            if is_reset && !(progress.host_ended && progress.guest_ended) {
                let _ = host.set_zero_linger();
                return Outcome::Broken("the guest reset it".to_owned());
            }
            if !progress.judged
                && let Some(permit) = watched
            {
                match judge(inner, stack, permit) {
                    Judgement::Later => {}
                    Judgement::Good => progress.judged = true,
                    Judgement::Bad => {
                        let _ = host.set_zero_linger();
                        return Outcome::Refused;
                    }
                }
            }
            if let Err(error) = transfer(connection, stack, host, &mut progress) {
                return Outcome::Broken(error.to_string());
            }
            stack.poll(&inner.link, None);
            let socket = stack.socket();
            match socket.state() {
                State::Closed | State::TimeWait if progress.host_ended && progress.guest_ended => {
                    return Outcome::Complete;
                }
                State::Closed => {
                    let _ = host.set_zero_linger();
                    return Outcome::Broken("the guest reset it".to_owned());
                }
                _ => {}
            }
            let reads = !progress.host_ended && socket.can_send();
            let writes = progress.host_is_full && socket.can_recv();
            let interest = match (reads, writes) {
                (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
                (true, false) => Some(Interest::READABLE),
                (false, true) => Some(Interest::WRITABLE),
                (false, false) => None,
            };
            (stack.delay(), interest, !inner.link.has_room())
        };
        if progress.host_ended && progress.guest_ended {
            let since = *lingers.get_or_insert_with(Instant::now);
            if since.elapsed() > LINGER {
                return Outcome::Broken("the guest does not acknowledge the end".to_owned());
            }
        }
        let delay = delay.or(lingers.map(|_| LINGER));
        tokio::select! {
            () = connection.event.notified() => {}
            // A link that is full is no reason to look again before it is not.
            () = inner.link.emptied.notified(), if waits => {}
            () = sleep(delay), if delay.is_some() && !waits => {}
            ready = ready(host, interest), if interest.is_some() => {
                if let Err(error) = ready {
                    return Outcome::Broken(error.to_string());
                }
                connection.heard.set(Instant::now());
            }
        }
    }
}

pub(super) async fn sleep(delay: Option<Duration>) {
    match delay {
        // Another task's turn.
        Some(Duration::ZERO) => tokio::task::yield_now().await,
        Some(delay) => tokio::time::sleep(delay).await,
        None => {}
    }
}

async fn ready(host: &TcpStream, interest: Option<Interest>) -> io::Result<()> {
    match interest {
        Some(interest) => host.ready(interest).await.map(drop),
        None => Ok(()),
    }
}

/// Moves what can be moved without waiting.
fn transfer(
    connection: &Connection,
    stack: &mut Stack,
    host: &TcpStream,
    progress: &mut Progress,
) -> io::Result<()> {
    let closed = || io::Error::from(io::ErrorKind::NotConnected);
    progress.host_is_full = false;
    while progress.judged && stack.socket().can_recv() && !progress.host_is_full {
        let result = stack.socket().recv(|bytes| match host.try_write(bytes) {
            Ok(count) => (count, Ok(count)),
            Err(error) => (0, Err(error)),
        });
        match result.map_err(|_| closed())? {
            Ok(0) => progress.host_is_full = true,
            Ok(count) => connection.sent.set(connection.sent.get() + count as u64),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => progress.host_is_full = true,
            Err(error) => return Err(error),
        }
    }
    if stack.has_heard_all() && !progress.guest_ended {
        progress.guest_ended = true;
        // One that has ended already needs no telling.
        let _ = rustix::net::shutdown(host, rustix::net::Shutdown::Write);
    }
    let mut is_empty = false;
    while !progress.host_ended && !is_empty && stack.socket().can_send() {
        let result = stack.socket().send(|buffer| match host.try_read(buffer) {
            Ok(count) => (count, Ok(count)),
            Err(error) => (0, Err(error)),
        });
        match result.map_err(|_| closed())? {
            Ok(0) => progress.host_ended = true,
            Ok(count) => connection.received.set(connection.received.get() + count as u64),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => is_empty = true,
            Err(error) => return Err(error),
        }
    }
    if progress.host_ended {
        stack.socket().close();
    }
    Ok(())
}

enum Judgement {
    Later,
    Good,
    Bad,
}

/// Looks at what the guest says first, which is still in its buffer.
fn judge(inner: &Inner, stack: &mut Stack, permit: &Permit) -> Judgement {
    let has_ended = stack.has_heard_all();
    let socket = stack.socket();
    let is_full = socket.recv_queue() >= socket.recv_capacity().min(inspect::LIMIT);
    // Nothing was taken out yet, so it lies in one piece.
    let bytes = socket.peek(inspect::LIMIT).unwrap_or_default();
    let names = match inspect::beginning(bytes) {
        Beginning::Partial if has_ended && bytes.is_empty() => return Judgement::Good,
        Beginning::Partial if is_full || has_ended => {
            inner.decisions.unreadable(permit, "whom it is for cannot be told from what it begins with");
            return Judgement::Bad;
        }
        Beginning::Partial => return Judgement::Later,
        Beginning::Other => return Judgement::Good,
        Beginning::Malformed(reason) => {
            inner.decisions.unreadable(permit, reason);
            return Judgement::Bad;
        }
        Beginning::Tls(None) if permit.scrutiny == Scrutiny::Listed => {
            inner.decisions.unreadable(permit, "its TLS names no server, so that the rule cannot be checked");
            return Judgement::Bad;
        }
        Beginning::Tls(name) => name.into_iter().collect(),
        Beginning::Http(names) => names,
    };
    match names.iter().all(|name| inner.decisions.says(permit, name)) {
        true => Judgement::Good,
        false => Judgement::Bad,
    }
}
