//! Does a picture of the demo model show what its prompt says? The measure of `models/demo/score.py`.
//!
//! A check looks at a place of the picture and compares its median color, in Lab, with the twelve named colors; `shape`
//! compares the outline of what differs from the background with those of the eight shapes. A prompt passes when all its
//! checks do.

use std::collections::HashMap;

use image::RgbImage;
use serde_json::Value;

use crate::{data, demo, median};

type Lab = [f64; 3];

/// One of the prompts that are scored.
pub struct Prompt {
    /// Its place in the list.
    pub id: usize,
    /// Seed of its noise in numpy's legacy generator.
    pub seed: u32,
    /// `single`, `count`, `place`, `landscape` or `relation`.
    pub kind: String,
    /// The words.
    pub prompt: String,
    checks: Value,
}

/// The hundred prompts of `eval_prompts.json`.
pub fn prompts() -> Vec<Prompt> {
    let text = std::fs::read_to_string(demo().join("eval_prompts.json")).unwrap();
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    let rows = rows.into_iter().map(|mut row| Prompt {
        id: row["id"].as_u64().unwrap() as usize,
        seed: row["seed"].as_u64().unwrap() as u32,
        kind: row["kind"].as_str().unwrap().to_string(),
        prompt: row["prompt"].as_str().unwrap().to_string(),
        checks: row["checks"].take(),
    });
    rows.collect()
}

/// The named colors and the outlines of the shapes.
pub struct Score {
    colors: Vec<(String, Lab)>,
    outlines: Vec<(String, Vec<f64>)>,
}

impl Score {
    /// Reads `score.json`.
    pub fn open() -> Score {
        let text = std::fs::read_to_string(data().join("score.json")).unwrap();
        let file: HashMap<String, HashMap<String, Value>> = serde_json::from_str(&text).unwrap();
        let color = |v: &Value| std::array::from_fn(|i| v[i].as_f64().unwrap());
        let outline = |v: &Value| {
            let rows = v.as_array().unwrap().iter().map(|row| row.as_str().unwrap());
            let pixel = |row: &str, x: usize| u8::from_str_radix(&row[2 * x..2 * x + 2], 16).unwrap() as f64;
            rows.flat_map(|row| (0..SIDE).map(move |x| pixel(row, x) / 255.)).collect()
        };
        let mut colors: Vec<_> = file["colors"].iter().map(|(k, v)| (k.clone(), lab(color(v)))).collect();
        let mut outlines: Vec<_> = file["outlines"].iter().map(|(k, v)| (k.clone(), outline(v))).collect();
        colors.sort_by(|a, b| a.0.cmp(&b.0));
        outlines.sort_by(|a, b| a.0.cmp(&b.0));
        Score { colors, outlines }
    }

    /// Whether the picture passes all checks of the prompt.
    pub fn passes(&self, picture: &RgbImage, prompt: &Prompt) -> bool {
        let checks = prompt.checks.as_object().unwrap();
        checks.iter().all(|(name, v)| match name.as_str() {
            "background" => self.background(picture) == v.as_str().unwrap(),
            "colors" => v.as_array().unwrap().iter().all(|c| {
                let (x, y) = (c[0].as_f64().unwrap(), c[1].as_f64().unwrap());
                self.name_at(picture, x, y, 0.045) == c[2].as_str().unwrap()
            }),
            "shape" => {
                let [kind, fore, back] = [0, 1, 2].map(|i| v[i].as_str().unwrap());
                self.shape(picture, fore, back) == Some(kind)
            }
            "sky" => sky(picture, v.as_str().unwrap()),
            other => panic!("unknown check {other}"),
        })
    }

    /// The named color nearest to the median of a square of half side `q` around `(x, y)`, all as shares of the picture.
    fn name_at(&self, picture: &RgbImage, x: f64, y: f64, q: f64) -> &str {
        let span = |c: f64, len: u32| {
            let first = ((c - q).max(0.) * len as f64) as u32;
            first..(((c + q) * len as f64) as u32 + 1).min(len)
        };
        let (xs, ys) = (span(x, picture.width()), span(y, picture.height()));
        let middle = std::array::from_fn(|channel| {
            let row = |y| xs.clone().map(move |x| picture.get_pixel(x, y)[channel] as f64);
            median(&ys.clone().flat_map(row).collect::<Vec<_>>())
        });
        let color = lab(middle);
        nearest(&self.colors, |candidate| distance(*candidate, color))
    }

    /// The color of most corners.
    fn background(&self, picture: &RgbImage) -> &str {
        let corners = [(0.04, 0.04), (0.96, 0.04), (0.04, 0.96), (0.96, 0.96)];
        let names = corners.map(|(x, y)| self.name_at(picture, x, y, 0.03));
        let count = |name: &str| names.iter().filter(|&&n| n == name).count();
        names.into_iter().rev().max_by_key(|name| count(name)).expect("there are four corners")
    }

    /// Which shape is drawn in the color `fore` on the color `back`.
    fn shape(&self, picture: &RgbImage, fore: &str, back: &str) -> Option<&str> {
        let named = |name| self.colors.iter().find(|c| c.0 == name).unwrap().1;
        let (fore, back) = (named(fore), named(back));
        let mask: Vec<bool> = picture
            .pixels()
            .map(|p| lab(p.0.map(f64::from)))
            .map(|c| distance(c, fore) < distance(c, back))
            .collect();
        let got = outline(&mask, picture.width() as usize)?;
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
fn sky(picture: &RgbImage, kind: &str) -> bool {
    let mean = |rows: std::ops::Range<u32>| -> [f64; 3] {
        let n = (rows.len() as u32 * picture.width()) as f64;
        let sum = |channel| {
            let row = |y| (0..picture.width()).map(move |x| picture.get_pixel(x, y)[channel] as f64);
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
