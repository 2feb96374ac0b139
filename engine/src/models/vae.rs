//! Pixels to latents and back (diffusers' `AutoencoderKL`, or [`tiny_vae`]).
#![forbid(unsafe_code)]

use kernels::gemm::Activation;
use kernels::view::Border;

use super::tiny_vae;
use super::unet::resnet;
use crate::card::VaeConfig;
use crate::graph::weight::Role;
use crate::graph::{Builder, Dims, Network, Rate, Tensor};

/// Epsilon of every norm.
const EPS: f32 = 1e-6;

/// Latents to pixels. Input `latents`: `[batch, h, w, latent_channels]`, scaled as the decoder wants them. Output
/// `image`: `[batch, h * f, w * f, out_channels]`, nominally -1 to 1; of an AutoencoderTiny 0 to 1.
pub fn vae_decoder(cfg: &VaeConfig, batch: usize, h: usize, w: usize) -> Network {
    if let Some(tiny) = &cfg.tiny {
        return tiny_vae::decoder(cfg, tiny, batch, h, w);
    }
    let mut b = Builder::new("vae");
    let mut x = b.input("latents", Dims { batch, h, w }, cfg.latent_channels, Rate::Run);
    if cfg.use_quant_conv {
        x = b.linear(x, "post_quant_conv", cfg.latent_channels, Role::QuantConv).build();
    }
    b.within("decoder", |b| {
        let levels = cfg.block_out_channels.len();
        x = b.conv3x3(x, "conv_in", cfg.block_out_channels[levels - 1], Role::ConvIn).build();
        x = b.within("mid_block", |b| mid(b, cfg, x));
        for (i, &c) in cfg.block_out_channels.iter().rev().enumerate() {
            b.within(format!("up_blocks.{i}"), |b| {
                for j in 0..=cfg.layers_per_block {
                    x = block(b, cfg, x, j, c);
                }
                if i + 1 < levels {
                    let Dims { h, w, .. } = b.dims(x);
                    x = b.conv3x3(x, "upsamplers.0.conv", c, Role::Conv).upsampled(2 * h, 2 * w).build();
                }
            });
        }
        x = b.group_norm(x, "conv_norm_out", cfg.norm_num_groups, EPS, Activation::Silu);
        x = b.conv3x3(x, "conv_out", cfg.out_channels, Role::ConvOut).build();
        b.output("image", x);
    });
    b.finish()
}

/// Pixels to latents. Input `image`: `[batch, h, w, in_channels]`, -1 to 1. Output `moments`:
/// `[batch, h / f, w / f, 2 * latent_channels]`, mean and log variance.
///
/// An AutoencoderTiny takes 0 to 1 and gives `latents`: `[batch, h / f, w / f, latent_channels]`.
pub fn vae_encoder(cfg: &VaeConfig, batch: usize, h: usize, w: usize) -> Network {
    if let Some(tiny) = &cfg.tiny {
        return tiny_vae::encoder(cfg, tiny, batch, h, w);
    }
    let mut b = Builder::new("vae");
    let image = b.input("image", Dims { batch, h, w }, cfg.in_channels, Rate::Run);
    let x = b.within("encoder", |b| {
        let levels = cfg.block_out_channels.len();
        let mut x = b.conv3x3(image, "conv_in", cfg.block_out_channels[0], Role::ConvIn).build();
        for (i, &c) in cfg.block_out_channels.iter().enumerate() {
            b.within(format!("down_blocks.{i}"), |b| {
                for j in 0..cfg.layers_per_block {
                    x = block(b, cfg, x, j, c);
                }
                if i + 1 < levels {
                    let border = Border { top: 0, left: 0, bottom: 1, right: 1 };
                    x = b.conv3x3(x, "downsamplers.0.conv", c, Role::Conv).stride2(border).build();
                }
            });
        }
        x = b.within("mid_block", |b| mid(b, cfg, x));
        x = b.group_norm(x, "conv_norm_out", cfg.norm_num_groups, EPS, Activation::Silu);
        b.conv3x3(x, "conv_out", 2 * cfg.latent_channels, Role::ConvOut).build()
    });
    let x = if cfg.use_quant_conv {
        b.linear(x, "quant_conv", 2 * cfg.latent_channels, Role::QuantConv).build()
    } else {
        x
    };
    b.output("moments", x);
    b.finish()
}

fn block(b: &mut Builder, cfg: &VaeConfig, x: Tensor, j: usize, c: usize) -> Tensor {
    b.within(format!("resnets.{j}"), |b| resnet(b, x, c, cfg.norm_num_groups, EPS, None))
}

/// Residual block, attention of all pixels to all with one head, residual block.
fn mid(b: &mut Builder, cfg: &VaeConfig, x: Tensor) -> Tensor {
    let c = b.channels(x);
    let mut x = block(b, cfg, x, 0, c);
    if cfg.mid_block_add_attention {
        x = b.within("attentions.0", |b| {
            let y = b.group_norm(x, "group_norm", cfg.norm_num_groups, EPS, Activation::None);
            let q = b.linear(y, "to_q", c, Role::SelfQkv).build();
            let k = b.linear(y, "to_k", c, Role::SelfQkv).build();
            let v = b.linear(y, "to_v", c, Role::SelfQkv).build();
            let y = b.attention(q, k, v, 1, false);
            b.linear(y, "to_out.0", c, Role::AttentionOut).residual(x).build()
        });
    }
    block(b, cfg, x, 1, c)
}
