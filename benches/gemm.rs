//! Every kernel of the table on linear layers of SD 1.5 and SDXL, one thread. Rates are operations per second; a multiplication
//! and its addition are two.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kernels::Workers;
use kernels::gemm::{Epilogue, Filter, Gemm, gemm_with, kernels};
use kernels::layout::{Encoding, Weight, WeightShape};
use kernels::view::{ImageShape, RowsMut};
use sdfast_benches::{Lines, encodings, operand};

/// m, n, k.
const SHAPES: [(usize, usize, usize); 6] = [
    (4096, 320, 320),
    (4096, 320, 1280),
    (1024, 5120, 640),
    (1024, 1280, 1280),
    (256, 10240, 1280),
    (77, 768, 768),
];

fn linear(criterion: &mut Criterion) {
    let workers = Workers::new(1);
    for (m, n, k) in SHAPES {
        let mut group = criterion.benchmark_group(format!("linear {m}x{n}x{k}"));
        group.throughput(Throughput::Elements(2 * (m * n * k) as u64));
        for kernel in
            kernels().iter().filter(|kernel| kernel.isa.is_available() && kernel.isa.name() != "scalar")
        {
            for &encoding in encodings(kernel.types) {
                let shape = WeightShape::linear(n, k);
                let rows = Lines::new(m * shape.k_padded() * kernel.types.row_bytes(), 0);
                let scale = vec![1.0; m];
                let bytes = Lines::new(shape.bytes(encoding), 0);
                let mut out = vec![0.0; m * n];
                group.bench_function(format!("{} {}", kernel.name, Encoding::name(encoding)), |bencher| {
                    bencher.iter(|| {
                        let call = Gemm {
                            operand: operand(kernel.types, rows.get(), &scale),
                            input: ImageShape::rows(m),
                            filter: Filter::POINT,
                            weight: Weight::new(encoding, shape, bytes.get()),
                            epilogue: Epilogue::default(),
                            out: RowsMut::F32(&mut out),
                        };
                        gemm_with(&workers, kernel, call);
                        black_box(&mut out);
                    });
                });
            }
        }
    }
}

criterion_group!(benches, linear);
criterion_main!(benches);
