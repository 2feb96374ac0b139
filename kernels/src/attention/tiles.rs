//! The tile registers, and the two products that attention runs on them.
//!
//! There are no stable intrinsics for AMX, and tile registers may not live from one asm block to the next, so a block goes
//! from loaded sums to stored sums. Where two threads share a core each has few tile registers to rename to: a product
//! keeps as few alive as it can, and clears those it is done with.

use std::arch::asm;

use crate::arch::x86::amx::load_config;
use crate::bf16;

use super::powers::FRACTIONS;

/// Rows of a tile; also f32 numbers in one of its rows.
pub(super) const ROWS: usize = 16;
/// bf16 numbers in a row of a tile.
pub(super) const WIDTH: usize = 32;
/// bf16 numbers in a tile.
pub(super) const TILE: usize = ROWS * WIDTH;
/// f32 numbers in a tile of sums.
pub(super) const SUMS: usize = ROWS * ROWS;
/// The most columns of tiles that [`Tiles::weigh`] multiplies at a time.
pub(super) const COLUMNS: usize = 3;

/// The tile registers of this thread: 16 rows of 64 bytes each, given back when dropped.
pub(super) struct Tiles(());

/// The asm block of [`Tiles::weigh`] and [`Tiles::weigh_and_sum`] for a number of columns.
macro_rules! weigh {
    ($p:ident, $v:ident, $v_step:ident, $c:ident, $ones:ident, load: [$($load:literal)+], step: [$($step:literal)+],
     store: [$($store:literal)+]) => {
        asm!(
            "/* {ones} is for the sum */",
            $($load,)+
            "2:",
            "tileloadd tmm4, [{p} + {row}]",
            $($step,)+
            "add {p}, 1024",
            "add {v}, {v_step}",
            "dec {steps}",
            "jnz 2b",
            "tilezero tmm4",
            "tilezero tmm5",
            $($store,)+
            p = inout(reg) $p.as_ptr() => _,
            v = inout(reg) $v.as_ptr() => _,
            v_step = in(reg) $v_step * TILE * 2,
            steps = inout(reg) $p.len() / TILE => _,
            c = in(reg) $c.as_mut_ptr(),
            ones = in(reg) $ones.as_ptr(),
            row = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
            options(nostack),
        )
    };
}

/// [`powers`](super::powers::powers) of rows of 32 scores.
macro_rules! rows {
    ($($row:literal)+) => { concat!($(
        "vmulps zmm16, zmm23, [{e} + ", $row, " * 128]\n",
        "vmulps zmm17, zmm23, [{e} + ", $row, " * 128 + 64]\n",
        "vcvtps2dq zmm16, zmm16\n",
        "vcvtps2dq zmm17, zmm17\n",
        "vpackusdw zmm16, zmm16, zmm17\n",
        "vpmaxuw zmm22, zmm22, zmm16\n",
        "vmovdqa64 zmm17, zmm16\n",
        "vpermi2b zmm17, zmm18, zmm19\n",
        // fraction ? zmm17 : zmm16
        "vpternlogd zmm17, zmm16, zmm20, 0xe4\n",
        "vmovdqu64 [{to} + ", $row, " * 64], zmm17\n",
    )+) };
}

impl Tiles {
    /// Configures the tile registers.
    ///
    /// # Safety
    /// This process may use AMX, the machine has AVX-512 with VBMI, and nothing else uses the tile registers of this thread while
    /// the value lives.
    pub(super) unsafe fn new() -> Self {
        // SAFETY: AMX is there (the contract).
        unsafe { load_config([ROWS as u8; 8]) };
        Tiles(())
    }

    /// Scores of 16 queries, tiles `[d / 32]`, and 32 keys, tiles `[2][d / 32]`: `out = start + q k^T`, `[16][32]`. `start`
    /// is where the two tiles of sums begin, and the f32 numbers from one of their rows to the next.
    pub(super) fn scores(&self, q: &[bf16], k: &[bf16], start: (&[f32], &[f32], usize), out: &mut [f32]) {
        let steps = q.len() / TILE;
        assert!(steps > 0 && k.len() == 2 * steps * TILE, "{} of k for {} of q", k.len(), q.len());
        let (left, right, stride) = start;
        assert!(left.len().min(right.len()) >= (ROWS - 1) * stride + ROWS, "sums to start from");
        assert!(out.len() == 2 * SUMS, "{} scores", out.len());
        // SAFETY: `Tiles` proves AMX and its configuration; all tiles that are read and written lie in the slices (checked).
        unsafe {
            asm!(
                "tileloadd tmm0, [{left} + {stride}]",
                "tileloadd tmm1, [{right} + {stride}]",
                "2:",
                "tileloadd tmm4, [{q} + {row}]",
                "tileloadd tmm5, [{k0} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tileloadd tmm6, [{k1} + {row}]",
                "tdpbf16ps tmm1, tmm4, tmm6",
                "add {q}, 1024",
                "add {k0}, 1024",
                "add {k1}, 1024",
                "dec {steps}",
                "jnz 2b",
                "tilezero tmm4",
                "tilezero tmm5",
                "tilezero tmm6",
                "tilestored [{out} + 2 * {row}], tmm0",
                "tilezero tmm0",
                "tilestored [{out} + 2 * {row} + 64], tmm1",
                "tilezero tmm1",
                left = in(reg) left.as_ptr(),
                right = in(reg) right.as_ptr(),
                stride = in(reg) stride * 4,
                q = inout(reg) q.as_ptr() => _,
                k0 = inout(reg) k.as_ptr() => _,
                k1 = inout(reg) k.as_ptr().wrapping_add(steps * TILE) => _,
                steps = inout(reg) steps => _,
                out = in(reg) out.as_mut_ptr(),
                row = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                options(nostack),
            );
        }
    }

    /// Adds products of the tiles of `p`, weights of 16 queries, with tiles of values to the tiles of `c`, as many columns (up
    /// to [`COLUMNS`]) as it has: `c[column] += sum over the steps of p[step] * v[step * v_step + column]`.
    pub(super) fn weigh(&self, p: &[bf16], v: &[bf16], v_step: usize, c: &mut [f32]) {
        let (steps, columns) = (p.len() / TILE, c.len() / SUMS);
        assert!(steps > 0 && (1..=COLUMNS).contains(&columns), "{steps} steps of {columns} columns");
        assert!(v.len() >= ((steps - 1) * v_step + columns) * TILE, "tiles of values");
        // SAFETY: `Tiles` proves AMX and its configuration; all tiles that are read and written lie in the slices (checked).
        unsafe {
            match columns {
                1 => weigh!(p, v, v_step, c, p,
                    load: ["tileloadd tmm0, [{c} + {row}]"],
                    step: ["tileloadd tmm5, [{v} + {row}]" "tdpbf16ps tmm0, tmm4, tmm5"],
                    store: ["tilestored [{c} + {row}], tmm0" "tilezero tmm0"]),
                2 => weigh!(p, v, v_step, c, p,
                    load: ["tileloadd tmm0, [{c} + {row}]" "tileloadd tmm1, [{c} + {row} + 1024]"],
                    step: ["tileloadd tmm5, [{v} + {row}]" "tdpbf16ps tmm0, tmm4, tmm5"
                           "tileloadd tmm5, [{v} + {row} + 1024]" "tdpbf16ps tmm1, tmm4, tmm5"],
                    store: ["tilestored [{c} + {row}], tmm0" "tilezero tmm0"
                            "tilestored [{c} + {row} + 1024], tmm1" "tilezero tmm1"]),
                _ => weigh!(p, v, v_step, c, p,
                    load: ["tileloadd tmm0, [{c} + {row}]" "tileloadd tmm1, [{c} + {row} + 1024]"
                           "tileloadd tmm2, [{c} + {row} + 2048]"],
                    step: ["tileloadd tmm5, [{v} + {row}]" "tdpbf16ps tmm0, tmm4, tmm5"
                           "tileloadd tmm5, [{v} + {row} + 1024]" "tdpbf16ps tmm1, tmm4, tmm5"
                           "tileloadd tmm5, [{v} + {row} + 2048]" "tdpbf16ps tmm2, tmm4, tmm5"],
                    store: ["tilestored [{c} + {row}], tmm0" "tilezero tmm0"
                            "tilestored [{c} + {row} + 1024], tmm1" "tilezero tmm1"
                            "tilestored [{c} + {row} + 2048], tmm2" "tilezero tmm2"]),
            }
        }
    }
}

impl Tiles {
    /// Does [`Tiles::weigh`] for [`COLUMNS`] columns and [`powers`](super::powers::powers) of other scores, as many as `p`
    /// has weights, at the same time: vectors have nothing to do while tiles are multiplied, and are too far away to be
    /// reached out of order.
    pub(super) fn weigh_with_powers(
        &self,
        (p, v, v_step, c): (&[bf16], &[bf16], usize, &mut [f32]),
        (scores, factor, most, out): (&[f32], f32, u16, &mut [bf16]),
    ) -> bool {
        let steps = p.len() / TILE;
        assert!(steps > 0 && c.len() == COLUMNS * SUMS, "{steps} steps, {} sums", c.len());
        assert!(v.len() >= ((steps - 1) * v_step + COLUMNS) * TILE, "tiles of values");
        assert!(scores.len() == steps * TILE && out.len() == steps * TILE, "{} scores", scores.len());
        let mut above: u32;
        // SAFETY: `Tiles` proves AMX, its configuration, and AVX-512 with VBMI; all that is read and written lies in the
        // slices (checked).
        unsafe {
            asm!(
                "vmovdqu64 zmm18, [{table}]",
                "vmovdqu64 zmm19, [{table} + 64]",
                "vpbroadcastw zmm20, {fraction:e}",
                "vpbroadcastw zmm21, {above:e}",
                "vpxord zmm22, zmm22, zmm22",
                "vpbroadcastd zmm23, {factor:e}",
                "tileloadd tmm0, [{c} + {row}]",
                "tileloadd tmm1, [{c} + {row} + 1024]",
                "tileloadd tmm2, [{c} + {row} + 2048]",
                "2:",
                "tileloadd tmm4, [{p} + {row}]",
                rows!(0 1),
                "tileloadd tmm5, [{v} + {row}]",
                rows!(2 3),
                "tdpbf16ps tmm0, tmm4, tmm5",
                rows!(4 5),
                "tileloadd tmm5, [{v} + {row} + 1024]",
                rows!(6 7),
                "tdpbf16ps tmm1, tmm4, tmm5",
                rows!(8 9),
                "tileloadd tmm5, [{v} + {row} + 2048]",
                rows!(10 11 12 13),
                "tdpbf16ps tmm2, tmm4, tmm5",
                rows!(14 15),
                "add {p}, 1024",
                "add {v}, {v_step}",
                "add {e}, 2048",
                "add {to}, 1024",
                "dec {steps}",
                "jnz 2b",
                "tilezero tmm4",
                "tilezero tmm5",
                "tilestored [{c} + {row}], tmm0",
                "tilezero tmm0",
                "tilestored [{c} + {row} + 1024], tmm1",
                "tilezero tmm1",
                "tilestored [{c} + {row} + 2048], tmm2",
                "tilezero tmm2",
                "vpcmpuw k1, zmm22, zmm21, 6",
                "kmovd {above:e}, k1",
                p = inout(reg) p.as_ptr() => _,
                v = inout(reg) v.as_ptr() => _,
                v_step = in(reg) v_step * TILE * 2,
                steps = inout(reg) steps => _,
                c = in(reg) c.as_mut_ptr(),
                row = in(reg) 64usize,
                e = inout(reg) scores.as_ptr() => _,
                to = inout(reg) out.as_mut_ptr() => _,
                table = in(reg) FRACTIONS.as_ptr(),
                fraction = in(reg) 0x7fu32,
                factor = in(reg) factor.to_bits(),
                above = inout(reg) u32::from(most) => above,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm4") _, out("tmm5") _,
                out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
                out("zmm20") _, out("zmm21") _, out("zmm23") _, out("zmm22") _, out("k1") _,
                options(nostack),
            );
        }
        above == 0
    }

    /// Does [`Tiles::scores`] for heads of 2 tiles, which stay in registers, and as many pieces of 32 keys as `k` has.
    pub(super) fn scores_of_2(&self, q: &[bf16], k: &[bf16], start: &[f32], out: &mut [f32]) {
        let pieces = k.len() / (4 * TILE);
        assert!(
            pieces > 0 && q.len() == 2 * TILE && start.len() == SUMS,
            "{} of k, {} of q",
            k.len(),
            q.len()
        );
        assert!(out.len() == pieces * 2 * SUMS, "{} scores", out.len());
        // SAFETY: `Tiles` proves AMX and its configuration; all tiles that are read and written lie in the slices (checked).
        unsafe {
            asm!(
                "tileloadd tmm6, [{q} + {row}]",
                "tileloadd tmm7, [{q} + {row} + 1024]",
                "2:",
                "tileloadd tmm0, [{start} + {row}]",
                "tileloadd tmm1, [{start} + {row}]",
                "tileloadd tmm4, [{k} + {row}]",
                "tdpbf16ps tmm0, tmm6, tmm4",
                "tileloadd tmm5, [{k} + {row} + 2048]",
                "tdpbf16ps tmm1, tmm6, tmm5",
                "tileloadd tmm4, [{k} + {row} + 1024]",
                "tdpbf16ps tmm0, tmm7, tmm4",
                "tileloadd tmm5, [{k} + {row} + 3072]",
                "tdpbf16ps tmm1, tmm7, tmm5",
                "tilezero tmm4",
                "tilezero tmm5",
                "tilestored [{out} + 2 * {row}], tmm0",
                "tilezero tmm0",
                "tilestored [{out} + 2 * {row} + 64], tmm1",
                "tilezero tmm1",
                "add {k}, 4096",
                "add {out}, 2048",
                "dec {pieces}",
                "jnz 2b",
                "tilezero tmm6",
                "tilezero tmm7",
                q = in(reg) q.as_ptr(),
                k = inout(reg) k.as_ptr() => _,
                start = in(reg) start.as_ptr(),
                out = inout(reg) out.as_mut_ptr() => _,
                pieces = inout(reg) pieces => _,
                row = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Does [`Tiles::weigh`] for 1 or 2 columns, and adds up the weights in another: `c` has one tile of sums more.
    pub(super) fn weigh_and_sum(&self, p: &[bf16], v: &[bf16], v_step: usize, ones: &[bf16], c: &mut [f32]) {
        let (steps, columns) = (p.len() / TILE, c.len() / SUMS - 1);
        assert!(steps > 0 && (1..=2).contains(&columns), "{steps} steps of {columns} columns");
        assert!(v.len() >= ((steps - 1) * v_step + columns) * TILE, "tiles of values");
        assert_eq!(ones.len(), TILE, "a tile of ones");
        // SAFETY: `Tiles` proves AMX and its configuration; all tiles that are read and written lie in the slices (checked).
        unsafe {
            match columns {
                1 => weigh!(p, v, v_step, c, ones,
                    load: ["tileloadd tmm6, [{ones} + {row}]"
                           "tileloadd tmm0, [{c} + {row}]" "tileloadd tmm1, [{c} + {row} + 1024]"],
                    step: ["tileloadd tmm5, [{v} + {row}]" "tdpbf16ps tmm0, tmm4, tmm5"
                           "tdpbf16ps tmm1, tmm4, tmm6"],
                    store: ["tilestored [{c} + {row}], tmm0" "tilezero tmm0"
                            "tilestored [{c} + {row} + 1024], tmm1" "tilezero tmm1" "tilezero tmm6"]),
                _ => weigh!(p, v, v_step, c, ones,
                    load: ["tileloadd tmm6, [{ones} + {row}]"
                           "tileloadd tmm0, [{c} + {row}]" "tileloadd tmm1, [{c} + {row} + 1024]"
                           "tileloadd tmm2, [{c} + {row} + 2048]"],
                    step: ["tileloadd tmm5, [{v} + {row}]" "tdpbf16ps tmm0, tmm4, tmm5"
                           "tileloadd tmm5, [{v} + {row} + 1024]" "tdpbf16ps tmm1, tmm4, tmm5"
                           "tdpbf16ps tmm2, tmm4, tmm6"],
                    store: ["tilestored [{c} + {row}], tmm0" "tilezero tmm0"
                            "tilestored [{c} + {row} + 1024], tmm1" "tilezero tmm1"
                            "tilestored [{c} + {row} + 2048], tmm2" "tilezero tmm2" "tilezero tmm6"]),
            }
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the value proves AMX.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }
}
