//! What samplers over noise levels share: states are picture plus `sigma` times noise, and the network sees them scaled to
//! unit variance (Karras et al. 2022).

use super::{Run, scale};
use crate::card::Prediction;
use crate::schedule::Levels;

/// A run over noise levels.
pub(super) struct OverSigmas {
    pub(super) levels: Levels,
    prediction: Prediction,
}

impl OverSigmas {
    pub(super) fn new(run: &Run<'_>) -> Self {
        OverSigmas {
            levels: run.schedule.levels(run.steps, run.spread),
            prediction: run.schedule.prediction(),
        }
    }

    pub(super) fn init_noise_sigma(&self) -> f32 {
        self.levels.init_noise_sigma as f32
    }

    /// The network's input at noise level `sigma`.
    pub(super) fn scale_model_input(&self, latents: &[f32], sigma: f64, out: &mut [f32]) {
        scale(latents, (1.0 / (sigma * sigma + 1.0).sqrt()) as f32, out);
    }

    /// The derivative of the state by `sigma`, `(x - denoised) / sigma`, as factors of latents and model output.
    pub(super) fn derivative(&self, sigma: f64) -> (f64, f64) {
        match self.prediction {
            Prediction::Epsilon => (0.0, 1.0),
            Prediction::V => (sigma / (sigma * sigma + 1.0), 1.0 / (sigma * sigma + 1.0).sqrt()),
        }
    }
}
