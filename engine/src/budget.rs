//! What a run will hold in memory, decided before it begins: which plan each network gets, which weights stay and which are
//! read again in every pass.
//!
//! The networks hold memory one after the other, so the peak is that of the neediest. A network's share is its arena, the
//! weights that stay, and the largest step's weights where some don't.
#![forbid(unsafe_code)]

use crate::card::Card;
use crate::error::{Error, Result};
use crate::graph::weight::{Stored, WeightSpec};
use crate::graph::{Network, Options, Plan, Rate};
use crate::models::{Part, TIMESTEPS, UnetInput, clip, unet, vae_decoder, vae_encoder};
use crate::pipeline::Settings;
use crate::precision::Precision;

/// What the program itself comes to hold beside arena and weights: code, stacks, scratch memory, what the allocator keeps.
const SLACK_BYTES: u64 = 12 << 20;
/// What the tokenizer holds while it is there.
const TOKENIZER_BYTES: u64 = 12 << 20;
/// A step may hold so much more at either end of its weights.
const FAULT_BYTES: u64 = crate::format::FAULT_BYTES as u64;
/// Multiplications and additions of a step for each byte of weights, from which on meeting these twice is a small part of the
/// time: of the order of what a core does while it reads a byte is some hundred.
const OPERATIONS_PER_BYTE: u64 = 4000;
/// What a process holds at its start differs so much from one to the next: a budget that is named as enough has it.
const START_BYTES: u64 = 2 << 20;
/// Memory that is left to others where no budget is given: a part of what is free, at least this.
const MARGIN_BYTES: u64 = 128 << 20;

/// One network of a run.
#[derive(Clone, Debug)]
pub struct PartPlan {
    /// Which one.
    pub part: Part,
    /// Its steps and their arena.
    pub plan: Plan,
    /// Copies of what depends on the prompt: 2 where the guidance passes take turns.
    pub banks: usize,
    /// For each step, whether its weights stay in memory.
    pub resident: Vec<bool>,
    /// Weights that stay, and what the largest step holds of those that don't.
    pub resident_bytes: u64,
    /// See `resident_bytes`.
    pub window_bytes: u64,
    /// Weights that are read again in every pass; of a network that has one pass, those that don't stay.
    pub streamed_bytes: u64,
}

impl PartPlan {
    /// Bytes of the arena.
    pub fn arena_bytes(&self) -> u64 {
        self.plan.arena_bytes(self.banks) as u64
    }

    /// Everything it holds.
    pub fn bytes(&self) -> u64 {
        self.arena_bytes() + self.resident_bytes + self.window_bytes
    }

    /// Whether all weights stay.
    pub fn is_resident(&self) -> bool {
        self.resident.iter().all(|&r| r)
    }
}

/// The networks of a run, in the order in which it needs them.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    /// What the process may hold.
    pub budget: u64,
    /// What it will hold at most.
    pub predicted_peak: u64,
    /// The networks.
    pub parts: Vec<PartPlan>,
    /// Whether what one network held stays when the next one runs: there is room for all of it.
    pub keeps: bool,
}

impl MemoryPlan {
    /// The plan of `part`.
    ///
    /// # Panics
    /// Where the run doesn't have it.
    pub fn part(&self, part: Part) -> &PartPlan {
        self.parts.iter().find(|p| p.part == part).unwrap_or_else(|| panic!("the run has a {}", part.name()))
    }
}

/// What a run needs to know of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Rows of latents.
    pub h: usize,
    /// Columns of latents.
    pub w: usize,
    /// Prompts: 2 with guidance, 1 without.
    pub prompts: usize,
    /// Whether a picture is encoded first.
    pub encodes: bool,
}

/// How the weights that a network wants are stored.
pub type StoredAs<'a> = dyn Fn(&[WeightSpec]) -> Result<Vec<Stored>> + 'a;

/// The budget of `settings`: as given, or what is free on the machine, less a margin.
pub fn budget(settings: &Settings) -> u64 {
    settings.ram.unwrap_or_else(|| {
        let free = crate::memory::available().unwrap_or(u64::MAX / 2);
        let held = crate::memory::resident().unwrap_or(0);
        (free - (free / 10).max(MARGIN_BYTES).min(free / 2)).saturating_add(held)
    })
}

/// Plans a run in `budget`. `stored` says how the weights that a network wants are stored, as [`crate::weights::stored`] does.
pub fn plan(
    card: &Card,
    stored: &StoredAs<'_>,
    settings: &Settings,
    run: Run,
    budget: u64,
) -> Result<MemoryPlan> {
    let held = crate::memory::resident().unwrap_or(0) + SLACK_BYTES;
    let options = |part| Options {
        // Half the traffic and half the arena; beside the error of 8-bit operands that of bf16 sums doesn't show.
        narrow_stream: settings.precision == Precision::Fast && !matches!(part, Part::TextEncoder(_)),
        ..Options::new(settings.precision, settings.isa, settings.threads)
    };
    let mut parts: Vec<(Part, Vec<(Network, usize)>)> = vec![];
    for (i, cfg) in card.text_encoders.iter().enumerate() {
        parts.push((Part::TextEncoder(i), vec![(clip(i, cfg, run.prompts, cfg.output_layer), 1)]));
    }
    let factor = card.vae.factor();
    if run.encodes {
        parts.push((Part::VaeEncoder, vec![(vae_encoder(&card.vae, 1, run.h * factor, run.w * factor), 1)]));
    }
    let tokens = card.text_encoders.first().map_or(77, |c| c.max_position_embeddings);
    let size = UnetInput { batch: 1, h: run.h, w: run.w, tokens, timesteps: TIMESTEPS };
    let passes = |batch| unet(&card.unet, UnetInput { batch, ..size });
    let mut denoisers = vec![(passes(run.prompts), 1)];
    if run.prompts > 1 && takes_turns(&denoisers[0].0, stored, options(Part::Unet))? {
        denoisers.push((passes(1), run.prompts));
    }
    parts.push((Part::Unet, denoisers));
    parts.push((Part::VaeDecoder, vec![(vae_decoder(&card.vae, 1, run.h, run.w), 1)]));

    // With room for everything nothing is given up or read twice.
    let mut whole = vec![];
    for (part, networks) in &parts {
        let (network, banks) = &networks[0];
        let plan = Plan::new(network, &stored(network.weights())?, options(*part));
        whole.push(resident(*part, plan, *banks));
    }
    let weights: u64 = whole.iter().map(|p| p.resident_bytes).sum();
    let arena = whole.iter().map(PartPlan::arena_bytes).max().unwrap_or(0);
    let all = held + TOKENIZER_BYTES + weights + arena;
    if all <= budget {
        return Ok(MemoryPlan { budget, predicted_peak: all, parts: whole, keeps: true });
    }

    let mut planned = vec![];
    let (mut peak, mut needed) = (0, 0);
    for (part, networks) in &parts {
        let extra = if matches!(part, Part::TextEncoder(_)) { TOKENIZER_BYTES } else { 0 };
        let room = budget.saturating_sub(held + extra);
        match fit(*part, networks, stored, options(*part), room)? {
            Ok(fitted) => {
                peak = peak.max(held + extra + fitted.bytes());
                planned.push(fitted);
            }
            Err(smallest) => needed = needed.max(held + extra + smallest),
        }
    }
    if needed > 0 {
        return Err(Error::Ram { budget, needed: needed + START_BYTES });
    }
    Ok(MemoryPlan { budget, predicted_peak: peak, parts: planned, keeps: false })
}

/// Whether the guidance passes may take turns: where that doesn't slow a step down much, though every weight is met twice.
fn takes_turns(together: &Network, stored: &StoredAs<'_>, options: Options) -> Result<bool> {
    let plan = Plan::new(together, &stored(together.weights())?, options);
    Ok(plan.operations() >= OPERATIONS_PER_BYTE * plan.weight_bytes() as u64)
}

/// `plan` with all its weights in memory.
fn resident(part: Part, plan: Plan, banks: usize) -> PartPlan {
    let steps = plan.all_steps().len();
    let resident_bytes = plan.weight_bytes() as u64 + FAULT_BYTES;
    let resident = vec![true; steps];
    PartPlan { part, plan, banks, resident, resident_bytes, window_bytes: 0, streamed_bytes: 0 }
}

/// The first of `networks` (with the banks they need) that runs in `room` bytes; or the bytes that the smallest needs.
fn fit(
    part: Part,
    networks: &[(Network, usize)],
    stored: &StoredAs<'_>,
    options: Options,
    room: u64,
) -> Result<std::result::Result<PartPlan, u64>> {
    let mut smallest = u64::MAX;
    // Values are only made again in the VAE: pictures are what is too large to be kept.
    let picture = matches!(part, Part::VaeDecoder | Part::VaeEncoder);
    let kept = networks.iter().flat_map(|n| [(n, options, false), (n, options.small_bands(), false)]);
    let remade = networks.iter().filter(|_| picture).map(|n| (n, options.small_bands(), true));
    for ((network, banks), options, remake) in kept.chain(remade) {
        let stored = stored(network.weights())?;
        // Steps that make values again read more weights, so a smaller arena may need more.
        let needs = |plan: &Plan| plan.arena_bytes(*banks) as u64 + window(plan, |_| true);
        match Plan::fitting(network, &stored, options, room, remake, needs) {
            Ok(plan) => return Ok(Ok(pin(part, plan, *banks, room))),
            Err(least) => smallest = smallest.min(least),
        }
    }
    Ok(Err(smallest))
}

/// What a step may hold of the weights that don't stay.
fn window(plan: &Plan, streamed: impl Fn(usize) -> bool) -> u64 {
    let steps = (0..plan.all_steps().len()).filter(|&i| streamed(i));
    let largest = steps.map(|i| plan.step_bytes(i) as u64).max().unwrap_or(0);
    largest + if largest > 0 { 4 * FAULT_BYTES } else { 0 }
}

/// Lets weights stay, step by step from the last, while there is room: access is cyclic, so any choice is as good.
fn pin(part: Part, plan: Plan, banks: usize, room: u64) -> PartPlan {
    let arena = plan.arena_bytes(banks) as u64;
    let whole = resident(part, plan, banks);
    if arena + whole.resident_bytes <= room {
        return whole;
    }
    let plan = whole.plan;
    let steps = plan.all_steps().len();
    let mut resident = vec![false; steps];
    let mut resident_bytes = 0;
    let window_bytes = window(&plan, |_| true);
    for i in (0..steps).rev() {
        let bytes = plan.step_bytes(i) as u64 + 2 * FAULT_BYTES;
        if arena + window_bytes + resident_bytes + bytes <= room {
            resident[i] = true;
            resident_bytes += bytes;
        }
    }
    let again = match plan.steps(Rate::Step) {
        none if none.is_empty() => 0..steps,
        pass => pass,
    };
    let streamed_bytes = again.filter(|&i| !resident[i]).map(|i| plan.step_bytes(i) as u64).sum();
    PartPlan { part, plan, banks, resident, resident_bytes, window_bytes, streamed_bytes }
}
