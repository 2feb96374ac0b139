//! Runs of diffusers' schedulers, number by number: see `tests/data/make_golden.py`.

use serde::Deserialize;

use super::*;
use crate::card::ScheduleConfig;
use crate::pipeline::Noise;

#[derive(Deserialize)]
struct Golden {
    config: ScheduleConfig,
    sampler: String,
    spread: String,
    steps: usize,
    timesteps: Vec<f32>,
    init_noise_sigma: f32,
    latents: Vec<Vec<f32>>,
}

fn largest(numbers: impl Iterator<Item = f32>) -> f32 {
    numbers.fold(0.0, |m, x| m.max(x.abs()))
}

/// Difference to diffusers' single-precision arithmetic, relative to the largest number that enters or leaves a step.
const TOLERANCE: f32 = 2e-5;

#[test]
fn runs_are_those_of_diffusers() {
    let golden: Vec<Golden> =
        serde_json::from_str(include_str!("../../../tests/data/schedules.json")).expect("golden file");
    for golden in golden {
        let name = format!("{} {} {:?}", golden.sampler, golden.steps, golden.config);
        let len = golden.latents[0].len();
        let schedule = Schedule::new(&golden.config);
        let spread = Spread::find(&golden.spread).expect("in the table");
        let run = Run { schedule: &schedule, steps: golden.steps, spread, len };
        let mut sampler = (find(&golden.sampler).expect("in the table").new)(&run);
        assert_eq!(sampler.timesteps().len(), golden.timesteps.len(), "{name}");
        for (found, wanted) in sampler.timesteps().iter().zip(&golden.timesteps) {
            // diffusers rounds the timesteps of named schedules.
            let close = if spread == Spread::Model { 1e-3 } else { 0.5 + 1e-3 };
            assert!((found - wanted).abs() <= close, "{name}: timestep {found} is not {wanted}");
        }
        if spread == Spread::Model {
            let factor = sampler.init_noise_sigma() / golden.init_noise_sigma;
            assert!((factor - 1.0).abs() < TOLERANCE, "{name}: {factor}");
        }

        let [mut start, mut outputs, mut noise] = [1, 2, 3].map(|seed| Rng::new(Noise::Torch, seed));
        let mut latents = vec![0.0; len];
        start.randn(&mut latents);
        latents.iter_mut().for_each(|x| *x *= golden.init_noise_sigma);
        let (mut input, mut output) = (vec![0.0; len], vec![0.0; len]);
        for (i, wanted) in golden.latents.iter().enumerate() {
            sampler.scale_model_input(&latents, i, &mut input);
            outputs.randn(&mut output);
            output.iter_mut().zip(&input).for_each(|(y, x)| *y += 0.5 * x);
            let before = largest(latents.iter().copied());
            sampler.step(i, &output, &mut latents, &mut noise);
            let size = largest(wanted.iter().copied()).max(before);
            let error = largest(latents.iter().zip(wanted).map(|(a, b)| a - b)) / size;
            assert!(error < TOLERANCE, "{name}: latents after evaluation {i} are off by {error}");
        }
    }
}

#[test]
fn an_unknown_sampler_is_an_error_that_names_the_known() {
    let error = find("nonsense").expect_err("unknown");
    assert!(error.hint().is_some_and(|hint| hint.contains("euler")));
}

/// Whatever the number of steps, noise of unit variance and predictions of it stay finite.
#[test]
fn any_number_of_steps_stays_finite() {
    use crate::card::{Prediction, TimestepSpacing};
    let configs = [TimestepSpacing::Leading, TimestepSpacing::Linspace, TimestepSpacing::Trailing]
        .map(|spacing| ScheduleConfig { timestep_spacing: spacing, ..crate::schedule::tests::sd15() });
    let zero_snr =
        ScheduleConfig { rescale_betas_zero_snr: true, prediction_type: Prediction::V, ..configs[2].clone() };
    for config in configs.iter().chain([&zero_snr]) {
        let schedule = Schedule::new(config);
        for entry in SAMPLERS {
            for steps in [1, 2, 3, 19, 50, 51, 999, 1000] {
                for name in if entry.takes_schedule { &["model", "karras", "simple"][..] } else { &["model"] }
                {
                    let spread = Spread::find(name).expect("in the table");
                    let mut sampler = (entry.new)(&Run { schedule: &schedule, steps, spread, len: 4 });
                    let mut rng = Rng::new(Noise::Torch, 0);
                    let (mut latents, mut input) = ([0.5f32, -1.0, 2.0, 0.0], [0.0; 4]);
                    latents.iter_mut().for_each(|x| *x *= sampler.init_noise_sigma());
                    for i in 0..sampler.timesteps().len() {
                        sampler.scale_model_input(&latents, i, &mut input);
                        sampler.step(i, &[0.5, -1.0, 2.0, 0.0], &mut latents, &mut rng);
                    }
                    let finite = latents.iter().chain(&input).all(|x| x.is_finite());
                    assert!(finite, "{} {steps} {name} {config:?}: {latents:?}", entry.name);
                }
            }
        }
    }
}
