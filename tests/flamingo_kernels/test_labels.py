"""What a profile shows of a labelled function, and what that costs a compiler."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flamingo_kernels._labels import FEED_FORWARD, INSIDE, NORM
from flamingo_kernels.sublayers import Linear, Norm, gated_feed_forward


def feed_forward(x: torch.Tensor) -> torch.Tensor:
    layers = {"up": Linear(torch.ones(16, 8)), "down": Linear(torch.ones(8, 16))}
    return gated_feed_forward(x, norm=Norm(torch.ones(8)), **layers, gate=torch.ones(1))


@pytest.mark.parametrize("compiled", [False, True])
def test_names_are_nothing_to_a_compiler(compiled):
    """One graph under the profiler, and the same numbers."""
    run = torch.compile(feed_forward, backend="eager", fullgraph=True) if compiled else feed_forward
    x = torch.randn(3, 8)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        z = run(x)
    named = {event.name for event in recorded.events()} & {*INSIDE}
    assert named == (set() if compiled else {FEED_FORWARD, NORM})
    torch.testing.assert_close(z, feed_forward(x))


def test_a_function_keeps_its_name():
    assert gated_feed_forward.__name__ == "gated_feed_forward"
    assert gated_feed_forward.__doc__.startswith("Norm, hidden layer")
