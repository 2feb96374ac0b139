//! The road from a prompt to pixels.

pub mod types;

pub use types::{Control, Event, Latents, Memory, Noise, Part, Picture, Request, Settings, Timings, Warning};
