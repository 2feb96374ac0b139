//! The one body of all tiles that work by broadcasting: each step loads `V` vectors of weights and meets them with an
//! element group of each of `R` rows. An instruction set says how in its [`Lanes`].

#[cfg(target_arch = "x86_64")]
mod grouped;

use crate::arch::{claim, prefetch};
#[cfg(target_arch = "x86_64")]
pub(crate) use grouped::{Grouped, grouped_tile};

/// Columns of an accumulator tile in memory, also where a kernel computes 16 of them.
pub(crate) const TILE_COLUMNS: usize = 32;

/// Most taps of a convolution that a tile function sums at a time.
pub(crate) const MAX_TAPS: usize = 9;

/// What a tile function reads and writes. All strides are bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileArgs {
    /// Row 0 of the first tap, `k` elements.
    pub(crate) a: *const u8,
    /// `[taps]`: bytes from `a` to row 0 of each tap.
    pub(crate) tap_at: *const usize,
    /// Taps that are summed: 1 to the kernel's [`taps`](crate::gemm::GemmKernel::taps).
    pub(crate) taps: usize,
    /// From row to row.
    pub(crate) a_stride: usize,
    /// Rows: 1 to `mr`.
    pub(crate) rows: usize,
    /// The blocks of panel 0, from the first k of the first tap.
    pub(crate) b: *const u8,
    /// From tap to tap.
    pub(crate) b_tap: usize,
    /// From panel to panel.
    pub(crate) b_stride: usize,
    /// Panels of 16 columns: 1 to `nr / 16`.
    pub(crate) panels: usize,
    /// Inputs, a multiple of `kr`.
    pub(crate) k: usize,
    /// `[rows][TILE_COLUMNS]` f32 or i32.
    pub(crate) c: *mut u8,
    /// Adds to `c` instead of replacing it.
    pub(crate) accumulate: bool,
    /// Where the finished rows go: lines that the function may ask for while it multiplies, if the kernel
    /// [claims](crate::gemm::GemmKernel::claims).
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "no kernel claims"))]
    pub(crate) claim: Claim,
    /// Weights that will be wanted soon, to be asked for by a kernel that [fetches](crate::gemm::GemmKernel::fetches).
    pub(crate) next: Next,
}

/// Where the weights lie that will be wanted soon. Addresses are never followed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Next {
    /// For each panel of the tile.
    pub(crate) panels: [*const u8; TILE_COLUMNS / 16],
    /// Bytes to go on after each round of a tap.
    pub(crate) step: usize,
}

impl Next {
    pub(crate) const NONE: Next = Next { panels: [std::ptr::null(); _], step: 0 };
}

/// Cache lines that will be written to soon. Addresses are never followed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    pub(crate) row: *const u8,
    /// Bytes from row to row.
    pub(crate) stride: usize,
    /// Bytes from a row's first line to its last.
    pub(crate) last: usize,
    pub(crate) rows: usize,
}

impl Claim {
    pub(crate) const NONE: Claim = Claim { row: std::ptr::null(), stride: 0, last: 0, rows: 0 };

    /// Asks for all lines.
    #[inline(always)]
    pub(crate) fn ask(self) {
        for r in 0..self.rows {
            let row = self.row.wrapping_add(r * self.stride);
            claim(row);
            claim(row.wrapping_add(self.last));
        }
    }
}

/// A tile function.
///
/// # Safety
/// The machine has the kernel's tier, and the pointers of [`TileArgs`] reach what it describes: `rows` rows of `k`
/// elements of each tap, `panels` panels of `k` inputs of each tap, and `rows` rows of `c` that nobody else uses.
pub(crate) type TileFn = unsafe fn(&TileArgs);

/// One instruction set's way to multiply.
///
/// # Safety
/// Of all functions: the machine has the instruction set, and pointers are good for the bytes named.
pub(crate) trait Lanes {
    /// A vector of accumulators: [`Lanes::COLUMNS`] of them, 4 bytes each.
    type Acc: Copy;
    /// A vector of weights.
    type B: Copy;
    /// A group of inputs of one row, in all lanes.
    type A: Copy;
    /// Columns of a vector.
    const COLUMNS: usize;
    /// Inputs in a step.
    const K: usize;
    /// Bytes of one step of one row.
    const A_BYTES: usize;
    /// Bytes of one step of one panel.
    const B_BYTES: usize = 16 * Self::A_BYTES;

    unsafe fn zero() -> Self::Acc;
    unsafe fn load_acc(c: *const u8) -> Self::Acc;
    unsafe fn store_acc(c: *mut u8, acc: Self::Acc);
    unsafe fn load_b(b: *const u8) -> Self::B;
    unsafe fn splat_a(a: *const u8) -> Self::A;
    unsafe fn multiply(acc: Self::Acc, a: Self::A, b: Self::B) -> Self::Acc;
}

/// Rows that are reached from one pointer.
const ROW_GROUP: usize = 6;
/// Pointers, for as many rows as a tile may have.
const ROW_GROUPS: usize = 2;

/// Steps of a round of the loop through k. Each asks for a part of the weights that come next: all at once they would keep the
/// loads of the tile waiting.
pub(crate) const UNROLLED: usize = 2;

/// How far a tile has come.
struct Position {
    /// Every [`ROW_GROUP`]th row. Those between are reached by multiples of the stride that addressing has for free, or that
    /// are kept: additions would take the multipliers' ports.
    a: [*const u8; ROW_GROUPS],
    /// 1, 3 and 5 times the stride.
    stride: [usize; 3],
    b: *const u8,
    b_stride: usize,
    next: Next,
}

impl Position {
    #[inline(always)]
    fn new(t: &TileArgs) -> Position {
        // Behind black boxes, or each multiple would be computed again from the one before.
        let stride = [1, 3, 5].map(|n| std::hint::black_box(n * t.a_stride));
        Position { a: [t.a; ROW_GROUPS], stride, b: t.b, b_stride: t.b_stride, next: t.next }
    }

    /// Goes to the first inputs of a tap.
    ///
    /// # Safety
    /// `tap` is one of the caller's.
    #[inline(always)]
    unsafe fn start(&mut self, t: &TileArgs, tap: usize) {
        // SAFETY: there are as many offsets as taps.
        let a = t.a.wrapping_add(unsafe { *t.tap_at.add(tap) });
        self.a = std::array::from_fn(|g| a.wrapping_add(g * ROW_GROUP * t.a_stride));
        self.b = t.b.wrapping_add(tap * t.b_tap);
    }

    /// Asks for weights that come next, for the panels of `columns` columns.
    #[inline(always)]
    fn fetch(&mut self, columns: usize) {
        for panel in &mut self.next.panels[..columns.div_ceil(16)] {
            prefetch(*panel);
            *panel = panel.wrapping_add(self.next.step);
        }
    }

    /// Takes `N` steps through k.
    ///
    /// # Safety
    /// As [`broadcast_tile`], and `N` steps are left.
    #[inline(always)]
    unsafe fn multiply<L: Lanes, const R: usize, const V: usize, const N: usize>(
        &mut self,
        acc: &mut [[L::Acc; V]; R],
    ) {
        let [one, three, five] = self.stride;
        let row_at = [0, one, 2 * one, three, 4 * one, five];
        for step in 0..N {
            let weights: [L::B; V] = std::array::from_fn(|v| {
                let column = v * L::COLUMNS;
                // From the panel that holds the vector's columns.
                let at = column / 16 * self.b_stride + column % 16 * L::A_BYTES + step * L::B_BYTES;
                // SAFETY: within the blocks of k inputs that the caller vouches for.
                unsafe { L::load_b(self.b.add(at)) }
            });
            for (r, row) in acc.iter_mut().enumerate() {
                let a = self.a[r / ROW_GROUP].wrapping_add(row_at[r % ROW_GROUP] + step * L::A_BYTES);
                // SAFETY: row r < R, an input below k.
                let x = unsafe { L::splat_a(a) };
                for (acc, &w) in row.iter_mut().zip(&weights) {
                    // SAFETY: the caller has the instruction set.
                    *acc = unsafe { L::multiply(*acc, x, w) };
                }
            }
        }
        self.a = self.a.map(|a| a.wrapping_add(N * L::A_BYTES));
        self.b = self.b.wrapping_add(N * L::B_BYTES);
    }
}

/// `R` rows by `V` vectors.
///
/// # Safety
/// As [`TileFn`], for `R` rows and `V` vectors.
#[inline(always)]
pub(crate) unsafe fn broadcast_tile<L: Lanes, const R: usize, const V: usize>(t: &TileArgs) {
    let c_at = |r: usize, v: usize| (r * TILE_COLUMNS + v * L::COLUMNS) * 4;
    // SAFETY: all offsets below stay within what the caller vouches for: rows < R, columns of V vectors, k inputs.
    unsafe {
        let mut acc = [[L::zero(); V]; R];
        if t.accumulate {
            for (r, row) in acc.iter_mut().enumerate() {
                for (v, acc) in row.iter_mut().enumerate() {
                    *acc = L::load_acc(t.c.add(c_at(r, v)));
                }
            }
        }
        const { assert!(R <= ROW_GROUP * ROW_GROUPS) };
        let mut at = Position::new(t);
        let steps = t.k / L::K;
        for tap in 0..t.taps {
            at.start(t, tap);
            for _ in 0..steps / UNROLLED {
                at.multiply::<L, R, V, UNROLLED>(&mut acc);
                at.fetch(V * L::COLUMNS);
            }
            for _ in 0..steps % UNROLLED {
                at.multiply::<L, R, V, 1>(&mut acc);
            }
        }
        for (r, row) in acc.iter().enumerate() {
            for (v, &acc) in row.iter().enumerate() {
                L::store_acc(t.c.add(c_at(r, v)), acc);
            }
        }
    }
}

/// Operations of a round of [`broadcast_peak`].
pub(crate) const fn peak_ops<L: Lanes>(rows: usize, vectors: usize) -> usize {
    2 * rows * vectors * L::COLUMNS * L::K
}

/// Takes the same step of a tile of `R` rows by `V` vectors `rounds` times, its operands in a few lines of L1.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
pub(crate) unsafe fn broadcast_peak<L: Lanes, const R: usize, const V: usize>(rounds: usize) {
    let operands = ([[1u8; 4]; R], [[1u8; 64]; V]);
    // SAFETY: no vector is longer than 64 bytes, no group of inputs longer than 4.
    unsafe {
        let mut acc = [[L::zero(); V]; R];
        for _ in 0..rounds {
            // Numbers that the optimizer doesn't know, or it would compute products once.
            let (a, b) = std::hint::black_box(&operands);
            let weights: [L::B; V] = std::array::from_fn(|v| L::load_b(b[v].as_ptr()));
            for (row, a) in acc.iter_mut().zip(a) {
                let x = L::splat_a(a.as_ptr());
                for (acc, &w) in row.iter_mut().zip(&weights) {
                    *acc = L::multiply(*acc, x, w);
                }
            }
        }
        std::hint::black_box(acc);
    }
}

/// A tile function and its row of the table, from the [`broadcast_tile`] of `$lanes`, or another function that is named: one
/// instance for each number of rows and each number of panels, `$v` vectors.
macro_rules! broadcast_kernel {
    ($(#[$attribute:meta])* $static_name:ident = $name:ident: $lanes:ty, $isa:ident, $types:ident,
     $mr:literal x $nr:literal, rows $rows:tt, panels [$($panels:literal: $v:literal),+], $steps:expr) => {
        $crate::gemm::tile::broadcast_kernel!(
            $(#[$attribute])* $static_name = $name: $lanes, $isa, $types, $mr x $nr, rows $rows, panels [$($panels: $v),+], $steps,
            broadcast_tile, <$lanes as $crate::gemm::tile::Lanes>::K
        );
    };
    ($(#[$attribute:meta])* $static_name:ident = $name:ident: $lanes:ty, $isa:ident, $types:ident,
     $mr:literal x $nr:literal, rows $rows:tt, panels [$($panels:literal: $v:literal),+], $steps:expr,
     $tile:ident, $kr:expr) => {
        $(#[$attribute])*
        unsafe fn $name(t: &$crate::gemm::tile::TileArgs) {
            match t.panels {
                $($panels => $crate::gemm::tile::broadcast_kernel!(@rows t, $tile, $lanes, $v, $rows),)+
                panels => unreachable!("{panels} panels for {}", stringify!($name)),
            }
        }

        pub(crate) static $static_name: $crate::gemm::table::GemmKernel = $crate::gemm::table::GemmKernel {
            name: stringify!($name),
            isa: $crate::Isa::$isa,
            types: $crate::gemm::table::Types::$types,
            mr: $mr,
            nr: $nr,
            kr: $kr,
            pair_bytes: $crate::gemm::table::Types::$types.broadcast_pair_bytes(),
            block_bytes: $crate::gemm::table::broadcast_block_bytes($crate::Isa::$isa),
            tile: $name,
            peak: {
                // Of all panels.
                const V: usize = $nr / <$lanes as $crate::gemm::tile::Lanes>::COLUMNS;
                $(#[$attribute])*
                unsafe fn peak(rounds: usize) {
                    // SAFETY: the caller has the instruction set.
                    unsafe { $crate::gemm::tile::broadcast_peak::<$lanes, $mr, V>(rounds) }
                }
                $crate::gemm::table::Peak { run: peak, ops: $crate::gemm::tile::peak_ops::<$lanes>($mr, V) }
            },
            steps: || $steps,
            taps: $crate::gemm::table::Types::$types.broadcast_taps(),
            claims: false,
            fetches: true,
            leave: || (),
        };
    };
    (@rows $t:ident, $tile:ident, $lanes:ty, $v:literal, [$($r:literal)+]) => {
        match $t.rows {
            // SAFETY: the caller vouches for what the arguments describe; the matches pick the instance of their shape.
            $($r => unsafe { $crate::gemm::tile::$tile::<$lanes, $r, $v>($t) },)+
            rows => unreachable!("{rows} rows"),
        }
    };
}
pub(crate) use broadcast_kernel;
