"""Which backend runs what: the README's table, made from what the operators register."""

from __future__ import annotations

from pathlib import Path

from . import _cuda, _dispatch, _triton, readme

BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"

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


def update_readme(path: str | Path) -> None:
    """Replace what stands between the two markers of a page by the table. Raises as `readme.around`."""
    readme.replace(path, BEGIN, END, table())


def _dtypes() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in _dispatch.KERNEL_DTYPES)
