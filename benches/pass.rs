//! Fused passes over the tensors of an SD 1.5 network and of its VAE: GB/s of what is read and written, beside a copy.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use kernels::gemm::Activation;
use kernels::par::Shared;
use kernels::pass::{Norm, Recipe, Source, group_stats, operand_pass, stats_len, sums_len};
use kernels::view::{Border, ImageShape, OperandMut, Rows};
use kernels::{Isa, Workers};
use sdfast_benches::{noise, threads};

/// Images, height (and width), channels.
const SHAPES: [(usize, usize, usize); 4] = [(2, 64, 320), (2, 32, 640), (2, 16, 1280), (1, 256, 512)];
const GROUPS: usize = 32;

fn passes(c: &mut Criterion) {
    let (isa, workers) = (Isa::detect(), Workers::new(threads()));
    for (batch, h, channels) in SHAPES {
        let image = ImageShape { batch, h, w: h, border: Border { top: 1, left: 1, bottom: 1, right: 1 } };
        let n = image.pixels() * channels;
        let stride = channels.next_multiple_of(64);
        let wide = noise(n);
        let narrow: Vec<bf16> = wide.iter().map(|&x| bf16::from_f32(x)).collect();
        let (gamma, beta) = (vec![1.1f32; channels], vec![0.1f32; channels]);
        let factors = vec![2f32; channels];
        let mut stats = vec![0f32; batch * stats_len(GROUPS, channels)];
        let mut codes = vec![0u8; image.operand_rows() * stride];
        let mut scale = vec![0f32; image.operand_rows()];
        let name = format!("pass/{batch}x{h}x{h}x{channels}");
        let mut group = c.benchmark_group(&name);

        let mut copy = vec![0f32; n];
        group.throughput(Throughput::Bytes(8 * n as u64));
        group.bench_function("copy", |b| {
            let to = Shared::new(&mut copy);
            let part = n / 64;
            b.iter(|| {
                workers.for_each(64, |i, _| {
                    // SAFETY: each task has its own part.
                    let to = unsafe { to.slice(i * part, part) };
                    to.copy_from_slice(&wide[i * part..(i + 1) * part]);
                });
            });
        });
        let mut sums = vec![0f64; sums_len(&image, GROUPS, channels)];
        for (ty, bytes, rows) in [("f32", 4, Rows::F32(&wide)), ("bf16", 2, Rows::Bf16(&narrow))] {
            let source = Source::one(rows, channels);
            group.throughput(Throughput::Bytes((bytes * n) as u64));
            group.bench_function(BenchmarkId::new("group_stats", ty), |b| {
                b.iter(|| group_stats(&workers, isa, source, image, GROUPS, 1e-5, &mut sums, &mut stats));
            });
            let group_norm = Norm::Group { stats: &stats, groups: GROUPS, gamma: &gamma, beta: &beta };
            let layer_norm = Norm::Layer { gamma: &gamma, beta: &beta, eps: 1e-5 };
            let silu = Recipe::new(group_norm, Activation::Silu);
            let layer = Recipe::new(layer_norm, Activation::None);
            let recipes = [
                ("group_norm_silu_u8", silu),
                ("group_norm_silu_factors_u8", Recipe { factors: Some(&factors), ..silu }),
                ("layer_norm_u8", layer),
                ("layer_norm_factors_u8", Recipe { factors: Some(&factors), ..layer }),
                ("u8", Recipe::new(Norm::None, Activation::None)),
            ];
            group.throughput(Throughput::Bytes(((bytes + 1) * n) as u64));
            for (name, recipe) in recipes {
                group.bench_function(BenchmarkId::new(name, ty), |b| {
                    b.iter(|| {
                        let out = OperandMut::U8 { codes: &mut codes, scale: &mut scale };
                        operand_pass(&workers, isa, source, image, recipe, out, stride);
                    });
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, passes);
criterion_main!(benches);
