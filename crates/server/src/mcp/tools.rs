//! The tools.

use std::time::Duration;

use agentkernel_sandbox::Problem;
use axum::http::request::Parts;
use rmcp::handler::server::common::schema_for_output;
use rmcp::handler::server::wrapper::Parameters;
use rmcp::model::{CallToolResult, ContentBlock, ProgressNotificationParam};
use rmcp::service::RequestContext;
use rmcp::{Json, RoleServer, tool, tool_router};
use serde::Serialize;
use tokio::sync::watch;

use super::parameters::{
    Apply, Changes, Commands, Detached, DetachedLogs, Done, FilePath, FileWrite, Named, Nothing, Of, Restore,
    Sandboxes, SnapshotName, Snapshots,
};
use super::service::{Service, Waiting};
use super::words;
use crate::engine::Engine;
use crate::model::{
    Applied, CreateRequest, DetachedCommand, Diff, ExecRequest, FileContent, ForkRequest, RunOutput,
    RunRequest, SandboxInfo, SnapshotInfo, SnapshotRequest, StopRequest, WriteManyRequest, WriteRequest,
    Written,
};
use crate::problem::shown;

/// Bytes that are given of each stream of a command's output: an agent reads them all.
const OUTPUT: usize = 32 << 10;
/// Bytes that are given of a diff.
const DIFF: usize = 64 << 10;
/// Bytes that are given of a file.
const FILE: usize = 256 << 10;
/// How often progress is told.
const PROGRESS: Duration = Duration::from_millis(250);
/// Longest line that progress tells, characters.
const LINE: usize = 200;

type Context = RequestContext<RoleServer>;
/// Structured content, and the same as text. Tools write it out, for their schemas are made of how it is written.
type Answer<T> = Result<Json<T>, String>;
/// Structured content, and words.
type Told = Result<CallToolResult, String>;

fn readable<T: Serialize>(data: &T, text: String) -> CallToolResult {
    let mut result = CallToolResult::structured(serde_json::to_value(data).unwrap_or_default());
    result.content = vec![ContentBlock::text(text)];
    result
}

#[tool_router(vis = "pub(super)")]
impl Service {
    /// Run a command in a fresh, isolated microVM that is removed afterwards. It sees the project copy-on-write: what it
    /// changes is kept apart until sandbox_apply (without a name), see it with sandbox_diff. Use it for anything you would
    /// not trust on the host. A command that fails is an answer with its exit code; long output is cut in its middle.
    #[tool(
        name = "sandbox_run", output_schema = schema_for_output::<RunOutput>(),
        annotations(title = "Run in a temporary sandbox", destructive_hint = false, open_world_hint = true)
    )]
    async fn run(&self, Parameters(request): Parameters<RunRequest>, context: Context) -> Told {
        let (line, mut said) = listener();
        let output = self.followed(context, line, self.engine.run(&request, OUTPUT, &mut said)).await?;
        Ok(readable(&output.0, words::of_run(&output.0)))
    }

    /// Make a sandbox that lives until it is removed: for several commands that build on each other, servers, experiments.
    /// It has a copy-on-write view of the project and a disk of its own.
    #[tool(
        name = "sandbox_create",
        annotations(title = "Create a sandbox", destructive_hint = false, open_world_hint = true)
    )]
    async fn create(
        &self,
        Parameters(request): Parameters<CreateRequest>,
        context: Context,
    ) -> Result<Json<SandboxInfo>, String> {
        self.followed(context, listener().0, self.engine.create(&request)).await
    }

    /// Run a command in a sandbox and wait for its end. Give a timeout for what may hang, or use sandbox_exec_detach for what
    /// runs on.
    #[tool(
        name = "sandbox_exec", output_schema = schema_for_output::<RunOutput>(),
        annotations(title = "Run in a sandbox", destructive_hint = false, open_world_hint = true)
    )]
    async fn exec(&self, Parameters(request): Parameters<Of<ExecRequest>>, context: Context) -> Told {
        let Of { name, request } = request;
        let (line, mut said) = listener();
        let output =
            self.followed(context, line, self.engine.exec(&name, &request, OUTPUT, &mut said)).await?;
        Ok(readable(&output.0, words::of_run(&output.0)))
    }

    /// List the sandboxes that there are.
    #[tool(
        name = "sandbox_list",
        annotations(title = "List sandboxes", read_only_hint = true, open_world_hint = false)
    )]
    async fn list(
        &self,
        Parameters(Nothing {}): Parameters<Nothing>,
        context: Context,
    ) -> Result<Json<Sandboxes>, String> {
        self.call(context, async { Ok(Sandboxes { sandboxes: self.engine.list().await? }) }).await
    }

    /// Remove a sandbox with all that is in it, also if it runs. Changes of the project that were not applied are lost.
    #[tool(
        name = "sandbox_remove",
        annotations(
            title = "Remove a sandbox",
            destructive_hint = true,
            idempotent_hint = false,
            open_world_hint = false
        )
    )]
    async fn remove(
        &self,
        Parameters(Named { name }): Parameters<Named>,
        context: Context,
    ) -> Result<Json<Done>, String> {
        self.call(context, async {
            self.engine.remove(&name).await?;
            Ok(Done { done: format!("{name} is removed") })
        })
        .await
    }

    /// Start a sandbox that is stopped; its disk is as it was.
    #[tool(
        name = "sandbox_start",
        annotations(
            title = "Start a sandbox",
            destructive_hint = false,
            idempotent_hint = true,
            open_world_hint = false
        )
    )]
    async fn start(
        &self,
        Parameters(Named { name }): Parameters<Named>,
        context: Context,
    ) -> Result<Json<SandboxInfo>, String> {
        self.followed(context, listener().0, self.engine.start(&name)).await
    }

    /// Stop a sandbox: its programs end, its disk stays.
    #[tool(
        name = "sandbox_stop",
        annotations(
            title = "Stop a sandbox",
            destructive_hint = true,
            idempotent_hint = true,
            open_world_hint = false
        )
    )]
    async fn stop(
        &self,
        Parameters(request): Parameters<Of<StopRequest>>,
        context: Context,
    ) -> Result<Json<SandboxInfo>, String> {
        let Of { name, request } = request;
        self.call(context, self.engine.stop(&name, &request)).await
    }

    /// Read a file of a sandbox; one that is no text comes in base64. A long one is cut in its middle: read parts of it with
    /// sandbox_exec.
    #[tool(
        name = "sandbox_file_read",
        annotations(title = "Read a file", read_only_hint = true, open_world_hint = false)
    )]
    async fn file_read(
        &self,
        Parameters(file): Parameters<FilePath>,
        context: Context,
    ) -> Result<Json<FileContent>, String> {
        self.call(context, self.engine.read_file(&file.name, &file.path, FILE)).await
    }

    /// Write a whole file of a sandbox, with the directories it is in. Files of the project are its copy-on-write view: the
    /// host's stay as they are until sandbox_apply.
    #[tool(
        name = "sandbox_file_write",
        annotations(
            title = "Write a file",
            destructive_hint = true,
            idempotent_hint = true,
            open_world_hint = false
        )
    )]
    async fn file_write(
        &self,
        Parameters(file): Parameters<FileWrite>,
        context: Context,
    ) -> Result<Json<Done>, String> {
        let FileWrite { name, path, content, encoding } = file;
        self.call(context, async {
            let request = WriteRequest { content, encoding };
            let size = self.engine.write_file(&name, &path, request).await?;
            Ok(Done { done: format!("{size} bytes are written to {path}") })
        })
        .await
    }

    /// Write whole text files of a sandbox, with the directories they are in.
    #[tool(
        name = "sandbox_write_files",
        annotations(
            title = "Write files",
            destructive_hint = true,
            idempotent_hint = true,
            open_world_hint = false
        )
    )]
    async fn write_files(
        &self,
        Parameters(files): Parameters<Of<WriteManyRequest>>,
        context: Context,
    ) -> Result<Json<Written>, String> {
        let Of { name, request } = files;
        self.call(context, self.engine.write_files(&name, request)).await
    }

    /// Start a command in a sandbox that runs on, such as a server or a long build; its id is for the other sandbox_exec_
    /// tools.
    #[tool(
        name = "sandbox_exec_detach",
        annotations(title = "Start in a sandbox", destructive_hint = false, open_world_hint = true)
    )]
    async fn exec_detach(
        &self,
        Parameters(request): Parameters<Of<ExecRequest>>,
        context: Context,
    ) -> Result<Json<DetachedCommand>, String> {
        let Of { name, request } = request;
        self.call(context, self.engine.detach(&name, &request)).await
    }

    /// What became of a detached command: whether it runs, its exit code.
    #[tool(
        name = "sandbox_exec_status",
        annotations(title = "Look at a command", read_only_hint = true, open_world_hint = false)
    )]
    async fn exec_status(
        &self,
        Parameters(Detached { name, id }): Parameters<Detached>,
        context: Context,
    ) -> Result<Json<DetachedCommand>, String> {
        self.call(context, self.engine.detached_status(&name, &id)).await
    }

    /// What a detached command said so far; long output is cut in its middle.
    #[tool(
        name = "sandbox_exec_logs",
        annotations(title = "Read a command's output", read_only_hint = true, open_world_hint = false)
    )]
    async fn exec_logs(
        &self,
        Parameters(logs): Parameters<DetachedLogs>,
        context: Context,
    ) -> Result<Json<crate::model::DetachedLogs>, String> {
        self.call(context, self.engine.detached_logs(&logs.name, &logs.id, logs.stream, OUTPUT)).await
    }

    /// Kill a detached command with all it started.
    #[tool(
        name = "sandbox_exec_kill",
        annotations(
            title = "Kill a command",
            destructive_hint = true,
            idempotent_hint = true,
            open_world_hint = false
        )
    )]
    async fn exec_kill(
        &self,
        Parameters(Detached { name, id }): Parameters<Detached>,
        context: Context,
    ) -> Result<Json<DetachedCommand>, String> {
        self.call(context, self.engine.detached_kill(&name, &id)).await
    }

    /// List the detached commands of a sandbox.
    #[tool(
        name = "sandbox_exec_list",
        annotations(title = "List commands", read_only_hint = true, open_world_hint = false)
    )]
    async fn exec_list(
        &self,
        Parameters(Named { name }): Parameters<Named>,
        context: Context,
    ) -> Result<Json<Commands>, String> {
        self.call(context, async { Ok(Commands { commands: self.engine.detached(&name).await? }) }).await
    }

    /// Show what a sandbox changed in the project, or the last sandbox_run if no name is given: a unified diff, and what
    /// would conflict or be held back. Look at it before sandbox_apply.
    #[tool(
        name = "sandbox_diff", output_schema = schema_for_output::<Diff>(),
        annotations(title = "Review changes", read_only_hint = true, open_world_hint = false)
    )]
    async fn diff(&self, Parameters(changes): Parameters<Changes>, context: Context) -> Told {
        let diff =
            self.call(context, self.engine.diff(changes.name.as_deref(), &changes.paths, DIFF)).await?;
        Ok(readable(&diff.0, words::of_diff(&diff.0)))
    }

    /// Write a sandbox's changes to the project on the host, or the last sandbox_run's if no name is given. What conflicts
    /// with the host's files, and what could run on the host by itself (git hooks and the like), is left and reported.
    #[tool(
        name = "sandbox_apply",
        annotations(
            title = "Apply changes to the project",
            destructive_hint = true,
            idempotent_hint = true,
            open_world_hint = false
        )
    )]
    async fn apply(
        &self,
        Parameters(request): Parameters<Apply>,
        context: Context,
    ) -> Result<Json<Applied>, String> {
        let (name, request) = request.split();
        self.call(context, self.engine.apply(name.as_deref(), &request)).await
    }

    /// Make copies of a sandbox that runs, with memory, processes and disk, in a moment: try several ways at once, keep the
    /// best.
    #[tool(
        name = "sandbox_fork",
        annotations(title = "Fork a sandbox", destructive_hint = false, open_world_hint = false)
    )]
    async fn fork(
        &self,
        Parameters(request): Parameters<Of<ForkRequest>>,
        context: Context,
    ) -> Result<Json<Sandboxes>, String> {
        let Of { name, request } = request;
        let work = async { Ok(Sandboxes { sandboxes: self.engine.fork(&name, &request).await? }) };
        self.followed(context, listener().0, work).await
    }

    /// Keep what a sandbox is now: memory, processes and disk if it runs, its disk if it is stopped. Take one before
    /// something that cannot be undone.
    #[tool(
        name = "snapshot_take",
        annotations(title = "Take a snapshot", destructive_hint = false, open_world_hint = false)
    )]
    async fn snapshot_take(
        &self,
        Parameters(request): Parameters<SnapshotRequest>,
        context: Context,
    ) -> Result<Json<SnapshotInfo>, String> {
        self.followed(context, listener().0, self.engine.take_snapshot(&request)).await
    }

    /// List snapshots.
    #[tool(
        name = "snapshot_list",
        annotations(title = "List snapshots", read_only_hint = true, open_world_hint = false)
    )]
    async fn snapshot_list(
        &self,
        Parameters(Nothing {}): Parameters<Nothing>,
        context: Context,
    ) -> Result<Json<Snapshots>, String> {
        self.call(context, async { Ok(Snapshots { snapshots: self.engine.snapshots().await? }) }).await
    }

    /// Bring a snapshot back: in place, giving up what the sandbox is now, or as another sandbox.
    #[tool(
        name = "snapshot_restore",
        annotations(title = "Restore a snapshot", destructive_hint = true, open_world_hint = false)
    )]
    async fn snapshot_restore(
        &self,
        Parameters(request): Parameters<Restore>,
        context: Context,
    ) -> Result<Json<SandboxInfo>, String> {
        let (name, request) = request.split();
        self.followed(context, listener().0, self.engine.restore(&name, &request)).await
    }

    /// Delete a snapshot. Sandboxes that were restored from it stay.
    #[tool(
        name = "snapshot_delete",
        annotations(title = "Delete a snapshot", destructive_hint = true, open_world_hint = false)
    )]
    async fn snapshot_delete(
        &self,
        Parameters(SnapshotName { name }): Parameters<SnapshotName>,
        context: Context,
    ) -> Result<Json<Done>, String> {
        self.call(context, async {
            self.engine.remove_snapshot(&name).await?;
            Ok(Done { done: format!("{name} is deleted") })
        })
        .await
    }
}

/// Who hears what a command says, and where its last line is then.
fn listener() -> (watch::Receiver<String>, impl FnMut(&[u8], bool) + Send) {
    let (sender, receiver) = watch::channel(String::new());
    let said = move |bytes: &[u8], _: bool| {
        let text = String::from_utf8_lossy(bytes);
        if let Some(line) = text.lines().rev().find(|line| !line.trim().is_empty()) {
            let line = line.chars().filter(|character| !character.is_control()).take(LINE).collect();
            sender.send_replace(line);
        }
    };
    (receiver, said)
}

impl Service {
    /// Does what is asked for. A request that is cancelled, or whose peer is gone, is dropped, and with it what it began.
    async fn call<T>(&self, context: Context, work: impl Future<Output = Result<T, Problem>>) -> Answer<T> {
        tokio::select! {
            result = work => result.map(Json).map_err(|problem| told(&self.engine, &problem)),
            () = context.ct.cancelled() => Err("the request was cancelled".to_owned()),
            () = abandoned(&context) => Err("nobody waits for the answer".to_owned()),
        }
    }

    /// As [`Service::call`], for what takes a while: a client that asked for it is told how it goes.
    async fn followed<T>(
        &self,
        context: Context,
        line: watch::Receiver<String>,
        work: impl Future<Output = Result<T, Problem>>,
    ) -> Answer<T> {
        let progress = progress(context.clone(), line);
        let work = async {
            tokio::select! {
                result = work => result,
                never = progress => match never {},
            }
        };
        self.call(context, work).await
    }
}

/// Waits until nobody waits for the answer to a request over HTTP. Over stdio the session ends with its client.
async fn abandoned(context: &Context) {
    let parts = context.extensions.get::<Parts>();
    match parts.and_then(|parts| parts.extensions.get::<Waiting>()) {
        Some(Waiting(waiting)) => waiting.cancelled().await,
        None => std::future::pending().await,
    }
}

/// Tells the client how it goes, if it asked for that.
async fn progress(context: Context, mut line: watch::Receiver<String>) -> std::convert::Infallible {
    let Some(token) = context.meta.get_progress_token() else { return std::future::pending().await };
    let mut count = 0.0;
    loop {
        tokio::time::sleep(PROGRESS).await;
        count += 1.0;
        let mut param = ProgressNotificationParam::new(token.clone(), count);
        if line.has_changed().unwrap_or(false) {
            param.message = Some(line.borrow_and_update().clone());
        }
        // A client that is gone is noticed elsewhere.
        let _ = context.peer.notify_progress(param).await;
    }
}

/// What an agent is told of a problem.
fn told(engine: &Engine, problem: &Problem) -> String {
    let mut text = format!("{} ({})", shown(engine, problem), problem.code);
    if let Some(hint) = &problem.hint {
        text.push_str(&format!("; hint: {hint}"));
    }
    text
}
