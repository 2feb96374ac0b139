//! The two algorithms: what becomes of pixels, taps and products along a side of their square, and along both.
#![forbid(unsafe_code)]

use crate::gemm::unpack::lanes;

/// Points of a side, at most.
pub(super) const MAX_SIDE: usize = 4;
/// Points, at most.
pub(crate) const MAX_POINTS: usize = MAX_SIDE * MAX_SIDE;
/// Taps of the filter.
pub(super) const TAPS: usize = 9;

/// An algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// [`Plain`].
    Plain,
    /// [`Upsampled`].
    Upsampled,
}

impl Form {
    /// Points of a side.
    pub(super) const fn side(self) -> usize {
        match self {
            Form::Plain => Plain::SIDE,
            Form::Upsampled => Upsampled::SIDE,
        }
    }

    /// Products of a patch and an output.
    pub(super) const fn points(self) -> usize {
        self.side() * self.side()
    }
}

/// How 2 outputs of a side come from `SIDE` pixels and 3 taps. What lies behind the points of a side means nothing.
pub(super) trait Algorithm {
    /// Points of a side.
    const SIDE: usize;
    /// Points.
    const POINTS: usize = Self::SIDE * Self::SIDE;
    /// Sums are `1 << SHIFT` times what they should be.
    const SHIFT: u32;
    /// The most that the taps of a side, of magnitudes up to 1, become at each point.
    const MOST: [usize; MAX_SIDE];
    /// `B^T d`.
    fn input<V: Vector>(d: [V; MAX_SIDE]) -> [V; MAX_SIDE];
    /// `G g`.
    fn filter<V: Vector>(g: [V; 3]) -> [V; MAX_SIDE];
    /// `A^T m`.
    fn output<V: Vector>(m: [V; MAX_SIDE]) -> [V; 2];
}

/// F(2, 3), with twice the usual transform of taps, so that it has no fractions.
pub(super) struct Plain;

impl Algorithm for Plain {
    const SIDE: usize = 4;
    const SHIFT: u32 = 2;
    const MOST: [usize; MAX_SIDE] = [2, 3, 3, 2];

    #[inline(always)]
    fn input<V: Vector>([d0, d1, d2, d3]: [V; MAX_SIDE]) -> [V; MAX_SIDE] {
        [d0.minus(d2), d1.plus(d2), d2.minus(d1), d1.minus(d3)]
    }
    #[inline(always)]
    fn filter<V: Vector>([g0, g1, g2]: [V; 3]) -> [V; MAX_SIDE] {
        let ends = g0.plus(g2);
        [g0.plus(g0), ends.plus(g1), ends.minus(g1), g2.plus(g2)]
    }
    #[inline(always)]
    fn output<V: Vector>([m0, m1, m2, m3]: [V; MAX_SIDE]) -> [V; 2] {
        [m0.plus(m1).plus(m2), m1.minus(m2).minus(m3)]
    }
}

/// The same where the two pixels in the middle of a patch are one: of the four points the third vanishes, and nothing is twice as
/// large.
pub(super) struct Upsampled;

impl Algorithm for Upsampled {
    const SIDE: usize = 3;
    const SHIFT: u32 = 0;
    const MOST: [usize; MAX_SIDE] = [1, 3, 1, 0];

    #[inline(always)]
    fn input<V: Vector>([d0, d1, d2, _]: [V; MAX_SIDE]) -> [V; MAX_SIDE] {
        [d0.minus(d1), d1, d1.minus(d2), d1]
    }
    #[inline(always)]
    fn filter<V: Vector>([g0, g1, g2]: [V; 3]) -> [V; MAX_SIDE] {
        [g0, g0.plus(g2).plus(g1), g2, g1]
    }
    #[inline(always)]
    fn output<V: Vector>([m0, m1, m2, _]: [V; MAX_SIDE]) -> [V; 2] {
        [m0.plus(m1), m1.minus(m2)]
    }
}

/// `B^T d B`.
#[inline(always)]
pub(super) fn inputs<A: Algorithm, V: Vector>(mut d: [V; MAX_POINTS]) -> [V; MAX_POINTS] {
    for x in 0..A::SIDE {
        let mut column = [d[x]; MAX_SIDE];
        for y in 1..A::SIDE {
            column[y] = d[A::SIDE * y + x];
        }
        let column = A::input(column);
        for y in 0..A::SIDE {
            d[A::SIDE * y + x] = column[y];
        }
    }
    for row in d[..A::POINTS].chunks_exact_mut(A::SIDE) {
        let mut side = [row[0]; MAX_SIDE];
        side[..A::SIDE].copy_from_slice(row);
        row.copy_from_slice(&A::input(side)[..A::SIDE]);
    }
    d
}

/// `G g G^T`.
#[inline(always)]
pub(super) fn filters<A: Algorithm, V: Vector>(g: [V; TAPS]) -> [V; MAX_POINTS] {
    let mut rows = [[g[0]; 3]; MAX_SIDE];
    for x in 0..3 {
        for (row, t) in rows.iter_mut().zip(A::filter([g[x], g[3 + x], g[6 + x]])) {
            row[x] = t;
        }
    }
    let mut u = [g[0]; MAX_POINTS];
    for (u, row) in u.chunks_exact_mut(A::SIDE).zip(rows).take(A::SIDE) {
        u.copy_from_slice(&A::filter(row)[..A::SIDE]);
    }
    u
}

/// `A^T m A`.
#[inline(always)]
pub(super) fn outputs<A: Algorithm, V: Vector>(m: [V; MAX_POINTS]) -> [[V; 2]; 2] {
    let mut rows = [[m[0]; MAX_SIDE]; 2];
    for x in 0..A::SIDE {
        let mut column = [m[x]; MAX_SIDE];
        for y in 1..A::SIDE {
            column[y] = m[A::SIDE * y + x];
        }
        for (row, t) in rows.iter_mut().zip(A::output(column)) {
            row[x] = t;
        }
    }
    let [upper, lower] = rows;
    [A::output(upper), A::output(lower)]
}

/// A number, or some side by side. Whole ones wrap around.
pub(super) trait Vector: Copy {
    fn plus(self, other: Self) -> Self;
    fn minus(self, other: Self) -> Self;
}

impl Vector for i32 {
    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        self.wrapping_add(other)
    }
    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        self.wrapping_sub(other)
    }
}

impl<const N: usize> Vector for [i16; N] {
    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        lanes(|i| self[i].wrapping_add(other[i]))
    }
    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        lanes(|i| self[i].wrapping_sub(other[i]))
    }
}
