"""`python -m flamingo evaluate`: a model over a benchmark on disk."""

import argparse
import math
import textwrap
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from flamingo import named
from flamingo.command_line import expect_apart
from flamingo.fewshot.benchmarks import BENCHMARKS, Benchmark, option
from flamingo.fewshot.inputs import SUPPORT_SAMPLES, Inputs, read_inputs
from flamingo.fewshot.metrics.words import import_nltk
from flamingo.fewshot.results import is_result, is_upload, refuse_foreign, write_json, write_upload
from flamingo.fewshot.runner import Evaluation, Task, evaluate, prepare
from flamingo.fewshot.shots import SELECT
from flamingo.generation import Latents
from flamingo.kernels import check_kernels, use_kernels
from flamingo.processor import Processor
from flamingo.training.lock import expect_folder
from flamingo.training.processes import device_of, leave, process_group, rank, say

TASKS: dict[str, Benchmark] = BENCHMARKS  # by the names that the command knows them by
_LONGEST_WAIT = timedelta(days=7)  # for the slowest of several processes
_say = partial(say, "evaluate")


def add_parser(commands: Any) -> None:
    """Adds `evaluate` to the commands of a parser."""
    parser = commands.add_parser("evaluate", help="few-shot evaluation on the paper's benchmarks, on disk")
    parser.add_argument(
        "--list", action=_List, nargs=0, help="what there is, where to get it, and how it lies"
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, benchmark in TASKS.items():
        task = tasks.add_parser(
            name,
            help=f"{benchmark.title}: {benchmark.task.metric}",
            description=describe(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for file, what in benchmark.files.items():
            task.add_argument(option(file), type=Path, required=True, metavar="PATH", help=what)
        for file, what in benchmark.more_files.items():
            task.add_argument(option(file), type=Path, metavar="PATH", help=what)
        for file in (*benchmark.files, *benchmark.more_files):
            task.add_argument(
                option(f"support_{file}"), type=Path, metavar="PATH", help="likewise, for the shots"
            )
        _add_options(task, benchmark)
        task.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser, benchmark: Benchmark) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help=named.FORMS,
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, made or gone on with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for the result with its settings")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="for answers that a server measures (default: by --output)",
    )
    zero = "0: none" if benchmark.task.closed else "0: two without their images"
    parser.add_argument(
        "--shots",
        type=int,
        default=benchmark.shots,
        help=f"in the paper 0, 4, 8, 16 and 32; {zero} (default: {benchmark.shots})",
    )
    parser.add_argument(
        "--select", choices=SELECT, default="random", help="fixed: the same for all (default: random)"
    )
    if benchmark.task.closed:
        parser.add_argument("--permutations", type=int, default=1, help="orders of the shots; 6 in the paper")
    else:
        tokens = benchmark.task.max_new_tokens
        parser.add_argument(
            "--max-new-tokens", type=int, default=tokens, help=f"of an answer (default: {tokens})"
        )
        parser.add_argument("--beams", type=int, default=3, help="1: greedy (default: 3)")
    parser.add_argument("--limit", "--samples", type=int, help="a random so many (default: all)")
    each = benchmark.support_per_answer
    parser.add_argument(
        "--support-samples",
        type=int,
        help=f"likewise (default: {SUPPORT_SAMPLES if each is None else f'{each} of each class'})",
    )
    if benchmark.scorings:
        parser.add_argument("--scoring", choices=[*benchmark.scorings], help="as another script measures")
    if benchmark.reads_wordnet:
        parser.add_argument("--nltk-data", type=Path, metavar="PATH", help="the folder of nltk's data")
    if "videos" in benchmark.files:
        parser.add_argument(
            "--all-videos", action="store_true", help="refuse to leave out those that are gone"
        )
        parser.add_argument("--fps", type=float, help="3 in the paper (default: the model's processor's)")
        parser.add_argument("--max-frames", type=int, help="30 in the paper (default: likewise)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument("--batch-size", type=int, default=8, help="default: 8")
    parser.add_argument("--max-pixels", type=int, help="of an image (default: the model's processor's)")
    parser.add_argument(
        "--latents", type=Path, metavar="FOLDER", help="keep what images are to the model for runs to come"
    )
    parser.add_argument("--device", default="cpu", help='as "cuda:0", or "auto" (default: cpu)')
    parser.add_argument("--no-kernels", action="store_true", help="evaluate without the kernels")
    named.add_options(parser)


class _List(argparse.Action):
    """Prints all benchmarks and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print("\n\n".join(map(describe, TASKS)))
        parser.exit()


def describe(name: str) -> str:
    """What `--list` says of a benchmark.

    >>> print(describe("rareact"))
    rareact: RareAct, mWAP
        split   all of it, without shots
        from    github.com/antoine77340/RareAct (annotations); the videos are YouTube's
        files   rareact.csv                                   --annotations
                rareact/7frRY7aGwMU.mp4 ...                   --videos
    """
    benchmark = TASKS[name]
    rows = [("split", benchmark.split), ("from", benchmark.source)]
    rows = [(title, textwrap.fill(text, 96)) for title, text in rows] + [("files", benchmark.layout)]
    if benchmark.scorings:
        rows.append(("scoring", f"also as {' or '.join(benchmark.scorings)}"))
    head = f"{name}: {benchmark.title}, {benchmark.task.metric}"
    said = [f"{title:<8}" + textwrap.indent(text, " " * 8).lstrip() for title, text in rows]
    return "\n".join([head, *(textwrap.indent(each, "    ") for each in said)])


def run(options: argparse.Namespace) -> int:
    """Evaluates, prints the metric with its numbers of samples and shots, and returns the exit status.

    Raises:
        ImportError, OSError, ValueError: for what is missing or wrong, before the model is loaded where that
            can be seen.
    """
    device = device_of(options.device)
    with process_group(device, _LONGEST_WAIT):
        _run(options, device)
    if distributed.is_torchelastic_launched():
        leave()
    return 0


def _run(options: argparse.Namespace, device: torch.device) -> None:
    benchmark = TASKS[options.task]
    _check(options)
    task = _task(options, benchmark)
    data = read_inputs(options, benchmark, _say)
    benchmark.check(getattr(options, "scoring", None), data.queries)
    how = _how(options, task, data)
    prepare(task, data.queries, data.support, options.output, **how)
    predictions = options.predictions or _beside(options.output)
    expect_apart(options.output, predictions, options.json)
    refuse_foreign(predictions, partial(is_upload, benchmark=benchmark))
    if options.json is not None:
        refuse_foreign(options.json, is_result)
    if options.latents is not None:
        expect_folder(options.latents)
    check_kernels(not options.no_kernels)
    load = named.find(options.model, options, _say)
    model, processor = _changed(*load(), options)
    model = model.to(device)
    latents = Latents(model, processor, options.latents, batch_size=options.batch_size)
    how |= {"batch_size": options.batch_size, "latents": latents}
    result = evaluate(model, processor, task, data.queries, data.support, options.output, **how)
    if rank() == 0:
        _tell(result, options, benchmark, data, predictions)


def _beside(output: Path) -> Path:
    """Where predictions go, if nobody says: `coco.predictions.json` of `coco.jsonl`."""
    name = output.stem if output.suffix == ".jsonl" else output.name
    return output.with_name(f"{name}.predictions.json")


def _changed(model: Any, processor: Processor, options: argparse.Namespace) -> tuple[Any, Processor]:
    """The model that will answer, and its processor, as the options change them."""
    for name in ("max_pixels", "fps", "max_frames"):
        if (value := getattr(options, name, None)) is not None:
            setattr(processor, name, value)
    use_kernels(model, not options.no_kernels, _say)
    return model, processor


def _check(options: argparse.Namespace) -> None:
    """Refuses numbers that are out of range."""
    least = {"shots": 0, "limit": 1, "support_samples": 0, "batch_size": 1, "beams": 1, "max_new_tokens": 1}
    for name, smallest in (least | {"permutations": 1, "max_pixels": 1, "max_frames": 1}).items():
        value = getattr(options, name, None)
        if value is not None and value < smallest:
            raise ValueError(f"expected {name} of {smallest} or more, got {option(name)} {value}.")
    fps = getattr(options, "fps", None)
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"expected --fps above 0, got {fps}.")


def _task(options: argparse.Namespace, benchmark: Benchmark) -> Task:
    """The benchmark's task as the options change it."""
    if folder := getattr(options, "nltk_data", None):
        if not folder.is_dir():
            raise ValueError(f"expected --nltk-data that is a folder, got {folder}.")
        import_nltk("nltk.data").path.insert(0, str(folder.absolute()))
    scoring = getattr(options, "scoring", None)
    task = benchmark.task if scoring is None else replace(benchmark.task, score=benchmark.scorings[scoring])
    return task if task.closed else replace(task, max_new_tokens=options.max_new_tokens)


def _how(options: argparse.Namespace, task: Task, data: Inputs) -> dict[str, Any]:
    """What `prepare` and `evaluate` are told."""
    settings: dict[str, Any] = data.files | {
        "model": options.model,
        "support": data.support_files,
        "support_samples": len(data.support),
        "batch_size": options.batch_size,
    }
    # What else changes answers, where it is given.
    for name in ("preset", "vision", "language", "fps", "max_frames", "max_pixels"):
        if (value := getattr(options, name, None)) is not None:
            settings[name] = value
    how = {"shots": options.shots, "select": options.select, "seed": options.seed, "settings": settings}
    if task.closed:
        return how | {"num_beams": 1, "permutations": options.permutations}
    return how | {"num_beams": options.beams}


def _tell(
    result: Evaluation,
    options: argparse.Namespace,
    benchmark: Benchmark,
    data: Inputs,
    predictions: Path,
) -> None:
    """Says and writes what was found."""
    print(result)
    if result.value is None or options.predictions is not None:
        write_upload(predictions, options.output, benchmark, data.queries)
        print(f"answers for a server that measures: {predictions}")
    if options.json is not None:
        write_json(
            options.json,
            {
                "task": result.task,
                "metric": result.metric,
                "value": result.value,
                "samples": result.samples,
                "shots": result.shots,
                "broken": result.broken,
                "missing": data.missing,
                "settings": _settings(options),
            },
        )


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """All options, as JSON."""
    hidden = ("command", "run", "list", "json", "predictions")
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in hidden
    }
