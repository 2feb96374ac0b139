//! Which GEMMs go on in the step before, and which sums take the place of what they are added to.
#![forbid(unsafe_code)]

use kernels::gemm::Filter;

use super::Lowering;
use crate::graph::bands::BandOp;
use crate::graph::network::{Node, Tensor};
use crate::graph::steps::{Op, OperandBuf, OperandKind, ResidualSpec, RowsBuf, Step};

/// How a GEMM goes on in a step.
#[derive(Clone, Copy, Debug)]
pub(super) enum Join {
    /// Its operand is there.
    Operand(OperandBuf),
    /// What it reads, these rows, is made there, and stays inside.
    Inner(RowsBuf),
}

impl Lowering<'_> {
    /// The rows of the residual `r` of `t`, where the sum may take their place: nobody reads them later. A band
    /// of a step that reads them too is ahead of what it writes.
    pub(super) fn in_place(&mut self, t: Tensor, r: Tensor, at: usize) -> Option<RowsBuf> {
        if self.remade.contains(&r) {
            return None;
        }
        let same_rate = self.network.values[r.0].rate == self.network.values[t.0].rate;
        let input = matches!(self.network.nodes[r.0], Node::Input { .. });
        let dies = self.last_use[r.0].0 == at;
        let rows = self.rows_of(r);
        (same_rate && !input && dies && rows.kind == self.rows_kind(t)).then_some(rows)
    }

    /// Whether the GEMM `t`, whose operand is to be of `kind`, can go on where the last step is: because that step has made
    /// the operand already, or because it makes what `t` reads, for nobody else.
    pub(super) fn joins(&self, t: Tensor, kind: OperandKind) -> Option<Join> {
        let Node::Gemm { x, weight, factors, filter, border, .. } = self.network.nodes[t.0] else {
            return None;
        };
        let step = self.steps.last()?;
        let Op::Bands(bands) = &step.op else { return None };
        let rate = |t: Tensor| self.network.values[t.0].rate;
        let total = self.weight_bytes(&step.weights) + self.weight_bytes(&[weight]);
        let made_by = |t: Tensor| {
            let rows = self.rows[t.0]?.buf;
            // A sum that goes where its residual was is whole: it can't be local.
            bands.ops.iter().find(|op| match op {
                BandOp::Gemm { out, residual, .. } => {
                    out.buf == rows && !matches!(residual, ResidualSpec::InPlace)
                }
                _ => false,
            })
        };
        if total > self.options.step_weight_bytes {
            return None;
        }
        // The step's own rate: that of its GEMMs.
        let last = Tensor(*self.step_nodes().last()?);
        if rate(last) != rate(t) {
            return None;
        }
        let Node::Gemm { x: last_x, filter: last_filter, border: last_border, .. } =
            self.network.nodes[last.0]
        else {
            return None;
        };
        if bands.ops.iter().any(|op| matches!(op, BandOp::Sums { .. }))
            || bands.local.iter().any(|(rows, _)| self.rows.iter().flatten().all(|r| r.buf != rows.buf))
        {
            return None; // a chain
        }
        if filter == Filter::POINT
            && last_filter == Filter::POINT
            && self.last_use[x.0].1 == 1
            && made_by(x).is_some()
        {
            return self.rows[x.0].map(Join::Inner);
        }
        let same = last_x == x && last_filter == filter && last_border == border;
        let (operand, its_factors) = bands.ops.iter().rev().find_map(|op| match op {
            BandOp::Pass { out, factors, .. } => Some((*out, *factors)),
            _ => None,
        })?;
        (same && operand.kind == kind && its_factors == factors).then_some(Join::Operand(operand))
    }

    /// The GEMM nodes of the last step, by the buffers they write.
    fn step_nodes(&self) -> Vec<usize> {
        let Some(Step { op: Op::Bands(bands), .. }) = self.steps.last() else { return vec![] };
        let outs = bands.ops.iter().filter_map(|op| match op {
            BandOp::Gemm { weight, .. } => Some(*weight),
            _ => None,
        });
        let node = |w: usize| {
            self.network.nodes.iter().position(|n| matches!(n, Node::Gemm { weight, .. } if *weight == w))
        };
        outs.filter_map(node).collect()
    }
}
