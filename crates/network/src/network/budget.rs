//! The memory of all connections of a machine.

use std::cell::Cell;
use std::rc::Rc;

/// Most connections at once; for another one the oldest idle one is given up.
pub(crate) const CONNECTIONS: usize = 1024;
/// Most tasks of connections, those included that were given up and have not ended yet.
pub(crate) const CONNECTION_TASKS: usize = CONNECTIONS + 128;
/// Bytes that each connection has at least, in each direction: a segment of the largest size.
const LEAST: usize = 16 << 10;
/// Bytes beyond those, for all.
const EXTRA: usize = 24 << 20;
/// Most bytes beyond those for one: more is not faster.
const EXTRA_EACH: usize = 1536 << 10;
/// One gets at most this part of what is left, so that there is always something left.
const PART: usize = 8;

/// What is left. All connections together, those included that have yet to end, have at most
/// `CONNECTION_TASKS * 2 * LEAST + EXTRA` = 60 MiB; what else the network holds (frames on their way, datagrams, names) fits
/// the 4 MiB that are left of 64.
#[derive(Debug)]
pub(crate) struct Budget {
    extra: Cell<usize>,
}

/// Buffers of one connection; given back when dropped.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Rc<Budget>,
    extra: usize,
}

impl Budget {
    pub(crate) fn new() -> Rc<Self> {
        Rc::new(Self { extra: Cell::new(EXTRA) })
    }

    pub(crate) fn share(self: &Rc<Self>) -> Share {
        let extra = (self.extra.get() / PART).min(EXTRA_EACH) & !0xfff;
        self.extra.set(self.extra.get() - extra);
        Share { budget: self.clone(), extra }
    }
}

/// How many tasks of a kind there may be. They are counted before they are begun: a flood is read faster than they run.
#[derive(Debug)]
pub(crate) struct Slots {
    left: Cell<usize>,
}

/// The place of one task; given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot(Rc<Slots>);

impl Slots {
    pub(crate) fn new(most: usize) -> Rc<Self> {
        Rc::new(Self { left: Cell::new(most) })
    }

    pub(crate) fn take(self: &Rc<Self>) -> Option<Slot> {
        self.left.set(self.left.get().checked_sub(1)?);
        Some(Slot(self.clone()))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.left.set(self.0.left.get() + 1);
    }
}

impl Share {
    /// Bytes from the guest that may wait.
    pub(crate) fn guests(&self) -> usize {
        LEAST + self.extra / 3
    }

    /// Bytes for the guest that may wait.
    pub(crate) fn hosts(&self) -> usize {
        LEAST + self.extra - self.extra / 3
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.extra.set(self.budget.extra.get() + self.extra);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_connections_together_have_60_mib() {
        let budget = Budget::new();
        let shares: Vec<_> = (0..CONNECTION_TASKS).map(|_| budget.share()).collect();
        let sum: usize = shares.iter().map(|share| share.guests() + share.hosts()).sum();
        assert!(sum <= 60 << 20, "{sum}");
        assert!(shares.iter().all(|share| share.guests() >= LEAST && share.hosts() >= LEAST));
        assert!(shares[0].hosts() > 1 << 20);
        drop(shares);
        assert_eq!(budget.extra.get(), EXTRA);
    }
}
