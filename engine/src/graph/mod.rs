//! One description of each network drives everything: the weights wanted, their order in the file, the plan, the arena,
//! streaming and the run.
//!
//! A model ([`crate::models`]) tells a [`Builder`] what it is made of. The result is a [`Network`]: values, and the nodes
//! that make them. [`Plan::new`] lowers it for a precision and for what a file stores into steps over one arena;
//! [`Session`] runs the steps.
//!
//! Passes and matrix products over the same pixels run band by band: the 8-bit operand of a layer, and what lies between the
//! two layers of an MLP, exist for a band of rows only.

mod analysis;
mod arena;
mod bands;
mod builder;
mod exec;
mod lower;
mod network;
mod plan;
mod profile;
mod steps;
pub mod weight;

pub use arena::{Arena, Region};
pub use builder::{Builder, GemmBuilder};
pub use exec::{Observer, Seen, Session, Watch};
pub use lower::Options;
pub use network::{Dims, Network, OperandSpec, Origin, Rate, Tensor};
pub use plan::Plan;
pub use profile::{Profile, Span};
pub use steps::Step;
