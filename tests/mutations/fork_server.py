"""A process that imports the slow libraries once, and runs pytest in forks of itself.

It is run as a script and imports nothing of the project: each fork does, as it is by then.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = ("pytest", "torch", "transformers.modeling_utils", "einops", "hypothesis")


def serve() -> None:
    """Take a run a line, and answer with its status, the tests that failed, and what it printed."""
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    sys.path[0] = os.getcwd()
    for line in sys.stdin:
        print(json.dumps(_answer(**json.loads(line))), flush=True)


def _answer(arguments: list[str], environment: dict[str, str], limit: float) -> dict[str, Any]:
    printed, failed = Path("printed.txt"), Path("failed.json")
    failed.write_text("[]")
    if not (child := os.fork()):
        _test(arguments, environment, printed, failed)
    end = time.monotonic() + limit
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    return {
        "status": os.waitstatus_to_exitcode(ended[1]),
        "failed": json.loads(failed.read_text()),
        "output": printed.read_text(errors="replace"),
    }


def _test(arguments: list[str], environment: dict[str, str], printed: Path, failed: Path) -> NoReturn:
    import pytest

    names = []

    class Record:
        def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
            if report.failed:
                names.append(report.nodeid)

        pytest_collectreport = pytest_runtest_logreport

    os.setsid()  # what a test starts ends with it
    with printed.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    status = pytest.main(arguments, [Record()])
    failed.write_text(json.dumps(names))
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
