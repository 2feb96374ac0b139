//! numpy's legacy generator, whose noise the demo model's references and its score start from.
#![forbid(unsafe_code)]

use engine::rng::Mt19937;

/// `numpy.random.RandomState`: MT19937 and the polar method.
pub struct RandomState {
    bits: Mt19937,
    spare: Option<f64>,
}

impl RandomState {
    /// The state that `RandomState(seed)` starts in.
    pub fn new(seed: u32) -> RandomState {
        RandomState { bits: Mt19937::new(seed), spare: None }
    }

    /// Uniform in [0, 1) with 53 bits.
    fn uniform(&mut self) -> f64 {
        let (high, low) = (self.bits.next_u32() >> 5, self.bits.next_u32() >> 6);
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
