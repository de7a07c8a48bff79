"""What an evaluation reads: the samples that are asked, and those that shots are taken from."""

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from flamingo.fewshot.benchmarks import Benchmark, option, present
from flamingo.fewshot.prompts import Sample

SUPPORT_SAMPLES = 2048  # in the paper

Files = Mapping[str, Path]  # by the names of their options


class Inputs(NamedTuple):
    """What is asked, and what shots are taken from."""

    queries: list[Sample]
    support: list[Sample]
    missing: int  # queries without a video
    files: dict[str, str]  # what was read, by the names of the options
    support_files: list[str]


def read_inputs(options: argparse.Namespace, benchmark: Benchmark, say: Callable[[str], object]) -> Inputs:
    """Reads what is asked and what shots are taken from.

    Args:
        options: of the command.
        benchmark: that is asked.
        say: is told, in a line, how many samples have no video.

    Raises:
        FileNotFoundError, ValueError: as the benchmark's readers, and if files that are needed are not given,
            or what shots are made of has no answers.
    """
    files, support_files = _files(options, benchmark)
    asked = benchmark.read(**files)
    queries = _with_videos(asked, files, options, say)
    support: list[Sample] = []
    if support_files is not None:
        support = _read_support(options, benchmark, support_files)
        if not _given(options, files) and _share_ids(support, queries):
            names = " or ".join(option(f"support_{name}") for name in files)
            raise ValueError(
                f"expected {names}, where shots come from, as {_shown(files)} has no part for them."
            )
        if without := [sample for sample in support if not sample.references]:
            raise ValueError(
                f"expected answers to what shots are made of in {_shown(support_files)}, found none to "
                f"{without[0].id!r}."
            )
        support = _with_videos(support, support_files, options, say)
    return Inputs(
        _some(queries, options.limit, options.seed),
        _some_support(support, options, benchmark),
        len(asked) - len(queries),
        {name: str(path) for name, path in files.items()},
        [str(path) for path in (support_files or {}).values()],
    )


def _read_support(options: argparse.Namespace, benchmark: Benchmark, files: Files) -> list[Sample]:
    try:
        return (benchmark.read_support or benchmark.read)(**files)
    except FileNotFoundError as error:
        if "images" in files and options.support_images is None:
            raise FileNotFoundError(
                f"{error} Name the folder of the shots' images: --support-images."
            ) from error
        raise


def _files(options: argparse.Namespace, benchmark: Benchmark) -> tuple[Files, Files | None]:
    """The files of what is asked and those of the shots, None where there are to be no shots."""
    names = (*benchmark.files, *benchmark.more_files)
    files = {name: path for name in names if (path := getattr(options, name)) is not None}
    given = {name: path for name in names if (path := getattr(options, f"support_{name}")) is not None}
    if benchmark.read_support is not None:
        return files, {**files, **given}
    if not given and benchmark.task.closed and options.shots == 0:
        return files, None
    if missing := [name for name in benchmark.files if name not in given and name not in benchmark.shared]:
        raise ValueError(f"expected {option(f'support_{missing[0]}')}, where shots come from, got none.")
    return files, {**{name: path for name, path in files.items() if name in benchmark.shared}, **given}


def _given(options: argparse.Namespace, files: Files) -> bool:
    """Whether the user said where shots come from."""
    return any(getattr(options, f"support_{name}") for name in files)


def _shown(files: Files) -> str:
    return " and ".join(map(str, files.values()))


def _share_ids(some: Sequence[Sample], others: Sequence[Sample]) -> bool:
    return bool({sample.id for sample in some} & {sample.id for sample in others})


def _with_videos(
    samples: list[Sample], files: Files, options: argparse.Namespace, say: Callable[[str], object]
) -> list[Sample]:
    """The samples whose videos are there. Videos of the web vanish, so everybody has a part of them."""
    if "videos" not in files:
        return samples
    found, folder = present(samples), files["videos"]
    gone = len(samples) - len(found)
    if not found or (gone and options.all_videos):
        raise ValueError(
            f"expected a video in {folder} for each of {len(samples)} samples of {_shown(files)}, found "
            f"{len(found) or 'none'}: the first to lack one is {_first_missing(samples, found)!r}."
        )
    if gone:
        say(f"{gone} of {len(samples)} samples of {_shown(files)} have no video in {folder}")
    return found


def _first_missing(samples: Sequence[Sample], found: Sequence[Sample]) -> int | str:
    there = {sample.id for sample in found}
    return next(sample.id for sample in samples if sample.id not in there)


def _some(samples: Sequence[Sample], count: int | None, seed: int) -> list[Sample]:
    """So many of the samples, chosen at random, in their order."""
    if count is None or count >= len(samples):
        return list(samples)
    places = random.Random(seed).sample(range(len(samples)), count)
    return [samples[place] for place in sorted(places)]


def _some_support(samples: list[Sample], options: argparse.Namespace, benchmark: Benchmark) -> list[Sample]:
    each = benchmark.support_per_answer
    if options.support_samples is not None or each is None:
        count = SUPPORT_SAMPLES if options.support_samples is None else options.support_samples
        return _some(samples, count, options.seed)
    by_answer: dict[str, list[Sample]] = {}
    for sample in samples:
        by_answer.setdefault(sample.answer, []).append(sample)
    return [sample for few in by_answer.values() for sample in _some(few, each, options.seed)]
