//! Naive versions of every operation. They read like the formula, and are what the tests compare with.
#![forbid(unsafe_code)]

pub mod attention;
pub mod gemm;
pub mod math;
pub mod pass;
