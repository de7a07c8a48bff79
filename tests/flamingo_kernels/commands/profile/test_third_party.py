"""The tiny models of other libraries under the profiler."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch

from flamingo_kernels import __main__ as cli
from flamingo_kernels import patch
from flamingo_kernels.commands.profile import models, parts, run, third_party
from flamingo_kernels.commands.profile.subject import QUICK
from flamingo_kernels.ops.linear import config
from flamingo_kernels.testing import tiny
from tests.flamingo_kernels.testing.test_tiny import build
from tests.helpers import slow_unless

SWAPPED = {
    "open_flamingo-tiny": "open_flamingo.src.helpers.GatedCrossAttentionBlock",
    "flamingo_pytorch-tiny": "flamingo_pytorch.flamingo_pytorch.GatedCrossAttentionBlock",
    "idefics-tiny": "transformers.models.idefics.modeling_idefics.IdeficsGatedCrossAttentionLayer",
    "idefics2-tiny": "transformers.models.idefics2.modeling_idefics2.Idefics2PerceiverAttention",
    "mllama-tiny": "transformers.models.mllama.modeling_mllama.MllamaCrossAttentionDecoderLayer",
    "evolla-tiny": "transformers.models.evolla.modeling_evolla.EvollaSequenceAlignerCrossAttention",
}
LACKING = {
    "open_flamingo-tiny": {parts.VISION},
    "flamingo_pytorch-tiny": {parts.VISION},
    "idefics2-tiny": {*parts.INSIDE},
    "mllama-tiny": {parts.RESAMPLER},
}
NAMES = tiny.names()
DECODING = [name for name in NAMES if name not in ("flamingo_pytorch-tiny", "evolla-tiny")]
USUAL = [("mllama-tiny", torch.bfloat16)]
ORDER = models.PREFILL, models.DECODE, models.DECODE


def plan(name: str) -> models.Plan:
    build(name)  # or skip
    return models.plan(name, QUICK)


@pytest.fixture
def pair(request):
    subject = plan(request.param).subject(torch.float32, "cpu")
    after = run.twin(subject.model)
    patch(after)
    return subject, {run.BEFORE: subject.model, run.PATCHED: after}


@pytest.mark.parametrize("name", slow_unless([("flamingo_pytorch-tiny",)], [(name,) for name in NAMES]))
def test_a_profile(name, monkeypatch, tmp_path, capsys):
    plan(name)
    whole = run.run
    monkeypatch.setattr(run, "run", lambda *args, **kwargs: whole(*args, **{**kwargs, "seconds": 0}))
    file = tmp_path / "found.json"
    assert cli.main(["profile", name, "--quick", "--threads", "1", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert SWAPPED[name] in shown
    found = json.loads(file.read_text())["works"]
    assert len(found) == 2 + (name in DECODING)
    assert shown.count("same") == 2 * len(found)
    assert ("with the model's own cache" in shown) == (name in DECODING)
    for side in found[models.STEP]["parts"]:
        lacking = LACKING.get(name, set())
        if (name, side) == ("evolla-tiny", run.BEFORE):
            lacking = {parts.GATE}  # its attention is no module, and the gate is not told from it
        assert set(found[models.STEP]["parts"][side]) == {*parts.PARTS} - lacking


@pytest.mark.parametrize("pair", DECODING, indirect=True)
def test_a_decoded_token_is_the_last_of_a_prefill(pair):
    """Each time it is called, so its cache is as long each time, and holds the images."""
    subject, sides = pair
    for model in sides.values():
        calls = {name: run.call(name, work, model) for name, work in subject.works.items()}
        (prefill,), (first,), (second,) = (calls[name]() for name in ORDER)
        torch.testing.assert_close(first, prefill[:, -1:], rtol=1e-4, atol=1e-4)
        assert torch.equal(first, second)
        assert first.shape[1] == 1


@pytest.mark.parametrize("pair", NAMES, indirect=True)
def test_what_is_trained(pair):
    """What reads images in the language model, and all that is trained gets a gradient."""
    subject, sides = pair
    labelled = parts.labels(subject.model, subject.parts)
    trained = {
        parameter
        for module, part in labelled.items()
        if part != parts.VISION
        for parameter in module.parameters()
    }
    unseen = {each for path, each in subject.model.named_parameters() if path.endswith(third_party.UNSEEN)}
    assert {each for each in subject.model.parameters() if each.requires_grad} == trained - unseen
    for model in sides.values():
        _, *gradients = run.call(models.STEP, subject.works[models.STEP], model)()
        assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("pair", ["idefics-tiny"], indirect=True)
@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        # it rides on the products
        ("aten::tanh", {run.BEFORE: {parts.GATE}, run.PATCHED: {parts.PROJECTIONS, parts.FEED_FORWARD}}),
        ("flamingo_kernels::masked_cross_attention_fwd", {run.BEFORE: set(), run.PATCHED: {parts.ATTENTION}}),
        ("aten::cummax", {run.BEFORE: set(), run.PATCHED: {parts.ATTENTION}}),  # of the mask
        ("flamingo_kernels::perceiver_attention_fwd", {run.BEFORE: set(), run.PATCHED: {parts.RESAMPLER}}),
        ("aten::convolution", {run.BEFORE: {parts.VISION}, run.PATCHED: {parts.VISION}}),
    ],
)
def test_an_operator_counts_for_the_part_that_calls_it(pair, monkeypatch, operator, expected):
    subject, sides = pair
    monkeypatch.setattr(config, "choose", lambda *_: "torch")  # other products have another tanh
    monkeypatch.setattr(run, "host_time", lambda event: 1000 * (event.name == operator))
    found = run.by_part(subject, sides, "cpu", calls=1)[models.PREFILL]
    assert {side: set(taken) for side, taken in found.items()} == expected


@pytest.mark.parametrize(
    ("name", "dtype"),
    slow_unless(USUAL, product(NAMES, (torch.bfloat16, torch.float16))),
    ids=str,
)
def test_half_precision(name, dtype):
    subject = plan(name).subject(dtype, "cpu")
    after = run.twin(subject.model)
    patch(after)
    proofs, _ = run.compare(subject, {run.PATCHED: after})
    assert all(each[run.PATCHED].passed for each in proofs.values()), proofs
    given = [each for each in subject.inputs.values() if each.is_floating_point()]
    assert given or name == "evolla-tiny", "which reads tokens alone"
    assert all(torch.equal(each, each.bfloat16().float()) for each in given), "or the input's rounding counts"


@pytest.mark.parametrize("name", NAMES)
def test_a_small_model_is_wider(name):
    build(name)
    counts = [
        sum(each.numel() for each in models.plan(one, QUICK).subject(torch.float32, "cpu").model.parameters())
        for one in (name, models.small_of(name))
    ]
    assert counts[1] > 4 * counts[0]
