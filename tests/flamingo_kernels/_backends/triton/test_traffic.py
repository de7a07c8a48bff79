"""How many bytes each operator moves, against the fewest it could."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flamingo_kernels import MediaMask, masked_cross_attention
from flamingo_kernels.testing import (
    Case,
    GatedBlockDecodeCase,
    GatedResidualCase,
    LinearCase,
    MaskedCrossAttentionCase,
    PerceiverAttentionCase,
)
from tests.helpers.triton.traffic import counted

BF16 = {"dtype": torch.bfloat16}
MASKED = MaskedCrossAttentionCase(length=192, media=4, latents=64, heads=2, head_dim=64, **BF16)
PERCEIVER = PerceiverAttentionCase(
    clips=4, queries=64, features=200, latents=64, heads=2, head_dim=64, **BF16
)
RESIDUAL = GatedResidualCase(shape=(640, 256), **BF16)


def traffic(case: Case) -> tuple[list, list]:
    """The launches of the forward and of the backward pass."""
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
    with counted() as forward:
        outputs = case.kernel("triton", **leaves)
    with counted() as backward:
        torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(out) for out in outputs])
    return forward, backward


def size(case: Case, *names: str) -> int:
    tensors = case.tensors()
    tensors |= dict(zip(case.outputs, case.eager(**tensors), strict=True))
    return sum(tensors[name].nbytes for name in names)


def moved(launches: list) -> int:
    return sum(launch.read + launch.written for launch in launches)


# case, what the forward pass must touch, what the backward pass must
ONE_PASS = [
    (MASKED, ("q", "k", "v", "out"), ("q", "k", "v", "out") * 2),
    (replace(MASKED, policy="open_flamingo"), ("q", "k", "v", "out"), ("q", "k", "v", "out") * 2),
    (
        PERCEIVER,
        ("q", "k_media", "v_media", "k_latents", "v_latents", "out"),
        ("q", "k_media", "v_media", "k_latents", "v_latents", "out") * 2,
    ),
    (RESIDUAL, ("x", "y", "out"), ("y", "out", "y")),
    (replace(RESIDUAL, gate=(256,)), ("x", "y", "out"), ("y", "out", "y")),
]


@pytest.mark.parametrize(("case", "forward", "backward"), ONE_PASS, ids=lambda value: str(value)[:60])
def test_every_byte_moves_once(case, forward, backward):
    """Distinct bytes of all launches together, within a tenth of the least."""
    done_forward, done_backward = traffic(case)
    assert moved(done_forward) <= 1.1 * size(case, *forward)
    assert moved(done_backward) <= 1.1 * size(case, *backward)


@pytest.mark.parametrize("case", [case for case, *_ in ONE_PASS], ids=lambda case: f"{case.operator}-{case}")
def test_nothing_is_written_twice(case):
    for launch in [each for launches in traffic(case) for each in launches]:
        assert launch.written_twice == 0, launch.kernel


@pytest.mark.parametrize(
    "case",
    [
        LinearCase(rows=(5,), width=512, out=256, residual=True, activation="gelu", **BF16),
        GatedBlockDecodeCase(batch=2, dim=256, hidden=512, head_dim=64, glu=True, q_norm=True, **BF16),
    ],
    ids=lambda case: case.operator,
)
def test_few_rows_move_every_weight_once(case):
    tensors = case.tensors()
    with counted() as launches:
        case.kernel("triton", **tensors)
    assert moved(launches) <= 1.1 * size(case, *tensors, *case.outputs)
    assert all(launch.written_twice == 0 for launch in launches)


def test_rows_that_see_several_media_cost_a_second_reading():
    """Of q, dout, k and v, for the gradients of the keys; the text's own numbers are small."""
    case = replace(MASKED, immediate=False)
    forward, backward = traffic(case)
    assert moved(forward) <= 1.1 * size(case, "q", "k", "v", "out")
    least = size(case, "q", "out", "out", "k", "v", "q") + size(case, "q", "out", "k", "v", "k", "v")
    assert moved(backward) <= 1.1 * least


def test_what_no_row_sees_is_not_read():
    """All rows see the second of four media: the keys of the others stay where they are."""
    mask = MediaMask.from_text_time(torch.full((1, 48), 2), num_media=4)
    q, k = torch.randn(1, 48, 2, 64), torch.randn(1, 4, 64, 2, 64)
    with counted() as launches:
        masked_cross_attention(q, k, k.clone(), mask, backend="triton")
    assert launches[0].read == q.nbytes + 2 * k.nbytes // 4 + mask.lo.nbytes + mask.hi.nbytes


def test_the_counter_counts():
    forward, _ = traffic(GatedResidualCase(shape=(8, 512), **BF16))
    (launch,) = forward
    assert launch.written == 8 * 512 * 2
    assert launch.read == 2 * 8 * 512 * 2 + 2
