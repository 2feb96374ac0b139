//! What the lowering has to know of a network's values before it begins.
#![forbid(unsafe_code)]

use super::network::{Network, Node, Tensor};

/// Values that stay f32 in every precision: what the caller writes and reads, what is added to whole images, and, unless it is
/// `narrow`, the residual stream: sums that go on through many layers and what is added to them.
pub(super) fn stream_values(network: &Network, narrow: bool) -> Vec<bool> {
    let mut stream = vec![false; network.values.len()];
    for (i, node) in network.nodes.iter().enumerate() {
        match *node {
            Node::Input { .. } | Node::Lookup { .. } => stream[i] = true,
            Node::Gemm { residual, image_bias, .. } => {
                for t in [residual.filter(|_| !narrow), image_bias].into_iter().flatten() {
                    stream[t.0] = true;
                }
                stream[i] |= residual.is_some() && !narrow;
            }
            _ => {}
        }
    }
    for (_, t) in &network.outputs {
        stream[t.0] = true;
    }
    // Copies are like what they are copied from.
    for (i, node) in network.nodes.iter().enumerate().rev() {
        if let Node::Resize { x } | Node::AtTimestep { x } = *node {
            stream[x.0] |= stream[i];
        }
    }
    stream
}

/// For each value, the place in execution order of the last node that reads it, and whether only that one does. Norms,
/// activations, concatenations and values of `remade` read when their readers do. Outputs are read at the end.
pub(super) fn last_uses(network: &Network, remade: &[Tensor]) -> Vec<(usize, usize)> {
    let reads_later = |i: usize| match network.nodes[i] {
        Node::GroupNorm { .. } | Node::LayerNorm { .. } | Node::Activate { .. } | Node::Concat { .. } => true,
        _ => remade.contains(&Tensor(i)),
    };
    let mut uses = vec![(0, 0); network.values.len()]; // (last, readers)
    let mut visit = |t: Tensor, at: usize| {
        let mut open = vec![t];
        while let Some(t) = open.pop() {
            let (last, readers) = uses[t.0];
            uses[t.0] = (last.max(at), readers + 1);
            if reads_later(t.0) {
                open.extend(network.nodes[t.0].inputs());
            }
        }
    };
    for (at, i) in network.order().enumerate() {
        if !reads_later(i) {
            network.nodes[i].inputs().into_iter().for_each(|t| visit(t, at));
        }
    }
    for (_, t) in &network.outputs {
        visit(*t, usize::MAX);
    }
    uses
}

/// Whether `t` may be made again by each of its readers: a GEMM that only GEMMs read, past norms and concatenations.
pub(super) fn can_be_remade(network: &Network, t: Tensor) -> bool {
    fn read_by_gemms(network: &Network, t: Tensor) -> bool {
        let readers = (0..network.nodes.len()).filter(|&i| network.nodes[i].inputs().contains(&t));
        !network.outputs.iter().any(|(_, o)| *o == t)
            && readers.into_iter().all(|i| match &network.nodes[i] {
                Node::Gemm { image_bias, .. } => *image_bias != Some(t),
                Node::GroupNorm { .. } | Node::LayerNorm { .. } | Node::Concat { .. } => {
                    read_by_gemms(network, Tensor(i))
                }
                _ => false,
            })
    }
    matches!(network.nodes[t.0], Node::Gemm { .. }) && read_by_gemms(network, t)
}
