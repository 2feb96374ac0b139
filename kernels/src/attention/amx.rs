//! Attention in bf16 products on AMX tiles: 16 queries at a time meet blocks of keys. Scores start from the exponent of a
//! score of 0, so that what comes out of the product is, but for a factor, what the exponential takes, whose rows are in
//! turn those of an operand. A mask is part of the start. Keys that only fill the last tile have scores of 0, values of 0, and
//! no part in the sum of the weights, so they need none.

use bytemuck::cast_slice_mut;

use crate::bf16;
use crate::simd::{Element, MAX_LANES, Simd, SimdOp};
use crate::view::Rows;

use super::head::{KvHead, LEAST, QueryHead, Write, load_square};
use super::powers::{self, ONE, UNIT, place, powers};
use super::tiles::{COLUMNS, ROWS, SUMS, TILE, Tiles, WIDTH};
use super::{AttentionShape, Mask};

/// Keys in a block, a multiple of 32: few enough that they, their scores and exponentials stay in L1, enough that the
/// output isn't loaded and stored too often.
const BLOCK: usize = 96;
/// The greatest power that is added up before the queries' levels rise.
pub(super) const HEADROOM: f32 = 40.0;
/// A sum below this has lost too much to underflow.
pub(super) const FLOOR: f32 = 1e-18;

/// Queries in a block: few where what belongs to them stays in L1, more where every block of queries gets keys and values
/// from beyond L2.
pub(super) const fn queries(d: usize) -> usize {
    if d <= 256 { 4 * ROWS } else { 8 * ROWS }
}

/// Tiles of K along a head's columns.
const fn k_tiles(d: usize) -> usize {
    d.div_ceil(WIDTH)
}

/// Tiles of V along a head's columns.
const fn v_tiles(d: usize) -> usize {
    d.div_ceil(ROWS)
}

/// Whether a column of V's tiles is free to hold ones, so that the sum of the weights comes with the output.
const fn holds_ones(d: usize) -> bool {
    !d.is_multiple_of(ROWS)
}

/// Tiles of sums of 16 queries: the output, and the sum of the weights in column `d`.
const fn sum_tiles(d: usize) -> usize {
    d / ROWS + 1
}

/// bf16 numbers that pack K: tiles `[keys / 16][d / 32]`, keys padded to 32.
pub(super) const fn k_elements(keys: usize, d: usize) -> usize {
    keys.next_multiple_of(WIDTH) / ROWS * k_tiles(d) * TILE
}

/// bf16 numbers that pack V: tiles `[keys / 32][d / 16]`.
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
        self.head.prefetch(s, self.first, self.v.len() / (v_tiles(self.head.d) * TILE) * WIDTH);
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

/// Tiles of K, pairs of columns by keys.
#[inline(always)]
fn pack_k<S: Simd, T: Element>(s: S, head: &KvHead<'_>, k: &[T], first: usize, out: &mut [bf16]) {
    let tiles = k_tiles(head.d);
    for (i, tiles) in out.chunks_exact_mut(tiles * TILE).enumerate() {
        let first = first + i * ROWS;
        let rows = S::LANES.min(head.nk.saturating_sub(first));
        for (c, out) in (0..).step_by(S::LANES).zip(tiles.chunks_exact_mut(S::LANES * ROWS)) {
            let columns = S::LANES.min(head.d.saturating_sub(c));
            let square = if rows > 0 && columns > 0 {
                load_square(s, &k[head.at(first) + c..], head.stride, rows, columns)
            } else {
                [s.splat(0.0); MAX_LANES]
            };
            for (pair, out) in square[..S::LANES].chunks_exact(2).zip(out.chunks_exact_mut(WIDTH)) {
                s.store_bf16_pairs(pair[0], pair[1], out);
            }
        }
    }
}

/// Tiles of V, `[tiles]` of them by 32 keys: pairs of keys by columns, keys in the order of [`place`], ones in the first free
/// column, if there is one, of keys that exist.
#[inline(always)]
pub(super) fn pack_v<S: Simd, T: Element>(
    s: S,
    head: &KvHead<'_>,
    v: &[T],
    first: usize,
    tiles: usize,
    out: &mut [bf16],
) {
    for (i, tiles) in out.chunks_exact_mut(tiles * TILE).enumerate() {
        for (c, tile) in (0..).step_by(ROWS).zip(tiles.chunks_exact_mut(TILE)) {
            let columns = S::LANES.min(head.d - c);
            for (pair, out) in tile.chunks_exact_mut(WIDTH).enumerate() {
                let key = first + i * WIDTH + place(2 * pair);
                let (a, b) =
                    (load_row(s, head, v, key, c, columns), load_row(s, head, v, key + 1, c, columns));
                s.store_bf16_pairs(a, b, out);
                if columns < S::LANES {
                    let one = |key: usize| if key < head.nk { bf16::ONE } else { bf16::ZERO };
                    (out[2 * columns], out[2 * columns + 1]) = (one(key), one(key + 1));
                }
            }
        }
    }
}

/// `columns` numbers of row `key` from column `c` on; zeros past the end.
#[inline(always)]
pub(super) fn load_row<S: Simd, T: Element>(
    s: S,
    head: &KvHead<'_>,
    x: &[T],
    key: usize,
    c: usize,
    columns: usize,
) -> S::F {
    if key >= head.nk || columns == 0 {
        return s.splat(0.0);
    }
    let row = &x[head.at(key) + c..];
    if columns == S::LANES { T::load(s, row) } else { T::load_partial(s, &row[..columns]) }
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
    let narrow = queries(d) / ROWS * k_tiles(d) + 2 * BLOCK / WIDTH + 2;
    let wide = 2 * BLOCK / WIDTH + 3 + queries(d) / ROWS * (1 + sum_tiles(d));
    2 * narrow * TILE + 4 * wide * SUMS
}

/// What the queries of a block share while their keys pass.
struct Shared<'a> {
    head: QueryHead<'a>,
    k: &'a [bf16],
    v: &'a [bf16],
    tiles: &'a Tiles,
    /// A tile of ones.
    ones: &'a mut [bf16],
    /// The same for the last piece of 32 keys: ones where keys exist.
    last_ones: &'a mut [bf16],
    /// Where scores start that nothing is known of.
    start: &'a mut [f32],
    /// Scores of a block of keys, `[BLOCK / 32][16][32]`.
    scores: &'a mut [f32],
    /// Their powers, and those of the block before.
    p: &'a mut [bf16],
    p_before: &'a mut [bf16],
    /// Where masked scores start, `[16][32]`.
    masked: &'a mut [f32],
}

/// A block of keys whose powers are there and not yet added up.
#[derive(Clone, Copy)]
struct Pending {
    /// The index of the queries.
    group: usize,
    first_key: usize,
    pieces: usize,
}

/// 16 queries.
struct Group<'a> {
    /// The first.
    first: usize,
    /// Tiles `[d / 32]`.
    q: &'a [bf16],
    /// Where scores start: in every row of a tile the exponent of 0 less the query's level, over the factor.
    start: &'a mut [f32],
    /// Whether a level isn't 0.
    leveled: bool,
    /// Tiles of sums.
    acc: &'a mut [f32],
}

impl<W: Write> SimdOp for Block<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        assert_eq!(S::LANES, ROWS, "AMX goes with vectors of 16");
        let Block { head, first, k, v, scratch, mut out, tiles } = self;
        let AttentionShape { nq, d, .. } = head.shape;
        let (kt, at) = (k_tiles(d), sum_tiles(d));
        let groups = (queries(d) / ROWS).min((nq - first).div_ceil(ROWS));
        let (q, rest) = scratch.split_at_mut(2 * groups * kt * TILE);
        let (p, rest) = rest.split_at_mut(2 * BLOCK / WIDTH * TILE);
        let (p_before, rest) = rest.split_at_mut(2 * BLOCK / WIDTH * TILE);
        let (ones, rest) = rest.split_at_mut(2 * TILE);
        let (last_ones, rest) = rest.split_at_mut(2 * TILE);
        let (scores, rest) = rest.split_at_mut(4 * 2 * BLOCK / WIDTH * SUMS);
        let (masked, rest) = rest.split_at_mut(4 * 2 * SUMS);
        let (start, rest) = rest.split_at_mut(4 * SUMS);
        let (starts, rest) = rest.split_at_mut(4 * groups * SUMS);
        let q: &mut [bf16] = cast_slice_mut(q); // [groups][d / 32] tiles
        let starts: &mut [f32] = cast_slice_mut(starts); // [groups] tiles
        let acc: &mut [f32] = cast_slice_mut(&mut rest[..4 * groups * at * SUMS]); // [groups][at] tiles

        let mut shared = Shared {
            head,
            k,
            v,
            tiles,
            ones: cast_slice_mut(ones),
            last_ones: cast_slice_mut(last_ones),
            start: cast_slice_mut(start),
            scores: cast_slice_mut(scores),
            p: cast_slice_mut(p),
            p_before: cast_slice_mut(p_before),
            masked: cast_slice_mut(masked),
        };
        head.prefetch(s, first, groups * ROWS);
        head.prefetch_out(s, first, groups * ROWS, &out);
        shared.ones.fill(bf16::ONE);
        let keys = (head.shape.nk - 1) % WIDTH + 1;
        for (pair, row) in shared.last_ones.chunks_exact_mut(WIDTH).enumerate() {
            let key = place(2 * pair);
            for pair in row.chunks_exact_mut(2) {
                let one = |key: usize| if key < keys { bf16::ONE } else { bf16::ZERO };
                (pair[0], pair[1]) = (one(key), one(key + 1));
            }
        }
        shared.start.fill(ONE / factor(&head));
        let mut states = Vec::with_capacity(groups);
        let parts = q
            .chunks_exact_mut(kt * TILE)
            .zip(starts.chunks_exact_mut(SUMS))
            .zip(acc.chunks_exact_mut(at * SUMS));
        for (g, ((q, start), acc)) in parts.enumerate() {
            let first = first + g * ROWS;
            match head.q {
                Rows::F32(x) => pack_q(s, &head, x, first, q),
                Rows::Bf16(x) => pack_q(s, &head, x, first, q),
            }
            start.fill(ONE / factor(&head));
            acc.fill(0.0);
            states.push(Group { first, q, start, leveled: false, acc });
        }
        shared.attend(s, &mut states, head.keys_seen(first, groups * ROWS), false);
        for group in &mut states {
            let rows = ROWS.min(nq - group.first);
            if (0..rows).any(|i| group.sum(d, i) < FLOOR) {
                group.acc.fill(0.0);
                let seen = head.keys_seen(group.first, ROWS);
                shared.attend(s, std::slice::from_mut(group), seen, true);
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

impl Group<'_> {
    /// The sum of the weights of query `i`.
    #[inline(always)]
    fn sum(&self, d: usize, i: usize) -> f32 {
        self.acc[d / ROWS * SUMS + i * ROWS + d % ROWS]
    }
}

impl Shared<'_> {
    /// Adds the first `seen` keys to the sums of `groups`. `level` has levels follow the scores also where they are low.
    #[inline(always)]
    fn attend<S: Simd>(&mut self, s: S, groups: &mut [Group<'_>], seen: usize, level: bool) {
        const MOST: u16 = (ONE + HEADROOM * UNIT) as u16;
        let (d, factor) = (self.head.shape.d, factor(&self.head));
        let vt = v_tiles(d);
        let mut pending: Option<Pending> = None;
        for first_key in (0..seen).step_by(BLOCK) {
            let pieces = (self.head.shape.nk - first_key).min(BLOCK).div_ceil(WIDTH);
            let n = pieces * TILE;
            for g in 0..groups.len() {
                self.score(s, &groups[g], first_key, pieces, level);
                std::mem::swap(&mut self.p, &mut self.p_before);
                let fits = match pending {
                    Some(before) if before.pieces == pieces && vt >= COLUMNS => {
                        let (acc, rest) = groups[before.group].acc.split_at_mut(COLUMNS * SUMS);
                        let v = &self.v[before.first_key / WIDTH * vt * TILE..];
                        let product = (&self.p_before[..n], v, vt, acc);
                        let fits = self
                            .tiles
                            .weigh_with_powers(product, (&self.scores[..n], factor, MOST, &mut self.p[..n]));
                        self.weigh(rest, before, COLUMNS);
                        fits
                    }
                    _ => {
                        if let Some(before) = pending {
                            self.weigh(groups[before.group].acc, before, 0);
                        }
                        powers(&self.scores[..n], factor, MOST, &mut self.p[..n])
                    }
                };
                if level || !fits {
                    groups[g].level(s, &mut self.scores[..n], factor, d, level);
                    powers(&self.scores[..n], factor, MOST, &mut self.p[..n]);
                }
                pending = Some(Pending { group: g, first_key, pieces });
            }
        }
        if let Some(last) = pending {
            std::mem::swap(&mut self.p, &mut self.p_before);
            self.weigh(groups[last.group].acc, last, 0);
        }
    }

    /// Scores of `group` and `pieces` of 32 keys from `first_key` on; where levels may be low, also of keys that don't exist as
    /// of hidden ones.
    #[inline(always)]
    fn score<S: Simd>(&mut self, s: S, group: &Group<'_>, first_key: usize, pieces: usize, level: bool) {
        let nk = self.head.shape.nk;
        let kt = group.q.len() / TILE;
        // Keys before this one are seen by all queries.
        let free = match self.head.mask {
            Mask::None if level => nk,
            Mask::None => nk.next_multiple_of(WIDTH),
            Mask::Causal => nk.min(group.first),
            Mask::Bias(_) => 0,
        };
        let free = pieces.min(free.saturating_sub(first_key) / WIDTH);
        let (open, hidden) = self.scores[..pieces * TILE].split_at_mut(free * TILE);
        let start = if group.leveled { &*group.start } else { &*self.start };
        let k = &self.k[first_key / ROWS * kt * TILE..][..2 * pieces * kt * TILE];
        let (k_open, k_hidden) = k.split_at(2 * free * kt * TILE);
        if kt == 2 && free > 0 {
            self.tiles.scores_of_2(group.q, k_open, start, open);
        } else {
            for (k, scores) in k_open.chunks_exact(2 * kt * TILE).zip(open.chunks_exact_mut(TILE)) {
                self.tiles.scores(group.q, k, (start, start, ROWS), scores);
            }
        }
        let hidden = k_hidden.chunks_exact(2 * kt * TILE).zip(hidden.chunks_exact_mut(TILE));
        for (i, (k, scores)) in hidden.enumerate() {
            start_masked(s, &self.head, group, first_key + (free + i) * WIDTH, self.masked);
            self.tiles.scores(group.q, k, (self.masked, &self.masked[ROWS..], WIDTH), scores);
        }
    }

    /// Adds the powers of `before` times values to `acc`, which begins with column `first` of the tiles of sums.
    #[inline(always)]
    fn weigh(&self, acc: &mut [f32], before: Pending, first: usize) {
        let d = self.head.shape.d;
        let vt = v_tiles(d);
        let p = &self.p_before[..before.pieces * TILE];
        let v = &self.v[before.first_key / WIDTH * vt * TILE..];
        // Where no column holds ones, the last columns are followed by the sum of the weights.
        let alone = if holds_ones(d) { vt } else { vt / COLUMNS * COLUMNS };
        let (acc, last) = acc.split_at_mut((alone - first) * SUMS);
        for (c, acc) in (first..).step_by(COLUMNS).zip(acc.chunks_mut(COLUMNS * SUMS)) {
            self.tiles.weigh(p, &v[c * TILE..], vt, acc);
        }
        if holds_ones(d) {
            return;
        }
        let nk = self.head.shape.nk;
        let whole =
            if before.first_key + before.pieces * WIDTH > nk { before.pieces - 1 } else { before.pieces };
        for (pieces, ones) in [(0..whole, &*self.ones), (whole..before.pieces, &*self.last_ones)] {
            if pieces.is_empty() {
                continue;
            }
            let p = &p[pieces.start * TILE..pieces.end * TILE];
            if alone < vt {
                let v = &v[(pieces.start * vt + alone) * TILE..];
                self.tiles.weigh_and_sum(p, v, vt, ones, last);
            } else {
                self.tiles.weigh(p, ones, 0, last);
            }
        }
    }
}

impl Group<'_> {
    /// Moves levels to where the highest of `scores` are, if they are above their headroom, and with `low` also where they
    /// are the first that count.
    #[inline(always)]
    fn level<S: Simd>(&mut self, s: S, scores: &mut [f32], factor: f32, d: usize, low: bool) {
        for i in 0..ROWS {
            let mut most = s.splat(LEAST);
            for row in scores.chunks_exact(WIDTH).skip(i).step_by(ROWS) {
                most = s.max(s.max(s.load(row), s.load(&row[ROWS..])), most);
            }
            let most = s.max_lane(most);
            let hidden = most < LEAST / 2.0;
            let most = (most * factor - ONE) / UNIT;
            let sum = self.sum(d, i);
            // A query all of whose keys are hidden so far has no level yet.
            let lift = low && sum < FLOOR && !hidden;
            if !(lift || most > HEADROOM) {
                continue;
            }
            let by = if sum > 0.0 { most.round().max(-126.0) } else { most.round() };
            self.leveled = true;
            let units = s.splat(by * UNIT / factor);
            for row in scores.chunks_exact_mut(WIDTH).skip(i).step_by(ROWS) {
                s.store(s.sub(s.load(row), units), row);
                s.store(s.sub(s.load(&row[ROWS..]), units), &mut row[ROWS..]);
            }
            let start = &mut self.start[i * ROWS..];
            s.store(s.sub(s.load(start), units), start);
            let shrink = s.splat((-by).exp2());
            for tile in self.acc.chunks_exact_mut(SUMS).filter(|_| sum > 0.0) {
                let row = &mut tile[i * ROWS..];
                s.store(s.mul(s.load(row), shrink), row);
            }
        }
    }
}

/// What makes exponents of scores.
#[inline(always)]
fn factor(head: &QueryHead<'_>) -> f32 {
    head.scale * std::f32::consts::LOG2_E * UNIT
}

/// Packs 16 queries from `first` on as tiles; zeros past the end.
#[inline(always)]
fn pack_q<S: Simd, T: Element>(s: S, head: &QueryHead<'_>, q: &[T], first: usize, out: &mut [bf16]) {
    let AttentionShape { nq, d, .. } = head.shape;
    for i in 0..ROWS {
        let query = first + i;
        let columns = if query < nq { d } else { 0 };
        let from = (head.sequence * nq + query.min(nq - 1)) * head.stride + head.head * d;
        let q = &q[from..from + columns];
        for (c, tile) in (0..).step_by(WIDTH).zip(out.chunks_exact_mut(TILE)) {
            for (c, row) in (c..).step_by(S::LANES).zip(tile[i * WIDTH..][..WIDTH].chunks_exact_mut(S::LANES))
            {
                let x = if c + S::LANES <= columns {
                    T::load(s, &q[c..])
                } else if c < columns {
                    T::load_partial(s, &q[c..])
                } else {
                    s.splat(0.0)
                };
                s.store_bf16(x, row);
            }
        }
    }
}

/// Writes where the scores of `group` and the 32 keys from `key` on start to `out`, `[16][32]`.
#[inline(always)]
fn start_masked<S: Simd>(s: S, head: &QueryHead<'_>, group: &Group<'_>, key: usize, out: &mut [f32]) {
    let AttentionShape { nq, nk, .. } = head.shape;
    let lanes: [f32; MAX_LANES] = std::array::from_fn(|i| i as f32);
    let lanes = s.load(&lanes);
    for (i, row) in out.chunks_exact_mut(ROWS).enumerate() {
        let (query, key) = (group.first + i / 2, key + i % 2 * ROWS);
        let mut start = s.load(&group.start[i / 2 * ROWS..]);
        let mut seen = nk.saturating_sub(key);
        match head.mask {
            Mask::None => {}
            Mask::Causal => seen = seen.min((query + 1).saturating_sub(key)),
            Mask::Bias(bias) if query < nq && seen > 0 => {
                let bias = &bias[(head.head * nq + query) * nk + key..];
                let bias = if seen >= ROWS { s.load(bias) } else { s.load_partial(&bias[..seen]) };
                start = s.fma(s.max(bias, s.splat(LEAST)), s.splat(1.0 / head.scale), start);
            }
            Mask::Bias(_) => {}
        }
        s.store(s.select_lt(lanes, s.splat(seen as f32), start, s.splat(LEAST)), row);
    }
}

/// Whether this machine has all that attention on tiles wants beside AMX.
pub(super) fn available() -> bool {
    powers::available()
}
