//! A `.sdq` file with no checkpoint before it: the true sizes and encodings, made-up weights.
#![forbid(unsafe_code)]

use std::path::Path;

use engine::card::{Card, Provenance};
use engine::format::{Layout, Tokenizer, Writer};
use engine::graph::weight::{Stored, WeightKind, WeightSpec};
use half::f16;
use kernels::layout::Encoding;
use kernels::quantize;
use rayon::prelude::*;

use super::Tensor;
use crate::error::Error;
use crate::policy::{Policy, Quant};
use crate::tokenizer;

/// Writes a model of `card` as a conversion would, to `output`, which appears complete or not at all. `values` is asked for
/// as many numbers as are stored of each tensor; matrices come as `[outputs, taps * inputs]`. `progress` is told the bytes
/// that are done and all of them, and stops the work by `false`.
pub fn write_model(
    card: &Card,
    quant: Quant,
    values: &(dyn Fn(&Tensor) -> Vec<f32> + Sync),
    output: &Path,
    progress: &(dyn Fn(u64, u64) -> bool + Sync),
) -> Result<u64, Error> {
    let converter = format!("synthetic {}", env!("CARGO_PKG_VERSION"));
    let provenance = Provenance { converter, quant: quant.name().into() };
    let card = Card { provenance, ..card.clone() };
    let policy = Policy::new(quant, &[])?;
    let parts: Vec<(&str, Vec<(WeightSpec, Stored)>)> = engine::models::weights(&card)
        .into_iter()
        .map(|(part, specs)| {
            let stored = policy.stored(part.name(), &specs);
            (part.name(), specs.into_iter().zip(stored).collect())
        })
        .collect();
    let files = tokenizer::choose(None);
    let layout = Layout::new(&card, Tokenizer { vocab: &files.vocab, merges: &files.merges }, &parts)?;
    let total = layout.tensors().iter().map(|t| t.len).sum();
    let writer = Writer::create(output, layout)?;
    let done = std::sync::atomic::AtomicU64::new(0);
    let specs: Vec<&WeightSpec> = parts.iter().flat_map(|(_, specs)| specs).map(|(spec, _)| spec).collect();
    specs.par_iter().enumerate().try_for_each(|(i, spec)| {
        let (len, encoding) = (writer.layout().tensors()[i].len, writer.layout().tensors()[i].encoding);
        writer.write(i, &encode(spec, encoding, len as usize, values))?;
        let before = done.fetch_add(len, std::sync::atomic::Ordering::Relaxed);
        if progress(before + len, total) { Ok(()) } else { Err(Error::Stopped) }
    })?;
    Ok(writer.finish()?)
}

/// The bytes of a tensor as stored.
fn encode(
    spec: &WeightSpec,
    encoding: Encoding,
    len: usize,
    values: &dyn Fn(&Tensor) -> Vec<f32>,
) -> Vec<u8> {
    let ask = |shape: Vec<usize>| values(&Tensor { name: spec.name.clone(), shape, role: spec.role });
    match spec.kind {
        WeightKind::Matrix { n, order, .. } => {
            let shape = spec.kind.shape().expect("a matrix has a shape");
            let row = shape.taps * shape.k;
            let mut numbers = ask(vec![shape.n, row]);
            for (i, numbers) in numbers.chunks_exact_mut(row).enumerate() {
                if order.source(n, i).is_none() {
                    numbers.fill(0.0);
                }
            }
            let mut bytes = vec![0; len];
            quantize::encode(encoding, shape, &numbers, &mut bytes);
            bytes
        }
        WeightKind::Vector { len, order } => {
            let numbers = ask(vec![order.stored(len)]);
            numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
        }
        WeightKind::Table { rows, cols } => {
            ask(vec![rows, cols]).iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect()
        }
    }
}
