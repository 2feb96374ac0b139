//! Attention in bf16 products on AMX tiles. As everywhere, lanes are queries: scores are computed transposed, K q^T, so
//! that a tile of K (16 keys by 32 columns) is an A operand as it lies, and the exponentials of two keys, rounded and
//! interleaved, are rows of a B operand for V^T.

use bytemuck::cast_slice_mut;

use crate::bf16;
use crate::math;
use crate::simd::{Element, MAX_LANES, Simd, SimdOp};
use crate::view::Rows;

use super::AttentionShape;
use super::head::{KvHead, LEAST, QueryHead, Write, load_square};
use super::softmax::{HEADROOM, Softmax};
use super::tiles::{GROUPS, Operands, ROWS, SUMS, TILE, Tiles, WIDTH};

/// Queries that are multiplied at a time.
const TEAM: usize = GROUPS * ROWS;
/// Keys in a block, a multiple of 32: few enough that their scores stay in L1, enough that the output isn't loaded and
/// stored too often.
const BLOCK: usize = 64;

/// Queries in a block: few where its keys and values stay in L1 meanwhile, more where every block of queries gets them from
/// beyond L2.
pub(super) const fn queries(d: usize) -> usize {
    if d <= 256 { 2 * TEAM } else { 4 * TEAM }
}

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
    let narrow = queries(d) / ROWS * k_tiles(d) * TILE + GROUPS * BLOCK / WIDTH * TILE;
    let wide = TEAM * BLOCK + queries(d) * (v_tiles(d) * ROWS + 2);
    2 * narrow + 4 * wide
}

impl<W: Write> SimdOp for Block<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        assert_eq!(S::LANES, ROWS, "AMX goes with vectors of 16");
        let Block { head, first, k, v, scratch, mut out, tiles } = self;
        let AttentionShape { nq, nk, d, .. } = head.shape;
        let (kt, vt) = (k_tiles(d), v_tiles(d));
        let queries = queries(d).min((nq - first).next_multiple_of(TEAM));
        let groups = queries / ROWS;
        let (q, rest) = scratch.split_at_mut(2 * groups * kt * TILE);
        let (p, rest) = rest.split_at_mut(2 * GROUPS * (BLOCK / WIDTH) * TILE);
        let (scores, rest) = rest.split_at_mut(4 * TEAM * BLOCK);
        let (acc, rest) = rest.split_at_mut(4 * groups * vt * SUMS);
        let (most, rest) = rest.split_at_mut(4 * queries);
        let q: &mut [bf16] = cast_slice_mut(q); // [groups][d / 32] tiles
        let p: &mut [bf16] = cast_slice_mut(p); // [GROUPS][BLOCK / 32] tiles
        let scores: &mut [f32] = cast_slice_mut(scores); // [GROUPS][BLOCK][16]
        let acc: &mut [f32] = cast_slice_mut(acc); // [groups][d padded to 16][16]
        let most: &mut [f32] = cast_slice_mut(most); // [groups][16]
        let sum: &mut [f32] = cast_slice_mut(&mut rest[..4 * queries]); // [groups][16]

        for (g, q) in q.chunks_exact_mut(kt * TILE).enumerate() {
            pack_q(s, &head, first + g * ROWS, q);
        }
        Softmax::new(most, sum, acc, ROWS);
        // Pieces of work: a block of keys for a team of queries.
        let teams = groups / GROUPS;
        for piece in 0..head.keys_seen(first, queries).div_ceil(BLOCK) * teams {
            let (first_key, team) = (piece / teams * BLOCK, piece % teams * GROUPS);
            let keys = BLOCK.min(nk - first_key);
            let steps = keys.div_ceil(WIDTH);
            let (k, b) = (&k[first_key / ROWS * kt * TILE..], &q[team * kt * TILE..]);
            for i in (0..2 * steps).step_by(2) {
                let (a, c_group) = (&k[i * kt * TILE..], BLOCK / ROWS);
                let operands = Operands {
                    a,
                    rows: 2,
                    a_row: kt,
                    a_step: 1,
                    b,
                    b_group: kt,
                    steps: kt,
                    c_group,
                    add: false,
                };
                tiles.multiply(operands, &mut scores[i * SUMS..]);
            }
            for g in 0..GROUPS {
                let scores = &mut scores[g * BLOCK * ROWS..][..keys * ROWS];
                let p = &mut p[g * (BLOCK / WIDTH) * TILE..][..steps * TILE];
                let g = team + g;
                let factor = head.mask(s, scores, ROWS, first + g * ROWS, first_key);
                let mut softmax = Softmax {
                    most: &mut most[g * ROWS..(g + 1) * ROWS],
                    sum: &mut sum[g * ROWS..(g + 1) * ROWS],
                    acc: &mut acc[g * vt * SUMS..(g + 1) * vt * SUMS],
                    n: ROWS,
                };
                // Scores seldom rise above the earlier ones by much, so it is seen afterwards whether they did.
                let mut high = s.splat(f32::INFINITY);
                let mut new_sum = s.splat(0.0);
                if first_key > 0 {
                    (new_sum, high) = exponentials(s, scores, factor, softmax.most, p);
                }
                if s.any_lt(s.splat(HEADROOM), high) {
                    softmax.raise(s, scores, factor, 0);
                    (new_sum, _) = exponentials(s, scores, factor, softmax.most, p);
                }
                s.store(s.add(s.load(softmax.sum), new_sum), softmax.sum);
            }
            let (acc, v) = (&mut acc[team * vt * SUMS..], &v[first_key / WIDTH * vt * TILE..]);
            for i in (0..vt).step_by(2) {
                let (a, b_group, rows) = (&v[i * TILE..], BLOCK / WIDTH, (vt - i).min(2));
                let operands =
                    Operands { a, rows, a_row: 1, a_step: vt, b: p, b_group, steps, c_group: vt, add: true };
                tiles.multiply(operands, &mut acc[i * SUMS..]);
            }
        }
        for g in (0..groups).take_while(|g| first + g * ROWS < nq) {
            let (acc, sum) = (&acc[g * vt * SUMS..(g + 1) * vt * SUMS], &sum[g * ROWS..(g + 1) * ROWS]);
            head.finish(s, first + g * ROWS, ROWS, acc, sum, &mut out);
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

/// Exponentials of scores `[keys, 16]` as rows of B tiles: keys in pairs, zeros behind the last. Returns their sum and the
/// greatest power of two.
#[inline(always)]
fn exponentials<S: Simd>(s: S, scores: &[f32], factor: f32, most: &[f32], p: &mut [bf16]) -> (S::F, S::F) {
    let (factor, minus) = (s.splat(factor), s.sub(s.splat(0.0), s.load(most)));
    let mut sums = [s.splat(0.0); 2];
    let mut high = [s.splat(LEAST); 2];
    let mut pairs = scores.chunks_exact(2 * ROWS);
    let mut rows = p.chunks_exact_mut(WIDTH);
    for (pair, out) in (&mut pairs).zip(&mut rows) {
        let a = s.fma(s.load(pair), factor, minus);
        let b = s.fma(s.load(&pair[ROWS..]), factor, minus);
        high = [s.max(a, high[0]), s.max(b, high[1])];
        let (a, b) = (math::exp2_coarse(s, a), math::exp2_coarse(s, b));
        sums = [s.add(sums[0], a), s.add(sums[1], b)];
        s.store_bf16_pairs(a, b, out);
    }
    let (odd, mut rows) = (pairs.remainder(), p.chunks_exact_mut(WIDTH).skip(scores.len() / (2 * ROWS)));
    if !odd.is_empty() {
        let a = s.fma(s.load(odd), factor, minus);
        high[0] = s.max(a, high[0]);
        let a = math::exp2_coarse(s, a);
        sums[0] = s.add(sums[0], a);
        s.store_bf16_pairs(a, s.splat(0.0), rows.next().expect("a row for each pair"));
    }
    rows.for_each(|row| row.fill(bf16::ZERO));
    (s.add(sums[0], sums[1]), s.max(high[0], high[1]))
}
