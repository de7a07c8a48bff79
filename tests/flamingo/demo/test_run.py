"""A run of the demo: what its stages learn from, what is asked at the end, what is said and drawn of it."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flamingo import load_model
from flamingo.demo import lessons, main, run, stages
from flamingo.demo.digits import load_digits
from flamingo.demo.words import ANSWERS, NAMES, WordTokenizer

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")


def key(image):
    return tuple(image.flatten().tolist())


def test_the_vision_encoder_learns_what_the_digits_are(seed):
    """By chance it would be one of ten."""
    _, zero_shot = stages.pretrain_vision(*load_digits(), steps=40)
    assert zero_shot > 0.3


def rms_to_the_nearest(digits, pixels):
    shown = stages._normalised(digits.images).flatten(1)
    return (
        torch.cdist(pixels.reshape(-1, shown.shape[1]), shown).amin(dim=1).mean().item()
        / shown.shape[1] ** 0.5
    )


def test_noise_is_grey_and_drawn_anew():
    generator = torch.Generator().manual_seed(0)
    first, second = (stages._noisy(torch.zeros(50, 3, 8, 8), generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, first[:, :1].expand_as(first))
    assert first.std() == pytest.approx(stages.NOISE, rel=0.1)


def test_the_vision_encoder_learns_from_noise_and_is_asked_without(monkeypatch):
    step, learnt, asked = stages.training_step, [], []

    def training_step(model, optimizer, pairs, **options):
        learnt.extend(pairs)
        return step(model, optimizer, pairs, **options)

    def zero_shot(model, pixels, classes):
        asked.append(pixels)
        return torch.zeros(len(pixels), 10)

    monkeypatch.setattr(stages, "training_step", training_step)
    monkeypatch.setattr(stages, "zero_shot", zero_shot)
    digits, held_out = load_digits()
    stages.pretrain_vision(digits, held_out, steps=1)
    assert 0.25 < rms_to_the_nearest(digits, learnt[0].pixels) < 0.35
    assert torch.equal(asked[0], stages._normalised(held_out.images))


def test_it_learns_from_nine_digits_a_document():
    """Eight shots and one more, all with their answers, of each kind in turn."""
    digits = load_digits()[0]
    batches = stages.documents(digits, stages.make_processor(), count=4)
    for words, answers, count in (("Output:", NAMES, 1), ("Question:", ANSWERS, 1), ("is", NAMES, 4)) * 2:
        batch = next(batches)
        assert batch.pixels.shape == (count, 9, 1, 3, 8, 8)
        assert 0.25 < rms_to_the_nearest(digits, batch.pixels) < 0.35, "with noise"
        for ids in batch.input_ids:
            told = WordTokenizer().decode(ids).split("<image> ")[1:]
            assert len(told) == 9
            assert all(each.startswith(words) for each in told)
            assert all(each.split()[-2] in answers for each in told)


def test_what_is_found_is_said_and_drawn(capsys, tmp_path, monkeypatch):
    """By an oracle that knows the digits held out, and is right about the even ones."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.chdir(tmp_path)
    _, held_out = load_digits()
    labels = {
        key(image): label for image, label in zip(held_out.images, held_out.labels.tolist(), strict=True)
    }
    trained, right, drawn, save = set(), [], [], figure.savefig

    def oracle(model, processor, documents, candidates, **options):
        trained.update(name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad)
        asked = [[part for part in document if isinstance(part, torch.Tensor)][-1] for document in documents]
        digits = torch.tensor([labels[key(image)] for image in asked])
        right.append((digits % 2 == 0).double().mean().item())
        return F.one_hot((digits + digits % 2) % len(candidates), len(candidates))

    monkeypatch.setattr(run, "log_likelihoods", oracle)
    monkeypatch.setattr(
        figure, "savefig", lambda self, *args, **options: drawn.append(self) or save(self, *args)
    )
    monkeypatch.setattr(lessons, "MEASURED", 2)
    assert main("digits.png", json="digits.json", kernels=False, quick=True) == 0
    assert trained == {"resampler", "cross_attn"}
    by_name = right[:2]  # after no shot and after one
    assert 0 < min(by_name) <= max(by_name) < 1
    table = re.search(r"^shots +0 +1\n.* (\d+\.\d)% +(\d+\.\d)%\n", capsys.readouterr().out, re.MULTILINE)
    assert [float(each) / 100 for each in table.groups()] == pytest.approx(by_name, abs=1e-3)
    heading = drawn[0].get_suptitle()
    assert (
        f"of {sum(p.numel() for p in load_model('digits.safetensors')[0].parameters()) / 1e6:.2g} M"
        in heading
    )
    assert heading.endswith("; without kernels: they are switched off")
    of_lessons, of_shots = (axes.lines[0] for axes in drawn[0].axes)
    assert list(of_shots.get_xdata()) == [0, 1]
    assert list(of_shots.get_ydata()) == pytest.approx([100 * each for each in by_name])
    told = json.loads(Path("digits.json").read_text())
    assert list(told["known"].values()) == by_name
    assert list(of_lessons.get_xdata()) == [2, 4, 5]
    assert of_lessons.get_ydata()[-1] == pytest.approx(100 * told["recall"])
    assert (tmp_path / "digits.png").stat().st_size > 1000
