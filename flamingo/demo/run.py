"""The whole demo, and what it finds."""

import copy
import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flamingo.demo import stages
from flamingo.demo.digits import CANDIDATES, TEMPLATES, Digits, Kind, episode, load_digits
from flamingo.demo.saved import save_model
from flamingo.fewshot import log_likelihoods
from flamingo.kernels import use_kernels
from flamingo.model import Flamingo

SHOTS = (0, 1, 2, 4, 8)
EPISODES = 200
TITLES: dict[Kind, str] = {
    "captions": "called by their names",
    "questions": "odd, even, small or large",
    "codes": "called by names of the document",
}


@dataclass
class Findings:
    """What one run of the demo found.

    Attributes:
        zero_shot: accuracy of the vision encoder alone, by contrast, on digits it has not seen.
        recall: how often the language model knows a number that was said before.
        knowledge: how often it knows whether something is true of a number.
        accuracy: by kind of document and number of shots, on digits never seen.
        difference: the largest relative one between the losses of the first steps, patched and not; None
            where nothing was patched.
        seconds: what each stage took.
    """

    zero_shot: float = 0.0
    recall: float = 0.0
    knowledge: float = 0.0
    accuracy: dict[Kind, dict[int, float]] = field(default_factory=dict)
    difference: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def main(
    picture: str | Path = "digits.png",
    model: str | Path = "digits.safetensors",
    *,
    kernels: bool = True,
    quick: bool = False,
) -> int:
    """Run the demo, print what it finds, draw it and save the model.

    Args:
        picture, model: files to write; see `load_model`.
        kernels: train with the kernels, where they are installed.
        quick: a few steps of each stage, to see that it runs.

    Returns:
        0, or 1 if it has not learnt what it should.

    Raises:
        ImportError: without scikit-learn or safetensors.
    """
    importlib.import_module("safetensors.torch")  # what would fail at the end fails before the work
    found, trained = run(kernels=kernels, quick=quick)
    save_model(trained, model)
    print(f"saved: {model}")
    if _draw(found, Path(picture)):
        print(f"drawn: {picture}")
    return 0 if quick or _has_learnt(found) else 1


def run(*, kernels: bool = True, quick: bool = False) -> tuple[Findings, Flamingo]:
    """All stages, see `flamingo.demo`, and the model."""
    torch.manual_seed(0)
    found = Findings()
    digits, held_out = load_digits()
    print(f"{len(digits.labels)} real digits to learn from, {len(held_out.labels)} others to be asked about")
    with _stage("vision encoder by contrast", found):
        vision, found.zero_shot = stages.pretrain_vision(digits, held_out, steps=5 if quick else 400)
    print(f"  names digits it has not seen: {found.zero_shot:.1%}")
    with _stage("language model on text", found):
        language = stages.pretrain_language(steps=5 if quick else 1200, report=_progress(200))
    found.recall = stages.recall(language)
    found.knowledge = stages.knowledge(language)
    print(f"  knows what a text has said before: {found.recall:.1%}, and facts: {found.knowledge:.1%}")

    model = Flamingo(stages.CONFIG, vision=vision, language=language).freeze()
    plain = copy.deepcopy(model)
    if use_kernels(model, kernels, print):
        found.difference = _difference(plain, model, digits, steps=2 if quick else 10)
        print(f"  the first losses differ by at most {found.difference:.1e} from those without")
    with _stage("resampler and gated blocks on documents", found):
        batches = stages.documents(digits, stages.make_processor())
        stages.train(model, batches, steps=2 if quick else 1000, report=_progress(50))
    with _stage("questions about digits never seen", found):
        shots, episodes = ((0, 1), 4) if quick else (SHOTS, EPISODES)
        found.accuracy = {
            kind: {count: accuracy(kind, model, held_out, count, episodes) for count in shots}
            for kind in TEMPLATES
        }
    print(_table(found))
    return found, model


def accuracy(
    kind: Kind, model: Flamingo, digits: Digits, shots: int, episodes: int, *, seed: int = 1
) -> float:
    """How often the likeliest of the answers is the right one, with the shots before the question."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [episode(kind, digits, shots, generator) for _ in range(episodes)]
    documents = [TEMPLATES[kind].prompt(query, before) for query, before in drawn]
    candidates = CANDIDATES[kind]
    model.eval()
    scores = log_likelihoods(
        model, stages.make_processor(), documents, candidates, closed=False, batch_size=100
    )
    said = [candidates[best] for best in scores.argmax(dim=1).tolist()]
    return sum(name == query.answer for name, (query, _) in zip(said, drawn, strict=True)) / episodes


def _difference(plain: Flamingo, fused: Flamingo, digits: Digits, *, steps: int) -> float:
    """The same first steps of copies of both models: the largest relative difference of their losses.

    With open gates: at 0 they would hide what the kernels compute.
    """
    losses = []
    for model in (plain, fused):
        trained = copy.deepcopy(model)
        for name, parameter in trained.named_parameters():
            if name.endswith("_gate"):
                parameter.data.fill_(0.5)
        batches = stages.documents(digits, stages.make_processor(), seed=2, count=8)
        losses.append(stages.train(trained, batches, steps=steps))
    return max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))


def _has_learnt(found: Findings) -> bool:
    """Whether it names nine digits of ten, and eight shots are worth 20 points where names are drawn."""
    codes = found.accuracy["codes"]
    return found.accuracy["captions"][0] >= 0.9 and codes[8] - codes[0] >= 0.2


@contextmanager
def _stage(name: str, found: Findings) -> Iterator[None]:
    print(f"{name} ...", flush=True)
    began = time.perf_counter()
    yield
    found.seconds[name] = time.perf_counter() - began
    print(f"  {found.seconds[name]:.0f} s", flush=True)


def _progress(every: int) -> stages.Report:
    def report(step: int, loss: float) -> None:
        if (step + 1) % every == 0:
            print(f"  step {step + 1}: loss {loss:.3f}", flush=True)

    return report


def _table(found: Findings) -> str:
    shots = found.accuracy["captions"]
    lines = [
        "",
        "accuracy by the number of shots",
        f"{'shots':<34}" + "".join(f"{each:>8}" for each in shots),
    ]
    for kind, title in TITLES.items():
        values = "".join(f"{value:>8.1%}" for value in found.accuracy[kind].values())
        lines.append(f"{title:<34}{values}")
    lines.append(f"in all {sum(found.seconds.values()):.0f} s")
    return "\n".join(lines)


def _draw(found: Findings, path: Path) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, title in TITLES.items():
        results = found.accuracy[kind]
        axes.plot(list(results), [100 * value for value in results.values()], marker="o", label=title)
    axes.axhline(10, color="0.6", linewidth=0.8, linestyle="--", label="chance among ten")
    axes.set(
        xlabel="shots",
        ylabel="accuracy on digits never seen, %",
        ylim=(0, 100),
        xticks=list(found.accuracy["codes"]),
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return True
