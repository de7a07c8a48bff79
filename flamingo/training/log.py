"""What a run reports: a progress bar, one line of JSON an update, and TensorBoard's files if asked for."""

import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from flamingo.json_lines import parse_line
from flamingo.training.bad import Bad

_BEGINNING = b'{"step": '  # of every line
_MOST_SKIPPED = 5  # of an update, or a bad shard would fill the disk


class RunLog:
    """Reports updates; those after a checkpoint that is continued are forgotten first.

    Args:
        folder: of the run; `log.jsonl` and `tensorboard/` go there.
        step: updates before.
        steps: of the whole run.
        tensorboard: whether to write TensorBoard's files.

    Raises:
        ValueError: see `read_log`.
    """

    def __init__(self, folder: Path, *, step: int, steps: int, tensorboard: bool):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        _forget_after(path, step)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - closed by close
        self._bar = import_module("tqdm").tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)
        self._board: Any = None
        if tensorboard:
            writer = import_module("torch.utils.tensorboard").SummaryWriter
            self._board = writer(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, numbers: dict[str, float], bad: Sequence[Bad] = ()) -> None:
        """The numbers of an update, and the first few samples that it left out."""
        skipped = {"skipped": [each._asdict() for each in bad[:_MOST_SKIPPED]]} if bad else {}
        try:
            self._file.write(json.dumps({"step": step, **numbers, **skipped}) + "\n")
        except OSError as error:  # a full disk
            raise OSError(error.errno, error.strerror, self._file.name) from error
        count = sum(number for name, number in numbers.items() if name.startswith("bad/"))
        self._bar.set_postfix(loss=f"{numbers['loss']:.4f}", bad=count, refresh=False)
        self._bar.update()
        if self._board is not None:
            for name, number in numbers.items():
                self._board.add_scalar(name, number, step)

    def close(self) -> None:
        self._file.close()
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The updates of a run in their order, one dictionary each.

    A line that a kill, a full disk or a power cut has damaged is left out; of a step that is there twice, the
    later line counts.

    Raises:
        ValueError: if `log.jsonl` is a file of something else.
    """
    return _read(Path(folder) / "log.jsonl")[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The updates, and how many whole lines are no update."""
    if path.exists() and not path.is_file():
        raise ValueError(
            f"expected {path} to be a file, got something else. Name another folder for the run."
        )
    *lines, cut = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if parse_line(cut) is not None:  # it lacks nothing but its end
        lines, cut = [*lines, cut], b""
    lines = [line for line in lines if line.strip(b"\0 ")]
    updates = [update for update in map(parse_line, lines) if _is_update(update)]
    if not updates and (lines or not _BEGINNING.startswith(cut.rstrip(b"\0")[: len(_BEGINNING)])):
        raise ValueError(
            f"expected {path} to be the log of a run, got a file of something else, which is left as it is. "
            "Name another folder for the run."
        )
    by_step = {update["step"]: update for update in updates}
    return [by_step[step] for step in sorted(by_step)], len(lines) - len(updates)


def _is_update(line: Any) -> bool:
    return isinstance(line, dict) and type(line.get("step")) is int and "gradient norm" in line


def _forget_after(path: Path, step: int) -> None:
    updates, damaged = _read(path)
    if damaged:
        print(f"train: left out {damaged} damaged lines of {path}", file=sys.stderr)
    kept = [update for update in updates if update["step"] <= step]
    if len(kept) < len(updates):
        print(f"train: {len(updates) - len(kept)} updates after step {step} are done again", file=sys.stderr)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(update) + "\n" for update in kept))
    os.replace(unfinished, path)
