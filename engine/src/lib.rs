//! The model file, the networks, the plan, and the road from a prompt to pixels.

pub mod budget;
pub mod card;
pub mod error;
pub mod format;
pub mod graph;
pub mod memory;
pub mod models;
pub mod pipeline;
pub mod precision;
pub mod presets;
pub mod rng;
pub mod sampler;
pub mod schedule;
pub mod text;
pub mod weights;

pub use error::{Error, Result};
