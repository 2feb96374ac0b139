//! What the bytes of a weight mean. The file holds them as the kernels read them.
//!
//! A weight is a matrix `[n, taps * k]`: `n` outputs, `taps = kh * kw` positions of a filter (1 for a linear layer),
//! `k` inputs per tap, taps outermost. It is cut into **tiles** of 16 outputs by 64 inputs; `k` is padded to 64 per tap
//! and `n` to 16, padding is zero. The tiles of 16 outputs make a **panel** and lie one after another along `taps * k`;
//! panels lie one after another along `n`. `FORMAT.md` has the byte-level description.
#![forbid(unsafe_code)]

/// Outputs in a panel.
pub const TILE_N: usize = 16;
/// Inputs in a tile.
pub const TILE_K: usize = 64;
/// Every row, panel and tensor starts at a multiple of this many bytes.
pub const ALIGN: usize = 64;
/// Inputs that share a group scale in [`Encoding::Q4`].
pub const Q4_GROUP: usize = 32;

/// How the numbers of a weight matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// int8, symmetric, an f32 scale per output. Tile: `[k/4 = 16][n = 16][4]` i8, 1024 bytes.
    Q8,
    /// 4-bit codes with an integer scale, of either sign, per output and [`Q4_GROUP`] inputs; `(code - 8) * group_scale` is
    /// the int8 weight of [`Encoding::Q8`], within -127..=127. Tile: `[k/8 = 8][n = 16][4]` bytes, 512; the low halves of block `i` are the
    /// codes of block `2 i` of a `Q8` tile, the high halves those of block `2 i + 1`.
    Q4,
    /// IEEE half. Tile: `[k/2 = 32][n = 16][2]` u16, 2048 bytes.
    F16,
    /// bfloat16, laid out as [`Encoding::F16`].
    Bf16,
    /// f32. Tile: `[k = 64][n = 16]` f32, 4096 bytes.
    F32,
}

impl Encoding {
    /// Every encoding, in the order of its file code.
    pub const ALL: [Encoding; 5] = [Encoding::Q8, Encoding::Q4, Encoding::F16, Encoding::Bf16, Encoding::F32];

    /// The name people see and type.
    pub const fn name(self) -> &'static str {
        match self {
            Encoding::Q8 => "q8",
            Encoding::Q4 => "q4",
            Encoding::F16 => "f16",
            Encoding::Bf16 => "bf16",
            Encoding::F32 => "f32",
        }
    }

    /// Bytes of one tile's codes.
    pub const fn tile_bytes(self) -> usize {
        match self {
            Encoding::Q8 => TILE_N * TILE_K,
            Encoding::Q4 => TILE_N * TILE_K / 2,
            Encoding::F16 | Encoding::Bf16 => TILE_N * TILE_K * 2,
            Encoding::F32 => TILE_N * TILE_K * 4,
        }
    }

    /// Bytes that stand before the tiles of each panel.
    ///
    /// `Q8`: `scale: [f32; 16]`, then `sum: [taps][16]` i32, the sums of each output's int8 weights over each tap. `Q4`:
    /// the same, then the group scales `[tiles][2][16]` i8, padded to 64 bytes. Float encodings: nothing.
    pub const fn header_bytes(self, shape: WeightShape) -> usize {
        let sums = (1 + shape.taps) * TILE_N * 4;
        match self {
            Encoding::Q8 => sums,
            Encoding::Q4 => sums + (shape.tiles() * (TILE_K / Q4_GROUP) * TILE_N).next_multiple_of(ALIGN),
            _ => 0,
        }
    }

    /// Whether the weights are (or unpack to) int8, so that they can meet int8 activations.
    pub const fn is_integer(self) -> bool {
        matches!(self, Encoding::Q8 | Encoding::Q4)
    }
}

/// The shape of a weight matrix `[n, taps * k]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightShape {
    /// Outputs.
    pub n: usize,
    /// `kh * kw`; 1 for a linear layer.
    pub taps: usize,
    /// Inputs per tap.
    pub k: usize,
}

impl WeightShape {
    /// A linear layer `[n, k]`.
    pub const fn linear(n: usize, k: usize) -> Self {
        WeightShape { n, taps: 1, k }
    }

    /// Inputs per tap, padded: also the length of an operand row.
    pub const fn k_padded(self) -> usize {
        self.k.next_multiple_of(TILE_K)
    }

    /// Outputs, padded.
    pub const fn n_padded(self) -> usize {
        self.n.next_multiple_of(TILE_N)
    }

    /// Panels of 16 outputs.
    pub const fn panels(self) -> usize {
        self.n.div_ceil(TILE_N)
    }

    /// Tiles in a panel.
    pub const fn tiles(self) -> usize {
        self.taps * self.k.div_ceil(TILE_K)
    }

    /// Bytes of one panel, a multiple of [`ALIGN`].
    pub const fn panel_bytes(self, encoding: Encoding) -> usize {
        encoding.header_bytes(self) + self.tiles() * encoding.tile_bytes()
    }

    /// Bytes of the whole weight.
    pub const fn bytes(self, encoding: Encoding) -> usize {
        self.panels() * self.panel_bytes(encoding)
    }
}

/// A weight as it lies in the file: `bytes.len() == shape.bytes(encoding)`.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// How the bytes are to be read.
    pub encoding: Encoding,
    /// `[n, taps * k]`.
    pub shape: WeightShape,
    /// The panels; starts at a multiple of [`ALIGN`].
    pub bytes: &'a [u8],
}

impl<'a> Weight<'a> {
    /// A weight over `bytes`.
    ///
    /// # Panics
    /// Where the length isn't that of the shape.
    pub fn new(encoding: Encoding, shape: WeightShape, bytes: &'a [u8]) -> Self {
        assert_eq!(bytes.len(), shape.bytes(encoding), "{encoding:?} weight {shape:?}");
        Weight { encoding, shape, bytes }
    }

    /// Panel `p`: 16 outputs from `16 * p`.
    pub fn panel(&self, p: usize) -> Panel<'a> {
        let len = self.shape.panel_bytes(self.encoding);
        let (header, tiles) = self.bytes[p * len..][..len].split_at(self.encoding.header_bytes(self.shape));
        Panel { taps: self.shape.taps, header, tiles }
    }
}

/// 16 outputs of a weight.
#[derive(Clone, Copy, Debug)]
pub struct Panel<'a> {
    taps: usize,
    header: &'a [u8],
    /// The codes, tile after tile.
    pub tiles: &'a [u8],
}

impl<'a> Panel<'a> {
    /// The scale of each output. Integer encodings only.
    pub fn scale(&self) -> [f32; TILE_N] {
        std::array::from_fn(|n| f32::from_le_bytes(word(self.header, n)))
    }

    /// The sum of each output's int8 weights over one tap. Integer encodings only.
    pub fn sum(&self, tap: usize) -> [i32; TILE_N] {
        assert!(tap < self.taps, "tap {tap} of {}", self.taps);
        std::array::from_fn(|n| i32::from_le_bytes(word(self.header, (1 + tap) * TILE_N + n)))
    }

    /// The group scales of tile `t`: `[2][16]`, the bytes of i8. [`Encoding::Q4`] only.
    pub fn groups(&self, t: usize) -> &'a [u8] {
        &self.header[(1 + self.taps) * TILE_N * 4..][t * 2 * TILE_N..][..2 * TILE_N]
    }
}

fn word(bytes: &[u8], i: usize) -> [u8; 4] {
    bytes[4 * i..][..4].try_into().expect("four bytes")
}
