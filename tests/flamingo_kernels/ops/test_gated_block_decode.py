"""gated_block_decode against float64: every backend, every option of a block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flamingo_kernels import MediaMask, UnsupportedError, gated_block_decode, use_backend
from flamingo_kernels.ops.gated_block_decode import api
from flamingo_kernels.testing import DTYPES, GatedBlockDecodeCase, assert_within_budget, lay_out
from tests.helpers.sizes import skip_unless_supported

Case = GatedBlockDecodeCase
BACKENDS = ["reference", "triton", "cuda", "cpu"]
EVERYTHING: dict[str, Any] = {"bias": True, "glu": True, "q_norm": True, "gate": (64,), "groups": 2}
CASES = [
    Case(),
    Case(batch=1, dim=1, heads=1, head_dim=1, media=1, latents=1, hidden=1),
    Case(batch=5, immediate=False, policy="open_flamingo"),
    Case(batch=9, policy="open_flamingo", groups=2, activation="squared_relu"),
    Case(batch=16, dim=40, hidden=72, head_dim=40, heads=3, activation="relu", gate=(40,)),
    Case(batch=3, dim=63, hidden=65, head_dim=7, latents=70, norm_bias=False),  # nothing is aligned
    Case(batch=1, dim=2100, heads=2, head_dim=128, hidden=40, latents=64, immediate=False),
    Case(batch=2, head_dim=256, heads=2, groups=2),
    Case(batch=17, heads=2, head_dim=8),
    Case(batch=64, dim=40, hidden=24, heads=2, head_dim=8),
    Case(batch=3, heads=20, groups=20, head_dim=8),  # more heads of a key head than a tile has rows
    # keys of many programs, in one medium and over several
    Case(batch=2, heads=1, media=1, latents=1601),
    # so many keys that they are cut into splits: of none, one and both media
    Case(batch=3, heads=1, media=2, latents=1601, immediate=False, policy="open_flamingo"),
    Case(batch=4, heads=1, media=4, latents=70, immediate=False, policy="open_flamingo"),
    Case(batch=1, heads=1, media=2, latents=70, immediate=False, policy="open_flamingo"),  # averages them
    Case(batch=2, heads=4, groups=2, media=1, latents=700, head_dim=64),
    # whole tiles of keys and a rest, by heads that are two groups
    Case(batch=3, heads=12, groups=6, latents=83, head_dim=32, q_norm=True),
    Case(layout="slice", latents=20, head_dim=32),
    *(Case(activation=each) for each in ("gelu_tanh", "silu")),
    Case(rms=True),
    Case(rms=True, q_norm=True),
    Case(q_norm=True, head_dim=20),
    Case(q_norm=True, norm_bias=False),
    Case(bias=True),
    *(Case(glu=True, activation=each) for each in ("gelu", "silu")),
    Case(gate=None),
    Case(gate=(64,)),
    Case(batch=5, **EVERYTHING),
    Case(batch=6, texts=3, **EVERYTHING),
    Case(batch=6, texts=2, immediate=False, policy="open_flamingo", latents=70),
    Case(batch=4, texts=4, media=2),
    Case(eps=0.1),
    Case(eps=0.1, q_norm=True, rms=True),
    Case(media=0, policy="open_flamingo"),
    Case(batch=0),
    *(Case(integers=True, batch=batch) for batch in (1, 5, 17)),
    Case(integers=True, batch=6, texts=3, dim=63, hidden=65, **EVERYTHING | {"gate": (63,)}),
    *(Case(batch=4, layout=layout, head_dim=40) for layout in ("slice", "transposed", "strided", "expanded")),
    *(Case(batch=4, layout=layout, **EVERYTHING) for layout in ("slice", "strided")),
]
MIXES = [
    {"x_dtype": torch.float32},
    {"x_dtype": torch.float32, "gate_dtype": torch.float32, "gate": (64,)},
    {"gate_dtype": torch.float32},
    {"gate_dtype": torch.float32, "gate": (64,)},
    {"x_dtype": torch.float32, "integers": True, "q_norm": True, "rms": True},
]


@pytest.fixture(params=BACKENDS)
def backend(request, running) -> str:
    return running(request.param)


@pytest.fixture(params=BACKENDS[1:])
def kernels(request, running) -> str:
    return running(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case, dtype, backend):
    skip_unless_supported(case, backend)
    assert_within_budget(replace(case, dtype=dtype), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_oracle_of_mixed_dtypes(mix, dtype, backend):
    """The dtypes of the results are those of torch's promotion: the budget compares them first."""
    assert_within_budget(Case(dtype=dtype, **mix), backend)


def test_each_norm_has_its_own_eps_and_each_branch_its_own_gate(kernels):
    case = Case(q_norm=True)
    tensors, options = case.tensors(), case.options()
    tensors["gate"].fill_(0.1), tensors["ff_gate"].fill_(2)
    x, k, v = (tensors[name] for name in ("x", "k", "v"))
    weights = case.weights(tensors)
    norms = {"norm": 1e-3, "q_norm": 0.1, "ff_norm": 1.0}
    weights = weights._replace(
        **{name: weights.norms()[name]._replace(eps=eps) for name, eps in norms.items()}
    )
    expected = gated_block_decode(x, k, v, weights=weights, **options, backend="reference")
    found = gated_block_decode(x, k, v, weights=weights, **options, backend=kernels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_a_scale_of_its_own(scale, backend):
    case = Case(batch=4, heads=1, latents=70)
    tensors, options = case.tensors(), case.options()
    (found,) = case.call(tensors, options | {"scale": scale}, backend)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    (right,) = case.call(doubles, options | {"scale": scale}, "reference")
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_heads_that_share_keys_have_queries_of_their_own(dtype, backend):
    """Under scores so large that each head attends to other keys."""
    case = Case(heads=12, groups=6, latents=83, head_dim=32, gate=None, dtype=dtype)
    tensors, options = case.tensors(), case.options()
    tensors["down.weight"].zero_()
    (found,) = case.call(tensors, options | {"scale": 1.0}, backend)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    (right,) = case.call(doubles, options | {"scale": 1.0}, "reference")
    torch.testing.assert_close(found.double(), right, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    "rule", [{}, {"immediate": False}, {"texts": 2}, {"latents": 70, "heads": 1}], ids=str
)
def test_what_a_row_does_not_see_is_not_read(rule, backend):
    case = Case(batch=4, **rule)
    tensors, options = case.tensors(), case.options()
    (expected,) = case.call(tensors, options, backend)
    for medium in range(case.media):
        unseen = ~options["mask"].sees(medium).any(1)
        tensors["k"][unseen, medium] = tensors["v"][unseen, medium] = torch.nan
    assert torch.equal(case.call(tensors, options, backend)[0], expected)
    assert expected.isfinite().all()


def test_the_mean_of_all_values_asks_no_key(kernels):
    case = Case(batch=1, heads=1, latents=70, immediate=False, policy="open_flamingo")
    tensors, options = case.tensors(), case.options()
    assert options["mask"].averages().all()
    (expected,) = case.call(tensors, options, kernels)
    tensors["k"].fill_(torch.nan)
    assert torch.equal(case.call(tensors, options, kernels)[0], expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["x", "k", "v"])
def test_nan_and_infinity_stay_in_their_row(name, value, kernels):
    case = Case(batch=4, heads=1, latents=70)
    tensors, options = case.tensors(), case.options()
    (clean,) = case.call(tensors, options, kernels)
    index = (2, 7) if name == "x" else (2, 1, 69, 0, 3)  # the second medium, which row 2 sees
    tensors[name][index] = value
    (found,) = case.call(tensors, options, kernels)
    others = torch.arange(4) != 2
    assert torch.equal(found[others], clean[others])
    if (name, value) != ("k", torch.inf):  # a weight of 1 or of 0
        assert found[2].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_calls_give_the_same_bits(dtype, backend):
    case = Case(batch=9, dim=63, hidden=65, latents=70, heads=1, dtype=dtype)
    assert torch.equal(*(case.kernel(backend, **case.tensors())[0] for _ in range(2)))


@pytest.mark.parametrize("case", [Case(), Case(batch=6, texts=3, integers=True, **EVERYTHING)], ids=str)
def test_no_host_sync(case, backend):
    """Tensors without values pass through every check: none of them looks at one."""
    tensors, options = case.tensors(), case.options()
    weights = case.weights(tensors)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, use_backend(backend):
        x, k, v = (mode.from_tensor(tensors[name]) for name in ("x", "k", "v"))
        assert gated_block_decode(x, k, v, weights=weights, **options).shape == x.shape


def test_a_gradient_is_refused(kernels):
    tensors = Case().tensors()
    tensors["x"].requires_grad_()
    with pytest.raises(UnsupportedError, match=r"no gradient; call it under torch\.no_grad"):
        Case().kernel(kernels, **tensors)
    with torch.no_grad():
        Case().kernel(kernels, **tensors)


@pytest.mark.parametrize("name", ["to_q", "to_out", "gate_proj", "up", "down"])
def test_a_matrix_that_would_be_copied_in_every_step_is_named(name, kernels):
    case = Case(glu=True)
    tensors = case.tensors()
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].T.contiguous().T
    with pytest.raises(UnsupportedError, match=rf"expected a contiguous {name}\.weight, got strides"):
        case.kernel(kernels, **tensors)


@pytest.mark.parametrize("layout", ["slice", "strided"])
@pytest.mark.parametrize("name", ["x", "k", "v", "norm.weight", "to_q.bias", "gate", "q_norm.bias"])
def test_each_tensor_has_strides_of_its_own(name, layout, kernels):
    """NaN lies behind every row of a slice."""
    case = Case(batch=5, **EVERYTHING)
    tensors, options = case.tensors(), case.options()
    (expected,) = case.call(tensors, options, kernels)
    tensors[name] = lay_out(tensors[name], layout)
    assert torch.equal(case.call(tensors, options, kernels)[0], expected)


@pytest.fixture(params=["reference", "cpu"])
def asked(request, running):
    """Without gradients the kernels of a processor are called before anything is asked in Python."""
    with torch.set_grad_enabled(request.param == "reference"):
        yield running(request.param)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scale": torch.nan}, ValueError, "scale to be a finite number, got nan"),
        ({"scale": True}, TypeError, "scale to be a number, got bool"),
        ({"eps": -1.0}, ValueError, r"norm\.eps to be a finite number of at least 0"),
        ({"activation": "tanh"}, ValueError, "activation to be one of gelu"),
        ({"mask": None}, TypeError, "a MediaMask, got NoneType"),
        ({"weights": ()}, TypeError, "weights to be GatedBlockWeights, got tuple"),
        ({"x": None}, TypeError, r"x to be a torch\.Tensor"),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_meant_is_named(change, error, message, asked):
    case = Case()
    tensors = case.tensors()
    weights = case.weights(tensors)
    if "eps" in change:
        weights = weights._replace(norm=weights.norm._replace(eps=change["eps"]))
    if "activation" in change:
        weights = weights._replace(activation=change["activation"])
    given = {name: tensors[name] for name in ("x", "k", "v")} | {"weights": weights, **case.options()}
    given |= {name: each for name, each in change.items() if name not in ("eps", "activation")}
    with pytest.raises(error, match=f"^gated_block_decode: expected .*{message}"):
        gated_block_decode(**given, backend=asked)


@torch.no_grad()
def test_a_usual_call_on_a_processor_asks_nothing_in_python(monkeypatch, running):
    running("cpu")
    case = Case(**EVERYTHING)
    tensors = case.tensors()
    expected = case.kernel("cpu", **tensors)
    monkeypatch.setattr(api, "_validate", None)
    assert torch.equal(case.kernel("auto", **tensors)[0], expected[0])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("to_out.weight", (64, 63), r"to_out\.weight with shape \(64, 64\)"),
        ("up.weight", (96, 63), r"up\.weight with shape \(F, 64\)"),
        ("down.weight", (64, 95), r"down\.weight with shape \(64, 96\)"),
        ("gate_proj.weight", (95, 64), r"gate_proj\.weight with shape \(96, 64\)"),
        ("up.bias", (95,), r"up\.bias with shape \(96,\)"),
        ("norm.bias", (63,), r"norm\.bias with shape \(64,\)"),
        ("ff_norm.weight", (63,), r"ff_norm\.weight with shape \(64,\)"),
        ("q_norm.weight", (64,), r"q_norm\.weight with shape \(16,\)"),
        ("gate", (5,), r"gate of 1 or D=64 elements, got \(5,\)"),
        ("k", (3, 3, 8, 2, 16), r"k of B=5 sequences or a divisor of them, got 3"),
        ("v", (5, 3, 8, 1, 16), r"v with shape \(5, 3, 8, 2, 16\)"),
    ],
)
def test_a_mistake_is_named(name, shape, message, asked):
    case = Case(batch=5, **EVERYTHING)
    tensors = case.tensors() | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"^gated_block_decode: expected .*{message}"):
        case.kernel(asked, **tensors)


def test_queries_that_are_no_whole_heads_are_named(asked):
    case = Case(groups=4)
    tensors = case.tensors() | {"to_q.weight": torch.zeros(60, 64)}
    with pytest.raises(ValueError, match=r"^gated_block_decode: expected to_q\.weight with shape \(48, 64\)"):
        case.kernel(asked, **tensors)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("v", torch.bfloat16, "v"),
        ("up.weight", torch.bfloat16, r"up\.weight"),
        ("down.bias", torch.bfloat16, r"down\.bias"),
        ("to_q.weight", torch.int8, r"to_q\.weight"),
        ("norm.weight", torch.int32, r"norm\.weight"),
    ],
)
def test_a_dtype_that_does_not_fit_is_named(name, dtype, message, asked):
    case = Case(**EVERYTHING)
    tensors = case.tensors()
    with pytest.raises(TypeError, match=f"^gated_block_decode: expected .*{message}"):
        case.kernel(asked, **tensors | {name: tensors[name].to(dtype)})


def test_an_rms_norm_with_a_bias_is_named(asked):
    case = Case()
    weights = case.weights(case.tensors())
    weights = weights._replace(norm=weights.norm._replace(rms=True))
    x, k, v = (case.tensors()[name] for name in ("x", "k", "v"))
    with pytest.raises(ValueError, match=r"^gated_block_decode: expected no norm\.bias with rms=True"):
        gated_block_decode(x, k, v, weights=weights, **case.options(), backend=asked)


def test_a_mask_of_other_rows_is_named(asked):
    case = Case(batch=6, texts=3)
    mask = MediaMask.from_text_time(case.text_time(), case.media)  # not folded
    with pytest.raises(ValueError, match="a mask with shape"):
        case.call(case.tensors(), {"mask": mask}, asked)


def test_no_key_at_all_is_named(asked):
    case = Case(latents=0)
    with pytest.raises(ValueError, match="at least one latent key"):
        case.kernel(asked, **case.tensors())
