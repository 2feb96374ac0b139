//! Pictures as PNG files with their settings inside.

use std::io::Cursor;

use engine::pipeline::Picture;

use crate::failure::{Failure, Result};

/// What the settings are filed under.
const KEYWORD: &str = "parameters";

/// First bytes of every PNG file.
pub(crate) const SIGNATURE: [u8; 8] = *b"\x89PNG\r\n\x1a\n";

/// The bytes of a PNG file with settings inside.
pub(crate) fn encode(picture: &Picture, parameters: String) -> Vec<u8> {
    encode_rgb8(&picture.rgb8, picture.width, Some(parameters))
}

/// The bytes of a PNG file of the pixels `[height, width, 3]`.
pub(crate) fn encode_rgb8(pixels: &[u8], width: usize, parameters: Option<String>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(pixels.len() / 2);
    let height = pixels.len() / 3 / width;
    let mut encoder = png::Encoder::new(&mut bytes, width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let added = match parameters {
        None => Ok(()),
        // tEXt is Latin-1; everything else needs iTXt.
        Some(text) if text.chars().all(|c| u32::from(c) < 256 && c != '\0') => {
            encoder.add_text_chunk(KEYWORD.into(), text)
        }
        Some(text) => encoder.add_itxt_chunk(KEYWORD.into(), text),
    };
    let written = added.and_then(|()| encoder.write_header()).and_then(|mut writer| {
        writer.write_image_data(pixels)?;
        writer.finish()
    });
    written.expect("an RGB picture of its size goes into memory");
    bytes
}

/// The settings in a PNG file.
pub(crate) fn settings(bytes: &[u8]) -> Result<Option<String>> {
    let broken = |error: png::DecodingError| Failure::new(format!("the picture can't be read: {error}"));
    let mut reader = png::Decoder::new(Cursor::new(bytes)).read_info().map_err(broken)?;
    // Text may also stand behind the pixels; a picture that breaks off still shows what came before.
    let _ = reader.finish();
    let info = reader.info();
    let latin1 = info.uncompressed_latin1_text.iter().find(|t| t.keyword == KEYWORD).map(|t| t.text.clone());
    let compressed = || {
        let chunk = info.compressed_latin1_text.iter().find(|t| t.keyword == KEYWORD)?;
        chunk.get_text().ok()
    };
    let unicode = || info.utf8_text.iter().find(|t| t.keyword == KEYWORD)?.get_text().ok();
    Ok(latin1.or_else(compressed).or_else(unicode))
}

#[cfg(test)]
mod tests {
    use engine::pipeline::{Latents, Memory, Timings};

    use super::*;

    fn picture() -> Picture {
        Picture {
            width: 3,
            height: 2,
            rgb8: (0..18).map(|i| i * 14).collect(),
            latents: Latents::default(),
            timings: Timings::default(),
            memory: Memory::default(),
        }
    }

    #[test]
    fn pixels_and_settings_come_back() {
        for text in ["plain\nSteps: 20", "naïve café", "赤い円 🙂\nSteps: 1", ""] {
            let bytes = encode(&picture(), text.into());
            assert_eq!(settings(&bytes).expect("a picture").as_deref(), Some(text));
            let mut reader = png::Decoder::new(Cursor::new(&bytes)).read_info().expect("a picture");
            let mut pixels = vec![0; 18];
            reader.next_frame(&mut pixels).expect("pixels");
            assert_eq!(pixels, picture().rgb8);
        }
    }

    #[test]
    fn broken_pictures_are_errors() {
        let bytes = encode(&picture(), "x".into());
        for len in 0..33 {
            assert!(settings(&bytes[..len]).is_err(), "cut to {len}");
        }
    }
}
