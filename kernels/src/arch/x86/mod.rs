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
