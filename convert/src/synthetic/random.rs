//! Random weights that keep a network finite.
#![forbid(unsafe_code)]

use engine::graph::weight::Role;

use super::Tensor;

/// Values of any tensor, the same for the same seed and name: matrices with variance `1 / inputs`, so that activations
/// keep their size; norms near one, biases near zero; what is added to the residual stream smaller.
pub fn random(seed: u64) -> impl Fn(&Tensor) -> Vec<f32> {
    move |tensor| {
        let mut state = tensor.name.bytes().fold(seed ^ 0xCBF2_9CE4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
        });
        let inputs = tensor.shape.iter().skip(1).product::<usize>().max(1) as f32;
        let (mean, deviation) = match tensor.role {
            Role::Vector if tensor.name.ends_with("weight") => (1.0, 0.1),
            Role::Vector => (0.0, 0.02),
            Role::Table => (0.0, 0.02),
            Role::AttentionOut | Role::MlpOut | Role::Projection => (0.0, 0.5 / inputs.sqrt()),
            Role::Conv if tensor.name.ends_with("conv2.weight") => (0.0, 0.5 / inputs.sqrt()),
            _ => (0.0, 1.0 / inputs.sqrt()),
        };
        (0..tensor.count()).map(|_| mean + deviation * normal(&mut state)).collect()
    }
}

/// Nearly normal with variance 1 (the sum of four uniform numbers), from one step of SplitMix64.
fn normal(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    let sum: u64 = (0..4).map(|i| z >> (16 * i) & 0xFFFF).sum();
    // Four numbers up to 65535: mean 131070, variance 4 * (65536^2 - 1) / 12.
    (sum as f32 - 131_070.0) * (1.0 / 37_837.227)
}
