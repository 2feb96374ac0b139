//! The noise schedule of a checkpoint, and what `gen` does with it when nothing else is said.
#![forbid(unsafe_code)]

use engine::card::{
    BetaSchedule, Defaults, Family, Prediction, ScheduleConfig, TimestepSpacing, UnetConfig, VaeConfig,
};

use super::config::{Evidence, flag, number};
use crate::error::Error;

impl Evidence<'_> {
    pub(super) fn schedule(
        &self,
        family: Family,
        unet: &UnetConfig,
        notes: &mut Vec<String>,
    ) -> Result<ScheduleConfig, Error> {
        let config = self.configs.get("scheduler");
        let float = |key: &str, usual: f64| config.and_then(|c| c.get(key)?.as_f64()).unwrap_or(usual);
        let text = |key: &str| config.and_then(|c| c.get(key)?.as_str());
        let class = text("_class_name").unwrap_or("PNDMScheduler");
        let marker = |name: &str| self.sources.model.tensors.contains_key(name);
        for (name, what) in
            [("edm_mean", "EDM noise levels"), ("edm_vpred.sigma_max", "EDM velocity prediction")]
        {
            if marker(name) {
                return Err(self.unsupported(format!("it was trained with {what}")));
            }
        }
        let said = match text("prediction_type") {
            Some("epsilon") => Some(Prediction::Epsilon),
            Some("v_prediction") => Some(Prediction::V),
            Some(other) => return Err(self.unsupported(format!("it predicts {other:?}"))),
            None if config.is_some() => Some(Prediction::Epsilon),
            None if marker("v_pred") => Some(Prediction::V),
            None if family == Family::Sd2 => self.guess_prediction(unet, notes)?,
            None => None,
        };
        let beta_schedule = match text("beta_schedule") {
            Some("scaled_linear") => BetaSchedule::ScaledLinear,
            Some("linear") => BetaSchedule::Linear,
            Some(other) => return Err(self.unsupported(format!("it has {other:?} betas"))),
            None if config.is_some() => BetaSchedule::Linear,
            None => BetaSchedule::ScaledLinear,
        };
        let usual_betas = if config.is_some() { (0.0001, 0.02) } else { (0.00085, 0.012) };
        let from_linspace =
            ["Euler", "DPM", "KDPM", "Heun", "LMS", "UniPC", "DEIS"].iter().any(|c| class.starts_with(c));
        let timestep_spacing = match text("timestep_spacing") {
            Some("linspace") => TimestepSpacing::Linspace,
            Some("leading") => TimestepSpacing::Leading,
            Some("trailing") => TimestepSpacing::Trailing,
            Some(other) => return Err(self.unsupported(format!("it has {other:?} timesteps"))),
            None if from_linspace => TimestepSpacing::Linspace,
            None => TimestepSpacing::Leading,
        };
        Ok(ScheduleConfig {
            num_train_timesteps: number(config, "num_train_timesteps").unwrap_or(1000),
            beta_start: float("beta_start", usual_betas.0),
            beta_end: float("beta_end", usual_betas.1),
            beta_schedule,
            prediction_type: self.wishes.prediction.or(said).unwrap_or(Prediction::Epsilon),
            rescale_betas_zero_snr: match config {
                Some(_) => flag(config, "rescale_betas_zero_snr").unwrap_or(false),
                None => marker("ztsnr") || self.ends_in_noise()?,
            },
            timestep_spacing,
            steps_offset: number(config, "steps_offset").unwrap_or(usize::from(config.is_none())),
            set_alpha_to_one: flag(config, "set_alpha_to_one").unwrap_or(class == "DDIMScheduler"),
        })
    }

    /// Whether the schedule that some checkpoints carry leaves nothing of the picture at its end.
    fn ends_in_noise(&self) -> Result<bool, Error> {
        const NOTHING: f32 = 1e-4;
        let source = &self.sources.model;
        let Some(tensor) = source.tensors.get("alphas_cumprod") else { return Ok(false) };
        if !tensor.dtype.is_float() || tensor.count() != 1000 {
            return Ok(false);
        }
        Ok(source.read_all(tensor)?.last().is_some_and(|&last| last.abs() < NOTHING))
    }

    /// SD 2 comes in both kinds; in those that predict the velocity the biases of one late norm spread wider.
    fn guess_prediction(
        &self,
        unet: &UnetConfig,
        notes: &mut Vec<String>,
    ) -> Result<Option<Prediction>, Error> {
        const SPREAD: f64 = 0.09;
        let last = unet.up_layers.len().saturating_sub(1);
        let block = unet.up_layers.last().map_or(0, |blocks| blocks.len().saturating_sub(1));
        let name = format!("unet.up_blocks.{last}.attentions.{block}.transformer_blocks.0.norm1.bias");
        let Some(view) = self.tensors.get(&name).filter(|_| unet.in_channels == 4) else { return Ok(None) };
        let source = self.sources.of(view);
        let tensor = &source.tensors[&view.name];
        if !tensor.dtype.is_float() || tensor.count() > 1 << 16 {
            return Ok(None);
        }
        let values: Vec<f64> = source.read_all(tensor)?.into_iter().map(f64::from).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let spread = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
        let prediction = if spread > SPREAD { Prediction::V } else { Prediction::Epsilon };
        notes.push(format!(
            "the prediction type is concluded from the weights ({spread:.3}); --prediction overrides it"
        ));
        Ok(Some(prediction))
    }

    pub(super) fn defaults(
        &self,
        family: Family,
        unet: &UnetConfig,
        vae: &VaeConfig,
        schedule: &ScheduleConfig,
    ) -> Defaults {
        let latents = match family {
            Family::Sd15 => 64,
            Family::Sd2 if schedule.prediction_type == Prediction::V => 96,
            Family::Sd2 => 64,
            Family::Sdxl | Family::SdxlRefiner => 128,
        };
        let latents = number(self.configs.get("unet"), "sample_size").unwrap_or(latents);
        let side = latents.saturating_mul(vae.factor());
        let xl = matches!(family, Family::Sdxl | Family::SdxlRefiner);
        // Few-step models are published with trailing timesteps, and make pictures without guidance.
        let turbo = schedule.timestep_spacing == TimestepSpacing::Trailing
            && schedule.prediction_type == Prediction::Epsilon
            && !schedule.rescale_betas_zero_snr;
        let consistency = unet.time_cond_proj_dim.is_some();
        let class = self.configs.get("scheduler").and_then(|c| c.get("_class_name")?.as_str());
        let sampler = match class {
            Some("DDIMScheduler") => "ddim",
            Some("EulerAncestralDiscreteScheduler") => "euler_a",
            Some("HeunDiscreteScheduler") => "heun",
            Some("DPMSolverMultistepScheduler") => "dpmpp_2m",
            Some("LCMScheduler") => "lcm",
            None if consistency => "lcm",
            _ => "euler",
        };
        let (steps, guidance_scale) = match (sampler, consistency) {
            ("lcm", true) => (4, 8.0),
            ("lcm", false) => (4, 1.0),
            _ if turbo => (4, 1.0),
            _ if xl => (20, 5.0),
            _ => (20, 7.5),
        };
        Defaults { width: side, height: side, steps, guidance_scale, sampler: sampler.into() }
    }
}
