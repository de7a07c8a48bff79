import argparse
import dataclasses
import functools

import pytest
import torch

from flamingo_kernels import __main__ as cli
from flamingo_kernels.commands import demo, info
from flamingo_kernels.layers import cross_attention, resampler
from tests.helpers.figures import texts_of

for extra in ("skimage", "matplotlib", "PIL"):
    pytest.importorskip(extra)

TINY = {
    "image_size": 28,
    "vision_dim": 32,
    "vision_heads": 2,
    "resampler_dim": 32,
    "resampler_depth": 1,
    "num_latents": 8,
    "language_dim": 64,
    "language_heads": 2,
    "language_layers": 2,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model of a few thousand parameters, timed as briefly as can be."""
    monkeypatch.setattr(demo, "run", functools.partial(demo.run, rounds=1, **TINY))


@pytest.fixture(scope="module")
def found():
    return demo.run([*demo.load_photographs()], rounds=1, **TINY)


def test_prints_and_draws_what_it_found(found, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "run", lambda images: found)
    assert demo.main(argparse.Namespace(picture=tmp_path / "demo.png")) == 0
    page = capsys.readouterr().out
    for expected in (
        "5 photographs in one document of ",
        "flamingo.modules.MaskedCrossAttention",
        "logits and loss (2 tensors)",
        "whole model, forward + backward",
        "a cross-attention core, forward ",
        "a resampler core, forward ",
    ):
        assert expected in page
    assert page.count("same") == 2
    assert "DIFFERS" not in page
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_page_and_picture_say_what_it_is_and_what_it_ran_on(found):
    conditions = {
        "device": "a processor",
        "device_type": "cpu",
        "threads": 3,
        "torch": "2.13.0",
        "time": "2026-01-02T03:04:05Z",
    }
    told = dataclasses.replace(found, conditions=conditions, parameters=275_000_000)
    texts = texts_of(lambda: demo.picture(told, "x.png"))
    for said in (texts, demo.render(told)):
        assert "A Flamingo of 275 M parameters in float32, with random weights" in said
        assert "CPU: a processor, 3 threads, torch 2.13.0, 2026-01-02, backend " in said
        assert info.backend_in_use("masked_cross_attention") in said
        assert all(what in said for what in found.proofs)
    assert "Nothing of this is its answer." in texts


def test_it_was_measured_here_and_today(found):
    assert found.conditions["device"] == info.processor_name()
    assert found.conditions["threads"] == torch.get_num_threads()
    assert found.dtype == "float32"


def test_one_wrong_result_is_enough_to_fail(found, monkeypatch, tmp_path):
    what, proof = next(iter(found.proofs.items()))
    wrong = dataclasses.replace(found, proofs={**found.proofs, what: proof._replace(err=2 * proof.budget)})
    monkeypatch.setattr(demo, "run", lambda images: wrong)
    assert demo.main(argparse.Namespace(picture=tmp_path / "demo.png")) == 1


@pytest.mark.parametrize(
    ("home", "operator"),
    [
        pytest.param(cross_attention, "gated_cross_attention", id="cross-attention"),
        pytest.param(resampler, "perceiver_attention", id="resampler", marks=pytest.mark.slow),
    ],
)
def test_fails_when_a_kernel_is_wrong(monkeypatch, tmp_path, capsys, home, operator):
    right = getattr(home, operator)
    monkeypatch.setattr(demo, "picture", lambda found, path: None)
    monkeypatch.setattr(home, operator, lambda *args, **kwargs: 1.001 * right(*args, **kwargs))
    assert demo.main(argparse.Namespace(picture=tmp_path / "demo.png")) == 1
    assert capsys.readouterr().out.count("DIFFERS") == 2


def test_says_so_when_the_machine_was_busy(found):
    quiet, busy = (
        dataclasses.replace(found, times={("whole model", "forward"): demo.Pair(2000.0, 500.0, spread)})
        for spread in (1.1, 3.0)
    )
    assert "busy" not in demo.render(quiet)
    assert "single times varied by 3.0x" in demo.render(busy)
    assert demo.render(busy).count("       2 s      500 ms    4.00x") == 1


def test_without_its_extra_it_says_what_to_install(monkeypatch, capsys):
    def missing():
        raise ModuleNotFoundError("No module named 'skimage'", name="skimage")

    monkeypatch.setattr(demo, "load_photographs", missing)
    assert cli.main(["demo"]) == 2
    line = 'demo: skimage is missing. In a checkout of this library, run: pip install ".[demo]".\n'
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("picture", ["x.text", "none/x.png"])
def test_a_picture_that_cannot_be_written_is_told_before_the_work(monkeypatch, capsys, picture):
    monkeypatch.setattr(demo, "run", lambda images: pytest.fail("it went to work"))
    assert cli.main(["demo", "--picture", picture]) == 2
    assert picture in capsys.readouterr().err


def test_the_model_has_openflamingos_block_shapes():
    with torch.device("meta"):
        model = demo.build()
    assert not any(p.requires_grad for p in [*model.vision.parameters(), *model.language.parameters()])
    for block in model.cross_attn.values():
        assert block.ff[1].weight.shape == (8192, 2048)
        assert block.attn.to_q.weight.shape == (512, 2048)
        assert block.attn.to_kv.weight.shape == (1024, 1024)
        assert block.attn.heads == 8
    assert model.resampler.latents.shape == (64, 1024)
