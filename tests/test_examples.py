"""The scripts of examples/ run, and what they print is right."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from flamingo import Flamingo, FlamingoConfig, PerceiverAttention, Processor, complete
from flamingo.training import load_weights
from flamingo_kernels import media_cache, patch
from tests.helpers import ROOT

EXAMPLES = ROOT / "examples"
SMALL = {
    "swap_and_generate": ["--width", "64", "--tokens", "8"],
    "swap_your_own_copy": [],
    "custom_mask": [],
    "media_cache_chat": ["--width", "64"],
    "quantize": ["--width", "128"],
    "benchmark_your_own": ["--shape", "B1 T64 M2 H2 d16 R8", "--seconds", "0.05"],
}
NAMES = [*SMALL, "train_on_pairs"]  # which learns nothing in less time
NUMBER = r"([\d.]+(?:e[-+]\d+)?)"


def numbers(pattern: str, said: str) -> list[float]:
    """What stands where `#` does, of the only place that matches."""
    (found,) = re.finditer(re.escape(pattern).replace(r"\#", NUMBER), said)
    return [float(group) for group in found.groups()]


def functions(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def expect_swap_and_generate(said: str) -> None:
    assert "patch: 8 modules replaced" in said
    assert re.search(r"gated_cross_attn_layers\.\* +2 ", said)
    assert re.search(r"perceiver_resampler\.blocks\.\*\.\* +6 ", said)
    for line in ("the same tokens: # of #", "and after unpatch: # of #"):
        same, tokens = numbers(line, said)
        assert same == tokens > 0
    assert min(numbers("tokens/s: # before, # after", said)) > 0


def expect_swap_your_own_copy(said: str) -> None:
    assert "patch: 2 modules replaced" in said
    assert max(numbers("output: # apart, gradients: at most #", said)) < 1e-5
    (refused,) = re.findall("^refused: (.*)$", said, flags=re.MULTILINE)
    assert "ReadsImagesAlone is a open_flamingo.PerceiverAttention, but" in refused
    assert "the result differs" in refused


def expect_custom_mask(said: str) -> None:
    differences = re.findall(f"largest difference: {NUMBER}", said)
    assert len(differences) == 2
    assert max(map(float, differences)) < 1e-5
    assert said.count("400 tokens, 80 images: ") == 2
    assert "medium 0  ..#####..." in said
    assert "medium 0  ..#########..." in said


def expect_media_cache_chat(said: str) -> None:
    lines = said.splitlines()
    assert [line.split("  ")[0] for line in lines[:2] + lines[3:4]] == ["as it is", "patched", "MediaCache"]
    for line in (lines[0], lines[1], lines[3]):
        assert min(numbers("first tokens after #, #, #, # ms, the chat # ms", line)) > 0
    for line in (lines[2], lines[4]):
        same, tokens, apart = numbers("# of # tokens are the same, logits # apart", line)
        assert same == tokens == 32
        assert apart < 1e-5


def expect_quantize(said: str) -> None:
    assert "quantize: " in said
    apart, divergence = numbers("logits: #% apart, KL # a token", said)
    assert 0 < apart < 10
    assert 0 < divergence < 0.01
    assert min(numbers("a token: # ms before, # ms after", said)) > 0
    assert "loaded again: equal logits" in said


def expect_train_on_pairs(said: str) -> None:
    first, last, steps = numbers("loss: # at first, # after # steps", said)
    assert last < first / 10
    assert steps == 200
    right, asked, chance = numbers("right: # of # images that it has not seen; # by chance", said)
    assert (asked, chance) == (60, 10)
    assert right >= 45
    shown = re.findall(r"a (\w+) square: '(\w*)'", said)
    assert len(shown) == 6
    assert sum(colour == answer for colour, answer in shown) >= 4


def expect_benchmark_your_own(said: str) -> None:
    for mode in ("forward", "forward+backward"):
        (ratio,) = numbers(f"dense, {mode}: # times as long as ours", said)
        table = said.split(f"float32  {mode}\n")[1].split("\n\n")[0]
        rival = next(line for line in table.splitlines() if ":dense" in line)
        assert f"  {ratio:.2f}x" in rival or ratio >= 10
        err, budget = numbers(f"unmasked, {mode}: refused, relative error # against float64, budget #", said)
        assert err > 1000 * budget


EXPECT = {name: globals()[f"expect_{name}"] for name in NAMES}


def test_every_example_is_tested_and_listed():
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert names == sorted(NAMES)
    listed = re.findall(
        r"^\| \[(\w+)\.py\]\((\w+)\.py\) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(name for name, link in listed if name == link) == names


@pytest.mark.parametrize("name", NAMES)
def test_an_example_says_how_it_is_run_and_how_long_it_takes(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert lines[0].startswith('"""')
    assert lines[2].startswith(f"    python examples/{name}.py")
    assert lines[4].startswith("Takes ")
    assert len(lines) <= 130


@pytest.mark.parametrize("name", SMALL)
def test_an_example_is_right(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *SMALL[name]])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    EXPECT[name](capsys.readouterr().out)


@pytest.mark.slow  # in its own size, as a process that finds the packages by itself
@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_right_as_it_stands(name, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, EXAMPLES / f"{name}.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    EXPECT[name](done.stdout)


def test_the_swapped_model_looks_at_its_images():
    example = functions("swap_and_generate")
    model, inputs = example.build(64), example.prompt()
    tokens, _ = example.generate(model, 8)
    assert len(tokens.unique()) > 2
    with torch.no_grad():
        before = model(**inputs).logits
        blind = model(**inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits
        patch(model)
        after = model(**inputs).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert (blind - before).abs().max() > 100 * (after - before).abs().max()


def test_the_own_copy_is_a_resamplers_attention():
    example = functions("swap_your_own_copy")
    ours, known = example.Reads(dim=32, dim_head=8, heads=2), PerceiverAttention(dim=32, dim_head=8, heads=2)
    known.load_state_dict(ours.state_dict())
    x, latents = torch.randn(2, 3, 7, 32), torch.randn(2, 3, 5, 32)
    torch.testing.assert_close(ours(x, latents), known(x, latents), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "documents", [("..i....i...", "...", ".i...i..i.."), ("iii.", ".", "", "i."), ("...",)]
)
def test_the_masks_show_the_images_of_their_document(documents):
    example = functions("custom_mask")
    total, row, before = "".join(documents).count("i"), 0, 0
    last, two = example.last_image(documents).dense(1), example.last_two_images(documents).dense(1)
    assert last.shape == two.shape == (1, 1, len("".join(documents)), total)
    for document in documents:
        places = [at for at, letter in enumerate(document) if letter == "i"]
        for at in range(len(document)):
            seen = [before + index for index, place in enumerate(places) if place <= at]
            assert last[0, 0, row].nonzero().flatten().tolist() == seen[-1:]
            assert two[0, 0, row].nonzero().flatten().tolist() == seen[-2:]
            row += 1
        before += len(places)


def test_the_cache_of_a_chat_makes_keys_of_each_image_once(monkeypatch):
    example = functions("media_cache_chat")
    model = example.build(64)
    patch(model)
    plain, made = media_cache.Source.project, []
    projections = [block.attn.to_kv for block in model.cross_attn.values()]

    def count(source, media):
        if source.linear in projections:  # the resampler has others
            made.append(media.shape[1])
        return plain(source, media)

    monkeypatch.setattr(media_cache.Source, "project", count)
    without, _ = example.chat(model)
    assert made == [8, 8, 9, 9]
    made.clear()
    cached, _ = example.chat(model, cached=True)
    assert made == [8, 8, 1, 1]
    torch.testing.assert_close(cached, without, rtol=1e-4, atol=1e-5)
    names, images_of = example.build.__globals__, example.images_of
    for turn in (0, 3):  # the images of each count
        kept = [1, 1, 1, 1]
        kept[turn] = 0
        monkeypatch.setitem(
            names, "images_of", lambda model, now, kept=kept: images_of(model, now) * kept[now]
        )
        blind, _ = example.chat(model, cached=True)
        assert (blind - cached)[-example.ANSWER :].norm() > 1e-3 * cached.norm()


def test_the_saved_weights_are_integers(tmp_path):
    example = functions("quantize")
    example.main(tmp_path, width=128)
    tensors = load_file(tmp_path / "flamingo.safetensors")
    assert sum(each.dtype == torch.int8 for each in tensors.values()) > 40


@pytest.mark.slow  # it trains
def test_what_was_learnt_is_in_the_checkpoint(tmp_path):
    from PIL import Image

    example = functions("train_on_pairs")
    example.main(tmp_path, steps=200)
    assert (tmp_path / "pairs/0.txt").read_text() in example.COLOURS
    torch.manual_seed(0)  # the frozen parts of the example
    model = Flamingo(FlamingoConfig.preset("tiny", image_size=example.SIZE)).freeze().eval()
    load_weights(dict(model.named_parameters()), tmp_path / "run/checkpoints/latest/weights.safetensors")
    images = [Image.new("RGB", (example.SIZE, example.SIZE), "white") for _ in example.COLOURS]
    for image, colour in zip(images, example.COLOURS, strict=True):
        image.paste(colour, (9, 7, 25, 23))
    answers = complete(
        model, Processor(image_size=example.SIZE), [[image] for image in images], max_new_tokens=8
    )
    assert sum(answer == colour for answer, colour in zip(answers, example.COLOURS, strict=True)) >= 5
