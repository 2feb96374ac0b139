//! Pictures are encoded and decoded the same in every budget.
#![forbid(unsafe_code)]

use convert::Quant;
use engine::error::Error;
use engine::pipeline::{Image, Latents, Pipeline, Settings};
use engine::precision::Precision;
use sdfast_tests::{demo, model};

#[test]
fn any_budget_gives_the_same_bits() {
    let (width, height) = (384, 320);
    let data: Vec<f32> = (0..width * height * 3).map(|i| ((i * i) as f32 * 1e-3).sin()).collect();
    let image = Image { width, height, data };
    let (h, w) = (height / 8, width / 8);
    let data = (0..4 * h * w).map(|i| ((i * i) as f32 * 1e-3).sin() * 4.0).collect();
    for (quant, precision) in
        [(Quant::Q8, Precision::Fast), (Quant::Q8, Precision::High), (Quant::F16, Precision::Exact)]
    {
        let open = |ram| {
            let settings = Settings { threads: 2, precision, ram, ..Settings::default() };
            Pipeline::new(model(&demo().join("model"), quant), settings).unwrap()
        };
        let free = open(None);
        let c = free.card().vae.latent_channels;
        let latents = Latents { shape: [c, h, w], data: Vec::clone(&data)[..c * h * w].to_vec() };
        let whole = free.plan(h, w, 1, true).unwrap();
        let (moments, picture) = (free.encode_image(&image).unwrap(), free.decode(&latents).unwrap());
        for more in [16, 8, 3] {
            // What this process holds beside the plan changes from one look to the next, so a refusal is asked again.
            let mut ram = 1 << 20;
            let (tight, plan) = loop {
                let tight = open(Some(ram));
                match tight.plan(h, w, 1, true) {
                    Ok(plan) => break (tight, plan),
                    Err(Error::Ram { needed, .. }) if needed > ram => ram = needed + needed / more,
                    Err(error) => panic!("{error}"),
                }
            };
            assert!(ram > 1 << 20, "nothing runs in a mebibyte");
            // Not by comparison with the free run's peak: what the process holds by now is in this one's.
            assert!(plan.predicted_peak <= ram && whole.keeps && !plan.keeps);
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(&tight.encode_image(&image).unwrap()) == bits(&moments), "{precision} {ram}");
            assert!(tight.decode(&latents).unwrap() == picture, "{precision} {ram}");
        }
    }
}
