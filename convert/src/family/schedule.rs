//! The noise schedule of a checkpoint, and what `gen` does with it when nothing else is said.
#![forbid(unsafe_code)]

use engine::card::{
    BetaSchedule, Defaults, EdmConfig, Family, Prediction, ScheduleConfig, SigmaSchedule, TimestepSpacing,
    UnetConfig, VaeConfig,
};

use engine::presets;
use serde_json::Value;

use super::config::{Evidence, flag, number};
use crate::error::Error;

/// Tensors that mark continuous noise levels: those of Playground 2.5, which hold the latents' statistics, and CosXL's.
const EDM: &str = "edm_mean";
const EDM_V: &str = "edm_vpred.sigma_max";
/// Settings of diffusers' EDM schedulers that must be as they usually are.
const EDM_MUST: [(&str, &[&str]); 2] = [("rho", &["7", "7.0"]), ("final_sigmas_type", &["\"zero\""])];

/// The decimal number that was meant by an f32: 0.002, not the f64 nearest to the f32.
fn as_written(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::NAN)
}

/// A model that makes pictures in few steps.
#[derive(Clone, Copy, Debug, PartialEq)]
struct FewSteps {
    /// `turbo`, `lightning`, `hyper` or `lcm`.
    kind: &'static str,
    steps: usize,
    /// Whether it is the first of its kind and no merge.
    published: bool,
}

/// What a file's name in lower case says: `sdxl_lightning_4step`, `sd_xl_turbo_1.0_fp16`.
fn few_steps(stem: &str) -> Option<FewSteps> {
    let words: Vec<&str> = stem.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    let steps = words.iter().enumerate().find_map(|(i, word)| {
        let digits = word.trim_end_matches("steps").trim_end_matches("step");
        match (digits == *word, digits) {
            (true, _) => None,
            // "8 steps"
            (false, "") => words.get(i.checked_sub(1)?)?.parse().ok(),
            (false, digits) => digits.parse().ok(),
        }
    });
    let steps = steps.filter(|steps| (1..=16).contains(steps));
    let kind = ["turbo", "lightning", "lcm", "hyper"].into_iter().find(|kind| words.contains(kind))?;
    // A merge may be called hyper for other reasons.
    if kind == "hyper" && steps.is_none() {
        return None;
    }
    let published = stem.starts_with("sd_turbo") || stem.starts_with("sd_xl_turbo");
    Some(FewSteps { kind, steps: steps.unwrap_or(4), published })
}

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
        let edm = self.edm()?;
        let said = match text("prediction_type") {
            Some("epsilon") => Some(Prediction::Epsilon),
            Some("v_prediction") => Some(Prediction::V),
            Some(other) => return Err(self.unsupported(format!("it predicts {other:?}"))),
            None if config.is_some() => Some(Prediction::Epsilon),
            None if marker("v_pred") || marker(EDM_V) => Some(Prediction::V),
            None if marker(EDM) => Some(Prediction::Epsilon),
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
        if let Some(FewSteps { kind, steps, .. }) = self.few_steps() {
            notes.push(format!(
                "its name says {kind}: without other wishes pictures take {steps} steps and no guidance"
            ));
        }
        let rescale_betas_zero_snr = match config {
            Some(_) => flag(config, "rescale_betas_zero_snr").unwrap_or(false),
            None => marker("ztsnr") || self.ends_in_noise()?,
        };
        let timestep_spacing = match text("timestep_spacing") {
            Some("linspace") => TimestepSpacing::Linspace,
            Some("leading") => TimestepSpacing::Leading,
            Some("trailing") => TimestepSpacing::Trailing,
            Some(other) => return Err(self.unsupported(format!("it has {other:?} timesteps"))),
            None if from_linspace => TimestepSpacing::Linspace,
            None if self.few_steps().is_some() => TimestepSpacing::Trailing,
            // A run must begin in the noise that the last timestep is (Lin et al. 2023).
            None if config.is_none() && rescale_betas_zero_snr => TimestepSpacing::Trailing,
            None => TimestepSpacing::Leading,
        };
        let of_timesteps = ScheduleConfig {
            num_train_timesteps: number(config, "num_train_timesteps").unwrap_or(1000),
            beta_start: float("beta_start", usual_betas.0),
            beta_end: float("beta_end", usual_betas.1),
            beta_schedule,
            prediction_type: self.wishes.prediction.or(said).unwrap_or(Prediction::Epsilon),
            rescale_betas_zero_snr,
            timestep_spacing,
            steps_offset: number(config, "steps_offset").unwrap_or(usize::from(config.is_none())),
            set_alpha_to_one: flag(config, "set_alpha_to_one").unwrap_or(class == "DDIMScheduler"),
            edm: None,
        };
        Ok(match edm {
            None => of_timesteps,
            // What counts for nothing is as in SDXL, wherever it comes from.
            Some(edm) => ScheduleConfig {
                num_train_timesteps: of_timesteps.num_train_timesteps,
                prediction_type: of_timesteps.prediction_type,
                edm: Some(edm),
                ..presets::card(Family::Sdxl).schedule
            },
        })
    }

    /// Continuous noise levels: said by the scheduler's config, or marked by a tensor as in ComfyUI's files.
    fn edm(&self) -> Result<Option<EdmConfig>, Error> {
        let number = |name: &str, usual: f64| -> Result<f64, Error> {
            Ok(self.marked(name)?.and_then(|numbers| numbers.first().copied()).map_or(usual, as_written))
        };
        let Some(config) = self.configs.get("scheduler") else {
            return Ok(if self.marked(EDM)?.is_some() {
                // Playground 2.5
                let sigma_schedule = SigmaSchedule::Karras;
                Some(EdmConfig { sigma_min: 0.002, sigma_max: 80.0, sigma_data: 0.5, sigma_schedule })
            } else if self.marked(EDM_V)?.is_some() {
                // CosXL
                Some(EdmConfig {
                    sigma_min: number("edm_vpred.sigma_min", 0.002)?,
                    sigma_max: number(EDM_V, 120.0)?,
                    sigma_data: 1.0,
                    sigma_schedule: SigmaSchedule::Exponential,
                })
            } else {
                None
            });
        };
        if !config.get("_class_name").and_then(Value::as_str).is_some_and(|class| class.starts_with("EDM")) {
            return Ok(None);
        }
        self.demand("scheduler", Some(config), &EDM_MUST)?;
        let float = |key: &str, usual: f64| config.get(key).and_then(Value::as_f64).unwrap_or(usual);
        Ok(Some(EdmConfig {
            sigma_min: float("sigma_min", 0.002),
            sigma_max: float("sigma_max", 80.0),
            sigma_data: float("sigma_data", 0.5),
            sigma_schedule: match config.get("sigma_schedule").and_then(Value::as_str) {
                Some("exponential") => SigmaSchedule::Exponential,
                Some("karras") | None => SigmaSchedule::Karras,
                Some(other) => return Err(self.unsupported(format!("it has {other:?} noise levels"))),
            },
        }))
    }

    /// What the name of a single file says about a model that makes pictures in few steps: nothing else in the file does.
    fn few_steps(&self) -> Option<FewSteps> {
        if self.configs.get("scheduler").is_some() {
            return None;
        }
        let stem = self.sources.model.path.file_stem()?.to_string_lossy().to_lowercase();
        few_steps(&stem)
    }

    /// The few numbers of a tensor that is there to say something.
    pub(super) fn marked(&self, name: &str) -> Result<Option<Vec<f32>>, Error> {
        let source = &self.sources.model;
        let Some(tensor) = source.tensors.get(name) else { return Ok(None) };
        if !tensor.dtype.is_float() || tensor.count() > 64 {
            let what = format!("its marker {name} is {} {:?}", tensor.dtype.name(), tensor.shape);
            return Err(self.unsupported(what));
        }
        source.read_all(tensor).map(Some)
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
        let xl = matches!(family, Family::Sdxl | Family::SdxlRefiner);
        let latents = match family {
            Family::Sd15 => 64,
            Family::Sd2 if schedule.prediction_type == Prediction::V => 96,
            Family::Sd2 => 64,
            Family::Sdxl | Family::SdxlRefiner => 128,
        };
        let named = self.few_steps();
        // What Stability AI calls turbo makes small pictures.
        let latents = if named.is_some_and(|n| n.kind == "turbo" && n.published) { 64 } else { latents };
        let latents = number(self.configs.get("unet"), "sample_size").unwrap_or(latents);
        let side = latents.saturating_mul(vae.factor());
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
            Some("DPMSolverMultistepScheduler" | "EDMDPMSolverMultistepScheduler") => "dpmpp_2m",
            Some("LCMScheduler") => "lcm",
            None if consistency => "lcm",
            None if schedule.edm.is_some() => "dpmpp_2m",
            None if named.is_some_and(|n| n.kind == "lcm") => "lcm",
            None if named.is_some_and(|n| n.kind == "turbo") && xl => "euler_a",
            _ => "euler",
        };
        let (steps, guidance_scale) = match (sampler, consistency) {
            ("lcm", true) => (4, 8.0),
            ("lcm", false) => (4, 1.0),
            _ if turbo => (named.map_or(4, |n| n.steps), 1.0),
            // Playground 2.5
            _ if schedule.edm.is_some() && schedule.prediction_type == Prediction::Epsilon => (20, 3.0),
            _ if xl => (20, 5.0),
            _ => (20, 7.5),
        };
        Defaults { width: side, height: side, steps, guidance_scale, sampler: sampler.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_models_with_few_steps() {
        let cases = [
            ("sd_turbo", Some(("turbo", 4, true))),
            ("sd_xl_turbo_1.0_fp16", Some(("turbo", 4, true))),
            ("dreamshaperxl_v21turbodpmsde", None),
            ("dreamshaper_xl_turbo_v2", Some(("turbo", 4, false))),
            ("sdxl_lightning_8step", Some(("lightning", 8, false))),
            ("juggernaut_lightning_4 steps", Some(("lightning", 4, false))),
            ("hyper-sdxl-1step-unet", Some(("hyper", 1, false))),
            ("hyper_realistic_v3", None),
            ("dreamshaper_8lcm", None),
            ("dreamshaper-lcm", Some(("lcm", 4, false))),
            ("model_50steps_lightning", Some(("lightning", 4, false))),
            ("steps", None),
            ("", None),
        ];
        for (stem, wanted) in cases {
            let found = few_steps(stem).map(|found| (found.kind, found.steps, found.published));
            assert_eq!(found, wanted, "{stem}");
        }
    }
}
