//! From a Dockerfile to an image.
#![forbid(unsafe_code)]

pub mod dockerfile;
pub mod ignore;
