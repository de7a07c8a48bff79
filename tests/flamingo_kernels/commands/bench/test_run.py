import functools
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flamingo_kernels.commands.bench import baselines
from flamingo_kernels.commands.bench import run as bench
from flamingo_kernels.commands.bench.baselines import OURS, Contender, contenders
from flamingo_kernels.commands.bench.floors import Ceilings, least_bytes
from flamingo_kernels.commands.bench.shapes import CASES, GPU_CASES, QUICK, Case, Floor
from flamingo_kernels.commands.measure.swapped import NothingSwappedError
from tests.helpers import slow_unless

CASE = next(case for case in QUICK if (case.op, case.mode) == ("masked_cross_attention", "forward+backward"))
AGAINST = ("eager", "sdpa")


def spoil(monkeypatch, name, change):
    """Put another contender in the place of one."""

    @functools.wraps(contenders)
    def spoilt(case, dtype=None, device="cpu"):
        makers = contenders(case, dtype, device)
        return makers if dtype else {**makers, name: lambda: change(makers[name]())}

    monkeypatch.setattr(bench, "contenders", spoilt)


def scaled(contender):
    return contender._replace(call=lambda: contender.call() * 1.001)


def wrong_gradient(contender):
    def call():
        out = contender.call()
        return out + (contender.wrt[0] - contender.wrt[0].detach()) * 1e-3  # 0, but not for q's gradient

    return contender._replace(call=call)


def failing(contender):
    def call():
        raise RuntimeError("no such kernel\nand a long story")

    return contender._replace(call=call)


FORWARD = [(case,) for case in QUICK if case.mode == "forward"]


@pytest.mark.parametrize("case", slow_unless(FORWARD[::2], FORWARD), ids=str)
def test_ratios_are_the_quotients_of_the_medians(case):
    rivals = ["eager", "sdpa", "torch.add"]
    rows = bench.run([case], against=rivals, seconds=0).rows
    by_name = {row.contender: row for row in rows}
    assert set(by_name) == {OURS, *rivals} & set(contenders(case))
    for row in rows:
        assert row.ratio == row.median_ms / by_name[OURS].median_ms
        assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms
        assert (row.op, row.shape, row.dtype, row.mode) == (case.op, case.shape, case.dtype, case.mode)
        assert row.err is None or 0 <= row.err <= row.budget
    assert by_name[OURS].variant


@pytest.mark.parametrize("change", [scaled, wrong_gradient])
def test_a_wrong_rival_is_refused(monkeypatch, change):
    spoil(monkeypatch, "sdpa", change)
    outcome = bench.run([CASE], against=AGAINST, seconds=0)
    assert [row.contender for row in outcome.rows] == [OURS, "eager"]
    (refused,) = outcome.skipped
    assert (refused.contender, refused.refused) == ("sdpa", True)
    assert "budget" in refused.reason


def test_without_a_right_result_of_ours_there_is_no_row(monkeypatch):
    spoil(monkeypatch, OURS, scaled)
    outcome = bench.run([CASE], against=AGAINST, seconds=0)
    assert outcome.rows == []
    assert {each.contender: each.refused for each in outcome.skipped} == {
        OURS: True,
        "eager": False,
        "sdpa": False,
    }


def test_layers_that_are_not_swapped_end_the_run(monkeypatch):
    from flamingo import modules

    for cls in (modules.MaskedCrossAttention, modules.GatedCrossAttentionBlock):
        monkeypatch.setattr(cls, "forward", lambda self, *args, other=cls.forward: other(self, *args))
    case = next(case for case in QUICK if case.op == "GatedCrossAttentionBlock")
    with pytest.raises(NothingSwappedError, match="got none"):
        bench.run([case], against=AGAINST, seconds=0)


def test_a_rival_that_fails_is_skipped_with_its_reason(monkeypatch):
    spoil(monkeypatch, "sdpa", failing)
    outcome = bench.run([CASE], against=AGAINST, seconds=0)
    assert [row.contender for row in outcome.rows] == [OURS, "eager"]
    (skipped,) = outcome.skipped
    assert (skipped.reason, skipped.refused) == ("RuntimeError: no such kernel", False)


def test_a_floor_is_timed_unchecked_and_forward_only():
    for mode, expected in (("forward", 1), ("forward+backward", 0)):
        case = next(case for case in QUICK if (case.op, case.mode) == ("gated_residual", mode))
        rows = bench.run([case], against=["torch.add"], seconds=0).rows
        assert [row.err for row in rows if row.contender == "torch.add"] == [None] * expected


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_contenders_run_on_the_same_numbers_in_float64(case):
    with torch.no_grad():
        low, high = (contenders(case, dtype)["eager"]() for dtype in (None, torch.float64))
    assert isinstance(low, Contender)
    for a, b in zip(low.wrt, high.wrt, strict=True):
        assert torch.equal(a.double(), b)


def test_every_target_names_rivals_of_its_operator():
    names = {case.op: set(contenders(case)) for case in QUICK}
    assert {case.op for case in (*CASES, *GPU_CASES)} == set(names)
    for case in (*CASES, *GPU_CASES):
        for target in case.targets:
            assert isinstance(target, Floor) or set(target.against) <= names[case.op]


def test_ours_is_judged_by_the_bytes_it_must_move():
    (ours, eager) = bench.run(
        [CASE], against=["eager"], seconds=0, clock=lambda call, last: 2.0, ceilings=Ceilings(1.0, 1.0)
    ).rows
    assert ours.least_bytes == least_bytes(CASE)
    assert ours.floor_share == eager.floor_share == pytest.approx(least_bytes(CASE) / 1e6 / 2.0)
    assert ours.device_type == "cpu"
    assert bench.run([CASE], against=["eager"], seconds=0).rows[0].floor_share is None


def test_a_backward_pass_alone_gives_the_same_gradients():
    both = Case("gated_residual", {"rows": 9, "D": 16}, "float32", "forward+backward")
    alone = Case(both.op, both.sizes, both.dtype, "backward")
    found, expected = (bench.call_of(contenders(case)[OURS](), case.mode) for case in (alone, both))
    for _ in range(2):  # the graph is kept
        for one, other in zip(found(), expected()[1:], strict=True):
            assert torch.equal(one, other)
    assert [row.mode for row in bench.run([alone], against=["eager"], seconds=0).rows] == ["backward"] * 2


def test_a_device_that_fails_in_one_case_is_asked_the_next(monkeypatch):
    def memory_full(case, *_):
        if case is CASE:
            raise torch.OutOfMemoryError("none is left")
        return check(case, AGAINST)

    check = bench.check
    monkeypatch.setattr(bench, "check", memory_full)
    (other,) = [case for case in QUICK if (case.op, case.mode) == (CASE.op, "forward")]
    outcome = bench.run([CASE, other], against=AGAINST, seconds=0)
    assert {row.mode for row in outcome.rows} == {"forward"}
    assert [each.reason for each in outcome.skipped] == ["OutOfMemoryError: none is left"]


def test_eager_by_sequence_is_eager():
    makers = contenders(CASE, torch.float64)
    one_by_one, at_once = (bench.call_of(makers[name](), CASE.mode)() for name in ("eager", "sdpa"))
    for one, other in zip(one_by_one, at_once, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_blocks_of_flex_hold_what_the_mask_shows(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    makers = contenders(
        Case(CASE.op, {"B": 2, "T": 150, "M": 3, "H": 2, "d": 16, "R": 60}, "float32", "forward")
    )
    q, k, v = (tensor.detach() for tensor in makers[OURS]().wrt)
    locations = baselines._media_locations(2, 150, 3, q.device)
    mask = baselines.fk.MediaMask.last_preceding(locations, 3)
    found, expected = baselines._flex(q, k, v, mask)(), makers[OURS]().call()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    assert not found[:, 0].any()


def test_on_a_cpu_flex_is_skipped_and_says_why():
    _, refused = bench.check(CASE, ["flex"])
    assert refused["flex"].reason.startswith(
        "NotImplementedError: FlexAttention does not support backward on CPU"
    )


def test_without_flash_attn_its_reason_is_kept():
    _, refused = bench.check(CASE, ["flash-attn"])
    assert refused["flash-attn"] == bench.Refused(
        "ModuleNotFoundError: No module named 'flash_attn'", wrong=False
    )


def varlen(q, k, v, ends_q, ends_k, longest_q, longest_k, *, without_keys=0.0):
    """What flash_attn_varlen_func computes, sequence by sequence."""
    pieces = []
    for at in range(len(ends_q) - 1):
        rows, keys = (slice(ends[at], ends[at + 1]) for ends in (ends_q, ends_k))
        assert rows.stop - rows.start <= longest_q
        assert keys.stop - keys.start in (0, longest_k)
        queries = q[rows]
        scores = torch.einsum("thd,shd->hts", queries * q.shape[-1] ** -0.5, k[keys])
        out = torch.einsum("hts,shd->thd", scores.softmax(-1), v[keys])
        pieces.append(out if keys.stop > keys.start else queries * without_keys)
    return torch.cat(pieces)


@pytest.mark.parametrize(("without_keys", "right"), [(0.0, True), (float("nan"), False)])
def test_the_pieces_of_flash_attn_are_the_media(monkeypatch, without_keys, right):
    function = functools.partial(varlen, without_keys=without_keys)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=function))
    sound, refused = bench.check(CASE, ["flash-attn"])
    assert ("flash-attn" in sound) is right
    assert right or refused["flash-attn"].wrong


def test_a_linear_layer_walks_over_copies_of_its_weight(monkeypatch):
    """Forward it takes the next copy every time, so that no cache holds it; a gradient is of the first."""
    met = []

    def multiply(x, weight):
        met.append(weight)
        return F.linear(x, weight)

    monkeypatch.setattr(baselines, "copies_beyond_caches", lambda weight: [weight, weight.detach().clone()])
    monkeypatch.setattr(baselines.fk, "linear", multiply)
    case = next(case for case in QUICK if (case.op, case.mode) == ("linear", "forward+backward"))
    ours = contenders(case)[OURS]()
    forward, both = (bench.call_of(ours, mode) for mode in ("forward", "forward+backward"))
    met.clear()
    for _ in range(3):
        forward()
    assert met[0] is met[2]
    assert met[0] is not met[1]
    both()
    assert met[3] is ours.wrt[1]


def test_reading_is_timed_by_the_fastest_loop(monkeypatch):
    taken = {"plain": 3.0, "prefetched": 1.0, "streamed": 2.0}
    asked = []
    monkeypatch.setattr(baselines.cpu, "read", lambda tensor, way: asked.append(way) or 7)
    monkeypatch.setattr(baselines, "host_clock", lambda call, last: (call(), taken[asked[-1]])[1])
    contender = baselines._read(baselines.cycle([torch.ones(2)]))
    assert contender.call() == 7
    assert asked[-1] == "prefetched"
    assert (contender.same, contender.modes) == (False, ("forward",))
