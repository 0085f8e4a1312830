//! What was changed in the project, seen and taken.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use agentkernel_sandbox::workspace::{
    self, ApplyOptions, ApplyReport, ChangeSet, DiffError, DiffOptions, FileDiff, Palette,
};
use agentkernel_sandbox::{Problem, plain, problem, review};
use serde_json::Value;

use super::launching::{completed, word};
use super::{Engine, blocking};
use crate::model::{Applied, ApplyRequest, Diff};

/// Bytes of a unified diff that are given.
pub(crate) const UNIFIED: usize = 4 << 20;
/// How long a sandbox may take to say what it changed; one that is stopped is started for that.
const PATIENCE: Duration = Duration::from_secs(180);
/// Changed paths that are given one by one.
const PATHS: usize = 20_000;
const PLAIN: Palette = Palette { header: "", hunk: "", added: "", removed: "", reset: "", escape: false };

impl Engine {
    /// What a sandbox changed in the project, or the last run if none is named. `paths` are relative to the project; none:
    /// all. At most `limit` bytes of the unified diff are given.
    ///
    /// # Errors
    /// Code `no-changes` if there is nothing that could have changed.
    pub async fn diff(&self, name: Option<&str>, paths: &[String], limit: usize) -> Result<Diff, Problem> {
        let paths = relative(paths)?;
        let _alone = self.shared.review.lock().await;
        let mut set = self.changes(name).await?;
        blocking(move || {
            let options = DiffOptions { paths: review::relative(&set, &paths), exclude: Vec::new() };
            let mut files = Vec::new();
            let mut unified = Bounded { bytes: Vec::new(), limit, omitted: 0 };
            let mut show = |file: &FileDiff| {
                if files.len() < PATHS {
                    files.push(serde_json::to_value(file).map_err(std::io::Error::other)?);
                }
                file.write_unified(&mut unified, &PLAIN)
            };
            let summary = workspace::diff(&mut set, &options, &mut show)
                .map_err(|error: DiffError| problem("diff", &error, None))?;
            let summary = serde_json::to_value(&summary).unwrap_or(Value::Null);
            let cut = super::utf8_prefix(&unified.bytes);
            let unified_text = String::from_utf8_lossy(&unified.bytes[..cut]).into_owned();
            Ok(Diff { files, summary, unified: unified_text, omitted_bytes: unified.omitted })
        })
        .await
    }

    /// Writes changes of a sandbox to the project, or those of the last run if none is named.
    ///
    /// # Errors
    /// Code `no-changes`; if the project cannot be written. What conflicts is none: it is in the report.
    pub async fn apply(&self, name: Option<&str>, request: &ApplyRequest) -> Result<Applied, Problem> {
        // To its end, whoever waits for that: what is half applied is worse than either.
        let (engine, name, request) = (self.clone(), name.map(str::to_owned), request.clone());
        let work = async move { engine.apply_whole(name.as_deref(), &request).await };
        completed(self, work, |_| Vec::new()).await
    }

    async fn apply_whole(&self, name: Option<&str>, request: &ApplyRequest) -> Result<Applied, Problem> {
        let (paths, exclude) = (relative(&request.paths)?, relative(&request.exclude)?);
        let dry_run = request.dry_run;
        let _alone = self.shared.review.lock().await;
        let set = self.changes(name).await?;
        // Naming takes what could run on the host by itself: that is the host's.
        let may_name = self.grants().host_access;
        let report = blocking(move || {
            let paths = review::relative(&set, &paths);
            let named = if may_name { paths.clone() } else { Vec::new() };
            let exclude = review::relative(&set, &exclude);
            review::apply(set, &ApplyOptions { named, paths, exclude, dry_run })
        })
        .await?;
        if let Some(name) = name.filter(|_| !dry_run) {
            review::rebase(&self.look_up(name)?, &report).await?;
        }
        Ok(applied(&report))
    }

    async fn changes(&self, name: Option<&str>) -> Result<ChangeSet, Problem> {
        match name {
            Some(name) => {
                let (directory, _) = self.find(name)?;
                let mut progress = |text: &str| tracing::debug!("{text}");
                let changes = review::changes(&directory, &self.settings().program, &mut progress);
                let slow = |_| plain("guest-slow", "the sandbox does not say what it changed", None);
                tokio::time::timeout(PATIENCE, changes).await.map_err(slow)?
            }
            None => {
                let home = self.home().clone();
                let set = blocking(move || review::last(&home)).await?;
                // Those of another project are nothing to clients of this one.
                match self.project() {
                    Some(project) if set.workspace() == project => Ok(set),
                    _ => Err(plain("no-changes", "there are no kept changes of this project", None)),
                }
            }
        }
    }
}

fn applied(report: &ApplyReport) -> Applied {
    Applied {
        complete: report.is_complete() && report.unmatched.is_empty(),
        applied: report.applied.iter().map(|path| path.path.as_path().display().to_string()).collect(),
        report: serde_json::to_value(report).unwrap_or(Value::Null),
    }
}

fn relative(paths: &[String]) -> Result<Vec<PathBuf>, Problem> {
    paths.iter().map(|path| word("paths", path).map(|()| PathBuf::from(path))).collect()
}

/// Takes what there is room for, and counts the rest.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
    omitted: u64,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = self.limit.saturating_sub(self.bytes.len()).min(bytes.len());
        self.bytes.extend_from_slice(&bytes[..room]);
        self.omitted += (bytes.len() - room) as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
