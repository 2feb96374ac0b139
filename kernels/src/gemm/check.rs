//! What must hold of a call's shapes.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::{Activation, Gemm};
use crate::layout::TILE_N;
use crate::view::{Border, Operand, Rows, RowsMut};

/// Checks that the shapes of `call` agree.
pub(super) fn shapes(call: &Gemm<'_>, rows: Option<&Range<usize>>) {
    let Gemm { operand, input, filter, weight, epilogue, out } = call;
    let shape = weight.shape;
    assert_eq!(filter.kh * filter.kw, shape.taps, "{filter:?} with {shape:?}");
    assert!(matches!(filter.stride, 1 | 2), "{filter:?}");
    assert!(input.full_h() >= filter.kh && input.full_w() >= filter.kw, "{filter:?} over {input:?}");
    if filter.upsample {
        let one = Border { top: 1, left: 1, bottom: 1, right: 1 };
        assert!(
            filter.kh == 3 && filter.kw == 3 && filter.stride == 1 && input.border == one,
            "{filter:?} over {input:?}"
        );
    }
    assert_eq!(weight.bytes.len(), shape.bytes(weight.encoding), "{:?} weight {shape:?}", weight.encoding);
    let elements = input.operand_rows() * shape.k_padded();
    if let Some(codes) = operand.codes() {
        assert!(weight.encoding.is_integer(), "u8 rows with {:?} weights", weight.encoding);
        assert_eq!(codes.len(), elements, "operand of {input:?} with {shape:?}");
    }
    match operand {
        Operand::U8 { scale, .. } => {
            assert_eq!(scale.len(), input.operand_rows(), "scales of {input:?}");
        }
        Operand::U8Uniform { images, .. } => {
            assert_eq!(images.len(), input.batch, "codings of {input:?}");
        }
        Operand::Bf16(rows) => assert_eq!(rows.len(), elements, "operand of {input:?} with {shape:?}"),
        Operand::F32(rows) => assert_eq!(rows.len(), elements, "operand of {input:?} with {shape:?}"),
    }
    let (h, w) = filter.output(input);
    assert!(rows.is_none_or(|r| r.start <= r.end && r.end <= h), "rows {rows:?} of {h}");
    let m = input.batch * rows.map_or(h, |r| r.len()) * w;
    if epilogue.activation == Activation::Geglu {
        assert!(shape.n.is_multiple_of(2 * TILE_N), "value and gate panels of {shape:?}");
    }
    let outputs = m * epilogue.activation.columns(shape.n);
    let len = match out {
        RowsMut::F32(out) => out.len(),
        RowsMut::Bf16(out) => out.len(),
    };
    assert_eq!(len, outputs, "output of {input:?}, {filter:?}, {shape:?}");
    assert!(epilogue.bias.is_none_or(|x| x.len() == shape.n), "bias of {shape:?}");
    assert!(
        epilogue.image_bias.is_none_or(|x| x.len() == input.batch * shape.n),
        "image bias of {shape:?}, {input:?}"
    );
    let residual = epilogue.residual.map(|rows| match rows {
        Rows::F32(rows) => rows.len(),
        Rows::Bf16(rows) => rows.len(),
    });
    assert!(residual.is_none_or(|len| len == outputs), "residual of {residual:?}, output of {outputs}");
}
