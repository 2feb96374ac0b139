//! A picture's bits don't depend on the number of threads, nor on the run.
#![forbid(unsafe_code)]

use convert::Quant;
use engine::pipeline::{Control, Pipeline, Request, Settings};
use engine::precision::Precision;
use sdfast_tests::{demo, model};

#[test]
fn any_number_of_threads_makes_the_same_picture() {
    for (quant, precision) in [
        (Quant::F16, Precision::Exact),
        (Quant::F16, Precision::High),
        (Quant::Q8, Precision::High),
        (Quant::Q8, Precision::Fast),
        (Quant::Q4, Precision::Fast),
    ] {
        let pictures = [1, 2, 3, 3].map(|threads| {
            let settings = Settings { threads, precision, ..Settings::default() };
            let pipeline = Pipeline::new(model(&demo().join("model"), quant), settings).unwrap();
            let request = Request {
                steps: 2,
                width: 96, // latents of 12 by 16: bands and tiles end unevenly
                seed: 5,
                ..Request::new("a red circle on a blue background", pipeline.card())
            };
            pipeline.generate(&request, &mut |_| Control::Continue).unwrap()
        });
        let bits = |i: usize| pictures[i].latents.data.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for i in 1..pictures.len() {
            assert!(bits(i) == bits(0), "latents, {quant:?} {precision}");
            assert!(pictures[i].rgb8 == pictures[0].rgb8, "pixels, {quant:?} {precision}");
        }
    }
}
