//! AMX: tiles of 16 rows by 64 bytes, multiplied by one instruction. There are no stable intrinsics, and tile registers
//! may not live from one asm block to the next, so a block goes from zeroed (or loaded) sums over the whole k to stored
//! sums: up to two row tiles by two panels, C in tmm0 to 3, A in tmm4 and 5, B in tmm6 and 7.
//!
//! An operand is zeroed after its last product. That gives its register back to the processor: while another thread of the core
//! is busy, renaming runs out with all eight registers alive, loads and products wait for each other, and a step takes 1.7 times
//! as long. At other times it costs nothing.
//!
//! A panel's tile is a B tile as it lies in memory, and 16 evenly spaced operand rows are an A tile.

use std::arch::asm;
use std::cell::Cell;
use std::mem::offset_of;

use super::avx512;
use crate::Isa;
use crate::gemm::table::{GemmKernel, Peak, Types};
use crate::gemm::tile::{MAX_TAPS, TILE_COLUMNS, TileArgs};

/// Rows of a tile register.
const ROWS: usize = 16;
/// Bytes of a row of a tile register, and of a step through k.
const ROW_BYTES: usize = 64;

/// Bytes from row to row of the sums.
const C_STRIDE: usize = TILE_COLUMNS * 4;

/// Bytes of a chunk's weights, which stay in L1 but for the longest rows: rows pass by it (the hint of `tileloaddt1`).
const PAIR_BYTES: usize = 40 * 1024;

/// Bytes of a block of rows: every core with AMX has an L2 of 2 MiB, and the weights are best read once.
const BLOCK_BYTES: usize = 1200 * 1024;

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row of each register.
    row_bytes: [u16; 16],
    /// Rows of each register.
    rows: [u8; 16],
}

thread_local! {
    /// Rows of the first and the second row tile that this thread has configured; none when the tiles are released.
    static CONFIGURED: Cell<[u8; 2]> = const { Cell::new([0; 2]) };
}

/// Makes the tile registers `rows` high, their rows 64 bytes long.
///
/// # Safety
/// AMX is available; no register is higher than 16 rows.
pub(crate) unsafe fn load_config(rows: [u8; 8]) {
    let mut config =
        TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    config.row_bytes[..8].fill(ROW_BYTES as u16);
    config.rows[..8].copy_from_slice(&rows);
    // SAFETY: AMX is there, and the configuration is one of palette 1 (the contract).
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _);
    }
}

/// Makes the row tiles `rows` high.
fn configure(rows: [u8; 2]) {
    if CONFIGURED.get() == rows {
        return;
    }
    // SAFETY: kernels run where AMX is available (the contract of tile functions).
    unsafe { load_config([rows[0], rows[0], rows[1], rows[1], rows[0], rows[1], 16, 16]) };
    CONFIGURED.set(rows);
}

/// Gives the tile registers back, so that the system need not save them.
fn release() {
    if CONFIGURED.get() != [0; 2] {
        // SAFETY: the tiles were configured by this thread, so AMX is there.
        unsafe {
            asm!("tilerelease", options(nostack, nomem),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _);
        }
        CONFIGURED.set([0; 2]);
    }
}

/// What an asm block keeps in memory, as it has more to know than there are registers.
#[repr(C)]
struct Block {
    /// Row 0 of the first tap.
    a: *const u8,
    /// Bytes from `a` to row 0 of each tap.
    tap_at: *const usize,
    taps: usize,
    /// Through the inputs of a tap.
    steps: usize,
    a_stride: usize,
    b: *const u8,
    b_stride: usize,
    b_tap: usize,
    c: *mut u8,
    accumulate: usize,
    claim_stride: usize,
    /// Rows to be claimed in a step.
    claims: usize,
}

/// An asm block: `zero` or `load` (sums), `step` through k of each tap, and `store` lines. Sums are at `{a0} + {a_stride}`, the
/// second row tile's at `+ 2048`. Lines of the output are claimed a few in each step: all at once, they would keep the tile's
/// loads waiting.
macro_rules! block {
    ($block:ident, $claim:ident, zero: [$($zero:literal)+], load: [$($load:literal)+], step: [$($step:expr),+ $(,)?],
     store: [$($store:literal)+]) => {
        asm!(
            "/* {a1} is for a second row tile, {b1} for a second panel */",
            "cmp qword ptr [{block} + {accumulate}], 0",
            "jne 2f",
            $($zero,)+
            "jmp 3f",
            "2:",
            "mov {a0}, [{block} + {c}]",
            "mov {a_stride}, {c_stride}",
            $($load,)+
            "3:",
            "mov {tap_at}, [{block} + {tap_at_at}]",
            "mov {a_stride}, [{block} + {a_stride_at}]",
            "4:",
            "mov {a0}, [{tap_at}]",
            "add {a0}, [{block} + {a_at}]",
            "mov {a1}, {a_stride}",
            "shl {a1}, 4",
            "add {a1}, {a0}",
            "mov {b0}, [{block} + {b_at}]",
            "mov {b1}, [{block} + {b_stride_at}]",
            "add {b1}, {b0}",
            "mov {steps}, [{block} + {steps_at}]",
            "test {steps}, {steps}",
            "jz 6f",
            "5:",
            $($step,)+
            "test {claim_rows}, {claim_rows}",
            "jz 8f",
            "mov {claims}, [{block} + {claims_at}]",
            "7:",
            "prefetchw [{claim}]",
            "prefetchw [{claim} + {claim_last}]",
            "add {claim}, [{block} + {claim_stride}]",
            "dec {claim_rows}",
            "jz 8f",
            "dec {claims}",
            "jnz 7b",
            "8:",
            "add {a0}, 64",
            "add {a1}, 64",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {steps}",
            "jnz 5b",
            "6:",
            "add {tap_at}, 8",
            "mov {b0}, [{block} + {b_tap_at}]",
            "add [{block} + {b_at}], {b0}",
            "dec qword ptr [{block} + {taps_at}]",
            "jnz 4b",
            "mov {a0}, [{block} + {c}]",
            "mov {a_stride}, {c_stride}",
            $($store,)+
            block = in(reg) &raw mut $block,
            accumulate = const offset_of!(Block, accumulate),
            c = const offset_of!(Block, c),
            taps_at = const offset_of!(Block, taps),
            a_at = const offset_of!(Block, a),
            tap_at_at = const offset_of!(Block, tap_at),
            b_at = const offset_of!(Block, b),
            a_stride_at = const offset_of!(Block, a_stride),
            b_stride_at = const offset_of!(Block, b_stride),
            b_tap_at = const offset_of!(Block, b_tap),
            steps_at = const offset_of!(Block, steps),
            c_stride = const C_STRIDE,
            claim_stride = const offset_of!(Block, claim_stride),
            claims_at = const offset_of!(Block, claims),
            b_row = in(reg) ROW_BYTES,
            claim = inout(reg) $claim.row => _,
            claim_rows = inout(reg) $claim.rows => _,
            claim_last = in(reg) $claim.last,
            claims = out(reg) _,
            tap_at = out(reg) _,
            a_stride = out(reg) _,
            a0 = out(reg) _,
            a1 = out(reg) _,
            b0 = out(reg) _,
            b1 = out(reg) _,
            steps = out(reg) _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// A tile function of `$op`: each step is 64 bytes of every row.
macro_rules! tile_function {
    ($name:ident, $op:literal, $bytes:literal) => {
        unsafe fn $name(t: &TileArgs) {
            let two = t.rows > ROWS;
            configure(if two { [16, (t.rows - ROWS) as u8] } else { [t.rows as u8; 2] });
            let mut block = Block {
                a: t.a,
                tap_at: t.tap_at,
                taps: t.taps,
                steps: t.k * $bytes / ROW_BYTES,
                a_stride: t.a_stride,
                b: t.b,
                b_stride: t.b_stride,
                b_tap: t.b_tap,
                c: t.c,
                accumulate: usize::from(t.accumulate),
                claim_stride: t.claim.stride,
                claims: t.claim.rows.div_ceil((t.taps * t.k * $bytes / ROW_BYTES).max(1)),
            };
            let claim = t.claim;
            // SAFETY: the caller vouches for AMX and for what the arguments describe. Registers are as high as the rows
            // they hold, so nothing else is read or written; a second row tile or panel is touched only where it exists.
            unsafe {
                match (two, t.panels) {
                    (true, 2) => block!(block, claim,
                        zero: ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"],
                        load: ["tileloadd tmm0, [{a0} + {a_stride}]" "tileloadd tmm1, [{a0} + {a_stride} + 64]"
                               "tileloadd tmm2, [{a0} + {a_stride} + 2048]"
                               "tileloadd tmm3, [{a0} + {a_stride} + 2112]"],
                        step: ["tileloadd tmm6, [{b0} + {b_row}]", "tileloaddt1 tmm4, [{a0} + {a_stride}]",
                               concat!($op, " tmm0, tmm4, tmm6"), "tileloadd tmm7, [{b1} + {b_row}]",
                               concat!($op, " tmm1, tmm4, tmm7"), "tilezero tmm4",
                               "tileloaddt1 tmm5, [{a1} + {a_stride}]",
                               concat!($op, " tmm2, tmm5, tmm6"), "tilezero tmm6",
                               concat!($op, " tmm3, tmm5, tmm7"), "tilezero tmm5", "tilezero tmm7"],
                        store: ["tilestored [{a0} + {a_stride}], tmm0" "tilestored [{a0} + {a_stride} + 64], tmm1"
                                "tilestored [{a0} + {a_stride} + 2048], tmm2"
                                "tilestored [{a0} + {a_stride} + 2112], tmm3"]),
                    (true, _) => block!(block, claim,
                        zero: ["tilezero tmm0" "tilezero tmm2"],
                        load: ["tileloadd tmm0, [{a0} + {a_stride}]" "tileloadd tmm2, [{a0} + {a_stride} + 2048]"],
                        step: ["tileloadd tmm6, [{b0} + {b_row}]", "tileloaddt1 tmm4, [{a0} + {a_stride}]",
                               concat!($op, " tmm0, tmm4, tmm6"), "tilezero tmm4",
                               "tileloaddt1 tmm5, [{a1} + {a_stride}]",
                               concat!($op, " tmm2, tmm5, tmm6"), "tilezero tmm5", "tilezero tmm6"],
                        store: ["tilestored [{a0} + {a_stride}], tmm0"
                                "tilestored [{a0} + {a_stride} + 2048], tmm2"]),
                    (false, 2) => block!(block, claim,
                        zero: ["tilezero tmm0" "tilezero tmm1"],
                        load: ["tileloadd tmm0, [{a0} + {a_stride}]" "tileloadd tmm1, [{a0} + {a_stride} + 64]"],
                        step: ["tileloaddt1 tmm4, [{a0} + {a_stride}]", "tileloadd tmm6, [{b0} + {b_row}]",
                               concat!($op, " tmm0, tmm4, tmm6"), "tilezero tmm6",
                               "tileloadd tmm7, [{b1} + {b_row}]",
                               concat!($op, " tmm1, tmm4, tmm7"), "tilezero tmm4", "tilezero tmm7"],
                        store: ["tilestored [{a0} + {a_stride}], tmm0" "tilestored [{a0} + {a_stride} + 64], tmm1"]),
                    (false, _) => block!(block, claim,
                        zero: ["tilezero tmm0"],
                        load: ["tileloadd tmm0, [{a0} + {a_stride}]"],
                        step: ["tileloaddt1 tmm4, [{a0} + {a_stride}]", "tileloadd tmm6, [{b0} + {b_row}]",
                               concat!($op, " tmm0, tmm4, tmm6"), "tilezero tmm4", "tilezero tmm6"],
                        store: ["tilestored [{a0} + {a_stride}], tmm0"]),
                }
            }
        }
    };
}

tile_function!(gemm_u8s8_32x32_amx, "tdpbusd", 1);
tile_function!(gemm_bf16_32x32_amx, "tdpbf16ps", 2);

/// A function that multiplies registers `rounds` times.
macro_rules! peak_function {
    ($name:ident, $op:literal) => {
        unsafe fn $name(rounds: usize) {
            configure([16; 2]);
            // Zeroed registers may be multiplied faster than loaded ones, whatever they hold.
            let tile = [0u8; ROWS * ROW_BYTES];
            // SAFETY: the caller vouches for AMX; the block reads a tile.
            unsafe {
                asm!(
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    "tileloadd tmm4, [{tile} + {stride}]", "tileloadd tmm5, [{tile} + {stride}]",
                    "tileloadd tmm6, [{tile} + {stride}]", "tileloadd tmm7, [{tile} + {stride}]",
                    "test {rounds}, {rounds}",
                    "jz 3f",
                    "2:",
                    concat!($op, " tmm0, tmm4, tmm6"),
                    concat!($op, " tmm1, tmm4, tmm7"),
                    concat!($op, " tmm2, tmm5, tmm6"),
                    concat!($op, " tmm3, tmm5, tmm7"),
                    "dec {rounds}",
                    "jnz 2b",
                    "3:",
                    rounds = inout(reg) rounds => _,
                    tile = in(reg) &tile,
                    stride = in(reg) ROW_BYTES,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, readonly),
                )
            }
            release();
        }
    };
}

peak_function!(peak_u8s8, "tdpbusd");
peak_function!(peak_bf16, "tdpbf16ps");

/// Operations of one round of a peak function on elements of `bytes`.
const fn peak_ops(bytes: usize) -> usize {
    2 * 4 * ROWS * 16 * ROW_BYTES / bytes
}

pub(crate) static GEMM_U8S8: GemmKernel = GemmKernel {
    name: "gemm_u8s8_32x32_amx",
    isa: Isa::Amx,
    types: Types::U8S8,
    mr: 2 * ROWS,
    nr: 32,
    kr: ROW_BYTES,
    pair_bytes: PAIR_BYTES,
    block_bytes: BLOCK_BYTES,
    tile: gemm_u8s8_32x32_amx,
    peak: Peak { run: peak_u8s8, ops: peak_ops(1) },
    steps: || &avx512::STEPS_BF16,
    taps: MAX_TAPS,
    claims: true,
    fetches: false,
    leave: release,
};

pub(crate) static GEMM_BF16: GemmKernel = GemmKernel {
    name: "gemm_bf16_32x32_amx",
    isa: Isa::Amx,
    types: Types::Bf16,
    mr: 2 * ROWS,
    nr: 32,
    kr: ROW_BYTES / 2,
    pair_bytes: PAIR_BYTES,
    block_bytes: BLOCK_BYTES,
    tile: gemm_bf16_32x32_amx,
    peak: Peak { run: peak_bf16, ops: peak_ops(2) },
    steps: || &avx512::STEPS_BF16,
    taps: MAX_TAPS,
    claims: true,
    fetches: false,
    leave: release,
};
