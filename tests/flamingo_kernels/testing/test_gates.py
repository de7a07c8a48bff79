"""Gates that are open."""

from __future__ import annotations

import torch

from flamingo import GatedCrossAttentionBlock
from flamingo_kernels.testing import open_gates


def test_every_gate_is_off_0_and_nothing_else_is_drawn():
    block = GatedCrossAttentionBlock(dim=16, dim_visual=8)
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    assert open_gates(block) is block
    gates = {name for name, parameter in block.named_parameters() if not torch.equal(parameter, before[name])}
    assert gates == {"attn_gate", "ff_gate"}
    assert all(0.3 <= block.get_parameter(name).item() <= 1 for name in gates)
