//! `sdfast bench gemm`

use std::collections::BTreeMap;

use kernels::Workers;
use kernels::ceilings::{GemmFigure, gemm_figures};
use serde::Serialize;

use crate::args::BenchGemm;
use crate::failure::{Failure, Result};
use crate::report::to_json;
use crate::{model, terminal};

/// Numbers in the largest matrix that is worth a measurement.
const MAX_NUMBERS: usize = 1 << 28;

/// `bench gemm --json`
#[derive(Debug, Serialize)]
struct Report {
    isa: &'static str,
    threads: usize,
    /// Billions of operations per second on registers, for each kernel.
    ceilings: BTreeMap<&'static str, f64>,
    results: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    kernel: &'static str,
    m: usize,
    n: usize,
    k: usize,
    gops: f64,
    ceiling_ratio: f64,
    picked: bool,
}

impl From<GemmFigure> for Row {
    fn from(figure: GemmFigure) -> Row {
        let GemmFigure { kernel, m, n, k, gops, ceiling_ratio, picked } = figure;
        Row { kernel, m, n, k, gops, ceiling_ratio, picked }
    }
}

pub(crate) fn run(arguments: &BenchGemm) -> Result<()> {
    let isa = model::picked_isa(arguments.isa)?;
    let &[m, n, k] = &arguments.shape[..] else {
        return Err(
            Failure::new("a shape is three numbers").hint("rows, outputs and inputs, as 1024 1280 1280")
        );
    };
    let [m, n, k] = [m, n, k].map(|size| size as usize);
    if [m * n, m * k, n * k].iter().any(|&numbers| numbers > MAX_NUMBERS) {
        return Err(Failure::new(format!("{m} x {n} x {k} is too large to be measured"))
            .hint(format!("no matrix may have more than {MAX_NUMBERS} numbers")));
    }
    let workers = Workers::new(usize::from(arguments.threads));
    let results: Vec<Row> = gemm_figures(&workers, isa, m, n, k).into_iter().map(Row::from).collect();
    let ceilings = results.iter().map(|row| (row.kernel, row.gops / row.ceiling_ratio)).collect();
    let report = Report { isa: isa.name(), threads: workers.threads(), ceilings, results };
    terminal::print(&if arguments.json { to_json(&report) } else { table(&report, m, n, k) });
    Ok(())
}

fn table(report: &Report, m: usize, n: usize, k: usize) -> String {
    let mut lines = vec![
        format!("{m} x {n} x {k}, {}, {} threads", report.isa, report.threads),
        format!("{:<32}{:>10}{:>10}{:>8}", "kernel", "GOP/s", "ceiling", "ratio"),
    ];
    for row in &report.results {
        let mark = if row.picked { "  <- picked" } else { "" };
        let ceiling = report.ceilings[row.kernel];
        lines.push(format!(
            "{:<32}{:>10.1}{ceiling:>10.1}{:>8.2}{mark}",
            row.kernel, row.gops, row.ceiling_ratio
        ));
    }
    lines.join("\n")
}
