"""What a run reports: a progress bar, one line of JSON an update, and TensorBoard's files if asked for."""

import json
import os
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any


class RunLog:
    """Reports updates; those after a checkpoint that is continued are forgotten first.

    Args:
        folder: of the run; `log.jsonl` and `tensorboard/` go there.
        step: updates before.
        steps: of the whole run.
        tensorboard: whether to write TensorBoard's files.
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

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """The numbers of an update."""
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
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
    """The updates of a run, one dictionary each; a line that a kill cut short is left out."""
    path = Path(folder) / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _forget_after(path: Path, step: int) -> None:
    kept = [update for update in read_log(path.parent) if update["step"] <= step]
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(update) + "\n" for update in kept))
    os.replace(unfinished, path)
