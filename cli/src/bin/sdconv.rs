//! `sdconv`: packs a checkpoint into a `.sdq` file.
fn main() {}
