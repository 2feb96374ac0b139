//! Which instruction sets this machine has, found once at run time.

use std::sync::OnceLock;

/// The variable that caps the tier: one of the names of [`Isa`].
pub const ISA_VARIABLE: &str = "SDFAST_ISA";

/// An instruction-set tier. Later tiers of one architecture are better; [`Isa::includes`] says which they can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX2 and 256-bit VNNI (VEX).
    AvxVnni,
    /// AVX-512 F, BW, VL, DQ.
    Avx512,
    /// AVX-512 with VNNI.
    Avx512Vnni,
    /// AVX-512 with VNNI and BF16, and AMX int8 and bf16 tiles.
    Amx,
    /// NEON.
    Neon,
    /// NEON with dotprod.
    Dotprod,
    /// NEON with dotprod, i8mm and bf16, which come together.
    I8mm,
}

impl Isa {
    /// Every tier.
    pub const ALL: [Isa; 9] = [
        Isa::Scalar,
        Isa::Avx2,
        Isa::AvxVnni,
        Isa::Avx512,
        Isa::Avx512Vnni,
        Isa::Amx,
        Isa::Neon,
        Isa::Dotprod,
        Isa::I8mm,
    ];

    /// The name people see and type.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Amx => "amx",
            Isa::Neon => "neon",
            Isa::Dotprod => "dotprod",
            Isa::I8mm => "i8mm",
        }
    }

    /// The tier called `name`.
    pub fn parse(name: &str) -> Option<Isa> {
        Isa::ALL.into_iter().find(|isa| isa.name() == name)
    }

    /// Whether a machine of this tier runs code written for `other`.
    pub const fn includes(self, other: Isa) -> bool {
        use Isa::*;
        match self {
            Scalar => matches!(other, Scalar),
            Avx2 => matches!(other, Scalar | Avx2),
            AvxVnni => matches!(other, Scalar | Avx2 | AvxVnni),
            Avx512 => matches!(other, Scalar | Avx2 | Avx512),
            Avx512Vnni => matches!(other, Scalar | Avx2 | Avx512 | Avx512Vnni),
            Amx => matches!(other, Scalar | Avx2 | Avx512 | Avx512Vnni | Amx),
            Neon => matches!(other, Scalar | Neon),
            Dotprod => matches!(other, Scalar | Neon | Dotprod),
            I8mm => matches!(other, Scalar | Neon | Dotprod | I8mm),
        }
    }

    /// The tiers this machine has, worst first. No cap applies.
    pub fn available() -> &'static [Isa] {
        static FOUND: OnceLock<Vec<Isa>> = OnceLock::new();
        FOUND.get_or_init(|| Isa::ALL.into_iter().filter(|isa| isa.found()).collect())
    }

    /// Whether this machine has the tier.
    pub fn is_available(self) -> bool {
        Isa::available().contains(&self)
    }

    /// The best tier of this machine that is no better than `cap`.
    pub fn capped(cap: Isa) -> Isa {
        Isa::available().iter().copied().rfind(|&isa| isa <= cap).unwrap_or(Isa::Scalar)
    }

    /// The best tier of this machine, or the one that [`ISA_VARIABLE`] caps it to.
    ///
    /// # Panics
    /// Where the variable holds no tier's name.
    pub fn detect() -> Isa {
        static PICKED: OnceLock<Isa> = OnceLock::new();
        *PICKED.get_or_init(|| match std::env::var(ISA_VARIABLE) {
            Ok(name) => {
                let names = Isa::ALL.map(Isa::name).join(", ");
                Isa::capped(
                    Isa::parse(&name).unwrap_or_else(|| panic!("{ISA_VARIABLE}={name}: one of {names}")),
                )
            }
            Err(_) => *Isa::available().last().expect("every machine has the scalar tier"),
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn found(self) -> bool {
        use std::arch::is_x86_feature_detected as has;
        let avx2 = || has!("avx2") && has!("fma") && has!("f16c");
        let avx512 = || avx2() && has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
        match self {
            Isa::Scalar => true,
            Isa::Avx2 => avx2(),
            Isa::AvxVnni => avx2() && has!("avxvnni"),
            Isa::Avx512 => avx512(),
            Isa::Avx512Vnni => avx512() && has!("avx512vnni"),
            Isa::Amx => avx512() && has!("avx512vnni") && has!("avx512bf16") && amx::found(),
            _ => false,
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn found(self) -> bool {
        use std::arch::is_aarch64_feature_detected as has;
        match self {
            Isa::Scalar | Isa::Neon => true,
            Isa::Dotprod => has!("dotprod"),
            Isa::I8mm => has!("dotprod") && has!("i8mm") && has!("bf16"),
            _ => false,
        }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn found(self) -> bool {
        self == Isa::Scalar
    }
}

#[cfg(target_arch = "x86_64")]
mod amx {
    /// Whether the CPU has AMX int8 and bf16, and the system lets this process use the tile registers.
    pub(super) fn found() -> bool {
        const BF16: u32 = 1 << 22;
        const TILE: u32 = 1 << 24;
        const INT8: u32 = 1 << 25;
        let has = std::arch::x86_64::__cpuid_count(7, 0).edx;
        has & (BF16 | TILE | INT8) == BF16 | TILE | INT8 && permitted()
    }

    #[cfg(target_os = "linux")]
    fn permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: this request takes two numbers and touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }

    #[cfg(not(target_os = "linux"))]
    fn permitted() -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for isa in Isa::ALL {
            assert_eq!(Isa::parse(isa.name()), Some(isa));
            assert!(isa.includes(isa) && isa.includes(Isa::Scalar));
        }
        assert_eq!(Isa::parse("sse9"), None);
    }

    #[test]
    fn a_cap_is_kept() {
        assert_eq!(Isa::capped(Isa::Scalar), Isa::Scalar);
        for &isa in Isa::available() {
            assert_eq!(Isa::capped(isa), isa);
        }
    }

    /// A run that promises tiers fails where one of them is missing, instead of testing less.
    #[test]
    fn promised_tiers_are_here() {
        for name in
            std::env::var("SDFAST_TEST_REQUIRE").unwrap_or_default().split(',').filter(|n| !n.is_empty())
        {
            let isa = Isa::parse(name).unwrap_or_else(|| panic!("no tier is called {name}"));
            assert!(isa.is_available(), "SDFAST_TEST_REQUIRE promises {name}, which this machine lacks");
        }
    }
}
