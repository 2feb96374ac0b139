//! One description of each network drives everything: the weights wanted, their order in the file, the plan, the arena,
//! streaming and the run.

pub mod weight;
