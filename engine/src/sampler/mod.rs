//! Samplers: from a prediction of the network to less noisy latents.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Sampler {
    /// What people type.
    pub name: &'static str,
}

/// Every sampler.
pub static SAMPLERS: &[Sampler] = &[Sampler { name: "ddim" }, Sampler { name: "euler" }];

/// The names in the table.
pub fn names() -> Vec<&'static str> {
    SAMPLERS.iter().map(|s| s.name).collect()
}

/// The row called `name`.
pub fn find(name: &str) -> Result<&'static Sampler> {
    SAMPLERS
        .iter()
        .find(|s| s.name == name)
        .ok_or_else(|| Error::UnknownSampler { name: name.into(), known: names() })
}
