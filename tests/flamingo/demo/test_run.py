"""A run of the demo: what its stages learn, what is asked at the end, and what is said and drawn of it."""

import re

import pytest
import torch
import torch.nn.functional as F

from flamingo.__main__ import main
from flamingo.demo import run, stages
from flamingo.demo.digits import load_digits
from flamingo.demo.words import ANSWERS, NAMES, WordTokenizer

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")


def key(image):
    return tuple(image.flatten().tolist())


def test_the_vision_encoder_learns_what_the_digits_are(seed):
    """By chance it would be one of ten."""
    _, zero_shot = stages.pretrain_vision(*load_digits(), steps=40)
    assert zero_shot > 0.3


def test_the_language_model_learns_its_text(seed):
    losses = []
    stages.pretrain_language(steps=20, report=lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_it_learns_from_nine_digits_a_document():
    """Eight shots and one more, all with their answers, of each kind in turn."""
    batches = stages.documents(load_digits()[0], stages.make_processor(), count=4)
    for words, answers, count in (("Output:", NAMES, 1), ("Question:", ANSWERS, 1), ("is", NAMES, 4)) * 2:
        batch = next(batches)
        assert batch.pixels.shape == (count, 9, 1, 3, 8, 8)
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
    assert run.main("digits.png", kernels=False, quick=True) == 0
    assert trained == {"resampler", "cross_attn"}
    by_name = right[:2]  # after no shot and after one
    assert 0 < min(by_name) <= max(by_name) < 1
    table = re.search(r"^shots +0 +1\n.* (\d+\.\d)% +(\d+\.\d)%\n", capsys.readouterr().out, re.MULTILINE)
    assert [float(each) / 100 for each in table.groups()] == pytest.approx(by_name, abs=1e-3)
    line = drawn[0].axes[0].lines[0]
    assert list(line.get_xdata()) == [0, 1]
    assert list(line.get_ydata()) == pytest.approx([100 * each for each in by_name])
    assert (tmp_path / "digits.png").stat().st_size > 1000


def test_the_command(monkeypatch):
    calls = []
    monkeypatch.setattr("flamingo.demo.main", lambda *args, **options: calls.append((args, options)) or 3)
    files = ["--picture", "x.png", "--model", "x.safetensors"]
    assert main(["demo"]) == main(["demo", *files, "--no-kernels", "--quick"]) == 3
    assert calls == [
        (("digits.png", "digits.safetensors"), {"kernels": True, "quick": False}),
        (("x.png", "x.safetensors"), {"kernels": False, "quick": True}),
    ]
