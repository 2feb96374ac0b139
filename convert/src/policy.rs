//! Which weight is kept how: one rule per role, and the rules that a user adds.
#![forbid(unsafe_code)]

use engine::graph::weight::{Role, Stored, WeightKind, WeightSpec};
use kernels::layout::Encoding;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// How far a model is to be quantized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quant {
    /// 8 bits: no visible difference.
    #[default]
    Q8,
    /// A mix of 4 and 8 bits.
    Q4,
    /// 16 bits.
    F16,
}

impl Quant {
    /// Every one.
    pub const ALL: [Quant; 3] = [Quant::Q8, Quant::Q4, Quant::F16];

    /// The name people see and type.
    pub const fn name(self) -> &'static str {
        match self {
            Quant::Q8 => "q8",
            Quant::Q4 => "q4",
            Quant::F16 => "f16",
        }
    }
}

/// The rules of one conversion.
#[derive(Debug)]
pub(crate) struct Policy {
    quant: Quant,
    keep: Vec<(String, Encoding)>,
}

impl Policy {
    /// `keep` holds rules `GLOB=ENCODING`; of several that fit a tensor the last one counts.
    pub(crate) fn new(quant: Quant, keep: &[String]) -> Result<Policy, Error> {
        let keep = keep
            .iter()
            .map(|rule| {
                let fault = |fault: &str| Error::Rule { rule: rule.clone(), fault: fault.into() };
                let (glob, name) = rule.rsplit_once('=').ok_or_else(|| fault("it has no ="))?;
                let encoding = Encoding::ALL.into_iter().find(|e| e.name() == name);
                let known = Encoding::ALL.map(Encoding::name).join(", ");
                let encoding = encoding.ok_or_else(|| fault(&format!("{name:?} is none of {known}")))?;
                Ok((glob.to_owned(), encoding))
            })
            .collect::<Result<_, Error>>()?;
        Ok(Policy { quant, keep })
    }

    /// How the tensors of a part are stored.
    pub(crate) fn encodings(&self, part: &str, specs: &[WeightSpec]) -> Vec<Encoding> {
        let last = last_block(specs, "unet.up_blocks.");
        let encoding = |spec: &WeightSpec| match spec.kind {
            WeightKind::Vector { .. } => Encoding::F32,
            WeightKind::Table { .. } => Encoding::F16,
            WeightKind::Matrix { .. } => {
                let kept = self.keep.iter().rev().find(|(glob, _)| matches(glob, &spec.name));
                let default = || default(self.quant, part, spec, &last, finest(spec, specs));
                kept.map_or_else(default, |(_, encoding)| *encoding)
            }
        };
        specs.iter().map(encoding).collect()
    }

    /// The same, for matrices without factors.
    pub(crate) fn stored(&self, part: &str, specs: &[WeightSpec]) -> Vec<Stored> {
        let matrix = |spec: &WeightSpec| spec.kind.fixed_encoding().is_none();
        let each = self.encodings(part, specs).into_iter().zip(specs);
        let stored = |(encoding, spec)| Stored { encoding: matrix(spec).then_some(encoding), factors: None };
        each.map(stored).collect()
    }

    /// A rule that fits none of these tensors is a mistake.
    pub(crate) fn check<'a>(&self, specs: impl Iterator<Item = &'a WeightSpec> + Clone) -> Result<(), Error> {
        for (glob, encoding) in &self.keep {
            let mut matrices = specs.clone().filter(|s| matches!(s.kind, WeightKind::Matrix { .. }));
            if !matrices.any(|spec| matches(glob, &spec.name)) {
                let rule = format!("{glob}={}", encoding.name());
                return Err(Error::Rule { rule, fault: "it fits no matrix of the model".into() });
            }
        }
        Ok(())
    }
}

/// The default. In 16 bits stay layers that are small, and those that read what no norm has leveled out: a few wide
/// channels there leave 8-bit rows no room for the others (16-bit weights meet 16-bit activations). Of 4 bits only the
/// UNet's large matrices are made, and none in its last block: few weights at the finest resolution, whose errors nothing
/// behind them makes smaller. The VAE has 8 bits only at full resolution: its errors show, and its weights are few. `docs/quantization.md` has the measurements.
fn default(quant: Quant, part: &str, spec: &WeightSpec, last_block: &str, finest: bool) -> Encoding {
    match (quant, spec.role) {
        (Quant::F16, _) => Encoding::F16,
        _ if spec.name.starts_with("vae.") && !finest => Encoding::F16,
        (_, Role::ConvIn | Role::ConvOut | Role::QuantConv | Role::Pooled) => Encoding::F16,
        (Quant::Q8, Role::Embedding) => Encoding::F16,
        (Quant::Q8, Role::Shortcut) if part == "unet" => Encoding::F16,
        (Quant::Q8, _) => Encoding::Q8,
        (Quant::Q4, Role::Embedding | Role::Shortcut | Role::Projection) => Encoding::Q8,
        (Quant::Q4, Role::TimeShift) => Encoding::Q4,
        (Quant::Q4, _) if part == "unet" && !spec.name.starts_with(last_block) => Encoding::Q4,
        (Quant::Q4, _) => Encoding::Q8,
    }
}

/// What the names of weights in the last of the blocks begin with whose names begin with `blocks`.
fn last_block(specs: &[WeightSpec], blocks: &str) -> String {
    let number = |spec: &WeightSpec| spec.name.strip_prefix(blocks)?.split('.').next()?.parse::<usize>().ok();
    format!("{blocks}{}.", specs.iter().filter_map(number).max().unwrap_or(0))
}

/// Whether a weight belongs to the VAE's residual blocks at full resolution (shortcuts aside).
fn finest(spec: &WeightSpec, specs: &[WeightSpec]) -> bool {
    let decoder = last_block(specs, "vae.decoder.up_blocks.") + "resnets.";
    let blocks = ["vae.encoder.down_blocks.0.resnets.", &decoder];
    spec.role != Role::Shortcut && blocks.iter().any(|block| spec.name.starts_with(block))
}

/// How a conversion with `quant` stores `wanted`, the weights of one part, where their numbers need no factors.
pub fn stored(quant: Quant, wanted: &[WeightSpec]) -> Vec<Stored> {
    let part = wanted.first().and_then(|spec| spec.name.split('.').next()).unwrap_or_default();
    Policy { quant, keep: vec![] }.stored(part, wanted)
}

/// Whether a glob of `*` (any run of characters) and `?` (any one) fits the whole name.
fn matches(glob: &str, name: &str) -> bool {
    let (glob, name) = (glob.as_bytes(), name.as_bytes());
    let (mut g, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match glob.get(g) {
            Some(b'*') => {
                star = Some((g, n));
                g += 1;
            }
            Some(&c) if c == b'?' || c == name[n] => (g, n) = (g + 1, n + 1),
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (g, n) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    glob[g..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        for (glob, name, fits) in [
            ("vae.*", "vae.decoder.conv_in.weight", true),
            ("vae.*", "unet.vae.x", false),
            ("*.to_?.weight", "unet.a.attn1.to_q.weight", true),
            ("*.to_?.weight", "unet.a.attn1.to_out.0.weight", false),
            ("*a*a*b", "aaab", true),
            ("*a*a*b", "ab", false),
            ("", "", true),
            ("*", "", true),
            ("", "a", false),
        ] {
            assert_eq!(matches(glob, name), fits, "{glob} {name}");
        }
    }

    #[test]
    fn the_last_block_keeps_eight_bits() {
        let kind = WeightKind::Matrix { n: 64, kh: 1, kw: 1, k: 64, order: Default::default() };
        let spec = |name: &str| WeightSpec { name: name.into(), kind, role: Role::MlpIn };
        let specs =
            ["unet.up_blocks.9.a.weight", "unet.up_blocks.10.a.weight", "unet.mid_block.a.weight"].map(spec);
        let got = Policy::new(Quant::Q4, &[]).unwrap().encodings("unet", &specs);
        assert_eq!(got, [Encoding::Q4, Encoding::Q8, Encoding::Q4]);
    }

    #[test]
    fn the_vae_is_quantized_at_full_resolution() {
        let kind = WeightKind::Matrix { n: 64, kh: 3, kw: 3, k: 64, order: Default::default() };
        let spec = |name: &str| {
            let role = if name.contains("shortcut") { Role::Shortcut } else { Role::Conv };
            WeightSpec { name: format!("vae.{name}.weight"), kind, role }
        };
        let (short, fine) = (Encoding::F16, Encoding::Q8);
        let wanted = [
            ("decoder.mid_block.resnets.0.conv1", short),
            ("decoder.up_blocks.1.resnets.2.conv1", short),
            ("decoder.up_blocks.2.resnets.1.conv1", short),
            ("decoder.up_blocks.2.upsamplers.0.conv", short),
            ("decoder.up_blocks.3.resnets.0.conv1", fine),
            ("decoder.up_blocks.3.resnets.0.conv_shortcut", short),
            ("encoder.mid_block.resnets.0.conv1", short),
            ("encoder.down_blocks.0.resnets.1.conv2", fine),
            ("encoder.down_blocks.0.downsamplers.0.conv", short),
        ];
        for quant in [Quant::Q8, Quant::Q4] {
            let specs = wanted.map(|(name, _)| spec(name));
            let got = Policy::new(quant, &[]).unwrap().encodings("vae_decoder", &specs);
            assert_eq!(got, wanted.map(|(_, encoding)| encoding));
        }
    }

    #[test]
    fn rules() {
        let kind = WeightKind::Matrix { n: 1, kh: 1, kw: 1, k: 1, order: Default::default() };
        let spec = WeightSpec {
            name: "vae.encoder.down_blocks.0.resnets.0.conv1.weight".into(),
            kind,
            role: Role::Conv,
        };
        let rules = ["vae.*=f16".to_owned(), "*.conv1.weight=bf16".to_owned()];
        let encoding = |rules: &[String]| {
            Policy::new(Quant::Q8, rules).unwrap().encodings("vae_decoder", std::slice::from_ref(&spec))
        };
        assert_eq!(encoding(&rules), [Encoding::Bf16]);
        assert_eq!(encoding(&[]), [Encoding::Q8]);
        assert!(Policy::new(Quant::Q8, &["unet.*=f16".into()]).unwrap().check([&spec].into_iter()).is_err());
        assert!(Policy::new(Quant::Q8, &["vae.*".into()]).is_err());
        assert!(Policy::new(Quant::Q8, &["vae.*=q5".into()]).is_err());
    }
}
