"""`profile --model FILE.py:NAME`: a model of the user's own, by one function."""

from __future__ import annotations

import json

import pytest
import torch

from flamingo_kernels import __main__ as cli
from flamingo_kernels.commands.profile import models, own, parts, run
from flamingo_kernels.commands.profile.subject import Sizes

SIZES = Sizes(text=20, media=2, batch=3)
BLOCK = """
import torch
from torch import nn
from flamingo import GatedCrossAttentionBlock

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_tower = nn.Linear(8, 8)
        self.block = GatedCrossAttentionBlock(dim=16, dim_visual=8, dim_head=8, heads=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x, media, places):
        return self.head(self.block(x, self.vision_tower(media), places))

def build(tokens, images, batch):
    places = torch.zeros(batch, tokens, dtype=torch.bool)
    places[:, :images] = True
    x, media = torch.randn(batch, tokens, 16), torch.randn(batch, images, 4, 8)
    return Model(), {"x": x, "media": media, "places": places}

def fixed():
    return build(6, 1, 1)

def wrong():
    return 3

def listed():
    return Model(), [1]

def whole(tokens):
    from flamingo_kernels.commands.profile.subject import Subject, Work
    model, inputs = build(tokens, 1, 1)
    return Subject(model, {}, {}, {"prefill": Work(lambda model: lambda: model(**inputs), tokens)})

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(BLOCK)
    return path


def test_a_model_of_its_own_is_profiled(file, tmp_path, capsys):
    found = tmp_path / "found.json"
    asked = ["--model", f"{file}:build", "--tokens", "20", "--images", "2", "--batch", "3"]
    assert cli.main(["profile", *asked, "--quick", "--threads", "1", "--json", str(found)]) == 0
    shown = capsys.readouterr().out
    assert " M parameters; x [3, 20, 16], media [3, 2, 4, 8], places [3, 20]" in shown
    assert "flamingo.modules.GatedCrossAttentionBlock" in shown
    works = json.loads(found.read_text())["works"]
    assert list(works) == [models.PREFILL, models.STEP]
    assert works[models.PREFILL]["tokens"] == 60
    assert {parts.VISION, parts.FEED_FORWARD, parts.LANGUAGE} <= set(works[models.PREFILL]["parts"]["patch"])


def test_it_is_given_what_it_asks_for(file):
    subject = own.plan(f"{file}:fixed", SIZES).subject(torch.bfloat16, "cpu")
    assert subject.inputs["x"].shape == (1, 6, 16)
    assert all(proof.passed for each in _compare(subject).values() for proof in each.values())


def test_it_may_say_all_by_a_subject(file):
    subject = own.plan(f"{file}:whole", SIZES).subject(torch.float32, "cpu")
    assert {name: work.tokens for name, work in subject.works.items()} == {models.PREFILL: 20}


def _compare(subject):
    after, _ = run.sides(subject.model)
    return run.compare(subject, after)[0]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere.py:build", "expected a file of Python, found none at nowhere.py"),
        ("build", "expected FILE.py:NAME or module:NAME, got 'build'"),
        ("{file}:nothing", "expected a function nothing in {file}, found none"),
        ("{file}:wrong", "expected {file}:wrong to return a model and a dict of inputs, got int"),
        ("{file}:listed", "to return a model and a dict of inputs, got Model, list"),
    ],
)
def test_what_is_no_model_is_refused(where, message, file, capsys):
    assert cli.main(["profile", "--model", where.format(file=file), "--quick"]) == 2
    shown = capsys.readouterr()
    assert message.format(file=file) in shown.err
    assert shown.err.rstrip().count("\n") == shown.err.count(": building")
    assert shown.out == ""


def test_a_model_that_generates_decodes_its_second_token(tmp_path):
    """In the model that transformers' own generate calls, the token after the first one that it chose."""
    pytest.importorskip("transformers")
    path = tmp_path / "mine.py"
    path.write_text(
        "from flamingo_kernels.testing import tiny\n"
        "def build(tokens, images, batch):\n"
        "    built = tiny.build('mllama-tiny', tiny.Sizes(batch, tokens, images))\n"
        "    return built.model, built.inputs\n"
    )
    subject = own.plan(f"{path}:build", SIZES).subject(torch.float32, "cpu")
    assert list(subject.works) == [models.PREFILL, models.STEP, models.DECODE]
    with torch.no_grad():
        token = subject.works[models.DECODE].start(subject.model)
        first, again = token(), token()
        torch.testing.assert_close(again, first, rtol=0, atol=0)
        given = own._cast(subject.inputs, subject.model)
        chosen = subject.model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert first.shape[:2] == (3, 1)
    scores = first[:, -1].clone()
    scores[:, subject.model.generation_config.eos_token_id] = -torch.inf  # as generate forbids it here
    torch.testing.assert_close(scores.argmax(-1), chosen[:, -2])
