//! A table of every kernel of this machine on the large layers of SD 1.5 and SDXL: billions of operations per second on one
//! thread, their share of what the same multiplications reach on registers in the same run, 4-bit weights' speed as a share of
//! 8-bit weights', two threads' as a multiple of one's; of 16-bit numbers once of codes and once of rounded floats. Then passes
//! beside a copy of their input and beside one in memory.
//!
//! `cargo bench -p sdfast-benches --bench tiers [-- --quick] [-- KERNEL]`; `--quick` measures a few layers, shortly; a `KERNEL`
//! called `pass` leaves out all kernels, any other one the passes.

use std::hint::black_box;
use std::io::Write;
use std::time::{Duration, Instant};

use half::bf16;
use kernels::ceilings::{LayerShape, layer_gops, plain};
use kernels::gemm::{Activation, Types, kernels};
use kernels::layout::Encoding;
use kernels::par::Shared;
use kernels::pass::{Norm, Recipe, Source, group_codings, group_stats, operand_pass, stats_len, sums_len};
use kernels::view::{Border, Coding, ImageShape, OperandMut, Rows};
use kernels::{Isa, Workers};
use sdfast_benches::{Lines, noise};

/// m, n, k.
const LINEAR: [(usize, usize, usize); 8] = [
    (4096, 320, 320),
    (4096, 2560, 320),
    (4096, 320, 1280),
    (1024, 5120, 640),
    (1024, 640, 640),
    (256, 10240, 1280),
    (1024, 1280, 1280),
    (16384, 640, 640),
];
/// Side, outputs and inputs.
const CONV: [(usize, usize); 3] = [(64, 320), (32, 640), (16, 1280)];
/// Bytes of a copy in memory.
const MEMORY: usize = 256 << 20;
/// Images, side, channels.
const PASSES: [(usize, usize, usize); 4] = [(2, 64, 320), (2, 32, 640), (2, 16, 1280), (1, 64, 1280)];

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let only = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let time = Duration::from_millis(if quick { 30 } else { 1000 });
    let (one, two) = (Workers::new(1), Workers::new(2));
    let linear = LINEAR.map(|(m, n, k)| (format!("{m} x {n} x {k}"), LayerShape::linear(m, n, k)));
    let conv =
        CONV.map(|(side, c)| (format!("3 x 3, {side} x {side}, {c}"), LayerShape::conv3x3(1, side, c, c)));
    let (linear, conv) = if quick { (&linear[6..7], &conv[..1]) } else { (&linear[..], &conv[..]) };
    say(
        "| kernel | layer | weights | GOP/s | of ceiling | q4 to q8 | 2 threads to 1 |\n|---|---|---|--:|--:|--:|--:|",
    );
    for kernel in kernels().iter().filter(|kernel| kernel.isa.is_available() && kernel.isa != Isa::Scalar) {
        if only.as_ref().is_some_and(|only| !kernel.name.contains(only)) {
            continue;
        }
        // The kernels of 16-bit numbers have two kinds of rows.
        let rounded = (kernel.types == Types::S16S16).then_some(Encoding::F16);
        let encodings = std::iter::once(plain(kernel.types)).chain(rounded);
        let layers =
            encodings.flat_map(|encoding| linear.iter().chain(conv).map(move |layer| (encoding, layer)));
        for (encoding, (name, shape)) in layers {
            let four = (encoding == Encoding::Q8).then_some((&one, Encoding::Q4));
            let runs: Vec<_> = [(&one, encoding), (&two, encoding)].into_iter().chain(four).collect();
            let (rates, ceiling) = layer_gops(&runs, kernel, *shape, time);
            let gops = rates[0];
            let four = rates.get(2).map_or(String::new(), |four| format!("{:.2}", four / gops));
            let (ratio, threads) = (gops / ceiling, rates[1] / gops);
            let weights = encoding.name();
            say(&format!(
                "| {} | {name} | {weights} | {gops:.0} | {ratio:.2} | {four} | {threads:.2} |",
                kernel.name
            ));
        }
    }
    if only.is_some_and(|only| only != "pass") {
        return;
    }
    say(
        "\n| pass, one thread | input | GB/s read and written | of a copy of the input | of a copy in memory |",
    );
    say("|---|---|--:|--:|--:|");
    let memory = copy_in_memory(time);
    say(&format!("| copy | {} MiB, in memory | {memory:.1} | | 1.00 |", MEMORY >> 20));
    for size in if quick { &PASSES[..1] } else { &PASSES[..] } {
        let x = noise(size.0 * size.1 * size.1 * size.2);
        let half: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
        passes(&one, *size, "bf16", &Lines::of(bytemuck::cast_slice(&half)), memory, time);
        passes(&one, *size, "f32", &Lines::of(bytemuck::cast_slice(&x)), memory, time);
    }
}

/// GB/s of a copy that no cache has room for, read and written.
fn copy_in_memory(time: Duration) -> f64 {
    // Written to, so that the copy meets its pages.
    let (from, mut to) = (vec![1u8; MEMORY], vec![2u8; MEMORY]);
    let rate =
        rate(2 * MEMORY, time.max(Duration::from_millis(500)), || to.copy_from_slice(black_box(&from)));
    black_box(&to);
    rate
}

/// Rates of what writes the operands of an image of `size`, whose elements are `x`; `memory` is that of a copy in memory.
///
/// All buffers begin at a line of the cache, as those of an arena do, and are in the level of the cache that has room for them:
/// input and output of a pass for the pass, the input and its copy for the copy.
fn passes(
    workers: &Workers,
    (batch, side, channels): (usize, usize, usize),
    ty: &str,
    x: &Lines,
    memory: f64,
    time: Duration,
) {
    let isa = Isa::detect();
    let image =
        ImageShape { batch, h: side, w: side, border: Border { top: 1, left: 1, bottom: 1, right: 1 } };
    let rows = ImageShape::rows(image.pixels());
    let n = image.pixels() * channels;
    let stride = channels.next_multiple_of(64);
    let bytes = x.get().len();
    let input = if bytes == 2 * n {
        Rows::Bf16(bytemuck::cast_slice(x.get()))
    } else {
        Rows::F32(bytemuck::cast_slice(x.get()))
    };
    let source = Source::one(input, channels);
    let (gamma, beta) = (vec![1.1f32; channels], vec![0.1f32; channels]);
    let groups = 32;
    let mut sums = vec![0f64; sums_len(&image, groups, channels)];
    let mut stats = vec![0f32; batch * stats_len(groups, channels)];
    let mut codes = Lines::new(image.operand_rows() * stride, 0);
    let codes = codes.get_mut();
    let mut scale = vec![0f32; image.operand_rows()];
    let mut codings = vec![Coding { scale: 1.0, zero: 0 }; batch];
    let size = format!("{batch} x {side} x {side} x {channels} {ty}");

    let (mut copy, half) = (Lines::new(bytes, 0), bytes / 2);
    let copied = {
        let to = Shared::new(copy.get_mut());
        rate(2 * bytes, time, || {
            workers.for_each(2, |i, _| {
                // SAFETY: each task has its own part.
                unsafe { to.slice(i * half, half) }.copy_from_slice(&x.get()[i * half..(i + 1) * half]);
            });
        })
    };
    black_box(&copy);
    let line = |name: &str, rate: f64| {
        say(&format!("| {name} | {size} | {rate:.1} | {:.2} | {:.2} |", rate / copied, rate / memory));
    };
    line("copy", copied);
    line(
        "group norm, statistics",
        rate(bytes, time, || {
            group_stats(workers, isa, source, image, groups, 1e-5, &mut sums, &mut stats);
        }),
    );
    let norm = Norm::Group { stats: &stats, groups, gamma: &gamma, beta: &beta };
    let silu = Recipe { norm, activation: Activation::Silu, factors: None };
    group_codings(silu, &mut codings);
    line(
        "group norm, SiLU, u8 image",
        rate(bytes + n, time, || {
            let out = OperandMut::U8Uniform { codes, images: &codings };
            operand_pass(workers, isa, source, image, silu, out, stride);
        }),
    );
    let layer = Norm::Layer { gamma: &gamma, beta: &beta, eps: 1e-5 };
    for (name, image, recipe) in [
        ("group norm, SiLU, u8 rows", image, silu),
        ("layer norm, u8 rows", rows, Recipe::new(layer, Activation::None)),
        ("u8 rows", rows, Recipe::new(Norm::None, Activation::None)),
    ] {
        let m = image.operand_rows();
        line(
            name,
            rate(bytes + n, time, || {
                let out = OperandMut::U8 { codes: &mut codes[..m * stride], scale: &mut scale[..m] };
                operand_pass(workers, isa, source, image, recipe, out, stride);
            }),
        );
    }
}

/// A line for whoever waits.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

/// The best rate of `run`, which moves `bytes`, in GB/s.
fn rate(bytes: usize, time: Duration, mut run: impl FnMut()) -> f64 {
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while best == f64::INFINITY || start.elapsed() < time {
        let clock = Instant::now();
        run();
        best = best.min(clock.elapsed().as_secs_f64());
    }
    bytes as f64 / best / 1e9
}
