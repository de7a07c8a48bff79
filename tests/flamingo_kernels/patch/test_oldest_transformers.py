"""Tests of models of transformers with the oldest version that is supported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flamingo_kernels.patch.family import TRANSFORMERS
from tests.helpers import ROOT

OLDEST = Path(sys.prefix) / "transformers-oldest"  # `make test` installs it
PATCH = "tests/flamingo_kernels/patch"
TESTS = {
    # What its versions change: names of arguments, caches, masks and who calls an attention.
    "usual": [
        *(f"{PATCH}/test_transformers.py", f"{PATCH}/test_cache_keyword.py", f"{PATCH}/test_known.py"),
        *("-k", "(keyword or known or cache or mask or logits or generated or asks) and not compiled"),
    ],
    # The oldest Idefics2 cannot be exported.
    "rest": [
        *(f"{PATCH}/test_transformers.py", f"{PATCH}/test_hooks.py"),
        *("tests/flamingo/language/test_pretrained.py", "tests/flamingo/generation/test_tokens.py"),
        *("-m", "", "-k", "not compiled and not exported and not fully_sharded"),
    ],
}


def test_both_ends_are_installed_by_make():
    oldest, newest = TRANSFORMERS.removeprefix("transformers ").split(" to ")
    assert f"transformers=={oldest} " in (ROOT / "Makefile").read_text()
    assert f"transformers=={newest};" in (ROOT / "constraints.txt").read_text()
    assert f'"transformers>={oldest},<' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("group", ["usual", pytest.param("rest", marks=pytest.mark.slow)])
def test_with_the_oldest_transformers(group):
    if not OLDEST.is_dir():
        fail = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        fail(f"{OLDEST} is not there: make .venv/transformers-oldest")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS[group]]
    path = os.pathsep.join(filter(None, [str(OLDEST), os.environ.get("PYTHONPATH")]))
    version = "import transformers; print(transformers.__version__)"
    run = {
        "env": os.environ | {"PYTHONPATH": path},
        "text": True,
        "capture_output": True,
        "cwd": ROOT,
    }
    assert subprocess.run([sys.executable, "-c", version], **run).stdout.strip() in TRANSFORMERS
    done = subprocess.run(command, **run)
    assert done.returncode == 0, done.stdout[-4000:]
