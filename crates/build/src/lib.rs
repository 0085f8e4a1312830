//! From a Dockerfile to an image.
#![forbid(unsafe_code)]

pub mod cache;
pub mod configuration;
pub mod dockerfile;
pub mod executor;
pub mod ignore;
mod place;
mod solve;
mod source;

pub use solve::{BuildError, Event, OnEvent, Options, build};
pub use source::Context;
