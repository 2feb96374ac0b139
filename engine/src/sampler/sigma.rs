//! What samplers over noise levels share: states are picture plus `sigma` times noise, the network sees them scaled, and
//! its output is turned into a picture (Karras et al. 2022).

use super::{Run, scale};
use crate::card::Prediction;
use crate::schedule::{Levels, Schedule};

/// How the network is put between states and pictures: table 1 of Karras et al. 2022. Stable Diffusion is the case of
/// `sigma_data` 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct Preconditioning {
    prediction: Prediction,
    /// Whether the picture is partly the state itself, whatever is predicted.
    edm: bool,
    sigma_data: f64,
}

impl Preconditioning {
    pub(super) fn new(schedule: &Schedule) -> Self {
        let edm = schedule.edm();
        let sigma_data = edm.map_or(1.0, |edm| edm.sigma_data);
        Preconditioning { prediction: schedule.prediction(), edm: edm.is_some(), sigma_data }
    }

    /// Whether the levels are those of EDM.
    pub(super) fn is_edm(&self) -> bool {
        self.edm
    }

    /// `c_in`: the network's input is this times the state.
    pub(super) fn input(&self, sigma: f64) -> f64 {
        1.0 / self.size(sigma)
    }

    /// Deviation of the state.
    fn size(&self, sigma: f64) -> f64 {
        (sigma * sigma + self.sigma_data * self.sigma_data).sqrt()
    }

    /// `c_skip` and `c_out`: the picture is the first times the state plus the second times the network's output.
    pub(super) fn denoised(&self, sigma: f64) -> (f64, f64) {
        let size = self.size(sigma);
        let skip = (self.sigma_data / size).powi(2);
        let out = sigma * self.sigma_data / size;
        match self.prediction {
            Prediction::V => (skip, -out),
            Prediction::Epsilon if self.edm => (skip, out),
            Prediction::Epsilon => (1.0, -sigma),
        }
    }
}

/// A run over noise levels.
pub(super) struct OverSigmas {
    pub(super) levels: Levels,
    preconditioning: Preconditioning,
}

impl OverSigmas {
    pub(super) fn new(run: &Run<'_>) -> Self {
        OverSigmas {
            levels: run.schedule.levels(run.steps, run.spread),
            preconditioning: Preconditioning::new(run.schedule),
        }
    }

    pub(super) fn init_noise_sigma(&self) -> f32 {
        self.levels.init_noise_sigma as f32
    }

    /// The network's input at noise level `sigma`.
    pub(super) fn scale_model_input(&self, latents: &[f32], sigma: f64, out: &mut [f32]) {
        scale(latents, self.preconditioning.input(sigma) as f32, out);
    }

    /// The derivative of the state by `sigma`, `(x - denoised) / sigma`, as factors of latents and model output.
    pub(super) fn derivative(&self, sigma: f64) -> (f64, f64) {
        let (skip, out) = self.preconditioning.denoised(sigma);
        ((1.0 - skip) / sigma, -out / sigma)
    }
}
