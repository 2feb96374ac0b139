//! Elementary functions in f64.
#![forbid(unsafe_code)]

use std::f64::consts::{PI, SQRT_2};

use crate::gemm::Activation;

/// `erfc(x) = 2 / sqrt(pi) * integral of e^(-t^2) from x on`: the Maclaurin series of erf up to 3, beyond it the continued
/// fraction (DLMF 7.6.1 and 7.9.1).
pub fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    if x < 3.0 {
        let (mut term, mut sum) = (x, x);
        for n in 1..100 {
            term *= -x * x / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        return 1.0 - 2.0 / PI.sqrt() * sum;
    }
    let fraction = (1..200).rev().fold(x, |f, n| x + n as f64 / 2.0 / f);
    (-x * x).exp() / PI.sqrt() / fraction
}

/// `1 / (1 + e^-x)`
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `x * Phi(x)`
pub fn gelu(x: f64) -> f64 {
    0.5 * x * erfc(-x / SQRT_2)
}

/// The definitions in [`Activation`]; for `Geglu` the gate's.
pub fn activation(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::None => x,
        Activation::Relu => x.max(0.0),
        Activation::Silu => x * sigmoid(x),
        Activation::Gelu | Activation::Geglu => gelu(x),
        Activation::GeluTanh => 0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x * x * x)).tanh()),
        Activation::QuickGelu => x * sigmoid(1.702 * x),
    }
}
