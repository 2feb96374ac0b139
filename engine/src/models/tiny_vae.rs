//! Pixels to latents and back in a hundredth of the work (TAESD; diffusers' `AutoencoderTiny`).
#![forbid(unsafe_code)]

use kernels::gemm::Activation;
use kernels::view::Border;

use crate::card::{TinyBlocks, VaeConfig};
use crate::graph::weight::Role;
use crate::graph::{Builder, Dims, Network, Rate, Tensor};

/// Latents to pixels. Input `latents`: `[batch, h, w, latent_channels]`, bounded as by [`bound`]. Output `image`:
/// `[batch, h * f, w * f, out_channels]`, nominally 0 to 1.
pub(super) fn decoder(cfg: &VaeConfig, tiny: &TinyBlocks, batch: usize, h: usize, w: usize) -> Network {
    let mut b = Builder::new("vae.decoder.layers");
    let c = cfg.block_out_channels[0];
    let mut at = Layers::default();
    let x = b.input("latents", Dims { batch, h, w }, cfg.latent_channels, Rate::Run);
    let mut x = b.conv3x3(x, &at.next(), c, Role::ConvIn).activation(Activation::Relu).build();
    at.skip(); // the rectifier
    for (i, &blocks) in tiny.num_decoder_blocks.iter().enumerate() {
        for _ in 0..blocks {
            x = block(&mut b, &at.next(), x);
        }
        if i + 1 < tiny.num_decoder_blocks.len() {
            at.skip(); // the upsampling
            let Dims { h, w, .. } = b.dims(x);
            x = b.conv3x3(x, &at.next(), c, Role::Conv).upsampled(2 * h, 2 * w).no_bias().build();
        }
    }
    let image = b.conv3x3(x, &at.next(), cfg.out_channels, Role::ConvOut).build();
    b.output("image", image);
    b.finish()
}

/// Pixels to latents. Input `image`: `[batch, h, w, in_channels]`, 0 to 1. Output `latents`:
/// `[batch, h / f, w / f, latent_channels]`.
pub(super) fn encoder(cfg: &VaeConfig, tiny: &TinyBlocks, batch: usize, h: usize, w: usize) -> Network {
    let mut b = Builder::new("vae.encoder.layers");
    let c = cfg.block_out_channels[0];
    let mut at = Layers::default();
    let mut x = b.input("image", Dims { batch, h, w }, cfg.in_channels, Rate::Run);
    for (i, &blocks) in tiny.num_encoder_blocks.iter().enumerate() {
        x = if i == 0 {
            b.conv3x3(x, &at.next(), c, Role::ConvIn).build()
        } else {
            let border = Border { top: 1, left: 1, bottom: 1, right: 1 };
            b.conv3x3(x, &at.next(), c, Role::Conv).stride2(border).no_bias().build()
        };
        for _ in 0..blocks {
            x = block(&mut b, &at.next(), x);
        }
    }
    let latents = b.conv3x3(x, &at.next(), cfg.latent_channels, Role::ConvOut).build();
    b.output("latents", latents);
    b.finish()
}

/// Three convolutions, each but the last with a rectifier behind it; one more behind their sum with `x`.
fn block(b: &mut Builder, layer: &str, x: Tensor) -> Tensor {
    let c = b.channels(x);
    b.within(format!("{layer}.conv"), |b| {
        let y = b.conv3x3(x, "0", c, Role::Conv).activation(Activation::Relu).build();
        let y = b.conv3x3(y, "2", c, Role::Conv).activation(Activation::Relu).build();
        b.conv3x3(y, "4", c, Role::Conv).residual(x).activation(Activation::Relu).build()
    })
}

/// What the decoder takes, from the encoder's latents: `3 tanh(x / 3)`.
pub fn bound(latents: &mut [f32]) {
    latents.iter_mut().for_each(|x| *x = 3.0 * (*x / 3.0).tanh());
}

/// Counts the layers of a half, whose numbers are their names.
#[derive(Default)]
struct Layers(usize);

impl Layers {
    /// The next one's name.
    fn next(&mut self) -> String {
        self.0 += 1;
        (self.0 - 1).to_string()
    }

    /// A layer without weights.
    fn skip(&mut self) {
        self.0 += 1;
    }
}
