//! Does a picture of the demo model show what its prompt says? The measure of `models/demo/score.py`.
//!
//! A check looks at a place of the picture and compares its median color, in Lab, with the twelve named colors; `shape`
//! compares the outline of what differs from the background with those of the eight shapes. A prompt passes when all its
//! checks do.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use engine::error::Result;
use engine::pipeline::{Latents, Pipeline, Request};
use serde::Deserialize;

use super::measure::median;
use super::numpy::RandomState;
use super::trajectory::GoOn;

type Lab = [f64; 3];

/// One of the prompts that are scored.
#[derive(Clone, Debug, Deserialize)]
pub struct Prompt {
    /// Its place in the list.
    pub id: usize,
    /// Seed of its noise in numpy's legacy generator.
    pub seed: u32,
    /// The words.
    pub prompt: String,
    checks: Checks,
}

/// What must be seen; what is absent isn't looked at.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Checks {
    /// The color of most corners.
    background: Option<String>,
    /// Colors at places.
    colors: Vec<(f64, f64, String)>,
    /// Shape, its color, the color behind it.
    shape: Option<[String; 3]>,
    /// `night`, `day` or `sunset`.
    sky: Option<String>,
}

/// The hundred prompts of `eval_prompts.json`.
pub fn prompts() -> Vec<Prompt> {
    let text = include_str!("../../../models/demo/eval_prompts.json");
    serde_json::from_str(text).expect("a list of prompts")
}

/// Whether `pipeline` is for the demo model, in whatever precision: the one whose pictures can be scored.
pub fn applies_to(pipeline: &Pipeline) -> bool {
    let demo = crate::demo::open().expect("the built-in model is sound");
    let (card, demo) = (pipeline.card(), demo.card());
    (&card.unet, &card.vae, &card.text_encoders) == (&demo.unet, &demo.vae, &demo.text_encoders)
}

/// Of every `stride`th prompt, those whose pictures show what they say, and those drawn.
pub fn score(pipeline: &Pipeline, stride: usize, go_on: GoOn<'_>) -> Result<(Vec<usize>, Vec<usize>)> {
    let measure = Score::open();
    let (mut passed, mut drawn) = (vec![], vec![]);
    for prompt in prompts().iter().step_by(stride) {
        let noise = RandomState::new(prompt.seed).standard_normal(4 * 16 * 16);
        let request = Request {
            steps: 20,
            guidance_scale: 4.5,
            sampler: "ddim".into(),
            init_latents: Some(Latents { shape: [4, 16, 16], data: noise }),
            ..Request::new(&prompt.prompt, pipeline.card())
        };
        let made = pipeline.generate(&request, &mut |_| go_on())?;
        let picture = Picture { rgb8: &made.rgb8, width: made.width };
        drawn.push(prompt.id);
        passed.extend(measure.passes(&picture, prompt).then_some(prompt.id));
    }
    Ok((passed, drawn))
}

/// Pixels `[h, width, 3]`.
#[derive(Clone, Copy, Debug)]
pub struct Picture<'a> {
    /// The pixels.
    pub rgb8: &'a [u8],
    /// Pixels of a row.
    pub width: usize,
}

impl Picture<'_> {
    fn height(&self) -> usize {
        self.rgb8.len() / 3 / self.width
    }

    fn pixel(&self, x: usize, y: usize) -> [f64; 3] {
        std::array::from_fn(|channel| f64::from(self.rgb8[3 * (y * self.width + x) + channel]))
    }
}

/// `score.json`.
#[derive(Deserialize)]
struct File {
    colors: BTreeMap<String, [f64; 3]>,
    /// Rows of two hexadecimal digits a pixel.
    outlines: BTreeMap<String, Vec<String>>,
}

/// The named colors and the outlines of the shapes.
#[derive(Debug)]
pub struct Score {
    colors: Vec<(String, Lab)>,
    outlines: Vec<(String, Vec<f64>)>,
}

impl Score {
    /// Reads `score.json`.
    pub fn open() -> Score {
        let text = include_str!("../../../tests/data/score.json");
        let file: File = serde_json::from_str(text).expect("colors and outlines");
        let pixel = |row: &str, x: usize| {
            let byte = u8::from_str_radix(&row[2 * x..2 * x + 2], 16).expect("two hexadecimal digits");
            f64::from(byte) / 255.
        };
        let outline =
            |rows: Vec<String>| rows.iter().flat_map(|row| (0..SIDE).map(|x| pixel(row, x))).collect();
        Score {
            colors: file.colors.into_iter().map(|(name, rgb)| (name, lab(rgb))).collect(),
            outlines: file.outlines.into_iter().map(|(name, rows)| (name, outline(rows))).collect(),
        }
    }

    /// Whether the picture passes all checks of the prompt.
    pub fn passes(&self, picture: &Picture<'_>, prompt: &Prompt) -> bool {
        let Checks { background, colors, shape, sky: kind } = &prompt.checks;
        background.as_ref().is_none_or(|name| self.background(picture) == name)
            && colors.iter().all(|(x, y, name)| self.name_at(picture, *x, *y, 0.045) == name)
            && shape
                .as_ref()
                .is_none_or(|[kind, fore, back]| self.shape(picture, fore, back) == Some(kind.as_str()))
            && kind.as_ref().is_none_or(|kind| sky(picture, kind))
    }

    /// The named color nearest to the median of a square of half side `q` around `(x, y)`, all as shares of the picture.
    fn name_at(&self, picture: &Picture<'_>, x: f64, y: f64, q: f64) -> &str {
        let span = |c: f64, len: usize| {
            let first = ((c - q).max(0.) * len as f64) as usize;
            first..(((c + q) * len as f64) as usize + 1).min(len)
        };
        let (xs, ys) = (span(x, picture.width), span(y, picture.height()));
        let middle = std::array::from_fn(|channel| {
            let row = |y| xs.clone().map(move |x| picture.pixel(x, y)[channel]);
            median(&ys.clone().flat_map(row).collect::<Vec<_>>())
        });
        let color = lab(middle);
        nearest(&self.colors, |candidate| distance(*candidate, color))
    }

    /// The color of most corners.
    fn background(&self, picture: &Picture<'_>) -> &str {
        let corners = [(0.04, 0.04), (0.96, 0.04), (0.04, 0.96), (0.96, 0.96)];
        let names = corners.map(|(x, y)| self.name_at(picture, x, y, 0.03));
        let count = |name: &str| names.iter().filter(|&&n| n == name).count();
        names.into_iter().rev().max_by_key(|name| count(name)).expect("there are four corners")
    }

    /// Which shape is drawn in the color `fore` on the color `back`.
    fn shape(&self, picture: &Picture<'_>, fore: &str, back: &str) -> Option<&str> {
        let named = |name| self.colors.iter().find(|c| c.0 == name).expect("a named color").1;
        let (fore, back) = (named(fore), named(back));
        let pixels = (0..picture.height()).flat_map(|y| (0..picture.width).map(move |x| (x, y)));
        let mask: Vec<bool> = pixels
            .map(|(x, y)| lab(picture.pixel(x, y)))
            .map(|c| distance(c, fore) < distance(c, back))
            .collect();
        let got = outline(&mask, picture.width)?;
        let squares = |want: &Vec<f64>| want.iter().zip(&got).map(|(a, b)| (a - b).powi(2)).sum();
        Some(nearest(&self.outlines, squares))
    }
}

fn nearest<T>(candidates: &[(String, T)], distance: impl Fn(&T) -> f64) -> &str {
    let best = candidates.iter().min_by(|a, b| distance(&a.1).total_cmp(&distance(&b.1)));
    &best.expect("there are candidates").0
}

fn distance(a: Lab, b: Lab) -> f64 {
    a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum()
}

/// sRGB in 0..=255 to CIE L*a*b* (D65).
fn lab(rgb: [f64; 3]) -> Lab {
    let [r, g, b] =
        rgb.map(|v| v / 255.).map(|v| if v > 0.04045 { ((v + 0.055) / 1.055).powf(2.4) } else { v / 12.92 });
    let xyz = [
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    ];
    let [x, y, z] = xyz.map(|v| if v > 0.008856 { v.cbrt() } else { 7.787 * v + 16. / 116. });
    [116. * y - 16., 500. * (x - y), 200. * (y - z)]
}

/// Side of an outline.
const SIDE: usize = 24;

/// What is set in the mask `[h, width]`, cut to its box, centered in a square and reduced to `[SIDE, SIDE]`; `None` when it
/// is next to nothing.
fn outline(mask: &[bool], width: usize) -> Option<Vec<f64>> {
    let set = || mask.iter().enumerate().filter(|m| *m.1).map(|(i, _)| (i % width, i / width));
    if set().count() < 40 {
        return None;
    }
    let (x0, x1) = (set().map(|p| p.0).min()?, set().map(|p| p.0).max()?);
    let (y0, y1) = (set().map(|p| p.1).min()?, set().map(|p| p.1).max()?);
    let (w, h) = (x1 - x0 + 1, y1 - y0 + 1);
    let s = w.max(h);
    let (left, top) = ((s - w) / 2, (s - h) / 2);
    let mut square = vec![0u8; s * s];
    for y in 0..h {
        for x in 0..w {
            square[(top + y) * s + left + x] = if mask[(y0 + y) * width + x0 + x] { 255 } else { 0 };
        }
    }
    let narrow = reduce_rows(&square, s);
    let small = reduce_rows(&transpose(&narrow, SIDE), s);
    Some(transpose(&small, SIDE).iter().map(|&v| v as f64 / 255.).collect())
}

/// Reduces rows of `len` pixels to `SIDE`: the mean of those whose centers lie in the cell, rounded to 8 bits.
fn reduce_rows(pixels: &[u8], len: usize) -> Vec<u8> {
    let scale = len as f64 / SIDE as f64;
    let support = 0.5 * scale.max(1.);
    let cell = |x: usize| {
        let center = (x as f64 + 0.5) * scale;
        let first = (center - support + 0.5).max(0.) as usize;
        first..((center + support + 0.5) as usize).min(len)
    };
    let mean = |p: &[u8]| (p.iter().map(|&v| v as f64).sum::<f64>() / p.len() as f64).round() as u8;
    pixels.chunks_exact(len).flat_map(|row| (0..SIDE).map(move |x| mean(&row[cell(x)]))).collect()
}

fn transpose(pixels: &[u8], width: usize) -> Vec<u8> {
    let height = pixels.len() / width;
    (0..pixels.len()).map(|i| pixels[(i % height) * width + i / height]).collect()
}

/// Whether the mean colors of the upper picture are those of a night, a day or a sunset.
fn sky(picture: &Picture<'_>, kind: &str) -> bool {
    let mean = |rows: std::ops::Range<usize>| -> [f64; 3] {
        let n = (rows.len() * picture.width) as f64;
        let sum = |channel| {
            let row = |y| (0..picture.width).map(move |x| picture.pixel(x, y)[channel]);
            rows.clone().flat_map(row).sum::<f64>()
        };
        std::array::from_fn(|channel| sum(channel) / n)
    };
    let (top, middle) = (mean(2..14), mean(40..62));
    match kind {
        "night" => top.iter().sum::<f64>() / 3. < 75. && top[2] > top[0],
        "day" => top[2] > 175. && top[2] > top[0] + 40.,
        "sunset" => middle[0] > middle[2] + 25. && middle[0] > 130.,
        other => panic!("unknown sky {other}"),
    }
}
