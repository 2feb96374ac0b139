//! `sdfast`: makes pictures from a `.sdq` file.
fn main() {}
