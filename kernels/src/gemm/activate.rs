//! Activation functions on one number, of additions, products and selections only, so that loops over them become vectors.
#![forbid(unsafe_code)]

/// e^x, relative error below 2e-7; 0 below -87.3, infinite above 88.7.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.3, 88.7);
    let power = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = power - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    // Taylor's series on |r| <= ln 2 / 2.
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    let n = (power.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    // In two factors, as 2^128 is no f32.
    let half = n >> 1;
    let two_to = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    p * two_to(half) * two_to(n - half)
}

#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

#[inline(always)]
pub(crate) fn quick_gelu(x: f32) -> f32 {
    x * sigmoid(1.702 * x)
}

#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    // 0.5 (1 + tanh u) = sigmoid(2 u)
    const C: f32 = 0.797_884_6;
    x * sigmoid(2.0 * C * (x + 0.044_715 * x * x * x))
}

/// `x * Phi(x)`; Phi by Abramowitz and Stegun's formula 7.1.26 (absolute error 1.5e-7).
#[inline(always)]
pub(crate) fn gelu(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let p = 1.061_405_4;
    let p = p * t - 1.453_152;
    let p = p * t + 1.421_413_7;
    let p = p * t - 0.284_496_74;
    let p = p * t + 0.254_829_6;
    let tail = 0.5 * p * t * exp(-z * z);
    x * if x < 0.0 { tail } else { 1.0 - tail }
}
