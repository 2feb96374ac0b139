//! Elementary functions on vectors. Bounds hold on every tier, tests check them.
#![forbid(unsafe_code)]

use crate::gemm::Activation;
use crate::simd::Simd;

/// `c[0] + c[1] x + c[2] x^2 + ...`
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::F, c: [f32; N]) -> S::F {
    let mut y = s.splat(c[N - 1]);
    for i in (0..N - 1).rev() {
        y = s.fma(y, x, s.splat(c[i]));
    }
    y
}

/// `e^x` within 2 ULP for x in [-87.3, 88.7]; beyond, the value at the nearer end.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // ln 2 in two parts, the first short enough that its product with n is exact.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    // e^r = 1 + r + r^2 q(r) for |r| <= ln(2) / 2, minimax.
    const Q: [f32; 5] = [0.499_999_94, 0.166_665_2, 4.166_839_3e-2, 8.368_781e-3, 1.381_446_7e-3];
    let x = s.min(s.max(x, s.splat(-87.3)), s.splat(88.7));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-LN2[0]), x);
    let r = s.fma(n, s.splat(-LN2[1]), r);
    let q = polynomial(s, r, Q);
    let p = s.add(s.fma(s.mul(r, r), q, r), s.splat(1.0));
    s.mul_pow2(p, n)
}

/// `2^x` within 2 ULP for x in [-126, 127.9]; below, 2^-126. Not for larger x.
#[inline(always)]
pub fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    // 2^f = 1 + f q(f) for |f| <= 1/2, minimax.
    const Q: [f32; 6] =
        [std::f32::consts::LN_2, 0.240_226_48, 5.550_332e-2, 9.618_439e-3, 1.339_900_3e-3, 1.535_325_7e-4];
    let x = s.max(x, s.splat(-126.0));
    let n = s.round(x);
    let f = s.sub(x, n);
    let p = s.fma(f, polynomial(s, f, Q), s.splat(1.0));
    s.mul_pow2(p, n)
}

/// `2^x` within a relative error of 1e-4 for x in [-125, 126), nearly 0 below; x finite. Enough before rounding to bf16.
#[inline(always)]
pub fn exp2_coarse<S: Simd>(s: S, x: S::F) -> S::F {
    // 2^f for f in [0, 1], minimax.
    const Q: [f32; 4] = [0.999_925_2, 0.695_833_56, 0.226_067_16, 7.802_452e-2];
    s.mul_pow2_floor(polynomial(s, s.fraction(x), Q), x)
}

/// `log2(255)`
pub const LOG2_255: f32 = 7.994_353_4;

/// `log2(127)`
pub const LOG2_127: f32 = 6.988_684_7;

/// `1 / (1 + e^-x)` within 4 ULP for x >= -87.
#[inline(always)]
pub fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let e = exp(s, s.sub(s.splat(0.0), x));
    s.div(s.splat(1.0), s.add(s.splat(1.0), e))
}

/// `x * sigmoid(x)` within 4 ULP for x >= -87.
#[inline(always)]
pub fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    let e = exp(s, s.sub(s.splat(0.0), x));
    s.div(x, s.add(s.splat(1.0), e))
}

/// `x * sigmoid(x)` within a relative error of 4e-4 for x >= -86, and nearly 0 below: enough before rounding to 8 bits.
#[inline(always)]
pub fn silu_coarse<S: Simd>(s: S, x: S::F) -> S::F {
    let power = s.min(s.mul(x, s.splat(-std::f32::consts::LOG2_E)), s.splat(125.0));
    s.mul(x, s.recip_coarse(s.add(s.splat(1.0), exp2_coarse(s, power))))
}

/// `x * Phi(x)`, `Phi` the normal distribution function: `0.5 x (1 + erf(x / sqrt 2))`. Within 4 ULP of `x`.
#[inline(always)]
pub fn gelu<S: Simd>(s: S, x: S::F) -> S::F {
    // Phi(-a) = e^(-a^2 / 2) t P(t), t = 1 / (1 + 0.3 a), minimax for a in [0, 13].
    const P: [f32; 8] = [
        0.119_626,
        0.120_804_27,
        9.960_09e-2,
        0.129_589_02,
        -5.561_886_4e-2,
        0.208_449_78,
        -0.158_416_51,
        3.596_533_5e-2,
    ];
    let a = s.abs(x);
    let t = s.div(s.splat(1.0), s.fma(a, s.splat(0.3), s.splat(1.0)));
    let e = exp(s, s.mul(s.mul(x, x), s.splat(-0.5)));
    let tail = s.mul(e, s.mul(t, polynomial(s, t, P)));
    let phi = s.select_lt(x, s.splat(0.0), tail, s.sub(s.splat(1.0), tail));
    s.mul(x, phi)
}

/// `x * Phi(x)` within 3e-4 and a relative error of 1e-4: enough before rounding to bf16.
#[inline(always)]
pub fn gelu_coarse<S: Simd>(s: S, x: S::F) -> S::F {
    // ln(Phi / (1 - Phi)) = x (1.600 + 0.0694 x^2) about, as powers of two, negated.
    const C: [f32; 2] = [-1.600_314_2 * std::f32::consts::LOG2_E, -0.069_401_79 * std::f32::consts::LOG2_E];
    let power = s.mul(x, s.fma(s.mul(x, x), s.splat(C[1]), s.splat(C[0])));
    let e = exp2_coarse(s, s.min(power, s.splat(125.0)));
    s.mul(x, s.recip_coarse(s.add(s.splat(1.0), e)))
}

/// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, which is `x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))`. Within 4 ULP
/// of `x`.
#[inline(always)]
pub fn gelu_tanh<S: Simd>(s: S, x: S::F) -> S::F {
    const C: f32 = 1.595_769; // 2 sqrt(2 / pi)
    let cube = s.fma(s.mul(x, x), s.splat(0.044_715 * C), s.splat(C));
    s.mul(x, sigmoid(s, s.mul(x, cube)))
}

/// `x * sigmoid(1.702 x)` within 4 ULP of `x`.
#[inline(always)]
pub fn quick_gelu<S: Simd>(s: S, x: S::F) -> S::F {
    s.mul(x, sigmoid(s, s.mul(x, s.splat(1.702))))
}

impl Activation {
    /// The function of one vector. [`Activation::Geglu`] joins two columns and is the caller's: here it is the gate's
    /// [`gelu`].
    #[inline(always)]
    pub fn apply<S: Simd>(self, s: S, x: S::F) -> S::F {
        match self {
            Activation::None => x,
            Activation::Relu => s.max(x, s.splat(0.0)),
            Activation::Silu => silu(s, x),
            Activation::Gelu | Activation::Geglu => gelu(s, x),
            Activation::GeluTanh => gelu_tanh(s, x),
            Activation::QuickGelu => quick_gelu(s, x),
        }
    }

    /// As [`Activation::apply`], within a relative error of 4e-4 or an absolute one of 3e-4: enough before rounding to bf16.
    #[inline(always)]
    pub fn apply_coarse<S: Simd>(self, s: S, x: S::F) -> S::F {
        match self {
            Activation::Silu => silu_coarse(s, s.max(x, s.splat(-86.0))),
            Activation::Gelu | Activation::Geglu => gelu_coarse(s, x),
            _ => self.apply(s, x),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::math as reference;
    use crate::simd::{SimdOp, dispatch, tests::tiers};

    /// Applies a function to a list, whole vectors at a time.
    macro_rules! over {
        ($isa:expr, $xs:expr, |$s:ident, $x:ident| $e:expr) => {{
            struct Over<'a>(&'a mut [f32]);
            impl SimdOp for Over<'_> {
                type Output = ();
                #[inline(always)]
                fn run<S: Simd>(self, $s: S) {
                    for c in self.0.chunks_exact_mut(S::LANES) {
                        let $x = $s.load(c);
                        $s.store($e, c);
                    }
                }
            }
            let mut ys: Vec<f32> = $xs.to_vec();
            dispatch($isa, Over(&mut ys));
            ys
        }};
    }

    /// Every `step`-th f32 in `[lo, hi]`, a multiple of 16 of them.
    fn floats(lo: f32, hi: f32, step: usize) -> Vec<f32> {
        let key =
            |x: f32| if x < 0.0 { -((x.to_bits() & 0x7fff_ffff) as i64) } else { i64::from(x.to_bits()) };
        let at = |k: i64| if k < 0 { -f32::from_bits(-k as u32) } else { f32::from_bits(k as u32) };
        let mut xs: Vec<f32> = (key(lo)..=key(hi)).step_by(step).map(at).collect();
        // Most floats are tiny: as many evenly spaced ones.
        let n = xs.len();
        xs.extend((0..=n).map(|i| lo + (hi - lo) * (i as f32 / n as f32)));
        xs.resize(xs.len().next_multiple_of(16), hi);
        xs
    }

    fn ulp(x: f64) -> f64 {
        let x = (x.abs() as f32).max(f32::MIN_POSITIVE);
        f64::from(f32::from_bits(x.to_bits() + 1)) - f64::from(x)
    }

    /// The largest error in units of the last place of `unit(x, want)`.
    fn worst(xs: &[f32], ys: &[f32], want: impl Fn(f64) -> f64, unit: impl Fn(f64, f64) -> f64) -> f64 {
        xs.iter().zip(ys).fold(0.0, |worst: f64, (&x, &y)| {
            let (x, y) = (f64::from(x), f64::from(y));
            let error = (y - want(x)).abs() / ulp(unit(x, want(x)));
            assert!(error.is_finite(), "{x} -> {y}");
            worst.max(error)
        })
    }

    #[test]
    fn exponentials_keep_their_bounds() {
        let xs = floats(-87.3, 88.7, 5003);
        let twos = floats(-126.0, 125.9, 5003);
        for isa in tiers() {
            let e = worst(&xs, &over!(isa, xs, |s, x| exp(s, x)), f64::exp, |_, y| y);
            assert!(e <= 2.0, "{isa:?}: exp {e} ULP");
            let e = worst(&twos, &over!(isa, twos, |s, x| exp2(s, x)), f64::exp2, |_, y| y);
            assert!(e <= 2.0, "{isa:?}: exp2 {e} ULP");
            let coarse = over!(isa, twos, |s, x| exp2_coarse(s, x));
            let e = twos
                .iter()
                .zip(coarse)
                .filter(|(x, _)| **x >= -125.0)
                .map(|(&x, y)| (f64::from(y) / f64::from(x).exp2() - 1.0).abs());
            let e = e.fold(0.0, f64::max);
            assert!(e <= 1e-4, "{isa:?}: exp2_coarse {e}");
            let ends = over!(isa, [f32::NEG_INFINITY, -1e30, -127.0, -126.5].repeat(4), |s, x| exp2(s, x));
            assert!(ends.iter().all(|&y| y == f32::MIN_POSITIVE), "{isa:?}: {ends:?}");
        }
    }

    #[test]
    fn activations_keep_their_bounds() {
        let xs = floats(-86.0, 500.0, 40_009);
        for isa in tiers() {
            let e = worst(&xs, &over!(isa, xs, |s, x| sigmoid(s, x)), reference::sigmoid, |_, y| y);
            assert!(e <= 4.0, "{isa:?}: sigmoid {e} ULP");
            for a in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu] {
                let want = |x| reference::activation(a, x);
                let (ys, bound) = match a {
                    Activation::Silu => (over!(isa, xs, |s, x| Activation::Silu.apply(s, x)), 4.0),
                    Activation::Gelu => (over!(isa, xs, |s, x| Activation::Gelu.apply(s, x)), 4.0),
                    Activation::GeluTanh => (over!(isa, xs, |s, x| Activation::GeluTanh.apply(s, x)), 4.0),
                    _ => (over!(isa, xs, |s, x| Activation::QuickGelu.apply(s, x)), 4.0),
                };
                let e = worst(&xs, &ys, want, |x, y| if a == Activation::Silu { y } else { x });
                assert!(e <= bound, "{isa:?}: {a:?} {e} ULP");
            }
            let coarse = over!(isa, xs, |s, x| silu_coarse(s, x));
            for (&x, y) in xs.iter().zip(coarse) {
                let want = reference::activation(Activation::Silu, f64::from(x));
                assert!(
                    (f64::from(y) - want).abs() <= 4e-4 * want.abs() + 1e-36,
                    "{isa:?}: {x}: {y} for {want}"
                );
            }
            let coarse = over!(isa, xs, |s, x| gelu_coarse(s, x));
            for (&x, y) in xs.iter().zip(coarse) {
                let want = reference::activation(Activation::Gelu, f64::from(x));
                assert!(
                    (f64::from(y) - want).abs() <= 3e-4 + 1e-4 * want.abs(),
                    "{isa:?}: {x}: {y} for {want}"
                );
            }
            // Far out every activation is 0 or x.
            for a in [f32::NEG_INFINITY, -1e30, -1e4] {
                let far = over!(isa, [a.max(-1e30); 16], |s, x| silu(s, x));
                assert!(far.iter().all(|y| y.abs() < 1e-7 * a.abs()), "{far:?}");
            }
        }
    }

    #[test]
    fn the_reference_agrees_with_tables() {
        for (x, want) in
            [(0.5, 0.479_500_122_186_953_5), (2.0, 4.677_734_981_047_266e-3), (4.0, 1.541_725_790_028_002e-8)]
        {
            assert!((reference::erfc(x) / want - 1.0).abs() < 1e-12, "erfc({x})");
        }
    }
}
