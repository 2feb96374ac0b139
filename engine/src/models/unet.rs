//! The denoiser of Stable Diffusion (Rombach et al. 2022; diffusers' `UNet2DConditionModel`).
#![forbid(unsafe_code)]

use kernels::gemm::Activation;
use kernels::view::Border;

use crate::card::UnetConfig;
use crate::graph::weight::Role;
use crate::graph::{Builder, Dims, Network, Rate, Tensor};

/// Epsilon of the norms in residual blocks and before the last convolution.
const EPS: f32 = 1e-5;
/// Epsilon of the norm at the entry of a transformer.
const TRANSFORMER_EPS: f32 = 1e-6;
/// Epsilon of a transformer's layer norms.
const LAYER_EPS: f32 = 1e-5;

/// Sizes of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnetInput {
    /// Prompts at a time.
    pub batch: usize,
    /// Rows of latents.
    pub h: usize,
    /// Columns of latents.
    pub w: usize,
    /// Tokens of context.
    pub tokens: usize,
    /// Timesteps whose embeddings are made at a time.
    pub timesteps: usize,
}

/// Noise predictions of one picture for several prompts. What comes before the first attention to a prompt is the same for
/// all and computed once, unless the config has a `size` for each.
///
/// Inputs: `latents` `[images, h, w, in_channels]`, where `images` is `batch` with a `size` and 1 without; `time`
/// `[images, timesteps, c0]`, the sinusoidal embeddings of timesteps; `context` `[batch, tokens, cross_attention_dim]`; where
/// the config has them, `guidance` `[images, timesteps, time_cond_proj_dim]` and `size` `[batch, projection_input_dim]`. Output:
/// `noise` `[batch, h, w, out_channels]`.
pub fn unet(cfg: &UnetConfig, size: UnetInput) -> Network {
    let UnetInput { batch, h, w, tokens, timesteps } = size;
    let mut b = Builder::new("unet");
    let c0 = cfg.block_out_channels[0];
    let images = if cfg.addition_embed.is_some() { batch } else { 1 };
    let rows = Dims { batch: images, h: 1, w: timesteps };
    let latents = b.input("latents", Dims { batch: images, h, w }, cfg.in_channels, Rate::Step);
    let time = b.input("time", rows, c0, Rate::Schedule);
    let context = b.input("context", Dims { batch, h: 1, w: tokens }, cfg.cross_attention_dim, Rate::Run);

    let aug = cfg.addition_embed.map(|a| {
        let size = b.input("size", Dims { w: 1, ..rows }, a.projection_input_dim, Rate::Run);
        b.within("add_embedding", |b| embedding(b, size, 4 * c0, None))
    });
    let time = match cfg.time_cond_proj_dim {
        Some(dim) => {
            let guidance = b.input("guidance", rows, dim, Rate::Run);
            b.within("time_embedding", |b| {
                b.linear(guidance, "cond_proj", c0, Role::Embedding).no_bias().residual(time).build()
            })
        }
        None => time,
    };
    let emb = b.within("time_embedding", |b| embedding(b, time, 4 * c0, aug));
    let emb = b.activate(emb, Activation::Silu); // [images, timesteps, 4 c0]: every residual block begins so

    let x = b.conv3x3(latents, "conv_in", c0, Role::ConvIn).build();
    let net = Blocks { cfg, emb, context };
    let mut skips = vec![x];
    let x = net.down(&mut b, x, &mut skips);
    let x = net.mid(&mut b, x);
    let x = net.up(&mut b, x, &mut skips);
    let x = b.repeat(x, batch);
    let x = b.group_norm(x, "conv_norm_out", cfg.norm_num_groups, EPS, Activation::Silu);
    let noise = b.conv3x3(x, "conv_out", cfg.out_channels, Role::ConvOut).build();
    b.output("noise", noise);
    b.finish()
}

/// A residual block of the finest level and the transformer behind it, as every step of a run goes through several: what a
/// bench measures.
///
/// Inputs: `hidden_states` `[batch, h, w, c0]`; `emb` `[batch, timesteps, 4 c0]`, activated; `context`
/// `[batch, tokens, cross_attention_dim]`. Output: `out` `[batch, h, w, c0]`.
pub fn unet_block(cfg: &UnetConfig, size: UnetInput) -> Network {
    let UnetInput { batch, h, w, tokens, timesteps } = size;
    let mut b = Builder::new("unet");
    let c = cfg.block_out_channels[0];
    let x = b.input("hidden_states", Dims { batch, h, w }, c, Rate::Step);
    let emb = b.input("emb", Dims { batch, h: 1, w: timesteps }, 4 * c, Rate::Schedule);
    let context = b.input("context", Dims { batch, h: 1, w: tokens }, cfg.cross_attention_dim, Rate::Run);
    let net = Blocks { cfg, emb, context };
    let out = b.within("down_blocks.0", |b| {
        let x = net.resnet(b, x, 0, c);
        net.transformer(b, x, 0, cfg.down_layers[0][0], cfg.num_attention_heads[0])
    });
    b.output("out", out);
    b.finish()
}

/// linear, SiLU, linear; `add` `[images, n]` is added to all pixels of an image.
fn embedding(b: &mut Builder, x: Tensor, n: usize, add: Option<Tensor>) -> Tensor {
    let x = b.linear(x, "linear_1", n, Role::Embedding).activation(Activation::Silu).build();
    let out = b.linear(x, "linear_2", n, Role::Embedding);
    match add {
        Some(t) => out.image_bias(t).build(),
        None => out.build(),
    }
}

struct Blocks<'a> {
    cfg: &'a UnetConfig,
    /// `[images, timesteps, 4 c0]`, activated.
    emb: Tensor,
    /// `[batch, tokens, cross_attention_dim]`.
    context: Tensor,
}

impl Blocks<'_> {
    fn down(&self, b: &mut Builder, mut x: Tensor, skips: &mut Vec<Tensor>) -> Tensor {
        let levels = self.cfg.block_out_channels.len();
        for (i, &c) in self.cfg.block_out_channels.iter().enumerate() {
            b.within(format!("down_blocks.{i}"), |b| {
                for (j, &depth) in self.cfg.down_layers[i].iter().enumerate() {
                    x = self.resnet(b, x, j, c);
                    x = self.transformer(b, x, j, depth, self.cfg.num_attention_heads[i]);
                    skips.push(x);
                }
                if i + 1 < levels {
                    let border = Border { top: 1, left: 1, bottom: 1, right: 1 };
                    x = b.conv3x3(x, "downsamplers.0.conv", c, Role::Conv).stride2(border).build();
                    skips.push(x);
                }
            });
        }
        x
    }

    fn mid(&self, b: &mut Builder, x: Tensor) -> Tensor {
        let Some(depth) = self.cfg.mid_layers else { return x };
        let c = *self.cfg.block_out_channels.last().expect("a network has levels");
        let heads = *self.cfg.num_attention_heads.last().expect("a network has levels");
        b.within("mid_block", |b| {
            let x = self.resnet(b, x, 0, c);
            if depth == 0 {
                return x;
            }
            let x = self.transformer(b, x, 0, depth, heads);
            self.resnet(b, x, 1, c)
        })
    }

    fn up(&self, b: &mut Builder, mut x: Tensor, skips: &mut Vec<Tensor>) -> Tensor {
        let levels = self.cfg.block_out_channels.len();
        for i in 0..levels {
            let level = levels - 1 - i;
            let c = self.cfg.block_out_channels[level];
            b.within(format!("up_blocks.{i}"), |b| {
                for (j, &depth) in self.cfg.up_layers[i].iter().enumerate() {
                    let skip = skips.pop().expect("one skip per residual block on the way up");
                    let skip = b.repeat(skip, b.dims(x).batch);
                    let joined = b.concat(x, skip);
                    x = self.resnet(b, joined, j, c);
                    x = self.transformer(b, x, j, depth, self.cfg.num_attention_heads[level]);
                }
                if level > 0 {
                    // The next skip says which size odd sizes had on the way down.
                    let to = b.dims(*skips.last().expect("one skip per residual block on the way up"));
                    x = b.conv3x3(x, "upsamplers.0.conv", c, Role::Conv).upsampled(to.h, to.w).build();
                }
            });
        }
        x
    }

    fn resnet(&self, b: &mut Builder, x: Tensor, j: usize, c: usize) -> Tensor {
        b.within(format!("resnets.{j}"), |b| resnet(b, x, c, self.cfg.norm_num_groups, EPS, Some(self.emb)))
    }

    /// `depth` transformer layers over the pixels.
    fn transformer(&self, b: &mut Builder, x: Tensor, j: usize, depth: usize, heads: usize) -> Tensor {
        if depth == 0 {
            return x;
        }
        let c = b.channels(x);
        b.within(format!("attentions.{j}"), |b| {
            let y = b.group_norm(x, "norm", self.cfg.norm_num_groups, TRANSFORMER_EPS, Activation::None);
            let mut y = b.linear(y, "proj_in", c, Role::Projection).build();
            for k in 0..depth {
                y = b.within(format!("transformer_blocks.{k}"), |b| self.layer(b, y, heads));
            }
            let x = b.repeat(x, b.dims(y).batch);
            b.linear(y, "proj_out", c, Role::Projection).residual(x).build()
        })
    }

    fn layer(&self, b: &mut Builder, x: Tensor, heads: usize) -> Tensor {
        let c = b.channels(x);
        let y = b.layer_norm(x, "norm1", LAYER_EPS);
        let x = b.within("attn1", |b| {
            let q = b.linear(y, "to_q", c, Role::SelfQkv).no_bias().build();
            let k = b.linear(y, "to_k", c, Role::SelfQkv).no_bias().build();
            let v = b.linear(y, "to_v", c, Role::SelfQkv).no_bias().build();
            let y = b.attention(q, k, v, heads, false);
            b.linear(y, "to_out.0", c, Role::AttentionOut).residual(x).build()
        });
        let x = b.repeat(x, b.dims(self.context).batch);
        let y = b.layer_norm(x, "norm2", LAYER_EPS);
        let x = b.within("attn2", |b| {
            let q = b.linear(y, "to_q", c, Role::CrossQ).no_bias().build();
            let k = b.linear(self.context, "to_k", c, Role::CrossKv).no_bias().build();
            let v = b.linear(self.context, "to_v", c, Role::CrossKv).no_bias().build();
            let y = b.attention(q, k, v, heads, false);
            b.linear(y, "to_out.0", c, Role::AttentionOut).residual(x).build()
        });
        let y = b.layer_norm(x, "norm3", LAYER_EPS);
        let y = b.linear(y, "ff.net.0.proj", 8 * c, Role::MlpIn).activation(Activation::Geglu).build();
        b.linear(y, "ff.net.2", c, Role::MlpOut).residual(x).build()
    }
}

/// A residual block: norm, SiLU, convolution, twice; `emb` enters between them.
pub(super) fn resnet(
    b: &mut Builder,
    x: Tensor,
    c: usize,
    groups: usize,
    eps: f32,
    emb: Option<Tensor>,
) -> Tensor {
    let shift = emb.map(|emb| {
        let t = b.linear(emb, "time_emb_proj", c, Role::TimeShift).build();
        b.at_timestep(t, b.dims(x).batch)
    });
    let y = b.group_norm(x, "norm1", groups, eps, Activation::Silu);
    let y = b.conv3x3(y, "conv1", c, Role::Conv);
    let y = match shift {
        Some(t) => y.image_bias(t).build(),
        None => y.build(),
    };
    let y = b.group_norm(y, "norm2", groups, eps, Activation::Silu);
    let x = if b.channels(x) == c { x } else { b.linear(x, "conv_shortcut", c, Role::Shortcut).build() };
    b.conv3x3(y, "conv2", c, Role::Conv).residual(x).build()
}
