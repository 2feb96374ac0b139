//! The model file, the networks, the plan, and the road from a prompt to pixels.

pub mod card;
pub mod error;
pub mod format;
pub mod graph;
pub mod models;
pub mod pipeline;
pub mod precision;
pub mod sampler;

pub use error::{Error, Result};
