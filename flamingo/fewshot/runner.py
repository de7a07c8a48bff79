"""A model over a dataset: one JSON line a sample, written as it goes, so that a killed run goes on."""

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flamingo.fewshot import metrics
from flamingo.fewshot.prompts import CAPTION, QUESTION, Sample, Template, trim
from flamingo.fewshot.rices import image_embeddings, nearest
from flamingo.fewshot.scoring import batches, identity
from flamingo.generation import complete
from flamingo.json_lines import parse_line
from flamingo.processor import Processor

Records = Sequence[dict[str, Any]]
_OURS = {"task", "max_new_tokens", "num_beams", "shots", "select", "seed", "samples"}  # of a first line
_LONGEST = 2**20  # bytes of a first line
ZERO_SHOT = 2  # shots without their images; one harms, more help little (appendix B.1.4)


@dataclass(frozen=True)
class Task:
    """How a task is asked, and how answers are measured.

    ::

        open-ended     {"id": 9, "prediction": "two", "references": ["2", ...], "details": {}, "shots": [4]}
        closed-ended   ... and "scores": [-3.1, -0.4, ...], the log-likelihood of each of the candidates, of
                       which the prediction is the likeliest
    """

    name: str
    template: Template
    metric: str  # its name
    score: Callable[[Records], float | None]  # of such records; None where no answers are known
    max_new_tokens: int = 10  # the paper names no limit
    closed: bool = False  # whether a sample's candidates are ranked, instead of an answer generated


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
        output: a file of JSON lines, made or gone on with. Any other file is left as it is.
        shots: number of shots; 0 is the paper's zero-shot prompt, two shots without their images.
        select: "random", or "rices" for those that look most like the query.
        seed: of the random choice.
        batch_size: queries answered at once.
        num_beams: width of the beam search; 3 in the paper, 1 for greedy answers.
        settings: anything else that two runs must share to be one, as the model's name.

    Raises:
        ValueError: without queries, if two queries have one name, the support has too few samples, or the
            output is of a run with other settings, or no output of a run at all.

    Determinism: as `generate` is; a run that goes on has the batches of one that was not killed.

    Limits: RICES encodes the support anew when a run goes on.

    Source: arXiv 2204.14198, appendix B.1.4.
    """
    plan = prepare(
        task,
        queries,
        support,
        output,
        shots=shots,
        select=select,
        seed=seed,
        num_beams=num_beams,
        settings=settings,
    )
    records, choose = plan.records, None
    with output.open("ab") as file:
        file.truncate(plan.whole)
        if not plan.whole:
            file.write(plan.header)
        for batch in batches(queries, batch_size):
            batch = [query for query in batch if query.id not in records]
            if not batch:
                continue
            choose = choose or _chooser(model, processor, support, shots or ZERO_SHOT, select, seed)
            chosen = choose(batch)
            new = _answer(model, processor, task, batch, chosen, num_beams, text_only=shots == 0)
            # One write: a kill leaves a batch whole or not at all.
            file.write("".join(json.dumps(record) + "\n" for record in new).encode())
            file.flush()
            os.fsync(file.fileno())
            records |= {record["id"]: record for record in new}
            print(f"{task.name}: {len(records)} of {len(queries)}", file=sys.stderr, flush=True)
    value = task.score([records[query.id] for query in queries])
    return Evaluation(task.name, task.metric, value, len(queries), shots)


class Plan(NamedTuple):
    """What a run finds in its output, which is left as it is."""

    header: bytes  # the first line of the output
    whole: int  # bytes of whole lines in the output
    records: dict[Any, dict[str, Any]]  # by their ids


def prepare(
    task: Task,
    queries: Sequence[Sample],
    support: Sequence[Sample],
    output: Path,
    *,
    shots: int,
    select: str,
    seed: int,
    num_beams: int,
    settings: dict[str, Any] | None,
) -> Plan:
    """All that `evaluate` does before it needs a model; arguments and errors are its own."""
    _check(queries, support, shots or ZERO_SHOT, select)
    own = {
        "task": task.name,
        "max_new_tokens": task.max_new_tokens,
        "num_beams": num_beams,
        "shots": shots,
        "select": select,
        "seed": seed,
        "samples": len(queries),
    }
    return _read(output, own | (settings or {}))


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


def _read(output: Path, header: dict[str, Any]) -> Plan:
    """What is in the output, if it is new, empty or of a run with this header."""
    first = (json.dumps(header) + "\n").encode()
    if not output.exists():
        if not output.parent.is_dir():
            raise ValueError(f"evaluate: expected the folder of {output}, got none. Make it first.")
        return Plan(first, 0, {})
    if not output.is_file():
        raise ValueError(
            f"evaluate: expected {output} to be a file, got something else. Name another output."
        )
    with output.open("rb") as file:
        found = file.readline(_LONGEST)
        if first.startswith(found) and found != first:  # it is empty, or a kill has cut its first line short
            return Plan(first, 0, {})
        _check_header(output, found, header)
        lines = file.readlines()
    if lines and not lines[-1].endswith(b"\n"):
        del lines[-1]
    records = [_record(output, number, line) for number, line in enumerate(lines, start=2)]
    whole = len(found) + sum(map(len, lines))
    return Plan(first, whole, {record["id"]: record for record in records})


def _check_header(output: Path, line: bytes, header: dict[str, Any]) -> None:
    found = parse_line(line)
    if not isinstance(found, dict) or not found.keys() >= _OURS:
        raise ValueError(
            f"evaluate: expected {output} to be new, empty or the results of an evaluation, got a file of "
            "something else, which is left as it is. Name another output."
        )
    if found != header:
        raise ValueError(
            f"evaluate: expected {output} to be of a run with {header}, got one with {found}. Name another "
            "output."
        )


def _record(output: Path, number: int, line: bytes) -> dict[str, Any]:
    """A line of the output that is a sample."""
    record = parse_line(line)
    kinds = {"id": str | int, "prediction": str, "references": list, "shots": list}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(key), kind) for key, kind in kinds.items()
    ):
        raise ValueError(
            f"evaluate: expected line {number} of {output} to be an answer, got {line[:40]!r}. Remove it, or "
            "name another output."
        )
    return record
