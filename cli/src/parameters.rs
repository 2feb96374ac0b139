//! The settings of a picture in the words of the WebUI, which other programs read: prompt, negative prompt, and a line of
//! `name: value` pairs.

use std::fmt::Write as _;

use engine::pipeline::{Noise, Request};
use engine::sampler;
use engine::schedule::Spread;

/// What a picture was made with.
#[derive(Debug)]
pub(crate) struct Names {
    pub(crate) model: String,
    /// Where it isn't the model's own.
    pub(crate) vae: Option<String>,
}

/// The text of the PNG keyword `parameters`.
pub(crate) fn text(request: &Request, names: &Names) -> String {
    let mut text = request.prompt.clone();
    if !request.negative_prompt.is_empty() {
        let _ = write!(text, "\nNegative prompt: {}", request.negative_prompt);
    }
    let label = sampler::find(&request.sampler).map_or(request.sampler.as_str(), |entry| entry.label);
    let spread = Spread::find(&request.schedule).unwrap_or_default();
    let mut pairs = vec![
        ("Steps", request.steps.to_string()),
        ("Sampler", label.into()),
        ("Schedule type", spread.label().into()),
        ("CFG scale", format!("{:?}", request.guidance_scale)),
        ("Seed", request.seed.to_string()),
        ("Size", format!("{}x{}", request.width, request.height)),
        ("Model", names.model.clone()),
    ];
    if let Some(vae) = &names.vae {
        pairs.push(("VAE", vae.clone()));
    }
    if request.noise == Noise::Torch {
        pairs.push(("RNG", "CPU".into()));
    }
    pairs.push(("Version", format!("sdfast {}", env!("CARGO_PKG_VERSION"))));
    let pairs: Vec<String> = pairs.iter().map(|(name, value)| format!("{name}: {}", quoted(value))).collect();
    let _ = write!(text, "\n{}", pairs.join(", "));
    text
}

/// Values that would end the pair too early are JSON strings.
fn quoted(value: &str) -> String {
    if value.contains([',', ':', '\n', '"']) {
        serde_json::Value::from(value).to_string()
    } else {
        value.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_the_webuis() {
        let mut request = Request {
            prompt: "a red circle, large".into(),
            negative_prompt: String::new(),
            width: 512,
            height: 768,
            steps: 20,
            guidance_scale: 7.0,
            seed: 1,
            sampler: "euler".into(),
            schedule: "karras".into(),
            noise: Noise::Philox,
            init_latents: None,
        };
        let settings = "Steps: 20, Sampler: Euler, Schedule type: Karras, CFG scale: 7.0, Seed: 1, Size: 512x768, Model: \
                        \"a, b\", Version: sdfast ";
        let version = env!("CARGO_PKG_VERSION");
        let mut names = Names { model: "a, b".into(), vae: None };
        assert_eq!(text(&request, &names), format!("a red circle, large\n{settings}{version}"));
        request.negative_prompt = "blur\nnoise".into();
        assert_eq!(
            text(&request, &names),
            format!("a red circle, large\nNegative prompt: blur\nnoise\n{settings}{version}")
        );
        names.vae = Some("taesd".into());
        assert!(text(&request, &names).contains(", Model: \"a, b\", VAE: taesd, Version: "));
    }
}
