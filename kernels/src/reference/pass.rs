//! Norms and quantizing in f64.
#![forbid(unsafe_code)]

use crate::pass::{Norm, Recipe, Source, stats_len};
use crate::reference::math;
use crate::view::{ImageShape, Rows};

/// `[rows, columns]` of all parts side by side.
pub fn columns(source: Source<'_>, rows: usize) -> Vec<f64> {
    let mut all = Vec::new();
    for r in 0..rows {
        for (part, c) in source.parts.into_iter().flatten() {
            match part {
                Rows::F32(x) => all.extend(x[r * c..(r + 1) * c].iter().map(|&x| f64::from(x))),
                Rows::Bf16(x) => all.extend(x[r * c..(r + 1) * c].iter().map(|&x| f64::from(x.to_f32()))),
            }
        }
    }
    all
}

/// `[batch, stats_len]`.
pub fn group_stats(source: Source<'_>, image: ImageShape, groups: usize, eps: f32) -> Vec<f64> {
    let (x, c, pixels) = (columns(source, image.pixels()), source.columns(), image.h * image.w);
    let size = c / groups;
    let mut stats = Vec::new();
    for b in 0..image.batch {
        for g in 0..groups {
            let group = (0..pixels).flat_map(|p| &x[(b * pixels + p) * c + g * size..][..size]);
            let n = (pixels * size) as f64;
            let mean = group.clone().sum::<f64>() / n;
            let variance = group.map(|x| (x - mean).powi(2)).sum::<f64>() / n;
            stats.extend([mean, 1.0 / (variance + f64::from(eps)).sqrt()]);
        }
        for i in 0..c {
            let channel = (0..pixels).map(|p| x[(b * pixels + p) * c + i]);
            stats.push(channel.clone().fold(f64::INFINITY, f64::min));
            stats.push(channel.fold(f64::NEG_INFINITY, f64::max));
        }
    }
    stats
}

/// `activation(norm(source)) * factors`, `[pixels, columns]`.
pub fn rows(source: Source<'_>, image: ImageShape, recipe: Recipe<'_>) -> Vec<f64> {
    let Recipe { norm, activation, factors } = recipe;
    let (mut x, c) = (columns(source, image.pixels()), source.columns());
    for (r, row) in x.chunks_exact_mut(c).enumerate() {
        let n = c as f64;
        let mean = row.iter().sum::<f64>() / n;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        for (i, x) in row.iter_mut().enumerate() {
            let y = match norm {
                Norm::None => *x,
                Norm::Group { stats, groups, gamma, beta } => {
                    let at = r / (image.h * image.w) * stats_len(groups, c) + i / (c / groups) * 2;
                    let (mean, rstd) = (f64::from(stats[at]), f64::from(stats[at + 1]));
                    (*x - mean) * rstd * f64::from(gamma[i]) + f64::from(beta[i])
                }
                Norm::Layer { gamma, beta, eps } => {
                    (*x - mean) / (variance + f64::from(eps)).sqrt() * f64::from(gamma[i])
                        + f64::from(beta[i])
                }
            };
            *x = math::activation(activation, y) * factors.map_or(1.0, |factors| f64::from(factors[i]));
        }
    }
    x
}

/// `[pixels, columns]` with the border and the slack of `image` and `stride`, zeros: `[operand_rows, stride]`.
pub fn operand(rows: &[f64], image: ImageShape, stride: usize) -> Vec<f64> {
    let c = rows.len() / image.pixels().max(1);
    let mut all = vec![0.0; image.operand_rows() * stride];
    for b in 0..image.batch {
        for y in 0..image.h {
            for x in 0..image.w {
                let from = ((b * image.h + y) * image.w + x) * c;
                let to =
                    ((b * image.full_h() + y + image.border.top) * image.full_w() + x + image.border.left)
                        * stride;
                all[to..to + c].copy_from_slice(&rows[from..from + c]);
            }
        }
    }
    all
}
