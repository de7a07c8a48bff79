"""`bench --rival FILE.py:NAME`: a contender of the user's own, checked like any other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flamingo_kernels.commands.bench import rival
from flamingo_kernels.commands.bench import run as bench
from flamingo_kernels.commands.bench.baselines import OURS
from flamingo_kernels.commands.bench.shapes import QUICK

CASE = next(case for case in QUICK if (case.op, case.mode) == ("masked_cross_attention", "forward+backward"))


def attend(q, k, v, mask):
    dense = mask.dense(k.shape[2])
    q, k, v = (each.transpose(1, 2) for each in (q, k.flatten(1, 2), v.flatten(1, 2)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense).transpose(1, 2)


def spoilt(change):
    return lambda *given: change(attend(*given))


def fails(*given):
    raise RuntimeError("no such kernel\nand a long story")


def writes(q, *others):
    return attend(q.mul_(2), *others)


def test_a_right_rival_has_a_row():
    rows = bench.run([CASE], against=["eager"], rivals={"mine.py:attend": attend}, seconds=0).rows
    assert [row.contender for row in rows] == [OURS, "eager", "mine.py:attend"]
    assert 0 <= rows[-1].err <= rows[-1].budget
    assert rows[-1].ratio == rows[-1].median_ms / rows[0].median_ms


@pytest.mark.parametrize(
    ("function", "wrong", "reason"),
    [
        (spoilt(lambda out: out * 1.001), True, "relative error"),
        (spoilt(lambda out: out[:, 1:]), True, "expected tensors like eager's"),
        (spoilt(torch.Tensor.bfloat16), True, "expected tensors like eager's"),
        (spoilt(lambda out: out.detach() + 0 * out), True, "relative error"),
        (spoilt(torch.Tensor.detach), False, "RuntimeError: element 0 of tensors does not require grad"),
        (spoilt(lambda out: None), False, "TypeError: expected a rival that returns a tensor, got NoneType"),
        (fails, False, "RuntimeError: no such kernel"),
        (writes, False, "ValueError: expected a rival that leaves its arguments as they are"),
    ],
    ids=["wrong", "shape", "dtype", "gradient", "detached", "nothing", "fails", "writes"],
)
def test_a_rival_that_is_not_right_has_a_reason_and_no_row(function, wrong, reason):
    outcome = bench.run([CASE], against=["eager"], rivals={"mine.py:f": function}, seconds=0)
    assert [row.contender for row in outcome.rows] == [OURS, "eager"]
    (skipped,) = outcome.skipped
    assert (skipped.contender, skipped.refused) == ("mine.py:f", wrong)
    assert skipped.reason.startswith(reason)
    assert "\n" not in skipped.reason


@pytest.mark.parametrize("op", ["linear", "linear, int8", "gated_block_decode"])
def test_the_operators_themselves_are_called_as_documented(op):
    """Weights walk over copies for a rival too."""
    given = []
    case = next(case for case in QUICK if (case.op, case.mode) == (op, "forward"))
    name = {"linear, int8": "linear"}.get(op, op)
    (operator,) = rival.rivals([f"flamingo_kernels:{name}"], [op.split(",")[0]]).values()

    def mine(*arguments):
        given.append(arguments)
        if op == "linear, int8":
            return operator(*arguments[:2], weight_scale=arguments[2])
        return operator(*arguments)

    sound, refused = bench.check(case, ["eager"], rivals={"mine.py:f": mine})
    assert list(sound) == [OURS, "eager", "mine.py:f"]
    assert not refused
    assert len(given[-1]) == len(rival.TAKES[op])


def test_a_layer_is_one_of_its_own_with_the_same_weights():
    case = next(case for case in QUICK if (case.op, case.mode) == ("PerceiverResampler", "forward+backward"))
    sound, refused = bench.check(case, ["eager"], rivals={"mine.py:f": lambda layer, x: layer(x)})
    assert "mine.py:f" in sound
    assert not refused


def test_a_function_of_other_arguments_is_refused_before_the_work(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def attend(q, k, v): ...\ndef any(*given): ...\n")
    with pytest.raises(
        ValueError, match=r"to be called as masked_cross_attention\(q, k, v, mask\), got attend"
    ):
        rival.rivals([f"{file}:attend"], ["masked_cross_attention"])
    found = rival.rivals([f"{file}:any", "torch.nn.functional:linear"], ["linear"])
    assert list(found) == [f"{file}:any", "torch.nn.functional:linear"]
