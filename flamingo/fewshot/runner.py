"""A model over a dataset: shots chosen, prompts read, answers written down and measured."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flamingo.fewshot.prompts import Sample, Template, trim
from flamingo.fewshot.records import Record, Results
from flamingo.fewshot.scoring import batches, log_likelihoods
from flamingo.fewshot.shots import Shots, check_support
from flamingo.generation import Latents, Prompt, complete, read_prompt
from flamingo.processor import Processor
from flamingo.training.processes import rank, world_size

Records = Sequence[Record]
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


@dataclass(frozen=True)
class Evaluation:
    """What a run found."""

    task: str
    metric: str
    value: float | None  # None where no answers are known
    samples: int
    shots: int
    broken: int = 0  # samples whose image cannot be read; they are not measured

    def __str__(self) -> str:
        value = "not measured, as no answers are known" if self.value is None else f"{self.value:.2f}"
        broken = f", {self.broken} broken" if self.broken else ""
        return f"{self.task}: {self.metric} {value} ({self.samples} samples, {self.shots} shots{broken})"


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
    permutations: int = 1,
    latents: Latents | None = None,
    settings: dict[str, Any] | None = None,
) -> Evaluation:
    """Answers every query after a prompt of shots, and measures the answers.

    The first line of the output says how the run was set, each further one is a sample. What is in the output
    already is not computed again; a line that a crash has cut short is. Shots depend on the seed and the name
    of the query alone, so a run that was killed ends as one that was not. A query whose image cannot be read
    is counted, and a shot's is replaced by the next.

    Every medium is encoded once, whatever prompts it is in. Where all queries have the same shots
    (`select="fixed"`), these are read once too. Several processes (torchrun) share the queries, and each
    encodes what it needs; they must see one file system.

    Args:
        model: a Flamingo in eval mode.
        processor: of the model.
        task: one of `flamingo.fewshot`, or your own.
        queries: with names that differ.
        support: where the shots come from; those of the query's own image are left out.
        output: a file of JSON lines, made or gone on with. Any other file is left as it is.
        shots: number of shots; 0 is the paper's zero-shot prompt, two shots without their images, and no shot
            at all where candidates are ranked.
        select: "random", "fixed" for the same random ones for all queries, or "rices" for those that look
            most like the query.
        seed: of the random choice.
        batch_size: queries answered at once.
        num_beams: width of the beam search; 3 in the paper, 1 for greedy answers.
        permutations: where candidates are ranked, over how many orders of the shots their log-likelihoods are
            averaged; 6 in the paper, 1 for the shots as they were chosen.
        latents: of media that may be encoded already, and where they are kept; by default in memory.
        settings: anything else that two runs must share to be one, as the model's name.

    Raises:
        ValueError: without queries, if two queries have one name, no query's image can be read, the support
            has too few samples, or the output is of a run with other settings, or of no run at all.

    Determinism: as `generate` is; a run that goes on has the batches of one that was not killed.

    Source: arXiv 2204.14198, appendix B.1.4.
    """
    results = prepare(
        task,
        queries,
        support,
        output,
        shots=shots,
        select=select,
        seed=seed,
        num_beams=num_beams,
        permutations=permutations,
        settings=settings,
    )
    latents = Latents(model, processor, batch_size=batch_size) if latents is None else latents
    names = [query.id for query in queries]
    run = _Run(model, processor, task, latents, batch_size, num_beams, permutations, seed, shots == 0)
    choose = partial(
        Shots,
        support,
        queries,
        _shown(task, shots),
        select=select,
        seed=seed,
        latents=latents,
        text_only=shots == 0,
    )
    results.open(names)
    try:
        _answer_all(run, results, queries, choose)
    finally:
        latents.save()
    results.close(names)
    answered = [results.records[name] for name in names if "error" not in results.records[name]]
    if not answered:
        raise ValueError(
            f"evaluate: expected a query whose image can be read, got {len(names)} that cannot "
            f"({results.records[names[0]]['error']})."
        )
    broken = len(queries) - len(answered)
    return Evaluation(task.name, task.metric, task.score(answered), len(queries), shots, broken)


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
    permutations: int = 1,
    settings: dict[str, Any] | None,
) -> Results:
    """All that `evaluate` does before it needs a model; arguments and errors are its own."""
    if not queries or len({query.id for query in queries}) != len(queries):
        raise ValueError(
            f"evaluate: expected one query or more, each with its own id, got {len(queries)} with "
            f"{len({query.id for query in queries})} ids."
        )
    check_support(support, queries, _shown(task, shots), select)
    if permutations < 1:
        raise ValueError(f"evaluate: expected 1 permutation or more, got {permutations}.")
    own = {
        "task": task.name,
        "max_new_tokens": task.max_new_tokens,
        "num_beams": num_beams,
        "shots": shots,
        "select": select,
        "seed": seed,
        "samples": len(queries),
    }
    if task.closed:
        own["permutations"] = permutations
    return Results(output, own | (settings or {}))


def _shown(task: Task, shots: int) -> int:
    """How many samples of the support a prompt shows."""
    return ZERO_SHOT if shots == 0 and not task.closed else shots


def _answer_all(
    run: "_Run", results: Results, queries: Sequence[Sample], choose: Callable[[], Shots]
) -> None:
    """Answers what has no answer yet, a batch at a time; several processes take them in turn."""
    shots = None
    by_length = run.by_length(queries) if results.header["select"] == "fixed" else [queries]
    waiting = [batch for group in by_length for batch in batches(group, run.batch_size)]
    waiting = [[query for query in batch if query.id not in results.records] for batch in waiting]
    waiting = [batch for batch in waiting if batch]
    if not waiting:
        return
    shots = choose()  # all processes at once, as they share the work
    for batch in waiting[rank() :: world_size()]:
        errors = run.latents.broken([query.image for query in batch])
        pairs = zip(batch, errors, strict=True)
        new: list[Record] = [{"id": query.id, "error": error} for query, error in pairs if error is not None]
        for record in new:
            print(f"{run.task.name}: {record['id']}: {record['error']}", file=sys.stderr)
        readable = [query for query, error in zip(batch, errors, strict=True) if error is None]
        if readable:
            new += run.answer(readable, shots)
        results.add(new)
        if rank() == 0:
            done = f"{len(results.records)} of {len(queries)}"
            by_one = "" if world_size() == 1 else f", by process 0 of {world_size()}"
            print(f"{run.task.name}: {done}{by_one}", file=sys.stderr, flush=True)


@dataclass
class _Run:
    """How queries are answered."""

    model: Any
    processor: Processor
    task: Task
    latents: Latents
    batch_size: int
    num_beams: int
    permutations: int
    seed: int
    text_only: bool  # whether the shots are shown without their images
    read: dict[tuple[Any, ...], Prompt] | None = None  # prompts that queries share, by their shots

    def by_length(self, queries: Sequence[Sample]) -> list[list[Sample]]:
        """Queries in groups whose ends of a prompt have one length: these can be read at once."""
        groups: dict[int, list[Sample]] = {}
        for query in queries:
            document = [part for part in self.task.template.asked(query) if isinstance(part, str)]
            length = sum(len(self.processor.encode(text)) for text in document)
            groups.setdefault(length, []).append(query)
        return list(groups.values())

    def answer(self, queries: Sequence[Sample], shots: Shots) -> list[Record]:
        """Queries that can be read to records."""
        chosen = shots.of(queries)
        shared = shots.fixed if shots.select == "fixed" else None
        ask = self._rank if self.task.closed else self._complete
        answers = ask(queries, chosen, shared)
        return [
            {
                "id": query.id,
                **answer,
                "references": list(query.references),
                **({"details": dict(query.details)} if query.details else {}),
                "shots": [shot.id for shot in few],
            }
            for query, few, answer in zip(queries, chosen, answers, strict=True)
        ]

    def _complete(
        self, queries: Sequence[Sample], chosen: Sequence[Sequence[Sample]], shared: Sequence[Sample] | None
    ) -> Iterator[Record]:
        template, after = self.task.template, None
        if shared is not None:
            after = self._prompt(shared)
            documents = [template.asked(query) for query in queries]
        else:
            documents = [
                template.prompt(query, shots, text_only=self.text_only)
                for query, shots in zip(queries, chosen, strict=True)
            ]
        answers = complete(
            self.model,
            self.processor,
            documents,
            after=after,
            latents=self.latents,
            max_new_tokens=self.task.max_new_tokens,
            num_beams=self.num_beams,
        )
        return ({"prediction": trim(answer)} for answer in answers)

    def _rank(
        self, queries: Sequence[Sample], chosen: Sequence[Sequence[Sample]], shared: Sequence[Sample] | None
    ) -> Iterator[Record]:
        for some in _of_one_kind(queries):
            candidates = some[0].candidates
            if shared is not None:
                documents = [self.task.template.asked(query) for query in some]
                orders = [self._prompt(order) for order in self._orders(shared, "shared")]
                scores = torch.stack(
                    [self._log_likelihoods(documents, candidates, after) for after in orders]
                ).mean(dim=0)
            else:
                of_query = {query.id: shots for query, shots in zip(queries, chosen, strict=True)}
                documents = [
                    self.task.template.prompt(query, order)
                    for query in some
                    for order in self._orders(of_query[query.id], str(query.id))
                ]
                every = self._log_likelihoods(documents, candidates)
                scores = every.unflatten(0, (len(some), -1)).mean(dim=1)
            for row in scores.tolist():
                best = max(range(len(row)), key=row.__getitem__)
                yield {"prediction": candidates[best], "scores": row}

    def _log_likelihoods(
        self, documents: Sequence[Any], candidates: Sequence[str], after: Prompt | None = None
    ) -> torch.Tensor:
        return log_likelihoods(
            self.model,
            self.processor,
            documents,
            candidates,
            batch_size=self.batch_size,
            after=after,
            latents=self.latents,
        )

    def _orders(self, shots: Sequence[Sample], name: str) -> list[Sequence[Sample]]:
        """The orders that an ensemble shows the shots in; without one, as they were chosen."""
        if self.permutations == 1:
            return [shots]
        draw = random.Random(f"{self.seed}/{name}/orders")
        return [draw.sample(shots, len(shots)) for _ in range(self.permutations)]

    def _prompt(self, shots: Sequence[Sample]) -> Prompt:
        """What many queries share, read once."""
        self.read = {} if self.read is None else self.read
        key = tuple(map(id, shots))
        if key not in self.read:
            document = self.task.template.shown(shots, text_only=self.text_only)
            self.read[key] = read_prompt(self.model, self.processor, document, latents=self.latents)
            self.read[key].keeps_memory = self.permutations == 1
        return self.read[key]


def _of_one_kind(queries: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    """Runs of queries with the same candidates, which are scored at once."""
    start = 0
    for stop in range(1, len(queries) + 1):
        if stop == len(queries) or queries[stop].candidates != queries[start].candidates:
            yield queries[start:stop]
            start = stop
