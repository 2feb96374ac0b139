//! x86-64: AVX2 to AMX.

pub(crate) mod amx;
pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod avx512vnni;
pub(crate) mod avxvnni;

/// The moves of [`crate::gemm::tile::Lanes`] for vectors of one width, integer or float.
macro_rules! moves {
    ($acc:ty, $zero:ident, $load:ident, $store:ident) => {
        #[inline(always)]
        unsafe fn zero() -> $acc {
            // SAFETY: the caller has the instruction set.
            unsafe { $zero() }
        }
        #[inline(always)]
        unsafe fn load_acc(c: *const u8) -> $acc {
            // SAFETY: the caller has the instruction set and vouches for a vector's bytes.
            unsafe { $load(c.cast()) }
        }
        #[inline(always)]
        unsafe fn store_acc(c: *mut u8, acc: $acc) {
            // SAFETY: the caller has the instruction set and vouches for a vector's bytes.
            unsafe { $store(c.cast(), acc) }
        }
        #[inline(always)]
        unsafe fn load_b(b: *const u8) -> $acc {
            // SAFETY: the caller has the instruction set and vouches for a vector's bytes.
            unsafe { $load(b.cast()) }
        }
    };
}
pub(crate) use moves;

/// [`crate::gemm::tile::Lanes`] of integers in vectors of 256 or 512 bits, whose groups of inputs have 4 bytes: how many inputs
/// those are, and what a group by a vector of weights adds to a vector of sums.
macro_rules! integer_lanes {
    ($(#[$attribute:meta])* $name:ident: 256, $k:literal inputs, |$acc:ident, $a:ident, $b:ident| $sum:expr) => {
        $crate::arch::x86::integer_lanes!(
            $(#[$attribute])* $name: __m256i, 8, $k, |$acc, $a, $b| $sum,
            _mm256_setzero_si256, _mm256_loadu_si256, _mm256_storeu_si256, _mm256_set1_epi32
        );
    };
    ($(#[$attribute:meta])* $name:ident: 512, $k:literal inputs, |$acc:ident, $a:ident, $b:ident| $sum:expr) => {
        $crate::arch::x86::integer_lanes!(
            $(#[$attribute])* $name: __m512i, 16, $k, |$acc, $a, $b| $sum,
            _mm512_setzero_si512, _mm512_loadu_si512, _mm512_storeu_si512, _mm512_set1_epi32
        );
    };
    ($(#[$attribute:meta])* $name:ident: $vector:ty, $columns:literal, $k:literal, |$acc:ident, $a:ident, $b:ident| $sum:expr,
     $zero:ident, $load:ident, $store:ident, $splat:ident) => {
        $(#[$attribute])*
        struct $name;

        impl $crate::gemm::tile::Lanes for $name {
            type Acc = $vector;
            type B = $vector;
            type A = $vector;
            const COLUMNS: usize = $columns;
            const K: usize = $k;
            const A_BYTES: usize = 4;
            $crate::arch::x86::moves!($vector, $zero, $load, $store);

            #[inline(always)]
            unsafe fn splat_a(a: *const u8) -> $vector {
                // SAFETY: the caller has the instruction set and vouches for the 4 bytes.
                unsafe { $splat(a.cast::<i32>().read_unaligned()) }
            }
            #[inline(always)]
            unsafe fn multiply($acc: $vector, $a: $vector, $b: $vector) -> $vector {
                // SAFETY: the caller has the instruction set.
                unsafe { $sum }
            }
        }
    };
}
pub(crate) use integer_lanes;
