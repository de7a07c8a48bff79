"""Queries a second of a few-shot evaluation, against a prompt that is read anew for every query.

::

    python -m benchmarks.few_shot                        all cases, as docs/evaluating.md shows them
    python -m benchmarks.few_shot --json benchmarks/results/DEVICE/few_shot.json

The model has OpenFlamingo-3B's widths, fewer layers and random weights. The rival is what a loop over queries
does: `generate` on the pixels of whole prompts, and `log_likelihoods` on whole prompts, a batch a call, which
encodes each image of a batch once. Both sides have the kernels. The first run encodes every image once, the
second finds them in files.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from flamingo import Flamingo, FlamingoConfig, Latents, Processor
from flamingo.fewshot import CAPTION, Evaluation, Sample, Task, evaluate, log_likelihoods
from flamingo.kernels import use_kernels
from flamingo_kernels.commands.measure.text import factor, rounded
from flamingo_kernels.commands.measure.text import row as row_of

BATCH, NEW_TOKENS = 8, 5
CANDIDATES = ("yes", "no", "a cat", "a dog")
WORDS = ("a cat", "a dog", "a red bus", "two men", "a kite")

GREEDY = Task("greedy", CAPTION, "answers", lambda records: float(len(records)), max_new_tokens=NEW_TOKENS)
CLOSED = Task("closed", CAPTION, "answers", lambda records: float(len(records)), closed=True)
CASES = tuple(itertools.product((GREEDY, CLOSED), (("fixed", 8), ("fixed", 32), ("random", 8))))


class Setup(NamedTuple):
    """What all cases share."""

    model: Flamingo
    processor: Processor
    support: Sequence[Sample]
    queries: Sequence[Sample]


class Row(NamedTuple):
    """Queries a second."""

    task: str
    select: str
    shots: int
    anew: float
    anew_spread: float  # the fastest batch's over the slowest's
    first: float
    second: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_shot", description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=6, help="of each tower (default: 6 of 24)")
    parser.add_argument("--support", type=int, default=256, help="default: 256")
    parser.add_argument("--queries", type=int, default=512, help="default: 512")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--preset", default="openflamingo-3b", help="default: openflamingo-3b")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows")
    options = parser.parse_args()
    model, processor = build(options.preset, options.layers, getattr(torch, options.dtype))
    support, queries = samples(options.support, 1, processor), samples(options.queries, 2, processor)
    setup = Setup(model, processor, support, queries)
    rows = []
    for task, (select, shots) in CASES:
        rows.append(measure(setup, task, select, shots))
        print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows))
    if options.json is not None:
        settings = {name: str(value) for name, value in vars(options).items() if name != "json"}
        record = {"settings": settings, "rows": [row._asdict() for row in rows]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def build(preset: str, layers: int, dtype: torch.dtype) -> tuple[Flamingo, Processor]:
    """A model of random weights with the kernels, and a processor of bytes."""
    torch.manual_seed(0)
    changes: dict[str, Any] = {"media_token_id": 256}  # of the tokenizer of bytes
    if preset != "tiny":
        changes |= {"vision_layers": layers, "language_layers": layers}
    model = Flamingo(FlamingoConfig.preset(preset, **changes)).eval().to(dtype)
    for block in model.cross_attn.values():  # as after training: a gate of 0 is a case of its own
        block.attn_gate.data.fill_(0.5), block.ff_gate.data.fill_(0.5)
    use_kernels(model, True, lambda line: print(line, file=sys.stderr))
    return model, Processor(image_size=model.config.image_size)


def samples(count: int, seed: int, processor: Processor) -> list[Sample]:
    """Captioned images of noise, as large as the model takes them."""
    draw = np.random.default_rng(seed)
    side = processor.image_size
    return [
        Sample(
            id=f"{seed}/{number}",
            image=draw.integers(0, 256, (side, side, 3), dtype=np.uint8),
            answer=WORDS[number % len(WORDS)],
            candidates=CANDIDATES,
        )
        for number in range(count)
    ]


def measure(setup: Setup, task: Task, select: str, shots: int) -> Row:
    """One case: batches read anew before and after two whole runs."""
    model, processor, support, queries = setup
    anew = _closed_anew if task.closed else _greedy_anew
    batches = [queries[start : start + BATCH] for start in range(0, len(queries), BATCH)]
    times = []

    def read_anew(batch: Sequence[Sample], number: int) -> None:
        draw = random.Random(number)
        shared = draw.sample(support, shots)
        documents = [
            task.template.prompt(query, shared if select == "fixed" else draw.sample(support, shots))
            for query in batch
        ]
        times.append(_seconds(lambda: anew(model, processor, documents)) / len(batch))

    with TemporaryDirectory() as name:
        folder, runs = Path(name), []
        for run in range(2):
            read_anew(batches[run % len(batches)], run + 1)
            runs.append(_run(setup, task, select, shots, folder, run))
        read_anew(batches[-1], 3)
    median = statistics.median(times)
    spread = max(times) / min(times)
    return Row(task.name, select, shots, 1 / median, spread, *(len(queries) / seconds for seconds in runs))


def _run(setup: Setup, task: Task, select: str, shots: int, folder: Path, number: int) -> float:
    """The seconds of a whole evaluation, with the latents of earlier runs."""
    model, processor, support, queries = setup

    def run() -> Evaluation:
        return evaluate(
            model,
            processor,
            task,
            queries,
            support,
            folder / f"{number}.jsonl",
            shots=shots,
            select=select,
            num_beams=1,
            batch_size=BATCH,
            latents=Latents(model, processor, folder / "latents"),
        )

    return _seconds(run)


def _greedy_anew(model: Flamingo, processor: Processor, documents: Sequence[Any]) -> None:
    batch = processor(documents, prompt=True)
    model.generate(batch.input_ids, batch.pixels, batch.attention_mask, max_new_tokens=NEW_TOKENS)


def _closed_anew(model: Flamingo, processor: Processor, documents: Sequence[Any]) -> None:
    log_likelihoods(model, processor, documents, CANDIDATES, batch_size=BATCH)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    head = ("answers", "shots", "anew", "first run", "", "second run", "")
    lines = [row_of(*head), row_of(*["---"] * len(head))]
    for row in rows:
        gains = [(rounded(rate), factor(rate / row.anew)) for rate in (row.first, row.second)]
        lines.append(
            row_of(row.task, f"{row.shots} {row.select}", rounded(row.anew), *itertools.chain(*gains))
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
