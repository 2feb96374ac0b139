//! The noise schedule of training, and the timesteps and noise levels that a run visits.
//!
//! Names: `alphas_cumprod[t]` is the share of the picture in the variance at timestep `t`; `sigma = sqrt((1 - a) / a)` is the
//! noise level of the same state scaled to unit picture. Timesteps and their spacings are those of diffusers; named
//! schedules are those of the WebUI and ComfyUI (Karras et al. 2022 for `karras`). Models with EDM's continuous noise levels
//! have a table of them too, spread evenly in the logarithm; their network is told `ln(sigma) / 4` in place of a timestep.
#![forbid(unsafe_code)]

use crate::card::{BetaSchedule, EdmConfig, Prediction, ScheduleConfig, SigmaSchedule, TimestepSpacing};
use crate::error::{Error, Result};

/// What stands for a share of zero where it is divided by: the smallest positive half-precision number, as in diffusers.
pub(crate) const SMALLEST_ALPHA: f64 = 1.0 / (1 << 24) as f64;

/// A noise schedule, in numbers.
#[derive(Clone, Debug)]
pub struct Schedule {
    alphas_cumprod: Vec<f64>,
    sigmas: Vec<f64>,
    spacing: TimestepSpacing,
    steps_offset: usize,
    prediction: Prediction,
    final_alpha_cumprod: f64,
    edm: Option<EdmConfig>,
}

impl Schedule {
    /// The schedule that `config` describes.
    pub fn new(config: &ScheduleConfig) -> Self {
        let (alphas_cumprod, sigmas) = match &config.edm {
            Some(edm) => edm_levels(edm, config.num_train_timesteps),
            None => {
                let mut alphas_cumprod = alphas_cumprod(config);
                if config.rescale_betas_zero_snr {
                    rescale_zero_terminal_snr(&mut alphas_cumprod);
                }
                let sigma = |a: &f64| ((1.0 - a) / a.max(SMALLEST_ALPHA)).sqrt();
                let sigmas = alphas_cumprod.iter().map(sigma).collect();
                (alphas_cumprod, sigmas)
            }
        };
        Schedule {
            sigmas,
            edm: config.edm,
            spacing: config.timestep_spacing,
            steps_offset: config.steps_offset,
            prediction: config.prediction_type,
            final_alpha_cumprod: if config.set_alpha_to_one { 1.0 } else { alphas_cumprod[0] },
            alphas_cumprod,
        }
    }

    /// What the network predicts.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// The continuous noise levels, where the model has such.
    pub fn edm(&self) -> Option<&EdmConfig> {
        self.edm.as_ref()
    }

    /// Timesteps of training.
    pub fn train_timesteps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// The share of the picture at timestep `t`.
    pub fn alpha_cumprod(&self, t: usize) -> f64 {
        self.alphas_cumprod[t]
    }

    /// The share of the picture behind the last step of DDIM.
    pub fn final_alpha_cumprod(&self) -> f64 {
        self.final_alpha_cumprod
    }

    /// The noise level at a timestep, which may lie between two: linear between their levels, as in diffusers.
    pub fn sigma(&self, t: f64) -> f64 {
        let last = self.sigmas.len() - 1;
        let t = t.clamp(0.0, last as f64);
        let below = (t as usize).min(last.saturating_sub(1));
        let above = (below + 1).min(last);
        self.sigmas[below] + (t - below as f64) * (self.sigmas[above] - self.sigmas[below])
    }

    /// The timestep of a noise level: linear in the logarithm between two.
    pub fn timestep(&self, sigma: f64) -> f64 {
        let above = self.sigmas.partition_point(|&s| s <= sigma).clamp(1, self.sigmas.len() - 1);
        let (low, high) = (self.sigmas[above - 1].ln(), self.sigmas[above].ln());
        let weight = ((sigma.ln() - low) / (high - low)).clamp(0.0, 1.0);
        (above - 1) as f64 + weight
    }

    /// The timesteps of a run by the model's own spacing, falling. Only `linspace` has fractions.
    pub fn timesteps(&self, steps: usize) -> Vec<f64> {
        let total = self.train_timesteps();
        let last = (total - 1) as f64;
        let at = |i: usize| match self.spacing {
            TimestepSpacing::Linspace if steps == 1 => 0.0,
            TimestepSpacing::Linspace => last * (steps - 1 - i) as f64 / (steps - 1) as f64,
            TimestepSpacing::Leading => ((steps - 1 - i) * (total / steps) + self.steps_offset) as f64,
            TimestepSpacing::Trailing => {
                (total as f64 - i as f64 * (total as f64 / steps as f64)).round_ties_even() - 1.0
            }
        };
        (0..steps).map(|i| at(i).clamp(0.0, last)).collect()
    }

    /// As [`Schedule::timesteps`], in whole numbers, for methods whose last step ends where another timestep would stand.
    pub fn timesteps_before_last(&self, steps: usize) -> Vec<f64> {
        let more = self.spacing != TimestepSpacing::Trailing && steps < self.train_timesteps();
        let mut timesteps = self.timesteps(steps + usize::from(more));
        timesteps.truncate(steps);
        timesteps.iter().map(|t| t.round_ties_even()).collect()
    }

    /// The noise levels that a run of `steps` visits.
    pub fn levels(&self, steps: usize, spread: Spread) -> Levels {
        let wanted = spread;
        let spread = match (spread, self.edm.map(|edm| edm.sigma_schedule)) {
            (Spread::Model, Some(SigmaSchedule::Karras)) => Spread::Karras,
            (Spread::Model, Some(SigmaSchedule::Exponential)) => Spread::Exponential,
            (spread, _) => spread,
        };
        let smallest = self.sigmas[0];
        let largest = self.sigmas[self.sigmas.len() - 1];
        let share = |i: usize| if steps == 1 { 0.0 } else { i as f64 / (steps - 1) as f64 };
        let by_sigma = |sigma: &dyn Fn(f64) -> f64| -> Vec<(f64, f64)> {
            let pair = |sigma: f64| (self.timestep(sigma), sigma);
            (0..steps).map(|i| pair(sigma(share(i)))).collect()
        };
        let visits: Vec<(f64, f64)> = match spread {
            Spread::Model => self.timesteps(steps).into_iter().map(|t| (t, self.sigma(t))).collect(),
            Spread::Karras => {
                let (high, low) = (largest.powf(1.0 / 7.0), smallest.powf(1.0 / 7.0));
                by_sigma(&|share| (high + share * (low - high)).powi(7))
            }
            Spread::Exponential => {
                let (high, low) = (largest.ln(), smallest.ln());
                by_sigma(&|share| (high + share * (low - high)).exp())
            }
            Spread::KlOptimal => {
                let (high, low) = (largest.atan(), smallest.atan());
                by_sigma(&|share| (high + share * (low - high)).tan())
            }
            Spread::Normal | Spread::SgmUniform => {
                let intervals = if spread == Spread::Normal { steps.max(2) - 1 } else { steps };
                let last = (self.train_timesteps() - 1) as f64;
                let t = |i: usize| last - last * i as f64 / intervals as f64;
                (0..steps).map(|i| (t(i), self.sigma_log_linear(t(i)))).collect()
            }
            Spread::Simple => {
                let total = self.train_timesteps();
                let t = |i: usize| total - 1 - i * total / steps;
                (0..steps).map(|i| (t(i) as f64, self.sigmas[t(i)])).collect()
            }
        };
        let first = visits[0].1;
        let with_picture =
            self.edm.is_some() || wanted == Spread::Model && self.spacing == TimestepSpacing::Leading;
        let init_noise_sigma = if with_picture { (first * first + 1.0).sqrt() } else { first };
        let told =
            |(t, sigma): (f64, f64)| (if self.edm.is_some() { sigma.ln() / 4.0 } else { t } as f32, sigma);
        let (timesteps, mut sigmas): (Vec<f32>, Vec<f64>) = visits.into_iter().map(told).unzip();
        sigmas.push(0.0);
        Levels { timesteps, sigmas, init_noise_sigma }
    }

    /// As [`Schedule::sigma`], but linear in the logarithm, as in the WebUI.
    fn sigma_log_linear(&self, t: f64) -> f64 {
        let below = (t as usize).min(self.sigmas.len() - 2);
        let (low, high) = (self.sigmas[below].ln(), self.sigmas[below + 1].ln());
        (low + (t - below as f64) * (high - low)).exp()
    }
}

/// Where a run evaluates the network.
#[derive(Clone, Debug, PartialEq)]
pub struct Levels {
    /// What the network is told, one per step.
    pub timesteps: Vec<f32>,
    /// One per step, and the zero behind the last.
    pub sigmas: Vec<f64>,
    /// What noise of unit variance is multiplied by before the first step.
    pub init_noise_sigma: f64,
}

/// How the noise levels of a run are spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Spread {
    /// By the model's timestep spacing, as diffusers does when told nothing.
    #[default]
    Model,
    /// Evenly in the seventh root of sigma.
    Karras,
    /// Evenly in the logarithm of sigma.
    Exponential,
    /// Evenly in time from the last timestep to the first.
    Normal,
    /// As `Normal`, without the first timestep.
    SgmUniform,
    /// Every so many table entries.
    Simple,
    /// Evenly in the arc tangent of sigma.
    KlOptimal,
}

/// A row of the table of spreads.
struct Row {
    /// What people type.
    name: &'static str,
    /// What the WebUI calls it.
    label: &'static str,
    spread: Spread,
}

static SPREADS: &[Row] = &[
    Row { name: "model", label: "Automatic", spread: Spread::Model },
    Row { name: "karras", label: "Karras", spread: Spread::Karras },
    Row { name: "exponential", label: "Exponential", spread: Spread::Exponential },
    Row { name: "normal", label: "Normal", spread: Spread::Normal },
    Row { name: "sgm_uniform", label: "SGM Uniform", spread: Spread::SgmUniform },
    Row { name: "simple", label: "Simple", spread: Spread::Simple },
    Row { name: "kl_optimal", label: "KL Optimal", spread: Spread::KlOptimal },
];

impl Spread {
    /// The spread called `name`.
    pub fn find(name: &str) -> Result<Spread> {
        let known = || SPREADS.iter().map(|row| row.name).collect();
        let row = SPREADS.iter().find(|row| row.name == name);
        row.map(|row| row.spread).ok_or_else(|| Error::UnknownSchedule { name: name.into(), known: known() })
    }

    fn row(self) -> &'static Row {
        SPREADS.iter().find(|row| row.spread == self).expect("every spread is in the table")
    }

    /// The name that people type.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// What the WebUI calls it.
    pub fn label(self) -> &'static str {
        self.row().label
    }
}

/// `cumprod(1 - betas)`.
fn alphas_cumprod(config: &ScheduleConfig) -> Vec<f64> {
    let total = config.num_train_timesteps;
    let root = config.beta_schedule == BetaSchedule::ScaledLinear;
    let (start, end) = match root {
        true => (config.beta_start.sqrt(), config.beta_end.sqrt()),
        false => (config.beta_start, config.beta_end),
    };
    let mut product = 1.0;
    let mut next = |i: usize| {
        let beta = start + (end - start) * i as f64 / (total.max(2) - 1) as f64;
        product *= 1.0 - if root { beta * beta } else { beta };
        product
    };
    (0..total).map(&mut next).collect()
}

/// Shares of the picture and noise levels of `total` levels, rising.
fn edm_levels(edm: &EdmConfig, total: usize) -> (Vec<f64>, Vec<f64>) {
    let (low, high) = (edm.sigma_min.ln(), edm.sigma_max.ln());
    let sigma = |i: usize| (low + (high - low) * i as f64 / (total.max(2) - 1) as f64).exp();
    let sigmas: Vec<f64> = (0..total).map(sigma).collect();
    (sigmas.iter().map(|s| 1.0 / (s * s + 1.0)).collect(), sigmas)
}

/// Makes the last timestep pure noise and keeps the first (Lin et al. 2023, algorithm 1).
fn rescale_zero_terminal_snr(alphas_cumprod: &mut [f64]) {
    let (Some(&first), Some(&last)) = (alphas_cumprod.first(), alphas_cumprod.last()) else { return };
    let (first, last) = (first.sqrt(), last.sqrt());
    for a in alphas_cumprod {
        let root = (a.sqrt() - last) * (first / (first - last));
        *a = root * root;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Stable Diffusion 1.5's.
    pub(crate) fn sd15() -> ScheduleConfig {
        ScheduleConfig {
            num_train_timesteps: 1000,
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            prediction_type: Prediction::Epsilon,
            rescale_betas_zero_snr: false,
            timestep_spacing: TimestepSpacing::Leading,
            steps_offset: 1,
            set_alpha_to_one: false,
            edm: None,
        }
    }

    #[test]
    fn the_ends_are_those_of_stable_diffusion() {
        let schedule = Schedule::new(&sd15());
        assert!((schedule.sigma(0.0) - 0.029_167_158_2).abs() < 1e-9);
        assert!((schedule.sigma(999.0) - 14.614_641_229_3).abs() < 1e-8);
        assert!((schedule.alpha_cumprod(999) - 0.004_660_098_5).abs() < 1e-9);
    }

    #[test]
    fn named_schedules_have_their_published_values() {
        let schedule = Schedule::new(&sd15());
        let golden: &[(&str, [f64; 10])] = &[
            ("normal", [14.6146, 7.8399, 4.6092, 2.9183, 1.9502, 1.3449, 0.9324, 0.6250, 0.3687, 0.0292]),
            ("karras", [14.6146, 9.1029, 5.4784, 3.1686, 1.7494, 0.9141, 0.4469, 0.2014, 0.0819, 0.0292]),
            (
                "exponential",
                [14.6146, 7.3249, 3.6712, 1.8400, 0.9222, 0.4622, 0.2317, 0.1161, 0.0582, 0.0292],
            ),
            (
                "sgm_uniform",
                [14.6146, 8.3072, 5.0924, 3.3251, 2.2797, 1.6156, 1.1629, 0.8319, 0.5712, 0.3437],
            ),
            ("simple", [14.6146, 8.3028, 5.0878, 3.3211, 2.2765, 1.6129, 1.1606, 0.8299, 0.5693, 0.3417]),
        ];
        for (name, sigmas) in golden {
            let levels = schedule.levels(10, Spread::find(name).expect("in the table"));
            assert_eq!(levels.sigmas.len(), 11);
            for (found, wanted) in levels.sigmas.iter().zip(sigmas) {
                assert!((found - wanted).abs() < 6e-5, "{name}: {found} is not {wanted}");
            }
        }
    }

    #[test]
    fn sigma_and_timestep_are_inverse() {
        let schedule = Schedule::new(&sd15());
        for t in [0.0, 1.0, 17.0, 500.0, 998.0, 999.0] {
            assert!((schedule.timestep(schedule.sigma(t)) - t).abs() < 1e-6, "{t}");
        }
    }

    #[test]
    fn every_number_of_steps_stays_inside() {
        for spacing in [TimestepSpacing::Linspace, TimestepSpacing::Leading, TimestepSpacing::Trailing] {
            let schedule = Schedule::new(&ScheduleConfig { timestep_spacing: spacing, ..sd15() });
            for steps in [1, 2, 3, 7, 999, 1000] {
                for spread in SPREADS.iter().map(|row| row.spread) {
                    let levels = schedule.levels(steps, spread);
                    assert_eq!(levels.timesteps.len(), steps);
                    assert!(levels.timesteps.iter().all(|t| (0.0..=999.0).contains(t)), "{spread:?} {steps}");
                    assert!(levels.sigmas.iter().all(|s| s.is_finite()), "{spread:?} {steps}");
                }
            }
        }
    }

    #[test]
    fn an_unknown_schedule_is_an_error() {
        assert!(Spread::find("nonsense").is_err());
    }
}
