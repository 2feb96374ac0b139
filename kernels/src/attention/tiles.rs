//! The tile registers, and the two products that attention runs on them.
//!
//! There are no stable intrinsics for AMX, and tile registers may not live from one asm block to the next, so a block goes
//! from loaded sums to stored sums. Where two threads share a core each has few tile registers to rename to: a product
//! keeps as few alive as it can, and clears those it is done with.

use std::arch::asm;

use crate::bf16;

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

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The asm block of [`Tiles::weigh`] for a number of columns.
macro_rules! weigh {
    ($p:ident, $v:ident, $v_step:ident, $c:ident, load: [$($load:literal)+], step: [$($step:literal)+],
     store: [$($store:literal)+]) => {
        asm!(
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
            row = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm4") _, out("tmm5") _,
            options(nostack),
        )
    };
}

impl Tiles {
    /// Configures the tile registers.
    ///
    /// # Safety
    /// This process may use AMX, the machine has AVX-512, and nothing else uses the tile registers of this thread while
    /// the value lives.
    pub(super) unsafe fn new() -> Self {
        let mut config =
            TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(64);
        config.rows[..8].fill(16);
        // SAFETY: AMX is there (the contract), and this is a configuration of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) }
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
                1 => weigh!(p, v, v_step, c,
                    load: ["tileloadd tmm0, [{c} + {row}]"],
                    step: ["tileloadd tmm5, [{v} + {row}]" "tdpbf16ps tmm0, tmm4, tmm5"],
                    store: ["tilestored [{c} + {row}], tmm0" "tilezero tmm0"]),
                2 => weigh!(p, v, v_step, c,
                    load: ["tileloadd tmm0, [{c} + {row}]" "tileloadd tmm1, [{c} + {row} + 1024]"],
                    step: ["tileloadd tmm5, [{v} + {row}]" "tdpbf16ps tmm0, tmm4, tmm5"
                           "tileloadd tmm5, [{v} + {row} + 1024]" "tdpbf16ps tmm1, tmm4, tmm5"],
                    store: ["tilestored [{c} + {row}], tmm0" "tilezero tmm0"
                            "tilestored [{c} + {row} + 1024], tmm1" "tilezero tmm1"]),
                _ => weigh!(p, v, v_step, c,
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

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the value proves AMX.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }
}
