//! A call as all its tasks see it: operands, and what becomes of finished sums.

use super::columns::Columns;
use super::geometry::RowTile;
use super::steps::{Finish, Held, Out, Steps, Sums, Target};
use super::table::{GemmKernel, Types};
use super::tile::TILE_COLUMNS;
use super::{Activation, Epilogue};
use crate::layout::{ALIGN, Weight};
use crate::par::Shared;
use crate::view::{Operand, RowsMut};

/// An output of so many bytes goes past the caches: it leaves L2 anyway, and fetching its lines first costs more than the products.
const PAST_BYTES: usize = 2 * 1024 * 1024;

/// Operands, weights and output of a call, and the kernel it is for.
pub(crate) struct Call<'a> {
    pub(super) kernel: &'static GemmKernel,
    pub(super) steps: &'static Steps,
    pub(super) operand: Operand<'a>,
    pub(super) weight: Weight<'a>,
    pub(super) epilogue: Epilogue<'a>,
    pub(super) out: Out<'a>,
    /// Output rows from one row of a tile to the next.
    pub(super) row_step: usize,
    /// Rows and float weights are rounded to i16 chunk by chunk, which are added up in f32.
    pub(super) rounds: bool,
    /// Tiles of different images are finished differently.
    pub(super) by_image: bool,
    /// Rows go past the caches.
    pub(super) past: bool,
}

/// What finishing a tile adds that may differ from image to image.
pub(super) struct Terms {
    image: Option<usize>,
    pub(super) bias: [f32; TILE_COLUMNS],
    pub(super) offset: [i32; TILE_COLUMNS],
}

impl Terms {
    /// Those of no image.
    pub(super) fn new(columns: &Columns) -> Terms {
        Terms { image: None, bias: columns.bias, offset: columns.offset }
    }
}

impl<'a> Call<'a> {
    pub(super) fn new(
        kernel: &'static GemmKernel,
        operand: Operand<'a>,
        weight: Weight<'a>,
        epilogue: Epilogue<'a>,
        out: RowsMut<'a>,
        row_step: usize,
    ) -> Call<'a> {
        let rounds = matches!((operand, kernel.types), (Operand::Bf16(_), Types::S16S16));
        let columns = epilogue.activation.columns(weight.shape.n);
        let (out_at, out_bytes) = match &out {
            RowsMut::F32(out) => (out.as_ptr().addr(), size_of_val(&**out)),
            RowsMut::Bf16(out) => (out.as_ptr().addr(), size_of_val(&**out)),
        };
        let past = out_bytes >= PAST_BYTES
            && out_at.is_multiple_of(ALIGN)
            && !epilogue.accumulate
            && epilogue.residual.is_none()
            && columns.is_multiple_of(TILE_COLUMNS)
            // Sums of chunks leave half rows no room to wait.
            && !(rounds && epilogue.activation == Activation::Geglu);
        Call {
            kernel,
            steps: (kernel.steps)(),
            operand,
            weight,
            epilogue,
            out: match out {
                RowsMut::F32(out) => Out::F32(Shared::new(out)),
                RowsMut::Bf16(out) => Out::Bf16(Shared::new(out)),
            },
            row_step,
            rounds,
            by_image: matches!(operand, Operand::U8Uniform { .. }) || epilogue.image_bias.is_some(),
            past,
        }
    }

    /// Where `tile` goes.
    #[inline(always)]
    pub(super) fn target(&self, columns: &Columns, tile: &RowTile) -> Target<'_> {
        let activation = self.epilogue.activation;
        Target {
            out: &self.out,
            ldo: activation.columns(self.weight.shape.n),
            row: tile.row,
            row_step: self.row_step,
            column: activation.columns(columns.first),
            columns: activation.columns(columns.inputs),
        }
    }

    /// How the sums of `tile` are finished.
    #[inline(always)]
    pub(super) fn finishing<'s>(
        &'s self,
        columns: &'s Columns,
        tile: &RowTile,
        terms: &'s Terms,
        sums: Sums<'s>,
        held: Held<'s>,
    ) -> Finish<'s> {
        Finish {
            sums,
            scale: &columns.scale,
            bias: &terms.bias,
            activation: self.epilogue.activation,
            residual: self.epilogue.residual,
            accumulate: self.epilogue.accumulate,
            past: self.past,
            held,
            target: self.target(columns, tile),
        }
    }

    /// Makes `terms` those of `image`.
    #[inline(always)]
    pub(super) fn update(&self, columns: &Columns, image: usize, terms: &mut Terms) {
        if self.by_image && terms.image != Some(image) {
            self.terms(columns, image, terms);
        }
    }

    fn terms(&self, columns: &Columns, image: usize, terms: &mut Terms) {
        *terms = Terms { image: Some(image), ..Terms::new(columns) };
        if let Operand::U8Uniform { images, .. } = self.operand {
            terms.offset = terms.offset.map(|sum| sum * images[image].zero);
        }
        if let Some(image_bias) = self.epilogue.image_bias {
            let image_bias = &image_bias[image * self.weight.shape.n + columns.first..][..columns.inputs];
            for (bias, x) in terms.bias.iter_mut().zip(image_bias) {
                *bias += x;
            }
        }
    }
}
