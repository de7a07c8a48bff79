"""Lookalikes whose code counts as known, swapped and compared with what they were."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from flamingo_kernels import patch
from flamingo_kernels.layers import Fused
from flamingo_kernels.patch.known import KNOWN
from flamingo_kernels.patch.registry import targets
from flamingo_kernels.patch.source import code_hash
from tests.helpers.lookalikes import make, target


@contextmanager
def known(*classes):
    """While this lasts, the code of these classes is known as that of what they look like."""
    with pytest.MonkeyPatch.context() as change:
        for cls in classes:
            fused, family = targets()[target(cls)]
            codes = KNOWN[f"{family.module}.{fused.__name__}"]
            change.setitem(codes, code_hash(cls, origin=family.module), "ours")
        yield


def pair(cls, **options):
    """A module of a class whose code is known as it was, and the same one after the swap."""
    original = make(cls, **options)
    swapped = copy.deepcopy(original)
    report = patch(swapped)
    assert isinstance(swapped, Fused)
    assert report.notes[""] == f"a copy of {target(cls)}"
    return original, swapped


def assert_same(original, swapped, *arguments, tolerance=1e-4, **flags):
    """The result, and all gradients where there are any."""
    results = []
    for module in (original, swapped):
        module.zero_grad()
        given = [each.detach().clone() if isinstance(each, torch.Tensor) else each for each in arguments]
        leaves = [each for each in given if isinstance(each, torch.Tensor) and each.is_floating_point()]
        for leaf in leaves:
            leaf.requires_grad_(torch.is_grad_enabled())
        out = module(*given, **flags)
        if torch.is_grad_enabled():
            out.float().square().sum().backward()
        gradients = [each.grad for each in (*leaves, *module.parameters()) if each.grad is not None]
        results.append([out, *gradients])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        allowed = 10 * tolerance if a.numel() == 1 else tolerance  # in a gate's gradient nearly all cancels
        torch.testing.assert_close(a, b, rtol=allowed, atol=allowed * a.abs().max().item())


def assert_a_trial_finds(cls, *parts):
    """What the code of a class is known for, a trial of it and of those of its parts finds too."""
    module = make(cls)
    report = patch(module, like={each: target(each) for each in (cls, *parts)})
    assert isinstance(module, Fused)
    assert "a trial of" in report.notes[""]


class Doubled(nn.Module):
    """A module that somebody has put around another."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return 2 * self.module(*inputs)
