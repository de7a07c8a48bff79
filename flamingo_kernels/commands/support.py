"""Which backend runs what, which models can be swapped, how fast they are: tables of the README."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .._backends import cuda, dispatch, triton
from ..patch.known import KNOWN
from ..patch.registry import families
from . import readme
from .measure.text import dtype_name, factor, gibibytes, mebibytes, rounded
from .measure.timing import Spread

BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"
MODELS_BEGIN, MODELS_END = "<!-- models: begin -->", "<!-- models: end -->"
VERSIONS_BEGIN, VERSIONS_END = "<!-- versions: begin -->", "<!-- versions: end -->"
APART_BEGIN, APART_END = "<!-- apart: begin -->", "<!-- apart: end -->"
INT8_BEGIN, INT8_END = "<!-- int8: begin -->", "<!-- int8: end -->"
REAL_BEGIN, REAL_END = "<!-- real: begin -->", "<!-- real: end -->"
PRESETS_BEGIN, PRESETS_END = "<!-- presets: begin -->", "<!-- presets: end -->"
IN_README = (
    (BEGIN, END),
    (MODELS_BEGIN, MODELS_END),
    (VERSIONS_BEGIN, VERSIONS_END),
    (PRESETS_BEGIN, PRESETS_END),
    (REAL_BEGIN, REAL_END),
)
IN_PAGE = ((APART_BEGIN, APART_END), (INT8_BEGIN, INT8_END))

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
WORKS = ("prefill", "decode", "training step")

_RUNS_ON = {
    "reference": "anything PyTorch runs on",
    "cpu": "x86-64; elsewhere portable code (Arm: compiled, and one run in emulation)",
    "cuda": "NVIDIA GPUs from sm_{}{} on; so far compiled for them and run on none".format(
        *cuda.OLDEST_CAPABILITY
    ),
    "mkl": "processors for which torch has it",
    "onednn": "processors for which torch has it",
    "triton": "NVIDIA GPUs from sm_{}{} on, AMD gfx942; so far compiled for them and run on none".format(
        *triton.OLDEST_CAPABILITY
    ),
}
_DTYPES = {"reference": "any floating", "mkl": "float32"}
_NO_GRADIENTS = "none: for inference"
_REPRODUCIBLE: dict[str | tuple[str, str], str] = {
    **dict.fromkeys(("reference", "mkl", "onednn"), "as PyTorch is"),
    "cpu": "yes, for any number of threads",
    ("linear", "cpu"): "yes, for any number of threads; gradients as PyTorch is",
    **{("linear", backend): "yes; gradients as PyTorch is" for backend in ("cuda", "triton")},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results",
        metavar="DIR",
        help="what was measured on one machine, with folders models, apart, int8, real",
    )
    parser.add_argument("--readme", metavar="FILE", help="replace the tables between this file's markers")
    parser.add_argument("--page", metavar="FILE", help="the same for the table of whole models")


def main(options: argparse.Namespace) -> int:
    """The command `support`."""
    if options.results and not Path(options.results).is_dir():
        raise ValueError(f"expected --results to be a folder, got {options.results}.")
    for page, markers in ((options.readme, IN_README), (options.page, IN_PAGE)):
        for begin, end in markers if page else ():
            readme.around(page, begin, end)
    if options.page and not options.results:
        raise ValueError("expected --page with --results DIR, whose numbers it shows.")
    tables = models(options.results), versions(), presets(options.results), real(options.results)
    if options.readme:
        update_readme(options.readme, options.results)
    if options.page:
        readme.replace(options.page, APART_BEGIN, APART_END, apart(options.results, "apart"))
        readme.replace(options.page, INT8_BEGIN, INT8_END, apart(options.results, "int8"))
    print(table(), *tables, sep="\n\n")
    return 0


def apart(results: str | Path, folder: str) -> str:
    """Gains of whole models, in Markdown.

    Args:
        results: what was measured on one machine.
        folder: in it, where `profile NAME --apart --json` wrote.
    """
    from .profile.report import apart_table

    return apart_table(_read(path, "conditions") for path in sorted(Path(results, folder).glob("*.json")))


def real(results: str | Path | None = None) -> str:
    """Times and memory of a model of real size, in Markdown.

    Args:
        results: as for `apart`, with a folder `real`, where `profile openflamingo-3b --apart --new 64 --json`
            wrote. Default: none.
    """
    from .profile.report import real_table

    paths = sorted(Path(results, "real").glob("*.json")) if results else []
    return "\n\n".join(real_table(_read(path, "conditions")) for path in paths)


def table() -> str:
    """Operator by backend, in Markdown."""
    lines = [
        "| operator | backend | runs on | dtypes | largest sizes | gradients | bitwise reproducible |",
        "|---|---|---|---|---|---|---|",
    ]
    for operator in dispatch.operators():
        libraries: dict[str, dict[str, int]] = {name: {} for name in dispatch.libraries(operator)}
        lines += [
            readme.row(
                f"`{operator}`",
                f"`{backend}`",
                _RUNS_ON[backend],
                _DTYPES.get(backend) or _dtypes(),
                ", ".join(f"{name} {most}" for name, most in limits.items()) or "any",
                _gradients(operator, backend),
                _REPRODUCIBLE.get((operator, backend)) or _REPRODUCIBLE.get(backend, "yes"),
            )
            for backend, limits in (dispatch.limits(operator) | libraries).items()
        ]
    return "\n".join(lines)


def _gradients(operator: str, backend: str) -> str:
    if backend == "reference" or operator == "linear":  # whose gradients are products again
        return "any order"
    return "once" if dispatch.is_differentiable(operator) else _NO_GRADIENTS


def models(results: str | Path | None = None) -> str:
    """What `patch` swaps and what that gains, in Markdown.

    Args:
        results: as for `apart`, with `NAME.float32.1.json` for the names in `PROFILED`. Default: no gains.
    """
    names = dict.fromkeys(PROFILED.values())
    found = {name: _load(results, "apart", f"{name}.float32.1") for name in names}
    lines = [
        f"| models of | tested with | swapped | {' | '.join(WORKS)} | `fixes` |",
        f"|---|---|---|{'--:|' * len(WORKS)}---|",
    ]
    for family in families():
        swapped = ", ".join(f"`{name}`" for name in family.fused)
        gains = (_gain(found.get(PROFILED.get(family.name, ""), {}), work) for work in WORKS)
        fixes = "; ".join(f"`{name}`: {bug}" for name, bug in family.fixes.items())
        lines.append(readme.row(family.name, family.versions, swapped, *gains, fixes))
    return "\n".join([*lines, *_conditions([each for each in found.values() if each])])


def _load(results: str | Path | None, folder: str, name: str) -> dict[str, Any]:
    path = Path(results or "", folder, f"{name}.json")
    return _read(path) if results and path.exists() else {}


def _read(path: Path, *keys: str) -> dict[str, Any]:
    """What `profile --json` wrote. Raises ValueError for a file of something else, without these keys."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got: {error}.") from error
    if not isinstance(found, dict) or {*keys} - found.keys():
        raise ValueError(f"{path}: expected what `profile --json` has written, got something else.")
    return found


def _gain(found: dict[str, Any], work: str) -> str:
    """How many times as fast a work is after the swap, without and with linear layers.

    Marked where the spread overlaps with that before.
    """
    times = found.get("times", {}).get(work)
    if times is None:
        return "-"
    before, *after = (Spread(**times[side]) for side in ("before", "patch", "linears"))
    return ", ".join(map(before.gain, after))


def _conditions(found: list[dict[str, Any]]) -> list[str]:
    """What a reader must know of the gains."""
    from ..testing.tiny import Sizes
    from .profile.models import WIDE
    from .profile.subject import FULL

    if not found:
        return []
    names = ", ".join(f"`{each['model']}`" for each in found)
    dtypes = " and ".join(dict.fromkeys(each["dtype"] for each in found))
    said = {
        key: ", ".join(dict.fromkeys(str(each["conditions"][key]) for each in found))
        for key in ("device", "threads", "torch", "commit")
    }
    return [
        "",
        "Gains: times before over times after `patch(model)`, then after `patch(model, linears=True)`, of a "
        "whole model, each in a process of its own (`python -m flamingo_kernels profile NAME --apart`). "
        f"NAME: {names}. Random weights, {dtypes}, D {WIDE['width']}, {Sizes().layers} layers of which every "
        f"second reads images; one text of {FULL.text} tokens and {FULL.media} images, for Evolla a protein. "
        '"~": its spread, 20% to 80%, overlaps with that before. "-": it has no cache to decode with, or was '
        "not timed. The two rows of Idefics are one measurement. "
        f"Medians on {said['device']}, {said['threads']} threads, torch {said['torch']}, "
        f"commit {said['commit']}, {max(each['conditions']['time'] for each in found)}.",
    ]


def versions() -> str:
    """Which classes of which version of a library have known code, in Markdown.

    Versions in a row that have the same known classes share a line.
    """
    others = families()[1:]  # the first one is the reference of this repository
    names = [f"{family.module}.{name}" for family in others for name in family.fused]
    spans = {name: [_span(text) for text in KNOWN[name].values()] for name in names}
    lines = ["| library | versions | swapped by their source |", "|---|---|---|"]
    libraries = dict.fromkeys(library for each in spans.values() for library, _, _ in each)
    for library in libraries:
        ends = {end for each in spans.values() for name, *pair in each if name == library for end in pair}
        groups: dict[str, list[str]] = {}
        for version in sorted(ends, key=_numbers):
            known = (name.rpartition(".")[2] for name in names if _covers(spans[name], library, version))
            groups.setdefault(", ".join(f"`{name}`" for name in dict.fromkeys(known)), []).append(version)
        for (classes, those), after in zip(groups.items(), [*groups.values(), None][1:], strict=True):
            last = f"before {after[0]}" if after else those[-1]
            shown = last if last == those[0] else f"{those[0]} to {last}"
            lines.append(readme.row(library, shown, classes))
    return "\n".join(lines)


def _span(text: str) -> tuple[str, str, str]:
    """Library, first and last version of a text such as "transformers 5.0.0 to 5.3.0"."""
    library, _, known = text.partition(" ")
    first, _, last = known.partition(" to ")
    return library, first, last or first


def _covers(spans: list[tuple[str, str, str]], library: str, version: str) -> bool:
    return any(
        name == library and _numbers(first) <= _numbers(version) <= _numbers(last)
        for name, first, last in spans
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def presets(results: str | Path | None = None) -> str:
    """Tokens a second of each preset, or its bytes and FLOPs where it was not run, in Markdown.

    Args:
        results: a folder with `models`, where `profile NAME --json` wrote for `flamingo-small` and the
            presets of `flamingo`. Default: none.
    """
    from flamingo.config import PRESETS

    found = [each for name in ("flamingo-small", *PRESETS) if (each := _load(results, "models", name))]
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


def _run_line(found: dict[str, Any]) -> str:
    speeds = (_speeds(found["works"].get(work)) for work in WORKS)
    return readme.row(found["model"], found["dtype"], f"{rounded(found['parameters'] / 1e6)} M", *speeds)


def _counted_line(found: dict[str, Any]) -> str:
    size = sum(found["parameters"].values())
    weights = gibibytes(size * found["bytes_each"])
    flops = (f"{rounded(found['flops'][work] / 1e9)} GFLOP" for work in WORKS)
    before, after = found["saved"].values()
    kept = f"{rounded(before / 2**20)} to {mebibytes(after)} ({factor(before / after)})"
    return readme.row(found["model"], found["dtype"], f"{rounded(size / 1e9)} G", weights, *flops, kept)


def _speeds(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "-"
    before, *_, after = (each["median"] for each in measured["tokens_per_s"].values())
    return f"{rounded(before)} to {rounded(after)} ({factor(after / before)})"


def update_readme(path: str | Path, results: str | Path | None = None) -> None:
    """Replace what stands between the markers of a page by the tables. Raises as `readme.around`."""
    readme.replace(path, BEGIN, END, table())
    readme.replace(path, MODELS_BEGIN, MODELS_END, models(results))
    readme.replace(path, VERSIONS_BEGIN, VERSIONS_END, versions())
    readme.replace(path, PRESETS_BEGIN, PRESETS_END, presets(results))
    readme.replace(path, REAL_BEGIN, REAL_END, real(results))


def _dtypes() -> str:
    return ", ".join(map(dtype_name, dispatch.KERNEL_DTYPES))
