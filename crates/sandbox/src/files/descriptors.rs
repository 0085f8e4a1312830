//! Open files: those of the guest's handles, and those kept open for a guest that does not open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::table::SavedHandle;

/// Most handles of one guest.
const HANDLE_LIMIT: usize = 16 * 1024;
/// Most files kept open between reads.
const CACHE_LIMIT: usize = 128;

/// What an OPEN or CREATE gave to the guest.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) file: OwnedFd,
    pub(super) node: u64,
    pub(super) readable: bool,
    pub(super) writable: bool,
}

/// The open handles of a writable export.
#[derive(Debug, Default)]
pub(super) struct Handles {
    open: Mutex<HashMap<u64, Arc<Handle>>>,
    last: AtomicU64,
}

impl Handles {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, Arc<Handle>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn insert(&self, handle: Handle) -> Result<u64, Errno> {
        let mut open = self.open();
        if open.len() >= HANDLE_LIMIT {
            return Err(Errno::NFILE);
        }
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        open.insert(id, Arc::new(handle));
        Ok(id)
    }

    /// The handle `id`, which must be one of `node`.
    pub(super) fn get(&self, id: u64, node: u64) -> Result<Arc<Handle>, Errno> {
        self.open().get(&id).filter(|handle| handle.node == node).cloned().ok_or(Errno::BADF)
    }

    /// Any handle of `node`, a writable one if there is one: the way to a file that has no name any more.
    pub(super) fn of_node(&self, node: u64) -> Option<Arc<Handle>> {
        let open = self.open();
        let mut own = open.values().filter(|handle| handle.node == node);
        let first = own.next()?;
        Some(Arc::clone(if first.writable { first } else { own.find(|h| h.writable).unwrap_or(first) }))
    }

    pub(super) fn remove(&self, id: u64) {
        let removed = self.open().remove(&id);
        drop(removed);
    }

    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.open());
        drop(all);
    }

    pub(super) fn len(&self) -> usize {
        self.open().len()
    }

    /// All handles, and the id given last.
    pub(super) fn save(&self) -> (Vec<SavedHandle>, u64) {
        let open = self.open();
        let saved = open.iter().map(|(&id, handle)| SavedHandle {
            id,
            node: handle.node,
            readable: handle.readable,
            writable: handle.writable,
        });
        (saved.collect(), self.last.load(Ordering::Relaxed))
    }

    /// Takes over handles that were opened again.
    pub(super) fn adopt(&self, handles: impl IntoIterator<Item = (u64, Handle)>, last: u64) {
        let mut open = self.open();
        open.extend(handles.into_iter().take(HANDLE_LIMIT).map(|(id, handle)| (id, Arc::new(handle))));
        self.last.store(last, Ordering::Relaxed);
    }
}

/// The files read last, by node: a guest that was told not to open reads by node alone.
#[derive(Debug, Default)]
pub(super) struct ReadCache {
    inner: Mutex<Recent>,
}

#[derive(Debug, Default)]
struct Recent {
    files: HashMap<u64, (Arc<OwnedFd>, u64)>,
    clock: u64,
}

impl ReadCache {
    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, node: u64) -> Option<Arc<OwnedFd>> {
        let mut recent = self.recent();
        recent.clock += 1;
        let now = recent.clock;
        let (file, used) = recent.files.get_mut(&node)?;
        *used = now;
        Some(Arc::clone(file))
    }

    pub(super) fn insert(&self, node: u64, file: OwnedFd) -> Arc<OwnedFd> {
        let file = Arc::new(file);
        let mut recent = self.recent();
        if recent.files.len() >= CACHE_LIMIT
            && let Some(oldest) =
                recent.files.iter().min_by_key(|(_, (_, used))| *used).map(|(&node, _)| node)
        {
            recent.files.remove(&oldest);
        }
        recent.clock += 1;
        let now = recent.clock;
        recent.files.insert(node, (Arc::clone(&file), now));
        file
    }

    pub(super) fn remove(&self, node: u64) {
        let removed = self.recent().files.remove(&node);
        drop(removed);
    }

    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut self.recent().files);
        drop(all);
    }
}
