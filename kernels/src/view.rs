//! Borrowed tensors. All are row-major: `[rows, cols]` with a row stride in elements.
#![forbid(unsafe_code)]

use crate::bf16;

/// Rows of f32 or bf16 numbers: what layers hand to each other.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// f32.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl<'a> Rows<'a> {
    /// Elements.
    pub const fn len(&self) -> usize {
        match self {
            Rows::F32(x) => x.len(),
            Rows::Bf16(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements of `range`.
    #[inline(always)]
    pub fn slice(&self, range: std::ops::Range<usize>) -> Rows<'a> {
        match self {
            Rows::F32(x) => Rows::F32(&x[range]),
            Rows::Bf16(x) => Rows::Bf16(&x[range]),
        }
    }
}

/// Rows to be written.
#[derive(Debug)]
pub enum RowsMut<'a> {
    /// f32.
    F32(&'a mut [f32]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
}

impl RowsMut<'_> {
    /// Elements.
    pub const fn len(&self) -> usize {
        match self {
            RowsMut::F32(x) => x.len(),
            RowsMut::Bf16(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The left operand of a GEMM: rows of `stride` elements, a multiple of 64, of which the first `k` are the row and the
/// rest are zero (code 128 in `U8`). For a convolution a row is a pixel, and the pixels around the border are rows too.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a> {
    /// 8-bit rows: an element is `(code - 128) * scale[row]`, codes 1 to 255.
    U8 {
        /// `[rows, stride]`.
        codes: &'a [u8],
        /// `[rows]`.
        scale: &'a [f32],
    },
    /// 8-bit rows with one scale for each image: what all taps of a convolution meet can be summed as integers.
    U8Uniform {
        /// `[rows, stride]`; on the border the codes of zero.
        codes: &'a [u8],
        /// `[batch]`.
        images: &'a [Coding],
    },
    /// bfloat16 rows `[rows, stride]`.
    Bf16(&'a [bf16]),
    /// f32 rows `[rows, stride]`.
    F32(&'a [f32]),
}

/// What the codes of an image mean: an element is `(code - zero) * scale`, codes 1 to 255.
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Coding {
    /// From code to code.
    pub scale: f32,
    /// The code of zero, 1 to 255.
    pub zero: i32,
}

impl Operand<'_> {
    /// The codes of 8-bit rows.
    pub fn codes(&self) -> Option<&[u8]> {
        match self {
            Operand::U8 { codes, .. } | Operand::U8Uniform { codes, .. } => Some(codes),
            Operand::Bf16(_) | Operand::F32(_) => None,
        }
    }
}

/// An operand to be written by a pass.
#[derive(Debug)]
pub enum OperandMut<'a> {
    /// See [`Operand::U8`].
    U8 {
        /// `[rows, stride]`.
        codes: &'a mut [u8],
        /// `[rows]`.
        scale: &'a mut [f32],
    },
    /// See [`Operand::U8Uniform`]: codings that the caller gives ([`group_codings`](crate::pass::group_codings)). What lies beyond
    /// them, by less than 2^31 steps, saturates.
    U8Uniform {
        /// `[rows, stride]`.
        codes: &'a mut [u8],
        /// `[batch]`.
        images: &'a [Coding],
    },
    /// See [`Operand::Bf16`].
    Bf16(&'a mut [bf16]),
    /// See [`Operand::F32`].
    F32(&'a mut [f32]),
}

/// Rows of an operand that stand for an image with a border of zeros around it, so that a filter may step over the edge:
/// `[batch, top + h + bottom, left + w + right]` pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Border {
    /// Rows of zeros above.
    pub top: usize,
    /// Columns of zeros on the left.
    pub left: usize,
    /// Rows of zeros below.
    pub bottom: usize,
    /// Columns of zeros on the right.
    pub right: usize,
}

/// `batch` images of `h * w` pixels, with a border. A list of `m` rows is the image `1 x 1 x m` with no border.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ImageShape {
    /// Images.
    pub batch: usize,
    /// Rows of pixels, without the border.
    pub h: usize,
    /// Columns of pixels, without the border.
    pub w: usize,
    /// The border of zeros.
    pub border: Border,
}

impl ImageShape {
    /// `m` rows, no border.
    pub const fn rows(m: usize) -> Self {
        ImageShape { batch: 1, h: 1, w: m, border: Border { top: 0, left: 0, bottom: 0, right: 0 } }
    }

    /// Pixels of all images without the border.
    pub const fn pixels(&self) -> usize {
        self.batch * self.h * self.w
    }

    /// Height with the border.
    pub const fn full_h(&self) -> usize {
        self.border.top + self.h + self.border.bottom
    }

    /// Width with the border.
    pub const fn full_w(&self) -> usize {
        self.border.left + self.w + self.border.right
    }

    /// Rows of the operand, border included.
    pub const fn operand_rows(&self) -> usize {
        self.batch * self.full_h() * self.full_w()
    }
}
