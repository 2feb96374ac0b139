//! Attention on AMX tiles with scores of 8-bit queries and keys: 16 queries at a time meet 64 keys. Queries have a scale each, 64
//! keys one; a vector that all keys have in common doesn't change the softmax, so what some keys have on the average is
//! taken away from all. Weights and values are bf16, as in `amx`, and the sum of the weights comes from a column of ones
//! beside the values. Keys that only fill the last tile have products of 0, values of 0, and no ones.

#![forbid(unsafe_code)]

use bytemuck::cast_slice_mut;

use crate::bf16;
use crate::simd::{Element, MAX_LANES, Simd, SimdOp};
use crate::view::Rows;

use super::AttentionShape;
use super::amx::{self, FLOOR, HEADROOM, load_row, pack_v};
use super::fused::{Exponents, KEYS, Multiply, PRODUCTS, Raise, TILE_BYTES, Weigh, powers};
use super::head::{KvHead, QueryHead, Write};
use super::integers::{load_some, sample_mean};
use super::powers::{ONE, UNIT};
use super::tiles::{COLUMNS, ROWS, SUMS, TILE, Tiles, WIDTH};

/// Keys that a task packs.
pub(super) const PACK_KEYS: usize = 2 * KEYS;
/// The greatest head: of greater ones, whose products with the values are most of the work, bytes gain nothing.
const MAX_D: usize = 6 * ROWS;
/// Greater heads than this fill the tiles of values that a step multiplies.
const MIN_D: usize = (COLUMNS - 1) * ROWS;
/// Queries in a block: what belongs to them stays in L1.
pub(super) const QUERIES: usize = 4 * ROWS;
/// Bytes before the keys of a step: their scale, in every lane.
const SCALE_BYTES: usize = 64;
/// Turns codes around 128 into signed bytes.
const SIGN: u8 = 0x80;

/// Keys from which on encoding them and the queries is worth it.
const MIN_KEYS: usize = 512;

/// Whether `nk` keys of heads of `d` are worth it, and want no more memory than `amx` does.
pub(super) const fn suits(nk: usize, d: usize) -> bool {
    nk >= MIN_KEYS
        && d > MIN_D
        && d <= MAX_D
        && k_bytes(nk, d) + 2 * v_elements(nk, d) <= 2 * (amx::k_elements(nk, d) + amx::v_elements(nk, d))
}

/// Tiles of K along a head's columns.
const fn k_tiles(d: usize) -> usize {
    d.div_ceil(TILE_BYTES / ROWS)
}

/// Tiles of V along a head's columns and a column of ones; as many tiles of sums have 16 queries.
const fn v_tiles(d: usize) -> usize {
    d / ROWS + 1
}

/// Bytes that pack the K of a step: the scale, tiles `[4][d / 64]`.
const fn k_step(d: usize) -> usize {
    SCALE_BYTES + KEYS / ROWS * k_tiles(d) * TILE_BYTES
}

/// Bytes that pack K.
pub(super) const fn k_bytes(keys: usize, d: usize) -> usize {
    keys.div_ceil(KEYS) * k_step(d)
}

/// bf16 numbers that pack V: tiles `[keys / 32][d / 16 + 1]`, keys padded to 64.
pub(super) const fn v_elements(keys: usize, d: usize) -> usize {
    keys.next_multiple_of(KEYS) / WIDTH * v_tiles(d) * TILE
}

/// Packs keys and values from `first` on: as many as `k` and `v` have room for.
pub(super) struct Pack<'a> {
    pub(super) head: KvHead<'a>,
    pub(super) first: usize,
    pub(super) k: &'a mut [u8],
    pub(super) v: &'a mut [bf16],
}

impl SimdOp for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.head.prefetch(s, self.first, PACK_KEYS);
        match self.head.k {
            Rows::F32(k) => pack_k(s, &self.head, k, self.first, self.k),
            Rows::Bf16(k) => pack_k(s, &self.head, k, self.first, self.k),
        }
        let tiles = v_tiles(self.head.d);
        match self.head.v {
            Rows::F32(v) => pack_v(s, &self.head, v, self.first, tiles, self.v),
            Rows::Bf16(v) => pack_v(s, &self.head, v, self.first, tiles, self.v),
        }
    }
}

/// Steps of K: a scale, and tiles of four columns by keys.
#[inline(always)]
fn pack_k<S: Simd, T: Element>(s: S, head: &KvHead<'_>, k: &[T], first: usize, out: &mut [u8]) {
    let tiles = k_tiles(head.d);
    let mut mean = [0.0; MAX_D];
    sample_mean(s, head, k, &mut mean);
    for (i, out) in out.chunks_exact_mut(k_step(head.d)).enumerate() {
        let first = first + i * KEYS;
        let keys = KEYS.min(head.nk.saturating_sub(first));
        let mut most = s.splat(1e-30);
        for key in first..first + keys {
            for c in (0..head.d).step_by(S::LANES) {
                most = s.max_abs(centered(s, head, k, &mean, key, c), most);
            }
        }
        let most = s.max_lane(most);
        let inverse = s.splat(127.0 / most);
        let (scale, codes) = out.split_at_mut(SCALE_BYTES);
        s.store(s.splat(most / 127.0), cast_slice_mut(scale));
        for (i, tiles) in codes.chunks_exact_mut(tiles * TILE_BYTES).enumerate() {
            for (t, tile) in tiles.chunks_exact_mut(TILE_BYTES).enumerate() {
                let mut rows = [[0u8; TILE_BYTES / ROWS]; ROWS];
                for (r, row) in rows.iter_mut().enumerate().take(keys.saturating_sub(i * ROWS)) {
                    let columns = (t * row.len()..head.d).step_by(S::LANES);
                    for (c, codes) in columns.zip(row.chunks_exact_mut(S::LANES)) {
                        let x = centered(s, head, k, &mean, first + i * ROWS + r, c);
                        store_signed(s, s.mul(x, inverse), codes);
                    }
                }
                // Four codes stay together.
                let rows: &[f32] = bytemuck::cast_slice(rows.as_flattened());
                let mut square = [s.splat(0.0); MAX_LANES];
                for (row, from) in square.iter_mut().zip(rows.chunks_exact(S::LANES)) {
                    *row = s.load(from);
                }
                s.transpose(&mut square[..S::LANES]);
                let tile: &mut [f32] = cast_slice_mut(tile);
                for (row, to) in square.into_iter().zip(tile.chunks_exact_mut(S::LANES)) {
                    s.store(row, to);
                }
            }
        }
    }
}

/// A vector of a key from column `c` on, less the `mean`; zero past the last column.
#[inline(always)]
fn centered<S: Simd, T: Element>(
    s: S,
    head: &KvHead<'_>,
    k: &[T],
    mean: &[f32; MAX_D],
    key: usize,
    c: usize,
) -> S::F {
    s.sub(load_row(s, head, k, key, c, S::LANES.min(head.d - c)), s.load(&mean[c..]))
}

/// Stores codes of operands as signed bytes.
#[inline(always)]
fn store_signed<S: Simd>(s: S, x: S::F, codes: &mut [u8]) {
    s.store_codes(x, codes);
    for code in codes {
        *code ^= SIGN;
    }
}

/// Attention of one block of queries over all keys of a packed head, without a mask.
pub(super) struct Block<'a, W> {
    pub(super) head: QueryHead<'a>,
    /// The block's first query.
    pub(super) first: usize,
    pub(super) k: &'a [u8],
    pub(super) v: &'a [bf16],
    pub(super) scratch: &'a mut [u8],
    pub(super) out: W,
    /// The tile registers.
    pub(super) tiles: &'a Tiles,
}

/// Bytes of scratch memory that a [`Block`] wants.
pub(super) const fn scratch_bytes(d: usize) -> usize {
    let groups = QUERIES / ROWS;
    let narrow = groups * k_tiles(d) * TILE_BYTES + 2 * 2 * 2 * TILE;
    narrow + 4 * (2 * PRODUCTS + groups * v_tiles(d) * SUMS)
}

/// What the queries of a block share while their keys pass.
struct Shared<'a> {
    nk: usize,
    d: usize,
    k: &'a [u8],
    v: &'a [bf16],
    tiles: &'a Tiles,
    /// Products of the keys of a step, and of the step after it, `[2][16][32]`.
    products: &'a mut [i32],
    next: &'a mut [i32],
    /// Powers, and those of the step before, `[2]` tiles.
    p: &'a mut [bf16],
    p_before: &'a mut [bf16],
}

/// 16 queries.
struct Group<'a> {
    /// The first.
    first: usize,
    /// Tiles `[d / 64]`.
    q: &'a [u8],
    /// What makes exponents of products, but for the scale of the keys. Levels are part of the offsets.
    exponents: Exponents,
    /// Tiles of sums `[d / 16 + 1]`.
    acc: &'a mut [f32],
}

impl<W: Write> SimdOp for Block<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        assert_eq!(S::LANES, ROWS, "AMX goes with vectors of 16");
        let Block { head, first, k, v, scratch, mut out, tiles } = self;
        let AttentionShape { nq, nk, d, .. } = head.shape;
        let (kt, vt) = (k_tiles(d), v_tiles(d));
        let groups = (QUERIES / ROWS).min((nq - first).div_ceil(ROWS));
        let (p, rest) = scratch.split_at_mut(4 * TILE);
        let (p_before, rest) = rest.split_at_mut(4 * TILE);
        let (products, rest) = rest.split_at_mut(4 * PRODUCTS);
        let (next, rest) = rest.split_at_mut(4 * PRODUCTS);
        let (q, rest) = rest.split_at_mut(groups * kt * TILE_BYTES); // [groups][d / 64] tiles
        let acc: &mut [f32] = cast_slice_mut(&mut rest[..4 * groups * vt * SUMS]); // [groups][d / 16 + 1] tiles
        let mut shared = Shared {
            nk,
            d,
            k,
            v,
            tiles,
            products: cast_slice_mut(products),
            next: cast_slice_mut(next),
            p: cast_slice_mut(p),
            p_before: cast_slice_mut(p_before),
        };
        head.prefetch(s, first, groups * ROWS);
        head.prefetch_out(s, first, groups * ROWS, &out);
        let mut states = Vec::with_capacity(groups);
        let parts = q.chunks_exact_mut(kt * TILE_BYTES).zip(acc.chunks_exact_mut(vt * SUMS));
        for (g, (q, acc)) in parts.enumerate() {
            let first = first + g * ROWS;
            let factor = match head.q {
                Rows::F32(x) => pack_q(s, &head, x, first, q),
                Rows::Bf16(x) => pack_q(s, &head, x, first, q),
            };
            acc.fill(0.0);
            states.push(Group { first, q, exponents: Exponents { factor, offset: [ONE; ROWS] }, acc });
        }
        shared.attend(s, &mut states, false);
        for group in &mut states {
            let rows = ROWS.min(nq - group.first);
            if (0..rows).any(|i| group.sum(d, i) < FLOOR) {
                group.acc.fill(0.0);
                shared.attend(s, std::slice::from_mut(group), true);
            }
            for i in 0..rows {
                let inverse = s.splat(1.0 / group.sum(d, i).max(f32::MIN_POSITIVE));
                for (c, tile) in (0..d).step_by(ROWS).zip(group.acc.chunks_exact(SUMS)) {
                    let v = s.mul(s.load(&tile[i * ROWS..]), inverse);
                    out.write(s, head.out_at(group.first + i) + c, v, ROWS.min(d - c));
                }
            }
        }
    }
}

/// 16 queries and the keys of a step.
#[derive(Clone, Copy)]
struct Turn {
    step: usize,
    group: usize,
}

impl Turn {
    /// All groups take turns with a step.
    #[inline(always)]
    fn after(self, groups: usize) -> Turn {
        let group = self.group + 1;
        if group < groups { Turn { group, ..self } } else { Turn { step: self.step + 1, group: 0 } }
    }
}

impl Shared<'_> {
    /// Adds all keys to the sums of `groups`. `level` has levels follow the scores also where they are low.
    #[inline(always)]
    fn attend<S: Simd>(&mut self, s: S, groups: &mut [Group<'_>], level: bool) {
        let (vt, k_step) = (v_tiles(self.d), k_step(self.d));
        let v_step = KEYS / WIDTH * vt * TILE;
        let turns = self.nk.div_ceil(KEYS) * groups.len();
        // Nothing is known before the first turn, whose weights are none.
        self.products.fill(0);
        self.p_before.fill(bf16::ZERO);
        let [mut before, mut this, mut next] = [Turn { step: 0, group: 0 }; 3];
        for turn in 0..=turns {
            let exponents = {
                let scale = &self.k[this.step * k_step..][..SCALE_BYTES];
                groups[this.group].exponents(s, bytemuck::cast_slice(scale))
            };
            let fits = {
                let k = &self.k[next.step * k_step..][SCALE_BYTES..k_step];
                let multiply = Multiply { q: groups[next.group].q, k, out: &mut *self.next };
                let raise = Raise { products: &*self.products, exponents: &exponents, out: &mut *self.p };
                let (sums, rest) = groups[before.group].acc.split_at_mut(COLUMNS * SUMS);
                let v = &self.v[before.step * v_step..][..v_step];
                let weigh = Weigh { p: &*self.p_before, v, v_step: vt, sums };
                let fits = self.tiles.step(weigh, raise, multiply);
                self.weigh(v, COLUMNS, rest);
                fits
            };
            if turn == 0 {
                self.p.fill(bf16::ZERO);
            } else if level || !fits {
                // Keys that don't exist have no part in levels.
                let keys = KEYS.min(self.nk - this.step * KEYS);
                if keys < KEYS {
                    for (i, row) in self.products.chunks_exact_mut(WIDTH).enumerate() {
                        let first = i / ROWS * WIDTH;
                        row[keys.saturating_sub(first).min(WIDTH)..].fill(i32::MIN);
                    }
                }
                groups[this.group].level(s, self.products, exponents.factor, self.d, level);
                let exponents = Exponents { offset: groups[this.group].exponents.offset, ..exponents };
                powers(Raise { products: &*self.products, exponents: &exponents, out: &mut *self.p });
            }
            std::mem::swap(&mut self.p, &mut self.p_before);
            std::mem::swap(&mut self.products, &mut self.next);
            (before, this) = (this, next);
            if turn + 1 < turns {
                next = next.after(groups.len());
            }
        }
        self.weigh(&self.v[this.step * v_step..][..v_step], 0, groups[this.group].acc);
    }

    /// Adds the weights of the step before times the values of column `first` and those after it to `sums`.
    #[inline(always)]
    fn weigh(&self, v: &[bf16], first: usize, sums: &mut [f32]) {
        for (c, sums) in (first..).step_by(COLUMNS).zip(sums.chunks_mut(COLUMNS * SUMS)) {
            self.tiles.weigh(self.p_before, &v[c * TILE..], v_tiles(self.d), sums);
        }
    }
}

impl Group<'_> {
    /// The sum of the weights of query `i`.
    #[inline(always)]
    fn sum(&self, d: usize, i: usize) -> f32 {
        self.acc[d / ROWS * SUMS + i * ROWS + d % ROWS]
    }

    /// What makes exponents of products with keys of a scale, given in every lane.
    #[inline(always)]
    fn exponents<S: Simd>(&self, s: S, scale: &[f32]) -> Exponents {
        let mut exponents = self.exponents;
        s.store(s.mul(s.load(&self.exponents.factor), s.load(scale)), &mut exponents.factor);
        exponents
    }

    /// Moves levels to where the highest of `products` are, if they are above their headroom, and with `low` also where they
    /// are the first that count.
    #[inline(always)]
    fn level<S: Simd>(&mut self, s: S, products: &[i32], factor: [f32; ROWS], d: usize, low: bool) {
        for (i, factor) in factor.into_iter().enumerate() {
            let row = products.chunks_exact(WIDTH).skip(i).step_by(ROWS).flatten();
            let most = row.fold(i32::MIN, |most, &x| most.max(x));
            let most = (most as f32 * factor + self.exponents.offset[i] - ONE) / UNIT;
            let sum = self.sum(d, i);
            if !(most > HEADROOM || low && sum < FLOOR) {
                continue;
            }
            let by = if sum > 0.0 { most.round().max(-126.0) } else { most.round() };
            self.exponents.offset[i] -= by * UNIT;
            let shrink = s.splat((-by).exp2());
            for tile in self.acc.chunks_exact_mut(SUMS).filter(|_| sum > 0.0) {
                let row = &mut tile[i * ROWS..];
                s.store(s.mul(s.load(row), shrink), row);
            }
        }
    }
}

/// Packs 16 queries from `first` on as tiles of codes; zeros past the end. Returns their scales as factors of exponents.
#[inline(always)]
fn pack_q<S: Simd, T: Element>(
    s: S,
    head: &QueryHead<'_>,
    q: &[T],
    first: usize,
    out: &mut [u8],
) -> [f32; ROWS] {
    let AttentionShape { nq, d, .. } = head.shape;
    let unit = head.scale * std::f32::consts::LOG2_E * UNIT / 127.0;
    let mut factors = [0.0; ROWS];
    out.fill(0);
    for (i, factor) in factors.iter_mut().enumerate().take(nq.saturating_sub(first)) {
        let from = (head.sequence * nq + first + i) * head.stride + head.head * d;
        let q = &q[from..from + d];
        let mut most = s.splat(1e-30);
        for c in (0..d).step_by(S::LANES) {
            most = s.max_abs(load_some(s, &q[c..], S::LANES.min(d - c)), most);
        }
        let most = s.max_lane(most);
        *factor = most * unit;
        let inverse = s.splat(127.0 / most);
        for c in (0..d).step_by(S::LANES) {
            let (tile, column) = (c / (TILE_BYTES / ROWS), c % (TILE_BYTES / ROWS));
            let at = tile * TILE_BYTES + i * (TILE_BYTES / ROWS) + column;
            let x = load_some(s, &q[c..], S::LANES.min(d - c));
            store_signed(s, s.mul(x, inverse), &mut out[at..at + S::LANES]);
        }
    }
    factors
}
