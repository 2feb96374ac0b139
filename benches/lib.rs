//! Helpers shared by the benches, which stand beside this file.
