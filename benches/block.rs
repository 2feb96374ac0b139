//! One block of SD 1.5's UNet at its finest level, 512 x 512, both guidance passes: a residual block and the transformer behind
//! it, with made-up weights. An element is a multiplication or an addition of a matrix product.

use std::convert::Infallible;
use std::ops::Range;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine::card::Family;
use engine::graph::weight::{Stored, WeightKind};
use engine::graph::{Arena, Options, Plan, Session, Watch};
use engine::models::{UnetInput, unet_block};
use engine::precision::Precision;
use engine::presets;
use kernels::layout::Encoding;
use kernels::{Isa, Workers, quantize};
use sdfast_benches::{Lines, noise, threads};

/// Nobody watches.
struct Unwatched;

impl Watch<Infallible> for Unwatched {
    fn before(&mut self, _: usize, _: Range<usize>) {}

    fn after(&mut self, _: usize, _: Range<usize>) -> Result<(), Infallible> {
        Ok(())
    }
}

/// The bytes of a weight of `kind` in `encoding`.
fn made_up(kind: &WeightKind, encoding: Encoding) -> Lines {
    let Some(shape) = kind.shape() else {
        let WeightKind::Vector { len, order } = *kind else { unreachable!("a UNet has no tables") };
        return Lines::of(bytemuck::cast_slice(&noise(order.stored(len))));
    };
    let inputs = shape.taps * shape.k;
    let scale = (inputs as f32).sqrt().recip();
    let numbers: Vec<f32> = noise(shape.n * inputs).into_iter().map(|x| x * scale).collect();
    let mut bytes = vec![0; shape.bytes(encoding)];
    quantize::encode(encoding, shape, &numbers, &mut bytes);
    Lines::of(&bytes)
}

fn block(criterion: &mut Criterion) {
    let (isa, workers) = (Isa::detect(), Workers::new(threads()));
    let cfg = presets::card(Family::Sd15).unet;
    let network = unet_block(&cfg, UnetInput { batch: 2, h: 64, w: 64, tokens: 77, timesteps: 1 });
    let mut group = criterion.benchmark_group("block");
    group.sample_size(10);
    for (encoding, precision) in
        [(Encoding::Q8, Precision::Fast), (Encoding::Q4, Precision::Fast), (Encoding::Q8, Precision::High)]
    {
        let matrix = |kind: &WeightKind| kind.shape().map(|_| encoding);
        let stored: Vec<Stored> = network
            .weights()
            .iter()
            .map(|spec| Stored { encoding: matrix(&spec.kind), factors: None })
            .collect();
        let options = Options {
            narrow_stream: precision == Precision::Fast,
            ..Options::new(precision, isa, workers.threads())
        };
        let plan = Plan::new(&network, &stored, options);
        let weights: Vec<Lines> = plan.weights().iter().map(|spec| made_up(&spec.kind, encoding)).collect();
        let mut arena = Arena::new(plan.arena_bytes(1)).expect("memory for the activations");
        let bytes = weights.iter().map(Lines::get).collect();
        let mut session = Session::new(&plan, bytes, &mut arena, 1, &workers, isa);
        for name in ["hidden_states", "emb", "context"] {
            let input = session.input(name, 0);
            input.copy_from_slice(&noise(input.len()));
        }
        let Ok(()) = session.prologue(0, &mut Unwatched);
        let Ok(()) = session.schedule(0, &mut Unwatched);
        group.throughput(Throughput::Elements(plan.operations()));
        group.bench_function(BenchmarkId::new(encoding.name(), precision.name()), |bencher| {
            bencher.iter(|| {
                let Ok(()) = session.pass(0, 0, &mut Unwatched);
            });
        });
    }
}

criterion_group!(benches, block);
criterion_main!(benches);
