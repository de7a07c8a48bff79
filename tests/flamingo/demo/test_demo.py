"""The demo: its documents, its training on them, and its model in a file."""

import copy

import pytest
import torch

from flamingo.demo import command, load_digits, main, run, stages
from flamingo.demo.digits import TEMPLATES, WAYS, episode
from flamingo.demo.words import NAMES, WordTokenizer
from flamingo.saved import save_model
from flamingo_kernels import patch
from tests.flamingo.demo.test_words import TRUE
from tests.helpers.kernels import has_kernels

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_digits_are_held_out():
    digits, held_out = load_digits()
    assert (len(digits.labels), len(held_out.labels)) == (1400, 397)
    assert digits.images.shape[1:] == (3, 8, 8)
    assert (digits.images.min(), digits.images.max()) == (0, 1)
    rows = {tuple(image.flatten().tolist()) for image in digits.images}
    assert not rows & {tuple(image.flatten().tolist()) for image in held_out.images}


def labels_of(digits):
    return {
        tuple(x.flatten().tolist()): y for x, y in zip(digits.images, digits.labels.tolist(), strict=True)
    }


@pytest.mark.parametrize("kind", ["captions", "codes"])
def test_names(kind):
    """They are the digits' own, or one for each digit that is drawn for the episode."""
    digits, _ = load_digits()
    label_of, draw, own = labels_of(digits), generator(), 0
    for _ in range(20):
        query, shots = episode(kind, digits, 8, draw)
        assert len(shots) == 8
        assert not any(shot is query for shot in shots)
        pairs = [(label_of[tuple(s.image.flatten().tolist())], s.answer) for s in (*shots, query)]
        names = dict(pairs)
        assert all(names[digit] == name for digit, name in pairs)
        assert len(set(names.values())) == len(names)
        assert kind == "captions" or len(names) <= WAYS
        own += all(NAMES[digit] == name for digit, name in pairs)
    assert own == (0 if kind == "codes" else 20)


def test_questions():
    digits, _ = load_digits()
    label_of, draw, asked = labels_of(digits), generator(), set()
    for _ in range(20):
        query, shots = episode("questions", digits, 3, draw)
        for sample in (*shots, query):
            digit = label_of[tuple(sample.image.flatten().tolist())]
            word = sample.fields["question"].split()[-1]
            assert sample.answer == ("yes" if digit in TRUE[word] else "no")
            asked.add((word, sample.answer))
    assert len(asked) == 8


def test_an_update_is_by_its_own_gradient_of_length_one():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for towards, found in (([3.0, 4.0], [0.6, 0.8]), ([4.0, -3.0], [0.6 + 0.8, 0.8 - 0.6])):
        stages.update(-(weight * torch.tensor(towards)).sum(), optimizer)
        assert weight.tolist() == pytest.approx(found)


def test_prompts():
    digits, _ = load_digits()
    written = []
    for kind, template in TEMPLATES.items():
        query, (shot,) = episode(kind, digits, 1, generator())
        batch = stages.make_processor()([template.prompt(query, [shot])], prompt=True)
        written.append(WordTokenizer().decode(batch.input_ids[0]).replace(f" {shot.answer} ", " # "))
        assert batch.pixels.shape == (1, 2, 1, 3, 8, 8)
        assert torch.allclose(batch.pixels[0, 1, 0], stages._normalised(query.image), atol=1e-6)
    assert written[::2] == ["<image> Output: # <EOC> <image> Output:", "<image> is # <EOC> <image> is"]
    assert written[1].startswith("<image> Question: is it ")
    assert written[1].endswith("? Answer:")
    assert abs(stages._normalised(digits.images).mean()) < 0.01


def test_what_is_frozen_stays_and_what_is_not_learns(monkeypatch):
    digits, _ = load_digits()
    torch.manual_seed(0)
    model = run.Flamingo(stages.CONFIG).freeze()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make, made = stages._optimizer, []
    monkeypatch.setattr(stages, "_optimizer", lambda *args: made.append(make(*args)) or made[0])
    losses = stages.train(model, stages.documents(digits, stages.make_processor(), count=8), steps=12)
    assert losses[-1] < losses[0]
    assert made[0][1].last_epoch == 12, "the rates rise and fall"
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("vision.", "language."))
        assert torch.equal(parameter, before[name]) == frozen, name


@pytest.mark.parametrize(
    ("switch", "kernels", "line"),
    [
        ({}, True, " linear layers are swapped\n  the first losses differ by at most "),
        ({"kernels": False}, False, "without kernels: they are switched off\nresampler and gated blocks "),
    ],
)
def test_quick(capsys, tmp_path, monkeypatch, switch, kernels, line):
    pytest.importorskip("matplotlib")
    swapped = []
    monkeypatch.setattr(
        command,
        "save_model",
        lambda model, *more: swapped.append(has_kernels(model)) or save_model(model, *more),
    )
    assert main(tmp_path / "digits.png", tmp_path / "digits.safetensors", quick=True, **switch) == 0
    said = capsys.readouterr().out
    assert swapped == [kernels]
    assert line in said
    assert (tmp_path / "digits.png").stat().st_size > 1000


def test_patched_training_has_the_same_losses():
    """Within what rounding in another order does to ten steps."""
    digits, _ = load_digits()
    torch.manual_seed(0)
    model = run.Flamingo(stages.CONFIG).freeze()
    fused, wrong = copy.deepcopy(model), copy.deepcopy(model)
    patch(fused, linears=True)
    wrong.resampler.latents.data.mul_(1.01)
    assert 0 < run._difference(model, fused, digits, steps=10) < 1e-5
    assert run._difference(model, wrong, digits, steps=10) > 1e-5
