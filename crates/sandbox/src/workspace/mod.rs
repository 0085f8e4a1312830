//! The workspace: the project directory a sandbox sees, and what becomes of its changes.
//!
//! ```text
//! file server --record_first--> BaseTable
//! guest's upper layer --> ChangeRecorder --> ChangeSet --> LastChanges, diff
//!                                               └--> apply --> the host's tree
//! ```

mod apply;
mod base;
mod changes;
mod diff;
mod guard;
mod last;
mod path;
mod record;
mod rename;
mod tree;

pub use apply::{
    Applied, ApplyAction, ApplyError, ApplyFailure, ApplyOptions, ApplyReport, Conflict, ConflictReason,
    HeldBack, apply, repair,
};
pub use base::{Base, BaseTable};
pub use changes::{
    Change, ChangeKind, ChangeSet, ChangeSetError, ChangeStatus, ChangeSummary, ContentReader,
};
pub use diff::{DiffError, DiffOptions, DiffStatus, DiffSummary, FileDiff, FileKind, Palette, Side, diff};
pub use guard::{guarded, guarded_leaf};
pub use last::LastChanges;
pub use path::{NAME_BYTES_MAX, PATH_BYTES_MAX, PathError, RelativePath, TARGET_BYTES_MAX};
pub use record::{BaseLookup, ChangeLimits, ChangeRecorder, Origin, RecordError, UpperEntry, VisibleLookup};
pub use rename::Rename;
