//! CLIP's text encoder (Radford et al. 2021, as in transformers' `CLIPTextModel`).
#![forbid(unsafe_code)]

use kernels::gemm::Activation;

use crate::card::{ClipActivation, ClipConfig};
use crate::graph::weight::Role;
use crate::graph::{Builder, Dims, Network, Rate, Tensor};

/// Text encoder number `index` over `batch` windows.
///
/// Input `ids`: u32 `[batch, tokens]`. Output `hidden`: `[batch, tokens, hidden_size]`, the state after all but the last
/// `output_layer - 1` layers. With a projection, output `pooled`: `[batch, tokens, projection_dim]`, the projected last
/// state of every token, of which the caller takes the row of the end of the text.
pub fn clip(index: usize, cfg: &ClipConfig, batch: usize, output_layer: usize) -> Network {
    let mut b = Builder::new(if index == 0 { "text_encoder" } else { "text_encoder_2" });
    let dims = Dims { batch, h: 1, w: cfg.max_position_embeddings };
    let ids = b.ids("ids", dims, Rate::Run);
    let wanted = cfg.num_hidden_layers + 1 - output_layer.clamp(1, cfg.num_hidden_layers);
    let last = if cfg.projection_dim.is_some() { cfg.num_hidden_layers } else { wanted };
    let normed = b.within("text_model", |b| {
        let mut x = b.within("embeddings", |b| {
            b.lookup(
                ids,
                ("token_embedding.weight", cfg.vocab_size),
                ("position_embedding.weight", cfg.max_position_embeddings),
                cfg.hidden_size,
            )
        });
        let mut hidden = x;
        for i in 0..last {
            x = b.within(format!("encoder.layers.{i}"), |b| layer(b, cfg, x));
            if i + 1 == wanted {
                hidden = x;
            }
        }
        let normed = (cfg.output_norm || cfg.projection_dim.is_some()).then(|| {
            let source = if cfg.projection_dim.is_some() { x } else { hidden };
            b.layer_norm(source, "final_layer_norm", cfg.layer_norm_eps)
        });
        let out = match normed {
            Some(n) if cfg.output_norm => n,
            _ => hidden,
        };
        b.output("hidden", out);
        normed
    });
    if let (Some(normed), Some(dim)) = (normed, cfg.projection_dim) {
        let pooled = b.linear(normed, "text_projection", dim, Role::Pooled).no_bias().build();
        b.output("pooled", pooled);
    }
    b.finish()
}

fn layer(b: &mut Builder, cfg: &ClipConfig, x: Tensor) -> Tensor {
    let c = cfg.hidden_size;
    let act = match cfg.hidden_act {
        ClipActivation::QuickGelu => Activation::QuickGelu,
        ClipActivation::Gelu => Activation::Gelu,
    };
    let y = b.layer_norm(x, "layer_norm1", cfg.layer_norm_eps);
    let x = b.within("self_attn", |b| {
        let q = b.linear(y, "q_proj", c, Role::SelfQkv).build();
        let k = b.linear(y, "k_proj", c, Role::SelfQkv).build();
        let v = b.linear(y, "v_proj", c, Role::SelfQkv).build();
        let y = b.attention(q, k, v, cfg.num_attention_heads, true);
        b.linear(y, "out_proj", c, Role::AttentionOut).residual(x).build()
    });
    let y = b.layer_norm(x, "layer_norm2", cfg.layer_norm_eps);
    let y = b.linear(y, "mlp.fc1", cfg.intermediate_size, Role::MlpIn).activation(act).build();
    b.linear(y, "mlp.fc2", c, Role::MlpOut).residual(x).build()
}
