"""A model over a dataset: one JSON line a sample, written as it goes, so that a killed run goes on."""

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flamingo.fewshot import metrics
from flamingo.fewshot.prompts import CAPTION, QUESTION, Sample, Template, trim
from flamingo.fewshot.rices import image_embeddings, nearest
from flamingo.fewshot.scoring import batches, identity
from flamingo.generation import complete
from flamingo.processor import Processor

Records = Sequence[dict[str, Any]]
ZERO_SHOT = 2  # shots without their images; one harms, more help little (appendix B.1.4)


@dataclass(frozen=True)
class Task:
    """An open-ended task: how it is asked, and how answers are measured."""

    name: str
    template: Template
    metric: str  # its name
    score: Callable[[Records], float]  # of records with a prediction and references
    max_new_tokens: int  # the paper names no limit


def _vqa_score(records: Records) -> float:
    scores = [metrics.vqa_accuracy(record["prediction"], record["references"]) for record in records]
    return 100 * sum(scores) / len(scores)


def _caption_score(records: Records) -> float:
    predictions = [record["prediction"] for record in records]
    return 100 * metrics.cider(predictions, [record["references"] for record in records])[0]


VQA = Task("vqa", QUESTION, "VQA accuracy", _vqa_score, max_new_tokens=10)
CAPTIONS = Task("captions", CAPTION, "CIDEr", _caption_score, max_new_tokens=32)


@dataclass(frozen=True)
class Evaluation:
    """What a run found."""

    task: str
    metric: str
    value: float
    samples: int
    shots: int

    def __str__(self) -> str:
        return f"{self.task}: {self.metric} {self.value:.2f} ({self.samples} samples, {self.shots} shots)"


def evaluate(
    model: Any,
    processor: Processor,
    task: Task,
    queries: Sequence[Sample],
    support: Sequence[Sample],
    output: Path,
    *,
    shots: int = 4,
    select: str = "random",
    seed: int = 0,
    batch_size: int = 8,
    num_beams: int = 3,
    settings: dict[str, Any] | None = None,
) -> Evaluation:
    """Answers every query after a prompt of shots, and measures the answers.

    The first line of the output says how the run was set, each further one is a sample. What is in the output
    already is not computed again; a line that a crash has cut short is. Shots depend on the seed and the name
    of the query alone, so a run that was killed ends as one that was not.

    Args:
        model: a Flamingo in eval mode, or anything with its `generate`.
        processor: of the model.
        task: `VQA` or `CAPTIONS`, or one of your own.
        queries: with names that differ.
        support: where the shots come from; those of the query's own image are left out.
        output: a file of JSON lines, made or gone on with.
        shots: number of shots; 0 is the paper's zero-shot prompt, two shots without their images.
        select: "random", or "rices" for those that look most like the query.
        seed: of the random choice.
        batch_size: queries answered at once.
        num_beams: width of the beam search; 3 in the paper, 1 for greedy answers.
        settings: anything else that two runs must share to be one, as the model's name.

    Raises:
        ValueError: without queries, if two queries have one name, the support has too few samples, or the
            output is of a run with other settings.

    Determinism: as `generate` is; a run that goes on has the batches of one that was not killed.

    Limits: RICES encodes the support anew when a run goes on.

    Source: arXiv 2204.14198, appendix B.1.4.
    """
    few = shots or ZERO_SHOT
    _check(queries, support, few, select)
    own = {
        "task": task.name,
        "max_new_tokens": task.max_new_tokens,
        "num_beams": num_beams,
        "shots": shots,
        "select": select,
        "seed": seed,
        "samples": len(queries),
    }
    records = _resume(output, own | (settings or {}))
    choose = None
    with output.open("a", encoding="utf-8") as file:
        for batch in batches(queries, batch_size):
            batch = [query for query in batch if query.id not in records]
            if not batch:
                continue
            choose = choose or _chooser(model, processor, support, few, select, seed)
            chosen = choose(batch)
            new = _answer(model, processor, task, batch, chosen, num_beams, text_only=shots == 0)
            # One write: a kill leaves a batch whole or not at all.
            file.write("".join(json.dumps(record) + "\n" for record in new))
            file.flush()
            os.fsync(file.fileno())
            records |= {record["id"]: record for record in new}
            print(f"{task.name}: {len(records)} of {len(queries)}", file=sys.stderr, flush=True)
    value = task.score([records[query.id] for query in queries])
    return Evaluation(task.name, task.metric, value, len(queries), shots)


def _check(queries: Sequence[Sample], support: Sequence[Sample], shots: int, select: str) -> None:
    if select not in ("random", "rices"):
        raise ValueError(f"evaluate: expected select 'random' or 'rices', got {select!r}.")
    if not queries or len({query.id for query in queries}) != len(queries):
        raise ValueError(
            f"evaluate: expected one query or more, each with its own id, got {len(queries)} with "
            f"{len({query.id for query in queries})} ids."
        )
    about = Counter(identity(sample.image) for sample in support)
    for query in queries:
        if (others := len(support) - about[identity(query.image)]) < shots:
            raise ValueError(
                f"evaluate: expected {shots} samples or more in the support that are not about the image of "
                f"query {query.id}, got {others}."
            )


def _others(query: Sample, support: Sequence[Sample]) -> list[int]:
    """Which of the support are not about the query's own image."""
    own = identity(query.image)
    return [place for place, sample in enumerate(support) if identity(sample.image) != own]


Choose = Callable[[Sequence[Sample]], list[list[Sample]]]


def _chooser(
    model: Any, processor: Processor, support: Sequence[Sample], shots: int, select: str, seed: int
) -> Choose:
    """What gives each of some queries its shots."""

    def at_random(queries: Sequence[Sample]) -> list[list[Sample]]:
        # The name in the seed: a query has the same shots in whatever order queries come.
        draws = [random.Random(f"{seed}/{query.id}") for query in queries]
        return [
            [support[place] for place in draw.sample(_others(query, support), shots)]
            for query, draw in zip(queries, draws, strict=True)
        ]

    if select == "random":
        return at_random
    keys = image_embeddings(model.vision, processor, [sample.image for sample in support])

    def alike(queries: Sequence[Sample]) -> list[list[Sample]]:
        embeddings = image_embeddings(model.vision, processor, [query.image for query in queries])
        chosen = []
        for query, embedding in zip(queries, embeddings, strict=True):
            others = _others(query, support)
            places = nearest(embedding, keys[others], shots).tolist()
            chosen.append([support[others[place]] for place in places])
        return chosen

    return alike


def _answer(
    model: Any,
    processor: Processor,
    task: Task,
    queries: Sequence[Sample],
    chosen: Sequence[Sequence[Sample]],
    num_beams: int,
    *,
    text_only: bool,
) -> list[dict[str, Any]]:
    """Queries and their shots to records."""
    pairs = list(zip(queries, chosen, strict=True))
    prompts = [task.template.prompt(query, shots, text_only=text_only) for query, shots in pairs]
    answers = complete(model, processor, prompts, max_new_tokens=task.max_new_tokens, num_beams=num_beams)
    return [
        {
            "id": query.id,
            "prediction": trim(answer),
            "references": list(query.references),
            "shots": [shot.id for shot in shots],
        }
        for (query, shots), answer in zip(pairs, answers, strict=True)
    ]


def _resume(output: Path, header: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """The records in the output by their ids; a new output gets its first line."""
    data = output.read_bytes() if output.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if not whole:
        output.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return {}
    found, *records = [json.loads(line) for line in whole.splitlines()]
    if found != header:
        raise ValueError(
            f"evaluate: expected {output} to be of a run with {header}, got one with {found}. Name another "
            "output."
        )
    if len(whole) < len(data):
        os.truncate(output, len(whole))
    return {record["id"]: record for record in records}
