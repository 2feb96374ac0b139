//! Attention of SD 1.5 at 512 x 512 (batch 2), of SDXL and of the VAE. An element is one multiply-add of the two products,
//! twice: FLOP/s.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use kernels::attention::{Attention, AttentionShape, Mask, Products, attention, workspace_bytes};
use kernels::view::{Rows, RowsMut};
use kernels::{Isa, Workers};
use sdfast_benches::{noise, threads};

/// Batch, queries, keys, heads, head size.
const SHAPES: [(usize, usize, usize, usize, usize); 7] = [
    (2, 4096, 4096, 8, 40),
    (2, 1024, 1024, 8, 80),
    (2, 256, 256, 8, 160),
    (2, 4096, 77, 8, 40),
    (2, 1024, 77, 8, 80),
    (2, 1024, 1024, 20, 64),
    (1, 4096, 4096, 1, 512),
];

/// A cache line of working memory.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

fn attentions(c: &mut Criterion) {
    let (isa, workers) = (Isa::detect(), Workers::new(threads()));
    let mut group = c.benchmark_group("attention");
    group.sample_size(10);
    for (batch, nq, nk, heads, d) in SHAPES {
        let shape = AttentionShape { batch, nq, nk, heads, d };
        let columns = heads * d;
        let narrow = |n: usize| -> Vec<bf16> { noise(n).iter().map(|&x| bf16::from_f32(x)).collect() };
        let (q, k, v) =
            (narrow(batch * nq * columns), narrow(batch * nk * columns), narrow(batch * nk * columns));
        let mut out = vec![bf16::ZERO; batch * nq * columns];
        group.throughput(Throughput::Elements(4 * (batch * heads * nq * nk * d) as u64));
        for (name, products) in [("int8", Products::Int8), ("bf16", Products::Bf16), ("f32", Products::F32)] {
            let bytes = workspace_bytes(&shape, isa, products, workers.threads());
            let mut lines = vec![Line([0; 64]); bytes.div_ceil(64)];
            // SAFETY: `Line` is plain bytes without padding.
            let workspace: &mut [u8] =
                unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 64) };
            let id = BenchmarkId::new(name, format!("{batch}x{heads}x{nq}x{nk}x{d}"));
            group.bench_function(id, |b| {
                b.iter(|| {
                    let call = Attention {
                        shape,
                        q: Rows::Bf16(&q),
                        q_stride: columns,
                        k: Rows::Bf16(&k),
                        v: Rows::Bf16(&v),
                        kv_stride: columns,
                        scale: 1.0 / (d as f32).sqrt(),
                        mask: Mask::None,
                        products,
                        out: RowsMut::Bf16(&mut out),
                    };
                    attention(&workers, isa, call, workspace);
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, attentions);
criterion_main!(benches);
