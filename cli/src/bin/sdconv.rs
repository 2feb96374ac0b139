//! `sdconv`: packs a checkpoint into a `.sdq` file.

fn main() -> std::process::ExitCode {
    sdfast::run::<sdfast::args::Sdconv>(sdfast::sdconv)
}
