//! The command lines of `sdfast` and `sdconv`: arguments, progress, messages, exit codes.
//!
//! What people type is defined in [`args`], one place for both programs; each command's work has a module of its own.
#![forbid(unsafe_code)]

pub mod args;
mod bench_gemm;
mod bench_model;
mod cache;
pub mod compare;
mod convert_checkpoint;
mod demo;
mod failure;
mod generate;
mod info;
mod inspect;
mod interrupt;
mod latents;
mod list_kernels;
mod model;
mod output;
mod parameters;
mod picture;
mod plan;
mod profile;
mod progress;
mod report;
mod size;
mod synthetic;
mod terminal;

use std::process::ExitCode;

use clap::Parser;

use args::{Bench, Command, ConvertCommand, Sdconv, Sdfast};
use failure::Result;

/// Runs `work` with the program's arguments: exit code 0 when it is done, 1 when the request can't be met, 2 for a fault of
/// the program.
pub fn run<A: Parser>(work: fn(A) -> Result<()>) -> ExitCode {
    failure::install_panic_hook();
    let outcome = std::panic::catch_unwind(|| {
        let arguments = A::try_parse().map_err(failure::from_clap)?;
        interrupt::install();
        work(arguments)
    });
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => failure.report(),
        // The hook has said what there is to say.
        Err(_) => ExitCode::from(failure::FAULT),
    }
}

/// The program `sdfast`.
pub fn sdfast(arguments: Sdfast) -> Result<()> {
    match arguments.command {
        Command::Gen(arguments) => generate::run(&arguments),
        Command::Bench(Bench::Gemm(arguments)) => bench_gemm::run(&arguments),
        Command::Bench(Bench::Model(arguments)) => bench_model::run(&arguments),
        Command::Compare(arguments) => compare::run(&arguments),
        Command::Plan(arguments) => plan::run(&arguments),
        Command::Info(arguments) => info::run(&arguments),
        Command::Kernels => list_kernels::run(),
    }
}

/// The program `sdconv`.
pub fn sdconv(arguments: Sdconv) -> Result<()> {
    match arguments.command {
        Some(ConvertCommand::Inspect(arguments)) => inspect::run(&arguments),
        Some(ConvertCommand::Synthetic(arguments)) => synthetic::run(&arguments),
        None => convert_checkpoint::run(arguments.convert),
    }
}
