"""`python -m flamingo evaluate`: a model over a dataset on disk."""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from flamingo.fewshot.datasets import read_captions, read_vqa
from flamingo.fewshot.prompts import Sample
from flamingo.fewshot.runner import CAPTIONS, VQA, Task, evaluate, prepare
from flamingo.kernels import use_kernels

# A task, its files' arguments, and what reads them.
TASKS: dict[str, tuple[Task, tuple[str, ...], Callable[..., list[Sample]]]] = {
    "vqa": (VQA, ("questions", "annotations", "images"), read_vqa),
    "captions": (CAPTIONS, ("captions", "images"), read_captions),
}


def add_parser(commands: Any) -> None:
    """Adds `evaluate` to the commands of a parser."""
    parser = commands.add_parser("evaluate", help="few-shot evaluation on VQAv2 or COCO captions on disk")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="{vqa,captions}")
    for name, (_, files, _) in TASKS.items():
        task = tasks.add_parser(name, help=f"data in the format of {'VQAv2' if name == 'vqa' else 'COCO'}")
        for prefix, of in (("", "what is asked"), ("support-", "where the shots come from")):
            for file in files:
                task.add_argument(f"--{prefix}{file}", type=Path, required=True, metavar="PATH", help=of)
        _add_options(task)
        task.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="RUN.TOML|MODULE:FUNCTION",
        help="what was given to train, or a function without arguments that returns (model, processor)",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, made or gone on with")
    parser.add_argument("--shots", type=int, default=4, help="0: two without their images (default: 4)")
    parser.add_argument("--select", choices=("random", "rices"), default="random", help="default: random")
    parser.add_argument(
        "--max-new-tokens", type=int, help="of an answer (default: 10 for vqa, 32 for captions)"
    )
    parser.add_argument("--samples", type=int, help="a random so many (default: all)")
    parser.add_argument("--support-samples", type=int, default=2048, help="likewise (default: 2048)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument("--beams", type=int, default=3, help="1: greedy (default: 3)")
    parser.add_argument("--batch-size", type=int, default=8, help="default: 8")
    parser.add_argument("--max-pixels", type=int, help="of an image (default: the model's processor's)")
    parser.add_argument("--device", default="cpu", help='as "cuda:0" (default: cpu)')
    parser.add_argument("--no-kernels", action="store_true", help="evaluate without the kernels")


def run(options: argparse.Namespace) -> int:
    """Evaluates, and prints the metric with its numbers of samples and shots."""
    task, files, read = TASKS[options.task]
    if options.max_new_tokens is not None:
        task = replace(task, max_new_tokens=options.max_new_tokens)
    try:
        paths = {name: getattr(options, name) for name in files}
        support_paths = {name: getattr(options, f"support_{name}") for name in files}
        queries = _some(read(**paths), options.samples, options.seed)
        support = _some(read(**support_paths), options.support_samples, options.seed)
        how = {
            "shots": options.shots,
            "select": options.select,
            "seed": options.seed,
            "num_beams": options.beams,
            "settings": {name: str(path) for name, path in paths.items()}
            | {
                "model": options.model,
                "support": [str(path) for path in support_paths.values()],
                "support_samples": len(support),
                "batch_size": options.batch_size,
            },
        }
        prepare(task, queries, support, options.output, **how)  # refuses before a model is loaded
        model, processor = _load(options.model)
        if options.max_pixels is not None:
            processor.max_pixels = options.max_pixels
        use_kernels(model, not options.no_kernels, lambda line: print(f"evaluate: {line}", file=sys.stderr))
        result = evaluate(
            model.to(options.device).eval(),
            processor,
            task,
            queries,
            support,
            options.output,
            batch_size=options.batch_size,
            **how,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"evaluate: {str(error).removeprefix('evaluate: ')}", file=sys.stderr)
        return 2
    print(result)
    return 0


def _load(name: str) -> tuple[torch.nn.Module, Any]:
    if name.endswith(".toml"):
        from flamingo.training import load_run

        return load_run(name)
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"expected --model run.toml or module:function, got {name!r}.")
    return getattr(import_module(module), function)()


def _some(samples: Sequence[Sample], count: int | None, seed: int) -> list[Sample]:
    """So many of the samples, chosen at random, in their order."""
    if count is None or count >= len(samples):
        return list(samples)
    places = random.Random(seed).sample(range(len(samples)), count)
    return [samples[place] for place in sorted(places)]
