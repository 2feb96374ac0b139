//! `--profile`: where the time of a run went.

use std::collections::BTreeMap;

use engine::graph::{Profile, Span};
use engine::pipeline::Pipeline;
use serde::Serialize;

use crate::args::Profiling;
use crate::failure::Result;
use crate::output::Output;
use crate::terminal;

/// What to do with a profile.
#[derive(Debug)]
pub(crate) enum Report {
    /// Nobody asked.
    None,
    /// A table on stderr.
    Table,
    /// Events in a file.
    Trace(Output),
}

/// `pipeline`, which keeps a profile if the arguments ask for one.
pub(crate) fn watch(pipeline: Pipeline, arguments: &Profiling) -> Result<(Pipeline, Report)> {
    let report = match &arguments.profile {
        None => return Ok((pipeline, Report::None)),
        Some(path) if path.as_os_str() == "-" => Report::Table,
        Some(path) => Report::Trace(Output::new(path.clone())?),
    };
    Ok((pipeline.profiled(), report))
}

impl Report {
    /// Reports what `pipeline` has done.
    pub(crate) fn write(&self, pipeline: &Pipeline) -> Result<()> {
        let spans = pipeline.profile().map(Profile::spans).unwrap_or_default();
        match self {
            Report::None => {}
            Report::Table => terminal::note(&table(&spans)),
            Report::Trace(output) => output.write(crate::report::to_json(&Trace::new(&spans)).as_bytes())?,
        }
        Ok(())
    }
}

/// The network that a layer belongs to.
fn part(path: &str) -> &str {
    path.split('.').next().unwrap_or_default()
}

/// Sums over the calls of one kind.
#[derive(Default)]
struct Row {
    calls: usize,
    seconds: f64,
    /// If each call had taken as long as the fastest of the same layer.
    best: f64,
    operations: u64,
    bytes: u64,
}

/// A line for each network and kind of work.
fn table(spans: &[Span]) -> String {
    let mut calls: BTreeMap<(&str, &str, u64, u64), Vec<f64>> = BTreeMap::new();
    for span in spans {
        let key = (&*span.path, span.kind, span.operations, span.bytes);
        calls.entry(key).or_default().push(span.time.as_secs_f64());
    }
    let mut rows: BTreeMap<(&str, &str), Row> = BTreeMap::new();
    for ((path, kind, operations, bytes), times) in calls {
        let row = rows.entry((part(path), kind)).or_default();
        let n = times.len();
        row.calls += n;
        row.seconds += times.iter().sum::<f64>();
        row.best += n as f64 * times.iter().copied().fold(f64::INFINITY, f64::min);
        row.operations += n as u64 * operations;
        row.bytes += n as u64 * bytes;
    }
    let all: f64 = rows.values().map(|r| r.seconds).sum();
    let mut rows: Vec<_> = rows.into_iter().collect();
    rows.sort_by(|a, b| a.0.0.cmp(b.0.0).then(b.1.seconds.total_cmp(&a.1.seconds)));
    let mut lines = vec![format!(
        "{:<10} {:<12} {:>7} {:>9} {:>6} {:>9} {:>9} {:>7}",
        "network", "work", "calls", "seconds", "share", "at best", "GOP/s", "GB/s"
    )];
    for ((part, kind), row) in rows {
        let rate =
            |n: u64| if n == 0 { String::from("-") } else { format!("{:.1}", n as f64 * 1e-9 / row.seconds) };
        lines.push(format!(
            "{part:<10} {kind:<12} {:>7} {:>9.3} {:>5.1}% {:>9.3} {:>9} {:>7}",
            row.calls,
            row.seconds,
            100.0 * row.seconds / all,
            row.best,
            rate(row.operations),
            rate(row.bytes)
        ));
    }
    lines.push(format!(
        "at best: if each call had taken as long as the fastest of its layer; all: {all:.3} s"
    ));
    lines.join("\n")
}

/// The trace-event format that browsers' tracing viewers read.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace<'a> {
    display_time_unit: &'static str,
    trace_events: Vec<Event<'a>>,
}

/// A complete event.
#[derive(Serialize)]
struct Event<'a> {
    name: &'a str,
    cat: &'a str,
    ph: &'static str,
    /// Microseconds.
    ts: f64,
    /// Microseconds.
    dur: f64,
    pid: u32,
    tid: u32,
    args: Rates,
}

#[derive(Serialize)]
struct Rates {
    #[serde(rename = "GOP/s")]
    gops: f64,
    #[serde(rename = "GB/s")]
    gbs: f64,
}

impl<'a> Trace<'a> {
    fn new(spans: &'a [Span]) -> Self {
        let event = |s: &'a Span| {
            let seconds = s.time.as_secs_f64().max(1e-9);
            let args =
                Rates { gops: s.operations as f64 * 1e-9 / seconds, gbs: s.bytes as f64 * 1e-9 / seconds };
            let (ts, dur) = (s.start.as_secs_f64() * 1e6, s.time.as_secs_f64() * 1e6);
            Event { name: &s.path, cat: s.kind, ph: "X", ts, dur, pid: 1, tid: 1, args }
        };
        Trace { display_time_unit: "ms", trace_events: spans.iter().map(event).collect() }
    }
}
