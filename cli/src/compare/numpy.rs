//! numpy's legacy generator, whose noise the demo model's references and its score start from.
#![forbid(unsafe_code)]

const N: usize = 624;

/// `numpy.random.RandomState`: MT19937 and the polar method.
pub struct RandomState {
    key: [u32; N],
    next: usize,
    spare: Option<f64>,
}

impl RandomState {
    /// The state that `RandomState(seed)` starts in.
    pub fn new(seed: u32) -> RandomState {
        let mut key = [0; N];
        key[0] = seed;
        for i in 1..N {
            let last: u32 = key[i - 1];
            key[i] = 1812433253u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i as u32);
        }
        RandomState { key, next: N, spare: None }
    }

    fn twist(&mut self) {
        for i in 0..N {
            let y = (self.key[i] & 0x8000_0000) | (self.key[(i + 1) % N] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.key[i] = self.key[(i + 397) % N] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }

    fn word(&mut self) -> u32 {
        if self.next == N {
            self.twist();
        }
        let mut y = self.key[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Uniform in [0, 1) with 53 bits.
    fn uniform(&mut self) -> f64 {
        let (high, low) = (self.word() >> 5, self.word() >> 6);
        (high as f64 * 67108864. + low as f64) / 9007199254740992.
    }

    fn normal(&mut self) -> f64 {
        if let Some(v) = self.spare.take() {
            return v;
        }
        loop {
            let (x, y) = (2. * self.uniform() - 1., 2. * self.uniform() - 1.);
            let r = x * x + y * y;
            if r < 1. && r != 0. {
                let scale = (-2. * r.ln() / r).sqrt();
                self.spare = Some(scale * x);
                return scale * y;
            }
        }
    }

    /// `standard_normal(n).astype(float32)`.
    pub fn standard_normal(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal() as f32).collect()
    }
}
