//! The model file, the networks, the plan, and the road from a prompt to pixels.

pub mod card;
pub mod format;
pub mod graph;
