"""The modules around torchtune's cross-attention layer, in our own words and under its names.

`tests/flamingo_kernels/patch/test_torchtune.py` loads this file as each of torchtune's modules.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        wide = x.float()
        normed = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.scale
        return normed.to(x.dtype)


class TanhGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.scale.tanh() * x


class FeedForward(nn.Module):
    def __init__(self, gate_proj, down_proj, up_proj=None):
        super().__init__()
        self.w1, self.w2, self.w3, self.activation = gate_proj, down_proj, up_proj, nn.SiLU()

    def forward(self, x):
        hidden = self.activation(self.w1(x))
        return self.w2(hidden if self.w3 is None else hidden * self.w3(x))


class KVCache(nn.Module):
    """As many keys and values as there may be; those that were not written are 0, and are seen."""

    def __init__(self, batch, heads, length, head_dim, dtype):
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(batch, heads, length, head_dim, dtype=dtype))
        self.register_buffer("v_cache", torch.zeros(batch, heads, length, head_dim, dtype=dtype))
        self.size = 0

    def update(self, k, v):
        end = self.size + k.shape[2]
        self.k_cache[:, :, self.size : end] = k
        self.v_cache[:, :, self.size : end] = v
        self.size = end
        return self.k_cache, self.v_cache


def attention(q, k, v, mask, dropout_p, is_causal):
    mask = mask if mask is None else mask[:, None]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)


class MultiHeadAttention(nn.Module):
    def __init__(self, width, heads, kv_heads, head_dim, *, norm, call, is_causal=False, attn_dropout=0.0):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.output_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.q_norm, self.k_norm = (norm(head_dim) if norm else None for _ in range(2))
        self.pos_embeddings, self.kv_cache, self.cache_enabled = None, None, False
        self.is_causal, self.attn_dropout, self._attention_call = is_causal, attn_dropout, call

    def setup_cache(self, batch, dtype, length):
        self.kv_cache = KVCache(batch, self.num_kv_heads, length, self.head_dim, dtype)
        self.cache_enabled = True

    def forward(self, x, y=None, *, mask=None):
        q = self.heads_of(self.q_proj(x), self.q_norm)
        if y is None:
            k, v = self.kv_cache.k_cache, self.kv_cache.v_cache
        else:
            k, v = self.heads_of(self.k_proj(y), self.k_norm), self.heads_of(self.v_proj(y), None)
            if self.cache_enabled:
                k, v = self.kv_cache.update(k, v)
        k, v = (each.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for each in (k, v))
        causal = self.is_causal and mask is None and self.kv_cache is None
        dropout = self.attn_dropout if self.training else 0.0
        out = self._attention_call(q, k, v, mask=mask, dropout_p=dropout, is_causal=causal)
        return self.output_proj(out.transpose(1, 2).flatten(-2))

    def heads_of(self, x, norm):
        x = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return x if norm is None else norm(x)


class TransformerCrossAttentionLayer(nn.Module):
    def __init__(self, attn, mlp, *, ca_norm=None, mlp_norm=None, ca_scale=None, mlp_scale=None):
        super().__init__()
        self.attn, self.mlp = attn, mlp
        self.ca_norm, self.mlp_norm = ca_norm or nn.Identity(), mlp_norm or nn.Identity()
        self.ca_scale, self.mlp_scale = ca_scale or nn.Identity(), mlp_scale or nn.Identity()

    def forward(self, x, *, encoder_input=None, encoder_mask=None, **kwargs):
        cached = self.attn.cache_enabled and self.attn.kv_cache.size > 0
        if encoder_input is None and not cached:
            return x
        blind = None
        if encoder_mask is not None:
            hidden = ~encoder_mask if encoder_mask.dtype == torch.bool else encoder_mask == -torch.inf
            blind = hidden.all(-1, keepdim=True)
            encoder_mask = encoder_mask.masked_fill(blind, True)
        attended = self.attn(self.ca_norm(x), encoder_input, mask=encoder_mask)
        x = x + self.ca_scale(self.shown(attended, blind))
        return x + self.mlp_scale(self.shown(self.mlp(self.mlp_norm(x)), blind))

    def shown(self, y, blind):
        return y if blind is None else y.masked_fill(blind, 0)
