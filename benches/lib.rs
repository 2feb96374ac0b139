//! Helpers shared by the benches, which stand beside this file.

use kernels::gemm::Types;
use kernels::layout::Encoding;
use kernels::view::Operand;

/// 64 bytes that start at a multiple of 64, as everything in an arena or a model file does.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, bytemuck::Zeroable, bytemuck::Pod)]
struct Line([u8; 64]);

/// Bytes that start at a multiple of 64.
#[derive(Debug)]
pub struct Lines {
    lines: Vec<Line>,
    len: usize,
}

impl Lines {
    /// `len` bytes of value `byte`.
    pub fn new(len: usize, byte: u8) -> Self {
        Lines { lines: vec![Line([byte; 64]); len.div_ceil(64)], len }
    }

    /// A copy of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let mut lines = Lines::new(bytes.len(), 0);
        bytemuck::cast_slice_mut(&mut lines.lines)[..bytes.len()].copy_from_slice(bytes);
        lines
    }

    /// The bytes.
    pub fn get(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }

    /// The bytes, to be written.
    pub fn get_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

/// `rows` as the left operand of a kernel of these types; u8 rows take a scale each from `scale`.
pub fn operand<'a>(types: Types, rows: &'a [u8], scale: &'a [f32]) -> Operand<'a> {
    match types {
        Types::U8S8 | Types::S16S16 | Types::U8S4 => {
            Operand::U8 { codes: &rows[..rows.len() / types.row_bytes()], scale }
        }
        Types::Bf16 => Operand::Bf16(bytemuck::cast_slice(rows)),
        Types::F32 => Operand::F32(bytemuck::cast_slice(rows)),
    }
}

/// The encodings that kernels of these types are measured with.
pub fn encodings(types: Types) -> &'static [Encoding] {
    match types {
        Types::U8S8 | Types::S16S16 => &[Encoding::Q8, Encoding::Q4],
        Types::U8S4 => &[Encoding::Q4],
        Types::Bf16 => &[Encoding::Bf16, Encoding::Q8],
        Types::F32 => &[Encoding::F32],
    }
}

/// Threads that benches run on: as many as the machine has.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Uniform numbers in [-1, 1).
pub fn noise(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}
