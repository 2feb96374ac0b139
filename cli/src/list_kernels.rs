//! `sdfast kernels`

use kernels::Isa;
use kernels::gemm::{kernels, pick};
use kernels::layout::Encoding;
use kernels::view::Operand;

use crate::failure::Result;
use crate::{model, terminal};

pub(crate) fn run() -> Result<()> {
    let used = model::picked_isa(None)?;
    let mark = |yes: bool| if yes { "  <- used" } else { "" };
    terminal::print("instruction sets");
    for isa in Isa::ALL {
        let has = if isa.is_available() { "yes" } else { "no" };
        terminal::print(&format!("  {:<12}{has:<4}{}", isa.name(), mark(isa == used)));
    }
    let operands = [Operand::U8 { codes: &[], scale: &[] }, Operand::Bf16(&[]), Operand::F32(&[])];
    // Codes meet integer weights only.
    let meets =
        |operand: &Operand<'_>, encoding: &Encoding| operand.codes().is_none() || encoding.is_integer();
    let picked: Vec<&str> = operands
        .iter()
        .flat_map(|operand| {
            Encoding::ALL.into_iter().filter(|e| meets(operand, e)).map(|e| pick(used, operand, e).name)
        })
        .collect();
    terminal::print("kernels");
    for kernel in kernels() {
        let has = if kernel.isa.is_available() { "yes" } else { "no" };
        terminal::print(&format!("  {:<32}{has:<4}{}", kernel.name, mark(picked.contains(&kernel.name))));
    }
    Ok(())
}
