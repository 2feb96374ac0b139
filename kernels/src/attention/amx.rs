//! Attention in bf16 products on AMX tiles. As everywhere, lanes are queries: scores are computed transposed, K q^T, so
//! that a tile of K (16 keys by 32 columns) is an A operand as it lies, and the exponentials of two keys, rounded and
//! interleaved, are rows of a B operand for V^T.

use std::arch::asm;

use bytemuck::cast_slice_mut;

use crate::bf16;
use crate::math;
use crate::simd::{Element, MAX_LANES, Simd, SimdOp};
use crate::view::Rows;

use super::head::{KvHead, QueryHead, Write, load_square};
use super::softmax::Softmax;
use super::{AttentionShape, KEYS};

/// Rows of a tile; also queries in a column of tiles.
const ROWS: usize = 16;
/// bf16 numbers in a row of a tile.
const WIDTH: usize = 32;
/// bf16 numbers in a tile.
const TILE: usize = ROWS * WIDTH;
/// f32 numbers in a tile of sums.
const SUMS: usize = ROWS * ROWS;
/// Columns of tiles in a block of queries.
const GROUPS: usize = 2;
/// Queries in a block.
pub(super) const QUERIES: usize = GROUPS * ROWS;

/// Tiles of K along a head's columns.
const fn k_tiles(d: usize) -> usize {
    d.div_ceil(WIDTH)
}

/// Tiles of V^T along a head's columns.
const fn v_tiles(d: usize) -> usize {
    d.div_ceil(ROWS)
}

/// bf16 numbers that pack K: tiles `[keys / 16][d / 32]`, keys padded to 32.
pub(super) const fn k_elements(keys: usize, d: usize) -> usize {
    keys.next_multiple_of(WIDTH) / ROWS * k_tiles(d) * TILE
}

/// bf16 numbers that pack V^T: tiles `[keys / 32][d / 16]`.
pub(super) const fn v_elements(keys: usize, d: usize) -> usize {
    keys.div_ceil(WIDTH) * v_tiles(d) * TILE
}

/// Packs keys and values from `first` on: as many as `k` and `v` have room for.
pub(super) struct Pack<'a> {
    pub(super) head: KvHead<'a>,
    pub(super) first: usize,
    /// Tiles from key `first` on.
    pub(super) k: &'a mut [bf16],
    /// Tiles from key `first` on.
    pub(super) v: &'a mut [bf16],
}

impl SimdOp for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.head.k {
            Rows::F32(k) => pack_k(s, &self.head, k, self.first, self.k),
            Rows::Bf16(k) => pack_k(s, &self.head, k, self.first, self.k),
        }
        match self.head.v {
            Rows::F32(v) => pack_v(s, &self.head, v, self.first, self.v),
            Rows::Bf16(v) => pack_v(s, &self.head, v, self.first, self.v),
        }
    }
}

#[inline(always)]
fn pack_k<S: Simd, T: Element>(s: S, head: &KvHead<'_>, k: &[T], first: usize, out: &mut [bf16]) {
    let (d, tiles) = (head.d, k_tiles(head.d));
    for (i, tiles) in out.chunks_exact_mut(tiles * TILE).enumerate() {
        for (row, key) in (first + i * ROWS..).take(ROWS).enumerate() {
            for c in (0..tiles.len() / ROWS).step_by(S::LANES) {
                let at = c / WIDTH * TILE + row * WIDTH + c % WIDTH;
                let columns = if key < head.nk { S::LANES.min(d.saturating_sub(c)) } else { 0 };
                let x = if columns == S::LANES {
                    T::load(s, &k[head.at(key) + c..])
                } else if columns > 0 {
                    T::load_partial(s, &k[head.at(key) + c..][..columns])
                } else {
                    s.splat(0.0)
                };
                s.store_bf16(x, &mut tiles[at..]);
            }
        }
    }
}

#[inline(always)]
fn pack_v<S: Simd, T: Element>(s: S, head: &KvHead<'_>, v: &[T], first: usize, out: &mut [bf16]) {
    let (d, tiles) = (head.d, v_tiles(head.d));
    for (i, tiles) in out.chunks_exact_mut(tiles * TILE).enumerate() {
        for key in (0..WIDTH).step_by(S::LANES) {
            let from = first + i * WIDTH + key;
            let rows = S::LANES.min(head.nk.saturating_sub(from));
            for c in (0..tiles.len() / WIDTH).step_by(S::LANES) {
                let columns = S::LANES.min(d.saturating_sub(c));
                let square = if rows > 0 && columns > 0 {
                    load_square(s, &v[head.at(from) + c..], head.stride, rows, columns)
                } else {
                    [s.splat(0.0); MAX_LANES]
                };
                for (j, &keys) in square[..S::LANES].iter().enumerate() {
                    s.store_bf16(keys, &mut tiles[(c + j) * WIDTH + key..]);
                }
            }
        }
    }
}

/// Attention of one block of queries over all keys of a packed head.
pub(super) struct Block<'a, W> {
    pub(super) head: QueryHead<'a>,
    /// The block's first query.
    pub(super) first: usize,
    pub(super) k: &'a [bf16],
    pub(super) v: &'a [bf16],
    pub(super) scratch: &'a mut [u8],
    pub(super) out: W,
    /// The tile registers.
    pub(super) tiles: &'a Tiles,
}

/// Bytes of scratch memory that a [`Block`] wants.
pub(super) const fn scratch_bytes(d: usize) -> usize {
    let narrow = GROUPS * (k_tiles(d) + KEYS / WIDTH) * TILE;
    let wide = QUERIES * (KEYS + v_tiles(d) * ROWS + 2);
    2 * narrow + 4 * wide
}

impl<W: Write> SimdOp for Block<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        assert_eq!(S::LANES, ROWS, "AMX goes with vectors of 16");
        let AttentionShape { nq, nk, d, .. } = self.head.shape;
        let (kt, vt) = (k_tiles(d), v_tiles(d));
        let (q, rest) = self.scratch.split_at_mut(2 * GROUPS * kt * TILE);
        let (p, rest) = rest.split_at_mut(2 * GROUPS * (KEYS / WIDTH) * TILE);
        let (scores, rest) = rest.split_at_mut(4 * GROUPS * KEYS * ROWS);
        let (acc, rest) = rest.split_at_mut(4 * GROUPS * vt * SUMS);
        let (most, rest) = rest.split_at_mut(4 * QUERIES);
        let q: &mut [bf16] = cast_slice_mut(q); // [groups][d / 32] tiles
        let p: &mut [bf16] = cast_slice_mut(p); // [groups][KEYS / 32] tiles
        let scores: &mut [f32] = cast_slice_mut(scores); // [groups][KEYS][16]
        let acc: &mut [f32] = cast_slice_mut(acc); // [groups][d padded to 16][16]
        let most: &mut [f32] = cast_slice_mut(most);
        let sum: &mut [f32] = cast_slice_mut(&mut rest[..4 * QUERIES]);

        for g in 0..GROUPS {
            pack_q(s, &self.head, self.first + g * ROWS, &mut q[g * kt * TILE..(g + 1) * kt * TILE]);
        }
        Softmax::new(most, sum, acc, ROWS);
        for first in (0..self.head.keys_seen(self.first, QUERIES)).step_by(KEYS) {
            let keys = KEYS.min(nk - first);
            let steps = keys.div_ceil(WIDTH);
            let k = &self.k[first / ROWS * kt * TILE..];
            for i in (0..2 * steps).step_by(2) {
                let operands = Operands {
                    a: &k[i * kt * TILE..],
                    a_row: kt,
                    a_step: 1,
                    b: q,
                    b_group: kt,
                    steps: kt,
                    c_group: KEYS / ROWS,
                };
                self.tiles.multiply::<2>(operands, &mut scores[i * SUMS..], false);
            }
            for g in 0..GROUPS {
                let scores = &mut scores[g * KEYS * ROWS..][..keys * ROWS];
                let p = &mut p[g * (KEYS / WIDTH) * TILE..][..steps * TILE];
                let factor = self.head.mask(s, scores, ROWS, self.first + g * ROWS, first);
                let mut softmax = Softmax {
                    most: &mut most[g * ROWS..(g + 1) * ROWS],
                    sum: &mut sum[g * ROWS..(g + 1) * ROWS],
                    acc: &mut acc[g * vt * SUMS..(g + 1) * vt * SUMS],
                    n: ROWS,
                };
                softmax.raise(s, scores, factor, 0);
                exponentials(s, &mut softmax, scores, factor, p);
            }
            let v = &self.v[first / WIDTH * vt * TILE..];
            let mut i = 0;
            while i < vt {
                let operands = Operands {
                    a: &v[i * TILE..],
                    a_row: 1,
                    a_step: vt,
                    b: p,
                    b_group: KEYS / WIDTH,
                    steps,
                    c_group: vt,
                };
                let acc = &mut acc[i * SUMS..];
                match vt - i {
                    1 => self.tiles.multiply::<1>(operands, acc, true),
                    2 | 4 => self.tiles.multiply::<2>(operands, acc, true),
                    _ => self.tiles.multiply::<3>(operands, acc, true),
                }
                i += match vt - i {
                    1 => 1,
                    2 | 4 => 2,
                    _ => 3,
                };
            }
        }
        for g in (0..GROUPS).take_while(|g| self.first + g * ROWS < nq) {
            let (acc, sum) = (&acc[g * vt * SUMS..(g + 1) * vt * SUMS], &sum[g * ROWS..(g + 1) * ROWS]);
            self.head.finish(s, self.first + g * ROWS, ROWS, acc, sum, &mut self.out);
        }
    }
}

/// Packs 16 queries from `first` on as B tiles: pairs of columns by queries.
#[inline(always)]
fn pack_q<S: Simd>(s: S, head: &QueryHead<'_>, first: usize, out: &mut [bf16]) {
    for c in (0..out.len() / ROWS).step_by(S::LANES) {
        let columns = head.columns(s, first, c);
        for (pair, out) in columns[..S::LANES].chunks_exact(2).zip(out[c * ROWS..].chunks_exact_mut(WIDTH)) {
            s.store_bf16_pairs(pair[0], pair[1], out);
        }
    }
}

/// Exponentials of scores `[keys, 16]` as B tiles, keys in pairs, zeros behind the last.
#[inline(always)]
fn exponentials<S: Simd>(s: S, softmax: &mut Softmax<'_>, scores: &[f32], factor: f32, p: &mut [bf16]) {
    let (factor, minus) = (s.splat(factor), s.sub(s.splat(0.0), s.load(softmax.most)));
    let mut sums = [s.load(softmax.sum), s.splat(0.0)];
    let mut pairs = scores.chunks_exact(2 * ROWS);
    let mut rows = p.chunks_exact_mut(WIDTH);
    for (pair, out) in (&mut pairs).zip(&mut rows) {
        let a = math::exp2_coarse(s, s.fma(s.load(pair), factor, minus));
        let b = math::exp2_coarse(s, s.fma(s.load(&pair[ROWS..]), factor, minus));
        sums = [s.add(sums[0], a), s.add(sums[1], b)];
        s.store_bf16_pairs(a, b, out);
    }
    let odd = pairs.remainder();
    if !odd.is_empty() {
        let a = math::exp2_coarse(s, s.fma(s.load(odd), factor, minus));
        sums[0] = s.add(sums[0], a);
        s.store_bf16_pairs(a, s.splat(0.0), rows.next().expect("a row for each pair"));
    }
    rows.for_each(|row| row.fill(bf16::ZERO));
    s.store(s.add(sums[0], sums[1]), softmax.sum);
}

/// What [`Tiles::multiply`] multiplies. Distances are in tiles.
#[derive(Clone, Copy)]
struct Operands<'a> {
    a: &'a [bf16],
    /// From one row of tiles of `a` to the next.
    a_row: usize,
    /// From one step of `a` to the next.
    a_step: usize,
    /// Steps are adjacent.
    b: &'a [bf16],
    /// From one column of tiles of `b` to the next.
    b_group: usize,
    steps: usize,
    /// From one column of tiles of sums to the next.
    c_group: usize,
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

/// A block of asm that multiplies, from zeroed or loaded sums to stored sums.
macro_rules! multiply {
    ($o:ident, $c:ident, $add:ident, zero: [$($zero:literal)+], load: [$($load:literal)+], step: [$($step:literal)+],
     store: [$($store:literal)+]) => {
        asm!(
            "/* {a1} {a2} */",
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
            "add {a2}, {a_step}",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {steps}",
            "jnz 4b",
            $($store,)+
            add = in(reg) usize::from($add),
            steps = inout(reg) $o.steps => _,
            a0 = inout(reg) $o.a.as_ptr() => _,
            a1 = inout(reg) $o.a.as_ptr().wrapping_add($o.a_row * TILE) => _,
            a2 = inout(reg) $o.a.as_ptr().wrapping_add(2 * $o.a_row * TILE) => _,
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
    /// This process may use AMX, and nothing else uses the tile registers of this thread while the value lives.
    pub(super) unsafe fn new() -> Self {
        let mut config =
            TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(64);
        config.rows[..8].fill(16);
        // SAFETY: AMX is there (the contract), and this is a configuration of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) }
        Tiles(())
    }

    /// `c[i, g] (+)= sum over the steps of a[i, step] * b[step, g]` for `M` rows and [`GROUPS`] columns of tiles; `c` is
    /// `[groups][rows]` tiles of f32.
    #[inline(always)]
    fn multiply<const M: usize>(&self, o: Operands<'_>, c: &mut [f32], add: bool) {
        assert!(o.steps > 0 && M >= 1 && M <= 3);
        assert!(o.a.len() >= ((M - 1) * o.a_row + (o.steps - 1) * o.a_step + 1) * TILE, "tiles of a");
        assert!(o.b.len() >= ((GROUPS - 1) * o.b_group + o.steps) * TILE, "tiles of b");
        assert!(c.len() >= ((GROUPS - 1) * o.c_group + M) * SUMS, "tiles of sums");
        // SAFETY: `Tiles` proves AMX and the configuration; all tiles that are read and written lie in the slices (checked),
        // and a row beyond `M` isn't touched.
        unsafe {
            match M {
                1 => multiply!(o, c, add,
                    zero: ["tilezero tmm0" "tilezero tmm1"],
                    load: ["tileloadd tmm0, [{c0} + {row}]" "tileloadd tmm1, [{c1} + {row}]"],
                    step: ["tileloadd tmm6, [{a0} + {row}]" "tileloadd tmm7, [{b0} + {row}]"
                           "tdpbf16ps tmm0, tmm6, tmm7" "tileloadd tmm7, [{b1} + {row}]"
                           "tdpbf16ps tmm1, tmm6, tmm7"],
                    store: ["tilestored [{c0} + {row}], tmm0" "tilestored [{c1} + {row}], tmm1"]),
                2 => multiply!(o, c, add,
                    zero: ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"],
                    load: ["tileloadd tmm0, [{c0} + {row}]" "tileloadd tmm1, [{c1} + {row}]"
                           "tileloadd tmm2, [{c0} + {row} + 1024]" "tileloadd tmm3, [{c1} + {row} + 1024]"],
                    step: ["tileloadd tmm4, [{a0} + {row}]" "tileloadd tmm6, [{b0} + {row}]"
                           "tdpbf16ps tmm0, tmm4, tmm6" "tileloadd tmm7, [{b1} + {row}]"
                           "tdpbf16ps tmm1, tmm4, tmm7" "tileloadd tmm5, [{a1} + {row}]"
                           "tdpbf16ps tmm2, tmm5, tmm6" "tdpbf16ps tmm3, tmm5, tmm7"],
                    store: ["tilestored [{c0} + {row}], tmm0" "tilestored [{c1} + {row}], tmm1"
                            "tilestored [{c0} + {row} + 1024], tmm2" "tilestored [{c1} + {row} + 1024], tmm3"]),
                _ => multiply!(o, c, add,
                    zero: ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3" "tilezero tmm4" "tilezero tmm5"],
                    load: ["tileloadd tmm0, [{c0} + {row}]" "tileloadd tmm1, [{c1} + {row}]"
                           "tileloadd tmm2, [{c0} + {row} + 1024]" "tileloadd tmm3, [{c1} + {row} + 1024]"
                           "tileloadd tmm4, [{c0} + {row} + 2048]" "tileloadd tmm5, [{c1} + {row} + 2048]"],
                    step: ["tileloadd tmm6, [{a0} + {row}]" "tileloadd tmm7, [{b0} + {row}]"
                           "tdpbf16ps tmm0, tmm6, tmm7" "tileloadd tmm7, [{b1} + {row}]"
                           "tdpbf16ps tmm1, tmm6, tmm7" "tileloadd tmm6, [{a1} + {row}]"
                           "tdpbf16ps tmm3, tmm6, tmm7" "tileloadd tmm7, [{b0} + {row}]"
                           "tdpbf16ps tmm2, tmm6, tmm7" "tileloadd tmm6, [{a2} + {row}]"
                           "tdpbf16ps tmm4, tmm6, tmm7" "tileloadd tmm7, [{b1} + {row}]"
                           "tdpbf16ps tmm5, tmm6, tmm7"],
                    store: ["tilestored [{c0} + {row}], tmm0" "tilestored [{c1} + {row}], tmm1"
                            "tilestored [{c0} + {row} + 1024], tmm2" "tilestored [{c1} + {row} + 1024], tmm3"
                            "tilestored [{c0} + {row} + 2048], tmm4" "tilestored [{c1} + {row} + 2048], tmm5"]),
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
