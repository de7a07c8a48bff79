"""masked_cross_attention against float64, row class by row class, and with broken values and masks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from flamingo_kernels import MediaMask, masked_cross_attention
from flamingo_kernels.testing import DTYPES, assert_within_budget, evaluate, measure
from flamingo_kernels.testing import MaskedCrossAttentionCase as Case
from tests.helpers.plain_mask import averages, seen
from tests.helpers.sizes import skip_unless_supported

RULES = list(itertools.product((True, False), ("zero", "open_flamingo")))

CASES = [
    Case(),
    # sizes that are empty, one, and no multiple of anything
    Case(batch=0),
    Case(length=0),
    Case(length=0, immediate=False, policy="open_flamingo"),
    Case(media=0),
    Case(media=0, immediate=False, policy="open_flamingo"),
    Case(batch=1, length=1, media=1, latents=1, heads=1),
    Case(batch=3, length=1, media=5, latents=60, head_dim=40),
    Case(length=63, media=1, latents=64, head_dim=64, immediate=False),
    Case(length=63, latents=1),
    Case(length=63, latents=2, immediate=False),
    Case(batch=3, length=111, media=5, latents=60, heads=2, head_dim=80, policy="open_flamingo"),
    Case(length=111, latents=64, heads=2, head_dim=96, immediate=False, policy="open_flamingo"),
    Case(length=257, media=5, latents=64, heads=2, head_dim=64),
    Case(batch=1, length=257, media=5, latents=60, heads=2, head_dim=128, immediate=False),
    Case(batch=1, length=63, latents=200, heads=1, head_dim=256, policy="open_flamingo"),
    Case(batch=1, length=63, latents=256, heads=1, head_dim=7, immediate=False),
    # media of several blocks of keys, the last a part of one
    Case(batch=1, length=40, media=2, latents=257, heads=1, head_dim=16),
    Case(batch=1, length=21, media=1, latents=1601, heads=2, groups=2, head_dim=40, policy="open_flamingo"),
    Case(batch=2, length=33, media=3, latents=300, heads=2, groups=2, head_dim=64, immediate=False),
    Case(
        batch=1,
        length=33,
        media=2,
        latents=650,
        heads=1,
        immediate=False,
        policy="open_flamingo",
        layout="slice",
    ),
    # few keys, so that their rows are cut into parts, with rows that average all values
    *(
        Case(batch=1, length=257, media=1, heads=1, immediate=i, policy="open_flamingo")
        for i in (True, False)
    ),
    # heads that share keys
    Case(length=63, groups=2, head_dim=40, policy="open_flamingo"),
    Case(length=63, groups=4, head_dim=40, immediate=False),
    Case(groups=4, policy="open_flamingo", immediate=False),
    # every source of text_time
    *(Case(length=63, times="jumps", immediate=immediate, policy=policy) for immediate, policy in RULES),
    *(
        Case(batch=3, length=3, times="cached", immediate=immediate, policy=policy)
        for immediate, policy in RULES
    ),
    Case(times="cached", length=1, head_dim=64, latents=64),
    # memory layouts
    *(Case(layout=layout, groups=2) for layout in ("slice", "transposed", "strided", "expanded")),
    Case(layout="strided", head_dim=2),
    Case(layout="slice", length=63, media=5, head_dim=40, immediate=False, policy="open_flamingo"),
    Case(layout="transposed", length=63, head_dim=80, times="jumps", immediate=False),
    # the scale: none, negative, and so large that most rows attend to one key
    Case(scale=0.0),
    Case(scale=-0.25, immediate=False),
    Case(scale=4.0, length=63),
    Case(scale=4.0, length=63, immediate=False, policy="open_flamingo"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case, dtype, backend):
    skip_unless_supported(case, backend)
    assert_within_budget(replace(case, dtype=dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype)[6:])
def test_oracle_of_one_latent_among_many_media(dtype, backend):
    """Not in float32: with three keys a row, the gradient of a score is what is left of near numbers."""
    assert_within_budget(Case(length=63, latents=1, immediate=False, dtype=dtype), backend)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_in_float64_is_exact(case):
    tensors = {name: tensor.double() for name, tensor in case.tensors().items()}
    douts = case.douts(case.eager(**tensors))
    exact = evaluate(case, case.eager, tensors, douts)
    for name, tensor in evaluate(case, lambda **t: case.kernel("reference", **t), tensors, douts).items():
        torch.testing.assert_close(tensor, exact[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("immediate", "policy"), RULES)
def test_gradcheck_of_the_reference(immediate, policy):
    case = Case(
        batch=1,
        length=4,
        latents=2,
        heads=2,
        groups=2,
        head_dim=3,
        times="jumps",
        immediate=immediate,
        policy=policy,
    )
    tensors = [tensor.double().requires_grad_() for tensor in case.tensors().values()]
    assert torch.autograd.gradcheck(
        lambda q, k, v: masked_cross_attention(q, k, v, case.mask(), backend="reference"), tensors
    )


@pytest.mark.parametrize(("immediate", "policy"), RULES)
def test_rows_that_see_nothing(immediate, policy, backend):
    """They return exactly 0 and send no gradient, unless the policy has them average all values."""
    few = backend == "triton"  # whose interpreter takes seconds
    case = Case(
        batch=2 if few else 3, length=33 if few else 63, immediate=immediate, policy=policy, times="jumps"
    )
    tensors = case.tensors()
    (dout,) = case.douts(case.eager(**tensors))
    blind, average = _rows(case)
    found = evaluate(case, lambda **t: case.kernel(backend, **t), tensors, [dout])
    assert blind.any() or average.any()
    assert not found["out"][blind].any()
    assert not found["dq"][blind | average].any()
    assert found["out"][~blind].any(dim=-1).all()
    mean = tensors["v"].double().mean(dim=(1, 2))[:, None].expand(-1, case.length, -1, -1)
    torch.testing.assert_close(found["out"][average].double(), mean[average], rtol=0, atol=1e-6)
    # what the blind rows would have sent changes nothing
    dout[blind] = 1e3
    again = evaluate(case, lambda **t: case.kernel(backend, **t), tensors, [dout])
    assert all(torch.equal(found[name], again[name]) for name in found)


def _rows(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool [B, T] each: rows that see no medium and return 0; rows that see none and average."""
    average, sighted = torch.zeros(2, case.batch, case.length, dtype=torch.bool)
    for b, row in enumerate(case.text_time().tolist()):
        for t, time in enumerate(row):
            average[b, t] = averages(time, case.media, case.immediate, case.policy)
            sighted[b, t] = bool(seen(time, case.media, case.immediate))
    return ~average & ~sighted, average


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("immediate", "policy"), RULES)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_nan_and_infinity_stay_where_they_are_seen(name, immediate, policy, value, backend):
    case = Case(length=9, times="jumps", immediate=immediate, policy=policy, groups=2, latents=5, head_dim=20)
    assert set(case.text_time()[1].tolist()) == {0, 1, 2, 3, 4}
    tensors = case.tensors()
    tensors["dout"] = case.douts(case.eager(**tensors))[0]
    clean = _run(case, backend, tensors)
    b, h, hk, channel = 1, 2, 1, 17
    every = 1 if backend in ("reference", "cpu") else 4  # the others run on the processor, slowly
    places = range(0, case.media if name in "kv" else case.length, every)
    for place in places:
        broken = {key: tensor.clone() for key, tensor in tensors.items()}
        broken[name][(b, place, 3, hk, channel) if name in "kv" else (b, place, h, channel)] = value
        reached = _reach(case, name, b, h, hk, place)
        for key, tensor in _run(case, backend, broken).items():
            where = reached[key]
            assert torch.equal(tensor[~where], clean[key][~where]), f"{name} at {place} reaches {key}"
            if key == "out" and (name == "v" or (name != "dout" and value != value)):
                assert where.any(-1).equal(~tensor.isfinite().all(-1)), f"{name} at {place} is lost"


def _run(case, backend, tensors):
    tensors = dict(tensors)
    dout = tensors.pop("dout")
    return evaluate(case, lambda **t: case.kernel(backend, **t), tensors, [dout])


def _reach(case: Case, name: str, b: int, h: int, hk: int, place: int) -> dict[str, torch.Tensor]:
    """Where a bad number in row `place` of q or dout, or in medium `place` of k or v, may show."""
    media_of = [seen(time, case.media, case.immediate) for time in case.text_time()[b].tolist()]
    average = [
        averages(time, case.media, case.immediate, case.policy) for time in case.text_time()[b].tolist()
    ]
    group = slice(hk * case.groups, (hk + 1) * case.groups)
    reached = {
        key: torch.zeros(tensor.shape, dtype=torch.bool)
        for key, tensor in zip(("out", "dq", "dk", "dv"), (*_like_q(case), *_like_k(case)), strict=True)
    }
    if name in ("q", "dout"):
        rows, heads = [place], slice(h, h + 1)
        if average[place] and name == "dout":
            reached["dv"][b, :, :, hk] = True
    else:
        rows, heads = [t for t, media in enumerate(media_of) if place in media], group
        for t in range(case.length):
            reached["out"][b, t, group] |= average[t] and name == "v"
    for t in rows:
        if media_of[t]:
            reached["out"][b, t, heads] |= name != "dout"
            reached["dq"][b, t, heads] = True
            reached["dk"][b, media_of[t], :, hk] = True
            reached["dv"][b, media_of[t], :, hk] |= name != "v"
    return reached


def _like_q(case):
    return [torch.empty(case.batch, case.length, case.heads, case.head_dim)] * 2


def _like_k(case):
    return [torch.empty(case.batch, case.media, case.latents, case.heads // case.groups, case.head_dim)] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("immediate", [True, False])
def test_large_scores_stay_finite(immediate, dtype, backend):
    case = Case(length=63, latents=60, immediate=immediate, dtype=dtype)
    tensors = case.tensors()
    tensors["q"], tensors["k"] = tensors["q"] * 100, tensors["k"] * 100  # scores of +-1e4 and more
    (dout,) = case.douts(case.eager(**tensors))
    found = evaluate(case, lambda **t: case.kernel(backend, **t), tensors, [dout])
    assert all(tensor.isfinite().all() for tensor in found.values())
    largest = tensors["v"].abs().max()
    assert largest / 2 < found["out"].abs().max() <= largest  # an average of values


def _gradients(out, q, k, v):
    return torch.autograd.grad(out, (q, k, v), torch.randn_like(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("immediate", [True, False])
def test_a_row_that_sees_one_key(immediate, dtype, backend):
    """It returns the key's value, and nothing depends on the score: not almost, but exactly."""
    q = torch.randn(2, 63, 4, 40).to(dtype).requires_grad_()
    k, v = (torch.randn(2, 3, 1, 2, 40).to(dtype).requires_grad_() for _ in range(2))
    times = torch.randint(2, (2, 63))
    mask = MediaMask.from_text_time(times, 3, immediate=immediate)
    out = masked_cross_attention(q, k, v, mask, scale=1.7, backend=backend)
    value = v[:, 0].repeat_interleave(2, dim=2)  # [B, 1, H, d]
    assert torch.equal(out, torch.where(times[..., None, None] == 1, value, 0))
    dq, dk, _ = _gradients(out, q, k, v)
    assert not dq.any()
    assert not dk.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_one_key_far_above_all_others(scale, dtype, backend):
    """The others' weights are below every float, so its own is 1 and no score has a gradient."""
    signs = torch.randn(16).sign()
    q = (signs * torch.randint(1, 4, (2, 63, 4, 1))).to(dtype).requires_grad_()
    k = -4 * scale * signs * torch.randint(1, 4, (2, 3, 9, 2, 1))
    k[:, 1, 5] *= -1
    k = k.to(dtype).requires_grad_()
    v = torch.randn(2, 3, 9, 2, 16).to(dtype).requires_grad_()
    mask = MediaMask.from_text_time(torch.randint(2, 4, (2, 63)), 3, immediate=False)
    out = masked_cross_attention(q, k, v, mask, scale=scale, backend=backend)
    assert torch.equal(out, v[:, 1, 5].repeat_interleave(2, dim=1)[:, None].expand_as(out))
    dq, dk, _ = _gradients(out, q, k, v)
    assert max(dq.abs().max(), dk.abs().max()).item() < 1e-30


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("scale", [0.7, -0.7])
@pytest.mark.parametrize("immediate", [True, False])
def test_scores_of_which_the_last_bits_are_thousands(immediate, scale, dtype, backend):
    """Scores of 1e10: a weight relative to a rounded maximum would be e^1000."""
    case = Case(length=63, latents=60, head_dim=64, immediate=immediate, scale=scale, dtype=dtype)
    tensors = case.tensors()
    tensors["q"], tensors["k"] = ((tensors[name] * 2e4).clamp(-6e4, 6e4) for name in ("q", "k"))
    douts = case.douts(case.eager(**tensors))
    found = evaluate(case, lambda **t: case.kernel(backend, **t), tensors, douts)
    assert all(tensor.isfinite().all() for tensor in found.values())
    expected = evaluate(case, lambda **t: case.kernel("reference", **t), tensors, douts)
    assert torch.equal(found["out"], expected["out"])  # each row has one key, whose value it returns


@pytest.mark.parametrize("immediate", [True, False])
def test_a_scale_of_zero_averages_scores_of_any_size(immediate, kernels):
    case = Case(length=63, latents=60, immediate=immediate, scale=0.0)
    tensors = case.tensors()
    expected = case.kernel(kernels, **tensors)[0]
    tensors["q"], tensors["k"] = tensors["q"] * 1e17, tensors["k"] * 1e18
    assert torch.equal(case.kernel(kernels, **tensors)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("medium", [0, 1])
def test_keys_with_scores_of_minus_infinity_weigh_nothing(medium, dtype, kernels):
    """Unless they are all that a row sees: of them there is no softmax."""
    q = torch.rand(1, 2, 2, 16).to(dtype)
    k, v = torch.randn(2, 1, 2, 5, 2, 16).to(dtype)
    k[:, medium] = -torch.inf
    mask = MediaMask.from_text_time(torch.tensor([[1, 2]]), 2, immediate=False)
    out = masked_cross_attention(q, k, v, mask, backend=kernels)
    other = MediaMask.from_text_time(torch.tensor([[1, 2 - medium]]), 2)
    expected = masked_cross_attention(q, k, v, other, backend=kernels)
    assert torch.equal(out[:, 1], expected[:, 1])
    assert out[:, 0].isnan().all() == (medium == 0)


def _flip(text_time, num_media, *, immediate=True, policy="zero", flip):
    if flip == "last or first":
        return _from_text_time(num_media + 1 - text_time, num_media, immediate=immediate, policy=policy)
    if flip == "== to <=" or flip == "<= to ==":
        return _from_text_time(text_time, num_media, immediate=not immediate, policy=policy)
    if flip == "<= to <":
        return _from_text_time(text_time - 1, num_media, immediate=immediate, policy=policy)
    other = "open_flamingo" if policy == "zero" else "zero"
    return _from_text_time(text_time, num_media, immediate=immediate, policy=other)


_from_text_time = MediaMask.from_text_time


@pytest.mark.parametrize("flip", ["last or first", "== to <=", "<= to ==", "<= to <", "policy"])
def test_a_flipped_mask_fails(flip, monkeypatch):
    """The oracle knows nothing of MediaMask, so a wrong comparison in it cannot hide."""
    case = Case(length=63, immediate=flip != "<= to ==")
    assert all(each.passed for each in measure(case, "reference"))
    flipped = lambda *args, **options: _flip(*args, **options, flip=flip)  # noqa: E731
    monkeypatch.setattr(MediaMask, "from_text_time", flipped)
    failed = {each.name for each in measure(case, "reference") if not each.passed}
    assert failed >= ({"out", "dv"} if flip == "policy" else {"out", "dq", "dk", "dv"})


@pytest.mark.parametrize("value", [1.0, torch.nan])
@pytest.mark.parametrize("name", ["k", "v"])
def test_a_medium_that_no_row_sees_gets_no_gradient(name, value, backend):
    """Though it lies between media that rows see in turn, and whatever is in it."""
    mask = MediaMask.from_text_time(torch.tensor([[1, 3, 1, 3]]), num_media=3)
    assert mask.start[0, 1] < mask.stop[0, 1]
    tensors = {
        "q": torch.randn(1, 4, 2, 16),
        "k": torch.randn(1, 3, 5, 2, 16),
        "v": torch.randn(1, 3, 5, 2, 16),
    }
    tensors[name][:, 1] = value
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    out = masked_cross_attention(*leaves, mask, backend=backend)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), leaves)
    assert all(tensor.isfinite().all() for tensor in (out, dq, dk, dv))
    assert not dk[:, 1].any()
    assert not dv[:, 1].any()
