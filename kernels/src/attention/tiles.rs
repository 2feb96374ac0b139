//! The tile registers, and the one loop that attention runs on them.
//!
//! There are no stable intrinsics for AMX, and tile registers may not live from one asm block to the next, so a block goes
//! from zeroed or loaded sums to stored sums. Two tiles of K or V^T, which come from L2, meet two of queries or
//! exponentials, which are in L1. Vector instructions gain nothing from standing between the products: they share a port.

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
/// Columns of tiles that are multiplied at a time.
pub(super) const GROUPS: usize = 2;

/// What is multiplied. Distances are in tiles.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub(super) a: &'a [bf16],
    /// Rows of tiles of `a`: 1 or 2. Their sums lie one behind the other.
    pub(super) rows: usize,
    /// From one row of tiles of `a` to the next.
    pub(super) a_row: usize,
    /// From one step of `a` to the next.
    pub(super) a_step: usize,
    /// Steps are adjacent.
    pub(super) b: &'a [bf16],
    /// From one column of tiles of `b` to the next.
    pub(super) b_group: usize,
    pub(super) steps: usize,
    /// From one column of tiles of sums to the next.
    pub(super) c_group: usize,
    /// Whether to add to the sums, instead of writing them.
    pub(super) add: bool,
}

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

/// An asm block: `zero` or `load` (sums), `step` through the steps, and `store` lines.
macro_rules! block {
    ($o:ident, $c:ident, zero: [$($zero:literal)+], load: [$($load:literal)+], step: [$($step:literal)+],
     store: [$($store:literal)+]) => {
        asm!(
            "/* {a1} is for a second row of tiles */",
            "test {add}, {add}",
            "jnz 2f",
            $($zero,)+
            "jmp 4f",
            "2:",
            $($load,)+
            "4:",
            $($step,)+
            "add {a0}, {a_step}",
            "add {a1}, {a_step}",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {steps}",
            "jnz 4b",
            $($store,)+
            add = in(reg) usize::from($o.add),
            steps = inout(reg) $o.steps => _,
            a0 = inout(reg) $o.a.as_ptr() => _,
            a1 = inout(reg) $o.a.as_ptr().wrapping_add($o.a_row * TILE) => _,
            a_step = in(reg) $o.a_step * TILE * 2,
            b0 = inout(reg) $o.b.as_ptr() => _,
            b1 = inout(reg) $o.b.as_ptr().wrapping_add($o.b_group * TILE) => _,
            c0 = in(reg) $c.as_mut_ptr(),
            c1 = in(reg) $c.as_mut_ptr().wrapping_add($o.c_group * SUMS),
            row = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
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

    /// `c[r, g] (+)= sum over the steps of a[r, step] * b[g, step]` for `rows` rows (1 or 2) and [`GROUPS`] columns of tiles;
    /// `c` is tiles of f32.
    pub(super) fn multiply(&self, o: Operands<'_>, c: &mut [f32]) {
        assert!(o.steps > 0 && (1..=2).contains(&o.rows), "{} steps of {} rows", o.steps, o.rows);
        assert!(o.a.len() >= ((o.rows - 1) * o.a_row + (o.steps - 1) * o.a_step + 1) * TILE, "tiles of a");
        assert!(o.b.len() >= ((GROUPS - 1) * o.b_group + o.steps) * TILE, "tiles of b");
        assert!(c.len() >= ((GROUPS - 1) * o.c_group + o.rows) * SUMS, "tiles of sums");
        // SAFETY: `Tiles` proves AMX and its configuration; all tiles that are read and written lie in the slices (checked).
        unsafe {
            match o.rows {
                2 => block!(o, c,
                    zero: ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"],
                    load: ["tileloadd tmm0, [{c0} + {row}]" "tileloadd tmm1, [{c1} + {row}]"
                           "tileloadd tmm2, [{c0} + {row} + 1024]" "tileloadd tmm3, [{c1} + {row} + 1024]"],
                    step: ["tileloadd tmm4, [{a0} + {row}]" "tileloadd tmm5, [{b0} + {row}]"
                           "tdpbf16ps tmm0, tmm4, tmm5" "tileloadd tmm6, [{b1} + {row}]"
                           "tdpbf16ps tmm1, tmm4, tmm6" "tileloadd tmm7, [{a1} + {row}]"
                           "tdpbf16ps tmm2, tmm7, tmm5" "tdpbf16ps tmm3, tmm7, tmm6"],
                    store: ["tilestored [{c0} + {row}], tmm0" "tilestored [{c1} + {row}], tmm1"
                            "tilestored [{c0} + {row} + 1024], tmm2" "tilestored [{c1} + {row} + 1024], tmm3"]),
                _ => block!(o, c,
                    zero: ["tilezero tmm0" "tilezero tmm1"],
                    load: ["tileloadd tmm0, [{c0} + {row}]" "tileloadd tmm1, [{c1} + {row}]"],
                    step: ["tileloadd tmm4, [{a0} + {row}]" "tileloadd tmm5, [{b0} + {row}]"
                           "tdpbf16ps tmm0, tmm4, tmm5" "tileloadd tmm6, [{b1} + {row}]"
                           "tdpbf16ps tmm1, tmm4, tmm6"],
                    store: ["tilestored [{c0} + {row}], tmm0" "tilestored [{c1} + {row}], tmm1"]),
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
