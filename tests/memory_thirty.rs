//! Picture 30 costs what picture 3 cost.
#![forbid(unsafe_code)]
#![cfg(target_os = "linux")]

use convert::Quant;
use engine::pipeline::{Control, Pipeline, Request, Settings};
use sdfast_tests::{demo, model, report};

#[test]
fn memory_does_not_creep() {
    let settings = Settings { threads: 2, ..Settings::default() };
    let open = |quant| Pipeline::new(model(&demo().join("model"), quant), settings.clone()).unwrap();
    let models = [open(Quant::Q8), open(Quant::Q4)];
    let prompts =
        ["a red circle on a blue background", "", "two green stars", "a house at night with a moon"];
    let mut held = vec![];
    for i in 0..30 {
        let pipeline = &models[i % 2];
        let request = Request {
            width: [128, 192, 64][i % 3],
            height: [128, 96][i % 2],
            steps: 1,
            seed: i as u64,
            ..Request::new(prompts[i % 4], pipeline.card())
        };
        pipeline.generate(&request, &mut |_| Control::Continue).unwrap();
        held.push(engine::memory::resident().unwrap());
    }
    report(&format!("resident after pictures 3 and 30: {} and {} bytes", held[2], held[29]));
    assert!(held[29] <= held[2] + (2 << 20), "{held:?}");
}
