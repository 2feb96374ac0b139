//! `sdfast info`

use std::fs::File;
use std::io::Read;

use engine::format::{self, ModelFile};

use crate::args::Info;
use crate::failure::{Failure, Result};
use crate::{picture, size, terminal};

/// Larger pictures hold more than one can look at.
const MAX_PICTURE: u64 = 1 << 30;

pub(crate) fn run(arguments: &Info) -> Result<()> {
    let path = &arguments.file;
    let fail = |error: std::io::Error| Failure::io("read", path, &error);
    if path.is_dir() {
        return Err(Failure::new(format!("{} is a folder", path.display()))
            .hint("`sdconv inspect FOLDER` looks at checkpoints"));
    }
    let mut file = File::open(path).map_err(fail)?;
    let mut head = Vec::new();
    (&mut file).take(8).read_to_end(&mut head).map_err(fail)?;
    if head == picture::SIGNATURE {
        let mut bytes = head;
        file.take(MAX_PICTURE).read_to_end(&mut bytes).map_err(fail)?;
        let settings = picture::settings(&bytes)?.ok_or_else(|| {
            Failure::new(format!("{} holds no settings", path.display()))
                .hint("programs that edit pictures often drop them")
        })?;
        terminal::print(&settings);
        return Ok(());
    }
    if head == format::MAGIC {
        terminal::print(&describe(&ModelFile::open(path)?));
        return Ok(());
    }
    Err(Failure::new(format!("{} is neither a PNG picture nor an .sdq model", path.display()))
        .hint("`sdconv inspect FILE` looks at checkpoints"))
}

/// A model's card, for people.
pub(crate) fn describe(file: &ModelFile) -> String {
    let card = file.card();
    let d = &card.defaults;
    let s = &card.schedule;
    let mut lines = vec![
        format!("family      {}", word(&card.family)),
        format!("quant       {}", card.provenance.quant),
        format!("size        {}", size::bytes(file.file_bytes())),
        format!("prediction  {}", word(&s.prediction_type)),
        format!(
            "defaults    {}x{}, {} steps of {}, cfg {:?}",
            d.width, d.height, d.steps, d.sampler, d.guidance_scale
        ),
        format!("made by     {}", card.provenance.converter),
    ];
    for part in file.parts() {
        let tensors = &file.tensors()[part.tensors.clone()];
        lines.push(format!(
            "part        {:<15} {:>10}, {} tensors",
            part.name,
            size::bytes(part.len),
            tensors.len()
        ));
    }
    lines.join("\n")
}

/// The name that the card has for it.
fn word(value: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(value).expect("names are plain data");
    value.as_str().unwrap_or_default().to_string()
}
