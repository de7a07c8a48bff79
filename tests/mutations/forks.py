"""A copy of the project that runs its tests in forks, seconds sooner than in new processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.scratch import LIMIT, OPTIONS, SETTINGS, Run, Scratch

from . import fork_server

# What libraries read when they are imported. A fork cannot use a GPU.
ENVIRONMENT = {**SETTINGS, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}


class ForkingScratch(Scratch):
    """A `Scratch` for many runs, none of which needs another environment before it imports torch."""

    def __init__(self, root: Path, folder: Path) -> None:
        super().__init__(root, folder)
        self.server = subprocess.Popen(
            [sys.executable, fork_server.__file__],
            cwd=folder,
            env=os.environ | ENVIRONMENT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def test(self, *arguments: str, **environment: str) -> Run:
        assert self.server.stdin
        assert self.server.stdout
        began = time.monotonic()
        ask = {"arguments": [*OPTIONS, *arguments], "environment": environment, "limit": LIMIT}
        print(json.dumps(ask), file=self.server.stdin, flush=True)
        answer = json.loads(self.server.stdout.readline())
        return Run.of(answer["status"], answer["failed"], answer["output"], began)
