//! The step of attention in 8-bit scores on AMX: three blocks of 64 keys are under way at a time, so that no part of it waits for
//! another. The block before is multiplied with its values, this one's products become powers, and the next one's queries
//! and keys are multiplied, in one block of asm, whose instructions a processor can run side by side as far as it can
//! look ahead.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::bf16;

use super::powers::{FRACTIONS, available};
use super::tiles::{COLUMNS, ROWS, SUMS, TILE, Tiles, WIDTH};

/// Keys of a step.
pub(super) const KEYS: usize = 2 * WIDTH;
/// Bytes of a tile.
pub(super) const TILE_BYTES: usize = 2 * TILE;
/// Products of 16 queries and the keys of a step.
pub(super) const PRODUCTS: usize = ROWS * KEYS;

/// What makes exponents of the products of 16 queries: `product * factor + offset`.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Exponents {
    pub(super) factor: [f32; ROWS],
    pub(super) offset: [f32; ROWS],
}

/// Weights `[2]` tiles, values `[2][v_step]` tiles of which the first [`COLUMNS`] count, and as many tiles of sums.
pub(super) struct Weigh<'a> {
    pub(super) p: &'a [bf16],
    pub(super) v: &'a [bf16],
    pub(super) v_step: usize,
    pub(super) sums: &'a mut [f32],
}

/// Products `[2][16][32]`, and where their powers go, `[2]` tiles.
pub(super) struct Raise<'a> {
    pub(super) products: &'a [i32],
    pub(super) exponents: &'a Exponents,
    pub(super) out: &'a mut [bf16],
}

/// Queries, `[n]` tiles, keys, `[4][n]` tiles, and where their products go, `[2][16][32]`.
pub(super) struct Multiply<'a> {
    pub(super) q: &'a [u8],
    pub(super) k: &'a [u8],
    pub(super) out: &'a mut [i32],
}

/// Powers of rows of products of piece `$piece`, as in [`powers`].
macro_rules! rows {
    ($piece:literal: $($row:literal)+) => { concat!($(
        "vbroadcastss zmm24, [{f} + 4 * ", $row, "]\n",
        "vcvtdq2ps zmm16, [{e} + 2048 * ", $piece, " + 128 * ", $row, "]\n",
        "vcvtdq2ps zmm17, [{e} + 2048 * ", $piece, " + 128 * ", $row, " + 64]\n",
        "vfmadd213ps zmm16, zmm24, dword ptr [{f} + 64 + 4 * ", $row, "]{{1to16}}\n",
        "vfmadd213ps zmm17, zmm24, dword ptr [{f} + 64 + 4 * ", $row, "]{{1to16}}\n",
        "vcvtps2dq zmm16, zmm16\n",
        "vcvtps2dq zmm17, zmm17\n",
        "vpackusdw zmm16, zmm16, zmm17\n",
        "vpmaxuw zmm22, zmm22, zmm16\n",
        "vmovdqa64 zmm17, zmm16\n",
        "vpermi2b zmm17, zmm18, zmm19\n",
        // fraction ? zmm17 : zmm16
        "vpternlogd zmm17, zmm16, zmm20, 0xe4\n",
        "vmovdqu64 [{to} + 1024 * ", $piece, " + 64 * ", $row, "], zmm17\n",
    )+) };
}

/// The weights of piece `$piece` by a column of its values.
macro_rules! weigh {
    ($column:literal) => {
        concat!(
            "tileloadd tmm5, [{v} + {row} + 1024 * ",
            $column,
            "]\n",
            "tdpbf16ps tmm",
            $column,
            ", tmm3, tmm5\n",
            "tilezero tmm5\n"
        )
    };
}

/// The products of a tile of keys.
macro_rules! multiply {
    ($sums:literal, $tile:literal, [$($q:literal)*]) => {
        concat!(
            "tilezero tmm", $sums, "\n",
            "tileloadd tmm5, [{k} + {row}]\n",
            "tdpbssd tmm", $sums, ", tmm6, tmm5\n",
            $(
            "tileloadd tmm5, [{k} + {row} + 1024 * ", $q, "]\n",
            "tileloadd tmm3, [{q} + {row} + 1024 * ", $q, "]\n",
            "tdpbssd tmm", $sums, ", tmm3, tmm5\n",
            "tilezero tmm3\n",
            )*
            "tilezero tmm5\n",
            "add {k}, {k_step}\n",
        )
    };
}

/// The asm block for a number of tiles of queries, of which those but the first are listed.
macro_rules! step {
    ($weigh:ident, $raise:ident, $multiply:ident, $q:tt) => {{
        let above: u64;
        asm!(
            "vmovdqu64 zmm18, [{table}]",
            "vmovdqu64 zmm19, [{table} + 64]",
            "vpternlogd zmm20, zmm20, zmm20, 0xff",
            "vpsrlw zmm20, zmm20, 9",
            "vpxord zmm22, zmm22, zmm22",
            "tileloadd tmm3, [{p} + {row}]",
            "tileloadd tmm0, [{c} + {row}]",
            weigh!(0),
            rows!(0: 0 1 2),
            "tileloadd tmm1, [{c} + {row} + 1024]",
            weigh!(1),
            rows!(0: 3 4 5),
            "tileloadd tmm2, [{c} + {row} + 2048]",
            weigh!(2),
            rows!(0: 6 7 8),
            "tileloadd tmm3, [{p} + {row} + 1024]",
            "add {v}, {v_step}",
            weigh!(0),
            rows!(0: 9 10 11),
            weigh!(1),
            rows!(0: 12 13 14),
            weigh!(2),
            "tilezero tmm3",
            rows!(0: 15),
            rows!(1: 0 1),
            "tileloadd tmm6, [{q} + {row}]",
            multiply!(4, 0, $q),
            "tilestored [{c} + {row}], tmm0",
            "tilezero tmm0",
            rows!(1: 2 3 4),
            multiply!(7, 1, $q),
            "tilestored [{c} + {row} + 1024], tmm1",
            "tilezero tmm1",
            "tilestored [{n} + 2 * {row}], tmm4",
            rows!(1: 5 6 7),
            multiply!(4, 2, $q),
            "tilestored [{c} + {row} + 2048], tmm2",
            "tilezero tmm2",
            "tilestored [{n} + 2 * {row} + 64], tmm7",
            rows!(1: 8 9 10 11),
            multiply!(7, 3, $q),
            "tilezero tmm6",
            "tilestored [{n} + 2 * {row} + 2048], tmm4",
            "tilezero tmm4",
            rows!(1: 12 13 14 15),
            "tilestored [{n} + 2 * {row} + 2048 + 64], tmm7",
            "tilezero tmm7",
            "mov {table:e}, {most}",
            "vpbroadcastw zmm21, {table:e}",
            "vpcmpuw k1, zmm22, zmm21, 6",
            "kmovd {table:e}, k1",
            p = in(reg) $weigh.p.as_ptr(),
            v = inout(reg) $weigh.v.as_ptr() => _,
            v_step = in(reg) $weigh.v_step * TILE_BYTES,
            c = in(reg) $weigh.sums.as_mut_ptr(),
            e = in(reg) $raise.products.as_ptr(),
            f = in(reg) $raise.exponents,
            to = in(reg) $raise.out.as_mut_ptr(),
            q = in(reg) $multiply.q.as_ptr(),
            k = inout(reg) $multiply.k.as_ptr() => _,
            n = in(reg) $multiply.out.as_mut_ptr(),
            row = in(reg) 64usize,
            table = inout(reg) FRACTIONS.as_ptr() => above,
            k_step = const 1024 * step!(@count $q),
            most = const MOST,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _, out("zmm20") _,
            out("zmm21") _, out("zmm22") _, out("zmm24") _, out("k1") _,
            options(nostack),
        );
        above as u32 == 0
    }};
    (@count [$($q:literal)*]) => { 1 $(+ { let _ = $q; 1 })* };
}

/// The greatest exponent that powers are made of unnoticed.
pub(super) const MOST: u16 = ((127.0 + 40.0) * super::powers::UNIT) as u16;

impl Tiles {
    /// `weigh.sums += weigh.p * weigh.v`, `raise.out = ` [`powers`] of `raise.products`, and `multiply.out = q * k`. Returns
    /// whether all exponents were up to [`MOST`].
    pub(super) fn step(&self, weigh: Weigh<'_>, raise: Raise<'_>, multiply: Multiply<'_>) -> bool {
        let n = multiply.q.len() / TILE_BYTES;
        assert!(weigh.p.len() == 2 * TILE && weigh.sums.len() == COLUMNS * SUMS, "weights and sums");
        assert!(
            weigh.v_step >= COLUMNS && weigh.v.len() >= (weigh.v_step + COLUMNS) * TILE,
            "tiles of values"
        );
        assert!(raise.products.len() == PRODUCTS && raise.out.len() == 2 * TILE, "products");
        assert!(multiply.q.len() == n * TILE_BYTES && multiply.k.len() == 4 * n * TILE_BYTES, "{n} tiles");
        assert!(multiply.out.len() == PRODUCTS, "{} products", multiply.out.len());
        // SAFETY: `Tiles` proves AMX, its configuration, and AVX-512 with VBMI; all that is read and written lies in the
        // slices (checked).
        unsafe {
            match n {
                1 => step!(weigh, raise, multiply, []),
                2 => step!(weigh, raise, multiply, [1]),
                _ => panic!("{n} tiles of queries"),
            }
        }
    }
}

/// Powers of products as [`super::powers::powers`] makes them of scores, of exponents that are up to [`MOST`].
///
/// # Panics
/// Where the instructions are not available.
pub(super) fn powers(raise: Raise<'_>) {
    #[target_feature(enable = "avx512bw,avx512vbmi")]
    fn powers(raise: Raise<'_>) {
        // SAFETY: the table is two vectors long.
        let table = unsafe {
            let table = FRACTIONS.as_ptr().cast();
            [_mm512_loadu_si512(table), _mm512_loadu_si512(table.add(1))]
        };
        let Exponents { factor, offset } = raise.exponents;
        let rows = raise.products.as_chunks::<WIDTH>().0.iter().zip(raise.out.as_chunks_mut::<WIDTH>().0);
        for (i, (products, out)) in rows.enumerate() {
            let factor = _mm512_set1_ps(factor[i % ROWS]);
            let offset = _mm512_set1_ps(offset[i % ROWS]);
            // SAFETY: there are 32 numbers.
            let [a, b] = unsafe {
                let products = products.as_ptr().cast();
                [_mm512_loadu_si512(products), _mm512_loadu_si512(products.add(1))]
            };
            let exponent = |x| _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_cvtepi32_ps(x), factor, offset));
            let e = _mm512_packus_epi32(exponent(a), exponent(b));
            let fractions = _mm512_permutex2var_epi8(table[0], e, table[1]);
            // fraction ? fractions : e
            let power = _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi16(0x7f), fractions, e);
            // SAFETY: there is room for 32 numbers.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), power) }
        }
    }
    assert!(available(), "no AVX-512-VBMI here");
    assert!(raise.products.len() == PRODUCTS && raise.out.len() == 2 * TILE, "products");
    // SAFETY: the features were found.
    unsafe { powers(raise) }
}
