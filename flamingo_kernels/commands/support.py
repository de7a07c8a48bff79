"""Which backend runs what, and which models can be swapped: tables in Markdown."""

from __future__ import annotations

import argparse

from .._backends import cuda, dispatch, triton
from ..patch.known import KNOWN
from ..patch.registry import families
from .measure.text import dtype_name, row

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
    """It has none."""


def main(options: argparse.Namespace) -> int:
    """The command `support`."""
    print(table(), versions(), sep="\n\n")
    return 0


def table() -> str:
    """Operator by backend, in Markdown."""
    lines = [
        "| operator | backend | runs on | dtypes | largest sizes | gradients | bitwise reproducible |",
        "|---|---|---|---|---|---|---|",
    ]
    for operator in dispatch.operators():
        libraries: dict[str, dict[str, int]] = {name: {} for name in dispatch.libraries(operator)}
        lines += [
            row(
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


def backends() -> str:
    """Where each backend runs, and which operators it has, in Markdown: `table` in short."""
    operators = {name: (dispatch.limits(name), dispatch.libraries(name)) for name in dispatch.operators()}
    lines = ["| backend | runs on | operators |", "|---|---|---|"]
    for backend, where in _RUNS_ON.items():
        has = [f"`{name}`" for name, found in operators.items() if any(backend in each for each in found)]
        lines.append(row(f"`{backend}`", where, "all" if len(has) == len(operators) else ", ".join(has)))
    return "\n".join(lines)


def libraries() -> str:
    """The libraries whose classes `patch` knows by their code, from the first version to the last."""
    ends: dict[str, set[str]] = {}
    for spans in _known().values():
        for library, *pair in spans:
            ends.setdefault(library, set()).update(pair)
    ordered = {library: sorted(versions, key=_numbers) for library, versions in ends.items()}
    return ", ".join(
        f"{library} {' to '.join(dict.fromkeys((versions[0], versions[-1])))}"
        for library, versions in ordered.items()
    )


def _known() -> dict[str, list[tuple[str, str, str]]]:
    """By each class of other libraries, the libraries and versions whose code of it is known."""
    others = families()[1:]  # the first one is the reference of this repository
    names = [f"{family.module}.{name}" for family in others for name in family.fused]
    return {name: [_span(text) for text in KNOWN[name].values()] for name in names}


def versions() -> str:
    """Which classes of which version of a library have known code, in Markdown.

    Versions in a row that have the same known classes share a line.
    """
    spans = _known()
    lines = ["| library | versions | swapped by their source |", "|---|---|---|"]
    for library in dict.fromkeys(library for each in spans.values() for library, _, _ in each):
        ends = {end for each in spans.values() for name, *pair in each if name == library for end in pair}
        groups: dict[str, list[str]] = {}
        for version in sorted(ends, key=_numbers):
            known = (name.rpartition(".")[2] for name in spans if _covers(spans[name], library, version))
            groups.setdefault(", ".join(f"`{name}`" for name in dict.fromkeys(known)), []).append(version)
        for (classes, those), after in zip(groups.items(), [*groups.values(), None][1:], strict=True):
            last = f"before {after[0]}" if after else those[-1]
            shown = last if last == those[0] else f"{those[0]} to {last}"
            lines.append(row(library, shown, classes))
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


def _dtypes() -> str:
    return ", ".join(map(dtype_name, dispatch.KERNEL_DTYPES))
