//! Powers of two in bf16 straight from fixed-point exponents, 32 at a time.

use std::arch::x86_64::*;

use crate::bf16;

/// Units of an exponent: a power of two is a whole number of them, as many as a bf16's fraction has values.
pub(super) const UNIT: f32 = 128.0;

/// The exponent of 1.
pub(super) const ONE: f32 = 127.0 * UNIT;

/// Exponents in a vector.
const LANES: usize = 32;

/// Fractions of `2^(i / 128)`, to nearest.
pub(super) static FRACTIONS: [u8; 128] = fractions();

/// `round(128 * (2^(i / 128) - 1))`, from powers of the 128th root of 2.
const fn fractions() -> [u8; 128] {
    const ROOT: f64 = 1.005_429_900_842_559_4;
    let (mut table, mut i, mut power) = ([0; 128], 0, 1.0);
    while i < 128 {
        table[i] = (128.0 * (power - 1.0) + 0.5) as u8;
        power *= ROOT;
        i += 1;
    }
    table
}

/// Whether this machine has the instructions.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vbmi")
}

/// `2^((exponent - ONE) / UNIT)` of exponents `scores * factor`, every 32 in the order of [`place`]: 0 where an exponent is
/// below 0, otherwise within a relative error of 0.7 %, for exponents up to `most`. Returns whether all of them were.
///
/// # Panics
/// Where the instructions are not [`available`].
pub(super) fn powers(scores: &[f32], factor: f32, most: u16, out: &mut [bf16]) -> bool {
    #[target_feature(enable = "avx512bw,avx512vbmi")]
    fn powers(scores: &[f32], factor: f32, most: u16, out: &mut [bf16]) -> bool {
        // SAFETY: the table is two vectors long.
        let table = unsafe {
            let table = FRACTIONS.as_ptr().cast();
            [_mm512_loadu_si512(table), _mm512_loadu_si512(table.add(1))]
        };
        let (factor, fraction) = (_mm512_set1_ps(factor), _mm512_set1_epi16(0x7f));
        let mut highest = _mm512_setzero_si512();
        for (scores, out) in scores.as_chunks::<LANES>().0.iter().zip(out.as_chunks_mut::<LANES>().0) {
            // SAFETY: there are 32 numbers.
            let [a, b] = unsafe {
                [_mm512_loadu_ps(scores.as_ptr()), _mm512_loadu_ps(scores.as_ptr().add(LANES / 2))]
            };
            let (a, b) = (_mm512_mul_ps(a, factor), _mm512_mul_ps(b, factor));
            // Below 0 saturates to 0. The last 7 bits are an exponent's fraction, those before a bf16's exponent.
            let e = _mm512_packus_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
            highest = _mm512_max_epu16(highest, e);
            let fractions = _mm512_permutex2var_epi8(table[0], e, table[1]);
            // fraction ? fractions : e
            let power = _mm512_ternarylogic_epi32::<0xca>(fraction, fractions, e);
            // SAFETY: there is room for 32 numbers.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), power) }
        }
        _mm512_cmpgt_epu16_mask(highest, _mm512_set1_epi16(most as i16)) == 0
    }
    assert!(available(), "no AVX-512-VBMI here");
    assert!(
        scores.len() == out.len() && out.len().is_multiple_of(LANES),
        "{} of {}",
        out.len(),
        scores.len()
    );
    // SAFETY: the features were found.
    unsafe { powers(scores, factor, most, out) }
}

/// The exponent, of 32, whose power [`powers`] puts at `i`: neighbors from an even place on stay neighbors.
pub(super) const fn place(i: usize) -> usize {
    let (part, i) = (i / 8, i % 8);
    i / 4 * 16 + part * 4 + i % 4
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The greatest relative error is half a unit of the exponent, and half a unit of the fraction.
    const BOUND: f64 = 7e-3;

    #[test]
    fn powers_keep_their_bound() {
        if !available() {
            assert!(!crate::Isa::Amx.is_available(), "AMX without AVX-512-VBMI");
            return;
        }
        // Down to 2^-126, the least normal number, and up to 2^127.
        let exponents: Vec<f32> = (0..32 * 4063).map(|i| 128.0 + i as f32 * 0.25 - 0.013).collect();
        let scores: Vec<f32> = exponents.iter().map(|e| e / 8.0).collect();
        let mut out = vec![bf16::NAN; exponents.len()];
        assert!(powers(&scores, 8.0, u16::MAX, &mut out));
        for (exponents, out) in exponents.chunks(32).zip(out.chunks(32)) {
            for (i, p) in out.iter().enumerate() {
                let want = (f64::from(exponents[place(i)] - ONE) / f64::from(UNIT)).exp2();
                let e = (f64::from(p.to_f32()) / want - 1.0).abs();
                assert!(e <= BOUND, "{} -> {p}, not {want}", exponents[place(i)]);
            }
        }
    }

    #[test]
    fn powers_underflow_to_zero_and_report_the_rest() {
        if !available() {
            return;
        }
        let mut out = [bf16::NAN; 32];
        for low in [-0.6, -1.0, -128.0, -40_000.0, -1e9, -1e30, f32::NEG_INFINITY] {
            assert!(powers(&[low; 32], 1.0, 20_000, &mut out));
            assert_eq!(out, [bf16::ZERO; 32], "{low}");
        }
        for high in [20_001.0, 40_000.0, 1e6, 1e9] {
            let mut exponents = [ONE; 32];
            exponents[17] = high;
            assert!(!powers(&exponents, 1.0, 20_000, &mut out), "{high}");
        }
    }

    #[test]
    fn places_are_a_permutation_of_pairs() {
        let mut places: Vec<usize> = (0..32).map(place).collect();
        assert!(places.chunks(2).all(|pair| pair[0] % 2 == 0 && pair[1] == pair[0] + 1), "{places:?}");
        places.sort_unstable();
        assert!(places.into_iter().eq(0..32));
    }
}
