//! A random model against diffusers: every network of it on the inputs of a golden file that
//! `tests/data/make_models.py` wrote.

use engine::pipeline::{Conditioning, Control, Denoiser, Image, Latents, Pipeline, Request};

use crate::{Golden, pixels};

/// An output of a network.
pub struct Output {
    /// Which one.
    pub what: String,
    /// What came out.
    pub got: Vec<f32>,
    /// What diffusers makes.
    pub wanted: Vec<f32>,
}

/// The outputs of all networks of the pipeline's model.
///
/// # Panics
/// Where token ids differ.
pub fn outputs(golden: &Golden, pipeline: &Pipeline) -> Vec<Output> {
    let mut out = vec![];
    let mut push =
        |what: String, got, wanted: &[f32]| out.push(Output { what, got, wanted: wanted.to_vec() });
    for (i, c) in encode(golden, pipeline).into_iter().enumerate() {
        push(format!("text embeddings {i}"), c.context, golden.row("text_embeddings", i));
        if golden.has("pooled") {
            push(format!("pooled {i}"), c.pooled, golden.row("pooled", i));
        }
    }
    for (i, noise) in predict(golden, pipeline).into_iter().enumerate() {
        push(format!("prediction {i}"), noise, golden.row("prediction", i));
    }
    push("decoded".into(), decode(golden, pipeline), &pixels(golden.values("vae_decoded"), 3));
    let moments = [golden.values("vae_mean"), golden.values("vae_logvar")].concat();
    push("encoded".into(), encode_picture(golden, pipeline), &pixels(&moments, 8));
    out
}

/// Rows and columns of the golden latents.
fn size(golden: &Golden) -> (usize, usize) {
    let shape = golden.shape("latents");
    (shape[2], shape[3])
}

fn encode(golden: &Golden, pipeline: &Pipeline) -> Vec<Conditioning> {
    let prompts = ["", golden.text("prompt")].map(|p| pipeline.tokenize(p).unwrap());
    let names: Vec<_> = ["input_ids", "input_ids_2"].into_iter().filter(|name| golden.has(name)).collect();
    for (i, prompt) in prompts.iter().enumerate() {
        assert_eq!(prompt.windows.len(), names.len());
        for (window, name) in prompt.windows.iter().zip(&names) {
            assert_eq!(window.ids, golden.ids(name, i), "{name}");
        }
    }
    let (h, w) = size(golden);
    let plan = pipeline.plan(h, w, prompts.len(), false).unwrap();
    pipeline.encode(&plan, &prompts, &mut |_| Control::Continue).unwrap()
}

/// The network's prediction for each row of the golden embeddings at that row's timestep.
pub fn predict(golden: &Golden, pipeline: &Pipeline) -> Vec<Vec<f32>> {
    let rows = [0, 1].map(|i| Conditioning {
        context: golden.row("text_embeddings", i).to_vec(),
        tokens: golden.shape("text_embeddings")[1],
        pooled: if golden.has("pooled") { golden.row("pooled", i).to_vec() } else { vec![] },
    });
    let (h, w) = size(golden);
    let request =
        Request { width: 8 * w, height: 8 * h, guidance_scale: 8., ..Request::new("", pipeline.card()) };
    let plan = pipeline.plan(h, w, rows.len(), false).unwrap();
    let mut denoiser = Denoiser::new(pipeline, &plan, rows.to_vec(), &request).unwrap();
    let mut guided = vec![0.; 4 * h * w];
    denoiser
        .run(golden.values("timestep"), &mut |_| Control::Continue, |predictor, event| {
            let mut each = |i: usize| {
                predictor.predict(golden.values("latents"), i, &mut guided, event)?;
                Ok::<_, engine::Error>(predictor.noises().swap_remove(i))
            };
            Ok(vec![each(0)?, each(1)?])
        })
        .unwrap()
}

fn decode(golden: &Golden, pipeline: &Pipeline) -> Vec<f32> {
    let scale = pipeline.card().vae.scaling_factor;
    let (h, w) = size(golden);
    let data = golden.values("vae_latents").iter().map(|x| x * scale).collect();
    pipeline.decode(&Latents { shape: [4, h, w], data }).unwrap().data
}

/// Mean and log variance of the golden picture, `[h * w, 2 * 4]`.
fn encode_picture(golden: &Golden, pipeline: &Pipeline) -> Vec<f32> {
    let (h, w) = size(golden);
    let data = pixels(golden.values("vae_picture"), 3);
    pipeline.encode_image(&Image { width: 8 * w, height: 8 * h, data }).unwrap()
}
