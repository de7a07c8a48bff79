"""gated_block_decode against float64, for every path of its two kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flamingo_kernels import (
    GatedBlockWeights,
    MediaMask,
    UnsupportedError,
    gated_block_decode,
    use_backend,
)
from flamingo_kernels.testing import DTYPES, GatedBlockDecodeCase, assert_within_budget

Case = GatedBlockDecodeCase
CASES = [
    Case(),
    Case(batch=1, dim=1, heads=1, head_dim=1, media=1, latents=1, hidden=1),
    Case(batch=5, immediate=False, policy="open_flamingo"),
    Case(batch=9, policy="open_flamingo", groups=2, activation="squared_relu"),
    Case(batch=16, dim=40, hidden=72, head_dim=40, heads=3, activation="relu", gate=(40,)),
    Case(batch=3, dim=63, hidden=65, head_dim=7, latents=70, bias=False),  # nothing is aligned
    Case(batch=1, dim=2100, heads=2, head_dim=128, hidden=40, latents=64, immediate=False),  # in chunks
    Case(eps=0.1),
    Case(media=0, policy="open_flamingo"),
    Case(batch=0),
    *(Case(layout=layout, head_dim=40) for layout in ("slice", "transposed", "strided", "expanded")),
]


@pytest.fixture(params=["reference", "cuda"])
def backend(request, running) -> str:
    return running(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case, dtype, backend):
    assert_within_budget(replace(case, dtype=dtype), backend)


def test_what_a_row_does_not_see_is_not_read(backend):
    case = Case(batch=4)
    tensors, options = case.tensors(), case.options()
    (expected,) = case.call(tensors, options, backend)
    for medium in range(case.media):
        unseen = ~options["mask"].sees(medium)[:, 0]
        tensors["k"][unseen, medium] = tensors["v"][unseen, medium] = torch.nan
    assert torch.equal(case.call(tensors, options, backend)[0], expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_calls_give_the_same_bits(dtype, backend):
    case = Case(batch=9, dim=63, hidden=65, latents=70, dtype=dtype)
    assert torch.equal(*(case.kernel(backend, **case.tensors())[0] for _ in range(2)))


def test_no_host_sync(backend):
    """Tensors without values pass through every check: none of them looks at one."""
    case = Case()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, use_backend(backend):
        tensors = {name: mode.from_tensor(tensor) for name, tensor in case.tensors().items()}
        assert case.kernel("auto", **tensors)[0].shape == (2, 64)


def test_a_gradient_is_refused(cuda):
    tensors = Case().tensors()
    tensors["x"].requires_grad_()
    with pytest.raises(UnsupportedError, match=r"no gradient; call it under torch\.no_grad"):
        Case().kernel(cuda, **tensors)
    with torch.no_grad():
        Case().kernel(cuda, **tensors)


def test_a_branch_is_rounded_before_it_meets_the_residual(backend):
    """As separate operations would: 2^-8 + 2^-17 is 2^-8 in bfloat16, and 1 + 2^-8 is 1, to the even."""
    case = Case(batch=1, dtype=torch.bfloat16)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in case.tensors().items()}
    tensors["x"].fill_(1)
    tensors["v"][..., 0, 0], tensors["v"][..., 0, 1] = 2**-8, 2**-17
    tensors["to_out"][:, :2] = 1
    tensors["gate"].fill_(100)
    mask = MediaMask.cached(torch.ones(1, 3, dtype=torch.bool), num_media=3, length=1)
    (out,) = case.call(tensors, {"mask": mask}, backend)
    assert torch.equal(out, torch.ones_like(out))


def test_more_sequences_than_fit_are_named(cuda):
    case = Case(batch=17)
    with pytest.raises(UnsupportedError, match="B=17 is above 16"):
        case.kernel(cuda, **case.tensors())
    assert case.kernel("auto", **case.tensors())[0].shape == (17, 64)


@pytest.mark.parametrize("name", ["to_q", "to_out", "up", "down"])
def test_a_matrix_that_would_be_copied_in_every_step_is_named(name, cuda):
    tensors = Case().tensors()
    tensors[name] = tensors[name].T.contiguous().T
    with pytest.raises(UnsupportedError, match=f"expected a contiguous {name}, got strides"):
        Case().kernel(cuda, **tensors)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("to_out", (64, 63), r"to_out with shape \(64, 64\)"),
        ("up", (96, 63), r"up with shape \(F, 64\)"),
        ("down", (64, 95), r"down with shape \(64, 96\)"),
        ("ff_norm", (63,), r"ff_norm with shape \(64,\)"),
        ("gate", (5,), r"gate of 1 or D=64 elements, got \(5,\)"),
    ],
)
def test_a_mistake_is_named(name, shape, message):
    tensors = Case().tensors() | {name: torch.zeros(shape)}
    x, k, v = (tensors.pop(key) for key in ("x", "k", "v"))
    weights = GatedBlockWeights(**tensors)
    with pytest.raises(ValueError, match=f"^gated_block_decode: expected .*{message}"):
        gated_block_decode(x, k, v, weights=weights, **Case().options())


def test_no_key_at_all_is_named():
    case = Case(latents=0)
    with pytest.raises(ValueError, match="at least one latent key"):
        case.kernel("reference", **case.tensors())
