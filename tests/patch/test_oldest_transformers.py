"""The tests of `test_transformers.py` with the oldest transformers that can be patched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flamingo_kernels.patch.family import TRANSFORMERS

OLDEST = Path(sys.prefix) / "transformers-oldest"  # `make test` installs it
TESTS = Path(__file__).with_name("test_transformers.py")


def test_both_ends_are_installed_by_make():
    root = TESTS.parents[2]
    oldest, newest = TRANSFORMERS.removeprefix("transformers ").split(" to ")
    assert f"transformers=={oldest} " in (root / "Makefile").read_text()
    assert f"transformers=={newest};" in (root / "constraints.txt").read_text()
    assert f'"transformers>={oldest},<' in (root / "pyproject.toml").read_text()


def test_the_oldest_transformers_can_be_patched():
    if not OLDEST.is_dir():
        fail = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        fail(f"{OLDEST} is not there: make .venv/transformers-oldest")
    # What is compiled differs by torch, not by transformers.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compiled", TESTS]
    path = os.pathsep.join(filter(None, [str(OLDEST), os.environ.get("PYTHONPATH")]))
    version = "import transformers; print(transformers.__version__)"
    environment = os.environ | {"PYTHONPATH": path}
    run = {"env": environment, "text": True, "capture_output": True, "cwd": TESTS.parents[2]}
    assert subprocess.run([sys.executable, "-c", version], **run).stdout.strip() in TRANSFORMERS
    done = subprocess.run(command, **run)
    assert done.returncode == 0, done.stdout[-4000:]
