"""Whole models: what `patch` swaps and what that gains, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flamingo.config import PRESETS
from flamingo_kernels.commands.measure.text import duration, factor, gibibytes, mebibytes, rounded, row
from flamingo_kernels.commands.measure.timing import Spread
from flamingo_kernels.commands.profile.models import WIDE
from flamingo_kernels.commands.profile.report import OVERLAP, TITLES
from flamingo_kernels.commands.profile.sides import BEFORE, COMPILED, FOLDED, FROZEN, INT8, LINEARS, PATCHED
from flamingo_kernels.commands.profile.subject import DECODE, FULL, GENERATION, PREFILL, STEP
from flamingo_kernels.patch.registry import families
from flamingo_kernels.testing.tiny import Sizes

from .records import was_measured, whole_model, whole_models

# By family, what `profile` calls the model whose gains stand in its row; the others have no model there.
PROFILED = {
    "flamingo": "flamingo-small",
    "open_flamingo": "open_flamingo-small",
    "flamingo_pytorch": "flamingo_pytorch-small",
    "transformers Idefics": "idefics-small",
    "transformers Idefics, resampler": "idefics-small",
    "transformers Idefics2, resampler": "idefics2-small",
    "transformers Mllama": "mllama-small",
    "transformers Evolla": "evolla-small",
}
WORKS = PREFILL, DECODE, STEP


class Headline(NamedTuple):
    """A measurement that README.md shows: a model in words, where its record is, and which work of it."""

    model: str
    folder: str
    record: str
    work: str


HEADLINES = (
    Headline("OpenFlamingo-3B's shape", "real", "openflamingo-3b.bfloat16", GENERATION),
    Headline("open_flamingo with OPT-350M", "apart", "open_flamingo-opt-350m.float32.8", DECODE),
    Headline("Llama 3.2 Vision 11B, two layers", "apart", "mllama-560.bfloat16.1", DECODE),
    Headline("Idefics, 4 layers of D 1024", "int8", "idefics-small.float32.1", PREFILL),
    Headline("flamingo, 4 layers of D 1024", "int8", "flamingo-small.bfloat16.1", PREFILL),
    Headline("open_flamingo, 4 layers of D 1024", "apart", "open_flamingo-small.float32.1", STEP),
)
SIDES = PATCHED, LINEARS, INT8  # that README.md shows


def compared(run: Mapping[str, Any], work: str, side: str) -> tuple[Spread, Spread] | None:
    """Times of a work: of the model as it is beside a side, and of the side. None where it was not timed."""
    times = run.get("times", {}).get(work, {})
    if side not in times:
        return None
    beside = run.get("beside", {}).get(work, {})
    return Spread(**beside.get(side, times[BEFORE])), Spread(**times[side])


def gain(run: Mapping[str, Any], work: str, side: str) -> str:
    """How many times as fast a side is, or "-"."""
    if (pair := compared(run, work, side)) is None:
        return "-"
    before, after = pair
    return before.gain(after)


def headlines(devices: Mapping[str, Path]) -> str:
    """The rows of README.md: the time as it is, and the gain of each side, on each processor.

    Args:
        devices: the folders of the records, by the names of the processors.
    """
    sides = ", ".join(TITLES[side].removeprefix("patch with ").removeprefix("patch and ") for side in SIDES)
    lines = [
        f"| model | work | {' | '.join(f'{name}: as it is; {sides}' for name in devices)} |",
        f"|---|---|{'--:|' * len(devices)}",
    ]
    for headline in HEADLINES:
        of = headline.folder, headline.record
        found = [
            _headline_cell(folder, headline) if was_measured(folder, *of) else "-"
            for folder in devices.values()
        ]
        (run,) = [whole_model(folder, *of) for folder in devices.values() if was_measured(folder, *of)][:1]
        lines.append(row(headline.model, work_of(run, headline), *found))
    return "\n".join(lines)


def _headline_cell(device: Path, headline: Headline) -> str:
    run = whole_model(device, headline.folder, headline.record)
    before = run["times"][headline.work][BEFORE]["median"]
    return f"{duration(before)}; {', '.join(gain(run, headline.work, side) for side in SIDES)}"


def work_of(run: Mapping[str, Any], headline: Headline) -> str:
    """What was timed, in words."""
    new, batch = run["sizes"].get("new", 0), run["sizes"]["batch"]
    work = {DECODE: "a token", GENERATION: f"{new} tokens with their prompt"}.get(
        headline.work, headline.work
    )
    return f"{work}{f' of {batch} texts' if batch > 1 else ''}, {run['dtype']}"


def swapped(device: Path) -> str:
    """What `patch` swaps in each family of models, and what that gains."""
    names = dict.fromkeys(PROFILED.values())
    found = {name: whole_model(device, "apart", f"{name}.float32.1") for name in names}
    lines = [
        f"| models of | tested with | swapped | {' | '.join(WORKS)} | `fixes` |",
        f"|---|---|---|{'--:|' * len(WORKS)}---|",
    ]
    for family in families():
        classes = ", ".join(f"`{name}`" for name in family.fused)
        gains = (_gains(found.get(PROFILED.get(family.name, ""), {}), work) for work in WORKS)
        fixes = "; ".join(f"`{name}`: {bug}" for name, bug in family.fixes.items())
        lines.append(row(family.name, family.versions, classes, *gains, fixes))
    shown = ", ".join(f"`{each['model']}`" for each in found.values())
    dtypes = " and ".join(dict.fromkeys(each["dtype"] for each in found.values()))
    note = (
        "Prefill, decode, training step: how many times as fast a whole model is after `patch(model)`, then "
        "after `patch(model, linears=True)`, each in a process of its own "
        "(`python -m flamingo_kernels profile NAME --apart`). "
        f"NAME: {shown}. Random weights, {dtypes}, D {WIDE['width']}, {Sizes().layers} layers of which every "
        f"second reads images; one text of {FULL.text} tokens and {FULL.media} images, for Evolla a protein. "
        '"~": the spreads of the two times, 20% to 80%, overlap. "-": not timed, or no cache to decode with. '
        "The two rows of Idefics are one measurement. "
    )
    return "\n".join([*lines, "", note + _conditions(found.values())])


def _gains(run: Mapping[str, Any], work: str) -> str:
    """What a work gains without and with linear layers."""
    if work not in run.get("times", {}):
        return "-"
    return ", ".join(gain(run, work, side) for side in (PATCHED, LINEARS))


def apart(device: Path, folder: str) -> str:
    """Gains of whole models, a side's process against that of the model as it is.

    Args:
        device: the folder of its records.
        folder: in it, where `profile NAME --apart --json` wrote.
    """
    runs = whole_models(device, folder)
    measured = {side for run in runs for times in run["times"].values() for side in times}
    sides = [side for side in (COMPILED, FROZEN, PATCHED, LINEARS, FOLDED, INT8) if side in measured]
    lines = [
        f"| model | dtype | work | batch | as it is | {' | '.join(TITLES[side] for side in sides)} |",
        f"|---|---|---|--:|{'--:|' * (1 + len(sides))}",
    ]
    for run in sorted(runs, key=lambda run: (run["model"], run["dtype"] != "float32", run["sizes"]["batch"])):
        for work, times in run["times"].items():
            cells = run["model"], run["dtype"], work, str(run["sizes"]["batch"])
            gains = (gain(run, work, side) for side in sides)
            lines.append(row(*cells, duration(times[BEFORE]["median"]), *gains))
    note = f'Times as it is over times of each side; {OVERLAP}; "-": not measured. '
    return "\n".join([*lines, "", note + _conditions(runs)])


def real(device: Path) -> str:
    """What a user of one model sees of each side: times, tokens a second, gains and memory."""
    return "\n\n".join(map(_real_table, whole_models(device, "real")))


def _real_table(run: Mapping[str, Any]) -> str:
    sizes = run["sizes"]
    sides = [side for side in TITLES if side in run["times"][DECODE]]
    headings = {
        PREFILL: "time to the first token",
        DECODE: "tokens/s",
        GENERATION: f"all of {sizes['new']} tokens",
        STEP: "training step",
    }
    works = [work for work in headings if work in run["times"]]
    lines = [
        f"| {run['model']}, {run['dtype']} | {' | '.join(headings[work] for work in works)} | memory |",
        f"|---|{'--:|' * len(works)}--:|",
    ]
    for side in sides:
        cells = [_real_cell(run, work, side) for work in works]
        peaks = [run["peak"][work].get(side) for work in works if work != STEP]
        known = [peak for peak in peaks if peak is not None]
        memory = f"{max(known) / 2**30:.2f} GiB" if known else "-"
        lines.append(row(TITLES[side], *cells, memory))
    images = f"{sizes['media']} images" if sizes["media"] > 1 else "an image"
    note = (
        f"{rounded(run['parameters'] / 1e9)} G random parameters, {sizes['batch']} x {sizes['text']} tokens "
        f"with {images}. Each row runs in a process of its own, in turn with the model as it is. A gain "
        "compares times of the same minutes; the machine's speed drifts, so times of different rows need not "
        "agree with it. "
        'Memory is the most that the process holds in inference. "~": the spreads, 20% to 80%, overlap. '
    )
    return "\n".join([*lines, "", note + _conditions([run])])


def _real_cell(run: Mapping[str, Any], work: str, side: str) -> str:
    times = run["times"][work]
    if side not in times:
        return "-"
    median = times[side]["median"]
    shown = rounded(1e3 * run["tokens"][work] / median) if work == DECODE else duration(median)
    if side == BEFORE:
        return shown
    return f"{shown} ({gain(run, work, side)})"


def _conditions(runs: Iterable[Mapping[str, Any]]) -> str:
    """Where and when runs were made."""
    runs = list(runs)
    said = {
        key: ", ".join(dict.fromkeys(str(run["conditions"][key]) for run in runs))
        for key in ("device", "threads", "torch", "commit")
    }
    latest = max(run["conditions"]["time"] for run in runs)
    return (
        f"Medians on {said['device']}, {said['threads']} threads, torch {said['torch']}, "
        f"commit {said['commit']}, {latest[:10]}."
    )


def presets(device: Path) -> str:
    """Tokens a second of each preset of `flamingo`, or its bytes and FLOPs where it was not run."""
    found = [whole_model(device, "models", name) for name in ("flamingo-small", *PRESETS)]
    run, counted = ([each for each in found if ("works" in each) is was_run] for was_run in (True, False))
    lines = [
        f"| run | dtype | parameters | {' | '.join(f'{work}, tokens/s' for work in WORKS)} |",
        f"|---|---|--:|{'--:|' * len(WORKS)}",
        *map(_run_line, sorted(run, key=lambda each: each["parameters"])),
        "",
        "| counted | dtype | parameters | weights | prefill | a token | training step | kept for backward |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
        *map(_counted_line, sorted(counted, key=lambda each: sum(each["parameters"].values()))),
    ]
    return "\n".join(lines)


def _run_line(found: Mapping[str, Any]) -> str:
    speeds = (speeds_of(found["works"].get(work)) for work in WORKS)
    return row(found["model"], found["dtype"], f"{rounded(found['parameters'] / 1e6)} M", *speeds)


def speeds_of(measured: Mapping[str, Any] | None) -> str:
    """Tokens a second as it is and of the last side."""
    if measured is None:
        return "-"
    before, *_, after = (each["median"] for each in measured["tokens_per_s"].values())
    return f"{rounded(before)} to {rounded(after)} ({factor(after / before)})"


def _counted_line(found: Mapping[str, Any]) -> str:
    size = sum(found["parameters"].values())
    weights = gibibytes(size * found["bytes_each"])
    flops = (f"{rounded(found['flops'][work] / 1e9)} GFLOP" for work in WORKS)
    before, after = found["saved"].values()
    kept = f"{rounded(before / 2**20)} to {mebibytes(after)} ({factor(before / after)})"
    return row(found["model"], found["dtype"], f"{rounded(size / 1e9)} G", weights, *flops, kept)
