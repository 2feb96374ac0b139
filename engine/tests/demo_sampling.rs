//! Stepping with the noise predictions that diffusers made reproduces the latents that diffusers made, and the reference
//! prompts have transformers' token ids.

use engine::card::{BetaSchedule, Prediction, ScheduleConfig, TimestepSpacing};
use engine::pipeline::Noise;
use engine::rng::Rng;
use engine::sampler::{self, Run};
use engine::schedule::{Schedule, Spread};
use engine::text::Tokenizer;
use safetensors::SafeTensors;
use sdfast_engine as engine;

/// The demo model's `scheduler_config.json`.
fn schedule() -> Schedule {
    Schedule::new(&ScheduleConfig {
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
    })
}

fn demo(path: &str) -> Vec<u8> {
    let path = format!("{}/../models/demo/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn numbers(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).expect("the reference has it");
    tensor.data().as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect()
}

#[test]
fn recorded_predictions_give_recorded_latents() {
    for prompt in 0..3 {
        for name in ["ddim", "euler"] {
            let bytes = demo(&format!("reference/{prompt}_{name}.safetensors"));
            let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
            let (_, metadata) = SafeTensors::read_metadata(&bytes).expect("a safetensors file");
            let guidance: f32 =
                metadata.metadata().as_ref().expect("metadata")["guidance"].parse().expect("a number");
            let [noise, timesteps, uncond, cond, wanted] =
                ["noise", "timesteps", "eps_uncond", "eps_cond", "latents"].map(|name| numbers(&file, name));
            let len = noise.len();

            let schedule = schedule();
            let run = Run { schedule: &schedule, steps: timesteps.len(), spread: Spread::Model, len };
            let mut sampler = (sampler::find(name).expect("in the table").new)(&run);
            assert_eq!(sampler.timesteps(), timesteps, "{prompt} {name}");
            let mut rng = Rng::new(Noise::Torch, 0);
            let mut latents: Vec<f32> = noise.iter().map(|x| x * sampler.init_noise_sigma()).collect();
            for i in 0..timesteps.len() {
                let step = i * len..(i + 1) * len;
                let guided: Vec<f32> = uncond[step.clone()]
                    .iter()
                    .zip(&cond[step.clone()])
                    .map(|(u, c)| u + guidance * (c - u))
                    .collect();
                sampler.step(i, &guided, &mut latents, &mut rng);
                let wanted = &wanted[step];
                let size = wanted.iter().fold(0f32, |m, x| m.max(x.abs()));
                let off = latents.iter().zip(wanted).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / size;
                assert!(off < 1e-5, "{prompt} {name}: step {i} is off by {off}");
            }
        }
    }
}

#[test]
fn reference_prompts_have_their_ids() {
    let tokenizer = Tokenizer::new(&demo("model/tokenizer/vocab.json"), &demo("model/tokenizer/merges.txt"));
    let tokenizer = tokenizer.expect("CLIP's vocabulary");
    for prompt in 0..3 {
        let bytes = demo(&format!("reference/{prompt}_ddim.safetensors"));
        let (_, metadata) = SafeTensors::read_metadata(&bytes).expect("a safetensors file");
        let text = &metadata.metadata().as_ref().expect("metadata")["prompt"];
        let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let ids = file.tensor("input_ids").expect("the reference has it"); // [2, 77], the negative prompt first
        let ids: Vec<u32> = ids.data().as_chunks::<4>().0.iter().map(|&x| u32::from_le_bytes(x)).collect();
        let text = tokenizer.ids(text).expect("any text has tokens");
        assert_eq!(text, ids[78..78 + text.len()]);
        assert_eq!(ids[78 + text.len()], 49407);
    }
}
