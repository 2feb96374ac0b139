//! A network lowered: steps over one arena, with a place for every buffer.
#![forbid(unsafe_code)]

use kernels::layout::Encoding;

use super::analysis::can_be_remade;
use super::arena::{Life, Region, place};
use super::builder::{Network, Rate, Tensor};
use super::lower::{Lowered, Options, lower};
use super::steps::{Buf, Op, RowsBuf, Step};
use super::weight::{Stored, WeightKind, WeightSpec};

/// A network lowered for a precision and the encodings of a file: steps over one arena.
///
/// The arena begins with `banks` copies of what outlives a step (values of rate [`Rate::Run`] that steps read), so that the
/// two guidance passes can take turns; the rest is shared.
#[derive(Clone, Debug)]
pub struct Plan {
    steps: Vec<Step>,
    /// Steps before this one run once per run and bank.
    prologue: usize,
    weights: Vec<WeightSpec>,
    encodings: Vec<Option<Encoding>>,
    inputs: Vec<(String, RowsBuf, Rate)>,
    outputs: Vec<(String, RowsBuf)>,
    /// Values that are kept as a whole.
    rows: Vec<(Tensor, RowsBuf)>,
    lives: Vec<Life>,
    regions: Vec<Region>,
    persistent: Vec<bool>,
    persistent_bytes: usize,
    transient_bytes: usize,
}

impl Plan {
    /// Lowers `network` and gives every buffer a place. `stored` says of each of its weights how it is kept.
    ///
    /// # Panics
    /// Where `stored` is not as long as the list of weights, or a matrix has no encoding.
    pub fn new(network: &Network, stored: &[Stored], options: Options) -> Plan {
        let (network, encodings) = network.stored(stored);
        Plan::remaking(&network, &encodings, options, &[])
    }

    /// As [`Plan::new`], where what it `needs` is at most `room`; otherwise the least that any of these plans needs. With
    /// `remake`, values are made again by each of their readers, band by band, in place of being kept as a whole, as few and
    /// as small as it takes. The result is the same.
    pub fn fitting(
        network: &Network,
        stored: &[Stored],
        options: Options,
        room: u64,
        remake: bool,
        needs: impl Fn(&Plan) -> u64,
    ) -> Result<Plan, u64> {
        let (network, encodings) = network.stored(stored);
        let (mut remade, mut least) = (vec![], u64::MAX);
        loop {
            let plan = Plan::remaking(&network, &encodings, options, &remade);
            let needed = needs(&plan);
            if needed <= room {
                return Ok(plan);
            }
            least = least.min(needed);
            remade.push(plan.largest_at_peak(&network).filter(|_| remake).ok_or(least)?);
        }
    }

    /// Of the values that are in memory when most is, the largest that could be made again.
    fn largest_at_peak(&self, network: &Network) -> Option<Tensor> {
        let held = |at: usize| self.lives.iter().filter(move |l| l.first <= at && at <= l.last);
        let peak = (0..=self.steps.len()).max_by_key(|&at| held(at).map(|l| l.bytes).sum::<usize>())?;
        let there = |buf: Buf| self.lives[buf].first <= peak && peak <= self.lives[buf].last;
        let whole = self.rows.iter().filter(|(t, r)| there(r.buf) && can_be_remade(network, *t));
        let (t, _) = whole.max_by_key(|(_, r)| self.lives[r.buf].bytes)?;
        Some(*t)
    }

    fn remaking(
        network: &Network,
        encodings: &[Option<Encoding>],
        options: Options,
        remade: &[Tensor],
    ) -> Plan {
        let Lowered { steps, prologue, bytes, inputs, outputs, rows } =
            lower(network, encodings, options, remade);
        let lives = lives(&steps, prologue, &bytes, &inputs, &outputs);
        // What the prologue leaves for the steps outlives them all, in a part of the arena of its own.
        let persistent: Vec<bool> = lives.iter().map(|l| l.first < prologue && l.last >= prologue).collect();
        let mut regions = vec![Region::default(); lives.len()];
        let mut sizes = [0; 2];
        for keep in [false, true] {
            let ids: Vec<usize> = (0..lives.len()).filter(|&i| persistent[i] == keep).collect();
            let whole = |l: Life| if keep { Life { first: 0, last: steps.len(), ..l } } else { l };
            let (places, total) = place(&ids.iter().map(|&i| whole(lives[i].clone())).collect::<Vec<_>>());
            for (&i, r) in ids.iter().zip(places) {
                regions[i] = r;
            }
            sizes[keep as usize] = total;
        }
        Plan {
            steps,
            prologue,
            weights: network.weights().to_vec(),
            encodings: encodings.to_vec(),
            inputs,
            outputs,
            rows,
            lives,
            regions,
            persistent,
            persistent_bytes: sizes[1].next_multiple_of(4096),
            transient_bytes: sizes[0],
        }
    }

    /// All steps.
    pub fn all_steps(&self) -> &[Step] {
        &self.steps
    }

    /// Bytes of weights that step `i` reads; of tables, what its rows take where the system maps files in pieces of 64 KiB.
    pub fn step_bytes(&self, i: usize) -> usize {
        let bytes = |&w: &usize| match (self.weights[w].kind, &self.steps[i].op) {
            (WeightKind::Table { .. }, Op::Lookup { ids, .. }) => {
                self.stored_bytes(w).min(self.regions[*ids].bytes / 4 * (64 << 10))
            }
            _ => self.stored_bytes(w).next_multiple_of(4096),
        };
        self.steps[i].weights.iter().map(bytes).sum()
    }

    /// Steps that run once per run and bank, then the steps of every pass.
    pub fn steps(&self) -> (&[Step], &[Step]) {
        self.steps.split_at(self.prologue)
    }

    /// The weights, in the order in which steps first meet them, with the vectors of factors.
    pub fn weights(&self) -> &[WeightSpec] {
        &self.weights
    }

    /// The encodings the plan was made for.
    pub fn encodings(&self) -> &[Option<Encoding>] {
        &self.encodings
    }

    /// Bytes of the arena with `banks` copies of what outlives a step.
    pub fn arena_bytes(&self, banks: usize) -> usize {
        banks * self.persistent_bytes + self.transient_bytes
    }

    /// Every buffer of the arena (of one bank), for a drawing: its place, and the first and the last step at which it holds
    /// something.
    pub fn buffers(&self) -> impl Iterator<Item = (Region, usize, usize)> + '_ {
        let used = (0..self.lives.len())
            .filter(|&i| self.lives[i].bytes > 0 && self.lives[i].first <= self.lives[i].last);
        used.map(|i| {
            let (first, last) = (self.lives[i].first, self.lives[i].last);
            if self.persistent[i] {
                (self.region(i, 0, 1), 0, self.steps.len())
            } else {
                (self.region(i, 0, 1), first, last)
            }
        })
    }

    /// Where `buf` lies for `bank` of `banks`.
    pub(super) fn region(&self, buf: Buf, bank: usize, banks: usize) -> Region {
        let r = self.regions[buf];
        let copies = if self.persistent[buf] { bank } else { banks };
        Region { offset: copies * self.persistent_bytes + r.offset, bytes: r.bytes }
    }

    pub(super) fn input(&self, name: &str) -> Option<RowsBuf> {
        self.inputs.iter().find(|(n, ..)| n == name).map(|(_, r, _)| *r)
    }

    pub(super) fn output(&self, name: &str) -> Option<RowsBuf> {
        self.outputs.iter().find(|(n, ..)| n == name).map(|(_, r)| *r)
    }

    /// Bytes of all weights as stored.
    pub fn weight_bytes(&self) -> usize {
        (0..self.weights.len()).map(|i| self.stored_bytes(i)).sum()
    }

    /// Bytes of weight `i` as stored.
    pub fn stored_bytes(&self, i: usize) -> usize {
        match self.weights[i].kind {
            WeightKind::Vector { len, order } => order.stored(len) * 4,
            WeightKind::Table { rows, cols } => rows * cols * 2,
            kind @ WeightKind::Matrix { .. } => {
                let shape = kind.shape().expect("a matrix has a shape");
                shape.bytes(self.encodings[i].expect("a matrix has an encoding"))
            }
        }
    }
}

/// The first and the last step at which each buffer holds something. Inputs are written before the first step of their
/// rate, outputs are read after the last step.
fn lives(
    steps: &[Step],
    prologue: usize,
    bytes: &[usize],
    inputs: &[(String, RowsBuf, Rate)],
    outputs: &[(String, RowsBuf)],
) -> Vec<Life> {
    let mut lives: Vec<Life> =
        bytes.iter().map(|&bytes| Life { bytes, first: usize::MAX, last: 0 }).collect();
    let mut touch = |buf: Buf, at: usize| {
        lives[buf].first = lives[buf].first.min(at);
        lives[buf].last = lives[buf].last.max(at);
    };
    for (i, step) in steps.iter().enumerate() {
        let (reads, writes) = step.op.buffers();
        reads.into_iter().chain(writes).for_each(|buf| touch(buf, i));
    }
    for (_, rows, rate) in inputs {
        touch(rows.buf, if *rate == Rate::Run { 0 } else { prologue });
    }
    for (_, rows) in outputs {
        touch(rows.buf, steps.len());
    }
    lives
}
