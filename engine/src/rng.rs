//! Normally distributed noise, number for number as the programs that people compare with draw it.
//!
//! [`TorchRng`] is `torch.randn` with a CPU generator: the Mersenne Twister mt19937 (Matsumoto and Nishimura 1998) and the
//! Box-Muller transform, in one way for tensors of 16 numbers and more and in another for smaller ones. [`PhiloxRng`] is what
//! CUDA draws: Philox 4x32-10 (Salmon et al. 2011), a counter-based generator.
#![forbid(unsafe_code)]

use std::f32::consts::PI;

use crate::pipeline::Noise;

/// A generator of noise.
#[derive(Clone, Debug)]
pub enum Rng {
    /// See [`Noise::Torch`].
    Torch(Box<TorchRng>),
    /// See [`Noise::Philox`].
    Philox(PhiloxRng),
}

impl Rng {
    /// The generator of kind `noise`, seeded.
    pub fn new(noise: Noise, seed: u64) -> Self {
        match noise {
            Noise::Torch => Rng::Torch(Box::new(TorchRng::new(seed))),
            Noise::Philox => Rng::Philox(PhiloxRng::new(seed)),
        }
    }

    /// Fills `out`, one tensor, with normally distributed numbers of mean 0 and variance 1.
    pub fn randn(&mut self, out: &mut [f32]) {
        match self {
            Rng::Torch(rng) => rng.randn(out),
            Rng::Philox(rng) => rng.randn(out),
        }
    }
}

/// Words of the state of mt19937.
const N: usize = 624;
/// Distance of the word that is mixed in.
const M: usize = 397;

/// The Mersenne Twister.
#[derive(Clone, Debug)]
pub struct Mt19937 {
    state: [u32; N],
    /// Words of `state` that have been drawn.
    used: usize,
}

impl Mt19937 {
    /// Seeded with one word.
    pub fn new(seed: u32) -> Self {
        let mut state = [0u32; N];
        state[0] = seed;
        for i in 1..N {
            let last = state[i - 1];
            state[i] = (last ^ (last >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        Mt19937 { state, used: N }
    }

    /// The next 32 bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == N {
            self.refill();
        }
        let mut y = self.state[self.used];
        self.used += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9D2C_5680;
        y ^= (y << 15) & 0xEFC6_0000;
        y ^ (y >> 18)
    }

    fn refill(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7FFF_FFFF);
            let odd = if y & 1 == 1 { 0x9908_B0DF } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
        }
        self.used = 0;
    }
}

/// `torch.randn(..., generator=torch.Generator("cpu").manual_seed(seed))`, f32.
#[derive(Clone, Debug)]
pub struct TorchRng {
    bits: Mt19937,
    /// The second number of a pair, kept for the next small tensor.
    cached: Option<f64>,
}

impl TorchRng {
    /// Seeded with the low 32 bits of `seed`, as torch does.
    pub fn new(seed: u64) -> Self {
        TorchRng { bits: Mt19937::new(seed as u32), cached: None }
    }

    /// In `[0, 1)`, 24 bits.
    fn uniform_f32(&mut self) -> f32 {
        (self.bits.next_u32() & 0xFF_FFFF) as f32 / (1u32 << 24) as f32
    }

    /// In `[0, 1)`, 53 bits, the high word first.
    fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.bits.next_u32());
        let bits = (high << 32 | u64::from(self.bits.next_u32())) & ((1 << 53) - 1);
        bits as f64 / (1u64 << 53) as f64
    }

    /// Fills `out` as `torch.randn(out.len())` would.
    pub fn randn(&mut self, out: &mut [f32]) {
        const GROUP: usize = 16;
        if out.len() < GROUP {
            out.iter_mut().for_each(|x| *x = self.normal() as f32);
            return;
        }
        out.iter_mut().for_each(|x| *x = self.uniform_f32());
        let (groups, rest) = out.as_chunks_mut::<GROUP>();
        groups.iter_mut().for_each(box_muller_16);
        if !rest.is_empty() {
            // The last 16 numbers are drawn anew, over the end of the last whole group.
            let tail = out.last_chunk_mut::<GROUP>().expect("there are at least 16");
            tail.iter_mut().for_each(|x| *x = self.uniform_f32());
            box_muller_16(tail);
        }
    }

    /// One number of a pair, in double precision.
    fn normal(&mut self) -> f64 {
        if let Some(second) = self.cached.take() {
            return second;
        }
        let (u1, u2) = (self.uniform_f64(), self.uniform_f64());
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let (sin, cos) = (2.0 * std::f64::consts::PI * u1).sin_cos();
        self.cached = Some(radius * sin);
        radius * cos
    }
}

/// Eight pairs: numbers `j` and `j + 8` of the group.
fn box_muller_16(group: &mut [f32; 16]) {
    for j in 0..8 {
        let (u1, u2) = (1.0 - group[j], group[j + 8]);
        let radius = (-2.0 * u1.ln()).sqrt();
        let (sin, cos) = (2.0 * PI * u2).sin_cos();
        group[j] = radius * cos;
        group[j + 8] = radius * sin;
    }
}

/// What `torch.randn` on a CUDA device draws for tensors no larger than the device's grid.
#[derive(Clone, Debug)]
pub struct PhiloxRng {
    key: [u32; 2],
    /// Tensors drawn so far.
    calls: u32,
}

impl PhiloxRng {
    /// Seeded with all 64 bits.
    pub fn new(seed: u64) -> Self {
        PhiloxRng { key: [seed as u32, (seed >> 32) as u32], calls: 0 }
    }

    /// Fills `out` as one call of `torch.randn` would.
    pub fn randn(&mut self, out: &mut [f32]) {
        // The scales are single-precision constants, the arithmetic is double.
        let scale = f64::from(2.328_306_4e-10_f32);
        let angle = f64::from((2.328_306_4e-10 * 6.283_185_5) as f32);
        for (i, x) in out.iter_mut().enumerate() {
            let [g0, g1, ..] = philox_4x32_10([self.calls, 0, i as u32, 0], self.key);
            let u = f64::from(g0) * scale + scale / 2.0;
            let v = f64::from(g1) * angle + angle / 2.0;
            *x = ((-2.0 * u.ln()).sqrt() * v.sin()) as f32;
        }
        self.calls = self.calls.wrapping_add(1);
    }
}

/// Ten rounds over the counter.
fn philox_4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let wide = |a: u32, b: u32| {
        let product = u64::from(a) * u64::from(b);
        ((product >> 32) as u32, product as u32)
    };
    for _ in 0..10 {
        let (high0, low0) = wide(0xD251_1F53, counter[0]);
        let (high1, low1) = wide(0xCD9E_8D57, counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    /// A run of torch's generator: see `tests/data/make_golden.py`.
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Run {
        Calls { seed: u64, calls: Vec<Vec<f32>> },
        Large { seed: u64, large: Vec<usize>, first: Vec<f32>, last: Vec<f32>, sum: f64, abs_sum: f64 },
    }

    fn assert_close(found: &[f32], golden: &[f32]) {
        assert_eq!(found.len(), golden.len());
        for (i, (a, b)) in found.iter().zip(golden).enumerate() {
            assert!((a - b).abs() <= 1e-6, "number {i}: {a} is not {b}");
        }
    }

    #[test]
    fn torch_numbers_are_torchs() {
        let runs: Vec<Run> =
            serde_json::from_str(include_str!("../../tests/data/noise.json")).expect("golden file");
        for run in runs {
            match run {
                Run::Calls { seed, calls } => {
                    let mut rng = TorchRng::new(seed);
                    for golden in calls {
                        let mut found = vec![0.0; golden.len()];
                        rng.randn(&mut found);
                        assert_close(&found, &golden);
                    }
                }
                Run::Large { seed, large, first, last, sum, abs_sum } => {
                    let mut found = vec![0.0; large.iter().product()];
                    TorchRng::new(seed).randn(&mut found);
                    assert_close(&found[..8], &first);
                    assert_close(&found[found.len() - 8..], &last);
                    let total: f64 = found.iter().map(|&x| f64::from(x)).sum();
                    let absolute: f64 = found.iter().map(|&x| f64::from(x.abs())).sum();
                    assert!((total - sum).abs() < 1e-3, "{total} is not {sum}");
                    assert!((absolute - abs_sum).abs() < 1e-3, "{absolute} is not {abs_sum}");
                }
            }
        }
    }

    #[test]
    fn philox_numbers_are_cudas() {
        let mut rng = PhiloxRng::new(0);
        let mut found = [0.0; 12];
        rng.randn(&mut found);
        assert_close(&found[..4], &[-0.924_662_6, -0.425_344_15, -2.643_845_7, 0.145_183_88]);
        let mut rng = PhiloxRng::new(42);
        let mut found = vec![0.0; 4 * 64 * 64];
        rng.randn(&mut found);
        assert_close(&found[..4], &[0.194_018_9, 2.161_373_9, -0.172_051, 0.849_060]);
        rng.randn(&mut found);
        assert_close(&found[..4], &[0.139_137_5, -0.108_216_2, -0.717_422_2, 0.756_648_7]);
    }

    #[test]
    fn a_seed_is_64_bits_for_philox_and_32_for_torch() {
        let draw = |noise, seed| {
            let mut x = [0.0; 32];
            Rng::new(noise, seed).randn(&mut x);
            x
        };
        assert_eq!(draw(Noise::Torch, 5), draw(Noise::Torch, 5 + (1 << 32)));
        assert_ne!(draw(Noise::Philox, 5), draw(Noise::Philox, 5 + (1 << 32)));
    }

    #[test]
    fn nothing_to_fill_is_fine() {
        TorchRng::new(1).randn(&mut []);
        PhiloxRng::new(1).randn(&mut []);
    }
}
