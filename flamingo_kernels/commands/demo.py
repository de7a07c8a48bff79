"""Photographs and text through a Flamingo, plain and patched: compared, timed and drawn.

The model has the block shapes of OpenFlamingo-3B (width 2048, 8 heads of 64, 64 latents, vision width 1024),
two language model layers instead of 24, and random weights with gates well off 0. Everything shown is
measured in the run that shows it:

- results: logits, loss and every gradient of both against float64, see `testing.prove`;
- times: medians of runs in turn, see `measure.timing`; also those of one attention core of each kind, on the
  q, k and v that this model gave it;
- peak memory: how far the resident memory of this process rises in a run, see `measure.memory`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flamingo
from flamingo import modules

from .. import PatchReport, patch
from ..testing import Expected, Proof, expect, open_gates, prove
from .info import backend_in_use, conditions_on
from .measure.figure import expect_picture
from .measure.memory import peak_growth
from .measure.text import dtype_name, duration, factor, mebibytes, rounded, setting, verdict
from .measure.timing import interleave

# Photographs that scikit-image brings inside its wheel, and what is said about them.
PHOTOGRAPHS = {
    "astronaut.png": "An astronaut smiles in front of a flag.",
    "chelsea.png": "A tabby cat looks up at something.",
    "coffee.png": "A cup of coffee stands on a wooden table.",
    "rocket.jpg": "A rocket waits on its pad before dawn.",
    "motorcycle_left.png": "A red motorcycle is parked in a garage.",
}
OPENING = "Five photographs and what they show:"
TITLE = "A Flamingo with the reference's modules, and the same one patched"
GIVEN = "What it reads: five photographs and their texts. Nothing of this is its answer."

FORWARD, STEP = MODES = ("forward", "forward + backward")
OPERATORS = ("masked_cross_attention", "perceiver_attention", "gated_residual")  # that the model calls
BUSY = 1.5  # a spread of times; an idle machine stays below


class Pair(NamedTuple):
    """One quantity of the reference and of the patched model: milliseconds, or bytes."""

    reference: float
    patched: float
    spread: float = 1.0  # of single measurements: 80th over 20th percentile

    @property
    def ratio(self) -> float:
        return self.reference / self.patched


@dataclass(frozen=True)
class Findings:
    """What one run of the demo found."""

    images: list[Any]
    tokens: int
    parameters: int
    dtype: str
    conditions: dict[str, Any]  # see `conditions_on`
    report: PatchReport
    proofs: dict[str, Proof]
    memory: dict[str, Pair]  # bytes by mode; empty where it cannot be measured
    times: dict[tuple[str, str], Pair]  # ms by (what, mode)
    share: float  # of all attention cores in a step of the reference

    @property
    def spread(self) -> float:
        return max(pair.spread for pair in self.times.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--picture", metavar="FILE", default="demo.png", help="default: demo.png")


def main(options: argparse.Namespace) -> int:
    """The command `demo`: run it, print the findings and save their picture; 1 if the results differ."""
    images = load_photographs()
    expect_picture(options.picture)
    found = run(images)
    print(render(found))
    picture(found, options.picture)
    print(f"\npicture: {options.picture}")
    return int(not all(proof.passed for proof in found.proofs.values()))


def load_photographs() -> list[Any]:
    """PIL images from the folder of the installed scikit-image; nothing is downloaded."""
    import skimage.data
    from PIL import Image

    folder = Path(skimage.data.__file__).parent
    return [Image.open(folder / name, formats=("PNG", "JPEG")).convert("RGB") for name in PHOTOGRAPHS]


def run(images: list[Any], *, rounds: int = 5, **changes: Any) -> Findings:
    """Compare the reference with the patched model, weigh and time both.

    Args:
        images: what `load_photographs` gives.
        rounds: how often to time the whole model in one mode.
        changes: fields of the FlamingoConfig to replace.
    """
    torch.manual_seed(0)
    _say("building the model")
    model = build(**changes)
    batch = flamingo.Processor(image_size=model.config.image_size)([_document(images)])
    proofs, memory = compare(model, batch)
    times, share = time(model, batch, rounds)
    with patch(model) as report:
        parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens, dtype = batch.input_ids.shape[1], dtype_name(next(model.parameters()).dtype)
    conditions = conditions_on("cpu")
    return Findings(images, tokens, parameters, dtype, conditions, report, proofs, memory, times, share)


def build(**changes: Any) -> flamingo.Flamingo:
    """The model, its vision encoder and language model frozen as in training."""
    sizes = {"vision_layers": 1, "resampler_depth": 2, "language_layers": 2}
    tokens = {"vocab_size": 261, "media_token_id": 256}  # of ByteTokenizer
    config = flamingo.FlamingoConfig.preset("openflamingo-3b", **sizes | tokens | changes)
    return open_gates(flamingo.Flamingo(config)).freeze()


def _document(images: list[Any]) -> list[Any]:
    """Text that comes before any photograph, then every photograph and its text."""
    pairs = zip(images, PHOTOGRAPHS.values(), strict=True)
    return [OPENING, *(part for pair in pairs for part in pair)]


Results = dict[str, tuple[Tensor, ...]]
Shown = Callable[[float], str]


class Runner:
    """The model on the batch, as it is, or patched for as long as a call takes."""

    def __init__(self, model: flamingo.Flamingo, batch: flamingo.Batch, *, patched: bool) -> None:
        self.model, self.batch, self.patched = model, batch, patched
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def __getitem__(self, mode: str) -> Callable[[], Results]:
        return self._forward if mode == FORWARD else self._step

    @torch.no_grad()
    def _forward(self) -> Results:
        with self._as_wanted():
            return {"logits and loss": self._outputs()}

    def _step(self) -> Results:
        with self._as_wanted():
            logits, loss = self._outputs()
            gradients = torch.autograd.grad(loss, self.trained)
        return {"logits and loss": (logits.detach(), loss.detach()), "gradients": gradients}

    def _as_wanted(self) -> contextlib.AbstractContextManager[object]:
        return patch(self.model) if self.patched else contextlib.nullcontext()

    def _outputs(self) -> tuple[Tensor, Tensor]:
        ids, pixels = self.batch.input_ids, self.batch.pixels.to(self.trained[0].dtype)
        logits, loss = self.model(ids, pixels, labels=ids)
        return logits, loss


def compare(model: flamingo.Flamingo, batch: flamingo.Batch) -> tuple[dict[str, Proof], dict[str, Pair]]:
    """Hold both against float64; the runs also give the memory they take at their peak."""
    _say("computing the exact results in float64")
    model.double()
    exact = Runner(model, batch, patched=False)[STEP]()
    model.float()  # loses nothing: the numbers were float32 before

    _say("comparing, and measuring memory")
    runners = [Runner(model, batch, patched=patched) for patched in (False, True)]
    forward = [_weigh(runner[FORWARD])[1] for runner in runners]
    (_, eager_bytes), (ours, our_bytes) = (_weigh(runner[STEP]) for runner in runners)
    proofs = {
        f"{what} ({len(expected.exact)} tensors)": prove(ours[what], expected)
        for what, expected in _expected(runners[0][STEP], exact).items()
    }
    peaks = {FORWARD: Pair(*forward), STEP: Pair(eager_bytes, our_bytes)}
    return proofs, {mode: pair for mode, pair in peaks.items() if all(pair)}


def _expected(run: Callable[[], Results], exact: Results) -> dict[str, Expected]:
    """What is expected of each kind of result; one run serves all."""
    every = expect(lambda: [each for tensors in run().values() for each in tensors], sum(exact.values(), ()))
    found, begin = {}, 0
    for what, tensors in exact.items():
        end = begin + len(tensors)
        found[what], begin = every.part(begin, end), end
    return found


def _weigh(call: Callable[[], Results]) -> tuple[Results, int]:
    """What a call returns, and the bytes it takes at its peak; 0 where that cannot be measured."""
    kept: list[Results] = []
    growth = peak_growth(lambda: kept.append(call()))
    return (kept or [call()])[0], growth or 0


def time(
    model: flamingo.Flamingo, batch: flamingo.Batch, rounds: int
) -> tuple[dict[tuple[str, str], Pair], float]:
    """Times of the whole model and of one core of each kind, and the share of all cores in a step."""
    reference, patched = (Runner(model, batch, patched=patched) for patched in (False, True))
    times: dict[tuple[str, str], Pair] = {}
    for mode in MODES:
        _say(f"timing the model, {mode}")
        times["whole model", mode] = _race(reference[mode], patched[mode], rounds)
    spent = 0.0
    for what, core in cores(model, batch).items():
        _say(f"timing {what}")
        for mode in MODES:
            times[what, mode] = _race(*core.calls(mode), 10 * rounds)
        spent += core.copies * times[what, STEP].reference
    return times, spent / times["whole model", STEP].reference


def _race(reference: Callable[[], object], patched: Callable[[], object], rounds: int) -> Pair:
    taken = interleave({"reference": reference, "patched": patched}, seconds=0, least_rounds=rounds)
    spread = max(each.p80 / each.p20 for each in taken.values())
    return Pair(taken["reference"].median, taken["patched"].median, spread)


class Core(NamedTuple):
    """An attention module of the model, a patched copy, and what the model gave to its `attend`."""

    reference: Any
    patched: Any
    arguments: tuple[Any, ...]
    copies: int  # modules of this kind in the model

    def calls(self, mode: str) -> tuple[Callable[[], object], Callable[[], object]]:
        tensors = [each for each in self.arguments if torch.is_tensor(each) and each.requires_grad]
        dout = torch.randn_like(tensors[0])  # like q

        def forward(module: Any) -> object:
            with torch.no_grad():
                return module.attend(*self.arguments)

        def step(module: Any) -> object:
            return torch.autograd.grad(module.attend(*self.arguments), tensors, dout)

        call = forward if mode == FORWARD else step
        return partial(call, self.reference), partial(call, self.patched)


def cores(model: flamingo.Flamingo, batch: flamingo.Batch) -> dict[str, Core]:
    """The cores of the first cross-attention block and of the first resampler layer."""
    found = {}
    for name, kind in (
        ("a cross-attention core", modules.MaskedCrossAttention),
        ("a resampler core", modules.PerceiverAttention),
    ):
        alike = [module for module in model.modules() if type(module) is kind]
        patched = copy.deepcopy(alike[0])
        patch(patched)
        arguments = _arguments_of_attend(alike[0], lambda: model(batch.input_ids, batch.pixels))
        found[name] = Core(alike[0], patched, arguments, len(alike))
    return found


@torch.no_grad()
def _arguments_of_attend(module: Any, run_model: Callable[[], object]) -> tuple[Any, ...]:
    """What `module.attend` is given, its floating tensors ready to be differentiated."""
    seen: list[Any] = []

    def record(*arguments: Any) -> Tensor:
        seen.extend(arguments)
        return type(module).attend(module, *arguments)

    module.attend = record
    try:
        run_model()
    finally:
        del module.attend
    for each in seen:
        if torch.is_tensor(each) and each.is_floating_point():
            each.requires_grad_()
    return tuple(seen)


def render(found: Findings) -> str:
    """The findings as a page of text."""
    lines = [
        f"{len(found.images)} photographs in one document of {found.tokens} tokens",
        *_setting(found),
        "",
        str(found.report),
        "",
        _line("worst relative error against float64", "patched", "allowed"),
    ]
    lines += [_line(f"  {what}", *verdict(proof)) for what, proof in found.proofs.items()]
    lines += ["", _line("median time", "reference", "patched")]
    lines += [_pair_line(f"  {what}, {mode}", pair, duration) for (what, mode), pair in found.times.items()]
    if found.memory:
        lines += ["", _line("peak memory above the parameters", "reference", "patched")]
        lines += [_pair_line(f"  {mode}", pair, mebibytes) for mode, pair in found.memory.items()]
    lines += ["", _share(found)]
    if found.spread > BUSY:
        lines.append(
            f"Something else kept this machine busy: single times varied by {found.spread:.1f}x. "
            "Run the demo again when it is idle."
        )
    return "\n".join(lines)


def _setting(found: Findings) -> list[str]:
    """The model, and what it ran on."""
    backends = ", ".join(sorted({backend_in_use(name) for name in OPERATORS}))
    return [
        f"A Flamingo of {rounded(found.parameters / 1e6)} M parameters in {found.dtype}, "
        "with random weights and open gates",
        f"{setting(found.conditions)}, backend {backends}",
    ]


def _line(name: str, first: str, second: str, third: str = "") -> str:
    return f"{name:<46}{first:>12}{second:>12}{third:>9}".rstrip()


def _pair_line(name: str, pair: Pair, shown: Shown) -> str:
    return _line(name, shown(pair.reference), shown(pair.patched), factor(pair.ratio))


def _share(found: Findings) -> str:
    return (
        f"All attention cores together are {100 * found.share:.1f}% of the reference's {STEP}: "
        "no swap of attention alone can save more."
    )


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def picture(found: Findings, path: str | Path) -> None:
    """Draw the photographs with their texts, and what was measured as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained", facecolor="white")
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.08, h_pad=0.06)
    panels: Any = figure.subfigures(3, 1, height_ratios=(0.24, 1, 1.2))
    head, top, bottom = panels
    head.text(0.01, 0.85, TITLE, fontsize=14, weight="bold", va="top")
    head.text(0.01, 0.45, "\n".join(_setting(found)), fontsize=10, color="#333333", va="top")
    top.suptitle(GIVEN, fontsize=11, x=0.01, ha="left", weight="bold")
    for axes, image, text in zip(
        top.subplots(1, len(found.images)), found.images, PHOTOGRAPHS.values(), strict=True
    ):
        axes.imshow(_square(image))
        axes.set_axis_off()
        axes.set_title("\n".join(textwrap.wrap(text, 26)), y=-0.04, va="top", fontsize=9.5)

    places = bottom.subplot_mosaic(
        [["times", "memory"], ["times", "errors"]], width_ratios=(1.5, 1), height_ratios=(1.2, 1)
    )
    named = {f"{what}\n{mode}": pair for (what, mode), pair in found.times.items()}
    _draw_bars(places["times"], "median time", named, duration)
    _draw_bars(places["memory"], "peak memory above the parameters", found.memory, mebibytes)
    _draw_errors(places["errors"], found.proofs)
    places["times"].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)
    figure.supxlabel(_share(found), fontsize=9, color="#555555")
    figure.savefig(path, dpi=130)


def _square(image: Any) -> Any:
    """The middle of an image, as wide as it is high."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((360, 360))


def _draw_errors(axes: Any, proofs: dict[str, Proof]) -> None:
    """The page's lines about the results."""
    shown = [(what, *verdict(proof)) for what, proof in proofs.items()]
    lines = [f"{what}: {err}, allowed {allowed}: {same}" for what, err, allowed, same in shown]
    axes.set_title("patched: worst relative error against float64", loc="left", fontsize=11, weight="bold")
    axes.text(0, 0.9, "\n".join(lines), va="top", fontsize=9, linespacing=1.6, color="#333333")
    axes.set_axis_off()


def _draw_bars(axes: Any, title: str, pairs: dict[str, Pair], shown: Shown) -> None:
    """Every pair on its own scale: the reference is as long as the axis."""
    places = range(len(pairs))[::-1]  # barh draws upwards
    for name, offset, colour in (("reference", 0.19, "#bdbdbd"), ("patched", -0.19, "#e4576b")):
        lengths = [getattr(pair, name) / pair.reference for pair in pairs.values()]
        bars = axes.barh([y + offset for y in places], lengths, 0.36, color=colour, label=name)
        labels = [shown(getattr(pair, name)) for pair in pairs.values()]
        if name == "patched":
            gains = [factor(pair.ratio) for pair in pairs.values()]
            labels = [f"{label}   {gain}" for label, gain in zip(labels, gains, strict=True)]
        axes.bar_label(bars, labels, padding=4, fontsize=8.5, color="#333333")
    axes.set_title(title, loc="left", fontsize=11, weight="bold")
    axes.set_yticks(places, pairs, fontsize=9)
    axes.set_xticks([])
    axes.set_xlim(0, 1.35 * max([1, *(pair.patched / pair.reference for pair in pairs.values())]))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
