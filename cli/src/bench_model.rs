//! `sdfast bench model`

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use convert::{Quant, synthetic};
use engine::format::ModelFile;
use engine::pipeline::{Control, Picture, Pipeline, Request, Settings};

use crate::args::BenchModel;
use crate::failure::{Failure, Result};
use crate::progress::{Level, PictureProgress, Progress};
use crate::report::{Generated, to_json};
use crate::{cache, interrupt, model, profile, size, terminal};

/// What is drawn; the time doesn't depend on it.
const PROMPT: &str = "a photograph of a mountain lake at sunrise";

pub(crate) fn run(arguments: &BenchModel) -> Result<()> {
    let level = Level::from(arguments.voice);
    // The text encoder is measured too.
    let settings = Settings { cache: None, ..model::settings(&arguments.machine)? };
    let made_up = arguments
        .family
        .as_deref()
        .map(|family| made_up(family, arguments.quant.into(), level))
        .transpose()?;
    let start = Instant::now();
    let (file, name) = model::open(made_up.as_deref().or(arguments.model.as_deref()))?;
    let vae = model::open_vae(arguments.vae.as_deref())?;
    let vae_name = vae.as_ref().map(|vae| vae.name.clone());
    let pipeline = model::pipeline(file, vae, settings)?;
    let report = Generated::new(&pipeline, vae_name);
    let outcome = measure(arguments, pipeline, report, &name, level, start);
    if let Some(path) = made_up.filter(|_| arguments.no_keep) {
        std::fs::remove_file(&path).map_err(|error| Failure::io("remove", &path, &error))?;
    }
    outcome
}

fn measure(
    arguments: &BenchModel,
    pipeline: Pipeline,
    mut report: Generated,
    name: &str,
    level: Level,
    start: Instant,
) -> Result<()> {
    let mut request = Request::new(PROMPT, pipeline.card());
    request.width = arguments.width.unwrap_or(request.width);
    request.height = arguments.height.unwrap_or(request.height);
    request.steps = arguments.steps;
    request.guidance_scale = arguments.cfg.unwrap_or(request.guidance_scale);
    request.validate(pipeline.card())?;
    let settings = pipeline.settings();
    let title = format!(
        "{name}, {}x{}, {}, {} threads",
        request.width,
        request.height,
        settings.isa.name(),
        settings.threads
    );
    let (pipeline, profile) = profile::watch(pipeline, &arguments.profiling)?;
    let opened = start.elapsed().as_secs_f64();
    let mut progress = PictureProgress::new(level, name, request.steps);
    let mut made = pipeline.generate(&request, &mut |event| {
        progress.on(&event);
        interrupt::control()
    })?;
    drop(progress);
    made.timings.total_s += opened - made.timings.open_s;
    made.timings.open_s = opened;
    profile.write(&pipeline)?;
    report.add_unseen(&made.timings, &made.memory);
    if arguments.json {
        terminal::print(&to_json(&report));
    } else {
        terminal::print(&format!("{title}\n{}", table(&made)));
    }
    Ok(())
}

fn table(made: &Picture) -> String {
    let (t, m) = (&made.timings, &made.memory);
    let best = t.steps_s.iter().copied().fold(f64::INFINITY, f64::min);
    let mut lines = vec![
        format!("open       {:>9.3} s", t.open_s),
        format!("text       {:>9.3} s", t.text_s),
        format!("step       {best:>9.3} s   the best of {}", t.steps_s.len()),
        format!("decoder    {:>9.3} s", t.vae_s),
        format!("arena      {:>11}", size::bytes(m.arena_bytes)),
        format!("weights    {:>11}   resident", size::bytes(m.weights_resident_bytes)),
        format!("           {:>11}   streamed", size::bytes(m.weights_streamed_bytes)),
    ];
    if m.predicted_peak_bytes > 0 {
        lines.push(format!("peak       {:>11}   predicted", size::bytes(m.predicted_peak_bytes)));
    }
    if let Some(peak) = m.measured_peak_bytes {
        lines.push(format!("peak       {:>11}   measured", size::bytes(peak)));
    }
    lines.join("\n")
}

/// A model of the kind with random weights, in the cache folder: made when it isn't there yet.
fn made_up(name: &str, quant: Quant, level: Level) -> Result<PathBuf> {
    let card = model::published(name)?;
    let folder = cache::root();
    std::fs::create_dir_all(&folder).map_err(|error| Failure::io("create", &folder, &error))?;
    let version = env!("CARGO_PKG_VERSION");
    let path = folder.join(format!("{name}-{version}.{}.sdq", quant.name()));
    if is_usable(&path) {
        return Ok(path);
    }
    level.say(&format!("making up {} (it is kept; --no-keep removes it)", path.display()));
    let progress = Progress::new(level, name);
    let tenths = AtomicU64::new(0);
    let tell = |done: u64, total: u64| {
        let tenth = 10 * done / total.max(1);
        if tenths.fetch_max(tenth, Ordering::Relaxed) < tenth {
            progress.at(done, total, &format!("{} of {}", size::bytes(done), size::bytes(total)));
        }
        interrupt::control() == Control::Continue
    };
    synthetic::write_model(&card, quant, &synthetic::random(1), &path, &tell)?;
    Ok(path)
}

/// Whether the file is there and made for this program's networks.
fn is_usable(path: &Path) -> bool {
    ModelFile::open(path).is_ok_and(|file| {
        let specs = engine::models::weights(file.card()).into_iter().flat_map(|(_, specs)| specs);
        specs.into_iter().all(|spec| file.tensor(&spec.name).is_some_and(|t| t.kind == spec.kind))
    })
}
