//! What a guest changed, recorded and applied to a host's tree: no machine, no root, no network.

mod crash;
mod hostile;
mod model;
mod project;
mod review;
mod rules;
