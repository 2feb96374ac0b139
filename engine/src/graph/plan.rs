//! A network lowered: steps over one arena, with a place for every buffer.
#![forbid(unsafe_code)]

use std::ops::Range;

use kernels::layout::Encoding;

use super::analysis::can_be_remade;
use super::arena::{Life, Region, place};
use super::lower::{Lowered, Options, lower};
use super::network::{Network, Rate, Tensor};
use super::steps::{Buf, Op, RowsBuf, Step};
use super::weight::{Stored, WeightKind, WeightSpec};

/// How many times the work of a network making values again may come to.
const MOST_WORK: u64 = 4;
/// Parts of what a network holds, at which [`Plan::fitting`] aims.
const AIMS: [(usize, usize); 9] = [(7, 8), (3, 4), (5, 8), (1, 2), (3, 8), (1, 3), (1, 4), (1, 8), (0, 1)];

/// A network lowered for a precision and the encodings of a file: steps over one arena.
///
/// The arena begins with `banks` copies of what outlives a step (values of rates [`Rate::Run`] and [`Rate::Schedule`] that later
/// steps read), so that the two guidance passes can take turns; the rest is shared.
#[derive(Clone, Debug)]
pub struct Plan {
    steps: Vec<Step>,
    /// Steps before the first run once per run and bank, those before the second once for a number of timesteps.
    ends: [usize; 2],
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
    /// `remake`, values are made again by each of their readers, band by band, in place of being kept as a whole: those that
    /// cost the least work for the memory they free, as long as it all stays below four times the work. The result is the same.
    pub fn fitting(
        network: &Network,
        stored: &[Stored],
        options: Options,
        room: u64,
        remake: bool,
        needs: impl Fn(&Plan) -> u64,
    ) -> Result<Plan, u64> {
        let (network, encodings) = network.stored(stored);
        let network = &network;
        let planned = |remade: &[Tensor]| Plan::remaking(network, &encodings, options, remade);
        let whole = planned(&[]);
        let least = needs(&whole);
        if least <= room {
            return Ok(whole);
        }
        if !remake {
            return Err(least);
        }
        // Gives up values until the rest fits; aims at so many bytes of arena.
        let search = |aim: usize| -> Result<Plan, u64> {
            let (mut plan, mut remade, mut least) = (whole.clone(), vec![], least);
            while least > room {
                let without = |t| planned(&[&remade[..], &[t]].concat());
                let (t, next) = plan.without_one(network, aim, without).ok_or(least)?;
                if next.operations() > MOST_WORK * whole.operations() {
                    return Err(least);
                }
                remade.push(t);
                plan = next;
                least = least.min(needs(&plan));
            }
            // Some that were given up early may not be in the way of the others.
            for t in remade.clone() {
                let fewer: Vec<Tensor> = remade.iter().copied().filter(|&other| other != t).collect();
                let tried = planned(&fewer);
                if needs(&tried) <= room && tried.operations() <= plan.operations() {
                    (plan, remade) = (tried, fewer);
                }
            }
            Ok(plan)
        };
        // A choice that looks well at first may lead nowhere, and aiming at something else takes another way. The aims don't
        // depend on the room, so that what is said to be needed is enough and nothing less is; the one that suits it goes first.
        let target = whole.transient_bytes.saturating_sub((least - room) as usize);
        let mut aims = AIMS.map(|(part, of)| whole.transient_bytes / of * part);
        aims.sort_by_key(|aim| aim.abs_diff(target));
        let mut needed = least;
        for aim in aims {
            match search(aim) {
                Ok(plan) => return Ok(plan),
                Err(least) => needed = needed.min(least),
            }
        }
        Err(needed)
    }

    /// The value whose making again costs the least work for what it frees of the bytes held beyond `target`, or frees the
    /// most where all cost more than they free, and the plan that `planned` gives without it.
    fn without_one(
        &self,
        network: &Network,
        target: usize,
        planned: impl Fn(Tensor) -> Plan,
    ) -> Option<(Tensor, Plan)> {
        let (excess, operations) = (self.excess(target) as f64, self.operations() as f64);
        let rank = |tried: &Plan| {
            let freed = excess - tried.excess(target) as f64;
            let cost = tried.operations() as f64 - operations;
            if freed > 0.0 { (0, cost / freed) } else { (1, -freed) }
        };
        let tried = self.held_beyond(target).filter(|t| can_be_remade(network, *t)).map(|t| {
            let plan = planned(t);
            (rank(&plan), t, plan)
        });
        let best = tried.min_by(|((a, x), ..), ((b, y), ..)| a.cmp(b).then(x.total_cmp(y)));
        best.map(|(_, t, plan)| (t, plan))
    }

    /// Bytes that are held at each step, and after the last.
    fn held(&self) -> Vec<usize> {
        let mut change = vec![0isize; self.steps.len() + 2];
        for life in self.lives.iter().filter(|l| l.first <= l.last) {
            change[life.first] += life.bytes as isize;
            change[life.last + 1] -= life.bytes as isize;
        }
        let sum = |held: &mut isize, change: &isize| {
            *held += change;
            Some(*held as usize)
        };
        change[..=self.steps.len()].iter().scan(0, sum).collect()
    }

    /// Bytes that are held beyond `target`, added up over all steps.
    fn excess(&self, target: usize) -> usize {
        self.held().into_iter().map(|held| held.saturating_sub(target)).sum()
    }

    /// The values that are in memory, as a whole, when more than `target` is.
    fn held_beyond(&self, target: usize) -> impl Iterator<Item = Tensor> {
        let held = self.held();
        let beyond = |r: &RowsBuf| {
            let life = &self.lives[r.buf];
            life.first <= life.last && held[life.first..=life.last].iter().any(|&held| held > target)
        };
        self.rows.iter().filter(|(_, r)| beyond(r)).map(|(t, _)| *t).collect::<Vec<_>>().into_iter()
    }

    /// Multiplications and additions of all steps.
    pub fn operations(&self) -> u64 {
        self.steps.iter().map(|s| s.operations(&self.weights)).sum()
    }

    fn remaking(
        network: &Network,
        encodings: &[Option<Encoding>],
        options: Options,
        remade: &[Tensor],
    ) -> Plan {
        let Lowered { steps, ends, bytes, inputs, outputs, rows } =
            lower(network, encodings, options, remade);
        let lives = lives(&steps, ends, &bytes, &inputs, &outputs);
        // What steps leave for those of another rate outlives them all, in a part of the arena of its own.
        let outlives = |l: &Life| ends.iter().any(|&end| l.first < end && l.last >= end);
        let persistent: Vec<bool> = lives.iter().map(outlives).collect();
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
            ends,
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

    /// The steps of `rate`, places in [`Plan::all_steps`].
    pub fn steps(&self, rate: Rate) -> Range<usize> {
        let [run, schedule] = self.ends;
        match rate {
            Rate::Run => 0..run,
            Rate::Schedule => run..schedule,
            Rate::Step => schedule..self.steps.len(),
        }
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
    [run, schedule]: [usize; 2],
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
        let first = match rate {
            Rate::Run => 0,
            Rate::Schedule => run,
            Rate::Step => schedule,
        };
        touch(rows.buf, first);
    }
    for (_, rows) in outputs {
        touch(rows.buf, steps.len());
    }
    lives
}
