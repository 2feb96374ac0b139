//! The kernel table. Dispatch, tests, benches and reports iterate it.
#![forbid(unsafe_code)]

use super::steps::Steps;
use super::tile::{MAX_TAPS, TileFn};
use crate::Isa;
use crate::layout::{Encoding, Q4_GROUP, TILE_K, TILE_N};
use crate::view::Operand;

/// What the tile function of a kernel multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Types {
    /// u8 rows by int8 blocks `[k/4][16][4]`, summed in i32.
    U8S8,
    /// i16 rows by i16 blocks `[k/2][16][2]`, summed in i32: u8 rows and int8 weights, widened once per block of rows. Or bf16
    /// rows, rounded to whole numbers times a scale for each row of a chunk of inputs, and so are float weights
    /// (`gemm/shorts.rs`); sums of chunks are added up in f32.
    S16S16,
    /// u8 rows by the 4-bit codes of [`Encoding::Q4`] as int8, summed in i16 over a group and then, times the group's scale, in
    /// i32. A block has the codes of a group, `[Q4_GROUP/4][16][4]`, and its scales as i16, each twice: `[16][2]`.
    U8S4,
    /// bfloat16 rows by bfloat16 blocks `[k/2][16][2]`, summed in f32.
    Bf16,
    /// f32 rows by f32 blocks `[k][16]`, summed in f32.
    F32,
}

impl Types {
    /// Bytes of a row's element.
    pub const fn row_bytes(self) -> usize {
        match self {
            Types::U8S8 | Types::U8S4 => 1,
            Types::S16S16 | Types::Bf16 => 2,
            Types::F32 => 4,
        }
    }

    /// Bytes of the blocks of a tile of weights.
    pub const fn tile_bytes(self) -> usize {
        let weights = TILE_N * TILE_K * self.row_bytes();
        if matches!(self, Types::U8S4) { weights + TILE_K / Q4_GROUP * 4 * TILE_N } else { weights }
    }

    /// [`GemmKernel::pair_bytes`] of the kernels that work by broadcasting. Bytes that are multiplied four at a time leave
    /// L2 the time to deliver; wider types want to find their weights in L1.
    pub(crate) const fn broadcast_pair_bytes(self) -> usize {
        match self {
            Types::U8S8 => 128 * 1024,
            Types::U8S4 => 32 * 1024,
            Types::S16S16 => 20 * 1024,
            Types::Bf16 | Types::F32 => 16 * 1024,
        }
    }

    /// Taps that the kernels that work by broadcasting sum at a time: more than one where the weights of a line of a filter
    /// have room beside each other.
    pub(crate) const fn broadcast_taps(self) -> usize {
        match self {
            Types::U8S8 | Types::U8S4 => MAX_TAPS,
            Types::S16S16 | Types::Bf16 | Types::F32 => 1,
        }
    }

    /// Whether sums are i32.
    pub const fn is_integer(self) -> bool {
        matches!(self, Types::U8S8 | Types::S16S16 | Types::U8S4)
    }
}

/// A micro-kernel: `c[mr, nr] (+)= a[mr, k] * b[k, nr]`.
#[derive(Debug)]
pub struct GemmKernel {
    /// `gemm_<types>_<mr>x<nr>_<isa>`, the name of the function.
    pub name: &'static str,
    /// The tier it is written for.
    pub isa: Isa,
    /// What it multiplies.
    pub types: Types,
    /// Most rows of a tile.
    pub mr: usize,
    /// Columns of a tile: 16 or 32.
    pub nr: usize,
    /// `k` is a multiple of this.
    pub kr: usize,
    /// Most bytes of a chunk's weights under [`TILE_COLUMNS`](super::tile::TILE_COLUMNS) columns, as the tile reads them:
    /// they stay in the cache while the rows of a block pass by.
    pub(crate) pair_bytes: usize,
    /// Most bytes of a block of operand rows, which stays in the cache while the weights pass by.
    pub(crate) block_bytes: usize,
    /// Taps of a convolution that a tile can sum without storing in between.
    pub(crate) taps: usize,
    /// Whether the function asks for the lines that the finished tile goes to.
    pub(crate) claims: bool,
    /// Whether the function asks for the weights that come next.
    pub(crate) fetches: bool,
    /// The function.
    pub(crate) tile: TileFn,
    /// The multiplications of a tile whose operands needn't be fetched.
    pub(crate) peak: Peak,
    /// What stands around the tiles, compiled for the same tier and what else this machine has. Asked for once a call.
    pub(crate) steps: fn() -> &'static Steps,
    /// Called by a thread that has run tiles and is about to do something else.
    pub(crate) leave: fn(),
}

/// [`GemmKernel::block_bytes`] for an L2 of 512 KiB or more.
pub(crate) const BLOCK_BYTES: usize = 256 * 1024;

/// [`GemmKernel::block_bytes`] of a kernel of `isa` that works by broadcasting: nearly every core with AVX-512-VNNI has an L2 of
/// 1 MiB or more, and the fewer blocks, the fewer times weights are read.
pub(crate) const fn broadcast_block_bytes(isa: Isa) -> usize {
    if matches!(isa, Isa::Avx512Vnni) { 640 * 1024 } else { BLOCK_BYTES }
}

/// A kernel's multiplications with their operands in registers, or in a few lines of L1, independent enough that nothing but the
/// multipliers bounds them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peak {
    /// Runs this many rounds. Unsafe to call where the machine lacks the tier.
    pub(crate) run: unsafe fn(usize),
    /// Operations of a round; a multiplication and its addition are two.
    pub(crate) ops: usize,
}

impl GemmKernel {
    /// Whether it can multiply these rows by weights of this encoding without losing a part of either, but for the last
    /// bits of [`Encoding::F16`] in [`Types::Bf16`] and of floats in [`Types::S16S16`].
    pub fn suits(&self, operand: &Operand<'_>, encoding: Encoding) -> bool {
        match operand {
            Operand::U8 { .. } | Operand::U8Uniform { .. } => {
                self.types.is_integer()
                    && encoding.is_integer()
                    && (self.types != Types::U8S4 || encoding == Encoding::Q4)
            }
            Operand::Bf16(_) if matches!(self.types, Types::Bf16 | Types::S16S16) => {
                encoding != Encoding::F32
            }
            Operand::Bf16(_) | Operand::F32(_) => self.types == Types::F32,
        }
    }
}

/// Every kernel of this architecture; of those that fit a call, the last one is the best.
pub fn kernels() -> &'static [&'static GemmKernel] {
    crate::arch::KERNELS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_grammar() {
        for kernel in kernels() {
            let types = match kernel.types {
                Types::U8S8 => "u8s8",
                Types::S16S16 => "s16s16",
                Types::U8S4 => "u8s4",
                Types::Bf16 => "bf16",
                Types::F32 => "f32",
            };
            assert_eq!(
                kernel.name,
                format!("gemm_{types}_{}x{}_{}", kernel.mr, kernel.nr, kernel.isa.name())
            );
        }
    }

    /// The scalar kernels are for machines that have nothing else.
    #[test]
    fn every_tier_gets_kernels_of_its_own() {
        let codes = Operand::U8 { codes: &[], scale: &[] };
        for isa in Isa::ALL {
            let of_arch = kernels().iter().any(|kernel| kernel.isa == isa);
            for operand in [codes, Operand::Bf16(&[]), Operand::F32(&[])] {
                let kernel = crate::gemm::pick(isa, &operand, Encoding::Q8);
                assert!(
                    kernel.isa != Isa::Scalar || isa == Isa::Scalar || !of_arch,
                    "{isa:?} gets {}",
                    kernel.name
                );
            }
        }
    }
}
