"""When modules are taken apart for a sublayer, and when they are called."""

from __future__ import annotations

import pytest
import torch

from flamingo import modules
from flamingo_kernels import patch
from flamingo_kernels.layers import cross_attention, fused

LOCATIONS = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("length", "gradients", "expected"),
    [(1, False, []), (2, False, ["attention", "feed-forward"]), (1, True, ["attention", "feed-forward"])],
    ids=["a step", "two tokens", "a token in training"],
)
def test_a_step_of_decoding_calls_modules(length, gradients, expected, monkeypatch):
    calls = []
    for home, name, part in (
        (cross_attention, "gated_cross_attention", "attention"),
        (fused, "gated_feed_forward", "feed-forward"),
    ):
        sublayer = getattr(home, name)

        def call(*args, part=part, sublayer=sublayer, **kwargs):
            calls.append(part)
            return sublayer(*args, **kwargs)

        monkeypatch.setattr(home, name, call)
    block = modules.GatedCrossAttentionBlock(dim=16, dim_visual=8, dim_head=4, heads=2)
    for gate in (block.attn_gate, block.ff_gate):
        torch.nn.init.constant_(gate, 0.7)
    x, media = torch.randn(2, length, 16), torch.randn(2, 2, 5, 8)
    with torch.set_grad_enabled(gradients):
        expected_z = block(x, media, LOCATIONS, use_cached_media=True)
        patch(block)
        z = block(x, media, LOCATIONS, use_cached_media=True)
    torch.testing.assert_close(z, expected_z)
    assert calls == expected
