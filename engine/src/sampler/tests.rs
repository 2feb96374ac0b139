//! Runs of diffusers' schedulers, number by number: see `tests/data/make_golden.py`.

use serde::Deserialize;

use super::*;
use crate::card::ScheduleConfig;
use crate::pipeline::Noise;

#[derive(Deserialize)]
struct Golden {
    config: ScheduleConfig,
    sampler: String,
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
        let run = Run { schedule: &schedule, steps: golden.steps, spread: Spread::Model, len };
        let mut sampler = (find(&golden.sampler).expect("in the table").new)(&run);
        assert_eq!(sampler.timesteps().len(), golden.timesteps.len(), "{name}");
        for (found, wanted) in sampler.timesteps().iter().zip(&golden.timesteps) {
            assert!((found - wanted).abs() <= 1e-3, "{name}: timestep {found} is not {wanted}");
        }
        let factor = sampler.init_noise_sigma() / golden.init_noise_sigma;
        assert!((factor - 1.0).abs() < TOLERANCE, "{name}: {factor}");

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
