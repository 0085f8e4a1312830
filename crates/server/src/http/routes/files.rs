//! Files of sandboxes. A path is the guest's, absolute, whatever it begins with: `/files/tmp/x` is `/tmp/x`.

use axum::extract::State;

use super::super::App;
use super::super::answer::{Answer, Files, Path, ok};
use crate::model::{Envelope, FileContent, WriteManyRequest, WriteRequest, Written};

/// Read a file.
#[utoipa::path(get, path = "/sandboxes/{name}/files/{*path}", tag = "files",
    params(("name" = String, Path), ("path" = String, Path, description = "The file's, without its first slash.")),
    responses((status = 200, description = "Its content.", body = Envelope<FileContent>)))]
pub(crate) async fn read(
    State(app): State<App>,
    Path((name, path)): Path<(String, String)>,
) -> Answer<FileContent> {
    ok(app.engine.read_file(&name, &absolute(&path)).await?)
}

/// Write a file, with the directories it is in.
#[utoipa::path(put, path = "/sandboxes/{name}/files/{*path}", tag = "files",
    params(("name" = String, Path), ("path" = String, Path, description = "The file's, without its first slash.")),
    request_body = WriteRequest,
    responses((status = 200, description = "It is written.", body = Envelope<String>)))]
pub(crate) async fn write(
    State(app): State<App>,
    Path((name, path)): Path<(String, String)>,
    Files(request): Files<WriteRequest>,
) -> Answer<String> {
    let path = absolute(&path);
    let size = app.engine.write_file(&name, &path, request).await?;
    ok(format!("{size} bytes are written to {path}"))
}

/// Remove a file or a symbolic link.
#[utoipa::path(delete, path = "/sandboxes/{name}/files/{*path}", tag = "files",
    params(("name" = String, Path), ("path" = String, Path, description = "The file's, without its first slash.")),
    responses((status = 200, description = "It is gone.", body = Envelope<String>)))]
pub(crate) async fn remove(
    State(app): State<App>,
    Path((name, path)): Path<(String, String)>,
) -> Answer<String> {
    let path = absolute(&path);
    app.engine.remove_file(&name, &path).await?;
    ok(format!("{path} is removed"))
}

/// Write text files, with the directories they are in.
#[utoipa::path(post, path = "/sandboxes/{name}/files", tag = "files", params(("name" = String, Path)),
    request_body = WriteManyRequest,
    responses((status = 200, description = "All are written.", body = Envelope<Written>)))]
pub(crate) async fn write_many(
    State(app): State<App>,
    Path(name): Path<String>,
    Files(request): Files<WriteManyRequest>,
) -> Answer<Written> {
    ok(app.engine.write_files(&name, request).await?)
}

fn absolute(path: &str) -> String {
    format!("/{}", path.trim_start_matches('/'))
}
