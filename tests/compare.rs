//! Compares a model of any size with diffusers: `compare FOLDER [GLOB=ENCODING]... [QUANT PRECISION]...`, for example
//! `compare sdxl f16 exact q8 fast`. FOLDER is one that `tests/data/make_models.py` has written; rules as `vae.*=f16` keep
//! weights from being quantized.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Instant;

use convert::{Options, Quant};
use engine::pipeline::{Pipeline, Settings};
use engine::precision::Precision;
use sdfast_tests::families::outputs;
use sdfast_tests::{Golden, converted, cosine, relative_error, report};

fn main() {
    let mut args = std::env::args().skip(1);
    let folder =
        PathBuf::from(args.next().expect("usage: compare FOLDER [GLOB=ENCODING]... [QUANT PRECISION]..."));
    let (keep, mut pairs): (Vec<String>, Vec<String>) = args.partition(|arg| arg.contains('='));
    if pairs.is_empty() {
        pairs = ["f16", "exact", "q8", "fast"].map(String::from).to_vec();
    }
    let golden = Golden::open(&folder.join("golden.safetensors"));
    for pair in pairs.chunks_exact(2) {
        let quant = Quant::ALL.into_iter().find(|q| q.name() == pair[0]).expect("q8, q4 or f16");
        let precision =
            Precision::ALL.into_iter().find(|p| p.name() == pair[1]).expect("fast, high or exact");
        let clock = Instant::now();
        let options = Options { checkpoint: folder.clone(), quant, keep: keep.clone(), ..Options::default() };
        let settings = Settings { precision, ..Settings::default() };
        let pipeline = Pipeline::new(converted(options), settings).expect("a model");
        report(&format!("{} {precision}: converted in {:.1} s", quant.name(), clock.elapsed().as_secs_f64()));
        for out in outputs(&golden, &pipeline) {
            let (error, cosine) = (relative_error(&out.got, &out.wanted), cosine(&out.got, &out.wanted));
            report(&format!("  {:18} relative error {error:.1e}, cosine {cosine:.6}", out.what));
        }
    }
}
