"""Which backend runs what, and which models can be swapped: tables of the README, made from the code."""

from __future__ import annotations

from pathlib import Path

from . import _cuda, _dispatch, _triton, readme
from .patch.family import families

BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"
MODELS_BEGIN, MODELS_END = "<!-- models: begin -->", "<!-- models: end -->"

_RUNS_ON = {
    "reference": "anything PyTorch runs on",
    "cpu": "x86-64; elsewhere portable code (Arm: compiled, and one run in emulation)",
    "cuda": "NVIDIA GPUs from sm_{}{} on; so far compiled for them and run on none".format(
        *_cuda.OLDEST_CAPABILITY
    ),
    "triton": "NVIDIA GPUs from sm_{}{} on, AMD gfx942; so far compiled for them and run on none".format(
        *_triton.OLDEST_CAPABILITY
    ),
}
_GRADIENTS = {"reference": "any order"}
_REPRODUCIBLE = {"reference": "as PyTorch is", "cpu": "yes, for any number of threads"}


def table() -> str:
    """Operator by backend, in Markdown."""
    lines = [
        "| operator | backend | runs on | dtypes | largest sizes | gradients | bitwise reproducible |",
        "|---|---|---|---|---|---|---|",
    ]
    for operator in _dispatch.operators():
        for backend, limits in _dispatch.limits(operator).items():
            cells = [
                f"`{operator}`",
                f"`{backend}`",
                _RUNS_ON[backend],
                "any floating" if backend == "reference" else _dtypes(),
                ", ".join(f"{name} {most}" for name, most in limits.items()) or "any",
                _GRADIENTS.get(backend, "once"),
                _REPRODUCIBLE.get(backend, "yes"),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def models() -> str:
    """What `patch` swaps, in Markdown."""
    lines = ["| models of | tested with | swapped | `fixes` |", "|---|---|---|---|"]
    for family in families():
        swapped = ", ".join(f"`{name}`" for name in family.fused)
        fixes = "; ".join(f"`{name}`: {bug}" for name, bug in family.fixes.items())
        lines.append(f"| {family.name} | {family.versions} | {swapped} | {fixes} |")
    return "\n".join(lines)


def update_readme(path: str | Path) -> None:
    """Replace what stands between the markers of a page by the tables. Raises as `readme.around`."""
    readme.replace(path, BEGIN, END, table())
    readme.replace(path, MODELS_BEGIN, MODELS_END, models())


def _dtypes() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in _dispatch.KERNEL_DTYPES)
