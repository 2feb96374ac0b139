//! `sdfast plan`

use std::fmt::Write;

use engine::budget::{self, MemoryPlan, PartPlan, Run};
use engine::card::{Card, Family};
use engine::format::ModelFile;
use engine::graph::weight::WeightSpec;
use engine::pipeline::{Memory, Request};
use engine::weights;
use serde::Serialize;

use crate::args::Plan;
use crate::failure::Result;
use crate::output::Output;
use crate::{model, size, terminal};

/// `plan --json`
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    model: Model,
    memory: Memory,
    parts: Vec<Part>,
}

#[derive(Debug, Serialize)]
struct Model {
    family: Family,
    quant: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    file_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Part {
    name: &'static str,
    arena_bytes: u64,
    weights_bytes: u64,
    weights_resident_bytes: u64,
    bytes_read_per_pass: u64,
    /// Bands of the step that is cut into most.
    tiles: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    layers: Vec<Layer>,
}

#[derive(Debug, Serialize)]
struct Layer {
    name: String,
    kind: &'static str,
    weights_bytes: usize,
    resident: bool,
    operations: u64,
    tiles: usize,
}

pub(crate) fn run(arguments: &Plan) -> Result<()> {
    let settings = model::settings(&arguments.machine)?;
    let (card, file): (Card, Option<ModelFile>) = match &arguments.family {
        Some(name) => (model::published(name)?, None),
        None => {
            let (file, _) = model::open(arguments.model.as_deref())?;
            (file.card().clone(), Some(file))
        }
    };
    let vae = model::open_vae(arguments.vae.as_deref())?;
    let card = match &vae {
        Some(vae) => card.with_vae(&vae.file.card().vae)?,
        None => card,
    };
    let mut request = Request::new("", &card);
    request.width = arguments.width.unwrap_or(request.width);
    request.height = arguments.height.unwrap_or(request.height);
    request.guidance_scale = arguments.cfg.unwrap_or(request.guidance_scale);
    request.validate(&card)?;
    let [_, h, w] = request.latents_shape(&card);
    let prompts = if request.guidance_scale == 1.0 { 1 } else { 2 };
    let quant = arguments.quant.into();
    let stored = |wanted: &[WeightSpec]| {
        let of_vae = wanted.first().is_some_and(WeightSpec::is_of_vae);
        match (&vae, &file) {
            (Some(vae), _) if of_vae => weights::stored(&vae.file, wanted),
            (_, Some(file)) => weights::stored(file, wanted),
            (_, None) => Ok(convert::stored(quant, wanted)),
        }
    };
    let run = Run { h, w, prompts, encodes: false };
    let plan = budget::plan(&card, &stored, &settings, run, budget::budget(&settings))?;

    if let Some(path) = &arguments.svg {
        let neediest = plan.parts.iter().max_by_key(|p| p.arena_bytes()).expect("a run has networks");
        Output::new(path.clone())?.write(drawing(neediest).as_bytes())?;
    }
    let verbose = arguments.voice.verbose;
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        model: Model {
            family: card.family,
            quant: file.as_ref().map_or(quant.name(), |f| &f.card().provenance.quant).to_owned(),
            file_bytes: file.as_ref().map(|file| file.file_bytes()),
        },
        memory: Memory { measured_peak_bytes: None, ..Memory::new(&plan) },
        parts: plan.parts.iter().map(|p| part(p, verbose)).collect(),
    };
    if arguments.json {
        terminal::print(&serde_json::to_string_pretty(&report).expect("a report is plain data"));
    } else {
        terminal::print(&text(&report, &plan, &request));
    }
    Ok(())
}

fn part(p: &PartPlan, layers: bool) -> Part {
    let steps = p.plan.all_steps();
    let layer = |i: usize| Layer {
        name: steps[i].path.clone(),
        kind: steps[i].kind(),
        weights_bytes: p.plan.step_bytes(i),
        resident: p.resident[i],
        operations: steps[i].operations(p.plan.weights()),
        tiles: steps[i].tiles(),
    };
    Part {
        name: p.part.name(),
        arena_bytes: p.arena_bytes(),
        weights_bytes: p.plan.weight_bytes() as u64,
        weights_resident_bytes: p.resident_bytes,
        bytes_read_per_pass: p.streamed_bytes * p.banks as u64,
        tiles: steps.iter().map(|s| s.tiles()).max().unwrap_or(1),
        layers: if layers { (0..steps.len()).map(layer).collect() } else { vec![] },
    }
}

fn text(report: &Report, plan: &MemoryPlan, request: &Request) -> String {
    let b = |n: u64| size::bytes(n);
    let mut out = String::new();
    let (width, height) = (request.width, request.height);
    let peak = b(plan.predicted_peak);
    let _ = writeln!(out, "peak {peak} of {} for a picture of {width}x{height}", b(plan.budget));
    let _ = writeln!(
        out,
        "{:<16}{:>11}{:>11}{:>11}{:>13}{:>7}",
        "part", "arena", "weights", "stay", "read a step", "tiles"
    );
    for p in &report.parts {
        let _ = writeln!(
            out,
            "{:<16}{:>11}{:>11}{:>11}{:>13}{:>7}",
            p.name,
            b(p.arena_bytes),
            b(p.weights_bytes),
            b(p.weights_resident_bytes),
            b(p.bytes_read_per_pass),
            p.tiles
        );
        for l in &p.layers {
            let stays = if l.resident || l.weights_bytes == 0 { "" } else { "  read again" };
            let (weights, tiles) = (b(l.weights_bytes as u64), l.tiles);
            let _ = writeln!(out, "  {:<60}{:<10}{weights:>11}{tiles:>5}{stays}", l.name, l.kind);
        }
    }
    if plan.parts.iter().any(|p| p.banks > 1) {
        let _ = writeln!(out, "the two guidance passes take turns");
    }
    out.trim_end().to_owned()
}

/// The arena of `p` as a picture: time from left to right, addresses from bottom to top, a box for each buffer.
fn drawing(p: &PartPlan) -> String {
    let (width, height, margin) = (1200.0, 600.0, 80.0);
    let steps = p.plan.all_steps();
    let bytes = (p.plan.arena_bytes(1) as f64).max(1.0);
    let x_of = |step: usize| margin + width * step as f64 / (steps.len() + 1) as f64;
    let y_of = |offset: usize| margin + height * (1.0 - offset as f64 / bytes);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" font-size=\"14\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{margin}\" y=\"44\" font-size=\"20\">The arena of the {}: {} over {} steps</text>\n",
        width + 2.0 * margin,
        height + 2.0 * margin,
        p.part.name(),
        size::bytes(bytes as u64),
        steps.len(),
    );
    let label = |x: f64, y: f64, anchor: &str, text: &str| {
        format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"12\">{text}</text>\n")
    };
    let (mut boxes, mut labels) = (String::new(), String::new());
    for (i, (region, first, last)) in p.plan.buffers().enumerate() {
        let (x, w) = (x_of(first), x_of(last + 1) - x_of(first));
        let (y, h) = (y_of(region.offset + region.bytes), height * region.bytes as f64 / bytes);
        let (hue, held) = (i * 47 % 360, size::bytes(region.bytes as u64));
        let _ = writeln!(
            boxes,
            "<rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{w:.2}\" height=\"{h:.2}\" fill=\"hsl({hue},60%,75%)\" \
             stroke=\"white\" stroke-width=\"0.3\"><title>{held} at {}, steps {first} to {last}</title></rect>",
            region.offset,
        );
        // Only where it can be read.
        if w > 8.0 * held.len() as f64 && h > 16.0 {
            labels += &label(x + w / 2.0, y + h / 2.0 + 4.0, "middle", &held);
        }
    }
    for quarter in 0..=4 {
        let at = p.plan.arena_bytes(1) / 4 * quarter;
        labels += &label(margin - 8.0, y_of(at) + 4.0, "end", &size::bytes(at as u64));
    }
    // Below: which block the steps belong to, by the first two names behind the network's.
    let block = |i: usize| {
        let names = steps[i].path.split('.').skip(1).filter(|name| !["decoder", "encoder"].contains(name));
        names.take(2).collect::<Vec<_>>().join(".")
    };
    let mut first = 0;
    for i in 1..=steps.len() {
        if i < steps.len() && block(i) == block(first) {
            continue;
        }
        let (name, x) = (block(first), x_of(first));
        let _ = writeln!(
            boxes,
            "<line x1=\"{x:.1}\" y1=\"{0}\" x2=\"{x:.1}\" y2=\"{1}\" stroke=\"black\"/>",
            margin + height,
            margin + height + 6.0
        );
        if x_of(i) - x > 7.0 * name.len() as f64 {
            labels += &label((x + x_of(i)) / 2.0, margin + height + 20.0, "middle", &name);
        }
        first = i;
    }
    let _ = writeln!(
        out,
        "{boxes}<rect x=\"{margin}\" y=\"{margin}\" width=\"{width}\" height=\"{height}\" fill=\"none\" stroke=\"black\"/>\n\
         {labels}</svg>",
    );
    out
}
