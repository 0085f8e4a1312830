//! The name server over TCP.

use std::rc::Rc;
use std::time::Duration;

use smoltcp::socket::tcp::State;

use super::pass::sleep;
use super::stack::Stack;
use super::{Connection, GivenUp};
use crate::network::{Flow, Inner};

/// How long the end of a connection may take.
const GOODBYE: Duration = Duration::from_secs(5);
/// Longest question, bytes, with its length.
const QUESTION: usize = 2 + (2 << 10);

/// Answers questions for names over TCP (RFC 7766), one after the other.
pub(super) async fn answer_questions(inner: Rc<Inner>, connection: Rc<Connection>, flow: Flow) {
    let mut question = Vec::new();
    while let Some(bytes) = receive(&inner, &connection).await {
        question.extend(bytes);
        let complete = question.split_first_chunk::<2>().and_then(|(length, rest)| {
            let length = usize::from(u16::from_be_bytes(*length));
            rest.get(..length).map(|bytes| (bytes.to_vec(), 2 + length))
        });
        match complete {
            None if question.len() > QUESTION => break,
            None => continue,
            Some((bytes, used)) => {
                question.drain(..used);
                let Some(answer) = inner.name_server.answer(&inner.decisions, &bytes, false).await else {
                    break;
                };
                let length = u16::try_from(answer.len()).unwrap_or(u16::MAX);
                if !send(&inner, &connection, &[&length.to_be_bytes(), &answer[..]].concat()).await {
                    break;
                }
            }
        }
    }
    let goodbye = with_stack(&inner, &connection, |stack| {
        stack.socket().close();
        matches!(stack.socket().state(), State::Closed | State::TimeWait).then_some(())
    });
    let _ = tokio::time::timeout(GOODBYE, goodbye).await;
    let replaced = connection.given_up.get() == Some(GivenUp::Replaced);
    if let Some(mut stack) = connection.stack.borrow_mut().take()
        && !replaced
    {
        match stack.socket().state() {
            State::Closed | State::TimeWait => stack.finish(&inner.link),
            _ => stack.abort(&inner.link),
        }
    }
    inner.forget(flow, &connection);
}

/// What the guest says next, at most as much as one question; `None` if it says no more. An empty answer means to look
/// again at what is there.
async fn receive(inner: &Inner, connection: &Connection) -> Option<Vec<u8>> {
    with_stack(inner, connection, |stack| {
        if stack.socket().can_recv() {
            let mut bytes = vec![0; QUESTION];
            let count = stack.socket().recv_slice(&mut bytes).unwrap_or(0);
            bytes.truncate(count);
            return Some(Some(bytes));
        }
        (stack.has_heard_all() || stack.socket().state() == State::Closed).then_some(None)
    })
    .await
    .flatten()
}

/// Sends all of it; false if the guest is gone.
async fn send(inner: &Inner, connection: &Connection, bytes: &[u8]) -> bool {
    let mut rest = bytes;
    let sent = with_stack(inner, connection, |stack| {
        while !rest.is_empty() {
            match stack.socket().send_slice(rest) {
                Ok(0) => return None,
                Ok(count) => rest = &rest[count..],
                Err(_) => return Some(false),
            }
        }
        // The last answer must be gone before the stack is.
        (stack.socket().send_queue() == 0).then_some(true)
    });
    sent.await.unwrap_or(false)
}

/// Looks at a connection's stack whenever something happened, until there is an answer; `None` if it was given up.
async fn with_stack<T>(
    inner: &Inner,
    connection: &Connection,
    mut look: impl FnMut(&mut Stack) -> Option<T>,
) -> Option<T> {
    loop {
        let delay = {
            let mut stack = connection.stack.borrow_mut();
            let stack = stack.as_mut().filter(|_| connection.given_up.get().is_none())?;
            stack.poll(&inner.link, None);
            let answer = look(stack);
            stack.poll(&inner.link, None);
            if answer.is_some() {
                return answer;
            }
            stack.delay()
        };
        let waits = !inner.link.has_room();
        tokio::select! {
            () = connection.event.notified() => {}
            () = inner.link.emptied.notified(), if waits => {}
            () = sleep(delay), if delay.is_some() && !waits => {}
        }
    }
}
