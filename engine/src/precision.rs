//! The precision ladder: how activations are held on their way into a matrix product. The weights are the same on every
//! rung.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// How activations enter a matrix product.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 8-bit integers with a scale per row, against integer weights; bf16 against the others.
    #[default]
    Fast,
    /// bf16.
    High,
    /// f32, with f32 accumulation: what parity is tested with.
    Exact,
}

impl Precision {
    /// All rungs.
    pub const ALL: [Precision; 3] = [Precision::Fast, Precision::High, Precision::Exact];

    /// The name people type.
    pub const fn name(self) -> &'static str {
        match self {
            Precision::Fast => "fast",
            Precision::High => "high",
            Precision::Exact => "exact",
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
