//! Arithmetic for `sdfast`: it knows bytes and shapes, no model and no file.
//!
//! The crate has four doors:
//! - [`gemm`]: linear layers and convolutions straight from encoded weight panels ([`layout`]);
//! - [`pass`]: one walk over a tensor that normalizes, activates and writes it as the operand of a GEMM;
//! - [`attention`]: softmax(q k^T) v without the n x n matrix;
//! - [`quantize`]: f32 matrices to encoded panels and back.
//!
//! All of them run on a [`Workers`] team, and none of their results depends on its size.
//!
#![doc = include_str!("../README.md")]

mod arch;
pub mod attention;
pub mod ceilings;
pub mod cpu;
pub mod gemm;
pub mod layout;
pub mod math;
pub mod par;
pub mod pass;
pub mod quantize;
pub mod reference;
pub mod simd;
pub mod view;

pub use cpu::Isa;
pub use half::{bf16, f16};
pub use par::Workers;
