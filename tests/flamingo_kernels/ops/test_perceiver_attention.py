"""perceiver_attention against float64, with clips of many lengths and with broken values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flamingo_kernels import perceiver_attention
from flamingo_kernels.testing import DTYPES, assert_within_budget, evaluate
from flamingo_kernels.testing import PerceiverAttentionCase as Case
from tests.helpers.sizes import skip_unless_supported

CASES = [
    Case(),
    # sizes that are empty, one, and no multiple of anything
    Case(clips=0),
    Case(queries=0),
    Case(features=0),
    Case(clips=1, queries=1, features=1, latents=1, heads=1),
    Case(clips=3, queries=1, features=63, latents=64, head_dim=64),
    Case(features=1, queries=60, latents=60, head_dim=40),
    Case(features=257, queries=64, latents=64, heads=2, head_dim=64),
    Case(clips=3, features=111, queries=130, latents=64, heads=2, head_dim=80),
    Case(features=63, queries=5, latents=130, heads=2, head_dim=96),
    Case(clips=1, features=63, queries=64, latents=1, heads=2, head_dim=128),
    Case(clips=1, features=64, queries=19, latents=7, heads=1, head_dim=256),
    Case(features=0, queries=63, latents=63, head_dim=7),
    # heads that share keys
    Case(groups=2, features=63, head_dim=40),
    Case(groups=4, lengths=(3, 21)),
    # clips of many lengths: none, one, some, all, more than there are
    Case(clips=5, lengths=(0, 1, 13, 21, 99)),
    Case(clips=3, features=257, queries=64, latents=64, heads=1, head_dim=64, lengths=(0, 256, 65)),
    Case(features=0, lengths=(0, 5)),
    # memory layouts
    *(
        Case(layout=layout, groups=2, clips=3, queries=40)
        for layout in ("slice", "transposed", "strided", "expanded")
    ),
    Case(layout="slice", features=63, head_dim=40, lengths=(5, 62)),
    # the scale: none, negative, and so large that most rows attend to one key
    Case(scale=0.0),
    Case(scale=-0.25),
    Case(scale=4.0, queries=63, features=63),
    # many keys for few queries, so that they are read in parts, most of which have none in the short clip
    Case(clips=2, queries=1, features=1100, latents=3, heads=1, head_dim=8, lengths=(0, 1100)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case, dtype, backend):
    skip_unless_supported(case, backend)
    assert_within_budget(replace(case, dtype=dtype), backend)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_in_float64_is_exact(case):
    tensors = {name: tensor.double() for name, tensor in case.tensors().items()}
    douts = case.douts(case.eager(**tensors))
    exact = evaluate(case, case.eager, tensors, douts)
    for name, tensor in evaluate(case, lambda **t: case.kernel("reference", **t), tensors, douts).items():
        torch.testing.assert_close(tensor, exact[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lengths", [None, (1, 3)])
def test_gradcheck_of_the_reference(lengths):
    case = Case(queries=2, features=3, latents=2, heads=2, groups=2, head_dim=3, lengths=lengths)
    tensors = [tensor.double().requires_grad_() for tensor in case.tensors().values()]
    options = {"media_lengths": case.media_lengths(), "backend": "reference"}
    assert torch.autograd.gradcheck(lambda *tensors: perceiver_attention(*tensors, **options), tensors)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_lengths_of_any_integer_dtype(dtype, backend):
    case = Case(clips=3)
    tensors = case.tensors()
    lengths = torch.tensor([0, 7, 200])
    found = perceiver_attention(**tensors, media_lengths=lengths.to(dtype), backend=backend)
    expected = perceiver_attention(**tensors, media_lengths=lengths.clamp(max=21), backend=backend)
    assert torch.equal(found, expected)


def test_lengths_do_not_wrap_around(backend):
    case = Case(clips=4)
    tensors = case.tensors()
    lengths = torch.tensor([2**32, 2**32 + 7, -(2**32) + 7, -1])
    found = perceiver_attention(**tensors, media_lengths=lengths, backend=backend)
    expected = perceiver_attention(**tensors, media_lengths=torch.tensor([21, 21, 0, 0]), backend=backend)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_padding_is_never_read(value, backend):
    """Whatever stands behind a clip's end changes nothing and gets a gradient of exactly 0."""
    case = Case(clips=4, features=37, lengths=(0, 5, 36, 37), groups=2, head_dim=20)
    clean = case.tensors()
    (dout,) = case.douts(case.eager(**clean))
    beyond = torch.arange(case.features) >= case.media_lengths()[:, None]  # [N, S]
    broken = dict(clean)
    for name in ("k_media", "v_media"):
        broken[name] = clean[name].masked_fill(beyond[..., None, None], value)
    expected = evaluate(case, lambda **t: case.kernel(backend, **t), clean, [dout])
    for name, tensor in evaluate(case, lambda **t: case.kernel(backend, **t), broken, [dout]).items():
        assert torch.equal(tensor, expected[name]), name
        assert not name.endswith("_media") or not tensor[beyond].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "k_media", "v_media", "k_latents", "v_latents", "dout"])
def test_nan_and_infinity_stay_in_their_row_clip_and_head(name, value, backend):
    case = Case(clips=3, groups=2, head_dim=20, lengths=(21, 20, 19))
    clean = case.tensors()
    clean["dout"] = case.douts(case.eager(**clean))[0]
    n, row, h, hk = 1, 5, 2, 1
    broken = {key: tensor.clone() for key, tensor in clean.items()}
    per_query = name in ("q", "dout")
    broken[name][n, row, h if per_query else hk, 17] = value
    expected, found = _run(case, backend, clean), _run(case, backend, broken)
    for key, tensor in found.items():
        reached = torch.zeros(tensor.shape, dtype=torch.bool)
        if key in ("out", "dq"):
            rows, heads = (row, h) if per_query else (slice(None), slice(2, 4))
            reached[n, rows, heads] = not (key == "out" and name == "dout")
        else:
            reached[n, :, hk] = not (key.startswith("dv") and name.startswith("v"))
        assert torch.equal(tensor[~reached], expected[key][~reached]), f"{name} reaches {key}"
        if key == "out" and (name.startswith("v") or (name != "dout" and value != value)):
            assert reached.any(-1).equal(~tensor.isfinite().all(-1)), f"{name} is lost"


def _run(case, backend, tensors):
    tensors = dict(tensors)
    dout = tensors.pop("dout")
    return evaluate(case, lambda **t: case.kernel(backend, **t), tensors, [dout])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_large_scores_stay_finite(dtype, backend):
    case = Case(features=63, dtype=dtype)
    tensors = case.tensors()
    for name in ("q", "k_media", "k_latents"):
        tensors[name] = tensors[name] * 100  # scores of +-1e4 and more
    (dout,) = case.douts(case.eager(**tensors))
    found = evaluate(case, lambda **t: case.kernel(backend, **t), tensors, [dout])
    assert all(tensor.isfinite().all() for tensor in found.values())
    largest = torch.cat([tensors["v_media"], tensors["v_latents"]], dim=1).abs().max()
    assert largest / 2 < found["out"].abs().max() <= largest  # an average of values


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_a_clip_with_one_key(dtype, backend):
    """Its value is what all rows return, and nothing depends on a score: not almost, but exactly."""
    case = Case(clips=2, queries=63, features=5, latents=1, head_dim=40, groups=2, lengths=(0,), dtype=dtype)
    tensors = case.tensors()
    douts = case.douts(case.eager(**tensors))
    found = evaluate(case, lambda **t: case.kernel(backend, **t), tensors, douts)
    value = tensors["v_latents"].repeat_interleave(2, dim=2)
    assert torch.equal(found["out"], value.expand_as(found["out"]))
    assert not any(found[name].any() for name in ("dq", "dk_media", "dv_media", "dk_latents"))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_one_key_far_above_all_others(dtype, backend):
    """The others' weights are below every float, so its own is 1 and no score has a gradient."""
    case = Case(queries=63, features=300, groups=2, scale=1.0, dtype=dtype)
    tensors = case.tensors()
    signs = torch.randn(16).sign()
    for name, times in (("q", 1), ("k_media", -4), ("k_latents", -4)):
        many = torch.randint(1, 4, (*tensors[name].shape[:-1], 1))
        tensors[name] = (signs * many * times).to(dtype)
    tensors["k_media"][:, 200] *= -1
    douts = case.douts(case.eager(**tensors))
    found = evaluate(case, lambda **t: case.kernel(backend, **t), tensors, douts)
    value = tensors["v_media"][:, 200].repeat_interleave(2, dim=1)[:, None]
    assert torch.equal(found["out"], value.expand_as(found["out"]))
    assert max(found[name].abs().max() for name in ("dq", "dk_media", "dk_latents")).item() < 1e-30


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("scale", [0.7, -0.7])
def test_scores_of_which_the_last_bits_are_thousands(scale, dtype, backend):
    """Scores of 1e10: a weight relative to a rounded maximum would be e^1000."""
    case = Case(queries=63, features=300, head_dim=64, scale=scale, dtype=dtype)
    tensors = case.tensors()
    for name in ("q", "k_media", "k_latents"):
        tensors[name] = (tensors[name] * 2e4).clamp(-6e4, 6e4)
    douts = case.douts(case.eager(**tensors))
    found = evaluate(case, lambda **t: case.kernel(backend, **t), tensors, douts)
    assert all(tensor.isfinite().all() for tensor in found.values())
    expected = evaluate(case, lambda **t: case.kernel("reference", **t), tensors, douts)
    assert torch.equal(found["out"], expected["out"])  # each row has one key, whose value it returns


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_scores_far_below_zero_stay_finite(dtype, backend):
    """The zeros that fill up a block of keys score far above them all, and are no keys."""
    case = Case(features=13, latents=6, head_dim=64, dtype=dtype)
    tensors = case.tensors()
    for name, value in (("q", 4), ("k_media", -4), ("k_latents", -4)):
        tensors[name] = torch.full_like(tensors[name], value)  # scores of -128
    (dout,) = case.douts(case.eager(**tensors))
    expected = evaluate(case, lambda **t: case.kernel("reference", **t), tensors, [dout])
    for name, tensor in evaluate(case, lambda **t: case.kernel(backend, **t), tensors, [dout]).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0.02, atol=0.05, msg=name)


def test_a_scale_of_zero_averages_scores_of_any_size(kernels):
    case = Case(scale=0.0)
    tensors = case.tensors()
    expected = case.kernel(kernels, **tensors)[0]
    tensors["q"] = tensors["q"] * 1e17
    tensors |= {name: tensors[name] * 1e18 for name in ("k_media", "k_latents")}
    assert torch.equal(case.kernel(kernels, **tensors)[0], expected)
