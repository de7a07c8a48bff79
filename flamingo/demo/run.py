"""All stages of the demo, one after the other."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from flamingo.demo import lessons, stages
from flamingo.demo.digits import CANDIDATES, TEMPLATES, Digits, Kind, episode, load_digits
from flamingo.demo.findings import Findings
from flamingo.fewshot import log_likelihoods
from flamingo.kernels import use_kernels
from flamingo.language import LanguageModel
from flamingo.model import Flamingo

SHOTS = (0, 1, 2, 4, 8)
EPISODES = 200


def run(*, seed: int = 0, kernels: bool = True, quick: bool = False) -> tuple[Findings, Flamingo]:
    """All stages, see `flamingo.demo`, and the model.

    Args:
        seed: of the weights, and of all that is drawn for training. Which digits are held out and what is
            asked of them are always the same.
        kernels: train with the kernels, where they are installed.
        quick: a few steps of each stage, to see that it runs.

    Raises:
        NotLearntError: if the language model does not learn to look up what was said.
    """
    torch.manual_seed(seed)
    found = Findings(seed=seed, threads=torch.get_num_threads())
    digits, held_out = load_digits()
    print(f"{len(digits.labels)} real digits to learn from, {len(held_out.labels)} others to be asked about")
    with _stage("vision encoder by contrast", found):
        vision, found.zero_shot = stages.pretrain_vision(
            digits, held_out, steps=5 if quick else 1600, seed=seed
        )
    print(f"  names digits it has not seen: {found.zero_shot:.1%}")
    with _stage("language model on text", found):
        language = _read(found, quick)

    model = Flamingo(stages.CONFIG, vision=vision, language=language).freeze()
    plain = copy.deepcopy(model)
    found.parameters = sum(parameter.numel() for parameter in model.parameters())
    if _use_kernels(model, kernels, found):
        found.difference = _difference(plain, model, digits, steps=2 if quick else 10)
        print(f"  the first losses differ by at most {found.difference:.1e} from those without")
    with _stage("resampler and gated blocks on documents", found):
        batches = stages.documents(digits, stages.make_processor(), seed=seed)
        stages.train(model, batches, steps=2 if quick else 300, report=_loss_every(50))
    with _stage("questions about digits never seen", found):
        shots, episodes = ((0, 1), 4) if quick else (SHOTS, EPISODES)
        found.accuracy = {
            kind: {count: accuracy(kind, model, held_out, count, episodes) for count in shots}
            for kind in TEMPLATES
        }
    print(found.table())
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


def _read(found: Findings, quick: bool) -> LanguageModel:
    """The language model after its lessons; a quick one has had a step of each."""
    taken = [replace(lesson, enough=0.0) if quick else lesson for lesson in lessons.LESSONS]
    model, found.course = lessons.pretrain_language(
        taken, last=2 if quick else 100, seed=found.seed, report=_recall
    )
    found.recall, found.knowledge = found.course.recall[found.course.ends["all"]], lessons.knowledge(model)
    ends = ", ".join(f"{name} {step}" for name, step in found.course.ends.items())
    print(f"  learnt by step: {ends}")
    print(f"  knows what a text has said before: {found.recall:.1%}, and facts: {found.knowledge:.1%}")
    return model


def _use_kernels(model: Flamingo, wanted: bool, found: Findings) -> bool:
    """As `use_kernels`, and keeps what it says."""

    def tell(line: str) -> None:
        found.kernels = line
        print(line)

    return use_kernels(model, wanted, tell)


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


@contextmanager
def _stage(name: str, found: Findings) -> Iterator[None]:
    print(f"{name} ...", flush=True)
    began = time.perf_counter()
    yield
    found.seconds[name] = time.perf_counter() - began
    print(f"  {found.seconds[name]:.0f} s", flush=True)


def _recall(step: int, lesson: str, recall: float) -> None:
    print(f"  step {step}, {lesson}: knows {recall:.1%} of what a list has said before", flush=True)


def _loss_every(steps: int) -> stages.Report:
    def report(step: int, loss: float) -> None:
        if (step + 1) % steps == 0:
            print(f"  step {step + 1}: loss {loss:.3f}", flush=True)

    return report
