"""The demo's picture: how the language model learnt to look up, and what shots are worth after it."""

from importlib import import_module
from pathlib import Path
from typing import Any

from flamingo.demo.findings import TITLES, Findings


def check_format(path: Path) -> None:
    """Raises:
    ImportError: without matplotlib.
    ValueError: for a name that does not end as a picture's.
    """
    formats = _figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"expected a picture named .{', .'.join(formats)}, got {path}.")


def draw(found: Findings, path: Path) -> None:
    """Writes both curves."""
    figure = _figure()
    left, right = figure.subplots(1, 2)
    _draw_lessons(left, found)
    _draw_shots(right, found)
    figure.suptitle(found.setting(), x=0.01, ha="left", fontsize="small", color="0.3")
    figure.savefig(path, dpi=150)


def _figure() -> Any:
    return import_module("matplotlib.figure").Figure(figsize=(10, 4.6), layout="constrained")


def _draw_lessons(axes: Any, found: Findings) -> None:
    recall = found.course.recall
    axes.plot(list(recall), [100 * value for value in recall.values()])
    began = 0
    for name, end in found.course.ends.items():
        axes.axvline(end, color="0.6", linewidth=0.8, linestyle="--")
        axes.text((began + end) / 2, 102, name, ha="center", color="0.4", fontsize="small")
        began = end
    axes.set(
        xlabel="steps of the language model, lesson by lesson",
        ylabel="numbers said before that it knows, %",
        ylim=(0, 108),
    )


def _draw_shots(axes: Any, found: Findings) -> None:
    for size, (kind, title) in zip((9, 6, 6), TITLES.items(), strict=True):  # the first two may coincide
        results = found.accuracy[kind]
        shown = [100 * value for value in results.values()]
        axes.plot(list(results), shown, marker="o", markersize=size, label=title)
    axes.axhline(10, color="0.6", linewidth=0.8, linestyle="--", label="chance among ten")
    axes.set(
        xlabel="shots",
        ylabel="accuracy on digits never seen, %",
        ylim=(0, 108),
        xticks=list(found.accuracy["codes"]),
    )
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.12))
