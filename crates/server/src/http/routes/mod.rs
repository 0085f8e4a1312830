//! The routes, a group a file.
// The attribute that describes a route writes them.
#![allow(unused_qualifications)]

mod detached;
mod exec;
mod files;
mod host;
mod record;
mod review;
mod run;
mod sandboxes;
mod snapshots;

use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::App;
use super::terminal;

/// Routes that create something, for which a request may have an idempotency key.
pub(super) fn creating() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(run::run))
        .routes(routes!(run::batch))
        .routes(routes!(sandboxes::create))
        .routes(routes!(sandboxes::fork))
        .routes(routes!(detached::detach))
        .routes(routes!(snapshots::take))
        .routes(routes!(snapshots::restore))
}

/// All others.
pub(super) fn other() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(host::health))
        .routes(routes!(host::status))
        .routes(routes!(host::stats))
        .routes(routes!(host::backends))
        .routes(routes!(host::metrics))
        .routes(routes!(host::openapi))
        .routes(routes!(host::images))
        .routes(routes!(host::remove_image))
        .routes(routes!(host::gc))
        .routes(routes!(run::stream))
        .routes(routes!(sandboxes::list))
        .routes(routes!(sandboxes::by_uuid))
        .routes(routes!(sandboxes::info, sandboxes::update, sandboxes::remove))
        .routes(routes!(sandboxes::start))
        .routes(routes!(sandboxes::stop))
        .routes(routes!(sandboxes::pause))
        .routes(routes!(sandboxes::resume))
        .routes(routes!(sandboxes::extend))
        .routes(routes!(sandboxes::stats))
        .routes(routes!(exec::exec))
        .routes(routes!(terminal::terminal))
        .routes(routes!(detached::list))
        .routes(routes!(detached::status, detached::kill))
        .routes(routes!(detached::logs))
        .routes(routes!(record::logs))
        .routes(routes!(record::audit))
        .routes(routes!(record::events))
        .routes(routes!(files::read, files::write, files::remove))
        .routes(routes!(files::write_many))
        .routes(routes!(review::diff))
        .routes(routes!(review::apply))
        .routes(routes!(review::last_diff))
        .routes(routes!(review::last_apply))
        .routes(routes!(snapshots::list))
        .routes(routes!(snapshots::info, snapshots::remove))
}
