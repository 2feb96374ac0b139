//! How far two results are apart.
#![forbid(unsafe_code)]

/// `|got - want| / |want|` in the Euclidean norm.
///
/// # Panics
/// Where they differ in length.
pub fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len(), "results of one shape");
    let square = |x: f32| f64::from(x).powi(2);
    let error: f64 = got.iter().zip(want).map(|(&g, &w)| square(g - w)).sum();
    (error / want.iter().map(|&w| square(w)).sum::<f64>().max(f64::MIN_POSITIVE)).sqrt()
}

/// The middle value, or the mean of the two in the middle.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n => (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
    }
}

/// The largest value.
pub fn worst(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

/// The most that [`psnr`] says, also of pictures that are equal.
const MAX_PSNR: f64 = 99.0;

/// Peak signal-to-noise ratio of 8-bit pictures in dB.
///
/// # Panics
/// Where they differ in size.
pub fn psnr(got: &[u8], want: &[u8]) -> f64 {
    assert_eq!(got.len(), want.len(), "pictures of one size");
    let squares: f64 = got.iter().zip(want).map(|(&g, &w)| (f64::from(g) - f64::from(w)).powi(2)).sum();
    let mean = squares / got.len() as f64;
    (10.0 * (255f64.powi(2) / mean.max(1e-12)).log10()).min(MAX_PSNR)
}

/// Side of a window of [`ssim`], and how far one is from the next, in pixels.
const WINDOW: usize = 8;
const STRIDE: usize = 4;

/// Structural similarity (Wang et al. 2004) of the luma of pictures `[h, width, 3]`, the mean over square windows; 1 where
/// they are equal.
pub fn ssim(got: &[u8], want: &[u8], width: usize) -> f64 {
    assert_eq!(got.len(), want.len(), "pictures of one size");
    let luma = |p: &[u8]| -> Vec<f64> {
        let weighted = |p: &[u8]| 0.299 * f64::from(p[0]) + 0.587 * f64::from(p[1]) + 0.114 * f64::from(p[2]);
        p.chunks_exact(3).map(weighted).collect()
    };
    let (x, y) = (luma(got), luma(want));
    let height = x.len() / width;
    let (c1, c2) = ((0.01 * 255f64).powi(2), (0.03 * 255f64).powi(2));
    let n = (WINDOW * WINDOW) as f64;
    let (mut sum, mut windows) = (0.0, 0.0);
    for top in (0..=height - WINDOW).step_by(STRIDE) {
        for left in (0..=width - WINDOW).step_by(STRIDE) {
            let mut s = [0.0; 5]; // sums of x, y, x^2, y^2, x y
            for at in (top..top + WINDOW).flat_map(|r| r * width + left..r * width + left + WINDOW) {
                let (x, y) = (x[at], y[at]);
                s.iter_mut().zip([x, y, x * x, y * y, x * y]).for_each(|(s, v)| *s += v);
            }
            let [mx, my, xx, yy, xy] = s.map(|s| s / n);
            let (vx, vy, cov) = (xx - mx * mx, yy - my * my, xy - mx * my);
            sum += (2.0 * mx * my + c1) * (2.0 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2));
            windows += 1.0;
        }
    }
    sum / windows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures() {
        assert!((relative_error(&[3., 4.5], &[3., 4.]) - 0.1).abs() < 1e-12);
        assert_eq!(median(&[3., 1., 2., 10.]), 2.5);
        assert!((psnr(&[10, 20], &[11, 19]) - 48.1308).abs() < 1e-4);
        assert_eq!(psnr(&[10], &[10]), MAX_PSNR);
        let picture: Vec<u8> = (0..16 * 16 * 3).map(|i| (i * 37 % 251) as u8).collect();
        let negative: Vec<u8> = picture.iter().map(|x| 255 - x).collect();
        assert!((ssim(&picture, &picture, 16) - 1.0).abs() < 1e-12);
        assert!(ssim(&negative, &picture, 16) < 0.0);
    }
}
