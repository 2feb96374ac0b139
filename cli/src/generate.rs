//! `sdfast gen`

use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use engine::card::Card;
use engine::pipeline::{Picture, Request};

use crate::args::Gen;
use crate::failure::Result;
use crate::output::Output;
use crate::parameters::Names;
use crate::progress::{Level, PictureProgress};
use crate::report::{Generated, Image, to_json};
use crate::{interrupt, latents, model, parameters, picture, profile, size, terminal};

pub(crate) fn run(arguments: &Gen) -> Result<()> {
    let start = Instant::now();
    let level = Level::from(arguments.voice);
    let (file, name) = model::open(arguments.model.as_deref())?;
    let vae = model::open_vae(arguments.vae.as_deref())?;
    let names = Names { model: name, vae: vae.as_ref().map(|vae| vae.name.clone()) };
    let pipeline = model::pipeline(file, vae, model::settings(&arguments.machine)?)?;
    let requests = requests(arguments, pipeline.card())?;
    let outputs = outputs(arguments, &requests)?;
    let latents_out = arguments.latents_out.clone().map(Output::new).transpose()?;
    let settings = pipeline.settings();
    level.detail(&format!(
        "model {}, {} threads, {}, {}, memory: {}",
        names.model,
        settings.threads,
        settings.isa.name(),
        settings.precision,
        model::ram_text(settings.ram)
    ));

    let mut report = Generated::new(&pipeline, names.vae.clone());
    let (pipeline, profile) = profile::watch(pipeline, &arguments.profiling)?;
    let opened = start.elapsed().as_secs_f64();
    for (request, output) in requests.iter().zip(&outputs) {
        let mut progress = PictureProgress::new(level, &format!("seed {}", request.seed), request.steps);
        let mut made = pipeline.generate(request, &mut |event| {
            progress.on(&event);
            interrupt::control()
        })?;
        drop(progress);
        made.timings.total_s += opened - made.timings.open_s;
        made.timings.open_s = opened;
        output.write(&picture::encode(&made, parameters::text(request, &names)))?;
        if let Some(latents_out) = &latents_out {
            latents_out.write(&latents::encode(&made.latents))?;
        }
        let path = output.path().display().to_string();
        if !arguments.json {
            terminal::print(&path);
        }
        level.say(&summary(&made, request));
        let image = Image { path, seed: request.seed, width: made.width, height: made.height };
        report.add(image, &made.timings, &made.memory);
    }
    profile.write(&pipeline)?;
    if arguments.json {
        terminal::print(&to_json(&report));
    }
    Ok(())
}

/// One for each picture, all of which the model can make.
fn requests(arguments: &Gen, card: &Card) -> Result<Vec<Request>> {
    let mut request = Request::new(arguments.prompt.clone(), card);
    let defaults = request.clone();
    request.negative_prompt.clone_from(&arguments.negative);
    request.width = arguments.width.unwrap_or(defaults.width);
    request.height = arguments.height.unwrap_or(defaults.height);
    request.steps = arguments.steps.unwrap_or(defaults.steps);
    request.guidance_scale = arguments.cfg.unwrap_or(defaults.guidance_scale);
    request.sampler = arguments.sampler.clone().unwrap_or(defaults.sampler);
    request.schedule = arguments.schedule.clone().unwrap_or(defaults.schedule);
    request.noise = arguments.rng.into();
    request.init_latents = arguments.latents_in.as_deref().map(latents::read).transpose()?;
    request.validate(card)?;
    let first = arguments.seed.unwrap_or_else(new_seed);
    let with_seed = |i| Request { seed: first.wrapping_add(u64::from(i)), ..request.clone() };
    Ok((0..arguments.count).map(with_seed).collect())
}

/// A seed that torch knows, too: 32 bits.
fn new_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mixed =
        (now.as_nanos() as u64 ^ u64::from(std::process::id()) << 32).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed >> 32
}

fn outputs(arguments: &Gen, requests: &[Request]) -> Result<Vec<Output>> {
    let path = |request: &Request| match &arguments.output {
        Some(path) if requests.len() == 1 => path.clone(),
        Some(path) => numbered(path, request.seed),
        None => PathBuf::from(format!("sdfast-{}.png", request.seed)),
    };
    requests.iter().map(|request| Output::new(path(request))).collect()
}

/// `out.png` to `out-SEED.png`.
fn numbered(path: &Path, seed: u64) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_os_string();
    name.push(format!("-{seed}"));
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

fn summary(made: &Picture, request: &Request) -> String {
    let t = &made.timings;
    let step = t.steps_s.iter().sum::<f64>() / t.steps_s.len().max(1) as f64;
    let peak =
        made.memory.measured_peak_bytes.map(|n| format!(", peak {}", size::bytes(n))).unwrap_or_default();
    format!(
        "{}x{}, seed {}, {} steps of {step:.2} s, text {:.2} s, decoder {:.2} s, total {:.1} s{peak}",
        made.width,
        made.height,
        request.seed,
        t.steps_s.len(),
        t.text_s,
        t.vae_s,
        t.total_s
    )
}
