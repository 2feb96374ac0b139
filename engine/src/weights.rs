//! From the names that a network wants to the bytes of a file, and their way into memory and out of it.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::budget::PartPlan;
use crate::error::{Error, Result};
use crate::format::WeightFile;
use crate::graph::weight::{Stored, WeightKind, WeightSpec};
use kernels::Workers;

/// How `file` stores each of `wanted`, after checking that it has them all in the shapes wanted.
pub fn stored(file: &WeightFile, wanted: &[WeightSpec]) -> Result<Vec<Stored>> {
    let each = wanted.iter().map(|spec| {
        let tensor =
            file.tensor(&spec.name).ok_or_else(|| Error::TensorMissing { name: spec.name.clone() })?;
        if tensor.kind != spec.kind {
            return Err(Error::TensorShape { name: spec.name.clone() });
        }
        Ok(Stored {
            encoding: matches!(spec.kind, WeightKind::Matrix { .. }).then_some(tensor.encoding),
            factors: tensor.factors.map(|i| file.tensors()[i].name.clone()),
        })
    });
    each.collect()
}

/// The bytes of each of `wanted`, which are the weights of a plan for what [`stored`] has said.
pub fn bytes<'a>(file: &'a WeightFile, wanted: &[WeightSpec]) -> Vec<&'a [u8]> {
    let find =
        |spec: &WeightSpec| file.tensor(&spec.name).expect("a plan is made for tensors that are there");
    wanted.iter().map(|spec| file.bytes(find(spec))).collect()
}

/// Bytes that the system is asked to read ahead of the step at work.
const AHEAD_BYTES: usize = 64 << 20;
/// Bytes that one thread maps ahead or drops at a time: the system's work on page tables is shared like any other.
const PIECE_BYTES: usize = 1 << 20;

/// The weights of a network on their way through memory: those that don't stay are asked for ahead of the step that reads
/// them, and dropped behind it.
#[derive(Debug)]
pub struct Stream<'f> {
    file: &'f WeightFile,
    workers: &'f Workers,
    /// For each step, where its weights are in the file, in pieces.
    pieces: Vec<Vec<Range<usize>>>,
    /// For each step, whether they stay.
    resident: Vec<bool>,
    /// The first step that has not been asked for.
    asked: AtomicUsize,
}

impl<'f> Stream<'f> {
    /// For the steps of `part`; `workers` share what there is to do for them.
    pub fn new(file: &'f WeightFile, part: &PartPlan, workers: &'f Workers) -> Self {
        let wanted = part.plan.weights();
        let range =
            |&w: &usize| file.tensor(&wanted[w].name).expect("the plan was made for this file").range();
        let pieces = |ranges: Vec<Range<usize>>| merged(ranges).into_iter().flat_map(cut).collect();
        let pieces =
            part.plan.all_steps().iter().map(|s| pieces(s.weights.iter().map(range).collect())).collect();
        Stream { file, workers, pieces, resident: part.resident.clone(), asked: AtomicUsize::new(0) }
    }

    /// Step `i` is about to run, the next one of steps `among` that follow each other in a circle.
    pub fn before(&self, i: usize, among: Range<usize>) {
        let asked = self.asked.load(Ordering::Relaxed);
        let mut next = if among.contains(&asked) && asked > i { asked } else { i + 1 };
        let ahead: usize = self.pieces[i + 1..next.max(i + 1)].iter().flatten().map(|r| r.len()).sum();
        let mut room = AHEAD_BYTES.saturating_sub(ahead);
        while next < among.end && room > 0 {
            if !self.resident[next] {
                let pieces = &self.pieces[next];
                self.workers.for_each(pieces.len(), |i, _| self.file.prefetch(&pieces[i]));
                room = room.saturating_sub(pieces.iter().map(|r| r.len()).sum());
            }
            next += 1;
        }
        self.asked.store(next, Ordering::Relaxed);
    }

    /// Step `i` is done. Fails where the file was cut short.
    pub fn after(&self, i: usize) -> Result<()> {
        if !self.resident[i] {
            let pieces = &self.pieces[i];
            self.workers.for_each(pieces.len(), |i, _| self.file.release(&pieces[i]));
        }
        Ok(self.file.still_there()?)
    }

    /// The run is over: nothing stays.
    pub fn release(&self) {
        self.pieces.iter().flatten().for_each(|range| self.file.release(range));
    }
}

/// Neighbors joined.
fn merged(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_by_key(|r| r.start);
    let mut out: Vec<Range<usize>> = vec![];
    for r in ranges {
        match out.last_mut() {
            Some(last) if r.start <= last.end + 4096 => last.end = last.end.max(r.end),
            _ => out.push(r),
        }
    }
    out
}

/// The pieces of `range`.
fn cut(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(PIECE_BYTES).map(move |start| start..range.end.min(start + PIECE_BYTES))
}
