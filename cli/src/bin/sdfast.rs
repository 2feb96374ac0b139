//! `sdfast`: makes pictures from a `.sdq` file.

fn main() -> std::process::ExitCode {
    sdfast::run::<sdfast::args::Sdfast>(sdfast::sdfast)
}
