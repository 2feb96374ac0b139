//! Every kernel of the table on 3 x 3 convolutions of SD 1.5, one thread.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kernels::Workers;
use kernels::gemm::{Epilogue, Filter, Gemm, gemm_with, kernels};
use kernels::layout::{Encoding, Weight, WeightShape};
use kernels::view::{Border, ImageShape, RowsMut};
use sdfast_benches::{Lines, encodings, operand};

/// Side, inputs, outputs, stride, upsampling.
const SHAPES: [(usize, usize, usize, usize, bool); 6] = [
    (64, 320, 320, 1, false),
    (32, 640, 640, 1, false),
    (16, 1280, 1280, 1, false),
    (64, 320, 320, 2, false),
    (16, 640, 640, 1, true),
    (64, 320, 4, 1, false),
];

fn conv(criterion: &mut Criterion) {
    let workers = Workers::new(1);
    let border = Border { top: 1, left: 1, bottom: 1, right: 1 };
    for (side, k, n, stride, upsample) in SHAPES {
        let input = ImageShape { batch: 1, h: side, w: side, border };
        let filter = Filter { kh: 3, kw: 3, stride, upsample };
        let (h, w) = filter.output(&input);
        let up = if upsample { " upsampled" } else { "" };
        let mut group =
            criterion.benchmark_group(format!("conv {side}x{side}{up} {k} to {n} stride {stride}"));
        group.throughput(Throughput::Elements(2 * (h * w * n * 9 * k) as u64));
        for kernel in
            kernels().iter().filter(|kernel| kernel.isa.is_available() && kernel.isa.name() != "scalar")
        {
            for &encoding in encodings(kernel.types) {
                let shape = WeightShape { n, taps: 9, k };
                let rows = Lines::new(input.operand_rows() * shape.k_padded() * kernel.types.row_bytes(), 0);
                let scale = vec![1.0; input.operand_rows()];
                let bytes = Lines::new(shape.bytes(encoding), 0);
                let mut out = vec![0.0; h * w * n];
                group.bench_function(format!("{} {}", kernel.name, Encoding::name(encoding)), |bencher| {
                    bencher.iter(|| {
                        let call = Gemm {
                            operand: operand(kernel.types, rows.get(), &scale),
                            input,
                            filter,
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

criterion_group!(benches, conv);
criterion_main!(benches);
